"""README.md against the code: commands, flags, code blocks, names, files, tables and figures."""

import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
import torch.nn.functional as F
import tyro
from conftest import METHODS, ROOT, read_log
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import FlopCounterMode

import barlow_twins
import byol
import common
import simclr


def flat(text):
    """On one line."""
    return " ".join(text.split())


README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCED.findall(README)
TEXT = FENCED.sub("", README)
INLINE = [*map(flat, re.findall(r"`([^`]+)`", TEXT))]
SCRIPTS = [*METHODS, "knn_eval"]


def commands():
    """Every command in a notebook cell or in the text."""
    cells = "\n".join(code for language, code in BLOCKS if not language)
    found = re.findall("^[!%](.*)", cells, re.MULTILINE)
    program = re.compile(r"%?(python|torchrun|run|wandb|diff|OMP_NUM_THREADS=1) ")
    return sorted({*found, *(code.lstrip("%") for code in INLINE if program.match(code))})


def parses(script, words):
    """Whether a script takes these words."""
    try:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        return bool(tyro.cli(module.Args, args=words, console_outputs=False))
    except SystemExit as end:
        return end.code == 0


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def block(start):
    return next(code for _, code in BLOCKS if code.startswith(start))


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    """Scripts take the flags of each command, and the files it names exist."""
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))
    if words[0] == "torchrun":
        args = torchrun.get_args_parser().parse_args(words[1:])
        words = ["python", args.training_script, *args.training_script_args]
    if words[0] in ("python", "run"):
        assert parses(words[1], words[2:])
    elif words[0] in ("diff", "wandb"):
        files = [word for word in words if "." in word]
        assert files and all((ROOT / file).exists() for file in files)
    else:
        assert words[0] == "cd" or words == "pip install -q tyro".split()


def test_flags_exist():
    """A script has each flag in the text, and takes the value next to it."""
    named = {code for code in INLINE if code.startswith("--")}
    assert len(named) > 30
    for code in named:
        flag, *values = shlex.split(code)
        name = flag.replace("--no-", "--")[2:].replace("-", "_")
        fields = [importlib.import_module(s).Args.__dataclass_fields__ for s in SCRIPTS]
        assert any(name in names for names in fields), flag
        assert not values or any(parses(f"{s}.py", [flag, *values]) for s in SCRIPTS), code


def test_copying_example_runs_without_common(tmp_path):
    """In a folder with byol.py only, without a warning."""
    (tmp_path / "byol.py").write_text((ROOT / "byol.py").read_text())
    code = next(code for _, code in BLOCKS if "from byol import BYOL" in code)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.glob("*.p*")} == {"byol.py", "encoder.pt"}


def test_losses_equal_those_of_the_files():
    """The excerpt gives info_nce, both directions of byol_loss, and barlow_twins_loss."""
    z1, z2, p1, p2, target1, target2 = torch.randn(6, 8, 4, dtype=torch.float64)
    names = dict(locals(), torch=torch, F=F, math=math, N=8, temperature=0.2, lambd=0.03)
    exec(block("# SimCLR"), names)
    expected = dict(
        simclr_loss=simclr.info_nce(z1, z2, 0.2),
        byol_loss=byol.byol_loss(p1, target2) + byol.byol_loss(p2, target1),
        barlow_twins_loss=barlow_twins.barlow_twins_loss(z1, z2, 0.03),
    )
    for name, value in expected.items():
        torch.testing.assert_close(names[name], value)


