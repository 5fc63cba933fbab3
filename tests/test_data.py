"""Images in, from every source; features out: the encoder, embed, the kNN monitor, spread."""

import json
import multiprocessing
import os
import shutil
import signal
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torchvision
from conftest import ROOT, noise, write
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_digits
from torchvision.transforms import v2

import byol
import common
import knn_eval
import simclr

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")


def smooth(height, width):
    """A color image without sharp edges: two ways of resizing it nearly agree."""
    return np.array(Image.fromarray(noise(4, 4, 3)).resize((width, height)))


def load(root, size=None, cache="cache"):
    return common.load_images("folder", root, size, cache)


def load_npz(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return common.load_images("npz", folder / "data.npz")


def as_hwc(image):
    return image.permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- named data sets


def test_digits_split():
    """Every one of scikit-learn's digits is in one part, with its label; the split is fixed."""
    images, again = common.load_images("digits"), common.load_images("digits")
    assert images.train.shape == (1437, 3, 8, 8) and torch.equal(images.train, again.train)
    assert images.gray and images.class_names == list("0123456789")
    both = torch.cat([images.train, images.test])[:, 0].flatten(1)
    labels = torch.cat([images.train_labels, images.test_labels])
    pixels, truth = load_digits(return_X_y=True)
    expected = np.column_stack([(pixels * 255 / 16).round(), truth])
    assert sorted(np.column_stack([both, labels]).tolist()) == sorted(expected.tolist())
    assert images.test_labels.bincount().min() >= 35


def test_mean_and_std_equal_numpy(tmp_path):
    """Those of the training images in [0, 1]; a constant channel has std 1e-3."""
    train = noise(50, 9, 9, 3) // np.array([1, 2, 255], np.uint8)
    images = load_npz(tmp_path, train_images=train)
    mean, std = train.mean((0, 1, 2)) / 255, np.maximum(train.std((0, 1, 2)) / 255, 1e-3)
    found = common.normalize(images.train, images.mean, images.std)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), (train / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [12, 30, 47])
