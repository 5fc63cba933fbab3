"""A run folder: its files, that a stop or a kill changes nothing, and what keeps the checkpoint."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from itertools import product

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, Code, at_step, flags, read_log
from PIL import Image

import byol
import common
import simclr
from knn_eval import knn_sweep


def read_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def outcome(folder):
    """All that must not depend on stops: the results' bytes, and the log without its times."""
    records = read_log(folder)
    for record in records:
        del record["seconds"], record["samples_per_sec"]
    return [(folder / name).read_bytes() for name in ("encoder.pt", "embeddings.npz")], records


@pytest.fixture
def stopped(train, monkeypatch):
    """The result of a run of simclr.py, stopped in the middle of its second epoch."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, signal.SIGINT)
        return train(status=130)


# ---------------------------------------------------------------- files


def test_files_of_a_finished_run(method, finished, tiny):
    """args.json, log.jsonl and the pictures hold what the README says, and nothing else is left."""
    folder = finished(method.__name__)
    names = "args.json checkpoint.pt curves.png embeddings.npz encoder.pt log.jsonl views.png"
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == names.split()
    config = json.loads((folder / "args.json").read_text())
    assert config["method"] == method.__name__ and config["device"] == "cpu"
    assert config["versions"]["torch"] in torch.__version__ and config["command"]
    # Resolved by the recipe and by the data.
    assert config["args"] | tiny(encoder="resnet18", image_size=8) == config["args"]
    unset = {key for key, value in config["args"].items() if value is None}
    assert unset == {"labels", "window", "init"}

    keys = "epoch step loss spread lr seconds samples_per_sec".split()
    records = read_log(folder)
    assert [record["step"] for record in records] == [3, 6, 9]
    assert [list(r) for r in records] == [keys, keys, [*keys, "effective_rank", "knn_acc"]]
    with Image.open(folder / "views.png") as views, Image.open(folder / "curves.png") as curves:
        # 8 rows of an image and 6 views of 64 pixels, with a border of 2.
        assert views.size == (7 * 66 + 2, 8 * 66 + 2)
        curves.load()


def test_embeddings_are_those_of_the_encoder_in_eval_mode(method, finished, tiny):
    """encoder.pt alone, and the clean images, give the features of embeddings.npz."""
    folder = finished(method.__name__)
    images = common.load_images("npz", tiny()["data_dir"])
    encoder, info = common.load_encoder(folder / "encoder.pt")
    arrays = dict(np.load(folder / "embeddings.npz", allow_pickle=False))
    known = [arrays[key] for key in ("train_features", "train_labels", "test_features")]
    for part in ("train", "test"):
        labels, features = arrays.pop(f"{part}_labels"), arrays.pop(f"{part}_features")
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, getattr(images, f"{part}_labels"))
        with torch.no_grad():
            pixels = common.normalize(getattr(images, part), info["mean"], info["std"])
            expected = encoder(pixels).numpy()
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    assert arrays.pop("class_names").tolist() == []
    meta = dict(method=method.__name__, dataset="npz", image_size=8, epochs=3, seed=1)
    assert meta.items() <= json.loads(str(arrays.pop("meta"))).items()
    assert not arrays
    # test_knn.py has scikit-learn.
    found = knn_sweep(*known, [5])[5]
    assert read_log(folder)[-1]["knn_acc"] == (found == images.test_labels.numpy()).mean()
    # BYOL keeps the online encoder, not the target.
    network = read_checkpoint(folder)["network"]
    prefix = "online.encoder." if hasattr(method, "ema_update") else "encoder."
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, network[prefix + key])


def test_eval_every(train, folder, finished):
    """knn_acc is logged every --eval-every epochs and at the end, printed, and changes nothing."""
    result = train(eval_every=2, checkpoint_every=2)
    assert not result.err
    records = read_log(folder)
    assert ["knn_acc" in record for record in records] == [False, True, True]
    lines = [line for line in result.out.splitlines() if line.startswith("epoch ")]
    assert lines[2].endswith(f"knn_acc {records[2]['knn_acc']:.4g}") and "knn_acc" not in lines[0]
    assert outcome(folder)[0] == outcome(finished("simclr"))[0]


def test_seed_draws():
    """Random numbers differ between seeds, purposes and steps, and come again for the same."""
    draws = []
    for seed, purpose, step in 2 * list(product([1, 2], ["weights", "views"], [0, 1])):
        common.seed_draws(seed, purpose, step)
        draws.append(float(torch.rand(())))
    assert draws[:8] == draws[8:] and len(set(draws)) == 8


def test_epochs_0(train, method, folder):
    """--epochs 0 evaluates the encoder as initialized by the seed."""
    train(method, epochs=0, seed=2)
    common.seed_draws(2, "weights")
    expected, _ = common.build_encoder("resnet18", 8, 16)
    for key, value in common.load_encoder(folder / "encoder.pt")[0].state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    ((epoch, accuracy),) = [(record["epoch"], record["knn_acc"]) for record in read_log(folder)]
    assert epoch == 0 and 0 <= accuracy <= 1
    # Its arguments are compared as well.
    train(method, resume=True, status=2, says=["seed was 2 and is 1"])


def test_collapse_warning(train, folder, monkeypatch):
    """Constant embeddings have spread 0 in the log, and a warning is printed."""
    forward = simclr.SimCLR.forward
    constant = lambda *args: [0 * z + 1 for z in forward(*args)]  # noqa: E731
    monkeypatch.setattr(simclr.SimCLR, "forward", constant)
    train(epochs=1, says=["warning: the embeddings collapse (spread 0.0"])
    assert read_log(folder)[0]["spread"] < 1e-3


# ---------------------------------------------------------------- stop, kill, resume


def test_stop_at_every_step_resumes_to_the_same_bytes(train, method, finished, folder, monkeypatch):
    """Ctrl-C or SIGTERM at each of the 9 steps in turn: a checkpoint, 130 or 143, equal results."""
    for step in range(9):
        number = (signal.SIGINT, signal.SIGTERM)[step % 2]
        with monkeypatch.context() as patch:
            at_step(patch, step, number)
            result = train(method, status=128 + number, resume=True, checkpoint_every=2)
        (line,) = result.err.splitlines()
        assert line.startswith("stopped; ") and f"--run-dir '{folder}' --resume" in line
        assert read_checkpoint(folder)["step"] == step + 1
        # The resumed run evaluates and logs the epoch that the last step ended.
        assert len(read_log(folder)) == step // 3
        assert not (folder / "embeddings.npz").exists()
    # The handlers are put back.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(method, resume=True, checkpoint_every=2)
    assert outcome(folder) == outcome(finished(method.__name__))


# Kills its process at the n-th call of a function of os or of a method of Run.
KILL = """
import os, signal, sys, byol, common
name, count = sys.argv.pop(1), int(sys.argv.pop(1))
owner = os if hasattr(os, name) else common.Run
function = getattr(owner, name)
def kill(*args):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
setattr(owner, name, kill)
common.cli(byol.Args, byol.main)
"""


def test_kill_resumes_to_the_same_bytes(train, tiny, finished, folder):
    """A process killed while it writes or trains leaves no partial file, and can be resumed."""
    command = [sys.executable, "-c", KILL]
    words = flags(**tiny(run_dir=folder, resume=True))
    # Before the first checkpoint takes its name, in mid-epoch, before encoder.pt takes its name.
    for moment in ("replace 4", "record 5", "replace 9"):
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        done = subprocess.run([*command, *moment.split(), *words], env=environment)
        assert done.returncode == -signal.SIGKILL
        assert (folder / "checkpoint.pt").exists() == (moment != "replace 4")
        assert (folder / "embeddings.npz").exists() == (moment == "replace 9")
        assert not (folder / "encoder.pt").exists()
    assert read_checkpoint(folder)["step"] == 9
    train(byol, resume=True)
    assert outcome(folder) == outcome(finished("byol"))
    assert not list(folder.glob(".*.tmp"))


def test_own_images_resume_to_the_same_bytes(train, folder, finished, tmp_path, monkeypatch):
    """16-bit files, a table, groups, a start from weights, overhead views; decoded once."""
    rng, lines = np.random.default_rng(0), ["file,label,split,group"]
    (tmp_path / "scans").mkdir()
    for i in range(40):
        scan = rng.integers(0, 4096, (12, 16), np.uint16)
        Image.fromarray(scan).save(tmp_path / f"scans/{i:02}.png")
        lines += [f"{i:02}.png,{'ab'[i % 2]},{'test' if i > 31 else ''},{i // 4}"] * (i > 9)
    # As Excel writes it.
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    words = dict(dataset="folder", data_dir=tmp_path / "scans", labels=tmp_path / "labels.csv")
    words |= dict(init=finished("simclr") / "encoder.pt", augment="overhead", fit="stretch")
    words |= dict(batch_size=8, eval_every=1)
    whole = tmp_path / "whole"
    train(run_dir=whole, **words)
    monkeypatch.setattr(common, "read_image", lambda *args: pytest.fail("decoded again"))
    with monkeypatch.context() as patch:
        at_step(patch, 5, signal.SIGTERM)
        train(status=143, **words)
    train(resume=True, **words)
    assert outcome(folder) == outcome(whole)


def test_failed_evaluation_loses_no_steps(train, folder, finished, monkeypatch):
    """The checkpoint precedes it; the resumed run evaluates, and logs each epoch once."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "knn_monitor", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train()
    assert read_checkpoint(folder)["step"] == 9 and len(read_log(folder)) == 2
    train(resume=True)
    assert outcome(folder) == outcome(finished("simclr"))


