"""The augmentation of the three method files: each op against torchvision's op on the single image, and its draws."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop

import barlow_twins
import byol
import simclr

METHODS = [simclr, byol, barlow_twins]
N = 48


@pytest.fixture(scope="module")
def photos():
    """Random real images: 40 x 48 pixel pieces of scikit-learn's two photographs, uint8 [N, 3, 40, 48]."""
    pictures = [torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for i in range(N):
        picture = pictures[i % 2]
        top = int(torch.randint(picture.shape[1] - 40, (), generator=generator))
        left = int(torch.randint(picture.shape[2] - 48, (), generator=generator))
        pieces.append(picture[:, top : top + 40, left : left + 48])
    return torch.stack(pieces)


def uniform(low, high, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def each(function, x, *parameters):
    """Apply torchvision's op to every image with its own parameters."""
    return torch.stack([function(image, *row) for image, *row in zip(x, *parameters)])


def test_crop_is_crop_flip_and_bilinear_resize(photos):
    x = photos.float() / 255
    torch.manual_seed(0)
    top, left, height, width = simclr.crop_boxes(N, 40, 48, (0.08, 1.0), "cpu")
    flip = torch.arange(N) % 2 == 0
    for size in (32, 64):
        ours = simclr.crop_resize(x, top, left, height, width, flip, size)
        for i in range(N):
            box = [int(v[i]) for v in (top, left, height, width)]
            theirs = TF.resized_crop(x[i], *box, [size, size], antialias=False)
            theirs = TF.hflip(theirs) if flip[i] else theirs
            torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=0)


def test_crop_boxes_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    ours = torch.stack(simclr.crop_boxes(20000, 40, 48, (0.08, 1.0), "cpu"), dim=1)
    image = torch.zeros(3, 40, 48)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(20000)]
    ).float()
    assert (ours == ours.round()).all() and (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= 40).all() and (ours[:, 1] + ours[:, 3] <= 48).all()
    # The means and standard deviations of 20,000 draws agree to a few standard errors.
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(ours, 0), statistic(theirs, 0), atol=0.3, rtol=0)


def test_affine_is_torchvisions(photos):
    x = photos[:, :, :40, :40].float() / 255
    degrees, zoom = uniform(-30, 30, N), uniform(0.8, 1.2, N)
    dx, dy = torch.arange(N) % 9 - 4.0, torch.arange(N) % 7 - 3.0  # torchvision shifts by whole pixels
    ours = simclr.affine(x, degrees, dx / 40, dy / 40, zoom)
    for i in range(N):
        theirs = TF.affine(x[i], float(degrees[i]), [int(dx[i]), int(dy[i])], float(zoom[i]), [0.0, 0.0],
                           interpolation=TF.InterpolationMode.BILINEAR, fill=None)  # fmt: skip
        torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=0)


def test_grey_is_torchvisions(photos):
    x = photos.float() / 255
    torch.testing.assert_close(simclr.to_grey(x), TF.rgb_to_grayscale(x), atol=1e-4, rtol=0)


def test_hue_is_torchvisions(photos):
    x = torch.cat([photos.float() / 255, torch.rand(8, 3, 40, 48), torch.ones(1, 3, 40, 48), torch.zeros(1, 3, 40, 48)])
    shift = uniform(-0.5, 0.5, len(x))
    shift[:3] = torch.tensor([0.5, -0.5, 0.0])
    ours = simclr.adjust_hue(x, shift)
    theirs = each(lambda image, s: TF.adjust_hue(image, float(s)), x, shift)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    torch.testing.assert_close(simclr.adjust_hue(x, 0 * shift), x, atol=1e-5, rtol=0)


def jitter_one_by_one(image, factors, hue, order, hue_step):
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    steps = [lambda x, op=op: ops[op](x, float(factors[op])) for op in order.tolist()]
    steps.insert(hue_step, lambda x: TF.adjust_hue(x, float(hue)))
    for step in steps:
        image = step(image)
    return image


