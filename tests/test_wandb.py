"""--track against the real wandb in offline mode, read back from what it wrote; and that the training survives it."""

import importlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import tyro
from conftest import ROOT, flags

import byol
import common

wandb = pytest.importorskip("wandb")
pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
simclr = importlib.import_module("simclr")


def records(path):
    """The protobuf records of a .wandb file: LevelDB's log format in blocks of 32 KiB behind 7 bytes of header."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def read_back(run_dir):
    """One (id, config, history, project, folder) for each time that the run was started, in order."""
    wandb.teardown()  # the end of W&B's own process: only then is all of the file written for sure
    found = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        identity, config, history = None, {}, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                identity = record.run.run_id
                config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
                project = record.run.project
            elif kind == "history":
                names = [item.key or ".".join(item.nested_key) for item in record.history.item]
                history.append(dict(zip(names, (json.loads(item.value_json) for item in record.history.item))))
        found.append((identity, config, history, project, path.parent))
    return found


@pytest.fixture
def private(monkeypatch, tmp_path):
    """No file of W&B's outside tmp_path, and its service ended afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb files"))
    yield
    wandb.teardown()


def test_what_is_logged(private, run_cli, tiny, method, finished, tmp_path):
    folder = tmp_path / "run"
    words = tiny(run_dir=folder, eval_every=2, track=True, wandb_project="proj")
    result = run_cli(method, *flags(**words))
    assert result.status == 0 and "note:" not in result.err, result
    ((identity, config, history, project, place),) = read_back(folder)
    assert project == "proj" and config["method"] == method.__name__ and config["args"]["lr"] == 0.05
    assert config["command"].startswith(f"{method.__name__}.py --dataset npz") and "--track" in config["command"]
    assert config["commit"] == common.git_commit()  # None where the files are not in git
    by_epoch = {row["epoch"]: row for row in history if "epoch" in row}
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sorted(by_epoch) == [1, 2, 3]
    for record in logged:
        row = by_epoch[record["epoch"]]
        for key in ("loss", "lr", "samples_per_sec", "spread", "step"):
            assert row[key] == pytest.approx(record[key]), key
        assert row["_step"] == record["step"]  # so that W&B drops an epoch that comes again after a kill
        assert row.get("knn_acc") == record.get("knn_acc")
    assert "knn_acc" in by_epoch[2] and "knn_acc" not in by_epoch[1]
    assert any("final_knn_acc" in row for row in history)
    pictures = {key.split(".")[0] for row in history for key, value in row.items()
                if isinstance(value, dict) and value.get("_type") == "image-file" or value == "image-file"}  # fmt: skip
    assert pictures == {"curves", "embedding_2d", "views"}
    files = sorted((place / "files" / "media" / "images").glob("*.png"))
    assert len(files) == 3
    # Tracking changes nothing.
    with np.load(folder / "embeddings.npz") as mine, np.load(finished(method.__name__) / "embeddings.npz") as theirs:
        assert np.array_equal(mine["test_features"], theirs["test_features"])


def test_a_resumed_run_goes_on_in_the_same_one(private, run_cli, tiny, tmp_path, monkeypatch):
    import signal

    advance = common.Run.advance

    def stop(self, i, stats, lr, epoch, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, i, stats, lr, epoch, step)

    monkeypatch.setattr(common.Run, "advance", stop)
    words = flags(**tiny(run_dir=tmp_path / "run", track=True))
    assert run_cli(simclr, *words).status == 130
    monkeypatch.setattr(common.Run, "advance", advance)
    assert run_cli(simclr, *words, "--resume").status == 0
    first, second = read_back(tmp_path / "run")
    assert first[0] == second[0] and first[0]
    assert [row["epoch"] for row in first[2] if "epoch" in row] == [1]
    assert [row["epoch"] for row in second[2] if "epoch" in row] == [2, 3]


