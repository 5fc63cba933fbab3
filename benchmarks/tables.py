"""Write the tables and plots of the two READMEs from the recorded files in benchmarks/results/.

python benchmarks/tables.py            # rewrites the tables between their marks, and the plots
python benchmarks/tables.py --check    # exit status 1 if they differ from the files
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
READMES = ["README.md", "benchmarks/README.md"]
BARE = "byol --projection-layers 0 --ema 0.99 --ema-schedule constant"
COLUMNS = {"pixels": "pixels", "untrained": "untrained encoder", "simclr": "SimCLR"}
COLUMNS |= {"byol": "BYOL", BARE: "BYOL, bare target", "barlow_twins": "Barlow Twins"}
SETS = {
    "digits": "Digits, default runs, three seeds",
    "fashion_mnist": "Fashion-MNIST, short runs",
    "cifar10_jpeg": "CIFAR-10 (JPEG q75), short runs",
}
# Name of a plot: data set, recorded table, title.
PLOTS = {data: (data, "accuracy", title) for data, title in SETS.items()}
PLOTS["digits-labels"] = ("digits", "labels", "Digits with few labels, three seeds")
NOISE = {"again/step": "full step / itself (noise)"}
STEP = {"step/model": "full step / forward and backward only"}
STEP |= {"variant/step": "bf16 / float32", **NOISE}
LIGHTLY = {"step/lightly shipped": "full step / lightly as shipped"}
LIGHTLY |= {"step/lightly tuned": "full step / lightly, tuned", **NOISE}


@dataclass
class Args:
    """Tables and plots of README.md and benchmarks/README.md."""

    check: bool = False
    """only compare"""


def load(name):
    """A recorded JSON file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(header, lines):
    """A Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)


def recorded(data):
    """{name: the recorded lines of one data set, a seed each}."""
    found = {}
    for line in map(json.loads, (RESULTS / "accuracy-cpu.jsonl").open()):
        if line["data"] == data:
            found.setdefault(line["name"], []).append(line)
    return {name: found[name] for name in COLUMNS if name in found}


def accuracies(data, key="accuracy"):
    """{name: list of {k, or labels per class: accuracy in %}} over the seeds of one data set."""
    return {
        name: [{int(x): 100 * y for x, y in line[key].items() if x != "all"} for line in lines]
        for name, lines in recorded(data).items()
    }


def mean_to_100(run):
    return mean(value for k, value in run.items() if k <= 100)


def sweep(data):
    """Accuracy over k, mean over the seeds, and the mean over the k up to 100."""
    found = accuracies(data)
    lines = []
    for k in found["pixels"][0]:
        lines.append([k, *(f"{mean(run[k] for run in runs):.1f}" for runs in found.values())])
    means = [[mean_to_100(run) for run in runs] for runs in found.values()]
    lines.append(["**mean to 100**", *(f"**{mean(column):.2f}**" for column in means)])
    if any(len(column) > 1 for column in means):
        by_seed = (", ".join(f"{value:.2f}" for value in column) for column in means)
        lines.append(["by seed", *by_seed])
    return rows(["k", *map(COLUMNS.get, found)], lines)


def digits_labels():
    """The digits with few labels, a line per method."""
    lines = []
    for name, runs in recorded("digits").items():
        if name != BARE:
            cells = [mean(100 * run["labels"][n] for run in runs) for n in ("1", "5", "20", "all")]
            lines.append([COLUMNS[name], *(f"{cell:.1f}" for cell in cells)])
    return rows(["labels per digit", "1", "5", "20", "all"], lines)


def whitened():
    """Accuracy at the chosen k of the recorded features, as they are and whitened."""
    lines = []
    for data, title in SETS.items():
        for name, runs in recorded(data).items():
            if name != "pixels":
                keys = ("accuracy_at_chosen_k", "whitened")
                cells = (f"{mean(100 * run[key] for run in runs):.1f}" for key in keys)
                better = sum(run["whitened"] > run["accuracy_at_chosen_k"] for run in runs)
                lines.append([title, COLUMNS[name], *cells, f"{better} of {len(runs)}"])
    return rows(["data", "", "features", "whitened", "better"], lines)


def init():
    """Fashion-MNIST from random weights and from those of another data set, at equal epochs."""
    lines = []
    for line in map(json.loads, (RESULTS / "accuracy-cpu.jsonl").open()):
        if "--epochs 2" in line["name"]:
            cells = [line["accuracy_at_chosen_k"], line["whitened"], line["labels"]["10"]]
            name = line["name"].replace(" --epochs 2", "").replace("simclr", "trained")
            lines.append([name, *(f"{100 * cell:.1f}" for cell in cells)])
    return rows(["", "kNN", "whitened", "10 labels a class"], lines)


def lines_of(name):
    """The lines of a recorded file; none before the first run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def verdict(differences):
    """Mean, 95 % t-interval and conclusion of differences in points, a seed each."""
    n, center, sem = len(differences), mean(differences), stats.sem(differences)
    half, narrow = (stats.t.ppf(p, n - 1) * sem for p in (0.975, 0.95))
    word = "better" if center > half else "worse" if center < -half else "undecided"
    if abs(center) + narrow < 1:
        word = "equal"
    return [f"{center:+.1f} ({center - half:+.1f} to {center + half:+.1f})", word]