@pytest.mark.parametrize("op", ["brightness", "contrast", "saturation", "hue", "all"])
@pytest.mark.parametrize("n", [1, 3, 6, N])
def test_jitter_is_torchvisions_ops_in_each_images_own_order(photos, op, n):
    x = photos[:n].float() / 255
    factors, hue = 1 + uniform(-0.8, 0.8, n, 3), uniform(-0.4, 0.4, n)
    for i, name in enumerate(["brightness", "contrast", "saturation"]):
        if op not in (name, "all"):
            factors[:, i] = 1
    if op not in ("hue", "all"):
        hue[:] = 0
    order = uniform(0, 1, n, 3).argsort(1)
    ours = simclr.color_jitter(x, factors, hue, order)
    theirs = torch.stack([jitter_one_by_one(x[i], factors[i], hue[i], order[i], i * 4 // n) for i in range(n)])
    torch.testing.assert_close(ours, theirs, atol=2e-3 if op in ("hue", "all") else 1e-4, rtol=0)


@pytest.mark.parametrize("size", [3, 9, 23])
def test_blur_is_torchvisions(photos, size):
    x, sigma = photos.float() / 255, uniform(0.1, 2.0, N)
    ours = simclr.gaussian_blur(x, sigma, size)
    theirs = each(lambda image, s: TF.gaussian_blur(image, [size, size], [float(s)] * 2), x, sigma)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def view(module, **changes):
    return (module.View(**changes),) * 2


def test_flip_grey_solarize_in_a_view_are_torchvisions(photos):
    x = photos[:, :, :40, :40].contiguous()
    for changes, theirs in (
        (dict(flip_p=1.0), TF.hflip),
        (dict(grey_p=1.0), lambda image: TF.rgb_to_grayscale(image, 3)),
        (dict(solarize_p=1.0), lambda image: TF.solarize(image, 0.5)),
    ):
        v1, v2 = simclr.two_views(x, view(simclr, **changes))
        for v in (v1, v2):
            torch.testing.assert_close(v, each(theirs, x.float() / 255), atol=1e-4, rtol=0)


@pytest.mark.parametrize("module", METHODS)
def test_without_augmentation_two_identical_copies(photos, module):
    x = photos[:, :, :40, :40].contiguous()
    v1, v2 = module.two_views(x, module.AUGMENT["none"])
    assert torch.equal(v1, v2) and torch.equal(v1, x.float() / 255)
    mean, std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)
    v1, _ = module.two_views(x, module.AUGMENT["none"], None, mean, std)
    torch.testing.assert_close(v1, (x.float() / 255 - 0.4) / 0.2)


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("name", ["photo", "symbol"])
def test_every_image_draws_for_itself(photos, module, name):
    same = photos[:1, :, :40, :40].expand(64, -1, -1, -1)
    v1, v2 = module.two_views(same, module.AUGMENT[name])
    assert v1.shape == (64, 3, 40, 40) and v1.dtype == torch.float32 and 0 <= v1.min() and v1.max() <= 1
    everything = torch.cat([v1, v2]).flatten(1)
    distances = torch.cdist(everything, everything) + 1e9 * torch.eye(128)
    assert distances.min() > 1e-3


@pytest.mark.parametrize("changes", [
    dict(flip_p=0.5), dict(grey_p=0.5), dict(solarize_p=0.5), dict(blur_p=0.5),
    dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.5),
])  # fmt: skip
def test_an_op_is_applied_with_its_probability_and_image_by_image(photos, changes):
    torch.manual_seed(0)
    lively = photos[:, :, :40, :40].float().std((1, 2, 3)).argmax()  # on a dark one solarisation changes nothing
    x = photos[lively, :, :40, :40].expand(1000, -1, -1, -1)
    v1, v2 = simclr.two_views(x, view(simclr, **changes))
    changed = [((v - x.float() / 255).abs().amax((1, 2, 3)) > 1e-3) for v in (v1, v2)]
    for c in changed:
        assert abs(c.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(len(x))
    assert abs((changed[0] == changed[1]).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(
        len(x)
    )  # the views are independent


def test_views_stay_with_their_image(photos):
    """color_jitter works on shuffled images; they must come back in order."""
    x = photos[:, :, :40, :40]
    v1, v2 = simclr.two_views(x, view(simclr, jitter=(0.01, 0.01, 0.01, 0.01)))
    clean = x.float().flatten(1) / 255
    for v in (v1, v2):
        assert torch.equal(torch.cdist(v.flatten(1), clean).argmin(1), torch.arange(N))


def test_all_24_orders_come_equally_often():
    """Read each image's order off its result: every order of four fixed ops gives this image another look."""
    torch.manual_seed(0)
    n = 4800
    pixel = torch.rand(1, 3, 8, 8).expand(n, 3, 8, 8)
    factors, hue = (
        torch.tensor([[1.6, 2.0, 2.5]]).expand(n, 3),
        torch.full((n,), 0.15),
    )  # strong: clamping keeps no order
    shuffle = torch.rand(n).argsort()
    result = simclr.color_jitter(pixel, factors, hue, torch.rand(n, 3).argsort(1))[shuffle.argsort()]
    _, counts = result.flatten(1).mul(1e5).round().unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 50  # chi-square, 23 degrees of freedom: p < 0.001


@pytest.mark.parametrize("size", [24, 40, 64])
def test_size_of_the_views(photos, size):
    for name in ("photo", "none"):
        v1, v2 = simclr.two_views(photos[:, :, :40, :40], simclr.AUGMENT[name], size)
        assert v1.shape == v2.shape == (N, 3, size, size)
        assert v1.is_contiguous(memory_format=torch.channels_last)
