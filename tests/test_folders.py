"""Folders of images: decoded once into a file, which serves from the device, from memory or from disk alike."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, flags
from PIL import Image
from sklearn.datasets import load_sample_images
from test_torchrun import end, errors, torchrun

import common
import simclr


def photographs(folder, n, low, high, seed=0):
    """n JPEG files of low to high pixels a side: pieces of scikit-learn's two photographs, in train/ and test/."""
    dice, pictures = np.random.default_rng(seed), [Image.fromarray(picture) for picture in load_sample_images().images]
    for i in range(n):
        part, label = "test" if i % 5 == 4 else "train", i % 2
        picture = pictures[label]
        side, width, height = int(dice.integers(200, 420)), *dice.integers(low, high + 1, 2).tolist()
        left, top = (int(dice.integers(full - side)) for full in picture.size)
        path = folder / part / f"class {label}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((width, height), box=(left, top, left + side, top + side)).save(path, quality=90)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("photos"), 60, 60, 160)


@pytest.fixture
def small(photos, tmp_path):
    """small(**changes): the arguments of a short run on these photographs."""
    fixed = dict(dataset="folder", data_dir=str(photos), cache_dir=str(tmp_path / "cache"), image_size=24, batch_size=16,
                 width=16, encoder="resnet10", hidden_dim=16, projection_dim=16, epochs=2, lr=0.05, warmup_epochs=0.0,
                 eval_every=1, knn_k=3, device="cpu")  # fmt: skip
    return lambda **changes: {**fixed, **changes}


def features(folder):
    with np.load(folder / "embeddings.npz") as file:
        return file["train_features"].tobytes() + file["test_features"].tobytes()


def load(photos, cache, size=24):
    return common.load_images("folder", photos, size, cache_dir=cache)


def cached(cache):
    """The one file in a cache folder."""
    (path,) = cache.iterdir()
    return path


@pytest.fixture
def no_decoding(monkeypatch):
    def forbid():
        monkeypatch.setattr(common, "_decode", lambda *args: pytest.fail("decoded again"))

    return forbid


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(common, "_memory", lambda: 0)


# ------------------------------------------------------------------------------------------ the file


def test_images_are_kept_with_a_margin(photos, tmp_path):
    """Shorter side resized with antialiasing, centre square, an eighth larger than asked for."""
    images = load(photos, tmp_path / "cache")
    assert images.size == 24 and images.train.shape == (48, 3, 27, 27) and images.test.shape == (12, 3, 27, 27)
    for name, image in list(zip(images.train_files, images.train))[:8]:
        with Image.open(photos / name) as file:
            side, (width, height) = min(file.size), file.size
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            expected = np.asarray(file.resize((27, 27), Image.BILINEAR, box)).astype(int)
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < 3.5, (
            name,
            difference.mean(),
        )  # the JPEG is decoded at a half or a quarter of its size


def test_files_as_small_as_asked_for_have_none(photos, tmp_path):
    assert load(photos, tmp_path / "cache", 160).train.shape == (48, 3, 160, 160)


def test_a_second_start_decodes_nothing(photos, tmp_path, no_decoding):
    first = load(photos, tmp_path / "cache")
    no_decoding()
    again = load(photos, tmp_path / "cache")
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test) and first.mean == again.mean
    assert not list(tmp_path.glob("cache/.*"))


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "renamed", "truncated", "version", "longer"])
def test_what_has_changed_is_decoded_anew(photos, tmp_path, capsys, change):
    folder = shutil.copytree(photos, tmp_path / "photos")
    load(folder, tmp_path / "cache")
    path, victim = cached(tmp_path / "cache"), folder / "train" / "class 0" / "0.jpg"
    if change == "content":
        Image.new("RGB", (60, 60), (250, 0, 0)).save(victim)
    elif change == "time":
        os.utime(victim, ns=(1, 1))
    elif change == "added":
        shutil.copy(victim, victim.with_name("new.jpg"))
    elif change == "removed":
        victim.unlink()
    elif change == "renamed":
        victim.rename(victim.with_name("zzz.jpg"))
    elif change == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 0', 1))
    capsys.readouterr()
    images, fresh = load(folder, tmp_path / "cache"), load(folder, tmp_path / "fresh")
    assert capsys.readouterr().out.count("decoding them anew") == 1
    assert images.train_files == fresh.train_files and torch.equal(images.train, fresh.train)
    assert cached(tmp_path / "cache") == path  # and the old one is gone


