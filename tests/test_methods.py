"""What the three method files share and how they differ: schedules, networks, targets, copying one file alone."""

import ast
import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_graph
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import barlow_twins
import byol
import common
import simclr

ROOT = Path(simclr.__file__).parent
METHODS = [simclr, byol, barlow_twins]
NETWORKS = {simclr: simclr.SimCLR, byol: byol.BYOL, barlow_twins: barlow_twins.BarlowTwins}


def tiny_encoder():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ---------------------------------------------------------------- alike


@pytest.mark.parametrize("name", [
    "View", "crop_boxes", "crop_resize", "affine", "to_grey", "adjust_hue", "color_jitter", "gaussian_blur", "augment",
    "two_views", "mlp", "learning_rate", "make_optimizer",
])  # fmt: skip
def test_what_the_methods_share_is_the_same_text(name):
    def source(module):
        text = Path(module.__file__).read_text()
        return next(ast.get_source_segment(text, node) for node in ast.parse(text).body
                    if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name)  # fmt: skip

    assert source(simclr) == source(byol) == source(barlow_twins)


@pytest.mark.parametrize("other", [byol, barlow_twins])
def test_main_differs_in_a_few_lines_only(other):
    def main(module):
        text = Path(module.__file__).read_text()
        return text[text.index("def main(") :].splitlines()

    changed = [line for line in difflib.ndiff(main(simclr), main(other)) if line[0] == "+"]
    assert 0 < len(changed) <= 12, changed


def test_shared_flags_are_the_same_in_name_order_and_type():
    own = {"temperature", "ema", "ema_schedule", "lambd"}
    shared = [[(f.name, f.type) for f in module.Args.__dataclass_fields__.values() if f.name not in own]
              for module in METHODS]  # fmt: skip
    assert shared[0] == shared[1] == shared[2]


@pytest.mark.parametrize("module", METHODS)
def test_every_recipe_names_real_flags_and_fills_every_unset_one(module):
    unset = {f.name for f in module.Args.__dataclass_fields__.values() if f.default is None}
    free = {"run_dir", "wandb_entity", "image_size", "knn_temperature"}
    datasets = module.Args.__dataclass_fields__["dataset"].type.__args__
    assert set(module.RECIPES) == set(datasets)
    for recipe in module.RECIPES.values():
        assert set(recipe) == (unset - free) | {"augment"}
        assert recipe["augment"] in module.AUGMENT


# ---------------------------------------------------------------- copying one file

ALONE = """
import sys, torch
from torch import nn
import {name} as method
assert "common" not in sys.modules
forbidden = {{"tyro", "wandb", "sklearn", "matplotlib"}} & set(sys.modules)
assert not forbidden, forbidden
encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
v1, v2 = method.two_views(images)
network = method.{network}(encoder, 4, hidden_dim=8, projection_dim=6)
{step}
loss.backward()
assert torch.isfinite(loss) and all(p.grad is not None for p in network.parameters() if p.requires_grad)
method.make_optimizer(network, 1e-4).step()
{after}
print("alone")
"""
STEPS = {
    simclr: ("z1, z2 = network(v1, v2); loss = method.info_nce(z1, z2, 0.5)", ""),
    byol: ("p1, p2, t1, t2, _ = network(v1, v2); loss = method.byol_loss(p1, t2) + method.byol_loss(p2, t1)",
           "method.ema_update(network.target, network.online, 0.99)"),
    barlow_twins: ("z1, z2 = network(v1, v2); loss = method.barlow_twins_loss(z1, z2, 0.0051)", ""),
}  # fmt: skip


@pytest.mark.parametrize("module", METHODS)
def test_one_file_alone_in_a_folder_gives_views_network_and_loss(module, tmp_path):
    shutil.copy(module.__file__, tmp_path)
    step, after = STEPS[module]
    code = ALONE.format(name=module.__name__, network=NETWORKS[module].__name__, step=step, after=after)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "alone\n", done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix) == [f"{module.__name__}.py"]


@pytest.mark.parametrize("module", METHODS)
def test_with_common_beside_it_the_copied_command_runs(module, tmp_path):
    for file in (module.__file__, common.__file__):
        shutil.copy(file, tmp_path)
    command = [sys.executable, f"{module.__name__}.py", "--epochs", "0", "--width", "16", "--run-dir", "r"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "r" / "embeddings.npz").exists(), done.stderr


# ---------------------------------------------------------------- schedules, optimizer


def test_learning_rate_rises_to_the_peak_and_falls_to_zero():
    rate = [simclr.learning_rate(step, 100, 10, 0.3) for step in range(101)]
    assert 0 < rate[0] < rate[1] and rate[10] == 0.3 == max(rate) and rate[100] == pytest.approx(0)
    assert rate[55] == pytest.approx(0.15)  # half way down the cosine
    assert all(a < b for a, b in zip(rate[:10], rate[1:])) and all(a > b for a, b in zip(rate[10:], rate[11:]))
    assert simclr.learning_rate(0, 10, 0, 0.3) == 0.3  # no warm-up
    assert simclr.learning_rate(4, 5, 10, 0.3) < 0.3  # a run shorter than its warm-up


