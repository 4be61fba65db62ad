"""What missing values do: a Gaussian field of known law with gaps and with land, three seeds each.

    PYTHONPATH=. python docs/missing.py --jobs=2                   # the table of the known field
    PYTHONPATH=. python docs/missing.py --jobs=2 --sst=ersst.nc    # the warmest cells of a real one

Run from the repository's root; everything goes to out-missing/. A clip of the known field is a pattern that
stands still and `--dataset=gaussian` of 16 x 16 cells. `gaps`: a quarter is missing in boxes that move;
`land`: 45 % of the cells never have data. `draws` is what the scripts do, fill what is missing with draws of
the Gaussian law given what is there; `zeros` fills with the mean and keeps x_hat there at it.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compare
import numpy as np

import data

SIZE, SEASONS = 16, 60
ROOT = Path("out-missing")
ZEROS = (
    ("diffusion.py", "range(ROUNDS)", "range(0)"),
    ("train.py", "self.filled(x, starts, generator)", "x.nan_to_num()"),
    ("model.py", "return diffusion.to_x(", "return self.valid * diffusion.to_x("),
)
BANDS = {"mode 1": slice(0, 1), "2 to 5": slice(1, 5), "6 to 20": slice(5, 20), "21 to 60": slice(20, 60)}
BANDS["finest"] = slice(60, None)


def pattern():
    """The mean that the field has in every cell, (SIZE, SIZE)."""
    x = (np.arange(SIZE) + 0.5) / SIZE
    return np.cos(2 * np.pi * x[:, None]) * np.cos(3 * x)


def land():
    """True where there never are data: the smooth coast of an island and a continent, 45 % of the cells."""
    rng = np.random.default_rng(3)
    k = np.fft.fftfreq(SIZE)
    smooth = np.fft.ifft2(
        np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / (0.1 + np.hypot(k[:, None], k)) ** 3
    )
    return smooth.real > np.quantile(smooth.real, 0.55)


def make(name):
    """Write a version of the known field; returns its path."""
    path = ROOT / f"{name}.npz"
    if not path.exists():
        record = data.builtin("gaussian", SIZE, 0)
        x = record.frames(0, SEASONS * data.SEASON_HOURS)[0] + pattern().astype(np.float32)
        if name == "land":
            x[:, land()] = np.nan
        if name == "gaps":  # boxes of a half by a half of the domain, which move by a cell an hour
            y0, x0 = np.random.default_rng(0).integers(0, SIZE, (2, len(x) // 24 + 1, 1))
            t = np.arange(len(x))
            at = (np.arange(SIZE) - y0[t // 24]) % SIZE, (np.arange(SIZE) + t[:, None] - x0[t // 24]) % SIZE
            x[(at[0] < SIZE // 2)[:, :, None] & (at[1] < SIZE // 2)[:, None]] = np.nan
        path.parent.mkdir(exist_ok=True)
        np.savez(path, z=x, time=record.hours[: len(x)])
    return path


def samples(out, recipe, train, sample, jobs):
    """Train and draw with a recipe; the samples in physical units, (N, T, H, W)."""
    code = compare.edited(recipe, out.with_name(out.name + "-code"))
    if not (out / "ckpt.pt").exists():
        compare.call(code, "train.py", out, train, jobs)
    if not (out / "samples" / "samples.npz").exists():
        compare.call(code, "sample.py", out, [*sample, "--verify=false"], jobs)
    return np.load(out / "samples" / "samples.npz")["samples"][:, 0]


def figures(x, sea):
    """What is known of the field, in samples (N, T, H, W) over truth; cells of `sea` (H, W) alone."""
    mean, m = pattern()[sea], x[..., sea].mean((0, 1))
    a = x[..., sea].reshape(-1, sea.sum()) - m
    i, j = np.nonzero(sea)
    C = data.lag_covariance(1, SIZE)[0].numpy()[i[:, None] - i, j[:, None] - j]  # modulo 2 SIZE
    w, U = np.linalg.eigh(C)
    ratio = ((a @ U) ** 2).mean(0)[::-1] / w[::-1]
    rows = {"slope of cell means": np.polyfit(mean, m, 1)[0], "variance of a cell": (a**2).mean() / C[0, 0]}
    near = np.any([np.roll(~sea, s, d) for s in (-1, 1) for d in (0, 1)], 0)[sea]
    rows["variance at coasts"] = (a[:, near] ** 2).mean() / C[0, 0] if near.any() else np.nan
    return rows | {k: ratio[band].mean() for k, band in BANDS.items()}


def warmest(x, record):
    """By how much samples go beyond a record, at all and in their own cell, in its units."""
    high, low = np.nanmax(record, 0), np.nanmin(record, 0)
    rows = {"largest": np.nanmax(x) - np.nanmax(high), "largest of its cell": np.nanmax(x - high)}
    rows["mean std of a cell / record's"] = np.nanmean(x.std((0, 1))) / np.nanmean(np.nanstd(record, 0))
    return rows | {"smallest": np.nanmin(x) - np.nanmin(low)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--rows", default="complete,gaps,land", help="of the known field")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument(
        "--sst", default="", help="a file of a real field with land, in place of the known one"
    )
    args = parser.parse_args()
    draws, zeros = compare.Recipe(), compare.Recipe(edits=ZEROS)
    rows = [("complete", draws), ("gaps", draws), ("gaps", zeros), ("land", draws), ("land", zeros)]
    rows = [row for row in rows if row[0] in args.rows.split(",")]
    train = [f"--max_iters={args.steps}", f"--eval_interval={args.steps}"]
    sample, record = ["--num_samples=2048", "--steps=32"], None
    if args.sst:
        rows, sample = [("sst", draws), ("sst", zeros)], ["--num_samples=64", "--steps=32"]
        train += [f"--dataset={args.sst}", "--select=lat=-88:86", "--coarsen=2", "--batch_size=8"]
        record = data.open_record(args.sst, select="lat=-88:86").coarsened(2).frames(0, None)[0]

    def measured(row, seed):
        name, recipe = row
        out = ROOT / f"{name}-{'zeros' if recipe.edits else 'draws'}-{seed}-{args.steps}"
        field = [] if args.sst else [f"--dataset={make(name)}"]
        own = f"--seed={seed}"  # of the noise drawn from, too: what seeds share would be no sampling error
        x = samples(out, recipe, [*train, *field, own], [*sample, own], args.jobs)
        sea = ~land() if name == "land" else np.ones((SIZE, SIZE), bool)
        return warmest(x, record) if args.sst else figures(x, sea)

    [make(name) for name, _ in rows if not args.sst]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            (i, s): pool.submit(measured, row, s) for s in range(args.seeds) for i, row in enumerate(rows)
        }
        for i, (name, recipe) in enumerate(rows):
            found = [runs[i, s].result() for s in range(args.seeds)]
            if i == 0:
                print("| | " + " | ".join(found[0]) + " |")
            cells = [[f[k] for f in found] for k in found[0]]
            cells = [f"{np.mean(v):.2f} ({min(v):.2f} .. {max(v):.2f})" for v in cells]
            print(
                f"| {name}, {'zeros' if recipe.edits else 'draws'} | " + " | ".join(cells) + " |", flush=True
            )


if __name__ == "__main__":
    main()
