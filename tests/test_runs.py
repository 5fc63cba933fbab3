"""A run from its first to its last file: what it writes, that resuming changes nothing, how it ends when stopped."""

import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import METHODS, ROOT, flags
from PIL import Image

import common

FEATURES = ("train_features", "test_features")


def features(folder):
    with np.load(folder / "embeddings.npz") as file:
        return [file[name].tobytes() for name in FEATURES]


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()]


def train(module, tiny, folder, **changes):
    module.main(module.Args(**tiny(run_dir=str(folder), **changes)))
    return folder


# ------------------------------------------------------------------------------------------ files


def test_files_of_a_finished_run(method, finished, tiny):
    folder = finished(method.__name__)
    assert sorted(p.name for p in folder.iterdir()) == [
        "args.json", "checkpoint.pt", "curves.png", "embedding_2d.png", "embeddings.npz", "encoder.pt", "log.jsonl",
        "views.png"]  # fmt: skip

    config = json.loads((folder / "args.json").read_text())
    assert config["method"] == method.__name__ and config["device"] == "cpu" and config["precision"] == "fp32"
    assert config["args"]["lr"] == 0.05 and config["args"]["image_size"] == 8  # resolved, not None
    assert not [k for k, v in config["args"].items() if v is None and k not in ("wandb_entity", "knn_temperature")]
    assert config["versions"]["torch"] == torch.__version__ and config["command"]

    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3] and [r["step"] for r in records] == [3, 6, 9]
    for record in records:
        assert set(record) == {"epoch", "step", "loss", "lr", "samples_per_sec", "seconds", "spread"}
        assert all(math.isfinite(v) for v in record.values()) and record["samples_per_sec"] > 0
        assert 0 <= record["spread"] <= 1.0001

    images = common.load_images("npz", tiny()["data_dir"])
    with np.load(folder / "embeddings.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert set(arrays) == {"train_features", "train_labels", "test_features", "test_labels", "class_names", "meta"}
    assert arrays["train_features"].dtype == arrays["test_features"].dtype == np.float32
    assert arrays["train_features"].shape == (96, 128) and arrays["test_features"].shape == (40, 128)
    assert arrays["train_labels"].dtype == arrays["test_labels"].dtype == np.int64
    assert np.array_equal(arrays["train_labels"], images.train_labels)
    assert np.array_equal(arrays["test_labels"], images.test_labels)
    assert list(arrays["class_names"]) == [str(i) for i in range(10)]
    meta = json.loads(str(arrays["meta"]))
    assert meta["method"] == method.__name__ and meta["dataset"] == "npz" and meta["seed"] == 1 and meta["epochs"] == 3
    assert meta["data_dir"] == tiny()["data_dir"] and meta["image_size"] == 8

    with Image.open(folder / "views.png") as picture:
        picture.load()
        assert picture.mode == "RGB" and picture.width == 7 * 66 + 2 + 8 and picture.height == 8 * 66 + 2


def test_encoder_file_rebuilds_the_features(method, finished, tiny):
    """encoder.pt alone, read as untrusted, gives the features of embeddings.npz; its keys are torchvision's."""
    folder = finished(method.__name__)
    saved = torch.load(folder / "encoder.pt", weights_only=True)
    assert set(saved) == {"encoder", "width", "feature_dim", "image_size", "mean", "std", "class_names", "state_dict"}
    theirs = torchvision.models.resnet18().state_dict()
    assert set(saved["state_dict"]) == {k for k in theirs if not k.startswith("fc.")}
    # What was trained, which for BYOL is the online encoder and not the target.
    network = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["network"]
    prefix = "online.encoder." if method.__name__ == "byol" else "encoder."
    assert all(torch.equal(value, network[prefix + key]) for key, value in saved["state_dict"].items())
    encoder, dim = common.build_encoder(saved["encoder"], saved["image_size"], saved["width"])
    encoder.load_state_dict(saved["state_dict"])
    images = common.load_images("npz", tiny()["data_dir"])
    assert dim == saved["feature_dim"] == 128 and (saved["mean"], saved["std"]) == (images.mean, images.std)
    with np.load(folder / "embeddings.npz") as file:
        for part, name in ((images.train, "train_features"), (images.test, "test_features")):
            mean, std = (torch.tensor(saved[key]).view(3, 1, 1) for key in ("mean", "std"))
            mine = encoder.eval()((part / 255 - mean) / std).detach()
            torch.testing.assert_close(mine, torch.from_numpy(file[name]), rtol=1e-3, atol=1e-4 * float(mine.max()))


def test_load_encoder(method, finished, tiny):
    """common.load_encoder gives the encoder and what is needed to feed it: the features are those of the run."""
    folder = finished(method.__name__)
    encoder, info = common.load_encoder(folder / "encoder.pt")
    images = common.load_images("npz", tiny()["data_dir"])
    assert not encoder.training and info["image_size"] == 8 and info["class_names"] == [str(i) for i in range(10)]
    with torch.no_grad(), np.load(folder / "embeddings.npz") as file:
        mine = encoder(common.normalise(images.test, info["mean"], info["std"]))
        torch.testing.assert_close(mine, torch.from_numpy(file["test_features"]), rtol=1e-3, atol=1e-4)
    assert mine.shape == (40, info["feature_dim"])


def test_width_64_loads_into_torchvisions_network(tiny, tmp_path):
    """A whole run at torchvision's width: its encoder.pt goes into torchvision's resnet18, the 3x3 stem put in."""
    simclr = importlib.import_module("simclr")
    folder = train(simclr, tiny, tmp_path / "run", width=64, epochs=0)
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = (
        torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        torch.nn.Identity(),
        torch.nn.Identity(),
    )
    theirs.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True)["state_dict"])  # strict


