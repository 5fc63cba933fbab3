"""Images in: every source, size and mode against an independent reading. Features out: encoder, embed, kNN, spread."""

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import flags
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms import v2

import common
import simclr


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width, seed=0):
    """An image without sharp edges: resizing it in two ways gives nearly the same."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [127 + 120 * np.sin(2 * np.pi * (f * x + g * y) + seed) for f, g in ((1, 0.5), (0.3, 1), (1, -1))]
    return np.stack(waves, -1).round().astype(np.uint8)


def as_hwc(image):
    return image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------ digits


def test_digits():
    images, again = common.load_images("digits"), common.load_images("digits")
    assert images.train.shape == (1437, 3, 8, 8) and images.test.shape == (360, 3, 8, 8)
    assert images.train.dtype == images.test.dtype == torch.uint8
    assert images.train.max() == 255 and images.train.min() == 0
    assert torch.equal(images.train, again.train) and torch.equal(images.test_labels, again.test_labels)
    assert images.grey and images.class_names == [str(i) for i in range(10)]
    assert images.train_labels.dtype == torch.int64
    shares = [torch.bincount(labels) / len(labels) for labels in (images.train_labels, images.test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.003  # stratified
    # Every one of scikit-learn's images is in one of the parts, once, with its own label.
    theirs = load_digits()
    rows = {
        (tuple((image * 255 / 16).round().astype(int).ravel()), int(label))
        for image, label in zip(theirs.images, theirs.target)
    }
    both, labels = torch.cat([images.train, images.test]), torch.cat([images.train_labels, images.test_labels])
    mine = {(tuple(image[0].flatten().tolist()), int(label)) for image, label in zip(both, labels)}
    assert len(both) == 1797 and mine == rows


def test_mean_and_std_against_numpy(tmp_path):
    train = noise(50, 9, 9, 3) // np.array([1, 2, 3], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=train)
    images = common.load_images("npz", tmp_path / "a.npz")
    scaled = train.astype(np.float64) / 255
    np.testing.assert_allclose(images.mean, scaled.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(images.std, scaled.std((0, 1, 2)), rtol=1e-9)
    clean = common.normalise(images.train, images.mean, images.std)
    assert clean.dtype == torch.float32 and clean.mean().abs() < 1e-5 and (clean.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_resize_against_torchvision(tmp_path):
    """Other sizes come by torchvision's antialiased resize of the shorter side, then the centre square."""
    train = np.stack([smooth(40, 30, seed) for seed in range(5)])
    np.savez(tmp_path / "a.npz", train_images=train)
    for size in (12, 30, 47):
        images = common.load_images("npz", tmp_path / "a.npz", image_size=size)
        theirs = v2.Resize(size, antialias=True)(torch.from_numpy(train).permute(0, 3, 1, 2))
        top = (theirs.shape[2] - size) // 2
        theirs = theirs[:, :, top : top + size]
        assert images.train.shape == (5, 3, size, size)
        assert (images.train.int() - theirs.int()).abs().max() <= 1, size
    assert common.load_images("npz", tmp_path / "a.npz").train.shape[2:] == (30, 30)


# ------------------------------------------------------------------------------------------ torchvision's data sets


@pytest.fixture
def offline(monkeypatch):
    """Every download fails at once, as without a network."""

    def fail(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_failed_download(run_cli, offline, name, tmp_path):
    result = run_cli(simclr, "--dataset", name, "--data-dir", tmp_path / "data", "--run-dir", tmp_path / "run")
    assert result.status == 2 and len(result.err.splitlines()) == 1, result
    assert result.err.startswith(f"error: could not get {name}") and "--dataset folder" in result.err
    assert str(tmp_path / "data") in result.err and not (tmp_path / "run").exists()


def test_cifar_and_stl_keep_their_size(monkeypatch, tmp_path):
    """The arrays as torchvision gives them (CIFAR: [N, 32, 32, 3], STL-10: [N, 3, 96, 96]) come out right side up."""
    cifar, stl = noise(6, 32, 32, 3), noise(6, 3, 96, 96)

    class Cifar:
        data, targets, classes = cifar, [0, 1, 2, 0, 1, 2], ["a", "b", "c"]

        def __init__(self, root, train, download):
            pass

    class Stl:
        data, labels, classes = stl, np.array([0, 1, -1, -1, 1, 0]), ["a", "b"]

        def __init__(self, root, split, download):
            assert split in ("train+unlabeled", "test")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(torchvision.datasets, "STL10", Stl)
    images = common.load_images("cifar10", tmp_path)
    assert images.train.shape == (6, 3, 32, 32) and not images.grey and images.class_names == ["a", "b", "c"]
    assert np.array_equal(as_hwc(images.train[4]), cifar[4]) and images.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    images = common.load_images("stl10", tmp_path)
    assert np.array_equal(images.train.numpy(), stl) and images.train_labels.tolist() == [0, 1, -1, -1, 1, 0]


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


IDX = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]