def test_each_folder_and_size_has_a_file_of_its_own(photos, tmp_path, no_decoding):
    other = shutil.copytree(photos, tmp_path / "other" / photos.name)
    for folder, size in [(photos, 24), (photos, 16), (other, 24)]:
        load(folder, tmp_path / "cache", size)
    no_decoding()
    for folder, size in [(photos, 24), (photos, 16), (other, 24)]:
        assert load(folder, tmp_path / "cache", size).size == size


def test_a_broken_image_leaves_no_file(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "train" / "class 1" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(common.UserError, match="bad.jpg"):
        load(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def start(photos, cache, slow):
    """In a process of its own: decode, slowly or not."""
    decode = common._decode

    def slowly(*args):
        for i, rows in enumerate(decode(*args)):
            yield rows
            (cache.parent / f"part {i}").touch()
            time.sleep(60 if slow else 0.2)

    common._decode = slowly
    sys.stdout = open(cache.parent / f"said {os.getpid()}", "w")
    load(photos, cache)
    sys.stdout.close()


def test_killed_while_decoding(photos, tmp_path):
    """Nothing that looks whole is left, and the next start decodes and cleans up."""
    process = multiprocessing.get_context("fork").Process(target=start, args=(photos, tmp_path / "cache", True))
    process.start()
    while not (tmp_path / "part 0").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".") and left.name.endswith(".tmp")
    images, fresh = load(photos, tmp_path / "cache"), load(photos, tmp_path / "fresh")
    assert torch.equal(images.train, fresh.train) and not cached(tmp_path / "cache").name.startswith(".")


def test_two_runs_that_start_together_decode_once(photos, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(photos, tmp_path / "cache", False)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    said = [path.read_text() for path in tmp_path.glob("said *")]
    assert sorted(text.count("waiting for another run") for text in said) == [0, 1], said
    assert not any("anew" in text for text in said)
    assert torch.equal(load(photos, tmp_path / "cache").test, load(photos, tmp_path / "fresh").test)


def test_two_runs_that_decode_without_locks(photos, tmp_path, monkeypatch):
    """As on a file system without them: each writes a file of its own, and both are right."""
    monkeypatch.setattr(common, "lock", lambda *args, **kwargs: None)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(photos, tmp_path / "cache", False)) for _ in range(2)]
    processes[0].start()
    while not (tmp_path / "part 0").exists():
        time.sleep(0.01)
    processes[1].start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    images, fresh = load(photos, tmp_path / "cache"), load(photos, tmp_path / "fresh")
    assert torch.equal(images.train, fresh.train) and torch.equal(images.test, fresh.test)
    assert not cached(tmp_path / "cache").name.startswith(".")


def test_a_whole_file_waits_for_nobody(photos, tmp_path, monkeypatch):
    load(photos, tmp_path / "cache")
    monkeypatch.setattr(common, "_locked", lambda folder: pytest.fail("waits for another run's decoding"))
    load(photos, tmp_path / "cache")


def test_no_room_is_said_before_decoding(refused, small, monkeypatch, no_decoding):
    no_decoding()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=131_000))
    needed = 4096 + 60 * 3 * 27 * 27
    refused(simclr, *flags(**small()), says=[f"they take {needed} bytes, and 131000 are free", "--cache-dir"])


def test_a_cache_folder_that_can_not_be_used(refused, small, tmp_path):
    (tmp_path / "file").touch()
    refused(simclr, *flags(**small(cache_dir=tmp_path / "file")), says=["--cache-dir", "name another"])
    refused(simclr, *flags(**small(cache_dir="/proc/cache")), says=["--cache-dir '/proc/cache'"])