def versus_lightly():
    """Differences to lightly by method and side, paired by seed."""
    found, lines = {}, []
    for line in lines_of("versus-lightly-cpu"):
        found.setdefault((line["method"], line["side"]), {})[line["seed"]] = line
    for (method, side), runs in sorted(found.items(), key=lambda item: item[0][1]):
        theirs = found.get((method, "lightly"), {})
        seeds = sorted(runs.keys() & theirs.keys())
        if side in ("arm A", "arm B", "bug") and len(seeds) > 1:
            cells = [f"{mean(run[seed]['k20'] for seed in seeds):.1f}" for run in (runs, theirs)]
            pairs = [[runs[s][k] - theirs[s][k] for s in seeds] for k in ("k20", "k200")]
            more = verdict(pairs[0]), verdict(pairs[1])
            lines.append([side, COLUMNS[method], *cells, *more[0], more[1][0], len(seeds)])
    header = ["", "", "ours", "lightly", "difference", "", "with k = 200", "seeds"]
    return rows(header, lines)


def draw(name, path):
    """Plot a sweep, from the lowest to the highest seed; the file carries the data's digest."""
    data, key = PLOTS[name][:2]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    references = dict(pixels=dict(color="0.4", ls="--"), untrained=dict(color="0.4", ls=":"))
    for column, runs in accuracies(data, key).items():
        xs, style = list(runs[0]), references.get(column, {})
        means = [mean(run[x] for run in runs) for x in xs]
        (line,) = axes.plot(xs, means, marker=".", label=COLUMNS[column], **style)
        low, high = ([choose(run[x] for run in runs) for x in xs] for choose in (min, max))
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    xlabel = "k" if key == "accuracy" else "labels per class"
    axes.set(xscale="log", xlabel=xlabel, ylabel="test accuracy in %", title=PLOTS[name][2])
    axes.set_xticks(xs, xs)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Source": digest(name)})


def digest(name):
    """Hash of the recorded accuracies that a plot shows."""
    data, key = PLOTS[name][:2]
    return hashlib.sha256(json.dumps(accuracies(data, key)).encode()).hexdigest()


def ops():
    """Ratios of the parts of a step."""
    result, knn = load("ops-cpu"), load("knn-cpu")
    titles = {
        "info_nce": "`info_nce`, N = 512, forward and backward, against a loop over rows",
        "views": "two views, 32 px, one thread, against torchvision's transforms on PIL images",
        "views_with_blur": "the same with blur",
        "ema_update": "`ema_update` on a ResNet-18, against a loop that rebinds `.data`",
    }
    lines = []
    for key, title in titles.items():
        row = result[key]
        lines.append([title, f"{row['ratio']} ({row['lowest']} to {row['highest']})"])
    size = f"{knn['train']} x {knn['test']} x {knn['dim']}"
    title = f"`knn_sweep`, 13 k, {size}, against 13 fits of KNeighborsClassifier"
    differ = f"{knn['differing']} of {knn['predictions']} predictions differ"
    lines.append([title, f"{knn['ratio']}; {differ}"])
    share = mean(knn["few_labels_over_sweep"])
    lines.append(["its table of few labels: share of the time of both sweeps", f"{share:.2f}"])
    return rows(["part", "times faster (range)"], lines)


