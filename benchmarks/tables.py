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
from statistics import mean, stdev

import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from knn_eval import draw_curves

RESULTS = ROOT / "benchmarks/results"
READMES = ["README.md", "benchmarks/README.md"]
COLUMNS = {
    "pixels": "pixels",
    "untrained": "untrained encoder",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "barlow_twins": "Barlow Twins",
    "byol --epochs 60": "BYOL, 60 epochs",
    "barlow_twins --epochs 50": "Barlow Twins, 50 epochs",
}
DIGITS, CIFAR10 = "digits-cpu", "cifar10-cpu"
# Name of a plot of accuracies: recorded file, recorded table, title.
PLOTS = {
    "digits": (DIGITS, "accuracy", "Digits, default runs, three seeds"),
    "digits-labels": (DIGITS, "labels", "Digits with few labels, three seeds"),
    "cifar10": (CIFAR10, "accuracy", "CIFAR-10 (JPEG q75) on one CPU core"),
    "cifar10-training": (CIFAR10, "curve", "CIFAR-10 (JPEG q75) on one CPU core"),
}
NOISE = {"again/step": "full step / itself (noise)"}
STEP = {
    "step/model": "full step / forward and backward only",
    "variant/step": "bf16 / float32",
    **NOISE,
}
COMPILED = {"variant/step": "compiled / eager", **NOISE}
LIGHTLY = {
    "step/lightly shipped": "full step / lightly as shipped",
    "step/lightly tuned": "full step / lightly, tuned",
}


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


def lines_of(name):
    """The lines of a recorded file; none before the first run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def recorded(name):
    """{pixels, untrained or method: its lines in a recorded file, a seed each}."""
    found = {}
    for line in lines_of(name):
        # The names of runs on a folder end in their flags.
        found.setdefault(line["name"].split(" --dataset")[0], []).append(line)
    return {column: found[column] for column in COLUMNS if column in found}


def accuracies(name, key):
    """{column: list of {k, or labels per class: accuracy in %}} over the seeds."""
    return {
        column: [{int(x): 100 * y for x, y in run[key].items() if x != "all"} for run in runs]
        for column, runs in recorded(name).items()
    }


def sweep(name):
    """Accuracy over k, its mean up to 100, at the chosen k, whitened, and logistic regression."""
    found = accuracies(name, "accuracy")
    lines = []
    for k in found["pixels"][0]:
        lines.append([k, *(f"{mean(run[k] for run in runs):.1f}" for runs in found.values())])
    means = [[mean(run[k] for k in run if k <= 100) for run in runs] for runs in found.values()]
    lines.append(["**mean to 100**", *(f"**{mean(column):.2f}**" for column in means)])
    if any(len(column) > 1 for column in means):
        by_seed = (", ".join(f"{value:.2f}" for value in column) for column in means)
        lines.append(["by seed", *by_seed])
    more = {
        "chosen k": lambda run: run["accuracy_at_chosen_k"],
        "chosen k, whitened": lambda run: run.get("whitened"),
        "1 label per class": lambda run: run["labels"]["1"],
        "1 label per class, whitened": lambda run: run.get("whitened_labels", {}).get("1"),
        "logistic regression": lambda run: run.get("probe", {}).get("all"),
    }
    for title, value in more.items():
        columns = [[value(run) for run in runs] for runs in recorded(name).values()]
        cells = ["" if None in column else f"{100 * mean(column):.1f}" for column in columns]
        lines += [[title, *cells]] if any(cells) else []
    return rows(["k", *map(COLUMNS.get, found)], lines)


def few_labels(name, labels, header):
    """Accuracy if only n labels per class are known, a line per method, mean over the seeds."""
    lines = []
    for column, runs in recorded(name).items():
        cells = [f"{100 * mean(run['labels'][n] for run in runs):.1f}" for n in (*labels, "all")]
        white = [100 * run["whitened"] for run in runs if "whitened" in run]
        lines.append([COLUMNS[column], *cells, f"{mean(white):.1f}" if white else ""])
    return rows([header, *labels, "all", "all, whitened"], lines)


def verdict(differences):
    """Mean, 95 % t-interval and conclusion of differences in points, a seed each."""
    n, center = len(differences), mean(differences)
    if n == 1:
        return [f"{center:+.1f}", "too few seeds"]
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval()
    word = "better" if low > 0 else "worse" if high < 0 else "undecided"
    if max(map(abs, test.confidence_interval(0.9))) < 1:
        word = "equivalent"
    # As the protocol has it.
    word = word if n >= 5 else "too few seeds"
    return [f"{center:+.1f} ({low:+.1f} to {high:+.1f})", word]


def sides_of_lightly():
    """Side, method, our accuracy, lightly's, difference, verdict, difference at k = 200, seeds."""
    found, lines = {}, []
    for line in lines_of("versus-lightly-cpu"):
        key = line["side"], [*COLUMNS].index(line["method"])
        found.setdefault(key, {})[line["seed"]] = line
    for (side, i), runs in sorted(found.items()):
        theirs = found.get(("arm B" if side == "bug B" else "lightly", i), {})
        paired = sorted(runs.keys() & theirs.keys())
        if side in ("lightly", "update"):
            continue
        if side in ("arm A", "arm B", "bug", "bug B") and paired:
            accuracy = f"{mean(theirs[seed]['k20'] for seed in paired):.1f}"
            differences = [[runs[s][k] - theirs[s][k] for s in paired] for k in ("k20", "k200")]
            (shown, word), (more, _) = map(verdict, differences)
            runs, cells = {seed: runs[seed] for seed in paired}, [accuracy, shown, word, more]
        else:
            cells = [""] * 4
        accuracy = f"{mean(run['k20'] for run in runs.values()):.1f}"
        lines.append([side, list(COLUMNS.values())[i], accuracy, *cells, len(runs)])
    return lines


