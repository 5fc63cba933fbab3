"""What README.md says: its tables are the recorded files', its flags exist, its code runs."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun

import barlow_twins
import byol
import knn_eval
import simclr

ROOT = Path(simclr.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"simclr.py": simclr, "byol.py": byol, "barlow_twins.py": barlow_twins, "knn_eval.py": knn_eval}


def flags_of(module):
    return {name.replace("_", "-") for name in module.Args.__dataclass_fields__}


def test_tables_are_made_from_the_recorded_files():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_flag_named_exists():
    benchmark = runpy.run_path(str(ROOT / "benchmarks/accuracy.py"))["Args"].__dataclass_fields__
    known = set().union(*map(flags_of, SCRIPTS.values())) | {"help", *benchmark}
    known |= {f"no-{flag}" for flag in known}
    known |= {name[2:] for action in torchrun.get_args_parser()._actions for name in action.option_strings}
    ours = "".join(line for line in README.splitlines(keepends=True) if "pytest" not in line)
    named = set(re.findall(r"(?<![\w-])--([a-z0-9][a-z0-9-]*)", ours))
    assert named and named <= known, named - known


def commands():
    """Every `python <script>` of the README with its flags."""
    found = re.findall(r"python ((?:simclr|byol|barlow_twins|knn_eval)\.py[^`\n#]*)", README)
    return sorted({line.strip() for line in found})


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    import tyro

    script, *words = shlex.split(command)
    if words == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            tyro.cli(SCRIPTS[script].Args, args=words)
    else:
        assert tyro.cli(SCRIPTS[script].Args, args=words)


def test_the_lines_for_copying_one_file_run(tmp_path):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from byol" in block)
    (tmp_path / "byol.py").write_text((ROOT / "byol.py").read_text())  # alone: without common.py
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_lines_that_load_an_encoder_run(tiny, tmp_path, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_encoder" in block)
    simclr.main(simclr.Args(**tiny(run_dir=str(tmp_path / "runs/mine"), epochs=0)))
    monkeypatch.chdir(tmp_path)
    found = {"images": torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)}
    exec(code, found)
    assert found["features"].shape == (5, 128)


def test_files_it_points_at_are_there():
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_every_test_that_is_named_exists():
    promises = README.split("## What is promised")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)`", promises)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
    assert all((ROOT / path).exists() for path in re.findall(r"`(\w+/\w+\.py)`", promises))
