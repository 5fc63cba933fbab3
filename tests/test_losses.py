"""The three losses against naive float64 loops, finite differences, and the ways published ones went wrong."""

import math

import pytest
import torch
from conftest import one_graph
from torch.autograd import gradcheck

from barlow_twins import barlow_twins_loss
from byol import byol_loss, ema_update
from simclr import info_nce

N, D = 12, 7


def draw(seed=0, n=N, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def naive_info_nce(z1, z2, temperature):
    z = [v / v.norm() for v in [*z1, *z2]]
    n, total = len(z1), 0
    for i in range(2 * n):
        similarity = [z[i] @ z[j] / temperature for j in range(2 * n)]
        partner = (i + n) % (2 * n)
        total = total - torch.log(similarity[partner].exp() / sum(similarity[j].exp() for j in range(2 * n) if j != i))
    return total / (2 * n)


def naive_byol(p, z, _):
    return sum(2 - 2 * (a @ b) / (a.norm() * b.norm()) for a, b in zip(p, z)) / len(p)


def naive_barlow_twins(z1, z2, lambd):
    n, d = z1.shape

    def standardised(z):
        columns = []
        for j in range(d):
            mean = sum(z[i, j] for i in range(n)) / n
            variance = sum((z[i, j] - mean) ** 2 for i in range(n)) / n
            columns.append([(z[i, j] - mean) / (variance + 1e-5).sqrt() for i in range(n)])
        return columns

    a, b, total = standardised(z1), standardised(z2), 0
    for j in range(d):
        for k in range(d):
            c = sum(x * y for x, y in zip(a[j], b[k])) / n
            total = total + ((1 - c) ** 2 if j == k else lambd * c**2)
    return total


LOSSES = [
    pytest.param(info_nce, naive_info_nce, 0.5, id="info_nce"),
    pytest.param(info_nce, naive_info_nce, 0.05, id="info_nce-cold"),
    pytest.param(lambda p, z, _: byol_loss(p, z), naive_byol, 0, id="byol"),
    pytest.param(barlow_twins_loss, naive_barlow_twins, 0.0051, id="barlow_twins"),
    pytest.param(barlow_twins_loss, naive_barlow_twins, 0.5, id="barlow_twins-strong"),
]


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
def test_value_and_gradient_equal_a_naive_float64_loop(loss, naive, parameter):
    ours, theirs = draw(), draw()
    value, expected = loss(*ours, parameter), naive(*theirs, parameter)
    assert value.shape == () and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
def test_gradcheck(loss, naive, parameter):
    assert gradcheck(lambda a, b: loss(a, b, parameter), draw(1, n=5, d=4))


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_whatever_the_input_and_the_autocast(loss, naive, parameter, dtype):
    inputs = draw(2, dtype=dtype)
    inputs = [z.detach().requires_grad_() for z in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*inputs, parameter)
    assert value.dtype == torch.float32
    expected = naive(*[z.detach().double() for z in inputs], parameter)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    value.backward()
    assert all(z.grad.dtype == dtype and torch.isfinite(z.grad).all() for z in inputs)


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
def test_rows_permuted_alike_change_nothing_and_rows_permuted_apart_do(loss, naive, parameter):
    z1, z2 = draw(3)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    value = loss(z1, z2, parameter)
    torch.testing.assert_close(loss(z1[order], z2[order], parameter), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss(z2, z1, parameter), value, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(loss(z1, z2[order], parameter), value, rtol=1e-3)


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
def test_any_number_of_rows(loss, naive, parameter):
    """A ragged last batch is nothing special: no constant holds the batch size."""
    for n in (2, 3, 17):
        z1, z2 = draw(4, n=n)
        torch.testing.assert_close(loss(z1, z2, parameter), naive(z1, z2, parameter), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
def test_a_loss_is_one_graph(loss, naive, parameter):
    """No host synchronisation and no shape that depends on data."""
    compiled = one_graph(lambda a, b: loss(a, b, parameter))
    torch.testing.assert_close(compiled(*draw(5)), loss(*draw(5), parameter))


@pytest.mark.parametrize("loss", [
    lambda a, b: info_nce(a[3:6], b[3:6], 0.5, (a, b, 3)), lambda a, b: barlow_twins_loss(a, b, 0.1, (1, 3)),
], ids=["info_nce", "barlow_twins"])  # fmt: skip
def test_what_one_of_several_processes_computes_is_one_graph(loss):
    compiled = one_graph(loss)
    ours, theirs = draw(5), draw(5)
    value, expected = compiled(*ours), loss(*theirs)
    torch.testing.assert_close(value, expected)
    for a, b in zip(torch.autograd.grad(value, ours), torch.autograd.grad(expected, theirs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wait", [
    lambda z: z.sum().item(), lambda z: z[z > 0].sum(), lambda z: z.nonzero().sum(), lambda z: z.tolist()[0][0],
    lambda z: z.sum() if z[0, 0] > 0 else z.mean(), lambda z: z.cpu().sum(),
], ids=["item", "mask", "nonzero", "tolist", "if", "cpu"])  # fmt: skip
def test_a_loss_that_waits_is_no_graph(wait):
    """The tests of one graph do fail where a value, or a shape that depends on one, is asked for."""

    def value(inner):
        return one_graph(lambda z: info_nce(z, z) + inner(z))(draw(5)[0])

    assert torch.isfinite(value(lambda z: z.where(z > 0, 0).sum()))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="waits|[Dd]ata-dependent|tolist"):
        value(wait)


def test_info_nce_does_not_overflow_and_ignores_length():
    z1, z2 = draw(6, dtype=torch.float32)
    cold = info_nce(z1, z2, 0.005)  # exp(1 / 0.005) overflows even float32
    assert torch.isfinite(cold)
    torch.testing.assert_close(info_nce(1000 * z1, 0.001 * z2, 0.5), info_nce(z1, z2, 0.5), rtol=1e-5, atol=0)
    same = torch.eye(8)
    expected = -math.log(math.exp(2) / (math.exp(2) + 14))  # partner at similarity 1, the 14 others at 0
    torch.testing.assert_close(float(info_nce(same, same, 0.5)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [lambda a, b: info_nce(a, b, 0.5), byol_loss, barlow_twins_loss])
def test_a_zero_row_is_no_nan(loss):
    for dtype in (torch.float16, torch.float32):
        z1, z2 = (z.detach().to(dtype) for z in draw(7))
        z1[0] = 0
        z1.requires_grad_()
        value = loss(z1, z2)
        value.backward()
        assert torch.isfinite(value) and not torch.isnan(z1.grad).any()


def test_byol_loss_is_0_when_aligned_2_when_orthogonal_4_when_opposed():
    p = torch.tensor([[3.0, 0.0]])
    for z, expected in (([[7.0, 0.0]], 0), ([[0.0, 2.0]], 2), ([[-1.0, 0.0]], 4)):
        assert float(byol_loss(p, torch.tensor(z))) == pytest.approx(expected)


def test_barlow_twins_loss_of_identical_whitened_views_is_0():
    z = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = z - z.mean(0)
    whitened = 1000 * torch.linalg.qr(z)[0] * 8  # columns of mean 0, orthogonal; long, so that eps does not count
    assert float(barlow_twins_loss(whitened, whitened, 0.0051)) < 1e-12
    assert float(barlow_twins_loss(whitened.float(), whitened.float(), 0.0051)) < 1e-9


def test_barlow_twins_loss_survives_a_dead_feature():
    z1, z2 = (z.detach() for z in draw(8, dtype=torch.float32))
    z1[:, 2] = 0.7
    z2[:, 2] = 0.0
    z1.requires_grad_()
    value = barlow_twins_loss(z1, z2, 0.0051)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(z1.grad).all()
    assert value.item() > 0.999  # c_ii = 0 costs 1


def test_barlow_twins_in_fp16_with_gradscalers_first_scale_skips_and_recovers():
    """c_ii far from 1 overflows fp16 gradients at scale 65536; the scaler skips such steps, then training goes on."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 256)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x1, x2 = torch.randn(2, 32, 16)
    moved, losses = 0, []
    for _ in range(30):
        before = layer.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            z1, z2 = layer(x1), layer(x2)
        assert z1.dtype == torch.float16
        loss = barlow_twins_loss(z1, z2, 0.0051)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
        assert torch.isfinite(layer.weight).all()
        moved += not torch.equal(before, layer.weight)
    assert moved >= 10 and losses[-1] < losses[0]


def test_ema_update_is_in_place_and_exact():
    torch.manual_seed(0)
    target, online = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    start, pointers = [p.detach().clone() for p in target.parameters()], [p.data_ptr() for p in target.parameters()]
    for n in range(1, 11):
        ema_update(target, online, 0.9)
        for p, p0, o in zip(target.parameters(), start, online.parameters()):
            torch.testing.assert_close(p, 0.9**n * p0 + (1 - 0.9**n) * o)
    assert pointers == [p.data_ptr() for p in target.parameters()]
    compiled = one_graph(ema_update)
    expected = [0.7 * p.detach() + 0.3 * o.detach() for p, o in zip(target.parameters(), online.parameters())]
    compiled(target, online, 0.7)
    torch.testing.assert_close([p.detach() for p in target.parameters()], expected)
    assert pointers == [p.data_ptr() for p in target.parameters()]
    ema_update(target, online, 0.0)
    assert all(torch.allclose(p, o) for p, o in zip(target.parameters(), online.parameters()))
    frozen = [p.detach().clone() for p in target.parameters()]
    ema_update(target, torch.nn.Linear(5, 3), 1.0)
    assert all(torch.equal(p, f) for p, f in zip(target.parameters(), frozen))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_several_processes_make_the_whole(parts):
    """The mean of what the processes compute is the loss of the whole batch, and so is its gradient."""

    def info_nce_parts(z1, z2):
        n = N // parts
        return [info_nce(z1[i : i + n], z2[i : i + n], 0.5, (z1, z2, i)) for i in range(0, N, n)]

    def barlow_twins_parts(z1, z2):
        return [barlow_twins_loss(z1, z2, 0.1, (i, parts)) for i in range(parts)]

    for pieces, whole in ((info_nce_parts, lambda z1, z2: info_nce(z1, z2, 0.5)),
                          (barlow_twins_parts, lambda z1, z2: barlow_twins_loss(z1, z2, 0.1))):  # fmt: skip
        z1, z2 = draw()
        losses, expected = pieces(z1, z2), whole(z1, z2)
        assert len(losses) == parts and len({loss.item() for loss in losses}) == parts
        mean = sum(losses) / parts
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
        for one, other in zip(torch.autograd.grad(mean, (z1, z2)), torch.autograd.grad(expected, (z1, z2))):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
