"""The method files: what they share, networks, schedules, train_step, and a reader's changes."""

import ast
import contextlib
import copy
import difflib
import importlib
import inspect
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import LOSS, METHODS, ROOT, at_step, one_graph
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import barlow_twins
import byol
import common
import simclr

SCALER = torch.amp.GradScaler("cpu", enabled=False)
VIEW = simclr.View(
    (0.2, 1.0), 0.5, 10, 0.1, 0.1, 0.5, (0.4,) * 4, 0.8, 0.2, (0.5, 0.5), (0.2, 0.2), 0.1, 0.5
)


class Small(nn.Sequential):
    """An encoder of a reader: 4 features of images of any size."""

    def __init__(self):
        conv, pool = nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1)
        super().__init__(conv, nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Flatten())
        # As a mask of attention.
        self.register_buffer("mask", torch.tensor(-torch.inf))


def build(module, encoder=None, feature_dim=4, layers=2):
    """The network of a method file around an encoder."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    torch.manual_seed(0)
    return classes[0](encoder or Small(), feature_dim, 8, 6, layers)


def own(module):
    """The method's own arguments of train_step: half of those of the digits, not its defaults."""
    recipe, names = module.RECIPES["digits"], inspect.signature(module.train_step).parameters
    return {name: recipe[name] / 2 for name in names if name in recipe and name != "lr"}


def draw():
    """Two views of 8 images."""
    return torch.rand(2, 8, 3, 16, 16)


@pytest.fixture
def small(monkeypatch):
    """Small in the place of build_encoder's ResNet."""
    monkeypatch.setattr(common, "build_encoder", lambda *args: (Small(), 4))


# ---------------------------------------------------------------- what the files share


def source(name):
    """The text of each function and class of a method file, decorators included."""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = (node.decorator_list or [node])[0].lineno
            found[node.name] = text.splitlines()[first - 1 : node.end_lineno]
    return found


SOURCES = [source(name) for name in METHODS]
NAMES = sorted(set().union(*SOURCES) - {"Args", "train_step", "main"})


@pytest.mark.parametrize("name", [n for n in NAMES if sum(n in s for s in SOURCES) > 1])
def test_shared_functions_are_the_same_text(name):
    """A function of most of the method files is in all of them, line for line."""
    texts = [s[name] for s in SOURCES if name in s]
    assert texts.count(texts[0]) == len(texts), f"{name}: change it in all of {METHODS}"
    assert len(texts) == len(SOURCES) or 2 * len(texts) <= len(SOURCES)


def test_shared_flags_have_the_same_name_order_type_and_help():
    """Only the flags from --width to --projection-dim are a method's own."""
    shared = []
    for s in SOURCES:
        lines = [*map(ast.unparse, ast.parse("\n".join(s["Args"])).body[0].body[1:])]
        names = [line.split(":")[0] for line in lines]
        a, b = names.index("width"), names.index("projection_dim")
        shared.append(lines[: a + 2] + lines[b:])
    assert shared.count(shared[0]) == len(shared), f"change the flags in all of {METHODS}"


@pytest.mark.parametrize("other", range(1, len(METHODS)))
def test_main_differs_in_a_few_lines(other):
    """main is the same but for the method's name, check, network and arguments."""
    diff = difflib.ndiff(SOURCES[0]["main"], SOURCES[other]["main"])
    assert 0 < sum(line[0] == "+" for line in diff) <= 16, f"change main in all of {METHODS}"


def test_recipes_fill_every_unset_flag(method):
    """Each data set has a recipe: a value for every flag whose default is unset, no others."""
    fields = method.Args.__dataclass_fields__
    unset = {name for name, field in fields.items() if field.default is None}
    assert set(method.RECIPES) == set(fields["dataset"].type.__args__)
    for recipe in method.RECIPES.values():
        assert set(recipe) == unset - {*"run_dir image_size labels window fit init".split()} | {
            "augment"
        }


ALONE = """
import sys, torch
for name, network, own in {}:
    sys.path[0] = name
    method = __import__(name)
    encoder = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    network = getattr(method, network)(encoder, 12)
    optimizer = method.make_optimizer(network, 1e-4)
    v1, v2 = method.two_views(torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss, z1 = method.train_step(network, optimizer, scaler, v1, v2, 0.1, **own)
    assert loss.isfinite() and len(z1) == 16
assert not {{"common", "tyro", "wandb", "sklearn", "torchvision"}} & set(sys.modules)
"""


