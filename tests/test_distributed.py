"""Several processes: the gradient and the training of one, own images and views, torchrun."""

import importlib
import inspect
import json
import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import METHODS, ROOT, at_step, flags, read_log
from test_methods import build, own

import common
import simclr


def train(module):
    """Three real steps on a global batch of 8: losses, gradients of the first step, weights.

    In float64, with BatchNorm in eval mode: on CPUs its batch statistics are those of a process.
    """
    torch.manual_seed(0)
    network = build(module, *common.build_encoder("resnet10", 8, 16)).double().eval()
    options = own(module)
    if "gather" in inspect.signature(module.train_step).parameters:
        options["gather"] = common.gather
    optimizer = module.make_optimizer(network, 0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model = common.distribute(network, torch.device("cpu"))

    losses, gradients = [], {}
    for _ in range(3):
        # [N, 2, 3, 8, 8]: this rank's images, each with its two views.
        views = torch.rand(8, 2, 3, 8, 8, dtype=torch.float64)
        v1, v2 = views.chunk(common.WORLD_SIZE)[common.RANK].unbind(1)
        loss, _ = module.train_step(model, optimizer, scaler, v1, v2, 0.05, **options)
        losses.append(loss.item())
        for key, p in network.named_parameters():
            if p.grad is not None:
                gradients.setdefault(key, p.grad.clone())
    return dict(losses=losses, gradients=gradients, weights=network.state_dict())


def process(rank, world_size, out, args):
    """What one of several processes finds, in out/<rank>.pt."""
    torch.set_num_threads(1)
    common.RANK, common.LOCAL_RANK, common.WORLD_SIZE = rank, rank, world_size
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world_size)
    found = {name: train(importlib.import_module(name)) for name in METHODS}
    found["broadcast"] = common.broadcast(rank)
    # Only the last rank gets it.
    stop = lambda: rank == world_size - 1 and signal.raise_signal(signal.SIGTERM)  # noqa: E731
    at_step(pytest.MonkeyPatch(), 4, stop)
    with pytest.raises(SystemExit) as end:
        simclr.main(args)
    found["status"] = end.value.code
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    return {name: train(importlib.import_module(name)) for name in METHODS}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory, tiny):
    """The folder of 2 or 4 processes, and what each found."""
    out, world_size = tmp_path_factory.mktemp("ranks"), request.param
    args = simclr.Args(**tiny(run_dir=str(out / "run"), checkpoint_every=100))
    context = multiprocessing.get_context("forkserver")
    # Imported once, not in each process.
    context.set_forkserver_preload(["torch._dynamo.backends.common", "torchvision", "sklearn"])
    processes = [
        context.Process(target=process, args=(rank, world_size, out, args))
        for rank in range(world_size)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(120)
        one.kill()
    assert [one.exitcode for one in processes] == [0] * world_size
    return out, [torch.load(out / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.parametrize("part", ["gradients", "weights"])
@pytest.mark.parametrize("name", METHODS)
def test_training_equals_one_process(alone, ranks, name, part):
    """On every rank: the gradient, and the weights and BYOL's target after three steps."""
    expected = alone[name][part]
    assert sum(bool(value.any()) for value in expected.values()) > 20
    for rank in ranks[1]:
        assert rank[name][part].keys() == expected.keys()
        for key, value in expected.items():
            worst = (rank[name][part][key] - value).abs().max()
            assert worst <= 1e-6 * value.abs().max(), key


@pytest.mark.parametrize("name", METHODS)
def test_loss_equals_one_process(alone, ranks, name):
    """Every rank has the loss of the gathered batch; without gather, their mean is that loss."""
    losses = torch.tensor([rank[name]["losses"] for rank in ranks[1]])
    expected = torch.tensor(alone[name]["losses"])
    torch.testing.assert_close(losses.mean(0), expected, rtol=1e-6, atol=0)
    if "gather" in inspect.signature(importlib.import_module(name).train_step).parameters:
        torch.testing.assert_close(losses, expected.expand(len(losses), -1), rtol=1e-6, atol=0)


def test_sigterm_on_one_rank_stops_all_at_the_same_step(ranks):
    """Every rank exits with 143 after the step of the signal, and the checkpoint is of it."""
    out, found = ranks
    assert [rank["status"] for rank in found] == [143] * len(found)
    assert torch.load(out / "run" / "checkpoint.pt")["step"] == 5
    assert len(read_log(out / "run")) == 1


def test_broadcast_is_of_rank_0(ranks):
    """A Python object."""
    assert all(rank["broadcast"] == 0 for rank in ranks[1])


def test_ranks_draw_their_own_views_of_their_own_images(monkeypatch):
    """Batches of the ranks are those of one process, cut; views differ, weights do not."""
    whole, orders, draws = common.epoch_order(100, 16, seed=1, epoch=3), [], []
    monkeypatch.setattr(common, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        orders.append(common.epoch_order(100, 16, seed=1, epoch=3))
        for purpose in ("views", "weights"):
            common.seed_draws(1, purpose, 7)
            draws.append(float(torch.rand(())))
    assert torch.equal(torch.cat(orders, 1), whole) and len(whole.unique()) == 96
    assert len(set(draws[::2])) == 4 and len(set(draws[1::2])) == 1


# ---------------------------------------------------------------- torchrun


def torchrun(script, **values):
    """Start two processes of a script by torchrun."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, script, *flags(**values)], cwd=ROOT, **pipes)


def test_torchrun_sigterm_and_resume_on_one_process(
    tiny, photos, finished, tmp_path, run_cli, monkeypatch
):
    """Two processes read one labeled folder, write one run; stopped, one process continues it."""
    files = [path.relative_to(photos) for path in photos.rglob("*.png")]
    lines = ["file,label,split", *(f"{f},{f.parts[1]},{f.parts[0]}" for f in files)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    options = dict(dataset="folder", data_dir=photos, cache_dir=tmp_path / "cache", batch_size=10)
    options |= dict(labels=tmp_path / "labels.csv", init=finished("simclr") / "encoder.pt")
    options = tiny(run_dir=tmp_path / "run", epochs=10_000, checkpoint_every=10_000, **options)
    job = torchrun("simclr.py", **options)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text()) and job.poll() is None:
        time.sleep(0.05)
    job.terminate()
    out, err = job.communicate(timeout=60)
    assert err.count("stopped; ") == out.count("simclr on cpu") == 1, err
    step = torch.load(tmp_path / "run" / "checkpoint.pt")["step"]
    before = log.read_text()
    # The resumed run logs the epoch that ended with the last step.
    assert before.count("\n") == (step - 1) // 3 > 0

    at_step(monkeypatch, step + 6, signal.SIGINT)
    run_cli(simclr, **options, resume=True, status=130)
    assert log.read_text().startswith(before)
    epochs = [record["epoch"] for record in read_log(tmp_path / "run")]
    assert epochs == list(range(1, (step + 6) // 3 + 1))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["processes"] == 1
    assert len([*(tmp_path / "cache").glob("*.bin")]) == 1


def test_torchrun_prints_an_error_once(tiny, tmp_path):
    """A batch size that does not divide is one error line of two processes."""
    job = torchrun("byol.py", **tiny(run_dir=tmp_path / "run", batch_size=33))
    _, err = job.communicate(timeout=60)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "--batch-size 33" in line and job.returncode and not (tmp_path / "run").exists()
