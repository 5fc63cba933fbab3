"""Images in, from every source; features out: the encoder, embed, the kNN monitor, spread."""

import gzip
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import flags
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torchvision.transforms import v2

import common
import knn_eval
import simclr

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height, width):
    """A color image without sharp edges: two ways of resizing it nearly agree."""
    return np.array(Image.fromarray(noise(4, 4, 3)).resize((width, height)))


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def load(root, size=None, cache="cache"):
    return common.load_images("folder", root, size, cache)


def load_npz(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return common.load_images("npz", folder / "data.npz")


def as_hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """32 training and 8 test images of 24x30 pixels in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        name = f"{'test' if i % 5 == 4 else 'train'}/class {i % 2}/{i}.png"
        write(root / name, noise(24, 30, 3, seed=i))
    return root


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


@pytest.mark.parametrize("size", [12, 30, 47])
def test_square_equals_torchvision(size):
    """The shorter side is resized with antialiasing, then the center square is cut."""
    images = torch.from_numpy(smooth(40, 30)).permute(2, 0, 1)[None]
    expected = v2.CenterCrop(size)(v2.Resize(size)(images))
    torch.testing.assert_close(common.square(images, size), expected, rtol=0, atol=1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_failed_download_is_one_error_line(run_cli, monkeypatch, name):
    """Without a network, the line says where to place the files."""

    def fail(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    result = run_cli(simclr, "--dataset", name, "--data-dir", "files")
    assert result.status == 2 and len(result.err.splitlines()) == 1, result
    assert result.err.startswith(
        f"error: could not get {name}; place its original files in 'files'"
    )


@pytest.mark.parametrize(
    "name, splits", [("CIFAR10", [1, 0]), ("STL10", ["train+unlabeled", "test"])]
)
def test_torchvision_layouts_keep_size_and_order(monkeypatch, name, splits):
    """[N, H, W, 3] of CIFAR and [N, 3, H, W] of STL-10 become [N, 3, S, S], not transposed."""
    data, labels, seen = noise(3, 3, 32, 32), [0, 1, -1], []

    def fake(root, download, **split):
        seen.append(*split.values())
        layout = data.transpose(0, 2, 3, 1) if name == "CIFAR10" else data
        return SimpleNamespace(data=layout, targets=labels, labels=labels, classes=[])

    monkeypatch.setattr(torchvision.datasets, name, fake)
    images = common.load_images(name.lower())
    np.testing.assert_array_equal(images.train, data)
    assert images.train_labels.tolist() == labels and not images.gray and seen == splits


def test_fashion_mnist_from_idx_files(tmp_path):
    """The original files of Fashion-MNIST, placed as torchvision does, are read offline."""
    source = os.environ.get("SSL_TEST_FASHION_MNIST")
    if not source:
        pytest.skip("SSL_TEST_FASHION_MNIST does not name the folder of the four .gz files")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in Path(source).glob("*-ubyte.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    images = common.load_images("fashion_mnist", tmp_path)
    assert images.gray and len(images.test) == 10000
    assert images.train_labels.bincount().tolist() == [6000] * 10


def test_cifar10_jpeg_folder(tmp_path):
    """The pixels of CIFAR-10's JPEG files are Pillow's, in classes sorted by name."""
    source = os.environ.get("SSL_TEST_CIFAR10")
    if not source:
        pytest.skip("SSL_TEST_CIFAR10 does not name the folder with train/ and test/")
    (tmp_path / "train").mkdir()
    for name in ("dog", "cat"):
        (tmp_path / "train" / name).symlink_to(Path(source) / "test" / name)
    images = load(tmp_path)
    assert images.train.shape == (2000, 3, 32, 32) and images.class_names == ["cat", "dog"]
    for i in range(0, 2000, 300):
        with Image.open(tmp_path / images.train_files[i]) as image:
            np.testing.assert_array_equal(as_hwc(images.train[i]), image)


# ---------------------------------------------------------------- folders of images

# Files, class names, labels of the training and of the test images.
LAYOUTS = {
    "train and test": ("train/b/0.png train/a/x/1.PNG test/a/2.png", "a b", [0, 1], [0]),
    "val": ("train/b/0.png train/a/1.png val/b/2.png", "a b", [0, 1], [1]),
    "no test": ("train/a/0.png train/b/1.png", "a b", [0, 1], []),
    "unlabelled test": ("train/a/0.png train/b/1.png test/2.png", "a b", [0, 1], [-1]),
    "tree": ("0.png sub/1.png sub/deeper/2.png", "", [-1, -1, -1], []),
    "loose file in train": ("train/a/0.png train/1.png test/a/2.png", "", [-1, -1], [-1]),
    "hidden": (
        "train/a/0.png train/b/1.png train/.ipynb_checkpoints/2.png train/a/._3.png",
        "a b",
        [0, 1],
        [],
    ),
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
    files = images.train_files + images.test_files
    for file, image in zip(files, torch.cat([images.train, images.test])):
        np.testing.assert_array_equal(as_hwc(image), noise(8, 8, 3, seed=names.index(file)))
    assert ("no labels" in capsys.readouterr().out) == (name == "loose file in train")


@pytest.mark.parametrize(
    "names, says",
    [
        ("train/a/0.png train/b/0.png test/c/0.png", "train/ lacks classes of test images: ['c']"),
        ("train/a/0.png", "only one class"),
        ("train/a/.0.png test/a/0.png", "no images found"),
    ],
)
def test_folder_layout_is_refused(refused, tmp_path, names, says):
    """A layout without training images or with unknown classes is one error line."""
    for name in names.split():
        write(tmp_path / name, noise(8, 8))
    refused(simclr, *flags(dataset="folder", data_dir=tmp_path), says=[says])


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
    deep = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    palette = Image.fromarray(color).quantize(64)
    ink = Image.fromarray(np.dstack([255 - color, 0 * gray]), mode="CMYK")
    exif = Image.Exif()
    # Orientation: the camera was turned to the left.
    exif[0x0112] = 6
    files = {
        "bilevel.png": (gray > 127, (gray > 127) * 255),
        "alpha.png": (np.dstack([color, gray]), color),
        "palette.gif": (palette, palette.convert("RGB")),
        "deep.png": (deep, deep >> 8),
        "cmyk.jpg": (ink, color),
        "rotated.jpg": (color, np.rot90(color, -1)),
    }
    for name, (content, _) in files.items():
        image = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        image.save(root / name, quality=95, exif=exif if name == "rotated.jpg" else b"")
    return {name: np.array(pixels, np.uint8) for name, (_, pixels) in files.items()}


@pytest.mark.parametrize("size, side", [(32, 32), (16, 18), (8, 9)])
def test_read_image_modes(tmp_path, size, side):
    """Every mode becomes RGB as Pillow resizes the expected pixels, upright, alpha dropped."""
    expected = write_modes(tmp_path)
    images = load(tmp_path, size)
    for name, image in zip(images.train_files, images.train):
        pixels = Image.fromarray(expected.pop(name)).convert("RGB")
        pixels = np.array(ImageOps.fit(pixels, (side, side), Image.Resampling.BILINEAR), int)
        assert np.abs(as_hwc(image) - pixels).max() <= (15 if "jpg" in name else 1), name
    assert not expected


@pytest.mark.parametrize(
    "sides, asked, size, side",
    [([20, 24, 22], None, 22, 22), ([300], None, 224, 256), ([90], 56, 56, 64), ([24], 56, 56, 56)],
)
def test_image_size_of_a_folder(tmp_path, sides, asked, size, side):
    """Unset: the median side, at most 224. Kept an eighth larger if the files are that large."""
    for shorter in sides:
        write(tmp_path / f"{shorter}.png", noise(shorter, 320))
    images = load(tmp_path, asked)
    assert images.size == size and images.train.shape[2:] == (side, side)


def test_broken_images_are_all_named(run_cli, tmp_path):
    """One run names every broken file on a line of its own, and keeps no decoded file."""
    sizes = {"cut.jpg": 400, "cut.png": 60, "empty.png": 0, "two\nlines.gif": 5}
    for name in [*sizes, "good.png"]:
        write(tmp_path / name, noise(64, 64))
    for name, size in sizes.items():
        os.truncate(tmp_path / name, size)
    write(tmp_path / "float.tif", np.ones((64, 64), np.float32))
    result = run_cli(simclr, *flags(dataset="folder", data_dir=tmp_path, batch_size=2))
    lines = result.err.splitlines()
    assert result.status == 2 and len(lines) == 5, result
    for line, name in zip(lines, sorted([*sizes, "float.tif"])):
        assert line.startswith(f"error: {str(tmp_path / name)!r} cannot be read"), line
    assert {path.suffix for path in Path("cache").iterdir()} <= {".lock"}


# ---------------------------------------------------------------- decoded images


def cached():
    return list(Path("cache").glob("*.npy"))


def test_second_start_decodes_nothing(photos, monkeypatch):
    """The decoded file is found again, for each image size."""
    first = [load(photos, size) for size in (16, 24)]
    monkeypatch.setattr(common, "_decode", lambda *args: pytest.fail("decoded again"))
    for images in first:
        assert torch.equal(images.train, load(photos, images.size).train)


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
    assert len(cached()) == 2 and images.train_files == fresh.train_files
    assert torch.equal(images.train, fresh.train)


def test_killed_while_decoding(photos, monkeypatch):
    """A killed decoding leaves nothing under the final name, and the next start decodes."""
    read_image = common.read_image

    def read_or_die(path, side):
        if path.name == "17.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path, side)

    with monkeypatch.context() as patch:
        patch.setattr(common, "read_image", read_or_die)
        process = FORK.Process(target=load, args=[photos])
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not cached()
    assert torch.equal(load(photos).train, load(photos, cache="fresh").train)


def test_two_runs_starting_together_decode_once(photos, monkeypatch):
    """The second run waits for the decoded file of the first."""
    read_image = common.read_image

    def noting(path, side):
        with open("decoded", "a") as file:
            file.write(f"{path}\n")
        time.sleep(0.02)
        return read_image(path, side)

    monkeypatch.setattr(common, "read_image", noting)
    processes = [FORK.Process(target=load, args=[photos]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(Path("decoded").read_text().splitlines()) == 40


def test_cache_dir_without_room(photos, monkeypatch):
    """Too little room, or a file in the place of the folder, is a UserError before decoding."""
    monkeypatch.setattr(common, "read_image", lambda *args: pytest.fail("decoded"))
    needed = 40 * 3 * 24 * 24
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(common.UserError, match=f"--cache-dir: {needed} bytes needed"):
        load(photos)
    Path("file").touch()
    with pytest.raises(common.UserError, match="cannot use .* in --cache-dir"):
        load(photos, cache="file")


def test_training_from_mapped_files_equals_memory(photos, tiny, monkeypatch):
    """Images mapped from the decoded file and images in memory give the same bytes."""
    load_images, outcomes = common.load_images, []

    def in_memory(*args):
        images = load_images(*args)
        images.train, images.test = images.train.clone(), images.test.clone()
        return images

    for run_dir in ("mapped", "memory"):
        options = tiny(dataset="folder", data_dir=str(photos), batch_size=16, epochs=1)
        simclr.main(simclr.Args(**options, run_dir=run_dir))
        monkeypatch.setattr(common, "load_images", in_memory)
        outcomes.append((Path(run_dir) / "embeddings.npz").read_bytes())
    assert outcomes[0] == outcomes[1]


# ---------------------------------------------------------------- .npz files


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (9, 9, 3), (3, 9, 3), (20, 30), (250, 300)])
def test_npz_forms(tmp_path, shape):
    """Gray or color, of any size, becomes RGB center squares of at most 224 pixels."""
    train = noise(7, *shape)
    images = load_npz(tmp_path, train_images=train)
    size = min(224, *shape[:2])
    assert images.size == size and images.train.shape == (7, 3, size, size)
    assert images.gray == (shape[2:] != (3,))
    if size < 224:
        left = (shape[1] - size) // 2
        expected = train.reshape(7, *shape[:2], -1)[:, :, left : left + size]
        assert (images.train.permute(0, 2, 3, 1).numpy() == expected).all()


def test_npz_without_labels_or_test(tmp_path):
    """Missing labels are -1 and missing test images none; test images may have another size."""
    images = load_npz(tmp_path, train_images=noise(6, 8, 8))
    assert images.train_labels.tolist() == [-1] * 6 and images.class_names == []
    assert images.test.shape == (0, 3, 8, 8)
    test = dict(test_images=noise(2, 16, 12), test_labels=[1, -1])
    images = load_npz(tmp_path, train_images=noise(6, 8, 8), **test)
    assert images.test.shape == (2, 3, 8, 8) and images.test_labels.tolist() == [1, -1]


# A changed array, and words of the error line.
MALFORMED = {
    "missing": ("train_images", None, "lacks train_images"),
    "float images": ("train_images", np.zeros((9, 8, 8)), "float64"),
    "two channels": ("test_images", noise(9, 8, 8, 2), "test_images"),
    "too few labels": ("train_labels", np.arange(8), "must be 9 integers"),
    "float labels": ("train_labels", np.zeros(9), "float64"),
    "one-hot labels": ("train_labels", np.eye(9, dtype=int), "[81]"),
    "negative labels": ("train_labels", np.arange(9) - 5, "train_labels"),
    "objects": ("train_labels", np.array([None] * 9), "Object arrays"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_npz_is_one_error_line(refused, tmp_path, name):
    """The line names the file, the array and its fault."""
    key, value, says = MALFORMED[name]
    arrays = dict(train_images=noise(9, 8, 8), train_labels=np.arange(9))
    arrays[key] = value
    if value is None:
        del arrays[key]
    np.savez(tmp_path / "bad.npz", **arrays)
    words = flags(dataset="npz", data_dir=tmp_path / "bad.npz", batch_size=4, epochs=1)
    refused(simclr, *words, says=["bad.npz", says])


@pytest.mark.parametrize("size", [0, 500])
def test_truncated_npz_is_one_error_line(refused, tiny_npz, tmp_path, size):
    """What is not a whole .npz file is one error line."""
    (tmp_path / "bad.npz").write_bytes(tiny_npz.read_bytes()[:size])
    refused(simclr, *flags(dataset="npz", data_dir=tmp_path / "bad.npz"), says=["bad.npz"])


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


@pytest.mark.parametrize("free, moved", [(2.1, 2), (1.9, 0)])
def test_images_that_fit_are_moved_to_the_gpu(monkeypatch, free, moved):
    """Both parts are moved if they take less than half of the GPU's free memory."""
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


def test_embed_in_eval_mode():
    """Features of clean images, in order; the encoder's mode and statistics stay."""
    images, (encoder, _) = common.load_images("digits"), common.build_encoder("resnet10", 8, 16)
    features = common.embed(encoder, images, "train")
    # Width 16 has 8 * 16 features.
    assert features.shape == (1437, 128) and features.dtype == np.float32 and encoder.training
    assert not encoder.bn1.running_mean.any()
    encoder.eval()
    with torch.no_grad():
        expected = encoder(common.normalize(images.train, images.mean, images.std)).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=1e-4)
    few = common.embed(encoder, images, "train", [7, 3])
    assert not encoder.training
    np.testing.assert_allclose(few, expected[[7, 3]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["test", "train"])
@pytest.mark.parametrize("k", [5, 10_000])
def test_knn_monitor_equals_scikit_learn(k, part):
    """knn_acc is KNeighborsClassifier's, by leave-one-out without labelled test images."""
    images, encoder = common.load_images("digits"), torch.nn.Flatten()
    x, y = common.embed(encoder, images, "train"), images.train_labels.numpy()
    if part == "test":
        knn = KNeighborsClassifier(min(k, 1437), metric="cosine").fit(x, y)
        expected = knn.score(common.embed(encoder, images, "test"), images.test_labels)
    else:
        images.test_labels.fill_(-1)
        neighbors = NearestNeighbors(metric="cosine").fit(x).kneighbors(n_neighbors=min(k, 1436))[1]
        votes = np.apply_along_axis(np.bincount, 1, y[neighbors], minlength=10)
        expected = (votes.argmax(1) == y).mean()
    found = common.knn_monitor(encoder, images, k)
    assert found == dict(
        effective_rank=pytest.approx(knn_eval.effective_rank(x)),
        knn_acc=pytest.approx(expected, abs=1e-9),
    )


def test_knn_monitor_without_labels():
    """Unlabelled training images give the effective rank only."""
    images = common.load_images("digits")
    images.train_labels.fill_(-1)
    images.train = images.train.repeat(3, 1, 1, 1)
    images.train_labels = images.train_labels.repeat(3)
    found = common.knn_monitor(torch.nn.Flatten(), images, 5)
    expected = knn_eval.effective_rank(common.embed(torch.nn.Flatten(), images, "train")[::3])
    assert found == dict(effective_rank=pytest.approx(expected))


def test_spread_of_embeddings():
    """1 for isotropic embeddings, 0 for collapsed ones of any length."""
    z = torch.randn(4000, 64)
    assert abs(common.spread(z) - 1) < 0.02
    assert common.spread(torch.ones(100, 64) * torch.rand(100, 1)) < 1e-3