def half_precision_on_the_cpu(args):
    """common.set_up as on an old GPU."""
    return torch.device("cpu"), torch.float16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_in_another_precision(stopped, train, folder, monkeypatch, precision):
    """Colab may give another GPU: a checkpoint of fp32 resumes; fp16's scale is kept."""
    if precision == "fp16":
        monkeypatch.setattr(common, "set_up", half_precision_on_the_cpu)
    train(resume=True, precision=precision)
    assert read_checkpoint(folder)["step"] == 9
    assert ("scale" in read_checkpoint(folder)["scaler"]) == (precision == "fp16")


def test_more_epochs_prolong_a_run(stopped, train, folder, finished):
    """Fewer than it has trained are refused: it would be named by them."""
    for epochs in (1, 0):
        train(resume=True, epochs=epochs, status=2, says=[f"more than --epochs {epochs}"])
    train(resume=True)
    assert outcome(folder) == outcome(finished("simclr"))
    # An unset warm-up, and BYOL's unset EMA, follow the number of epochs.
    train(resume=True, epochs=5, warmup_epochs=None)
    evaluated = {record["epoch"]: "knn_acc" in record for record in read_log(folder)}
    assert evaluated == {1: False, 2: False, 3: True, 4: False, 5: True}
    shutil.copytree(finished("byol"), folder.parent / "byol")
    words = dict(run_dir=folder.parent / "byol", resume=True, epochs=4, ema=0.95)
    train(byol, **words)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "module, changes, says",
    [
        (simclr, dict(resume=False), ["holds a run", "--resume"]),
        (simclr, dict(lr=0.06), ["lr was 0.05 and is 0.06"]),
        (simclr, dict(image_size=16), ["image_size was 8 and is 16"]),
        (byol, {}, ["method was simclr and is byol"]),
        (simclr, dict(data_dir="fewer.npz"), ["images was 96 and is 95"]),
    ],
)
def test_resume_refuses_another_run(
    refused, tiny, tiny_npz, finished, folder, module, changes, says
):
    """Other arguments, another method and another number of images are refused."""
    arrays = dict(np.load(tiny_npz))
    arrays |= {name: arrays[name][1:] for name in ("train_images", "train_labels")}
    np.savez("fewer.npz", **arrays)
    shutil.copytree(finished("simclr"), folder)
    refused(module, says=says, **tiny(**{"run_dir": folder, "resume": True, **changes}))