def test_square_equals_torchvision(size, fit):
    """The center square, the image with black sides, or the whole image, resized smoothly."""
    images = torch.from_numpy(smooth(40, 30)).permute(2, 0, 1)[None]
    whole = dict(crop=images[:, :, 5:35], pad=v2.Pad([5, 0])(images), stretch=images)[fit]
    expected = v2.Resize([size, size])(whole)
    torch.testing.assert_close(common.square(images, size, fit), expected, rtol=0, atol=1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_failed_download_is_one_error_line(run_cli, monkeypatch, name):
    """Without a network, the line says where to place the files."""

    def fail(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    says = f"error: could not get {name}; place its original files in 'files'"
    run_cli(simclr, "--dataset", name, "--data-dir", "files", status=2, says=[says])


@pytest.mark.parametrize(
    "name, splits", [("CIFAR10", [1, 0]), ("STL10", ["train+unlabeled", "test"])]
)
def test_torchvision_layouts_keep_size_and_order(monkeypatch, name, splits):
    """[N, H, W, 3] of CIFAR and [N, 3, H, W] of STL-10 become [N, 3, S, S], not transposed."""
    data, labels, seen = noise(3, 3, 32, 32), [0, 1, -1], []

    def fake(root, split, download):
        seen.append(split)
        layout = data.transpose(0, 2, 3, 1) if name == "CIFAR10" else data
        return SimpleNamespace(data=layout, targets=labels, labels=labels, classes=[])

    monkeypatch.setattr(torchvision.datasets, name, fake)
    images = common.load_images(name.lower())
    np.testing.assert_array_equal(images.train, data)
    assert images.train_labels.tolist() == labels and not images.gray and seen == splits


def test_runs_download_one_after_the_other(monkeypatch):
    """A second run waits, instead of reading half a file."""
    running = []

    def fake(root, split, download):
        running.append(split)
        time.sleep(0.1)
        assert running == [split]
        running.clear()
        return SimpleNamespace(data=noise(3, 32, 32, 3), targets=[0, 1, 2], classes=[])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with ThreadPoolExecutor() as pool:
        assert len([*pool.map(common.load_images, ["cifar10"] * 2)]) == 2


def test_cifar10_jpeg_folder(tmp_path, cifar10):
    """The pixels of CIFAR-10's JPEG files are Pillow's, in classes sorted by name."""
    (tmp_path / "train").symlink_to(cifar10 / "test")
    images = load(tmp_path)
    assert images.train.shape == (10000, 3, 32, 32) and images.class_names[::9] == [
        "airplane",
        "truck",
    ]
    for name, image in zip(images.extra["train_files"][::999], images.train[::999]):
        np.testing.assert_array_equal(as_hwc(image), Image.open(tmp_path / name))


# ---------------------------------------------------------------- folders of images

# Files, class names, labels of the training and of the test images.
LAYOUTS = {
    "train and test": ("train/b/0.png train/a/x/1.PNG test/a/2.png", "a b", [0, 1], [0]),
    "val": ("train/b/0.png train/a/1.png val/b/2.png", "a b", [0, 1], [1]),
    "unlabeled test": ("train/a/0.png train/b/1.png test/2.png", "a b", [0, 1], [-1]),
    "tree": ("0.png sub/1.png sub/deeper/2.png", "", [-1, -1, -1], []),
    "loose file in train": ("train/1.png train/a/2.png train/b/0.png", "a b", [-1, 0, 1], []),
    "outside of train": ("train/a/0.png train/b/1.png more/2.png", "a b", [0, 1], []),
    "one class": ("train/a/0.png train/a/1.png train/2.png test/a/3.png", "", [-1] * 3, [-1]),
    "hidden": ("train/a/0.png train/b/1.png train/.cache/2.png train/a/._3.png", "a b", [0, 1], []),
    "odd names": ("train/-a/new\nline.png train/'猫\"/*.jpg.png", "'猫\" -a", [0, 1], []),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_layout(tmp_path, capsys, name):
    """Class folders give labels, other trees none; each row is the image of its file name."""
    names, class_names, train_labels, test_labels = LAYOUTS[name]
    names = names.split(" ")
    for i, file in enumerate(names):
        write(tmp_path / file, noise(8, 8, 3, seed=i))
    (tmp_path / names[0]).with_suffix(".txt").touch()
    images = load(tmp_path)
    assert images.class_names == class_names.split()
    assert images.train_labels.tolist() == train_labels
    assert images.test_labels.tolist() == test_labels
    out = capsys.readouterr().out
    n, unlabeled, classes = len(test_labels), train_labels.count(-1), class_names.split()
    counts = f"{n + len(train_labels)} images, {n} for testing; {unlabeled} of the others unlabeled"
    assert f"{tmp_path}: {counts}\n" in out
    hint = ", 1 images outside of train and test; to use them, move them into train"
    ignored = hint if name == "outside of train" else ""
    shown = f"{len(classes)} classes: {', '.join(classes)}; ignored: 1 .txt{ignored}\n"
    assert f"{tmp_path}: {shown}" in out
    files = [*images.extra["train_files"], *images.extra["test_files"]]
    assert [*images.extra] == ["train_files", "test_files"]
    for file, image in zip(files, torch.cat([images.train, images.test])):
        np.testing.assert_array_equal(as_hwc(image), noise(8, 8, 3, seed=names.index(file)))


@pytest.mark.parametrize(
    "names, says",
    [
        (
            "train/a/0.png train/b/0.png test/c/0.png",
            "no training images of the test classes ['c']",
        ),
        (
            "train/a/.0.png test/a/0.png",
            ".ppm .pgm; ignored: no files",
        ),
        # As of an old archive; it could not be written to a table.
        ("\udcff.png", "their names must be UTF-8"),
    ],
)
def test_folder_layout_is_refused(refused, tmp_path, names, says):
    """A layout without training images or with unknown classes is one error line."""
    for name in names.split():
        write(tmp_path / name, noise(8, 8))
    refused(simclr, dataset="folder", data_dir=tmp_path, epochs=0, says=[says])


def test_folder_of_links(photos, tmp_path):
    """A linked class folder is read; a link to nothing is named."""
    shutil.copytree(photos / "train" / "class 1", tmp_path / "train" / "b")
    (tmp_path / "train" / "a").symlink_to(photos / "train" / "class 0")
    assert load(tmp_path).train_labels.tolist() == [0] * 16 + [1] * 16
    (tmp_path / "train" / "b" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(common.UserError, match="gone.png"):
        load(tmp_path)


def write_modes(root):
    """Write a file of each mode; return their expected pixels by file name."""
    color, gray = smooth(32, 48), smooth(32, 48)[..., 0]
    palette = Image.fromarray(color).quantize(64)
    clear = palette.copy()
    clear.info["transparency"] = bytes(64)
    ink = Image.fromarray(np.dstack([255 - color, 0 * gray]), mode="CMYK")
    exif = Image.Exif()
    # Orientation: the camera was turned to the left.
    exif[0x0112] = 6
    files = {
        "bilevel.png": (gray > 127, (gray > 127) * 255),
        "alpha.png": (np.dstack([color, gray]), 255 - (255.0 - color) * (gray / 255)[..., None]),
        "palette.gif": (palette, palette.convert("RGB")),
        "clear.png": (clear, 0 * color + 255),
        "cmyk.jpg": (ink, color),
        "rotated.jpg": (color, np.rot90(color, -1)),
    }
    for name, (content, _) in files.items():
        image = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        image.save(root / name, quality=95, exif=exif if name == "rotated.jpg" else b"")
    (root / "low.ppm").write_bytes(b"P6 48 32 85\n" + (color // 3).tobytes())
    files["low.ppm"] = None, color // 3 * 3
    # Two photographs in one file, as of a stereo camera.
    both = dict(append_images=[palette.convert("RGB")], quality=95)
    Image.fromarray(color).save(root / "stereo.jpg", "MPO", save_all=True, **both)
    files["stereo.jpg"] = None, color
    return {name: np.array(pixels, np.uint8) for name, (_, pixels) in files.items()}


@pytest.mark.parametrize("size, side", [(32, 32), (16, 24), (8, 12)])
def test_read_image_modes(tmp_path, size, side):
    """Every mode becomes RGB as Pillow resizes the expected pixels: upright, alpha on white."""
    expected = write_modes(tmp_path)
    images = load(tmp_path, size)
    for name, image in zip(images.extra["train_files"], images.train):
        pixels = Image.fromarray(expected.pop(name)).convert("RGB")
        left, top = (pixels.width - 32) // 2, (pixels.height - 32) // 2
        pixels = pixels.crop((left, top, left + 32, top + 32))
        pixels = np.array(pixels.resize((side, side), Image.Resampling.BILINEAR), int)
        assert np.abs(as_hwc(image) - pixels).max() <= (15 if "jpg" in name else 1), name
    assert not expected


@pytest.mark.parametrize(
    "sides, asked, size, side",
    [([20, 24, 22], None, 22, 22), ([400], None, 224, 336), ([90], 56, 56, 84), ([24], 56, 56, 56)],
)
def test_image_size_of_a_folder(tmp_path, sides, asked, size, side):
    """Unset: the median side, at most 224. Kept half as large again if the files are that large."""
    for shorter in sides:
        write(tmp_path / f"{shorter}.png", noise(shorter, 420))
    images = load(tmp_path, asked)
    assert images.size == size and images.train.shape[2:] == (side, side)


def test_bad_images_are_all_named(run_cli, tmp_path):
    """One run names every file that is broken, or of which Pillow would drop bits or channels."""
    cut = {"cut.jpg": 400, "cut.png": 60, "empty.png": 0, "two\nlines.gif": 5}
    for name in ("0.png", "1.png", *cut):
        write(tmp_path / name, noise(64, 64))
    for name, size in cut.items():
        os.truncate(tmp_path / name, size)
    color, rgb = np.uint16(noise(8, 8, 3)), dict(photometric="rgb")
    write(tmp_path / "deep.tif", color[..., 0])
    tifffile.imwrite(tmp_path / "color.tif", color, **rgb)
    tifffile.imwrite(tmp_path / "five.tif", noise(8, 8, 5), **rgb)
    planes = np.moveaxis(color, 2, 0)
    tifffile.imwrite(tmp_path / "planes.tif", planes, **rgb, planarconfig="separate")
    tifffile.imwrite(tmp_path / "infrared.tif", noise(8, 8, 4), **rgb)
    tifffile.imwrite(tmp_path / "many.tif", noise(8, 8, 5), photometric="minisblack")
    tifffile.imwrite(tmp_path / "stack.tif", noise(2, 8, 8))
    values = " ".join(map(str, color.flatten()))
    (tmp_path / "plain.ppm").write_text(f"P3 8 8 65535 {values}")
    (tmp_path / "wide.ppm").write_bytes(b"P6 8 8 65535\n" + color.astype(">u2").tobytes())
    with open(tmp_path / "color.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0))
        rows = np.pad(color.astype(">u2").view(np.uint8).reshape(8, 48), ((0, 0), (1, 0)))
        PngImagePlugin.putchunk(file, b"IDAT", zlib.compress(rows.tobytes()))
        PngImagePlugin.putchunk(file, b"IEND")
    drops = "color.tif color.png five.tif infrared.tif planes.tif plain.ppm wide.ppm".split()
    says = dict.fromkeys([*cut, "many.tif"], "by --dataset npz") | dict.fromkeys(
        drops, "Pillow drops channels or bits; save transparency as .png"
    )
    says["deep.tif"] = "more than 8 bits"
    says["stack.tif"] = "several frames; save each as a file); fix or delete it, or give all"
    words = dict(dataset="folder", data_dir=tmp_path, batch_size=2)
    lines = run_cli(simclr, status=2, lines=len(says), **words).err.splitlines()
    for line, (name, fault) in zip(lines, sorted(says.items())):
        assert line.startswith(f"error: {str(tmp_path / name)!r} cannot be read") and fault in line
    assert {path.suffix for path in Path("cache").iterdir()} <= {".lock"}


# ---------------------------------------------------------------- more than 8 bits


def twelve_bits(n=1, side=16, seed=0):
    """Images of 12-bit values, which use all 4,096, in 16 bits."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4096, (n, side, side)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["tif", "png", "float.tif", "npz"])
def test_12_bits_use_the_whole_range(tmp_path, kind):
    """12-bit data in 16-bit or float files, and in .npz, become most of the 256 levels."""
    arrays = twelve_bits(8)
    if kind == "npz":
        images = load_npz(tmp_path, train_images=arrays)
    else:
        for i, array in enumerate(arrays.astype(np.float32) if "float" in kind else arrays):
            write(tmp_path / f"train/{i}.{kind.split('.')[-1]}", array)
        images = load(tmp_path)
    low, high = np.percentile(arrays, (0.1, 99.9))
    # On a frame of zeros, any sample of whole columns would be black.
    framed = np.pad(twelve_bits(1100, 24), [(0, 0), (4, 4), (4, 4)])
    assert load_npz(tmp_path, train_images=framed).window[1] > 4000
    assert images.window == pytest.approx((low, high), abs=2) and images.gray
    assert len(images.train.unique()) >= 200
    expected = ((arrays - low) / (high - low) * 255).clip(0, 255)
    assert np.abs(images.train[:, 0].numpy() - expected).max() <= 1


def test_window_of_images_that_are_almost_black(tmp_path):
    """Both percentiles are 0; the spots stay visible."""
    images = np.zeros((9, 64, 64), np.uint16)
    images[:, 5, 7] = 3000
    found = load_npz(tmp_path, train_images=images).train[:, 0]
    np.testing.assert_array_equal(found, 255 * (images > 0))


def test_window_flag(run_cli, tmp_path):
    """--window fixes the values of black and white, in args.json, encoder.pt and the cache."""
    for i, array in enumerate(twelve_bits(8)):
        write(tmp_path / f"photos/{i}.tif", array)
    words = dict(dataset="folder", data_dir=tmp_path / "photos", epochs=0, width=16)
    run_cli(simclr, "--window", 100, 300, run_dir=tmp_path / "run", **words)
    assert json.loads((tmp_path / "run/args.json").read_text())["args"]["window"] == [100, 300]
    assert torch.load(tmp_path / "run/encoder.pt")["window"] == (100, 300)
    for window in ((0.0, 4095.0), (100.0, 300.0)):
        images = common.load_images("folder", tmp_path / "photos", window=window)
    assert len(cached()) == 2
    expected = (twelve_bits(8) - 100.0).clip(0, 200) * 255 / 200
    assert np.abs(images.train[:, 0].numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    "words, says",
    [
        ("--window 0 inf", "--window (0.0, inf) must be LOW HIGH"),
        ("--window 0 100", "--window (0.0, 100.0) must be LOW HIGH, and is for images with more"),
        ("--labels nowhere.csv", "cannot read --labels 'nowhere.csv'"),
        ("--dataset digits --labels x.csv", "--labels needs --dataset folder"),
        ("--init nowhere.pt", "nowhere.pt"),
        (f"--init {ROOT / 'README.md'}", "cannot read"),
        (
            "--dataset digits --init foreign.pt",
            "foreign.pt holds no ResNet with torchvision's keys",
        ),
    ],
)
def test_bad_values_for_own_images(refused, photos, words, says):
    """One error line names the flag, and nothing is written."""
    if "foreign" in words:
        torch.save({"stem.weight": torch.zeros(1)}, "foreign.pt")
    options = dict(dataset="folder", data_dir=photos, epochs=0)
    refused(simclr, *words.split(), says=[says], **options)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 32])
def test_npz_with_any_channels_trains(run_cli, tmp_path, channels):
    """1 to 32 channels train, resume, and write pictures and an encoder that loads again.

    With the views of BYOL, which solarizes images of three channels.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60000, (40, 8, 8, channels)).astype(np.uint16)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(40) % 2)
    words = dict(dataset="npz", data_dir=tmp_path / "x.npz", run_dir=tmp_path / "run", width=16)
    words |= dict(epochs=1, batch_size=20, hidden_dim=16, projection_dim=16, encoder="resnet10")
    for _ in range(2):
        run_cli(byol, **words, resume=True)
    run_cli(knn_eval, tmp_path / "run", "--pixels")
    for name in ("views.png", "knn/neighbors.png"):
        Image.open(tmp_path / "run" / name).load()
    # No color ops.
    assert common.load_images("npz", tmp_path / "x.npz").gray
    encoder, info = common.load_encoder(tmp_path / "run/encoder.pt")
    expected = channels if channels > 1 else 3
    assert encoder.conv1.in_channels == expected == len(info["mean"])


def test_note_on_images_far_from_square(tmp_path, capsys):
    """A folder whose center squares keep less than half of the pixels is answered with --fit."""
    write(tmp_path / "0.png", noise(20, 60))
    crop = load(tmp_path).train
    np.savez("wide.npz", train_images=noise(20, 60)[None])
    common.load_images("npz", "wide.npz")
    assert capsys.readouterr().out.count("center squares keep less than half of the pixels") == 2
    assert not torch.equal(crop, common.load_images("folder", tmp_path, fit="stretch").train)
    images = common.load_images("folder", tmp_path, fit="pad")
    assert images.train.shape == (1, 3, 60, 60) and not images.train[:, :, :20].any()
    write(tmp_path / "ct/0.tif", np.full((20, 60), 100, np.float32))
    # Black is the low end of the window.
    padded = common.read_image(tmp_path / "ct/0.tif", 60, (-1000.0, 1000.0), "pad")
    assert (padded[:, 20:40] == 140).all() and not padded[:, :18].any()
    assert "keep" not in capsys.readouterr().out


# ---------------------------------------------------------------- labels from a table


@pytest.fixture
def scans(tmp_path):
    """An unlabeled folder of 12 images."""
    for i in range(12):
        write(tmp_path / "scans" / f"{i:02}.png", noise(8, 8, 3, seed=i))
    return tmp_path / "scans"


def table(folder, *lines):
    (folder / "labels.csv").write_text("\n".join(lines))
    return str(folder / "labels.csv")


@pytest.mark.parametrize(
    "text, says",
    [
        ("file,label\n00.png,a\n\n99.png,b", ["line 4: '99.png' is not an image"]),
        ("file,label\n0.png,a\n00.png,a\n1.png,b", ["line 2: '0.png'", "line 4: '1.png'"]),
        ("file,label\n00.png,a\n./00.png,b", ["line 3: '00.png' is listed twice"]),
        ("name,label\n00.png,a", ["columns file and label in line 1, not ['name', 'label']"]),
        ("file,label,split\n00.png,a,dev\n01.png,b", ["split is 'dev'"]),
        ("file,label\n00.png,a,test\n01.png,b", ["line 2: more values than columns"]),
    ],
)
def test_mistakes_in_a_table(refused, scans, tmp_path, text, says):
    """Each is one error line that names the line of the table."""
    words = dict(dataset="folder", data_dir=scans, labels=table(tmp_path, text), epochs=0)
    refused(simclr, **words, says=says, lines=len(says))


def test_labels_split_and_groups_from_a_table(run_cli, scans, tmp_path):
    """file, label, split, group: unlisted files stay unlabeled; groups reach embeddings.npz."""
    lines = [f"{i:02}.png,{'ab'[i % 2]},{'test' if i > 7 else ''},g{i // 2}" for i in range(10)]
    labels = table(tmp_path, "file,label,split,group", *lines)
    words = dict(dataset="folder", data_dir=scans, labels=labels, epochs=0, width=16)
    words["cache_dir"] = "elsewhere"
    # The pictures of a run among the images are no images; other files hide nothing.
    run = scans / "runs/a"
    (scans / "kwargs.json").touch()
    result = run_cli(simclr, **words, run_dir=run)
    assert "2 of the others unlabeled" in result.out
    arrays = np.load(run / "embeddings.npz")
    expected = [f"g{i // 2}" for i in range(8)] + ["10.png", "11.png"]
    assert arrays["train_groups"].tolist() == expected and [*arrays["class_names"]] == ["a", "b"]
    assert arrays["train_labels"].tolist() == [0, 1] * 4 + [-1, -1]
    assert arrays["test_labels"].tolist() == [0, 1]
    # Another table has pixels of its own.
    words["labels"] = shutil.copy(labels, tmp_path / "other.csv")
    run_cli(simclr, **words, run_dir=tmp_path / "other")
    run_cli(knn_eval, run, tmp_path / "other", "--pixels", "--ks", 1)
    assert len(json.loads(Path("runs/knn/knn.json").read_text())["results"]) == 4
    assert arrays["test_groups"].tolist() == ["g4", "g4"] and "warning" not in result.out
    run_cli(knn_eval, run)
    assert (run / "knn/neighbors.png").exists() and not Path("cache").exists()
    # The table may move before the run is resumed.
    words["labels"] = shutil.move(labels, tmp_path / "moved.csv")
    run_cli(simclr, **words, run_dir=run, resume=True)
    (scans / "11.png").rename(scans / "99.png")
    run_cli(knn_eval, run, says=["no pictures: "])
    assert not (run / "knn/neighbors.png").exists()


def test_unlabeled_rows_of_a_table(scans, tmp_path):
    """An empty label is unlabeled, and keeps its split and group; spaces do not count.

    As Excel and Macs write tables: semicolons, empty rows, decomposed accents.
    """
    (scans / "00.png").rename(scans / "\u00e9.png")
    lines = ["e\u0301.png,a ,,x", "01.png, b,,y,", ",,,", "02.png, ,test,z"]
    for separator in ",;\t":
        text = "\n".join(["File,label ,split,group", *lines]).replace(",", separator)
        images = common.load_images("folder", scans, labels=table(tmp_path, text))
        assert images.class_names == ["a", "b"] and images.test_labels.tolist() == [-1]
        assert images.extra["test_groups"].tolist() == ["z"]
        assert images.train_labels.tolist()[-1] == 0


def test_listed_images_may_be_anywhere(tmp_path):
    """Beside train/ too; without a split they are training images."""
    for i, name in enumerate(("train/0", "train/1", "more/2", "more/3")):
        write(tmp_path / "photos" / f"{name}.png", noise(8, 8, seed=i))
    labels = table(tmp_path, "file,label", "train/0.png,a", "more/2.png,b")
    images = common.load_images("folder", tmp_path / "photos", labels=labels)
    assert images.extra["train_files"].tolist() == ["more/2.png", "train/0.png", "train/1.png"]
    assert images.train_labels.tolist() == [1, 0, -1]


# ---------------------------------------------------------------- starting from weights


def test_encode_files_equals_embeddings(run_cli, photos, tmp_path):
    """encoder.pt and the image files, only read, give the features of embeddings.npz."""
    before = sorted(photos.rglob("*"))
    for i, array in enumerate(twelve_bits(6, side=30)):
        write(tmp_path / f"deep/{i}.tif", array)
    for root, size in ((photos, 16), (tmp_path / "deep", None)):
        words = dict(dataset="folder", data_dir=root, run_dir=tmp_path / f"{size}", width=16)
        words |= dict(epochs=1, batch_size=4, image_size=size, encoder="resnet10")
        assert not run_cli(simclr, **words).warnings
        arrays = np.load(tmp_path / f"{size}/embeddings.npz")
        files = [root / name for name in arrays["train_files"]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder = common.build_encoder("resnet10", 16, 16)[0] if size else None
            found = common.encode_files(tmp_path / f"{size}/encoder.pt", files, encoder=encoder)
        np.testing.assert_allclose(found, arrays["train_features"], rtol=1e-3, atol=1e-4)
        assert encoder is None or not encoder.training
    assert sorted(photos.rglob("*")) == before


def test_init_from_an_encoder(run_cli, finished, tiny, tmp_path):
    """--init encoder.pt --epochs 0 embeds by that encoder; unset flags take its architecture."""
    weights = finished("simclr") / "encoder.pt"
    words = tiny(run_dir=tmp_path / "run", init=weights, epochs=0, width=None)
    run_cli(simclr, **words, says=["loaded 120 tensors; not loaded [], not"])
    a, b = (np.load(run / "embeddings.npz") for run in (finished("simclr"), tmp_path / "run"))
    np.testing.assert_array_equal(a["test_features"], b["test_features"])
    # Of other images, with the size, mean and std of those that the encoder was trained on.
    for i in range(4):
        write(tmp_path / "other" / f"{i}.png", noise(20, 20, 3, seed=i))
    torch.save(torch.load(weights) | dict(fit="pad"), weights := tmp_path / "pad.pt")
    words["init"] = weights
    other = dict(dataset="folder", data_dir=tmp_path / "other", run_dir=tmp_path / "elsewhere")
    run_cli(simclr, **words | other)
    old, new = (torch.load(path) for path in (weights, tmp_path / "elsewhere/encoder.pt"))
    assert all((old[key] == new[key]).all() for key in ("mean", "std"))
    assert all(old[key] == new[key] for key in ("image_size", "fit"))
    # As before PyTorch 1.6.
    state, old = torch.load(weights)["state_dict"], dict(_use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "state.pt", **old)
    words |= dict(run_dir=tmp_path / "state", init=tmp_path / "state.pt", width=16)
    run_cli(simclr, **words, encoder="resnet18")
    # A state dict does not name them: ImageNet's.
    mean = torch.load(tmp_path / "state/encoder.pt")["mean"].flatten()
    torch.testing.assert_close(mean, torch.tensor([0.485, 0.456, 0.406]))
    # Resumed without --init, mean and std would be others.
    words["status"] = 2
    run_cli(simclr, **words | dict(init=None, resume=True, says=["init was"]))
    words |= dict(run_dir=tmp_path / "wide", width=32)
    run_cli(simclr, **words, says=["does not fit --encoder resnet18 and --width"])


def test_init_adapts_the_first_convolution(capsys):
    """Other channels are averaged; a 7x7 stem is left out of a 3x3 one, and that is printed."""
    source, _ = common.build_encoder("resnet18", 96, 16)
    torch.save(source.state_dict(), "seven.pt")
    encoder, _ = common.build_encoder("resnet18", 96, 16, channels=5)
    common.load_weights(encoder, "seven.pt")
    # The same response to images that are equal in all channels.
    x = torch.rand(2, 1, 96, 96)
    a, b = source.eval()(x.expand(-1, 3, -1, -1)), encoder.eval()(x.expand(-1, 5, -1, -1))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    small, _ = common.build_encoder("resnet18", 32, 16)
    before = small.conv1.weight.clone()
    capsys.readouterr()
    common.load_weights(small, "seven.pt")
    assert torch.equal(small.conv1.weight, before)
    says = "loaded 119 tensors; not loaded ['conv1.weight'], not used ['conv1.weight']\n"
    assert says in capsys.readouterr().out
    assert torch.equal(small.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    common.load_weights(common.build_encoder("resnet10", 96, 16)[0], "seven.pt")
    assert "72 tensors; not loaded [], not used ['layer1.1.conv1.w" in capsys.readouterr().out


def test_init_imagenet(monkeypatch):
    """torchvision's weights by get_model, without their classifier."""
    weights = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: MODELS[name])
    MODELS = dict(resnet18=weights)
    encoder, _ = common.build_encoder("resnet18", 96)
    common.load_weights(encoder, "imagenet")
    weights.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(encoder.eval()(x), weights.eval()(x))
    encoder, _ = common.build_encoder("resnet10", 96)
    with pytest.raises(common.UserError, match="weights of resnet10"):
        common.load_weights(encoder, "imagenet")


# ---------------------------------------------------------------- decoded images


def cached():
    return list(Path("cache").glob("*.bin"))


@pytest.mark.parametrize(
    "change",
    [
        os.unlink,
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.rename(path.with_name("z.png")),
        lambda path: shutil.copy(path, path.with_name("new.png")),
    ],
)
def test_changed_folder_is_decoded_again(photos, tmp_path, change):
    """Any change of the files gives a decoded file of another name."""
    root = shutil.copytree(photos, tmp_path / "photos")
    load(root)
    change(root / "train" / "class 0" / "0.png")
    images, fresh = load(root), load(root, cache="fresh")
    assert len(cached()) == 2 and (images.extra["train_files"] == fresh.extra["train_files"]).all()
    assert torch.equal(images.train, fresh.train)


def test_folders_of_the_same_name_and_times(tmp_path):
    """As of two archives with the time set to 0: each has its own decoded file."""
    for name, value in dict(a=10, b=200).items():
        write(tmp_path / name / "photos/0.bmp", np.full((8, 8), value, np.uint8))
        os.utime(tmp_path / name / "photos/0.bmp", ns=(0, 0))
        assert load(tmp_path / name / "photos").train.unique() == value


def test_killed_while_decoding(photos, monkeypatch):
    """A killed decoding leaves nothing under the final name, and the next start decodes."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "prefetch", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        process = FORK.Process(target=load, args=[photos])
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not cached()
    assert torch.equal(load(photos).train, load(photos, cache="fresh").train)


def test_two_runs_starting_together_decode_once(photos, monkeypatch):
    """The second run waits for the decoded file of the first."""
    prefetch = common.prefetch

    def slowly(*args):
        Path(f"decoded by {os.getpid()}").touch()
        time.sleep(0.5)
        return prefetch(*args)

    monkeypatch.setattr(common, "prefetch", slowly)
    processes = [FORK.Process(target=load, args=[photos]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len([*Path().glob("decoded by *")]) == 1


def test_cache_dir_without_room(photos, monkeypatch):
    """A full disk, or a file in the place of the folder, is a UserError that names --cache-dir."""

    def full(number):
        raise OSError("No space left on device")

    Path("file").touch()
    with pytest.raises(common.UserError, match="cannot use .* with --cache-dir"):
        load(photos, cache="file")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(common.UserError, match="cache/photos.*No space left on device"):
        load(photos)
    assert not cached()


# ---------------------------------------------------------------- .npz files


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (9, 9, 3), (4, 9, 3), (20, 30), (250, 300)])
def test_npz_forms(tmp_path, shape):
    """Gray or color, of any size, becomes RGB center squares, of which views have at most 224."""
    train, side = noise(7, *shape), min(shape[:2])
    images = load_npz(tmp_path, train_images=train)
    assert images.size == min(224, side) and images.train.shape == (7, 3, side, side)
    assert images.gray == (shape[2:] != (3,))
    left = (shape[1] - side) // 2
    expected = train.reshape(7, *shape[:2], -1)[:, :, left : left + side]
    assert (images.train.permute(0, 2, 3, 1).numpy() == expected).all()


def test_npz_without_labels_or_test(tmp_path, capsys):
    """Missing and negative labels are -1; test images may be missing or have another size.

    A group in training and test is a warning with the number.
    """
    images = load_npz(tmp_path, train_images=noise(6, 8, 8))
    assert images.train_labels.tolist() == [-1] * 6 and images.class_names == []
    assert images.test.shape == (0, 3, 8, 8)
    test = dict(test_images=noise(2, 16, 12), test_labels=[1, -5], test_groups=[3, 7])
    test["train_groups"] = [3, 3, 2, 2, 1, 1]
    images = load_npz(tmp_path, train_images=noise(6, 8, 8), **test)
    assert images.test.shape == (2, 3, 8, 8) and images.test_labels.tolist() == [1, -1]
    assert "warning: 1 groups are in training and test" in capsys.readouterr().out


# A changed array, and words of the error line.
MALFORMED = {
    "text": ("train_images", np.full((9, 8, 8), "a"), "<U1"),
    "other type": ("test_images", np.zeros((9, 8, 8), np.uint16), "test_images must be"),
    "other channels": ("test_images", noise(9, 8, 8, 2), "test_images must be"),
    "33 channels": ("train_images", noise(9, 8, 8, 33), "C to 32"),
    "channels first": ("train_images", noise(9, 3, 8, 8), "H and W from 4"),
    "no image": ("train_images", noise(0, 8, 8), "N from 1"),
    "scalar": ("train_images", np.array(1), "cannot use"),
    "nan": ("train_images", np.full((9, 8, 8), np.nan, np.float32), "not finite"),
    "too few labels": ("train_labels", np.arange(8), "numbers of samples: [9, 8, 8]"),
    "float labels": ("train_labels", np.zeros(9), "float64"),
    "one-hot labels": ("train_labels", np.eye(9, dtype=int), "numbers of samples: [9, 81, 81]"),
    "too few groups": ("train_groups", np.arange(8), "numbers of samples: [9, 9, 8]"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_npz_is_one_error_line(refused, tmp_path, name):
    """The line names the file, the array and its fault."""
    key, value, says = MALFORMED[name]
    arrays = dict(train_images=noise(9, 8, 8), train_labels=np.arange(9))
    np.savez(tmp_path / "bad.npz", **arrays | {key: value})
    words = dict(dataset="npz", data_dir=tmp_path / "bad.npz", batch_size=4, epochs=1)
    refused(simclr, **words, says=["bad.npz", says])


# ---------------------------------------------------------------- batches


def test_prefetch_keeps_order_and_reads_ahead():
    """Results come in order, at most 2 * threads + 1 items ahead; errors reach the caller."""
    started = []

    def compute(i):
        started.append(i)
        # Later items are ready earlier.
        time.sleep(0.002 * (5 - i % 5))
        return range(20)[i]

    results = common.prefetch(compute, range(21), threads=2)
    assert next(results) == 0
    # In which all the others would be computed.
    time.sleep(0.2)
    assert 0 < max(started) <= 4
    assert [next(results) for _ in range(19)] == [*range(1, 20)]
    with pytest.raises(IndexError):
        next(results)


def test_take_reads_other_devices_in_threads():
    """Images that are not on the device are read by threads, in order."""
    images, readers = torch.arange(40).view(20, 2), set()
    indices = [torch.tensor([i, 19 - i]) for i in range(20)]

    class Elsewhere:
        device = torch.device("meta")

        def __getitem__(self, index):
            readers.add(threading.current_thread())
            return images[index]

    taken = torch.cat([*common.take(Elsewhere(), indices, CPU)])
    assert torch.equal(taken, images[torch.cat(indices)])
    assert readers and threading.main_thread() not in readers


def test_epoch_order_is_a_new_permutation_each_epoch():
    """It depends on seed and epoch alone; the last partial batch is dropped."""
    keys = (1, 2), (1, 2), (2, 2), (1, 3)
    order, again, *others = (common.epoch_order(50, 16, *key) for key in keys)
    assert order.shape == (3, 16) and len(order.unique()) == 48 and order.max() < 50
    assert torch.equal(order, again) and not any(torch.equal(order, other) for other in others)


@pytest.mark.parametrize("first_step", [0, 3, 4, 9])
def test_batches_from_first_step(first_step):
    """Every image once per epoch; a run resumed at first_step gets the rows of its steps."""
    images, args = torch.arange(50), simclr.Args(batch_size=16, epochs=3, seed=5)
    orders = torch.cat([common.epoch_order(50, 16, 5, epoch) for epoch in range(3)])
    found = list(common.batches(images, args, first_step, CPU))
    assert [batch.tolist() for batch in found] == orders[first_step:].tolist()


@pytest.mark.parametrize("free, moved", [(4.1, 2), (3.9, 0)])
def test_images_that_fit_are_moved_to_the_gpu(monkeypatch, free, moved):
    """Both parts are moved if they take less than a quarter of the GPU's free memory."""
    sizes, size = [], 1797 * 3 * 8 * 8
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, 2**40))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: sizes.append(x.numel()) or x)
    common.load_images("digits", device="cuda")
    assert sum(n > 3 for n in sizes) == moved


# ---------------------------------------------------------------- encoder and monitors


@pytest.mark.parametrize("size", [64, 65])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_build_encoder_equals_torchvision(name, size):
    """Width 64 loads into torchvision's network, up to 64 px with a 3x3 stem: same features."""
    torch.manual_seed(0)
    encoder, feature_dim = common.build_encoder(name, size)
    expected = getattr(torchvision.models, name)()
    assert feature_dim == expected.fc.in_features
    if size <= 64:
        expected.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        expected.maxpool = torch.nn.Identity()
    expected.fc = torch.nn.Identity()
    expected.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 20, 20)
    torch.testing.assert_close(encoder.eval()(images), expected.eval()(images))


@pytest.mark.parametrize("part", ["test", "train", "groups"])
@pytest.mark.parametrize("k", [5, 10_000])
def test_knn_monitor_equals_knn_sweep(k, part):
    """Of the test images, by leave-one-out without labeled ones; test_knn.py has scikit-learn.

    k is at most the size of the largest class.
    """
    images, encoder, groups = common.load_images("digits"), torch.nn.Flatten(), None
    # Unlabeled images do not vote, but count in the effective rank.
    images.train_labels[::9] = -1
    known = images.train_labels.numpy() >= 0
    features = common.embed(encoder, images, "train")
    x, y = features[known], images.train_labels.numpy()[known]
    queries, truth = common.embed(encoder, images, "test"), images.test_labels.numpy().copy()
    if part != "test":
        images.test_labels.fill_(-1)
        queries, truth = None, y
    if part == "groups":
        images.extra["train_groups"] = np.arange(1437) % 3
        groups = images.extra["train_groups"][known]
    found = common.knn_monitor(encoder, images, k)
    k = min(k, np.bincount(y).max())
    accuracy = (knn_eval.knn_sweep(x, y, queries, [k], groups=groups)[k] == truth).mean()
    assert found == dict(effective_rank=knn_eval.effective_rank(features), knn_acc=accuracy)
    # The images of one group have no others.
    images.test_labels.fill_(-1)
    images.extra["train_groups"] = np.zeros(1437)
    assert "knn_acc" not in common.knn_monitor(encoder, images, k)


def test_knn_monitor_without_labels():
    """Unlabeled training images give the effective rank only."""
    images = common.load_images("digits")
    images.train = images.train.repeat(3, 1, 1, 1)
    images.train_labels = images.train_labels.repeat(3).fill_(-1)
    found = common.knn_monitor(torch.nn.Flatten(), images, 5)
    expected = knn_eval.effective_rank(common.embed(torch.nn.Flatten(), images, "train"))
    assert found == dict(effective_rank=pytest.approx(expected))


def test_embed_gives_finite_float32():
    """Of an encoder in bf16 too; features that are not finite are a UserError."""

    class Scaled(torch.nn.Module):
        factor = 1.0

        def forward(self, x):
            return (self.factor * x.flatten(1)).bfloat16()

    images, encoder = common.load_images("digits"), Scaled()
    assert common.embed(encoder, images, "test").dtype == np.float32
    encoder.factor = 1e39
    with pytest.raises(common.UserError, match="features are not finite"):
        common.embed(encoder, images, "test")


def test_spread_of_embeddings():
    """1 for isotropic embeddings, 0 for collapsed ones of any length."""
    z = torch.randn(4000, 64)
    assert abs(common.spread(z) - 1) < 0.02
    assert common.spread(torch.ones(100, 64) * torch.rand(100, 1)) < 1e-3
