"""Train and sample a table of recipes, several seeds each on the same record, and print their errors.

    python docs/compare.py ablation                        # what each part of the recipe does, ten rows
    python docs/compare.py dissertation --steps=6000       # the dissertation's recipes beside the default
    python docs/compare.py samplers                        # the same networks, several samplers
    python docs/compare.py networks                        # U-Net and transformer

Run from the repository's root. Everything goes to out-compare/, a folder a row and seed; what is there is not
made again, so an interrupted table goes on where it stopped. Means over seeds (range).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

DISSERTATION = "--schedule=cosine --linear_skip=false"
MANY = "--sampler=ancestral --spacing=time --steps=256"
RECIPES = {  # row: settings of train.py, of sample.py
    "ablation": {
        "default": ("", ""),
        "no Gaussian part": ("--linear_skip=false", ""),
        "cosine noise levels": ("--schedule=cosine", ""),
        "loss weighting of eps": ("--weighting=eps", ""),
        "no transform": ("--transform=none", ""),
        "dry cells set apart": ("--transform=censored", ""),
        "no averaged weights": ("--ema_decay=0", ""),
        "clips of 1 to 8 frames": ("--min_frames=1", ""),
        "float32": ("--dtype=float32", "--dtype=float32"),
        "exact denoiser": ("", "--exact=true"),
    },
    "dissertation": {
        "default": ("", ""),
        "transform none": (f"--transform=none {DISSERTATION}", MANY),
        "transform sqrt": (f"--transform=sqrt {DISSERTATION}", MANY),
        "transform learnt": (f"--transform=learnt {DISSERTATION}", MANY),
    },
    "networks": {
        "U-Net": ("", ""),
        "transformer": ("--network=dit", ""),
    },
    "samplers": {
        "dpmpp_sde 64": ("", ""),
        "dpmpp 64": ("", "--sampler=dpmpp"),
        "dpmpp 24": ("", "--sampler=dpmpp --steps=24"),
        "dpmpp 8": ("", "--sampler=dpmpp --steps=8"),
        "modes 8": ("", "--sampler=modes --steps=8"),
        "modes 4": ("", "--sampler=modes --steps=4"),
        "ancestral 256": ("", "--sampler=ancestral --steps=256"),
    },
}
COLUMNS = {
    "std": "standard deviation",
    "q .9": "quantile 0.9",
    "q .99": "quantile 0.99",
    "q .999": "quantile 0.999",
    "q .9999": "quantile 0.9999",
    "dry": "dry fraction",
    "lag 1": "autocorrelation, lag 1",
    "lag 6": "autocorrelation, lag 6",
    "space": "spatial power, distance",
    "time": "temporal power, distance",
    "|bias|": "mean |bias| beyond sampling",
}


def call(script, out, settings):
    command = [sys.executable, script, f"--out_dir={out}", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def errors(seed, recipe, args):
    """Errors of one recipe and seed by column, trained and sampled if they are not there yet."""
    to_train, to_sample = (settings.split() for settings in recipe)
    name = "-".join(["trained", *to_train, str(seed), str(args.steps)])
    trained = Path("out-compare") / name.replace("/", "_")
    sampled = trained.with_name("-".join([trained.name, *to_sample, str(args.num_samples)]))
    if not (trained / "ckpt.pt").exists():
        common = [f"--seed={seed}", f"--max_iters={args.steps}", *args.train.split()]
        call("train.py", trained, common + to_train)
    report = sampled / "samples" / "verify.json"
    if not report.exists():
        sampled.mkdir(exist_ok=True)
        if not (sampled / "ckpt.pt").exists():
            (sampled / "ckpt.pt").symlink_to(trained.resolve() / "ckpt.pt")
        call("sample.py", sampled, [f"--num_samples={args.num_samples}", *to_sample])
    rows = next(iter(json.loads(report.read_text()).values()))["rows"]
    return {k: rows[label]["error"] for k, label in COLUMNS.items() if label in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1800, help="training steps of every recipe")
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--train", default="", help="settings of train.py for every recipe: '--size=16'")
    args = parser.parse_args()
    print(f"{'':<26}" + "".join(f"{k:>22}" for k in COLUMNS))
    for row, recipe in RECIPES[args.table].items():
        of_seeds = [errors(seed, recipe, args) for seed in range(args.seeds)]
        cells = []
        for k in COLUMNS:
            values = [e[k] for e in of_seeds if e.get(k) is not None]
            mean = sum(values) / max(len(values), 1)
            cells.append(f"{mean:.3f} ({min(values):.3f} .. {max(values):.3f})" if values else "-")
        print(f"{row:<26}" + "".join(f"{c:>22}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
