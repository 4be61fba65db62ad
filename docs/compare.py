"""Train and sample a table of recipes, several seeds each on the same record, and print their errors.

    python docs/compare.py mechanisms --train=--size=16 --minutes=4 --jobs=2    # what each part does
    python docs/compare.py dissertation                                         # the dissertation's recipes
    python docs/compare.py told --train=--size=16                               # rain, given coarse weather
    python docs/compare.py samplers                                             # one network, many samplers
    python docs/compare.py networks --minutes=15                                # U-Net and transformer
    python docs/compare.py widths --train=--size=16 --minutes=4 --jobs=2        # how wide in so little time
    python docs/compare.py transforms --train=--size=16 --minutes=3 --jobs=2    # of rain

Run from the repository's root, with nothing else running. Everything goes to out-compare/, a folder a row and
seed; what is there is not made again, so an interrupted table goes on where it stopped. Means over seeds
(range), each seed with noise of its own in sampling, too. A recipe may change lines of the scripts: it is run
from a copy of them.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = ("data.py", "diffusion.py", "model.py", "train.py", "sample.py")
DISSERTATION = "--schedule=cosine --linear_skip=false"
MANY = "--sampler=ancestral --spacing=time --steps=256"


@dataclass(frozen=True)
class Recipe:
    train: str = ""  # settings of train.py
    sample: str = ""  # of sample.py
    edits: tuple = ()  # (script, its text, what takes the place of it)


ESTIMATES = ("model.py", "seen = [(x_hat - law.mean) / law.spread(logsnr), above]", "seen = [z, above]")
HALF = "partial(multistep, order=2, eta=0.5)"
NO_CELLS = (
    (
        "model.py",
        "Conv(h, c.width // 8 * c.patch**2, c.wrap_x)",
        "zero(Conv(h, c.in_channels * c.patch**2, c.wrap_x))",
    ),
    ("model.py", "h = self.run(self.cell, h, cells, next(films), T)", ""),
)
RECIPES = {
    "mechanisms": {
        "default": Recipe(),
        "no Gaussian part": Recipe("--linear_skip=false"),
        "cosine noise levels": Recipe("--schedule=cosine"),
        "time and x apart": Recipe(edits=(("diffusion.py", "TOGETHER = 512", "TOGETHER = 0"),)),
        "z in place of estimates": Recipe(
            edits=(ESTIMATES, ("model.py", "self.network(eps_hat, logsnr,", "self.network(z, logsnr,"))
        ),
        "no distance to the lowest": Recipe(
            edits=(("model.py", "torch.asinh((z - alpha * self.low) / sigma)", "torch.zeros_like(z)"),)
        ),
        "no envelope": Recipe(
            edits=(("model.py", "law.scaled(added, law.envelope(logsnr))", "added"),),
        ),
        "no layer of single cells": Recipe(edits=NO_CELLS),
        "no averaged weights": Recipe("--ema_decay=0"),
        "no transform": Recipe("--transform=none"),
        "loss weighting of eps": Recipe("--weighting=eps"),
        "transformer": Recipe("--network=dit"),
        "noise in all steps": Recipe(sample="--sampler=dpmpp_sde"),
        "noise in no step": Recipe(sample="--sampler=dpmpp"),
    },
    "dissertation": {
        "default": Recipe(),
        "transform none": Recipe(f"--transform=none {DISSERTATION}", MANY),
        "transform sqrt": Recipe(f"--transform=sqrt {DISSERTATION}", MANY),
        "transform learnt": Recipe(f"--transform=learnt {DISSERTATION}", MANY),
    },
    "told": {
        "as it is": Recipe("--condition=weather"),
        "with the envelope": Recipe(
            "--condition=weather", edits=(("model.py", " if cond is None else added", ""),)
        ),
    },
    "networks": {"U-Net": Recipe(), "transformer": Recipe("--network=dit")},
    "widths": {f"width {n}": Recipe(f"--width={n}") for n in (16, 32, 48, 64, 96)},
    "transforms": {t: Recipe(f"--transform={t}") for t in ("cbrt", "sqrt", "log", "quantile", "censored")},
    "samplers": {
        "dpmpp_mixed 64": Recipe(),
        "dpmpp_sde 64": Recipe(sample="--sampler=dpmpp_sde"),
        "half the noise": Recipe(
            sample="--sampler=dpmpp_sde", edits=(("diffusion.py", "partial(multistep, order=2)", HALF),)
        ),
        "dpmpp 64": Recipe(sample="--sampler=dpmpp"),
        "dpmpp 24": Recipe(sample="--sampler=dpmpp --steps=24"),
        "dpmpp 8": Recipe(sample="--sampler=dpmpp --steps=8"),
        "modes 8": Recipe(sample="--sampler=modes --steps=8"),
        "modes 4": Recipe(sample="--sampler=modes --steps=4"),
        "ancestral 256": Recipe(sample="--sampler=ancestral --steps=256"),
        "exact denoiser": Recipe(sample="--exact=true"),
    },
}
COLUMNS = {  # of verify.json
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
    "frames": "mean |bias| per frame",
}
ENSEMBLES = {"forecast": "--task=forecast", "interpolate": "--task=interpolate --sampler=dpmpp"}
MEMBERS = "--members=16 --num_samples=1024 --steps=16"  # 64 conditions


def call(code, script, out, settings, jobs):
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    command = [sys.executable, str(code / script), f"--out_dir={out}", *settings]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def edited(recipe, folder):
    """The folder of the scripts with the edits of a recipe."""
    if not recipe.edits:
        return Path(".")
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        text = Path(name).read_text()
        for script, old, new in recipe.edits:
            if script == name and old not in text:
                sys.exit(f"{script} has no longer: {old}")
            text = text.replace(old, new) if script == name else text
        (folder / name).write_text(text)
    return folder


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Table:
    """What is trained and drawn for every recipe and seed, below out-compare/."""

    def __init__(self, args):
        self.args, self.root = args, Path("out-compare")

    def place(self, recipe):
        """(folder of a recipe's trainings, its scripts): recipes that train alike share one."""
        stamp = hashlib.sha256(repr((recipe.train, recipe.edits, self.args.train)).encode()).hexdigest()[:8]
        folder = self.root / f"{stamp}-{self.args.minutes or self.args.steps}"
        return folder, edited(recipe, folder / "code")

    def steps(self, recipe):
        """Training steps of a recipe: those asked for, or as many as it does in so many minutes."""
        if not self.args.minutes:
            return self.args.steps
        folder, code = self.place(recipe)
        out = folder / "speed"
        if not (out / "ckpt.pt").exists():
            settings = ["--max_iters=60", "--eval_iters=1", *self.args.train.split(), *recipe.train.split()]
            call(code, "train.py", out, settings, self.args.jobs)
        clips = max(line["clips_per_s"] for line in log_of(out)[:-1])
        return round(60 * self.args.minutes * clips / 32)

    def errors(self, recipe, seed, steps):
        """Errors of one recipe and seed by column, trained and sampled if they are not there yet."""
        args = self.args
        folder, code = self.place(recipe)
        trained = folder / str(seed)
        if not (trained / "ckpt.pt").exists():
            common = [f"--seed={seed}", f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_iters=32"]
            settings = [*common, *args.train.split(), *recipe.train.split()]
            call(code, "train.py", trained, settings, args.jobs)
        draws = {"free": f"--num_samples={args.num_samples}"}
        draws |= {k: f"{v} {MEMBERS}" for k, v in ENSEMBLES.items() if args.ensembles}
        found, own = {"loss": log_of(trained)[-1]["val_loss"]}, f"{args.sample} {recipe.sample}".split()
        for name, settings in draws.items():
            settings = [f"--seed={seed}", *settings.split(), *(own if name == "free" else [])]
            stamp = hashlib.sha256(" ".join(settings).encode()).hexdigest()[:8]
            out = folder / f"{seed}-{name}-{stamp}"
            if not (out / "samples" / "verify.json").exists():
                out.mkdir(exist_ok=True)
                (out / "ckpt.pt").unlink(missing_ok=True)
                (out / "ckpt.pt").symlink_to(trained.resolve() / "ckpt.pt")
                call(code, "sample.py", out, settings, args.jobs)
            report = next(iter(json.loads((out / "samples" / "verify.json").read_text()).values()))
            if name == "free":
                found |= {k: report["rows"][v]["error"] for k, v in COLUMNS.items() if v in report["rows"]}
                continue
            scores = report["ensemble"]
            found[f"{name} CRPS"] = sum(scores["crps"]) / sum(scores["crps_climatology"])
            found[f"{name} spread"] = scores["spread_skill_transformed"][0]
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1800, help="training steps of every recipe")
    parser.add_argument("--minutes", type=float, default=0, help="in place of --steps: of training for each")
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--ensembles", action="store_true", help="forecasts and interpolations, too")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time, which share the cores")
    parser.add_argument("--train", default="", help="settings of train.py for every recipe: '--size=16'")
    parser.add_argument("--sample", default="", help="settings of sample.py for every recipe")
    parser.add_argument("--rows", default="", help="comma-separated, of the table; empty: all")
    args = parser.parse_args()
    rows = {k: v for k, v in RECIPES[args.table].items() if not args.rows or k in args.rows.split(",")}
    table = Table(args)
    steps = {row: table.steps(recipe) for row, recipe in rows.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (row, seed): pool.submit(table.errors, recipe, seed, steps[row])
            for seed in range(args.seeds)
            for row, recipe in rows.items()
        }
        print("| | steps | " + " | ".join(runs[next(iter(runs))].result()) + " |")
        for row in rows:
            found = [runs[row, seed].result() for seed in range(args.seeds)]
            cells = []
            for k in found[0]:
                values = [f[k] for f in found if f.get(k) is not None]
                mean = sum(values) / max(len(values), 1)
                cells.append(f"{mean:.3f} ({min(values):.3f} .. {max(values):.3f})" if values else "-")
            print(f"| {row} | {steps[row]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
