"""The losses against naive float64 loops, half precision, and zeros."""

import pytest
import torch
from torch import nn

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
    # exp(1 / 0.005) overflows even float32.
    "info_nce at a low temperature": (info_nce, naive_info_nce, 0.005),
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


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_equal_float64(losses, dtype, autocast, device):
    """In float32 without TF32, which would be off by 1e-3; the gradient in the input's dtype."""
    inputs = [z.detach().to(dtype) for z in draw(n=256, d=128)]
    ours = [z.to(device, copy=True).requires_grad_() for z in inputs]
    theirs = [z.double().requires_grad_() for z in inputs]
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        value = losses[0](*ours)
    expected = losses[0](*theirs)
    assert value.dtype == torch.float32 and value.device.type == device
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    value.backward()
    expected.backward()
    bound = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for a, b in zip(ours, theirs):
        error = (a.grad.cpu().double() - b.grad).abs().max()
        assert a.grad.dtype == dtype and error < bound * b.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_row_and_dead_feature_give_no_nan(losses, dtype):
    """Zeros have neither a direction nor a variance; value and gradient stay numbers."""
    z1, z2 = draw(7, dtype=dtype)
    z1.data[0] = z1.data[:, 2] = 0
    value = losses[0](z1, z2)
    value.backward()
    assert torch.isfinite(value) and not z1.grad.isnan().any()


def test_ema_update_is_in_place_and_exact():
    """target <- ema * target + (1 - ema) * online, in the same memory."""
    target, online = nn.Linear(5, 3), nn.Linear(5, 3)
    pairs = [(p.detach(), q.detach()) for p, q in zip(target.parameters(), online.parameters())]
    expected = [0.7 * p + 0.3 * q for p, q in pairs]
    ema_update(target, online, 0.7)
    torch.testing.assert_close([p for p, _ in pairs], expected)
