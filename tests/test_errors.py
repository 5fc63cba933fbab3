"""Whatever a user can get wrong: one line that names it, the right exit status, no traceback, nothing half-written."""

import importlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, flags
from PIL import Image

import common

simclr = importlib.import_module("simclr")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def save_images(folder, count=8, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


# ------------------------------------------------------------------------------------------ arguments


BAD_VALUES = [
    ("epochs", -1, "--epochs -1"),
    ("batch_size", 1, "--batch-size 1"),
    ("batch_size", 0, "--batch-size 0"),
    ("batch_size", 97, "97 is more than the 96 training images"),
    ("lr", "nan", "--lr nan"),
    ("lr", "inf", "--lr inf"),
    ("lr", 0, "--lr 0"),
    ("lr", -0.1, "--lr -0.1"),
    ("weight_decay", "nan", "--weight-decay nan"),
    ("warmup_epochs", -1, "--warmup-epochs -1"),
    ("seed", -1, "--seed -1"),
    ("width", 8, "--width 8"),
    ("image_size", 2000, "--image-size 2000"),
    ("projection_layers", -1, "--projection-layers -1"),
    ("eval_every", -1, "--eval-every -1"),
    ("checkpoint_every", 0, "--checkpoint-every 0"),
    ("knn_k", 0, "--knn-k 0"),
    ("knn_temperature", 0, "--knn-temperature 0"),
]


@pytest.mark.parametrize("key, value, says", BAD_VALUES, ids=lambda v: str(v))
def test_bad_numbers(refused, tiny, method, key, value, says):
    refused(method, *flags(**tiny(**{key: value})), says=[says])


@pytest.mark.parametrize("name, key, value", [
    *[("simclr", "temperature", v) for v in (0, -1, "nan", "inf")],
    *[("byol", "ema", v) for v in (-0.1, 1.1, "nan")],
    *[("barlow_twins", "lambd", v) for v in (-0.1, "nan", "inf")],
])  # fmt: skip
def test_bad_method_numbers(refused, tiny, name, key, value):
    module = importlib.import_module(name)
    refused(module, *flags(**tiny(**{key: value})), says=[f"--{key} "])


@pytest.mark.parametrize("words", [["--dataset", "imagenet"], ["--batch-size", "many"], ["--no-such-flag", "1"],
                                   ["--device", "tpu"], ["--precision", "fp8"], ["--encoder", "vit"]], ids=" ".join)  # fmt: skip
def test_tyro_refuses(run_cli, method, words, tmp_path, monkeypatch):
    """An unknown flag, choice or type keeps tyro's message, which names it, and status 2."""
    monkeypatch.chdir(tmp_path)
    result = run_cli(method, *words)
    assert result.status == 2 and "Traceback" not in result.err
    assert words[0] in result.err and words[1] in result.err
    assert not list(tmp_path.iterdir())


@without_gpu
def test_cuda_without_a_gpu(refused, tiny, method):
    refused(method, *flags(**tiny(device="cuda")), says=["--device cuda", "cpu"])


def test_fp16_on_the_cpu(refused, tiny, method):
    refused(method, *flags(**tiny(precision="fp16")), says=["--precision fp16", "cuda"])


# ------------------------------------------------------------------------------------------ data


def test_missing_and_empty_folder(refused, tiny, method, tmp_path):
    refused(method, *flags(**tiny(dataset="folder", data_dir=tmp_path / "nowhere")), says=["nowhere"])
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    refused(method, *flags(**tiny(dataset="folder", data_dir=tmp_path / "empty")), says=["no images"])


def test_one_class_only(refused, tiny, method, tmp_path):
    save_images(tmp_path / "one" / "train" / "cat")
    refused(
        method, *flags(**tiny(dataset="folder", data_dir=tmp_path / "one", batch_size=4)), says=["one class", "cat"]
    )
    np.savez(tmp_path / "one.npz", train_images=np.zeros((9, 8, 8), np.uint8), train_labels=np.full(9, 3))
    refused(method, *flags(**tiny(data_dir=tmp_path / "one.npz", batch_size=4)), says=["one class", "3"])


def test_broken_image(refused, tiny, method, tmp_path):
    save_images(tmp_path / "train" / "cat")
    save_images(tmp_path / "train" / "dog")
    (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no picture")
    result = refused(method, *flags(**tiny(dataset="folder", data_dir=tmp_path, batch_size=4)))
    assert "3.png" in result.err and "4.png" not in result.err


def test_paths_that_no_system_takes(refused, tiny):
    long = "x" * 5000
    refused(simclr, *flags(**tiny(run_dir=long)))
    refused(simclr, *flags(**tiny(dataset="folder", data_dir=long)))
    refused(simclr, *flags(**tiny(data_dir=long)))


# ------------------------------------------------------------------------------------------ run folder


def test_unwritable_run_folder(refused, tiny, method, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(method, *flags(**tiny(run_dir=tmp_path / "file" / "run")), says=["file/run"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_run_folder_on_a_read_only_system(refused, tiny):
    refused(simclr, *flags(**tiny(run_dir="/proc/nothing/here")), says=["/proc/nothing/here"])


def test_run_folder_that_is_a_file(refused, tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(simclr, *flags(**tiny(run_dir=tmp_path / "file")), says=["file"])


def test_folder_that_holds_a_run(refused, tiny, method, finished):
    folder = finished(method.__name__)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    refused(method, *flags(**tiny(run_dir=folder)), says=["already holds a run", "--resume"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_resume_without_a_folder(refused, tiny, method):
    refused(method, *flags(**tiny(resume=True)), says=["--resume needs --run-dir"])


def test_resume_with_other_arguments(refused, tiny, method, finished):
    """Every argument that differs is named, with both values; what is left unset is compared after the recipe."""
    folder = finished(method.__name__)
    changed = flags(**tiny(run_dir=folder, resume=True, lr=0.06, seed=2))
    refused(method, *changed, says=["--lr was 0.05 and is 0.06", "--seed was 1 and is 2"])
    refused(method, *flags(**tiny(run_dir=folder, resume=True, image_size=16)), says=["--image-size was 8 and is 16"])
    unset = {k: v for k, v in tiny(run_dir=folder, resume=True).items() if k != "epochs"}
    refused(method, *flags(**unset), says=["--epochs was 3 and is 200"])


def test_resume_with_other_images(refused, tiny, finished, tiny_npz, tmp_path):
    with np.load(tiny_npz) as file:
        np.savez(tmp_path / "fewer.npz", **{k: v[:64] for k, v in file.items()})
    folder = shutil.copytree(finished("simclr"), tmp_path / "run")
    refused(simclr, *flags(**tiny(data_dir=tmp_path / "fewer.npz", run_dir=folder, resume=True)),
            says=["training images have changed"])  # fmt: skip


# ------------------------------------------------------------------------------------------ checkpoints


class Code:
    """What a pickle with code in it looks like: loading it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def foreign_checkpoints(whole, marker):
    """name -> bytes of a file that is no checkpoint of ours."""
    import io

    def saved(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    good = torch.load(io.BytesIO(whole), weights_only=True)
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "text": b"not a checkpoint",
        "list": saved([1, 2]),
        "state dict alone": saved(good["state"]["network"]),
        "without epochs_logged": saved({k: v for k, v in good.items() if k != "epochs_logged"}),
        "args of another kind": saved({**good, "args": 3}),
        "step of another kind": saved({**good, "step": "three"}),
        "stats of another kind": saved({**good, "stats": None}),
        "without a network": saved({**good, "state": {}}),
        "state of another kind": saved({**good, "state": None}),
        "wrong shapes": saved({**good, "state": {**good["state"], "network": {"encoder.conv1.weight": torch.ones(3)}}}),
        "code": pickle.dumps(Code(marker)),
        "code in torch's form": saved({**good, "args": Code(marker)}),
    }


CASES = ["empty", "truncated", "text", "list", "state dict alone", "without epochs_logged", "args of another kind",
         "step of another kind", "stats of another kind", "without a network", "state of another kind", "wrong shapes",
         "code", "code in torch's form"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_that_is_none(refused, tiny, finished, tmp_path, case):
    folder, marker = tmp_path / "run", tmp_path / "the code ran"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(
        foreign_checkpoints((finished("simclr") / "checkpoint.pt").read_bytes(), marker)[case]
    )
    refused(simclr, *flags(**tiny(run_dir=folder, resume=True)), says=["checkpoint.pt"])
    assert not marker.exists()


@pytest.mark.parametrize("name", METHODS[1:])
def test_truncated_checkpoint(refused, tiny, finished, tmp_path, name):
    whole = (finished(name) / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[:-100])
    refused(importlib.import_module(name), *flags(**tiny(run_dir=tmp_path, resume=True)), says=["checkpoint.pt"])


def test_checkpoint_of_another_method(refused, tiny, method, finished, tmp_path):
    other = METHODS[METHODS.index(method.__name__) - 1]
    shutil.copy(finished(other) / "checkpoint.pt", tmp_path)
    refused(method, *flags(**tiny(run_dir=tmp_path, resume=True)), says=[repr(other), repr(method.__name__)])


# ------------------------------------------------------------------------------------------ runs that can not go on


def no_leftovers(folder):
    return not list(folder.rglob("*.tmp"))


def test_full_disk_while_saving(run_cli, tiny, method, tmp_path, monkeypatch):
    """The second checkpoint meets a full disk: status 1, one line, and the first one is still there to resume from."""
    folder, save, fsync, calls = tmp_path / "run", common.Run.save_checkpoint, os.fsync, []

    def full(number):
        raise OSError(28, "No space left on device")

    def saving(self, step, stats, **modules):
        calls.append(step)
        monkeypatch.setattr(os, "fsync", full if len(calls) == 2 else fsync)
        save(self, step, stats, **modules)

    monkeypatch.setattr(common.Run, "save_checkpoint", saving)
    result = run_cli(method, *flags(**tiny(run_dir=folder)))
    assert result.status == 1 and result.err.startswith("error: ") and len(result.err.splitlines()) == 1, result
    assert "No space left" in result.err and "checkpoint.pt" in result.err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3 and no_leftovers(folder)
    monkeypatch.setattr(common.Run, "save_checkpoint", save)
    monkeypatch.setattr(os, "fsync", fsync)
    assert run_cli(method, *flags(**tiny(run_dir=folder, resume=True))).status == 0
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3


def test_full_disk_while_logging(run_cli, tiny, tmp_path, monkeypatch):
    real = open

    def full(path, *args, **kwargs):
        if str(path).endswith("log.jsonl") and args == ("a",):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run")))
    assert result.status == 1 and result.err.startswith("error: ") and "log.jsonl" in result.err, result
    assert len(result.err.splitlines()) == 1


def test_real_file_size_limit(tiny, tmp_path):
    """The kernel, not a mock, refuses the checkpoint: nothing half-written is left."""
    limit = 200_000  # args.json and views.png fit, a checkpoint does not
    command = [sys.executable, str(ROOT / "simclr.py"), *flags(**tiny(run_dir=tmp_path / "run"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: could not write") and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and no_leftovers(tmp_path)


def test_loss_that_is_not_finite(run_cli, tiny, method, finished, tmp_path):
    """Status 1; epoch, step, lr and precision are named; the last checkpoint is whole and holds finite weights."""
    folder = tmp_path / "run"
    result = run_cli(method, *flags(**tiny(run_dir=folder, lr=1e30)))
    assert result.status == 1 and len(result.err.splitlines()) == 1, result
    for word in ("error: the loss is", "epoch 1", "step ", "lr ", "fp32", "--lr"):
        assert word in result.err
    assert "checkpoint" not in result.err and not (folder / "checkpoint.pt").exists() and no_leftovers(folder)


def test_divergence_after_a_checkpoint(run_cli, tiny, method, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    rate = method.learning_rate
    monkeypatch.setattr(method, "learning_rate", lambda step, *rest: 1e30 if step == 4 else rate(step, *rest))
    result = run_cli(method, *flags(**tiny(run_dir=folder)))
    assert result.status == 1 and "epoch 2" in result.err and "the last checkpoint is whole" in result.err, result
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3
    assert all(torch.isfinite(value).all() for value in checkpoint["state"]["network"].values())
    monkeypatch.setattr(method, "learning_rate", rate)
    assert run_cli(method, *flags(**tiny(run_dir=folder, resume=True))).status == 0
    assert np.isfinite(np.load(folder / "embeddings.npz")["train_features"]).all()


def test_divergence_in_the_last_step(run_cli, tiny, method, tmp_path, monkeypatch):
    """The loss of the step that breaks the weights is still finite: neither checkpoint nor embeddings may show it."""
    rate = method.learning_rate
    monkeypatch.setattr(method, "learning_rate", lambda step, *rest: 1e60 if step == 8 else rate(step, *rest))
    result = run_cli(method, *flags(**tiny(run_dir=tmp_path / "run")))
    assert result.status == 1 and "not finite" in result.err and len(result.err.splitlines()) == 1, result
    assert not (tmp_path / "run" / "embeddings.npz").exists() and not (tmp_path / "run" / "encoder.pt").exists()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6


def half(monkeypatch, scale):
    """fp16 with GradScaler, which a user gets on a GPU only, here on the CPU; and the scale that it starts from."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(common, "pick_precision", lambda *args: "fp16")
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=scale, **kwargs))


def test_skipped_steps_are_counted(run_cli, tiny, method, tmp_path, monkeypatch):
    """Gradients that overflow in fp16 are no error: GradScaler halves its scale until they fit, and the log counts."""
    half(monkeypatch, 2.0**30)
    result = run_cli(method, *flags(**tiny(run_dir=tmp_path / "run", batch_size=8, epochs=3, checkpoint_every=3)))
    assert result.status == 0 and not result.err, result
    counts = [json.loads(line)["skipped_steps"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scale = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["scaler"]["scale"]
    assert counts[0] >= 5 > counts[-1] and scale == 2.0 ** (30 - sum(counts))


def test_skipping_for_ever_is_an_error(run_cli, tiny, method, tmp_path, monkeypatch):
    """50 skipped steps in a row, counted over epochs of 24 steps."""
    half(monkeypatch, 2.0**126)
    result = run_cli(method, *flags(**tiny(run_dir=tmp_path / "run", batch_size=4, epochs=4)))
    assert result.status == 1 and len(result.err.splitlines()) == 1, result
    for word in ("50 steps in a row", "epoch 3", "step 49", "fp16", "the last checkpoint is whole"):
        assert word in result.err, result.err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 48


def test_features_that_are_not_finite(run_cli, tiny, tmp_path, monkeypatch):
    """Finite weights whose features overflow: no embeddings, no encoder."""
    embed = common.embed
    monkeypatch.setattr(common, "embed", lambda *args: embed(*args) / 0)
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", epochs=1)))
    assert result.status == 1 and "features are not finite" in result.err and len(result.err.splitlines()) == 1, result
    assert not (tmp_path / "run" / "embeddings.npz").exists() and not (tmp_path / "run" / "encoder.pt").exists()


def test_a_reader_that_has_seen_enough(tiny, tmp_path):
    """`| head -1`: no traceback and no error; the status is a shell's for a broken pipe."""
    words = " ".join(f"'{word}'" for word in flags(**tiny(run_dir=tmp_path / "run", epochs=300)))
    command = f"set -o pipefail; {sys.executable} -u {ROOT / 'simclr.py'} {words} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 141 and not done.stderr and len(done.stdout.splitlines()) == 1, done