def test_file_alone_gives_views_network_and_train_step(tmp_path):
    """A copied method file trains in a folder of its own, with PyTorch only."""
    cases = []
    for name in METHODS:
        module = importlib.import_module(name)
        (tmp_path / name).mkdir()
        shutil.copy(module.__file__, tmp_path / name)
        cases.append((name, type(build(module)).__name__, own(module)))
    command = [sys.executable, "-c", ALONE.format(cases)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- schedules and optimizer


def test_learning_rate_warms_up_to_the_peak_and_falls_to_zero():
    """Linear, then a cosine that is half way down at half its time; no step without training."""
    rates = [simclr.learning_rate(step, 100, 10, 0.33) for step in (0, 4, 10, 55, 100)]
    assert rates == pytest.approx([0.03, 0.15, 0.33, 0.165, 0])
    assert simclr.learning_rate(0, 10, 0, 0.3) == 0.3


def test_ema_at_rises_from_ema_to_one_or_stays():
    """--ema-schedule cosine and constant."""
    rising = [byol.ema_at(step, 100, 0.99, "cosine") for step in (0, 50, 100)]
    assert rising == pytest.approx([0.99, 0.995, 1])
    assert byol.ema_at(70, 100, 0.99, "constant") == 0.99


def test_unset_ema_depends_on_the_number_of_steps(finished):
    """From 0.9 to 0.996, an average over a 300th of the run; args.json holds it."""
    found = [byol.default_ema(steps) for steps in (0, 300, 6000, 10**6)]
    assert found == pytest.approx([0.9, 0.9, 0.95, 0.996])
    assert json.loads((finished("byol") / "args.json").read_text())["args"]["ema"] == 0.9


def test_warmup_is_at_most_half_of_the_run(tiny, small, monkeypatch):
    """A longer warm-up, the recipe's or given, is cut to half of the run."""
    calls = []
    monkeypatch.setattr(simclr, "learning_rate", lambda *args: calls.append(args) or 0.1)
    simclr.main(simclr.Args(**tiny(warmup_epochs=None, epochs=6)))
    assert calls[-1][:3] == (17, 18, 9)
    cases = (0, None, 0), (12, None, 6), (30, None, 10), (9, 8, 4.5), (9, 2, 2)
    for epochs, given, warmup in cases:
        args = simclr.Args(dataset="folder", epochs=epochs, warmup_epochs=given)
        assert common.resolve(args, simclr.RECIPES).warmup_epochs == warmup


def test_unset_batch_size_lr_and_epochs(method):
    """A quarter of the images, the recipe's steps up to 1,000 epochs, and lr by the batch size."""
    recipe = method.RECIPES["folder"]
    for n, given, batch_size, epochs in (
        (100, {}, 25, 1000),
        (1000, {}, 250, 1000),
        (1000, dict(batch_size=50, epochs=3), 50, 3),
        # 498 x 39 steps: the recipe has 200 x 97.
        (20000, {}, 512, 498),
        (10**6, {}, 512, recipe["epochs"]),
    ):
        args = common.resolve(method.Args(dataset="folder", **given), method.RECIPES, n)
        assert (args.batch_size, args.epochs) == (batch_size, epochs)
        assert args.lr == pytest.approx(recipe["lr"] * batch_size / recipe["batch_size"])


def test_make_optimizer_decays_weights_only(method):
    """Every trained parameter once; no weight decay on biases and norms."""
    network = build(method)
    decayed, other = method.make_optimizer(network, 0.1).param_groups
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in other["params"]} == {1} and min(p.ndim for p in decayed["params"]) > 1
    held = [id(p) for p in decayed["params"] + other["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters() if p.requires_grad)


def test_steps_skipped_by_scaler_leave_no_trace():
    """fp16 overflows at the first and a later step: the weights of SGD without these steps."""
    network = build(simclr)
    twin = copy.deepcopy(network)
    optimizer, scaler = simclr.make_optimizer(network, 0), torch.amp.GradScaler("cpu")
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05
    plain = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    for factor in (torch.inf, 1, 1, torch.inf, 1):
        scale = scaler.scale(torch.tensor(factor))
        for p, q in zip(network.parameters(), twin.parameters()):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scale
        scaler.step(optimizer)
        scaler.update()
        if factor == 1:
            plain.step()
    torch.testing.assert_close(network.state_dict(), twin.state_dict())


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_projection_layers(method, layers):
    """--projection-layers linear layers, BatchNorm between them; 0: z is h."""
    network = build(method, layers=layers)
    modules = network.named_modules()
    kinds = [type(m) for name, m in modules if "projector." in name and "target" not in name]
    assert kinds.count(nn.Linear) == layers and kinds.count(nn.BatchNorm1d) == max(0, layers - 1)
    assert all(z.shape == (8, 6 if layers else 4) for z in network(*draw()))


@pytest.mark.parametrize("method", [simclr, byol, barlow_twins])
def test_batchnorm_sees_both_views_in_simclr_only(method):
    """SimCLR has one forward over both views; the others have one for each view."""
    network, (v1, v2) = build(method), draw()
    z1, with_other_v2 = network(v1, v2)[0], network(v1, 5 * v2)[0]
    assert torch.allclose(z1, with_other_v2, atol=1e-5) == (method is not simclr)


def test_byol_forward():
    """Each view's prediction; the target's embeddings have no gradient, and are of train mode."""
    network, views = build(byol), draw()
    assert not any(p.requires_grad for p in network.target.parameters())
    for tensor in (*network.target.parameters(), *network.target.buffers()):
        tensor.data += 1
    *found, z1 = network(*views)
    z = [*map(network.online, views)]
    expected = [*map(network.predictor, z), *map(network.target, views), z[0]]
    torch.testing.assert_close([*found, z1], expected)
    assert [part.requires_grad for part in found] == [True, True, False, False]


# ---------------------------------------------------------------- train_step


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_train_step_equals_a_step_by_hand(method, amp_dtype):
    """Forward under autocast, loss, backward and optimizer, with the learning rate of the step."""
    network = build(method)
    twin, values = copy.deepcopy(network), own(method)
    optimizer, by_hand = (method.make_optimizer(n, 0.1) for n in (network, twin))
    for lr in (0.1, 0.2):
        v1, v2 = draw()
        options = dict(values, amp_dtype=amp_dtype)
        found, z1 = method.train_step(network, optimizer, SCALER, v1, v2, lr, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp_dtype is not None):
            out = twin(v1, v2)
        loss = LOSS[method.__name__](method, out, **values)
        by_hand.zero_grad()
        loss.backward()
        for group in by_hand.param_groups:
            group["lr"] = lr
        by_hand.step()
        if hasattr(method, "ema_update"):
            method.ema_update(twin.target, twin.online, values["ema"])
        torch.testing.assert_close(found, loss.detach())
        assert len(z1) == 8 and not (found.requires_grad or z1.requires_grad)
    torch.testing.assert_close(network.state_dict(), twin.state_dict())


@pytest.mark.parametrize("size", [12, 96])
def test_two_views_are_one_graph_for_all_batches(size):
    """Compiled with fullgraph, in every op, once: the host never waits."""
    torch._dynamo.utils.counters.clear()
    compiled, mean = one_graph(simclr.two_views), torch.rand(3, 1, 1)
    for _ in range(3):
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        v1, v2 = compiled(images, VIEW, size, mean, 1 + mean)
        assert v1.shape == (8, 3, size, size) and not torch.equal(v1, v2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_train_step_compiles_the_network_once(method):
    """Another batch, learning rate, temperature, EMA or lambda compiles nothing again."""
    torch._dynamo.utils.counters.clear()
    network, values = build(method), own(method)
    compiled, optimizer = one_graph(network), method.make_optimizer(network, 0.1)
    for i in range(1, 4):
        settings = {name: value / i for name, value in values.items()}
        method.train_step(compiled, optimizer, SCALER, *draw(), 0.1 / i, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 needs a driver for fake CUDA")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_train_step_on_fake_cuda_tensors(method, monkeypatch):
    """Fake tensors refuse a mix of CPU and GPU, and a host that asks for a value."""
    # BYOL copies the online network.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    # Without a GPU, autograd refuses.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    with FakeTensorMode():
        with torch.device("cuda"):
            network = build(method, *common.build_encoder("resnet10", 32, 16))
            images, mean = torch.zeros(16, 3, 36, 36, dtype=torch.uint8), torch.rand(3, 1, 1)
        optimizer = method.make_optimizer(network, 0.1)
        views = method.two_views(images, VIEW, 32, mean, mean)
        loss, z1 = method.train_step(network, optimizer, SCALER, *views, 0.1, **own(method))
        tensors = (*views, loss, z1, common.spread(z1))
    assert {t.device.type for t in tensors} == {"cuda"}


# ---------------------------------------------------------------- the loop never waits


# Methods of a tensor that read its values, and operators that need them on the host.
READS = "item tolist cpu numpy __bool__ __float__ __int__ __index__ __array__ __contains__".split()
WAITS = (
    "_local_scalar_dense nonzero nonzero_static masked_select is_nonzero equal unique_dim _unique2 "
    "unique_consecutive bincount repeat_interleave"
).split()


class NoReads(TorchFunctionMode):
    """Refuses Python calls that read a tensor; most leave no operator on a CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        to_cpu = name == "to" and "cpu" in map(str, args[1:])
        assert name not in READS and not to_cpu, f"the loop waits: Tensor.{name}"
        return function(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """Refuses operators that wait, also inside of other operators and the optimizer."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        assert name not in WAITS and not masked, f"the loop waits: {name}"
        return function(*args, **(kwargs or {}))


# test_gpu.py has PyTorch itself watch.
WATCH = [NoReads, NoWaits]


@pytest.fixture
def watched_run(tiny, monkeypatch, small):
    """watched_run(module, **changes): a tiny run that must not wait between log points."""
    record, inside = common.Run.record, contextlib.ExitStack()

    def watching(run, step, *rest):
        device, i = run.device, (step + 1) % run.steps_per_epoch
        if i == 0:
            inside.close()
        else:
            # On a CPU every step is a log point.
            run.device = SimpleNamespace(type="cuda")
        record(run, step, *rest)
        run.device = device
        # The order of an epoch goes to the device before its first step.
        if i == 1:
            for watch in WATCH:
                inside.enter_context(watch())

    def run(module, **changes):
        monkeypatch.setattr(common.Run, "record", watching)
        with inside:
            return module.main(module.Args(**tiny(**changes)))

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loop_never_waits_for_the_device(method, watched_run, monkeypatch, precision):
    """Views, train_step and record read nothing from the device between log points."""
    # Every op: gray images have no color ops, small ones no blur.
    monkeypatch.setattr(method, "choose_view", lambda *args: VIEW)
    watched_run(method, precision=precision)


def test_loop_that_waits_is_caught(watched_run, monkeypatch):
    """The test above fails where the loss waits."""
    loss = simclr.info_nce

    def waiting_loss(z1, z2, temperature):
        z1.sum().item()
        return loss(z1, z2, temperature)

    monkeypatch.setattr(simclr, "info_nce", waiting_loss)
    with pytest.raises(AssertionError, match="the loop waits"):
        watched_run(simclr)


# ---------------------------------------------------------------- a reader's changes


@pytest.fixture
def resumed(tiny, small, monkeypatch):
    """resumed(module): the folder of a stopped and resumed run; the bytes are a whole run's."""

    def run(module, **changes):
        args = [module.Args(**tiny(run_dir=name, resume=True, **changes)) for name in "ab"]
        whole = module.main(args[0])
        # A resumed run does not arrive at this step again.
        at_step(monkeypatch, 4, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            module.main(args[1])
        folder = module.main(args[1])
        for name in ("embeddings.npz", "encoder.pt"):
            assert (whole / name).read_bytes() == (folder / name).read_bytes(), name
        return folder

    return run


def test_another_optimizer_trains_and_resumes(resumed, monkeypatch):
    """Any optimizer in the place of make_optimizer's."""

    def make_optimizer(network, weight_decay):
        return torch.optim.AdamW(network.parameters(), 0.01, weight_decay=weight_decay)

    monkeypatch.setattr(simclr, "make_optimizer", make_optimizer)
    resumed(simclr)


def test_another_encoder_trains_resumes_and_is_named(method, resumed, tiny, monkeypatch):
    """Any encoder in the place of build_encoder's; load_encoder fills it, or says what it needs."""

    def partly_frozen(*args):
        encoder = Small()
        encoder[1].eval()
        return encoder, 4

    monkeypatch.setattr(common, "start_encoder", partly_frozen)
    path = resumed(method, eval_every=1).resolve() / "encoder.pt"
    content = torch.load(path)
    assert not content["state_dict"]["1.num_batches_tracked"]
    assert content["encoder"] == "Small"
    encoder, _ = common.load_encoder(path, Small())
    torch.testing.assert_close(encoder.state_dict(), content["state_dict"])
    with pytest.raises(common.UserError, match="--init is for start_encoder's encoder"):
        method.main(method.Args(**tiny(init="imagenet")))
    monkeypatch.undo()
    with pytest.raises(common.UserError, match="encoder Small is not one of resnet10"):
        common.load_encoder(path)


def test_unknown_encoder_is_a_user_error(tiny):
    """In Python, too, a misspelled name gives one line."""
    with pytest.raises(common.UserError, match="encoder vit is not one of resnet10"):
        simclr.main(simclr.Args(**tiny(encoder="vit")))