def test_the_k_sweep_is_logged(private, run_cli, finished, tmp_path):
    """knn_eval.py --track: the accuracy of each k as curve and table, the chosen k, the pictures, command and commit."""
    knn_eval = importlib.import_module("knn_eval")
    words = [finished("simclr"), "--ks", "1", "5", "20", "--output", tmp_path / "out", "--track"]
    assert run_cli(knn_eval, *words).status == 0
    sweep = {row["k"]: row for row in json.loads((tmp_path / "out" / "knn.json").read_text())["sweep"]}
    ((_, config, history, project, place),) = read_back(tmp_path / "out")
    assert project == "ssl" and config["ks"] == [1, 5, 20] and config["runs"]["simclr"]["epochs"] == 3
    assert config["command"].startswith("knn_eval.py ") and config["commit"] == common.git_commit()
    curve = {row["k"]: row["knn/simclr"] for row in history if "k" in row}
    assert curve == {k: pytest.approx(row["accuracy"]) for k, row in sweep.items()} and len(curve) == 3
    assert any("chosen_k/simclr" in row for row in history)
    pictures = [path.name for path in (place / "files" / "media" / "images").rglob("*.png")]
    assert sorted(name.split("_")[0] for name in pictures) == ["knn", "simclr"], pictures
    (table,) = (place / "files" / "media" / "table").glob("*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [1, 5, 20]


def test_the_commit_is_that_of_the_files(tmp_path, monkeypatch):
    """Clean, changed since, and outside of git."""
    git = shutil.which("git") or pytest.skip("needs git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(common, "__file__", str(shutil.copy(ROOT / "common.py", tmp_path)))
    assert common.git_commit() is None
    run = [git, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "common.py"], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*run, *words], cwd=tmp_path, check=True)
    head = subprocess.run([git, "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert common.git_commit() == head and len(head) == 40
    (tmp_path / "common.py").write_text("")
    assert common.git_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.git_commit() is None  # git is not installed


def test_a_sweep_gives_flags_that_byol_takes():
    """The commands that W&B's agent would build from benchmarks/ema-sweep.yaml, by its own functions."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    config = utils.load_sweep_config(str(ROOT / "benchmarks" / "ema-sweep.yaml"))
    assert config["method"] == "grid" and config["program"] == "byol.py" and (ROOT / config["program"]).exists()
    assert set(config) <= {"program", "method", "metric", "parameters", "command", "name", "description", "project"}
    assert config["metric"]["goal"] in ("maximize", "minimize")
    assert f'"{config["metric"]["name"]}":' in (ROOT / "common.py").read_text()
    values = [parameter["values"] for parameter in config["parameters"].values()]
    assert all(isinstance(v, list) and len(v) == len(set(v)) > 1 for v in values)
    seen = set()
    for chosen in itertools.product(*values):
        parameters = {name: {"value": value} for name, value in zip(config["parameters"], chosen)}
        words = utils.create_sweep_command_args({"args": parameters})
        words |= {"env": ["/usr/bin/env"], "program": [config["program"]]}
        command = []
        for part in utils.create_sweep_command(config["command"]):
            command += words[part[2:-1]] if part.startswith("${") else [part]
        assert command[:3] == ["/usr/bin/env", "python", "byol.py"]
        args = tyro.cli(byol.Args, args=command[3:])
        assert args.track
        seen.add((args.ema, args.seed))
    assert seen == set(itertools.product(*values)) and len(seen) > 2


# ------------------------------------------------------------------------------------------ failures


class Broken:
    """A W&B run whose every call fails from the n-th on, as after a lost connection."""

    def __init__(self, working):
        self.calls, self.working = 0, working

    def _call(self, *args, **kwargs):
        self.calls += 1
        if self.calls > self.working:
            raise wandb.errors.CommError("the server\nis gone")

    log = finish = _call


@pytest.mark.parametrize("working", [None, 0, 2, 5])
def test_training_goes_on_without(run_cli, tiny, finished, tmp_path, monkeypatch, working):
    """wandb.init raises (None), or a later call: said once, in one line, and the run ends as it would have."""
    run = Broken(working)

    def init(**kwargs):
        if working is None:
            raise wandb.errors.CommError("no\nserver")
        return run

    monkeypatch.setattr(wandb, "init", init)
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", track=True)))
    assert result.status == 0, result
    assert len(result.err.splitlines()) == 1 and result.err.startswith("note: Weights & Biases failed"), result.err
    assert run.calls == (0 if working is None else working + 1)
    with np.load(tmp_path / "run" / "embeddings.npz") as mine, np.load(finished("simclr") / "embeddings.npz") as theirs:
        assert np.array_equal(mine["test_features"], theirs["test_features"])


def test_wandb_is_not_installed(run_cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", track=True, epochs=0)))
    assert result.status == 0 and result.err.startswith("note: Weights & Biases failed"), result


def test_waiting_for_the_server_has_an_end(run_cli, tiny, tmp_path, monkeypatch):
    """Neither the start nor the end of a run waits for W&B without a limit."""
    seen = []

    def init(settings=None, **kwargs):
        seen.append(settings)
        return Broken(10**9)

    monkeypatch.setattr(wandb, "init", init)
    assert run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", track=True, epochs=0))).status == 0
    assert 0 < seen[0].init_timeout <= 60
    if not hasattr(seen[0], "finish_timeout"):
        pytest.skip("this wandb knows no finish_timeout")
    assert 0 < seen[0].finish_timeout <= 120


def test_not_imported_without_track(tiny, tmp_path):
    """A run without --track never imports wandb: a whole run in a process of its own."""
    code = "import sys, common, simclr; common.cli(simclr.Args, simclr.main) or sys.exit('wandb' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *flags(**tiny(run_dir=tmp_path / "run", epochs=1))],
                            capture_output=True, text=True, cwd=tmp_path, timeout=120,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.returncode == 0 and (tmp_path / "run" / "embeddings.npz").exists(), result
