"""The augmentation: each op against torchvision's on the single image, and its random draws."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandomResizedCrop

import simclr

# test_methods.py sees that the ops are the same text in every method.
N = 48


@pytest.fixture(scope="module")
def photos():
    """Pieces of scikit-learn's two photographs, uint8 [N, 3, 40, 48]."""
    pictures = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    # [2, rows, columns, 3, 40, 48]
    return pictures.unfold(1, 40, 40).unfold(2, 48, 48).flatten(0, 2)[::5][:N]


@pytest.fixture(scope="module")
def squares(photos):
    return photos[..., :40].contiguous()


@pytest.fixture(scope="module")
def lively(squares):
    """The image of most contrast: on a dark one, solarize changes nothing."""
    return squares[squares.float().std((1, 2, 3)).argmax()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape)


def assert_each_close(found, op, x, *parameters, atol=1e-4):
    """found equals torchvision's op on every image of x with the image's own parameters."""
    expected = torch.stack([op(image, *row) for image, *row in zip(x, *parameters)])
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---------------------------------------------------------------- ops


@pytest.mark.parametrize("size", [32, 64])
def test_crop_resize_equals_torchvision(photos, size):
    """Crop, flip and bilinear resize; no pixel outside of the crop blends in."""
    x, flip = photos.float() / 255, torch.arange(N)[:, None] % 2 == 0
    box = simclr.crop_boxes(x, (0.08, 1.0))
    found = simclr.crop_resize(x, *box, flip, size)

    def op(image, *row):
        image = TF.resized_crop(image, *map(int, row[:4]), [size, size], antialias=False)
        return TF.hflip(image) if row[4] else image

    assert_each_close(found, op, x, *box, flip)


def test_crop_boxes_distribution_equals_torchvision():
    """Whole pixels inside the image; mean and spread of 10,000 draws agree."""
    x = torch.zeros(10000, 3, 40, 48)
    found = torch.cat(simclr.crop_boxes(x, (0.08, 1.0)), dim=1)
    draws = [RandomResizedCrop.get_params(x[0], [0.08, 1.0], [3 / 4, 4 / 3]) for _ in x]
    expected = torch.tensor(draws).float()
    assert (found == found.round()).all() and found.min() == 0 < found[:, 2:].min()
    assert (found[:, :2] + found[:, 2:] <= torch.tensor([40, 48])).all()
    assert (found.mean(0) - expected.mean(0)).abs().max() < 0.4
    assert (found.std(0) - expected.std(0)).abs().max() < 0.4


def test_affine_equals_torchvision(squares):
    """Clockwise rotation, zoom, then the shift; black outside."""
    x = squares.float() / 255
    degrees, zoom = uniform(-30, 30, N), uniform(0.8, 1.2, N)
    # torchvision shifts by whole pixels.
    shift = torch.arange(N) % 9 - 4
    found = simclr.affine(x, degrees, shift / 40, -shift / 40, zoom)

    def op(image, degrees, shift, zoom):
        bilinear, shift = TF.InterpolationMode.BILINEAR, [int(shift), -int(shift)]
        return TF.affine(image, float(degrees), shift, float(zoom), [0.0, 0.0], bilinear)

    assert_each_close(found, op, x, degrees, shift, zoom)


def test_adjust_hue_equals_torchvision(photos):
    """Photographs, noise and pure colors; half a turn both ways and none."""
    noise = torch.rand(8, 3, 40, 48)
    x = torch.cat([photos / 255, noise, noise[:2].round()])
    shift = uniform(-0.5, 0.5, len(x))
    shift[:3] = torch.tensor([0.5, -0.5, 0.0])
    found = simclr.adjust_hue(x, shift)
    assert_each_close(found, lambda image, s: TF.adjust_hue(image, float(s)), x, shift, atol=2e-3)
    torch.testing.assert_close(simclr.adjust_hue(x, 0 * shift), x, atol=1e-5, rtol=0)