@pytest.mark.parametrize("source", ["scikit-learn", "cifar10"])
def test_your_images_example_runs(request, source):
    """The lines of the example on crops of two photographs or on JPEG files, and encode_files.

    20 of the 40 images are labeled.
    """
    Path("photos").mkdir()
    lines = ["file,label"]
    if source == "cifar10":
        folders = [request.getfixturevalue(source) / f"test/{name}" for name in ("cat", "ship")]
        images = [sorted(folder.iterdir()) for folder in folders]
    for i in range(40):
        if source == "cifar10":
            shutil.copy(images[i % 2][i], f"photos/{i}.jpg")
        else:
            photograph, y, x = load_sample_images().images[i % 2], 37 * i % 250, 53 * i % 450
            Image.fromarray(photograph[y : y + 150, x : x + 150]).save(f"photos/{i}.jpg")
        lines += [f"{i}.jpg,class {i % 2}"] * (i < 20)
    Path("photos.csv").write_text("\n".join(lines))
    (example,) = (code for language, code in BLOCKS if language == "sh")
    for line in example.splitlines():
        script, *words = shlex.split(line.removeprefix("python "))
        # A small network for an epoch.
        words += "--width 16 --epochs 1 --image-size 32".split() * (script == "simclr.py")
        subprocess.run([sys.executable, str(ROOT / script), *words], check=True)
    names = {path.name for path in Path("runs/photos/knn").iterdir()}
    assert {"labels.png", "neighbors.png", "suspects.csv", "predictions.csv"} <= names
    results = json.loads(Path("runs/photos/knn/knn.json").read_text())["results"]
    assert [result["n_train"] for result in results] == [20, 20]
    call = 'common.encode_files("runs/photos/encoder.pt", files)'
    assert call in INLINE
    files = [f"photos/{i}.jpg" for i in range(3)]
    assert eval(call, dict(common=common, files=files)).shape == (3, 128)


def test_run_folder_and_log_keys(finished):
    """The tables name each file of a finished run, each array, and each key of the log."""
    folder, text = finished("simclr"), section("A run's folder")
    rows = {row[0]: row for row in map(re.compile("`(.*?)`").findall, text.splitlines()) if row}
    table = "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    files = {path.name for path in folder.iterdir()} - {".lock"}
    assert set(re.findall(r"`(.*?)`", table)) == files
    arrays = set("embeddings.npz train_files test_files train_groups test_groups".split())
    assert set(rows["embeddings.npz"]) == {*np.load(folder / "embeddings.npz"), *arrays}
    assert set(rows["log.jsonl"]) == {*read_log(folder)[-1], "log.jsonl"}


def test_numbered_details_name_code_that_exists():
    """Each detail links to a function, class or constant."""
    items = re.findall(r"^\d\. (?:.+\n)+?(?=\d\. |\n)", section("Implementation details"), re.M)
    assert len(items) >= 15
    for item in items:
        links = re.findall(r"\[`(.+?)`\]\((\w+)\.py\)", item)
        assert links, item
        for name, module in links:
            attrgetter(name)(importlib.import_module(module))


