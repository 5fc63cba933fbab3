"""What README.md says: its tables are the recorded files', its commands and flags exist, its code runs."""

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
import tyro

import barlow_twins
import byol
import knn_eval
import simclr

ROOT = Path(simclr.__file__).parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci/run").read_text()
SCRIPTS = {"simclr.py": simclr, "byol.py": byol, "barlow_twins.py": barlow_twins, "knn_eval.py": knn_eval}
BLOCKS = [(language, code) for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)


def args_of(script):
    """The dataclass of flags of a script."""
    return SCRIPTS[script].Args if script in SCRIPTS else runpy.run_path(str(ROOT / script))["Args"]


def flags_of(script):
    return {name.replace("_", "-") for name in args_of(script).__dataclass_fields__}


def commands():
    """Every command that the README prints: in blocks of bash, in cells, and in the text."""
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    lines += [line[1:] for language, code in BLOCKS if not language for line in code.splitlines() if line[0:1] in "!%"]
    programs = "python|python3|torchrun|uv|wandb|ruff|pip|diff|run"
    lines += [code.replace("\n", " ").lstrip("%") for code in re.findall(r"`([^`]+)`", PROSE)
              if re.match(rf"%?({programs}) ", code)]  # fmt: skip
    return sorted({part.strip() for line in lines if line.strip() for part in line.split(" && ")})


def test_tables_are_made_from_the_recorded_files():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_table_of_figures_has_its_marks():
    """A table whose rows hold numbers alone stands between marks, so that the test above compares it."""
    unmarked = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", README, flags=re.DOTALL)
    assert not re.findall(r"^\|[^|]*\| *\**\d+(?:\.\d+)? *\**\|.*$", unmarked, re.MULTILINE)
    pictures = set(re.findall(r"!\[.*?\]\((.*?)\)", README))
    assert pictures == {f"benchmarks/pictures/{p.name}" for p in (ROOT / "benchmarks/pictures").iterdir()}
    checked = runpy.run_path(str(ROOT / "benchmarks/tables.py"))["PICTURES"]
    assert {Path(picture).stem for picture in pictures} == set(checked)