def test_a_disk_that_fills_while_decoding(run_cli, small, tmp_path):
    """A limit on the size of files stands for the disk: one line, and no part of a file."""
    command = f"ulimit -f 64; exec {sys.executable} {ROOT / 'simclr.py'} " + " ".join(
        f"'{word}'" for word in flags(**small(run_dir=tmp_path / "run")))  # fmt: skip
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(errors(done.stderr)) == 1 and ".images" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ where the images are


@pytest.mark.parametrize("name", METHODS)
def test_from_memory_and_from_disk_the_same_bytes(small, tmp_path, monkeypatch, name):
    module = __import__(name)
    module.main(module.Args(**small(run_dir=str(tmp_path / "memory"))))
    monkeypatch.setattr(common, "_memory", lambda: 0)
    module.main(module.Args(**small(run_dir=str(tmp_path / "disk"))))
    assert features(tmp_path / "memory") == features(tmp_path / "disk")
    logs = [[json.loads(line) for line in (tmp_path / place / "log.jsonl").read_text().splitlines()]
            for place in ("memory", "disk")]  # fmt: skip
    assert [(line["loss"], line["knn_acc"]) for line in logs[0]] == [
        (line["loss"], line["knn_acc"]) for line in logs[1]
    ]


def test_where_images_are_placed(photos, tmp_path, monkeypatch):
    total = 60 * 3 * 27 * 27
    monkeypatch.setattr(common, "_memory", lambda: 4 * total)
    assert isinstance(load(photos, tmp_path / "cache").train, torch.Tensor)
    monkeypatch.setattr(common, "_memory", lambda: 4 * total - 1)
    images = load(photos, tmp_path / "cache")
    assert isinstance(images.train, common.OnDisk) and isinstance(images.test, common.OnDisk)


def test_on_disk_gives_the_rows_that_a_tensor_gives(photos, tmp_path, monkeypatch):
    memory = load(photos, tmp_path / "cache")
    monkeypatch.setattr(common, "_memory", lambda: 0)
    disk = load(photos, tmp_path / "cache")
    for index in (torch.tensor([47, 0, 3, 3]), slice(5, 9), slice(None), slice(0, 48, 7), torch.tensor([], dtype=int)):
        for part in ("train", "test"):
            index = index if part == "train" or isinstance(index, slice) else index.clamp(max=11)
            found = getattr(disk, part)[index]
            assert torch.equal(found, getattr(memory, part)[index])
    found = disk.train[:4]
    found.zero_()  # a copy: what is done to it is not done to the file
    assert torch.equal(disk.train[:4], memory.train[:4])
    assert disk.mean == memory.mean and disk.std == memory.std


def test_an_interrupted_run_from_disk_goes_on_with_the_same_bytes(run_cli, small, tmp_path, monkeypatch, on_disk):
    whole = flags(**small(run_dir=tmp_path / "whole"))
    assert run_cli(simclr, *whole).status == 0
    advance = common.Run.advance

    def stop_at_4(self, i, stats, lr, epoch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, i, stats, lr, epoch, step)

    monkeypatch.setattr(common.Run, "advance", stop_at_4)
    assert run_cli(simclr, *flags(**small(run_dir=tmp_path / "run"))).status == 143
    monkeypatch.setattr(common.Run, "advance", advance)
    assert run_cli(simclr, *flags(**small(run_dir=tmp_path / "run", resume=True))).status == 0
    assert features(tmp_path / "run") == features(tmp_path / "whole")