def test_links_and_files_exist():
    """Links lead to a file or a heading; scripts and folders in the text exist."""
    headings = {h.lower().replace(" ", "-") for h in re.findall("^#+ (.*)", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\((?!http)(.*?)\)", TEXT):
        assert target[0] == "#" and target[1:] in headings or (ROOT / target).exists(), target
    for name in INLINE:
        assert not re.fullmatch(r"[\w/]+\.(py|txt|yaml)", name) or (ROOT / name).exists(), name


def test_tables_are_those_of_the_recorded_results():
    """benchmarks/tables.py changes nothing in the marked tables, and no plot."""
    if not (ROOT / "benchmarks").exists():
        pytest.skip("without the folder benchmarks there is nothing to compare with")
    assert "<!-- cifar10 -->" in README
    tables = importlib.import_module("benchmarks.tables")
    tables.main(tables.Args(check=True))


def recorded(name, method):
    lines = (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()
    return [run for run in map(json.loads, lines) if run["name"] == method]


def test_figures_are_recorded():
    """The first lines of each recorded method, and the flipped labels found."""
    methods = [name for name in METHODS if recorded("digits-cpu", name)]
    assert len(methods) >= 3
    for name in methods:
        text = flat(importlib.import_module(name).__doc__)
        runs = recorded("digits-cpu", name)
        few, full = (100 * mean(run["labels"][n] for run in runs) for n in ("1", "all"))
        assert len(runs) == 3
        assert f"{few:.1f} % from one label per class, {full:.1f} % from all" in text
        (pixels,), runs = (recorded("cifar10-cpu", column) for column in ("pixels", name))
        keys = "accuracy_at_chosen_k", "whitened"
        plain, white = (100 * mean(run[key] for run in runs) for key in keys)
        assert f"kNN accuracy {plain:.1f} %, {white:.1f} % with whitened features" in text
        assert f"raw pixels {100 * pixels['accuracy_at_chosen_k']:.1f} %" in text
        minutes = sorted({round(run["seconds"] / 60) for run in runs})
        assert f"{' to '.join(map(str, minutes[:1] + minutes[1:][-1:]))} minutes on one" in text
    lines = map(json.loads, (ROOT / "benchmarks/results/few100-cpu.jsonl").open())
    few = {line["name"].split()[0]: 100 * line["accuracy_at_chosen_k"] for line in lines}
    says = "pixels get {:.1f} %, SimCLR {:.1f} %, BYOL {:.1f} %, Barlow Twins {:.1f} %"
    assert says.format(few["pixels"], *map(few.get, methods)) in flat(TEXT)
    speed = json.loads((ROOT / "benchmarks/results/throughput-cpu.json").read_text())["methods"]
    faster = [speed[name]["ratios"]["step/lightly tuned"]["ratio"] for name in methods]
    says = "is {:.1f} (SimCLR), {:.1f} (BYOL) and {:.1f} (Barlow Twins) times as fast"
    text = flat(TEXT)
    assert f"{says.format(*faster)} as in a tuned lightly, with a ResNet-18 1.1 times" in text
    for part in ("", "-more"):
        path = ROOT / f"benchmarks/results/throughput-cpu-resnet18{part}.json"
        speed = json.loads(path.read_text())["methods"].values()
        assert {round(row["ratios"]["step/lightly tuned"]["ratio"], 1) for row in speed} == {1.1}
    lines = map(json.loads, (ROOT / "benchmarks/results/versus-lightly-cpu.jsonl").open())
    found = {(line["method"], line["side"], line["seed"]): line for line in lines}
    updates = [
        found[name, "update", 1]["difference"] for name in ("barlow_twins", "byol", "simclr")
    ]
    says = "by {:.3f} (Barlow Twins) and {:.3f} (BYOL) of the update, and by {:.3f} for SimCLR"
    text = flat((ROOT / "benchmarks/README.md").read_text())
    assert says.format(*updates) in text
    assert f"one forward they differ by {found['simclr', 'update', 1]['one_forward']:.3f}" in text
    runs = json.loads((ROOT / "benchmarks/results/suspects-cpu.json").read_text())["runs"]
    share = mean(run["found"] / run["flipped"] for run in runs)
    assert f"its first 72 rows hold [{100 * share:.0f} % of them]" in TEXT
    assert all(run["listed"] == run["flipped"] == 72 for run in runs) and len(runs) == 9


def test_cost_of_the_loss_on_several_processes():
    """FLOPs and memory for 8 processes and 128 dimensions."""
    text, n = flat((ROOT / "benchmarks/README.md").read_text()), 4096
    loss = 24 * n**2 * 128
    assert f"takes each of 8 processes {loss / 1e9:.0f} GFLOP" in text
    for name, size, limit in (("resnet18", 32, "27,000"), ("resnet50", 224, "198,000")):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            common.build_encoder(name, size)[0](torch.empty(1, 3, size, size)).sum().backward()
        encoder = counter.get_total_flops() * 2 * n / 8
        assert f"{100 * loss / encoder:.1f} % of" in text and limit in text
        # The share is proportional to N.
        assert round(0.1 * encoder / loss * n, -3) == int(limit.replace(",", ""))
    assert f"logits take {4 * (2 * n) ** 2 >> 20} MiB at N = 4,096 and 4 GiB at 16,384" in text


def test_length_and_paths():
    """At most 260 lines; absolute paths are those of Colab."""
    assert len(README.splitlines()) <= 260
    assert set(re.findall(r"(?<![\w:/.>])/(\w+)", README)) == {"content"}
