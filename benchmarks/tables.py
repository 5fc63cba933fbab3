"""Write the tables and pictures of README.md from the recorded files in benchmarks/results/.

python benchmarks/tables.py            # rewrites the tables between their marks, and the pictures
python benchmarks/tables.py --check    # exit status 1 where they show something else than the files
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
from matplotlib.ticker import NullFormatter
from PIL import Image

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
COLUMNS = {"pixels": "pixels", "untrained": "untrained", "simclr": "SimCLR", "byol": "BYOL",
           "byol --projection-layers 0 --ema 0.99 --ema-schedule constant": "BYOL, bare target",
           "barlow_twins": "Barlow Twins"}  # fmt: skip
PICTURES = {
    "digits": "Digits, the default runs, three seeds",
    "fashion_mnist": "Fashion-MNIST, short runs",
    "cifar10_jpeg": "CIFAR-10 (JPEG), short runs",
}

NOISE = {"again/step": "the step over itself: the noise"}
STEP = {"step/model": "the step over the model alone", "variant/step": "bf16 over float32", **NOISE}
LIGHTLY = {"step/lightly shipped": "the step over lightly as shipped", "step/lightly tuned": "the step over lightly, tuned",
           **NOISE}  # fmt: skip


@dataclass
class Args:
    """README.md's tables and pictures."""

    check: bool = False
    """only compare"""


def rows(header, lines):
    """A Markdown table."""
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table)


def accuracies(data):
    """{column: list of {k: accuracy in %}} over the seeds recorded for one data set."""
    found = {}
    for line in (RESULTS / "accuracy-cpu.jsonl").read_text().splitlines():
        line = json.loads(line)
        if line["data"] == data:
            found.setdefault(line["name"], []).append({int(k): 100 * v for k, v in line["accuracy"].items()})
    return {name: found[name] for name in COLUMNS if name in found}


def sweep(data):
    """Accuracy over k, mean over the seeds; the last lines hold the mean over the k up to 100, overall and by seed."""
    found = accuracies(data)
    lines = [[k, *(f"{mean(run[k] for run in runs):.1f}" for runs in found.values())] for k in found["pixels"][0]]
    means = [[mean(v for k, v in run.items() if k <= 100) for run in runs] for runs in found.values()]
    lines.append(["**mean to 100**", *(f"**{mean(m):.2f}**" for m in means)])
    if any(len(m) > 1 for m in means):
        lines.append(["by seed", *(", ".join(f"{value:.2f}" for value in m) for m in means)])
    return rows(["k", *map(COLUMNS.get, found)], lines)


def draw(data, title, path):
    """A PNG of the same: a curve each, from the lowest to the highest seed; it carries a digest of what it shows."""
    found = accuracies(data)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, runs in found.items():
        style = dict(pixels=dict(color="0.4", ls="--"), untrained=dict(color="0.4", ls=":")).get(name, {})
        ks = list(runs[0])
        (line,) = axes.plot(ks, [mean(r[k] for r in runs) for k in ks], marker=".", label=COLUMNS[name], **style)
        ends = [[choose(run[k] for run in runs) for k in ks] for choose in (min, max)]
        axes.fill_between(ks, *ends, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xscale="log", xlabel="k", ylabel="accuracy on the test set in %", title=title, xticks=ks, xticklabels=ks)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": digest(data)})


def digest(data):
    """Of the recorded accuracies that a picture shows."""
    return hashlib.sha256(json.dumps(accuracies(data)).encode()).hexdigest()


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


def throughput(name, titles):
    """Ratios of samples per second that benchmarks/throughput.py has recorded in one file."""
    methods = json.loads((RESULTS / f"{name}.json").read_text())["methods"]
    lines = [[title, *(f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                       for row in (method["ratios"][key] for method in methods.values()))]
             for key, title in titles.items()]  # fmt: skip
    return rows(["samples per second", *map(COLUMNS.get, methods)], lines)


def folders():
    """Decoding, start-up, memory and waiting with large folders."""
    result = json.loads((RESULTS / "folders-cpu.json").read_text())
    lines = [[f"decoding, {name}: images per second and core over those of Pillow alone on one core (range of blocks)",
              f"{row['ratio']} ({row['lowest']} to {row['highest']}), {row['cores']} cores"]
             for name, row in result["decoding"].items()]  # fmt: skip
    lines += [[f"{row['files']:,} files, {name}: second start over first start",
               f"{row['second_start_s'] / row['first_start_s']:.2f}"] for name, row in result["start"].items()]  # fmt: skip
    memory, waiting = result["memory"], result["waiting"]
    lines.append([f"peak memory with {memory['images']:,} images kept at {memory['side']} px on disk "
                  f"({memory['bytes_on_disk'] / 1e9:.1f} GB)", f"{memory['peak_bytes'] / 1e9:.2f} GB"])  # fmt: skip
    lines.append([f"share of a step that waits for images (ResNet-18, 96 px, batch {waiting['batch_size']}, from disk)",
                  f"{100 * waiting['share']:.2f} %"])  # fmt: skip
    return rows(["what", "measured"], lines)


def on_paper():
    """What larger sets would need at 160 px, by the measured rates."""
    result = json.loads((RESULTS / "folders-cpu.json").read_text())
    decoding, start = result["decoding"]["photographs at 160"], result["start"]["CIFAR-10 (JPEG)"]
    size, listing = 3 * decoding["side"] ** 2, start["second_start_s"] / start["files"] / 60
    lines = []
    for name, n in (("ImageNet-1k, 1.28 million images", 1.28e6), ("100 million images", 1e8)):
        minutes = n / decoding["images_per_second_and_core"] / 16 / 60
        lines.append([name, f"{n * size / 1e9:,.0f} GB", f"{minutes:.0f} min", f"{n * listing:.1f} min",
                      f"{size / 1e3:.0f} MB/s"])  # fmt: skip
    return rows(
        ["", "disk", "decoding once, 16 cores", "listing at every start", "reading, per 1,000 samples/s"], lines
    )


def main(args):
    """Write, or compare."""
    readme = old = (ROOT / "README.md").read_text()
    tables = {
        "ops": ops(),
        "throughput": throughput("throughput-cpu-bf16", STEP),
        "lightly": throughput("throughput-cpu", LIGHTLY),
        "folders": folders(),
        "on_paper": on_paper(),
        **{data: sweep(data) for data in PICTURES},
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(pattern, lambda found, text=table: f"{found[1]}{text}\n{found[2]}", readme, flags=re.DOTALL)
    stale = ["README.md"] if readme != old else []
    for data, title in PICTURES.items():
        path = ROOT / f"benchmarks/pictures/{data}.png"
        if not path.exists() or Image.open(path).text.get("Source") != digest(data):
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                draw(data, title, path)
    if args.check and stale:
        sys.exit(f"{', '.join(stale)} differ from benchmarks/results/; run python benchmarks/tables.py")
    if not args.check:
        (ROOT / "README.md").write_text(readme)


if __name__ == "__main__":
    main(tyro.cli(Args))