def test_the_next_batches_are_read_while_a_step_computes(photos, tmp_path, on_disk):
    """Two ahead and no more, in order, by another thread; what goes wrong there is heard here."""
    images = load(photos, tmp_path / "cache").train
    read = []

    class Watched:
        shape = images.shape

        def __getitem__(self, order):
            read.append((order.tolist(), threading.current_thread() is threading.main_thread()))
            if order[0] == 40:
                raise OSError("the disk is gone")
            return images[order]

    orders = [torch.tensor([i, i + 1]) for i in range(0, 48, 8)]
    batches = common.take(Watched(), iter(orders), torch.device("cpu"))
    assert torch.equal(next(batches), images[orders[0]])
    deadline = time.monotonic() + 10
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [order for order, _ in read] == [order.tolist() for order in orders[:3]] and not any(
        main for _, main in read
    )
    for order in orders[1:5]:
        assert torch.equal(next(batches), images[order])
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_images_on_the_device_are_indexed_there(monkeypatch):
    """A device with an index is the same one as without."""
    monkeypatch.setattr(common, "ahead", lambda *args, **kwargs: pytest.fail("a thread for nothing"))
    images, order = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2), torch.tensor([2, 0])
    for device in (torch.device("cpu"), torch.device("cpu", 0)):
        assert torch.equal(next(common.take(images, [order], device)), images[order])


def test_a_run_reads_every_image_once_an_epoch(photos, tmp_path, on_disk):
    images, args = load(photos, tmp_path / "cache"), simclr.Args(batch_size=16, epochs=3, seed=5)
    everything = list(common.feed(images.train, args, 0, torch.device("cpu")))
    late = list(common.feed(images.train, args, 4, torch.device("cpu")))
    assert len(everything) == 9 and all(torch.equal(a, b) for a, b in zip(everything[4:], late)) and len(late) == 5
    for epoch in range(3):
        order = common.epoch_order(48, 16, 5, epoch)
        assert torch.equal(torch.cat(everything[3 * epoch : 3 * epoch + 3]), images.train[order.flatten()])


def test_a_file_larger_than_the_memory(tmp_path):
    """It is only mapped to be read, which no system refuses; it has holes, and takes no room."""
    side, n = 1024, 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 * 1024**2)
    with open(tmp_path / "x.images", "wb") as file:
        file.truncate(common.HEADER + n * 3 * side * side)
        file.seek(common.HEADER + (n - 1) * 3 * side * side)
        file.write(b"\x07")
    images = common.OnDisk(tmp_path / "x.images", (n, 3, side, side))
    assert images[torch.tensor([0, n - 1])][:, 0, 0, 0].tolist() == [0, 7]


def test_memory_stays_small(tmp_path):
    """A file of 1.2 GB is read whole, batch by batch, in a process that may not take that much."""
    path, n, side = tmp_path / "x.images", 100_000, 64
    with open(path, "wb") as file:
        file.truncate(common.HEADER + n * 3 * side * side)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, common, simclr