def kernels():
    """Kernels and bytes of the views and of a step, before and after."""
    before, now = (
        {(x["method"], x["size"], x["part"]): x for x in load(name)["lines"]}
        for name in ("kernels-before", "kernels")
    )
    lines = []
    for (method, size, part), line in now.items():
        if part in ("two_views", "train_step"):
            pair = before[method, size, part], line
            cells = [" → ".join(str(x["kernels"]) for x in pair)]
            cells.append(" → ".join(f"{x['gb']:.2f}" for x in pair))
            lines.append([COLUMNS[method], f"{size} px", f"`{part}`", *cells])
    return rows(["", "", "", "kernels", "GB moved"], lines)


def throughput(name, titles):
    """Ratios of samples per second in one file of benchmarks/throughput.py."""
    methods, lines = load(name)["methods"], []
    for key, title in titles.items():
        ratios = [method["ratios"][key] for method in methods.values()]
        cells = (f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in ratios)
        lines.append([title, *cells])
    return rows(["samples per second", *map(COLUMNS.get, methods)], lines)


def folders():
    """Decoding and start-up with folders of images."""
    result, lines = load("folders-cpu"), []
    for name, row in result["decoding"].items():
        ratio = f"{row['ratio']} ({row['lowest']} to {row['highest']}), {row['cores']} cores"
        lines.append([f"decoding, {name}: images per second and core / Pillow on one core", ratio])
    for name, row in result["start"].items():
        share = f"{row['second_start_s'] / row['first_start_s']:.2f}"
        lines.append([f"{row['files']:,} files, {name}: second start / first start", share])
    return rows(["what", "measured"], lines)


def on_paper():
    """What larger sets would need at 160 px, by the measured rates."""
    result, lines = load("folders-cpu"), []
    decoding, start = result["decoding"]["photographs at 160"], result["start"]["CIFAR-10 (JPEG)"]
    size, listing = 3 * decoding["side"] ** 2, start["second_start_s"] / start["files"] / 60
    for name, n in (("ImageNet-1k, 1.28 million images", 1.28e6), ("100 million images", 1e8)):
        minutes = n / decoding["images_per_second_and_core"] / 16 / 60
        times = f"{minutes:.0f} min", f"{n * listing:.1f} min"
        lines.append([name, f"{n * size / 1e9:,.0f} GB", *times, f"{size / 1e3:.0f} MB/s"])
    header = ["", "disk", "decoding once, 16 cores", "listing at every start"]
    return rows([*header, "reading, per 1,000 samples/s"], lines)


def render(text):
    """A README with all tables between their marks made from the recorded files."""
    tables = dict(digits_labels=digits_labels, whitened=whitened, init=init, ops=ops)
    tables |= dict(folders=folders, on_paper=on_paper, kernels=kernels)
    tables |= dict(versus_lightly=versus_lightly)
    tables["throughput"] = lambda: throughput("throughput-cpu-bf16", STEP)
    tables["lightly"] = lambda: throughput("throughput-cpu", LIGHTLY)
    tables |= {data: lambda data=data: sweep(data) for data in SETS}

    def table(found):
        return f"<!-- {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n(?:\|.*\n)*<!-- end -->", table, text)


def main(args):
    """Write, or compare."""
    stale = []
    for path in (ROOT / name for name in READMES):
        text = path.read_text()
        if render(text) != text:
            stale.append(str(path))
            if not args.check:
                path.write_text(render(text))
    for name in PLOTS:
        path = ROOT / f"benchmarks/pictures/{name}.png"
        if not path.exists() or Image.open(path).text.get("Source") != digest(name):
            stale.append(str(path))
            if not args.check:
                draw(name, path)
    if args.check and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results/; run benchmarks/tables.py")


if __name__ == "__main__":
    main(tyro.cli(Args))