def damage(name, whole, path):
    """Replace a file by a damaged or foreign one."""
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    contents = dict(
        truncated=whole[:-100], flipped=flipped, text=b"{", code=pickle.dumps(Code(), 2)
    )
    if name in contents:
        path.write_bytes(contents[name])
    elif name == "zipped code":
        torch.save(Code(), path)
    else:
        torch.save([1, 2], path)


@pytest.mark.parametrize("name", ["truncated", "flipped", "text", "code", "zipped code", "list"])
def test_damaged_files_are_refused(refused, tiny, finished, folder, name):
    """A damaged or foreign checkpoint.pt or encoder.pt is a UserError; code in it does not run."""
    shutil.copytree(finished("simclr"), folder)
    for path in (folder / "checkpoint.pt", folder / "encoder.pt"):
        damage(name, path.read_bytes(), path)
    refused(simclr, **tiny(run_dir=folder, resume=True), says=["checkpoint.pt"])
    with pytest.raises(common.UserError, match="encoder.pt"):
        common.load_encoder(folder / "encoder.pt")
    assert not os.path.exists("the code ran")


def test_run_dir_is_locked_until_the_results_are_written(train, tiny, folder, monkeypatch):
    """A second start with --resume while embeddings.npz is written is refused."""
    embed, lock = common.embed, filelock.FileLock(folder / ".lock", timeout=0)

    def embedding(*args, **options):
        with pytest.raises(filelock.Timeout):
            lock.acquire()
        return embed(*args, **options)

    monkeypatch.setattr(common, "embed", embedding)
    train(epochs=1)
    lock.acquire()


