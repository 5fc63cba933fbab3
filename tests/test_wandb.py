"""--track with the real wandb in offline mode, read back from its files; training goes on without.

Reads W&B's own protobuf files, as the `wandb sync` command does.
"""

import json
import signal
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import at_step, read_log

import knn_eval
import simclr

wandb = pytest.importorskip("wandb")
pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def records(path):
    """The protobuf records of a .wandb file: LevelDB's log format behind 7 bytes of header."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            # No header fits into the rest of the block.
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # A complete record, or its last part.
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def decode(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_back(folder):
    """(run, config, history) of each W&B run in a folder, in order of time."""
    # Ends W&B's own process, so that its files are complete.
    wandb.teardown()
    paths = (folder / "wandb").glob("offline-run-*/*.wandb")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        run, config, history = None, {}, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                config |= decode(run.config.update)
            elif kind == "history":
                history.append(decode(record.history.item))
        yield run, config, history


@pytest.fixture(autouse=True)
def private(monkeypatch, tmp_path):
    """W&B's files stay in tmp_path, and its process ends."""
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb files"))
    yield
    wandb.teardown()


def test_track_logs_config_epochs_and_pictures(train, finished, folder):
    """Config, group, each record of log.jsonl at its step, and the pictures; training is equal."""
    assert not train(track=True, wandb_project="proj").err
    ((run, config, history),) = read_back(folder)
    assert (run.project, run.run_group, run.display_name) == ("proj", "simclr-npz", folder.name)
    saved = json.loads((folder / "args.json").read_text())
    assert saved.items() <= config.items() and run.run_id == saved["wandb_id"]
    rows = [row for row in history if "epoch" in row]
    for row, record in zip(rows, read_log(folder), strict=True):
        assert row["_step"] == record["step"] and record.items() <= row.items()
    pictures = (folder / "wandb").glob("offline-run-*/files/media/images/*.png")
    assert sorted(path.name.split("_")[0] for path in pictures) == ["curves", "views"]
    same = finished("simclr") / "embeddings.npz"
    assert (folder / "embeddings.npz").read_bytes() == same.read_bytes()


def test_wandb_agent_calls_main_in_a_thread(tiny):
    """Where Python allows no signal handlers."""
    with ThreadPoolExecutor() as pool:
        pool.submit(simclr.main, simclr.Args(**tiny(epochs=1, track=True))).result()


def test_resume_continues_the_wandb_run(train, folder, monkeypatch):
    """A resumed run has the id of the stopped one, and logs the epochs that are left."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, signal.SIGINT)
        train(track=True, status=130)
    train(track=True, resume=True)
    first, second = read_back(folder)
    assert first[0].run_id == second[0].run_id
    epochs = [
        [row["epoch"] for row in history if "epoch" in row] for *_, history in (first, second)
    ]
    assert epochs == [[1], [2, 3]]


def test_knn_eval_track_logs_chosen_k(run_cli, finished, tmp_path):
    """knn_eval.py --track logs the accuracy of each k and the chosen k."""
    words = [finished("simclr"), "--ks", "1", "5", "20", "--output", tmp_path, "--track"]
    assert "note:" not in run_cli(knn_eval, *words).err
    ((run, config, history),) = read_back(tmp_path)
    assert run.project == "ssl" and config["ks"] == [1, 5, 20]
    (known,) = json.loads((tmp_path / "knn.json").read_text())["results"]
    rows = [row["knn/simclr"] for row in history if "knn/simclr" in row]
    assert rows == [*known["tables"]["knn"].values()]


class Broken:
    """A W&B run whose calls fail after the first few, as after a lost connection."""

    def __init__(self, working):
        self.calls, self.working = 0, working

    def _call(self, *args, **options):
        self.calls += 1
        if self.calls > self.working:
            raise wandb.errors.CommError("the server\nis gone")

    log = finish = _call


# A run of 3 epochs logs 4 times, then finishes.
@pytest.mark.parametrize("fails", ["import", "init", 0, 2, 4])
def test_wandb_fails(train, finished, folder, monkeypatch, fails):
    """W&B that fails at its import, start, log or finish is one note, and training is equal."""
    run = Broken(fails)

    def start(settings, **options):
        # Neither start nor end waits without a limit. Older versions have no finish_timeout.
        assert 0 < settings.init_timeout <= 60 and 0 < getattr(settings, "finish_timeout", 1) <= 120
        return Broken(0)._call() if fails == "init" else run

    monkeypatch.setattr(wandb, "init", start)
    if fails == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    (line,) = train(track=True).err.splitlines()
    assert line.startswith("note: Weights & Biases failed")
    assert run.calls == (fails + 1 if isinstance(fails, int) else 0)
    written, whole = folder / "embeddings.npz", finished("simclr") / "embeddings.npz"
    assert written.read_bytes() == whole.read_bytes()
