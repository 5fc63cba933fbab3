"""Write the tables of README.md from the recorded files in benchmarks/results/.

python benchmarks/tables.py            # rewrites the tables between their marks
python benchmarks/tables.py --check    # exit status 1 where README.md says something else than the files
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


@dataclass
class Args:
    """README.md's tables."""

    check: bool = False
    """only compare"""


def rows(header, lines):
    """A Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)


def accuracies(data):
    """{column: list of {k: accuracy}} over the seeds recorded for one data set."""
    found = {}
    for line in (RESULTS / "accuracy-cpu.jsonl").read_text().splitlines():
        line = json.loads(line)
        if line["data"] == data:
            found.setdefault(line["method"], []).append({int(k): v for k, v in line["accuracy"].items()})
    return found


def up_to_100(accuracy):
    return 100 * mean(value for k, value in accuracy.items() if k <= 100)


def digits():
    """Accuracy over k, mean over the seeds; the last lines hold the mean over the k up to 100, overall and by seed."""
    found = accuracies("digits")
    columns = [
        "pixels",
        "simclr, untrained",
        "simclr",
        "byol, untrained",
        "byol",
        "barlow_twins, untrained",
        "barlow_twins",
    ]
    columns = [column for column in columns if column in found]
    lines = [[k, *(f"{100 * mean(run[k] for run in found[c]):.2f}" for c in columns)] for k in found[columns[0]][0]]
    means = {c: [up_to_100(run) for run in found[c]] for c in columns}
    lines.append(["**mean to 100**", *(f"**{mean(means[c]):.2f}**" for c in columns)])
    lines.append(["by seed", *(", ".join(f"{m:.2f}" for m in means[c]) for c in columns)])
    return rows(["k", *columns], lines)


def real():
    """One line a data set: the mean over the k up to 100 of every column, in %."""
    titles = {"fashion_mnist": "Fashion-MNIST", "cifar10_jpeg": "CIFAR-10 (JPEG q75)"}
    lines = []
    for data, title in titles.items():
        found = accuracies(data)
        cells = [f"{mean(map(up_to_100, found[c])):.1f}" if c in found else "" for c in ("pixels",)]
        for method in ("simclr", "byol", "barlow_twins"):
            both = [found.get(f"{method}, untrained"), found.get(method)]
            cells.append(" → ".join(f"{mean(map(up_to_100, runs)):.1f}" if runs else "" for runs in both))
        lines.append([title, *cells])
    header = ["mean over k to 100, %", "pixels", "SimCLR, untrained → trained", "BYOL", "Barlow Twins"]
    return rows(header, lines)


def ops():
    """Ratios of the parts of a step."""
    result = json.loads((RESULTS / "ops-cpu.json").read_text())
    titles = {
        "info_nce": "`info_nce`, N = 512, forward and backward, against a loop over rows",
        "views": "a pair of views, 32 px, one thread, against torchvision's transforms on PIL images",
        "views_with_blur": "the same with blur",
        "ema_update": "`ema_update` on a ResNet-18, against a loop that rebinds `.data`",
    }
    lines = [[title, f"{result[key]['ratio']} ({result[key]['lowest']} to {result[key]['highest']})"]
             for key, title in titles.items()]  # fmt: skip
    knn = json.loads((RESULTS / "knn-cpu.json").read_text())
    title = f"`knn_sweep`, 13 k, {knn['train']} x {knn['test']} x {knn['dim']}, against 13 fits of KNeighborsClassifier"
    lines.append([title, f"{knn['ratio']}; {knn['differing']} of {knn['predictions']} predictions differ"])
    return rows(["part", "times faster (range of blocks)"], lines)


def main(args):
    readme = old = (ROOT / "README.md").read_text()
    for name, table in dict(digits=digits, real=real, ops=ops).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(pattern, lambda found, text=table(): f"{found[1]}{text}\n{found[2]}", readme, flags=re.DOTALL)
    if args.check and readme != old:
        sys.exit("README.md differs from benchmarks/results/; run python benchmarks/tables.py")
    if not args.check:
        (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main(tyro.cli(Args))