def test_ema_rises_from_the_flag_to_one_or_stays():
    assert byol.ema_at(0, 100, 0.99, "cosine") == pytest.approx(0.99)
    assert byol.ema_at(50, 100, 0.99, "cosine") == pytest.approx(0.995)
    assert byol.ema_at(100, 100, 0.99, "cosine") == 1
    assert byol.ema_at(70, 100, 0.99, "constant") == 0.99


@pytest.mark.parametrize("module", METHODS)
def test_the_optimizer_decays_weights_only_and_holds_what_is_trained_once(module):
    network = NETWORKS[module](tiny_encoder(), 4, 8, 6)
    decayed, free = module.make_optimizer(network, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    held = [id(p) for group in (decayed, free) for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in network.parameters() if p.requires_grad})


@pytest.mark.parametrize("module", METHODS)
def test_steps_that_a_scaler_skips_leave_no_trace(module):
    """Overflowing gradients at the first and at a later step: the weights are those of plain SGD without these steps."""
    torch.manual_seed(0)
    network = NETWORKS[module](tiny_encoder(), 4, 8, 6)
    trained = [p for p in network.parameters() if p.requires_grad]
    copies = [p.detach().clone().requires_grad_() for p in trained]
    plain = torch.optim.SGD(
        [dict(params=[p], weight_decay=0.1 * (p.ndim > 1)) for p in copies], 0.05, 0.9, foreach=False
    )
    optimizer, scaler = module.make_optimizer(network, 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for overflows in (True, False, False, True, False):
        gradients = [torch.randn_like(p) for p in trained]
        scale = scaler.scale(torch.ones(()))
        for p, copied, gradient in zip(trained, copies, gradients):
            p.grad, copied.grad = gradient * scale * (torch.inf if overflows else 1), gradient
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            plain.step()
    for p, copied in zip(trained, copies):
        torch.testing.assert_close(p, copied)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_projector_layers(module, layers):
    network = NETWORKS[module](tiny_encoder(), 4, 8, 6, layers)
    projector = network.online.projector if module is byol else network.projector
    assert sum(isinstance(m, nn.Linear) for m in projector) == layers
    assert sum(isinstance(m, nn.BatchNorm1d) for m in projector) == max(0, layers - 1)
    out = network(*torch.rand(2, 5, 3, 16, 16))
    assert all(o.shape == (5, 6 if layers else 4) for o in out)


def test_simclr_forward_sees_both_views_as_one_batch_and_the_others_each_view():
    torch.manual_seed(0)
    v1, v2 = torch.rand(2, 8, 3, 16, 16)
    for module in METHODS:
        network = NETWORKS[module](tiny_encoder(), 4, 8, 6)
        z1 = network(v1, v2)[0]
        other = network(v1, 5 * v2)[0]  # the first view's embeddings depend on the second view's images through BN only
        assert torch.allclose(z1, other, atol=1e-5) == (module is not simclr)


def test_byol_target_is_a_frozen_copy_that_gradients_never_reach():
    torch.manual_seed(0)
    network = byol.BYOL(tiny_encoder(), 4, 8, 6)
    pairs = list(zip(network.target.parameters(), network.online.parameters()))
    assert len(pairs) == len(list(network.online.parameters())) and all(torch.equal(t, o) for t, o in pairs)
    assert not {id(t) for t, _ in pairs} & {id(o) for _, o in pairs}
    optimizer = byol.make_optimizer(network, 0.0)
    before = [t.clone() for t, _ in pairs]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    p1, p2, target1, target2, _ = network(*torch.rand(2, 8, 3, 16, 16))
    assert not target1.requires_grad and not target2.requires_grad
    (byol.byol_loss(p1, target2) + byol.byol_loss(p2, target1)).backward()
    assert all(t.grad is None for t, _ in pairs)
    assert all(p.grad is not None for p in network.online.parameters())
    assert all(p.grad is not None for p in network.predictor.parameters())
    optimizer.step()
    assert all(torch.equal(t, b) for (t, _), b in zip(pairs, before))
    assert not all(torch.equal(t, o) for t, o in pairs)


def test_byol_target_follows_the_closed_form_over_training_steps():
    torch.manual_seed(0)
    network = byol.BYOL(tiny_encoder(), 4, 8, 6)
    optimizer = byol.make_optimizer(network, 0.0)
    expected = [p.detach().double().clone() for p in network.online.parameters()]
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        p1, p2, target1, target2, _ = network(*torch.rand(2, 8, 3, 16, 16))
        (byol.byol_loss(p1, target2) + byol.byol_loss(p2, target1)).backward()
        optimizer.step()
        ema = byol.ema_at(step, 6, 0.9, "cosine")
        byol.ema_update(network.target, network.online, ema)
        expected = [ema * e + (1 - ema) * o.detach().double() for e, o in zip(expected, network.online.parameters())]
    for target, e in zip(network.target.parameters(), expected):
        torch.testing.assert_close(target.double(), e, rtol=1e-5, atol=1e-6)


def test_byol_target_normalises_by_its_own_batch_not_by_running_statistics():
    torch.manual_seed(0)
    network = byol.BYOL(tiny_encoder(), 4, 8, 6)
    v1, v2 = torch.rand(2, 8, 3, 16, 16)
    before = network(v1, v2)[2]
    for buffer in network.target.buffers():
        buffer.fill_(3)
    torch.testing.assert_close(network(v1, v2)[2], before)


def test_byol_reports_variant_is_reached_by_flags():
    """--projection-layers 0: online is the encoder and one MLP (the predictor), the target is the bare encoder."""
    encoder = tiny_encoder()
    network = byol.BYOL(encoder, 4, 8, 6, 0)
    p1, _, target1, _, z1 = network(*torch.rand(2, 8, 3, 16, 16))
    assert p1.shape == target1.shape == (8, 4) and len(network.online.projector) == 0
    assert [type(m) for m in network.predictor] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert len(list(network.target.parameters())) == len(list(encoder.parameters()))


@pytest.mark.parametrize("module", METHODS)
def test_views_and_networks_are_one_graph(module):
    """No host synchronisation and no shape that depends on data."""
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)

    every = module.View(crop=(0.2, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2, blur_p=0.5,
                        solarize_p=0.2, turn=10, shift=0.1, zoom=0.1, noise=0.1)  # fmt: skip
    for views, size in (((every, every), 16), (module.AUGMENT["photo"], 12)):
        v1, v2 = one_graph(lambda x: module.two_views(x, views, size, 0.5, 0.2))(images)
        assert v1.shape == v2.shape == (16, 3, size, size)
    network = NETWORKS[module](tiny_encoder(), 4, 8, 6)
    for ours, theirs in zip(one_graph(network)(v1, v2), network(v1, v2)):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(one_graph(common.spread)(theirs), common.spread(theirs))


# ---------------------------------------------------------------- collapse


def train_byol(steps, predictor=True, stop_gradient=True):
    """The spread of z after a short training on digits."""
    torch.manual_seed(0)
    images = common.load_images("digits").train
    encoder, feature_dim = common.build_encoder("resnet18", 8, 8)
    network = byol.BYOL(encoder, feature_dim, 64, 32)
    if not predictor:
        network.predictor = nn.Identity()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    for step in range(steps):
        v1, v2 = byol.two_views(images[torch.randint(len(images), (64,))], byol.AUGMENT["symbol"])
        p1, p2, target1, target2, z1 = network(v1, v2)
        if not stop_gradient:  # the targets are the online embeddings themselves, with their gradient
            target1, target2 = z1, network.online(v2)
        loss = byol.byol_loss(p1, target2) + byol.byol_loss(p2, target1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        byol.ema_update(network.target, network.online, 0.9)
    return float(common.spread(z1.detach()))


def test_without_predictor_or_stop_gradient_the_spread_falls():
    healthy = train_byol(60)
    assert healthy > 0.3
    assert train_byol(60, predictor=False) < 0.5 * healthy
    assert train_byol(60, stop_gradient=False) < 0.5 * healthy


@pytest.mark.parametrize("module", METHODS)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # by deepcopy, of the target
def test_on_a_pretended_gpu(module, monkeypatch):
    """Fake tensors compute nothing, and complain where one of a CPU meets one of a GPU or where the host asks for a value."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    device = torch.device("cuda")
    view = module.View(crop=(0.2, 1), flip_p=0.5, turn=10, shift=0.1, zoom=0.1, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2,
                       blur_p=0.5, solarize_p=0.2, noise=0.1)  # fmt: skip
    with FakeTensorMode():
        images, orders = (
            torch.zeros(64, 3, 36, 36, dtype=torch.uint8, device=device),
            torch.randperm(64, device=device),
        )
        with device:
            encoder, feature_dim = common.build_encoder("resnet10", 32, 16)
            network = NETWORKS[module](encoder, feature_dim, 16, 12)
        mean, std = (torch.tensor([0.1, 0.2, 0.3], device=device).view(3, 1, 1) for _ in range(2))
        v1, v2 = module.two_views(next(common.take(images, orders.view(4, 16), device)), (view, view), 32, mean, std)
        out = network(v1, v2)
        if module is byol:
            loss = byol.byol_loss(out[0], out[3]) + byol.byol_loss(out[1], out[2])
            byol.ema_update(network.target, network.online, 0.99)
        elif module is simclr:
            loss = simclr.info_nce(*out, 0.5, common.gather(*out))
        else:
            loss = barlow_twins.barlow_twins_loss(*common.gather(*out)[:2], 0.005)
        row = torch.stack([loss, common.spread(out[0]), torch.zeros((), device=device)])
        features = common.embed(encoder, images, [0.1] * 3, [0.2] * 3, 32, torch.arange(3))
        assert {t.device.type for t in (v1, v2, loss, row, features)} == {"cuda"}
        assert v1.shape == (16, 3, 32, 32) and features.shape == (3, feature_dim)