def test_fashion_mnist_from_idx_files(monkeypatch, tmp_path, offline):
    """The IDX files, placed where the error message says, are read without a download."""
    import hashlib

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    real = os.environ.get("SSL_TEST_FASHION_MNIST")
    if real:
        for name in IDX:
            (raw / name[:-3]).write_bytes(gzip.decompress((Path(real) / name).read_bytes()))
    else:
        train, test = noise(40, 28, 28), noise(20, 28, 28, seed=1)
        arrays = [train, np.arange(40, dtype=np.uint8) % 10, test, np.arange(20, dtype=np.uint8) % 10]
        for name, array in zip(IDX, arrays):
            write_idx(raw / name, array)
    if not real:
        resources = [(name, hashlib.md5((raw / name).read_bytes()).hexdigest()) for name in IDX]
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)

        def unpack(url, download_root, filename, md5):  # all that is left of a download: the file is there, unpack it
            assert hashlib.md5((Path(download_root) / filename).read_bytes()).hexdigest() == md5
            (Path(download_root) / filename[:-3]).write_bytes(
                gzip.decompress((Path(download_root) / filename).read_bytes())
            )

        monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unpack)
    else:
        monkeypatch.undo()
    images = common.load_images("fashion_mnist", tmp_path)
    assert images.grey and images.train.shape[1:] == (3, 28, 28) and images.class_names[9] == "Ankle boot"
    if real:
        assert len(images.train) == 60000 and len(images.test) == 10000
        assert torch.bincount(images.train_labels).tolist() == [6000] * 10
    else:
        assert np.array_equal(images.train[:, 1].numpy(), train) and np.array_equal(images.test[:, 2].numpy(), test)
        assert images.train_labels.tolist() == [i % 10 for i in range(40)]


def test_cifar10_jpeg_folder(run_cli, tmp_path):
    """A part of the real CIFAR-10 as JPEG files, through the command line."""
    real = os.environ.get("SSL_TEST_CIFAR10")
    if not real:
        pytest.skip("SSL_TEST_CIFAR10 does not name the folder with train/ and test/")
    for part in ("train", "test"):
        for folder in sorted((Path(real) / part).iterdir())[:4]:
            (tmp_path / "data" / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:16]:
                (tmp_path / "data" / part / folder.name / file.name).symlink_to(file)
    images = common.load_images("folder", tmp_path / "data")
    assert images.train.shape == images.test.shape == (64, 3, 32, 32) and not images.grey
    for i in (0, 40):
        with Image.open(tmp_path / "data" / images.train_files[i]) as image:
            assert np.array_equal(as_hwc(images.train[i]), np.asarray(image.convert("RGB")))
    words = dict(
        dataset="folder", data_dir=tmp_path / "data", run_dir=tmp_path / "run", epochs=1, batch_size=32, width=16
    )
    result = run_cli(simclr, *flags(**words))
    assert result.status == 0 and "kNN accuracy" in result.out, result


# ------------------------------------------------------------------------------------------ folders of images


def test_folder_with_classes(tmp_path, capsys):
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "Hund \u72ac", ".ipynb_checkpoints"):
            (tmp_path / part / name / "deeper").mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise(8, 8, 3, seed=i)).save(tmp_path / part / name / "deeper" / f"{i}.PNG")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"what macOS leaves")
    images = common.load_images("folder", tmp_path)
    assert images.class_names == ["Hund \u72ac", "cat"]
    assert images.train_labels.tolist() == [0] * 4 + [1] * 4 and images.test_labels.tolist() == [0] * 2 + [1] * 2
    assert (
        images.train_files[0] == os.path.join("train", "Hund \u72ac", "deeper", "0.PNG") and len(images.test_files) == 4
    )
    assert np.array_equal(as_hwc(images.train[1]), noise(8, 8, 3, seed=1))
    assert "ignored 1 file" in capsys.readouterr().out