def quarters(n):
    """The quarter of each of n images in color_jitter."""
    return sum((torch.arange(n) >= n * i // 4).long() for i in (1, 2, 3))


COLOR_OPS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


@pytest.mark.parametrize("hue", [0.0, 0.4])
@pytest.mark.parametrize("n", [1, 6, N])
def test_color_jitter_equals_torchvision_in_each_images_order(photos, hue, n):
    """The ops one after the other; hue comes before the t-th of them in the t-th quarter."""
    x, most = photos[:n].float() / 255, torch.tensor([0.8, 0.8, 0.8, hue])
    change = torch.tensor([1, 1, 1, 0]) + most * uniform(-1, 1, n, 4)
    order = uniform(0, 1, n, 3).argsort(1)
    found = simclr.color_jitter(x.clone(), change[:, :3], change[:, 3], order)

    def op(image, change, order, t):
        order = order.tolist()
        order.insert(t, 3)
        for i in order:
            image = COLOR_OPS[i](image, float(change[i]))
        return image

    assert_each_close(found, op, x, change, order, quarters(n), atol=2e-3 if hue else 1e-4)


def test_color_jitter_orders_are_equally_frequent(squares, monkeypatch):
    """augment draws all 24 orders of the four ops alike."""
    n, drawn = 2400, []

    def record(x, factors, hue, order):
        drawn.append(torch.cat([order, quarters(len(x))[:, None]], dim=1))
        return x

    monkeypatch.setattr(simclr, "color_jitter", record)
    simclr.augment(squares[:1, :, :8, :8].expand(n, -1, -1, -1), simclr.SYMBOL_VIEW, 8)
    _, counts = drawn[0].unique(dim=0, return_counts=True)
    assert len(counts) == 24
    # chi-square of 23 degrees of freedom: p < 0.001
    assert ((counts - 2 * n / 24) ** 2 / (2 * n / 24)).sum() < 50
    # Of seven large images, every part has all four places of the hue.
    simclr.two_views(squares[:1].expand(7, -1, -1, -1), simclr.SYMBOL_VIEW, 224)
    assert [len(set(part[:, 3].tolist())) for part in drawn[1:]] == [4, 4, 4]


@pytest.mark.parametrize("size", [3, 9, 23])
def test_gaussian_blur_equals_torchvision(photos, size):
    """Every image its own sigma."""
    x, sigma = photos.float() / 255, uniform(0.1, 2.0, N)
    found = simclr.gaussian_blur(x, sigma, size)

    def op(image, sigma):
        return TF.gaussian_blur(image, [size, size], [float(sigma)] * 2)

    assert_each_close(found, op, x, sigma)


# ---------------------------------------------------------------- views

SURE = {
    "flip_p": TF.hflip,
    "grayscale_p": lambda image: TF.rgb_to_grayscale(image, 3),
    "solarize_p": lambda image: TF.solarize(image, 0.5),
}


def view_with(name, p, **more):
    """A View in which an op has probability p in both views."""
    pair = name in ("blur_p", "solarize_p")
    return simclr.View(**{name: (p, p) if pair else p}, **more)


@pytest.mark.parametrize("name", SURE)
def test_flip_grayscale_solarize_equal_torchvision(squares, name):
    """At probability 1 both views are torchvision's op on every image."""
    for view in simclr.two_views(squares, view_with(name, 1.0)):
        assert_each_close(view, SURE[name], squares.float() / 255)


def test_augment_none_gives_two_identical_views(squares):
    """--augment none: the image itself, normalized, in float32 as well by a float64 mean."""
    view = simclr.View()
    mean, std = torch.rand(2, 3, 1, 1, dtype=torch.float64) + 0.1
    v1, v2 = simclr.two_views(squares, view, mean=mean, std=std)
    assert torch.equal(v1, v2)
    torch.testing.assert_close(v1, ((squares.double() / 255 - mean) / std).float())
    with pytest.raises(AssertionError, match="needs uint8 images, not torch.float32"):
        simclr.two_views(squares / 255)


@pytest.mark.parametrize("augment", ["photo", "symbol"])
def test_every_image_draws_its_own_parameters(lively, method, augment):
    """64 copies of one image give 128 different views in [0, 1]."""
    view = method.choose_view(augment, False, 96)
    v1, v2 = method.two_views(lively.expand(64, -1, -1, -1), view)
    both = torch.cat([v1, v2]).flatten(1)
    assert both.dtype == torch.float32 and -1e-5 < both.min() and both.max() < 1 + 1e-5
    assert torch.pdist(both).min() > 1e-3


CHANCES = {
    "flip_p": {},
    "grayscale_p": {},
    "solarize_p": {},
    "blur_p": {},
    "jitter_p": dict(jitter=(0.4, 0.4, 0.4, 0.1)),
    "warp_p": dict(rotate=30, shift=0.1, zoom=0.1),
}


@pytest.mark.parametrize("name", CHANCES)
def test_op_has_its_probability_in_each_view(lively, name):
    """Half of the images at 0.5, independently in the two views."""
    x, view = lively.expand(1000, -1, -1, -1), view_with(name, 0.5, **CHANCES[name])
    views = simclr.two_views(x, view)
    changed = torch.stack([(v - x / 255).abs().amax((1, 2, 3)) > 1e-3 for v in views]).float()
    # Four standard errors.
    bound = 4 * 0.5 / math.sqrt(1000)
    assert (changed.mean(1) - 0.5).abs().max() < bound
    assert abs((changed[0] == changed[1]).float().mean() - 0.5) < bound


@pytest.mark.parametrize("name", ["blur_p", "solarize_p"])
def test_blur_p_and_solarize_p_are_of_the_first_and_the_second_view(squares, name):
    """At (0, 1) the first view is the image itself, at (1, 0) the second."""
    for p in ((0.0, 1.0), (1.0, 0.0)):
        views = simclr.two_views(squares, simclr.View(**{name: p}))
        changed = [((v - squares / 255).abs().amax((1, 2, 3)) > 1e-3).float().mean() for v in views]
        # Dark images have nothing to solarize, flat ones nothing to blur.
        assert [float(share > 0.5) for share in changed] == [*p] and min(changed) == 0


def test_noise_is_gray_and_up_to_its_standard_deviation():
    """The same in all channels; each image draws its standard deviation from 0 to `noise`."""
    x = torch.full((1000, 3, 40, 40), 128, dtype=torch.uint8)
    v, _ = simclr.two_views(x, simclr.View(noise=0.1))
    std = v[:, 0].flatten(1).std(1)
    assert torch.equal(v[:, 0], v[:, 1]) and std.max() < 0.11
    assert std.mean().item() == pytest.approx(0.05, abs=0.005)


def test_choose_view_leaves_out_what_means_nothing(method):
    """No color ops on gray images, no blur up to 64 pixels."""
    view = method.choose_view("photo", gray=True, image_size=65)
    assert view.jitter[2:] == (0, 0) and view.grayscale_p == 0 < min(*view.blur_p, view.flip_p)
    view = method.choose_view("photo", gray=False, image_size=64)
    assert view.blur_p == (0, 0) and min(*view.jitter, view.grayscale_p) > 0


def test_overhead_views_have_all_eight_orientations(squares):
    """turn_p with flip_p: flips and quarter turns, each of the eight as often as the others."""
    x = squares[:1].repeat(4000, 1, 1, 1)
    v, _ = simclr.two_views(x, simclr.View(flip_p=0.5, turn_p=0.5))
    turned = [squares[0].float().rot90(i, (1, 2)) / 255 for i in range(4)]
    turned += [image.flip(2) for image in turned]
    found = torch.stack([(v - image).abs().amax((1, 2, 3)) < 1e-3 for image in turned])
    assert (found.sum(0) == 1).all()
    assert (found.float().mean(1) - 1 / 8).abs().max() < 0.03


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_color_jitter_of_other_channels(squares, channels):
    """Brightness and contrast by the mean of the channels, no hue, no solarization."""
    x = squares[:, :1].repeat(1, channels, 1, 1)
    x[:, -1] = 255 - x[:, -1]
    factors = uniform(0.6, 1.4, N, 3)
    factors[:, 2] = 1
    order = torch.arange(3).repeat(N, 1)
    found = simclr.color_jitter(x / 255, factors, torch.zeros(N), order)
    bright = (x / 255 * factors[:, :1, None, None]).clamp(0, 1)
    mean = bright.mean((1, 2, 3), keepdim=True)
    expected = (mean + factors[:, 1:2, None, None] * (bright - mean)).clamp(0, 1)
    torch.testing.assert_close(found, expected)
    solarized, _ = simclr.two_views(x, view_with("solarize_p", 1.0))
    torch.testing.assert_close(solarized, x / 255)


@pytest.mark.parametrize("augment", ["photo", "none"])
@pytest.mark.parametrize("size", [24, 40, 64])
def test_size_of_views(photos, augment, size):
    """[N, 3, size, size], channels last, of images of another size and form."""
    for v in simclr.two_views(photos, simclr.choose_view(augment, False, size), size):
        assert v.shape == (N, 3, size, size)
        assert v.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4])
def test_crops_of_larger_images_are_antialiased(factor):
    """Nearly as sharp as torchvision's antialiased crops; without, 1.1 to 1.6 times sharper."""
    x = torch.stack([torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images])
    x = x[..., :384, :384].repeat(20, 1, 1, 1) / 255
    box, size = simclr.crop_boxes(x, (0.2, 1.0)), [round(384 / factor)] * 2
    found = simclr.crop_resize(x, *box, torch.zeros(40, 1, dtype=torch.bool), size[0])
    crops = [TF.crop(image, *map(int, row)) for image, *row in zip(x, *box)]
    antialiased, plain = (
        torch.stack([TF.resize(crop, size, antialias=yes) for crop in crops])
        for yes in (True, False)
    )
    sharpness, least, most = (v.diff().abs().mean() for v in (found, antialiased, plain))
    assert 0.9 < sharpness / least < 1.2 and sharpness - least < (most - least) / 2
