"""The README's lines that take an encoder elsewhere: into torchvision's network, to new images, out of Python."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
import simclr

README = (ROOT / "README.md").read_text()


def code(words):
    """The README's block of Python that holds these words."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if words in block]
    return found


def place(tmp_path, monkeypatch, tiny, size, **changes):
    """A folder with runs/mine of images of `size` pixels, and new.png, the test image number 3."""
    monkeypatch.chdir(tmp_path)
    arguments = tiny(run_dir="runs/mine", epochs=1, image_size=size, batch_size=96, **changes)
    simclr.main(simclr.Args(**arguments))
    images = common.load_images("npz", arguments["data_dir"], size)
    Image.fromarray(images.test[3].permute(1, 2, 0).numpy()).save("new.png")
    return images


@pytest.mark.parametrize("size", [16, 72])  # torchvision's stem is taken above 64 pixels alone
def test_new_images_are_classified_by_torchvisions_network(tiny, tmp_path, monkeypatch, capsys, size):
    images = place(tmp_path, monkeypatch, tiny, size, width=64, encoder="resnet18")
    found = {}
    capsys.readouterr()
    exec(code("torchvision.models.resnet18()"), found)
    stem = found["encoder"].conv1
    assert (stem.kernel_size, stem.stride) == (((3, 3), (1, 1)) if size <= 64 else ((7, 7), (2, 2)))
    with np.load("runs/mine/embeddings.npz") as file:
        own = torch.from_numpy(file["test_features"][3:4])
    torch.testing.assert_close(found["features"], own, rtol=1e-3, atol=1e-3)  # so size, mean and std are right
    expected = found["judge"].predict(own.numpy())[0]
    assert capsys.readouterr().out == f"{[images.class_names[expected]]}\n"
    if size == 16:  # one that is neither square nor RGB nor of that size
        Image.new("RGBA", (50, 31), "red").save("new.png")
        exec(code("torchvision.models.resnet18()"), found)
        assert found["features"].shape == (1, 512) and torch.isfinite(found["features"]).all()


def test_load_encoder_and_export(tiny, tmp_path, monkeypatch):
    """Any encoder by common.py; then as a program of torch.export, for batches of other sizes than the example's."""
    images = place(tmp_path, monkeypatch, tiny, 8).test
    found = {"images": images}
    exec(code("features = encoder(normalise("), found)
    with np.load("runs/mine/embeddings.npz") as file:
        own = torch.from_numpy(file["test_features"])
    torch.testing.assert_close(found["features"].detach(), own, rtol=1e-3, atol=1e-3)
    exec(code("torch.export.save"), found)
    program = torch.export.load("encoder.pt2").module()
    for n in (1, 5):
        mine = program(common.normalise(images[:n], found["info"]["mean"], found["info"]["std"]))
        torch.testing.assert_close(mine.detach(), own[:n], rtol=1e-3, atol=1e-3)