def test_folder_without_test_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / "train" / name / "0.png")
    images = common.load_images("folder", tmp_path)
    assert (
        images.test.shape == (0, 3, 8, 8)
        and images.test_labels.tolist() == []
        and images.train_labels.tolist() == [0, 1]
    )


def test_folder_with_unlabelled_test_images(tmp_path):
    for name in ("train/a", "train/b", "test"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name / "0.png")
    assert common.load_images("folder", tmp_path).test_labels.tolist() == [-1]


def test_folder_with_an_unknown_test_class(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name / "0.png")
    with pytest.raises(common.UserError, match=r"lacks: \['c'\]"):
        common.load_images("folder", tmp_path)


def test_flat_folder_and_strange_names(tmp_path):
    names = ["a b.png", "new\nline.png", "\u732b.png", "quote's \".png", "-flag.png", "sub/c.png"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(noise(8, 8, 3, seed=i)).save(tmp_path / name)
    images = common.load_images("folder", tmp_path)
    assert (
        (images.train_labels == -1).all() and images.class_names == [] and sorted(images.train_files) == sorted(names)
    )
    for name, image in zip(images.train_files, images.train):
        assert np.array_equal(as_hwc(image), noise(8, 8, 3, seed=names.index(name)))


def test_labels_are_not_dropped_silently(tmp_path, capsys):
    """One image beside the classes' folders makes the tree unlabelled: that is said, and where."""
    for name in ("train/a", "train/b", "train"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name / "stray.png")
    assert (common.load_images("folder", tmp_path).train_labels == -1).all()
    assert "no labels" in capsys.readouterr().out


def test_links(tmp_path):
    """Links to classes are read, a folder that holds itself is read once, a link to nothing is named."""
    (tmp_path / "store").mkdir()
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "store" / "0.png")
    (tmp_path / "data" / "train" / "b").mkdir(parents=True)
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "data" / "train" / "b" / "0.png")
    (tmp_path / "data" / "train" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "train" / "b" / "loop").symlink_to(tmp_path / "data" / "train")
    images = common.load_images("folder", tmp_path / "data")
    assert images.class_names == ["a", "b"] and images.train_labels.tolist() == [0, 1]
    (tmp_path / "store" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(common.UserError, match="gone.png"):
        common.load_images("folder", tmp_path / "data")


def write_modes(folder):
    """name -> expected RGB array at its own size, by an independent reading; the files are written to folder."""
    colour, grey = smooth(32, 48), smooth(32, 48)[..., 0]
    deep = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    expected = {}

    def put(name, image, pixels, **options):
        image.save(folder / name, **options)
        expected[name] = pixels

    put("rgb.png", Image.fromarray(colour), colour)
    put("grey.png", Image.fromarray(grey), np.stack([grey] * 3, -1))
    put("one.png", Image.fromarray(grey > 127), np.stack([(grey > 127) * np.uint8(255)] * 3, -1))
    put("la.png", Image.fromarray(np.stack([grey, grey], -1)), np.stack([grey] * 3, -1))
    put("rgba.png", Image.fromarray(np.concatenate([colour, grey[..., None]], -1)), colour)
    palette = Image.fromarray(colour).quantize(64)
    put("palette.png", palette, np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)])
    put("palette.gif", palette, np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)])
    put("deep.png", Image.fromarray(deep), np.stack([deep >> 8] * 3, -1))
    put("deep.tif", Image.fromarray(deep), np.stack([deep >> 8] * 3, -1))
    put("colour.jpg", Image.fromarray(colour), colour, quality=95)
    put("grey.jpeg", Image.fromarray(grey), np.stack([grey] * 3, -1), quality=95)
    ink = np.concatenate([255 - colour, np.zeros_like(colour[..., :1])], -1)
    put("cmyk.jpg", Image.fromarray(ink, mode="CMYK"), colour, quality=95)
    put("lossless.webp", Image.fromarray(colour), colour, lossless=True)
    for orientation, turned in (
        (3, np.rot90(colour, 2)),
        (6, np.rot90(colour, -1)),
        (8, np.rot90(colour, 1)),
        (2, colour[:, ::-1]),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        put(f"exif{orientation}.jpg", Image.fromarray(colour), turned, quality=95, exif=exif)
    return expected


def test_modes_and_sizes(tmp_path):
    """Each mode comes out as RGB, shorter side resized and centre square, as Pillow does it with the expected pixels."""
    expected = write_modes(tmp_path)
    for size, kept in ((32, 32), (16, 18), (8, 9)):  # an eighth larger, for the crops, where the files are as large
        images = common.load_images("folder", tmp_path, image_size=size)
        assert images.train.shape == (len(expected), 3, kept, kept) and images.size == size
        assert sorted(images.train_files) == sorted(expected)
        for name, image in zip(images.train_files, images.train):
            pixels = Image.fromarray(np.ascontiguousarray(expected[name], np.uint8))
            pixels = np.asarray(ImageOps.fit(pixels, (kept, kept), Image.Resampling.BILINEAR)).astype(int)
            worst = np.abs(as_hwc(image).astype(int) - pixels)
            assert worst.max() <= (15 if name.endswith(("jpg", "jpeg")) else 1), (name, size, worst.max())


def test_usual_size(tmp_path):
    for i, size in enumerate([(20, 30), (24, 24), (40, 22)]):
        Image.fromarray(noise(*size, 3)).save(tmp_path / f"{i}.png")
    assert common.load_images("folder", tmp_path).train.shape == (3, 3, 22, 22)
    Image.fromarray(noise(300, 400, 3)).save(tmp_path / "big.png")
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    images = common.load_images("folder", tmp_path)
    assert images.train.shape == (1, 3, 256, 256) and images.size == 224


def png(width, height, data=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_broken_images_are_all_named(refused, tmp_path):
    """Garbage, an empty file, truncated ones, headers that claim too many pixels: one line for each, and no other."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(noise(64, 64, 3, seed=i)).save(folder / f"good {i}.png")
    Image.fromarray(noise(64, 64, 3)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "cut.png").write_bytes((folder / "good 0.png").read_bytes()[:3000])
    (folder / "empty.png").touch()
    (folder / "two\nlines.gif").write_bytes(b"garbage")
    (folder / "bomb.png").write_bytes(png(100_000, 100_000, zlib.compress(bytes(1000))))
    (folder / "bomb9.png").write_bytes(png(9_500, 9_500, zlib.compress(bytes(1000))))  # Pillow alone only warns
    words = dict(dataset="folder", data_dir=folder, batch_size=2, epochs=1, width=16)
    result = refused(simclr, *flags(**words), lines=6, says=["10000000000 pixels", "90250000 pixels"])
    for name in ("cut.jpg", "cut.png", "empty.png", "two\\nlines.gif", "bomb.png", "bomb9.png"):
        assert result.err.count(name) >= 1, name
    assert "good" not in result.err


# ------------------------------------------------------------------------------------------ npz


def test_npz_grey_and_colour(tmp_path):
    for shape in [(12, 9, 9), (12, 9, 9, 1), (12, 9, 9, 3)]:
        train, test = noise(*shape), noise(5, *shape[1:], seed=1)
        np.savez_compressed(tmp_path / "a.npz", train_images=train, train_labels=np.arange(12, dtype=np.uint8)[:, None] % 3,
                            test_images=test, test_labels=np.arange(5)[:, None] % 3, val_images=test)  # fmt: skip
        images = common.load_images("npz", tmp_path / "a.npz")
        assert images.train.shape == (12, 3, 9, 9) and images.test.shape == (5, 3, 9, 9)
        assert images.train_labels.tolist() == [i % 3 for i in range(12)] and images.class_names == ["0", "1", "2"]
        assert images.grey == (shape[3:] != (3,))
        assert np.array_equal(as_hwc(images.test[2]), np.broadcast_to(test[2].reshape(9, 9, -1), (9, 9, 3)))


def test_npz_that_is_three_pixels_high(tmp_path):
    """[N, 3, W, 3] holds colours in its last axis; and what is too small for the encoders is refused."""
    assert np.array_equal(as_hwc(common._channels_first(torch.tensor(noise(6, 3, 9, 3)))[5]), noise(6, 3, 9, 3)[5])
    np.savez(tmp_path / "a.npz", train_images=noise(6, 3, 3, 3))
    with pytest.raises(common.UserError, match="3 pixels a side"):
        common.load_images("npz", tmp_path / "a.npz")
    assert common.load_images("npz", tmp_path / "a.npz", image_size=4).train.shape == (6, 3, 4, 4)


def test_npz_oblong_and_large(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=noise(4, 20, 30))
    assert common.load_images("npz", tmp_path / "a.npz").train.shape == (4, 3, 20, 20)
    np.savez(tmp_path / "a.npz", train_images=noise(2, 300, 250, 3))
    assert common.load_images("npz", tmp_path / "a.npz").train.shape == (2, 3, 224, 224)


def test_npz_without_labels_or_test(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=noise(6, 8, 8))
    images = common.load_images("npz", tmp_path / "a.npz")
    assert images.train_labels.tolist() == [-1] * 6 and images.test.shape == (0, 3, 8, 8) and images.class_names == []
    np.savez(tmp_path / "a.npz", train_images=noise(6, 8, 8), test_images=noise(2, 16, 12), test_labels=[1, 0])
    images = common.load_images("npz", tmp_path / "a.npz")
    assert images.test.shape == (2, 3, 8, 8) and images.test_labels.tolist() == [1, 0] and len(images.class_names) == 2


GOOD = dict(
    train_images=noise(9, 8, 8), train_labels=np.arange(9), test_images=noise(3, 8, 8), test_labels=np.arange(3)
)
MALFORMED = {
    "no train_images": ({"images": GOOD["train_images"]}, "lacks train_images"),
    "float images": ({**GOOD, "train_images": np.full((9, 8, 8), np.nan)}, "float64"),
    "five dimensions": ({**GOOD, "train_images": noise(9, 8, 8, 3, 1)}, "[9, 8, 8, 3, 1]"),
    "two channels": ({**GOOD, "train_images": noise(9, 8, 8, 2)}, "[9, 8, 8, 2]"),
    "no pixels": ({**GOOD, "train_images": noise(9, 0, 8)}, "no pixels"),
    "no images": ({"train_images": noise(0, 8, 8)}, "empty"),
    "a label too few": ({**GOOD, "train_labels": np.arange(8)}, "train_labels"),
    "a test label too many": ({**GOOD, "test_labels": np.arange(4)}, "test_labels"),
    "float labels": ({**GOOD, "train_labels": np.full(9, np.nan)}, "train_labels"),
    "one-hot labels": ({**GOOD, "train_labels": np.eye(9, dtype=int)}, "train_labels"),
    "words": ({**GOOD, "train_labels": np.array(list("abcdefghi"))}, "train_labels"),
    "huge labels": ({**GOOD, "train_labels": np.full(9, 2**60)}, "train_labels"),
    "negative labels": ({**GOOD, "train_labels": np.arange(9) - 5}, "train_labels"),
    "objects": ({**GOOD, "train_labels": np.array([None] * 9, dtype=object)}, "no readable .npz"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_npz_malformed(refused, tmp_path, case):
    arrays, says = MALFORMED[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(simclr, *flags(dataset="npz", data_dir=tmp_path / "bad.npz", batch_size=4), says=["bad.npz", says])


def test_npz_that_is_none(refused, tmp_path):
    np.savez(tmp_path / "good.npz", **GOOD)
    whole = (tmp_path / "good.npz").read_bytes()
    np.save(tmp_path / "one.npy", GOOD["train_images"])
    # An array whose header claims 10^13 images, and one that deflates a gigabyte of zeros.
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 8, 8), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    import zipfile

    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as file:
        file.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    bad = {
        "cut.npz": whole[: len(whole) // 2],
        "empty.npz": b"",
        "text.npz": b"hello",
        "one.npz": (tmp_path / "one.npy").read_bytes(),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in [*bad, "claims.npz", "missing.npz"]:
        refused(simclr, *flags(dataset="npz", data_dir=tmp_path / name, batch_size=4), says=[name])


# ------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_keys_are_torchvisions(name):
    theirs = getattr(torchvision.models, name)().state_dict()
    for size, width in ((32, 16), (224, 64)):
        encoder, dim = common.build_encoder(name, size, width)
        assert list(encoder.state_dict()) == [k for k in theirs if not k.startswith("fc.")]
        assert encoder(torch.zeros(2, 3, min(size, 64), min(size, 64))).shape == (2, dim)


def test_weights_of_torchvision_give_its_features():
    """At 224 pixels and width 64 the encoder is torchvision's network: its weights load, its features come out."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    encoder, dim = common.build_encoder("resnet18", 224)
    encoder.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 96, 96)
    theirs.fc = torch.nn.Identity()
    assert dim == 512
    torch.testing.assert_close(encoder.eval()(x), theirs(x))


def test_small_images_keep_their_pixels():
    """Up to 64 pixels the stem neither strides nor pools: the first stage sees every pixel."""
    seen = []
    for size in (8, 64, 65):
        encoder, _ = common.build_encoder("resnet18", size, 16)
        encoder.layer1.register_forward_hook(lambda module, args, out: seen.append(out.shape[2]))
        encoder.eval()(torch.zeros(1, 3, size, size))
    assert seen == [8, 64, 17]


def test_embed():
    """Eval mode, the mode put back, no gradient, no statistics moved, whatever the size of the parts."""
    torch.manual_seed(0)
    images = common.load_images("digits")
    encoder, dim = common.build_encoder("resnet18", 8, 16)
    common.embed(encoder.train(), images.test[:9], images.mean, images.std)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    whole = common.embed(encoder, images.test[:101], images.mean, images.std)
    assert encoder.training and not whole.requires_grad and whole.shape == (101, dim) and whole.dtype == torch.float32
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    parts = common.embed(encoder.eval(), images.test[:101], images.mean, images.std, batch_size=7)
    assert not encoder.training and (whole - parts).abs().max() < 1e-5
    alone = encoder(common.normalise(images.test[50:51], images.mean, images.std)).detach()
    assert (whole[50] - alone[0]).abs().max() < 1e-5
    assert common.embed(encoder, images.test[:0], images.mean, images.std).shape == (0, dim)


# ------------------------------------------------------------------------------------------ kNN monitor and spread


@pytest.fixture(scope="module")
def pixels():
    images = common.load_images("digits")
    return [t.flatten(1).float() if t.ndim == 4 else t for t in
            (images.train, images.train_labels, images.test, images.test_labels)]  # fmt: skip


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_knn_against_scikit_learn(pixels, k):
    train, train_labels, test, test_labels = pixels
    judge = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, train_labels)
    assert abs(common.knn_accuracy(*pixels, k=k) - judge.score(test, test_labels)) <= 0.001 + 1e-9


