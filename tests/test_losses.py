"""The losses against naive float64 loops, finite differences, and published mistakes."""

import math

import pytest
import torch
from conftest import one_graph
from torch import nn
from torch.autograd import gradcheck

from barlow_twins import barlow_twins_loss
from byol import byol_loss, ema_update
from simclr import info_nce

N, D = 12, 7


def draw(seed=0, n=N, d=D, dtype=torch.float64):
    """Two random matrices [n, d] that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return [z.to(dtype, copy=True).requires_grad_() for z in pair]


def naive_info_nce(z1, z2, temperature):
    z = [v / v.norm() for v in [*z1, *z2]]
    n, total = len(z1), 0
    for i in range(2 * n):
        others = [(z[i] @ z[j] / temperature).exp() for j in range(2 * n) if j != i]
        partner = (z[i] @ z[(i + n) % (2 * n)] / temperature).exp()
        total -= (partner / sum(others)).log()
    return total / (2 * n)


def naive_byol_loss(p, z):
    return sum(2 - 2 * (a @ b) / (a.norm() * b.norm()) for a, b in zip(p, z)) / len(p)


def naive_barlow_twins_loss(z1, z2, lambd):
    n, d = z1.shape

    def normalized_columns(z):
        for column in z.T:
            mean = sum(column) / n
            variance = sum((value - mean) ** 2 for value in column) / n
            yield (column - mean) / (variance + 1e-5).sqrt()

    total = 0
    for i, a in enumerate(normalized_columns(z1)):
        for j, b in enumerate(normalized_columns(z2)):
            c = a @ b / n
            total += (1 - c) ** 2 if i == j else lambd * c**2
    return total


LOSSES = {
    "info_nce": (info_nce, naive_info_nce, 0.5),
    "info_nce at a low temperature": (info_nce, naive_info_nce, 0.05),
    "byol_loss": (byol_loss, naive_byol_loss),
    "barlow_twins_loss": (barlow_twins_loss, naive_barlow_twins_loss, 0.0051),
    "barlow_twins_loss with a large lambd": (barlow_twins_loss, naive_barlow_twins_loss, 0.5),
}


@pytest.fixture(params=LOSSES)
def losses(request):
    """A loss and its naive loop, as functions of two matrices."""
    loss, naive, *parameters = LOSSES[request.param]
    return lambda a, b: loss(a, b, *parameters), lambda a, b: naive(a, b, *parameters)


@pytest.mark.parametrize("n", [2, 3, 17])
def test_value_and_gradient_equal_naive_loop(losses, n):
    """Any number of rows: no constant holds the batch size."""
    inputs, copies = draw(n=n), draw(n=n)
    value, expected = losses[0](*inputs), losses[1](*copies)
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-12)
    gradients, wanted = torch.autograd.grad(value, inputs), torch.autograd.grad(expected, copies)
    torch.testing.assert_close(gradients, wanted, rtol=1e-6, atol=1e-9)


def test_loss_passes_gradcheck(losses):
    """The gradient is that of finite differences."""
    assert gradcheck(losses[0], draw(1, n=5, d=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(losses, dtype):
    """Half precision in: computed in float32, with a gradient of the input's dtype."""
    inputs = draw(2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses[0](*inputs)
    assert value.dtype == torch.float32
    expected = losses[1](*(z.detach().double() for z in inputs))
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    value.backward()
    assert all(z.grad.dtype == dtype and torch.isfinite(z.grad).all() for z in inputs)


def test_loss_is_one_graph(losses):
    """One compiled graph: the host never waits, no shape depends on values."""
    torch.testing.assert_close(one_graph(losses[0])(*draw(5)), losses[0](*draw(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_row_gives_no_nan(losses, dtype):
    """A row of zeros has no direction; value and gradient stay numbers."""
    z1, z2 = draw(7, dtype=dtype)
    z1.data[0] = 0
    value = losses[0](z1, z2)
    value.backward()
    assert torch.isfinite(value) and not z1.grad.isnan().any()


def test_info_nce_at_temperature_0005_does_not_overflow():
    """exp(1 / 0.005) overflows even float32; value and gradient stay finite."""
    for dtype in (torch.float16, torch.float32):
        z1, z2 = draw(6, dtype=dtype)
        value = info_nce(z1, z2, 0.005)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(z1.grad).all()


def test_info_nce_normalizes_and_has_known_values():
    """The length of an embedding does not count; orthogonal images give the value by hand."""
    z1, z2 = draw(6)
    torch.testing.assert_close(info_nce(1000 * z1, 0.001 * z2), info_nce(z1, z2))
    same = torch.eye(8)
    # The partner at similarity 1, the 14 others at 0.
    expected = -math.log(math.exp(2) / (math.exp(2) + 14))
    assert info_nce(same, same, 0.5).item() == pytest.approx(expected)


@pytest.mark.parametrize("z, expected", [((7, 0), 0), ((0, 2), 2), ((-1, 0), 4)])
def test_byol_loss_is_0_aligned_2_orthogonal_4_opposed(z, expected):
    """2 - 2 cos(p, z)."""
    value = byol_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([z]))
    assert value.item() == pytest.approx(expected)


def test_barlow_twins_loss_of_equal_whitened_views_is_0():
    """The biased variance lets c_ii reach 1."""
    z = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Orthogonal columns of mean 0, so long that eps does not count.
    z = 8000 * torch.linalg.qr(z - z.mean(0))[0]
    assert barlow_twins_loss(z, z).item() < 1e-12
    assert barlow_twins_loss(z.float(), z.float()).item() < 1e-9


def test_barlow_twins_loss_survives_a_dead_feature():
    """A constant column has c_ii = 0, costs 1, and divides nothing by zero."""
    z1, z2 = draw(8, dtype=torch.float32)
    z1.data[:, 2], z2.data[:, 2] = 0.7, 0.0
    value = barlow_twins_loss(z1, z2)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(z1.grad).all()
    assert value.item() > 0.999


@pytest.mark.parametrize("ema", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_ema_update_is_in_place_and_exact(ema, compiled):
    """target <- ema * target + (1 - ema) * online, in the same memory, as one graph too."""
    torch.manual_seed(0)
    target, online = nn.Linear(5, 3), nn.Linear(5, 3)
    start = [p.detach().clone() for p in target.parameters()]
    pointers = [p.data_ptr() for p in target.parameters()]
    update = one_graph(ema_update) if compiled else ema_update
    for n in (1, 2, 3):
        update(target, online, ema)
        for p, p0, o in zip(target.parameters(), start, online.parameters()):
            torch.testing.assert_close(p, ema**n * p0 + (1 - ema**n) * o)
    assert [p.data_ptr() for p in target.parameters()] == pointers