def versus_lightly():
    """Differences to lightly by side and method, paired by seed, and the controls."""
    header = ["", "", "ours", "lightly", "difference", "", "with k = 200", "seeds"]
    return rows(header, sides_of_lightly())


def next_to_lightly():
    """The two recipes, a line per method."""
    sides, lines = sides_of_lightly(), {}
    for arm, method, ours, lightly, difference, word, *_ in sides:
        if arm in ("arm A", "arm B"):
            lines.setdefault(method, [method, lightly]).extend([ours, f"{difference}, {word}"])
    header = ["kNN accuracy in %", "lightly", "ours, its recipe", "difference"]
    return rows([*header, "ours, our recipe", "difference"], lines.values())


def draw(name):
    """Plot a sweep."""
    (file, key, title), lines = PLOTS[name], []
    for column, runs in accuracies(file, key).items():
        for x in runs[0]:
            values = [run[x] / 100 for run in runs]
            lines.append([COLUMNS[column], x, mean(values), stdev(values) if runs[1:] else 0])
    figure = draw_curves(lines, "k" if key == "accuracy" else "labels per class")
    figure.axes[0].set_title(title)
    return figure


def draw_training(name):
    """Plot loss, kNN accuracy and effective rank of the first seed over the epochs."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    titles = dict(loss="loss / first loss", knn_acc="kNN accuracy", effective_rank="effective rank")
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        for column, (run, *_) in recorded(PLOTS[name][0]).items():
            points = [(row["epoch"], row[key]) for row in run.get("curve", ()) if key in row]
            if len(points) > 1:
                epochs, values = zip(*points)
                scale = values[0] if key == "loss" else 1
                axes.plot(epochs, [value / scale for value in values], ".-", label=COLUMNS[column])
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle(PLOTS[name][2])
    return figure


def ops():
    """Ratios of the parts of a step."""
    result, knn = load("ops-cpu"), load("knn-cpu")
    titles = {
        "views": "two views, 32 px, one thread, against torchvision's transforms on PIL images",
        "views_with_blur": "the same with blur",
    }
    lines = []
    for key, title in titles.items():
        row = result[key]
        lines.append([title, "{ratio:.1f} ({lowest:.1f} to {highest:.1f})".format(**row)])
    size = f"{knn['train']} x {knn['test']} x {knn['dim']}"
    title = f"`knn_sweep`, 13 k, {size}, against 13 fits of KNeighborsClassifier"
    differ = f"{knn['differing']} of {knn['predictions']} predictions differ"
    lines.append([title, f"{knn['ratio']}; {differ}"])
    return rows(["part", "times faster (range)"], lines)


def kernels():
    """Kernels and bytes of the views."""
    lines = []
    for line in load("kernels")["lines"]:
        if line["part"] == "two_views":
            counts = line["kernels"], f"{line['gb']:.2f}"
            lines.append([COLUMNS[line["method"]], f"{line['size']} px", *counts])
    return rows(["", "", "kernels", "GB moved"], lines)


def throughput(titles, *names):
    """Ratios of samples per second in files of benchmarks/throughput.py."""
    methods, lines = {}, []
    for name in names:
        methods |= load(name)["methods"]
    for key, title in titles.items():
        ratios = [method["ratios"].get(key, "") for method in methods.values()]
        cells = (r and f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in ratios)
        lines.append([title, *cells])
    if LIGHTLY.items() <= titles.items():
        sides, cells = ("step", "lightly tuned", "lightly shipped"), []
        for speed in (method["samples_per_sec"] for method in methods.values()):
            cells.append(" / ".join(f"{50_000 / speed[key]:.0f}" for key in sides if key in speed))
        lines.append(["seconds for 50,000 images: full step / tuned / as shipped", *cells])
    return rows(["ratio of samples per second", *map(COLUMNS.get, methods)], lines)


def render(text):
    """A README with all tables between their marks made from the recorded files."""
    tables = dict(
        digits=few_labels(DIGITS, ("1", "5", "20"), "labels per digit"),
        cifar10=few_labels(CIFAR10, ("1", "10", "100"), "labels per class"),
        few100=few_labels("few100-cpu", ("1", "10"), "labels per class"),
        few500=few_labels("few500-cpu", ("1", "10", "100"), "labels per class"),
        digits_sweep=sweep(DIGITS),
        cifar10_sweep=sweep(CIFAR10),
        holdout20k_sweep=sweep("holdout20k-cpu"),
        holdout10k_sweep=sweep("holdout10k-cpu"),
        clipart_sweep=sweep("clipart-cpu"),
        versus_lightly=versus_lightly(),
        next_to_lightly=next_to_lightly(),
        ops=ops(),
        kernels=kernels(),
        throughput=throughput(STEP, "throughput-cpu-bf16"),
        compiled=throughput(COMPILED, "throughput-cpu-compile"),
        lightly=throughput(LIGHTLY | COMPILED, "throughput-cpu"),
        resnet18=throughput(
            LIGHTLY | NOISE, "throughput-cpu-resnet18", "throughput-cpu-resnet18-more"
        ),
    )

    def table(found):
        return f"<!-- {found[1]} -->\n{tables[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n(?:\|.*\n)*<!-- end -->", table, text)


def main(args):
    """Write, or compare."""
    stale = []
    for path in (ROOT / name for name in READMES):
        text = path.read_text()
        new = render(text)
        if new != text:
            stale.append(str(path))
            if not args.check:
                path.write_text(new)
    for name, (file, key, _) in PLOTS.items():
        path = ROOT / f"benchmarks/pictures/{name}.png"
        # The file carries a hash of its results.
        source = hashlib.sha256((RESULTS / f"{file}.jsonl").read_bytes()).hexdigest()
        if not path.exists() or Image.open(path).text.get("Source") != source:
            stale.append(str(path))
            if not args.check:
                figure = (draw_training if key == "curve" else draw)(name)
                figure.savefig(path, dpi=110, metadata=dict(Source=source))
    if args.check and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results/; run benchmarks/tables.py")


if __name__ == "__main__":
    main(tyro.cli(Args))