def test_knn_with_more_neighbours_than_images(pixels):
    train, train_labels, test, test_labels = pixels
    assert common.knn_accuracy(*pixels, k=10_000) == common.knn_accuracy(*pixels, k=len(train))
    commonest = int(torch.bincount(train_labels).argmax())
    assert common.knn_accuracy(*pixels, k=10_000) == pytest.approx(float((test_labels == commonest).float().mean()))


@pytest.mark.parametrize("temperature", [0.5, 0.07, 1e-4])
def test_weighted_vote_against_a_loop(pixels, temperature):
    """exp(similarity / temperature) in float64, one image after the other; small temperatures must not underflow."""
    train, train_labels, test, test_labels = (t[:n] for t, n in zip(pixels, (300, 300, 60, 60)))
    a, b = train.double().numpy(), test.double().numpy()
    right = 0
    for query, label in zip(b, test_labels.tolist()):
        similarity = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in a]
        nearest = sorted(range(len(a)), key=lambda i: -similarity[i])[:20]
        votes = {}
        for i in nearest:
            weight = np.exp((similarity[i] - similarity[nearest[0]]) / temperature)
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0.0) + weight
        right += max(votes, key=votes.get) == label
    mine = common.knn_accuracy(train, train_labels, test, test_labels, k=20, temperature=temperature)
    assert mine == pytest.approx(right / 60)


def test_low_temperature_far_from_every_neighbour():
    """All similarities near -1: the nearest neighbour alone decides, though exp(similarity / temperature) is zero."""
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    test = torch.tensor([[-1.0, 0.0]])
    assert common.knn_accuracy(train, torch.tensor([4, 7]), test, torch.tensor([7]), k=2, temperature=1e-6) == 1


def test_labels_need_not_be_0_to_c():
    train = torch.eye(3)
    assert common.knn_accuracy(
        train, torch.tensor([70, 3, 3000]), train, torch.tensor([70, 3, 8]), k=1
    ) == pytest.approx(2 / 3)


def test_spread():
    torch.manual_seed(0)
    assert abs(float(common.spread(torch.randn(4000, 64))) - 1) < 0.02
    assert float(common.spread(torch.ones(100, 64) * torch.rand(100, 1))) < 1e-3  # one direction
    line = torch.randn(4000, 1) * torch.ones(64)
    assert abs(float(common.spread(line)) - 1) < 0.02  # two opposite points are far apart, though on a line
    assert float(common.spread(torch.randn(500, 64) + 20)) < 0.1
    assert common.spread(torch.randn(8, 16).half()).dtype == torch.float32