def test_every_flag_named_exists():
    """Those that stand in the text alone, too."""
    scripts = [*SCRIPTS, *(f"benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("*.py"))]
    scripts = [script for script in scripts if f"{script}" in README]
    known = set().union({"help"}, *map(flags_of, scripts))
    known |= {f"no-{flag}" for flag in known}
    known |= {name[2:] for action in torchrun.get_args_parser()._actions for name in action.option_strings}
    ours = "".join(line for line in README.splitlines(keepends=True) if not re.search(r"pytest|\bruff |\buv run", line))
    named = set(re.findall(r"(?<![\w-])--([a-z0-9][a-z0-9-]*)", ours))
    assert named and named <= known, named - known


@pytest.mark.parametrize("command", commands())
def test_every_command_runs_or_parses(command):
    program, *words = shlex.split(command)
    if command in BLOCKS[0][1] or program == "ruff" or command in next(code for _, code in BLOCKS if "pytest" in code):
        # .ci/run takes the first two blocks out of this file and runs them; it prints ruff's words itself.
        assert "README.md" in CI and (program != "ruff" or " ".join([program, *words[:-1]]) in CI)
    elif (program, words[0]) == ("pip", "install"):
        assert words[1:] == ["-q", "tyro"]  # run in tests/test_notebook.py
    elif (program, words[0]) == ("uv", "run"):
        assert words[1:3] == ["--with-requirements", "requirements.txt"]  # run below
    elif (program, words[0]) == ("wandb", "sweep"):
        assert words[1:] == ["benchmarks/ema-sweep.yaml"]  # its commands are parsed in tests/test_wandb.py
    elif (program, words[0]) == ("wandb", "agent"):
        assert words[0] in pytest.importorskip("wandb.cli.cli").cli.commands
    elif program == "diff":
        assert all((ROOT / word).exists() for word in words)
    elif program == "cd":
        assert words[0].startswith("/content/drive/")
    elif words[:2] == ["-m", "pytest"]:
        quiet, file, select, name = words[2:]
        assert (quiet, select) == ("-q", "-k") and re.search(rf"def test_\w*{name}", (ROOT / file).read_text())
    elif program == "torchrun":
        script = torchrun.get_args_parser().parse_args(words)
        assert tyro.cli(args_of(script.training_script), args=script.training_script_args)
    elif words[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            tyro.cli(args_of(words[0]), args=words[1:])
    else:
        assert program in ("python", "run"), command
        script, *flags = [word for word in words if not word.startswith("OMP_")]
        if script != "<method>.py":
            args = tyro.cli(args_of(script), args=flags)
            if getattr(args, "extra", ""):
                tyro.cli(args_of(f"{args.methods[0]}.py"), args=shlex.split(args.extra))


def test_uv(tmp_path):
    """The line for uv, word for word, with the packages that are here in the place of a download."""
    pytest.importorskip("uv")
    line = next(code for _, code in BLOCKS if code.startswith("uv run"))
    for name in ("simclr.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "requirements.txt").touch()
    bin = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = os.pathsep.join(site.getsitepackages())
    environment = {**os.environ, "PATH": bin, "PYTHONPATH": here, "UV_OFFLINE": "1", "UV_PYTHON": sys.executable,
                   "UV_CACHE_DIR": str(tmp_path / "cache")}  # fmt: skip
    done = subprocess.run(f"{line.strip()} --epochs 0", shell=True, cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0 and list(tmp_path.glob("runs/*/embeddings.npz")), done.stderr


def test_numbered_details_point_at_the_code():
    """Each names places: a function, a class, a constant, or words that stand in the file."""
    details = README.split("## The three methods")[1].split("### Where this project started")[0]
    items = re.findall(r"^\d\. (.*?)(?=^\d\. |^$)", details, re.DOTALL | re.MULTILINE)
    assert len(items) >= 18
    for item in items:
        places = re.findall(r"\[`(.+?)`\]\((\w+\.py)\)", item)
        assert places, item
        for name, file in places:
            text = (ROOT / file).read_text()
            *outer, last = name.split(".")
            if name.isidentifier() or all(part.isidentifier() for part in (*outer, last)):
                body = ast.parse(text).body
                for part in (*outer, last):
                    targets = [
                        (getattr(t, "id", None), n) for n in body if isinstance(n, ast.Assign) for t in n.targets
                    ]
                    found = {**{n.name: n for n in body if hasattr(n, "name")}, **dict(targets)}
                    assert part in found, (name, file)
                    body = getattr(found[part], "body", [])
            else:
                assert name in text, (name, file)


def test_what_is_logged_is_defined(finished):
    """A row for every key of log.jsonl, those of fp16 and of an evaluation as well, and no other."""
    table = README.split("What is logged, to `log.jsonl`")[1].split("\n\n")[1]
    defined = {key for line in table.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1])}
    record = json.loads((finished("byol") / "log.jsonl").read_text().splitlines()[-1])
    assert defined == {*record, "skipped_steps", "knn_acc"}


def test_files_of_a_run_are_defined(finished):
    table = README.split("### A run's folder")[1].split("\n\n")[1]
    defined = {line.split("|")[1].strip(" `") for line in table.splitlines()[2:]}
    assert defined == {path.name for path in finished("byol").iterdir()}


def test_the_lines_for_copying_one_file_run(tmp_path):
    code = next(code for language, code in BLOCKS if language == "python" and "from byol" in code)
    assert "DataLoader" in code
    (tmp_path / "byol.py").write_text((ROOT / "byol.py").read_text())  # alone: without common.py
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_and_sections_it_points_at_are_there():
    headings = re.findall(r"^#+ (.*)", PROSE, re.MULTILINE)
    sections = {"".join(c for c in h.lower() if c.isalnum() or c in " -").replace(" ", "-") for h in headings}
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert target[1:] in sections if target[0] == "#" else (ROOT / target).exists(), target


def test_every_test_that_is_named_exists():
    promises = README.split("## What is promised")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", promises)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
    assert all((ROOT / path).exists() for path in re.findall(r"`(\w+/\w+\.py)`", README))