def test_knn_acc_is_logged_and_printed(run_cli, tiny, method, finished, tmp_path):
    """--eval-every 1: knn_acc in every epoch, the last as scikit-learn has it from the features, and printed."""
    from sklearn.neighbors import KNeighborsClassifier

    result = run_cli(method, *flags(**tiny(run_dir=tmp_path / "run", eval_every=1)))
    assert result.status == 0 and not result.err, result
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all("knn_acc" in r for r in records)
    with np.load(tmp_path / "run" / "embeddings.npz") as file:
        judge = KNeighborsClassifier(5, metric="cosine").fit(file["train_features"], file["train_labels"])
        accuracy = judge.score(file["test_features"], file["test_labels"])
    assert abs(records[-1]["knn_acc"] - accuracy) < 0.026  # at most one of the 40, where two classes tie
    assert f"{100 * records[-1]['knn_acc']:.2f} %" in result.out and "knn_eval.py" in result.out
    # Neither evaluation nor checkpoints change what is learned.
    assert features(tmp_path / "run") == features(finished(method.__name__))


def test_untrained(tiny, method, tmp_path):
    """--epochs 0 writes the embeddings of the encoder as it was made."""
    folder = train(method, tiny, tmp_path / "run", epochs=0)
    assert epochs(folder) == []
    common.seed_step(1, 0, stream=1)
    encoder, _ = common.build_encoder("resnet18", 8, 16)
    images = common.load_images("npz", tiny()["data_dir"])
    expected = common.embed(encoder, images.test, images.mean, images.std)
    with np.load(folder / "embeddings.npz") as file:
        torch.testing.assert_close(torch.from_numpy(file["test_features"]), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(str(np.load(folder / "embeddings.npz")["meta"]))["epochs"] == 0


def test_default_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simclr = importlib.import_module("simclr")
    first, second = (simclr.main(simclr.Args(**tiny(epochs=0, seed=7))) for _ in range(2))
    assert first != second and first.parent == second.parent == type(first)("runs")
    assert first.name.startswith("simclr-npz-s7-")


def test_seeds(tiny, method, finished, tmp_path):
    again = train(method, tiny, tmp_path / "again", checkpoint_every=2, knn_k=3)
    other = train(method, tiny, tmp_path / "other", seed=2)
    assert features(again) == features(finished(method.__name__)) != features(other)


def test_deterministic(tiny, method, finished, tmp_path):
    """--deterministic asks PyTorch for it, and changes nothing on a CPU, which keeps the promise anyway."""
    folder = train(method, tiny, tmp_path / "run", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert features(folder) == features(finished(method.__name__))
    train(method, tiny, tmp_path / "other", epochs=0)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_deterministic_on_a_gpu(tiny, method, tmp_path, precision):
    one, two = (train(method, tiny, tmp_path / name, device="cuda", precision=precision, deterministic=True,
                      epochs=10) for name in "ab")  # fmt: skip
    assert features(one) == features(two)


def test_collapse_is_said(tiny, run_cli, tmp_path, monkeypatch):
    """A network whose embeddings are all one: spread 0 in the log, and a warning."""
    simclr = importlib.import_module("simclr")
    forward = simclr.SimCLR.forward
    monkeypatch.setattr(simclr.SimCLR, "forward", lambda *args: [0 * z + 1 for z in forward(*args)])
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", epochs=1)))
    assert result.status == 0 and "warning: the embeddings collapse" in result.err
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text())["spread"] < 1e-3


# ------------------------------------------------------------------------------------------ stop and resume


def interrupt(monkeypatch, at, number=signal.SIGINT, times=1):
    """Send this process a signal, once, while step `at` is under way."""
    advance, sent = common.Run.advance, []

    def advancing(self, i, stats, lr, epoch, step):
        if step == at and not sent:
            sent.append(step)
            for _ in range(times):
                os.kill(os.getpid(), number)
        advance(self, i, stats, lr, epoch, step)

    monkeypatch.setattr(common.Run, "advance", advancing)


def test_interrupted_and_resumed(run_cli, tiny, method, finished, tmp_path, monkeypatch):
    """Ctrl-C at the first step, the last of an epoch, in mid-epoch and at the last: each time exit status 130 and the
    command to go on with; in the end the same log and, byte for byte, the same features as without a stop.
    """
    folder, advance = tmp_path / "run", common.Run.advance
    first = words = flags(**tiny(run_dir=folder, checkpoint_every=2))
    for at in (0, 2, 4, 8):
        interrupt(monkeypatch, at)
        result = run_cli(method, *words)
        monkeypatch.setattr(common.Run, "advance", advance)
        assert result.status == 130 and "Traceback" not in result.err, result
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == at + 1
        assert not (folder / "embeddings.npz").exists()
        assert epochs(folder) == list(range(1, (at + 1) // 3 + 1))
        said = result.err.splitlines()[-1]
        assert said.startswith("stopped; go on with: python ")
        again = shlex.split(said.split("python ", 1)[1])
        assert again == [f"{method.__name__}.py", *first, "--resume"]
        words = again[1:]
    assert run_cli(method, *words).status == 0
    assert features(folder) == features(finished(method.__name__))
    mine, whole = ([json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()]
                   for f in (folder, finished(method.__name__)))  # fmt: skip
    assert [r["epoch"] for r in mine] == [1, 2, 3]
    for key in ("step", "loss", "lr", "spread"):
        assert [r[key] for r in mine] == [r[key] for r in whole]


def test_stopped_by_sigterm_in_a_default_folder(run_cli, tiny, finished, tmp_path, monkeypatch):
    """SIGTERM: 143, and where the folder was named by the run the printed command names it."""
    simclr = importlib.import_module("simclr")
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, 4, signal.SIGTERM)
    result = run_cli(simclr, *flags(**tiny()))
    assert result.status == 143, result
    again = shlex.split(result.err.splitlines()[-1].split("python ", 1)[1])
    assert "--resume" in again and "--run-dir" in again
    assert run_cli(simclr, *again[1:]).status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert features(folder) == features(finished("simclr"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers are put back


def test_second_interrupt_ends_at_once(run_cli, tiny, tmp_path, monkeypatch):
    simclr = importlib.import_module("simclr")
    interrupt(monkeypatch, 4, times=2)
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run")))
    assert result.status == 130 and "Traceback" not in result.err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3  # the one before
    assert not list((tmp_path / "run").glob(".*"))


def test_interrupted_while_evaluating(run_cli, tiny, finished, tmp_path, monkeypatch):
    """A signal between two steps, here during the kNN monitor, is not lost."""
    simclr = importlib.import_module("simclr")
    knn = common.Run.knn

    def evaluating(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return knn(self, *args)

    monkeypatch.setattr(common.Run, "knn", evaluating)
    words = flags(**tiny(run_dir=tmp_path / "run", eval_every=2, checkpoint_every=3))
    assert run_cli(simclr, *words).status == 130
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6
    monkeypatch.setattr(common.Run, "knn", knn)
    assert run_cli(simclr, *words, "--resume").status == 0
    assert epochs(tmp_path / "run") == [1, 2, 3] and features(tmp_path / "run") == features(finished("simclr"))


def test_interrupted_while_loading(run_cli, tiny, tmp_path, monkeypatch):
    """Before anything is written a Ctrl-C leaves nothing behind."""
    simclr = importlib.import_module("simclr")

    def loading(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_images", loading)
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run")))
    assert result.status == 130 and result.err == "interrupted\n" and not (tmp_path / "run").exists()


def test_resume_of_a_finished_run(run_cli, tiny, method, finished, tmp_path):
    folder = shutil.copytree(finished(method.__name__), tmp_path / "run")
    result = run_cli(method, *flags(**tiny(run_dir=folder, resume=True)))
    assert result.status == 0 and not result.err and "kNN accuracy" in result.out
    assert features(folder) == features(finished(method.__name__)) and epochs(folder) == [1, 2, 3]


def test_resume_with_nothing_to_resume_starts(run_cli, tiny, finished, tmp_path):
    """One command serves for the first start and after every disconnection, even one before the first checkpoint."""
    simclr = importlib.import_module("simclr")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "args.json").write_text("{")  # killed while it began
    (folder / "log.jsonl").write_text('{"epoch": 1}\n{"epo')
    (folder / ".checkpoint.pt.tmp").write_bytes(b"half")
    assert run_cli(simclr, *flags(**tiny(run_dir=folder, resume=True))).status == 0
    assert epochs(folder) == [1, 2, 3] and not list(folder.glob(".*"))
    assert features(folder) == features(finished("simclr"))


def test_folder_in_use(run_cli, tiny, tmp_path):
    """Two runs at once in one folder, even both with --resume, would overwrite each other: the second is refused."""
    fcntl = pytest.importorskip("fcntl")
    simclr = importlib.import_module("simclr")
    folder = tmp_path / "run"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)  # what a run in another process holds
    fcntl.flock(other, fcntl.LOCK_EX)
    result = run_cli(simclr, *flags(**tiny(run_dir=folder, resume=True)))
    assert result.status == 2 and result.err.startswith("error: ") and "in use" in result.err
    assert len(result.err.splitlines()) == 1 and not list(folder.iterdir())
    os.close(other)
    assert run_cli(simclr, *flags(**tiny(run_dir=folder, resume=True, epochs=0))).status == 0


def test_killed_hard(tiny, finished, tmp_path):
    """A real process, killed without a chance to save, while another tries the same folder; then resumed for real."""
    folder = tmp_path / "run"
    words = [sys.executable, str(ROOT / "simclr.py"), *flags(**tiny(run_dir=folder, resume=True))]
    code = "\n".join([
        "import sys, time; import common, simclr",
        "advance = common.Run.advance",
        "def slow(self, i, stats, lr, epoch, step):",
        "    advance(self, i, stats, lr, epoch, step)",
        "    time.sleep(600 if step == 4 else 0)",  # mid-epoch: two steps behind the checkpoint
        "common.Run.advance = slow",
        "common.cli(simclr.Args, simclr.main)",
    ])  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code, *words[2:]], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        second = importlib.import_module("simclr")
        with pytest.raises(common.UserError, match="in use"):
            second.main(second.Args(**tiny(run_dir=str(folder), resume=True)))
    finally:
        first.kill()
        first.wait()
    assert first.returncode == -signal.SIGKILL and not (folder / "embeddings.npz").exists()
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0 and not result.stderr, result
    assert result.stdout.splitlines()[-1].endswith(f"next: python knn_eval.py {folder} --pixels")
    assert epochs(folder) == [1, 2, 3] and features(folder) == features(finished("simclr"))


# ------------------------------------------------------------------------------------------ data without labels


def test_unlabelled_folder(run_cli, tiny, method, tmp_path):
    """Any tree of images trains; its embeddings have labels -1 and the files' names; the kNN is skipped with a word."""
    for i in range(12):
        (tmp_path / "photos" / f"album {i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"album {i % 3}" / f"{i} \u732b.png")
    words = tiny(
        dataset="folder", data_dir=tmp_path / "photos", run_dir=tmp_path / "run", batch_size=4, epochs=1, eval_every=1
    )
    result = run_cli(method, *flags(**words))
    assert result.status == 0 and "no labels" in result.out and "next:" not in result.out, result
    with np.load(tmp_path / "run" / "embeddings.npz", allow_pickle=False) as file:
        assert file["train_features"].shape == (12, 128) and (file["train_labels"] == -1).all()
        assert file["test_features"].shape == (0, 128) and file["test_labels"].shape == (0,)
        assert file["class_names"].shape == (0,)
        names = [str(name) for name in file["train_files"]]
    assert len(set(names)) == 12 and all((tmp_path / "photos" / name).is_file() for name in names)
    assert "knn_acc" not in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_names_of_the_flags_agree(name):
    """The flags that the three share come in the same order with the same words."""
    import dataclasses

    modules = [importlib.import_module(m) for m in METHODS]
    own = {"temperature", "ema", "ema_schedule", "lambd"}
    fields = [[(f.name, f.type) for f in dataclasses.fields(m.Args) if f.name not in own] for m in modules]
    assert fields[METHODS.index(name)] == fields[0]


def test_a_checkpoint_of_another_precision_resumes_into_fp16(tiny, finished):
    """Colab hands out another GPU: a run in fp32 or bf16 saved an empty scaler, and fp16 then starts a new one."""
    folder = finished("simclr")
    settings = json.loads((folder / "args.json").read_text())["args"]
    run = common.Run("simclr", importlib.import_module("simclr").Args(**{**settings, "resume": True}))
    assert run.checkpoint["state"]["scaler"] == {}
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = scaler.state_dict()
    run.images = common.load_images(settings["dataset"], settings["data_dir"])
    run.restore(3, scaler=scaler)
    assert scaler.state_dict() == before


def test_a_run_without_a_checkpoint_is_not_resumed_as_another_one(tiny, tmp_path, run_cli):
    """--epochs 0 writes no checkpoint, and a run may be killed before its first one: args.json tells what it was."""
    simclr, byol = (importlib.import_module(name) for name in ("simclr", "byol"))
    words = tiny(run_dir=tmp_path / "run", epochs=0)
    assert run_cli(simclr, *flags(**words)).status == 0
    before = (tmp_path / "run" / "embeddings.npz").read_bytes()
    for module, changes, named in ((byol, {}, "'simclr'"), (simclr, dict(seed=7), "--seed was 1 and is 7")):
        result = run_cli(module, *flags(**{**words, **changes, "resume": True}))
        assert result.status == 2 and named in result.err, result
    assert run_cli(simclr, *flags(**words, resume=True)).status == 0
    assert (tmp_path / "run" / "embeddings.npz").read_bytes() == before