def test_run_dir_in_use_is_refused(refused, tiny, folder, finished):
    """A second run in the folder of a living one is refused, with --resume as well."""
    shutil.copytree(finished("simclr"), folder)
    with filelock.FileLock(folder / ".lock"):
        refused(simclr, **tiny(run_dir=folder, resume=True), says=["in use by another run"])


def test_file_system_without_locks(train, monkeypatch):
    """As some of NFS: the run and the block of file_lock go on without."""
    # An OSError.
    monkeypatch.setattr("fcntl.flock", lambda *args: os.close(-1))
    with common.file_lock("x"):
        train(epochs=1)


def test_run_dir_is_free_after_an_exception(train, folder, finished, monkeypatch):
    """A notebook's process lives on after an exception, keeps its traceback, and can resume."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as error:
        at_step(patch, 4, lambda: 1 / 0)
        train()
    train(resume=True, lr=0.06, status=2, says=["lr was"])
    train(resume=True)
    assert outcome(folder) == outcome(finished("simclr")), error


# ---------------------------------------------------------------- failures that keep the checkpoint


def test_disk_full_at_fsync_keeps_the_checkpoint(train, folder, monkeypatch):
    """As on a network drive: a full disk shows at fsync, and the first checkpoint stays."""

    def full(number):
        raise OSError("No space left on device")

    at_step(monkeypatch, 5, lambda: monkeypatch.setattr(os, "fsync", full))
    train(status=2, says=["checkpoint.pt", "No space left on device"])
    assert read_checkpoint(folder)["step"] == 3 and not list(folder.glob(".*.tmp"))


def test_file_size_limit_keeps_the_checkpoint(stopped, train, folder, finished):
    """A process that may not write 1 MB, as on a full disk, keeps what it resumed from."""
    before = (folder / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        train(resume=True, status=2, says=["cannot write", "checkpoint.pt"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob(".*.tmp"))
    train(resume=True)
    assert outcome(folder) == outcome(finished("simclr"))


@pytest.mark.parametrize(
    "at, stop, says, kept",
    [
        (4, False, "step 5: the loss is not finite", 3),
        (4, True, "step 4: the weights are not finite", 3),
        (8, False, "not finite", 6),
    ],
)
def test_not_finite_keeps_the_checkpoint(
    train, method, folder, finished, monkeypatch, at, stop, says, kept
):
    """A step that destroys the weights ends the run at the next loss, and is never saved."""
    rate = method.learning_rate
    with monkeypatch.context() as patch:
        broken = lambda step, *rest: 1e60 if step == at else rate(step, *rest)  # noqa: E731
        patch.setattr(method, "learning_rate", broken)
        at_step(patch, at, lambda: stop and signal.raise_signal(signal.SIGINT))
        train(method, status=2, says=[says, "--lr"])
    assert read_checkpoint(folder)["step"] == kept and not (folder / "encoder.pt").exists()
    train(method, resume=True)
    assert outcome(folder) == outcome(finished(method.__name__))