images = common.OnDisk({str(path)!r}, ({n}, 3, {side}, {side}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
args = simclr.Args(batch_size=500, epochs=1)
assert sum(len(batch) for batch in common.feed(images, args, 0, torch.device("cpu"))) == {n}
assert len(images[:2]) == 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000, done.stdout  # KiB


# ------------------------------------------------------------------------------------------ processes, labels, pixels


def test_of_several_processes_one_decodes(small, tmp_path):
    words = flags(**small(run_dir=tmp_path / "run", batch_size=16, epochs=1))
    script = tmp_path / "start.py"
    script.write_text("import os, runpy, sys, pathlib\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nimport common\ndecode = common._decode\n"
                      f"def noted(*a):\n    pathlib.Path({str(tmp_path)!r}, 'by ' + os.environ['RANK']).touch()\n    return decode(*a)\n"
                      "common._decode = noted\ncommon._memory = lambda: 0\nsys.argv[1:] = sys.argv[2:]\n"
                      f"runpy.run_path({str(ROOT / 'byol.py')!r}, run_name='__main__')")  # fmt: skip
    status, out, err = end(torchrun(script, "-", *words))
    assert status == 0 and out.count("wrote ") == 1, err
    assert [path.name for path in tmp_path.glob("by *")] == ["by 0"]


@pytest.mark.parametrize("labelled", ["train", "test"])
def test_labels_in_one_part_only(run_cli, small, photos, tmp_path, labelled):
    """Training works, nothing is judged, and the part without labels is named."""
    folder = tmp_path / "photos"
    for part in ("train", "test"):
        for i, path in enumerate(sorted((photos / part).glob("*/*"))):
            to = folder / part / (path.parent.name if part == labelled else ".") / f"{i}.jpg"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    result = run_cli(simclr, *flags(**small(data_dir=folder, run_dir=tmp_path / "run", epochs=1)))
    says = (
        "no labels in the test images" if labelled == "train" else f"folders in {str(folder / 'test')!r} are no labels"
    )
    assert result.status == 0 and says in result.out and "kNN accuracy on" not in result.out, result
    assert "knn_acc" not in (tmp_path / "run" / "log.jsonl").read_text()
    with np.load(tmp_path / "run" / "embeddings.npz", allow_pickle=False) as file:
        assert (file["train_labels"] >= 0).all() == (labelled == "train")
        assert (
            len(file["train_files"]) == len(file["train_features"]) == 48
            and (folder / str(file["train_files"][0])).exists()
        )


def test_resume_with_other_images_of_the_same_number(refused, small, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    words = small(data_dir=folder, run_dir=tmp_path / "run", checkpoint_every=1)
    simclr.main(simclr.Args(**{key: str(value) if "dir" in key else value for key, value in words.items()}))
    for path in (folder / "train").glob("*/*.jpg"):
        Image.new("RGB", (60, 60), (250, 0, 0)).save(path)
    load(folder, tmp_path / "cache")  # what is refused may still be decoded
    refused(simclr, *flags(**words, resume=True), says=["the training images have changed (48 before, 48 now)"])


def test_what_belongs_to_runs_is_no_image_of_the_folder(photos, tmp_path):
    folder = shutil.copytree(photos / "train" / "class 0", tmp_path / "photos")
    before = load(folder, tmp_path / "cache").train_files
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "args.json").touch()
    shutil.copy(next(folder.glob("*.jpg")), folder / "runs" / "mine" / "views.png")
    assert load(folder, tmp_path / "cache").train_files == before


def test_linked_folders_are_read_once(photos, tmp_path):
    folder = shutil.copytree(photos / "train", tmp_path / "photos")
    (folder / "latest").symlink_to(folder / "class 1")
    assert len(load(folder, tmp_path / "cache").train_files) == 48


def test_a_folder_that_can_not_be_read_is_named(photos, tmp_path, monkeypatch):
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("class 1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(common.UserError, match="class 1' can not be read"):
        load(photos, tmp_path / "cache")


def test_raw_pixels_of_a_folder_come_from_its_file(run_cli, small, tmp_path, monkeypatch, no_decoding):
    import knn_eval

    assert run_cli(simclr, *flags(**small(run_dir=tmp_path / "run", epochs=0))).status == 0
    no_decoding()
    monkeypatch.setattr(common, "_memory", lambda: 0)
    result = run_cli(knn_eval, tmp_path / "run", "--pixels", "--ks", 1, 3, "--cache-dir", tmp_path / "cache")
    assert result.status == 0 and "pixels of folder: n_train 48, n_test 12, D 1728" in result.out, result


def test_the_benchmark_in_small(tmp_path):
    """benchmarks/folders.py by its real command: what it counts is what it was told to make."""
    command = [sys.executable, ROOT / "benchmarks/folders.py", "--photos", 20, "--entries", 60, "--steps", 2, "--blocks", 1,
               "--batch-size", 4, "--output", tmp_path / "out.json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["decoding"]["photographs at 96"]["files"] == result["start"]["photographs at 96"]["files"] == 20
    memory = result["memory"]
    assert memory["images"] == 60 and memory["bytes_on_disk"] == 4096 + 60 * 3 * memory["side"] ** 2
    assert 1e8 < memory["peak_bytes"] < 3e9 and 0 <= result["waiting"]["share"] < 1
