"""Several processes under torchrun: the gradient of one on the same global batch, one run folder, one end.

Run by torchrun this file is the script whose processes compare themselves with a process alone.
"""

import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, flags
from torch import nn

import common


def tiny_network(module):
    """Any encoder, in float64, BatchNorm by fixed statistics: those of a process's own part would differ."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 12))
    name = dict(simclr="SimCLR", byol="BYOL", barlow_twins="BarlowTwins")[module.__name__]
    return getattr(module, name)(encoder, 12, 16, 10).double().eval()


def loss_of(module, model, v1, v2):
    """As in the main of each method."""
    if module.__name__ == "byol":
        p1, p2, target1, target2, _ = model(v1, v2)
        return module.byol_loss(p1, target2) + module.byol_loss(p2, target1)
    z1, z2 = model(v1, v2)
    if module.__name__ == "simclr":
        return module.info_nce(z1, z2, 0.5, common.gather(z1, z2))
    all_z1, all_z2, _ = common.gather(z1, z2)
    return module.barlow_twins_loss(all_z1, all_z2, 0.03, (common.RANK, common.WORLD_SIZE))


def script(out, data):
    """Each process: gradients of a global batch of 8, then whole runs by main with BatchNorm held fixed."""
    device = torch.device("cpu")
    common.join_processes(device)
    torch.manual_seed(1)
    views = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64)
    part = 8 // common.WORLD_SIZE
    v1, v2 = views[:, common.RANK * part : (common.RANK + 1) * part]
    found = {}
    for name in METHODS:
        module = importlib.import_module(name)
        network = tiny_network(module)
        model = common.distribute(network, device)  # to be kept: it is what averages the gradients
        loss_of(module, model, v1, v2).backward()
        found[name] = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    torch.save(found, f"{out}/gradients-{common.WORLD_SIZE}-{common.RANK}.pt")

    forward, distribute, networks = nn.modules.batchnorm._BatchNorm.forward, common.distribute, {}
    nn.modules.batchnorm._BatchNorm.forward = lambda self, x: forward(self.eval(), x)
    common.Run.finish = lambda *args: None  # more runs are to come in these processes
    for name in METHODS:
        common.distribute = lambda network, device: distribute(networks.setdefault(name, network), device)
        module = importlib.import_module(name)
        module.main(module.Args(dataset="npz", data_dir=data, run_dir=f"{out}/{name}-{common.WORLD_SIZE}", epochs=2,
                                device="cpu", width=16, hidden_dim=16, projection_dim=16, batch_size=32, lr=0.01,
                                warmup_epochs=1.0, eval_every=0, augment="none"))  # fmt: skip
    hashes = {name: hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in network.state_dict().values()))
              .hexdigest() for name, network in networks.items()}  # fmt: skip
    Path(f"{out}/hashes-{common.WORLD_SIZE}-{common.RANK}.json").write_text(json.dumps(hashes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    script(*sys.argv[1:])
    sys.exit()


def torchrun(*words, processes=2, **kwargs):
    """The command that starts `processes` of words[0], a script."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if not any("--rdzv" in str(word) for word in words):
        command.append("--standalone")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, cwd=ROOT, start_new_session=True, **kwargs)  # fmt: skip


def end(process, timeout=240):
    """(exit status, stdout, stderr) once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_npz):
    """The folder with what 1, 2 and 4 processes of this script wrote."""
    out = tmp_path_factory.mktemp("torchrun")
    for processes in (1, 2, 4):
        status, _, err = end(torchrun(__file__, out, tiny_npz, processes=processes))
        assert status == 0, err
    return out


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_that_of_one_process(compared, name, processes):
    """Every parameter, on every process, in float64, to 1e-6 of the gradient's largest entry."""
    alone = torch.load(compared / "gradients-1-0.pt")[name]
    assert len(alone) > 4 and all(g.abs().max() > 0 for g in alone.values())
    for rank in range(processes):
        theirs = torch.load(compared / f"gradients-{processes}-{rank}.pt")[name]
        assert theirs.keys() == alone.keys()
        for key, gradient in alone.items():
            assert (theirs[key] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), (key, rank)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_training_is_that_of_one_process(compared, name, processes):
    """The real main with BatchNorm held fixed and no augmentation: the same losses and weights in the end; and the same
    bytes on all processes, of the target of BYOL too.
    """
    logs = [[json.loads(line)["loss"] for line in (compared / f"{name}-{n}" / "log.jsonl").read_text().splitlines()]
            for n in (1, processes)]  # fmt: skip
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=1e-4)
    alone, theirs = (torch.load(compared / f"{name}-{n}" / "checkpoint.pt", weights_only=True)["state"]["network"]
                     for n in (1, processes))  # fmt: skip
    for key, value in alone.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5, msg=key)
    hashes = {json.loads((compared / f"hashes-{processes}-{rank}.json").read_text())[name] for rank in range(processes)}
    assert len(hashes) == 1


def test_a_run_and_its_resume_by_another_number(tiny, tmp_path, run_cli):
    """Two processes, one run folder and one output; stopped by SIGTERM they stop together; one process goes on."""
    simclr = importlib.import_module("simclr")
    words = flags(**tiny(run_dir=tmp_path / "run", epochs=300, checkpoint_every=300))
    process = torchrun("simclr.py", *words)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    status, out, err = end(process)
    assert status != 0 and err.count("stopped; go on with: torchrun --nproc-per-node=2 simclr.py ") == 1, err
    assert out.count("simclr on cpu in fp32") == 1
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    logged = log.read_text().splitlines()
    assert 0 < step < 900 and len(logged) == step // 3
    again = flags(**tiny(run_dir=tmp_path / "run", epochs=300, checkpoint_every=300, resume=True))
    assert run_cli(simclr, *again).status == 0
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == list(range(1, 301))
    assert log.read_text().splitlines()[: len(logged)] == logged
    assert json.loads((tmp_path / "run" / "args.json").read_text())["processes"] == 1


def test_processes_draw_their_own_views_of_their_own_images(monkeypatch):
    orders, draws, weights = [], [], []
    monkeypatch.setattr(common, "WORLD_SIZE", 4)
    for rank in range(4):
        monkeypatch.setattr(common, "RANK", rank)
        orders.append(common.epoch_order(100, 16, seed=1, epoch=3))
        common.seed_step(1, 7)
        draws.append(torch.rand(4))
        common.seed_step(1, 7, stream=1)
        weights.append(torch.rand(4))
    monkeypatch.undo()
    whole = common.epoch_order(100, 16, seed=1, epoch=3)
    assert torch.equal(torch.cat(orders, 1), whole) and len(whole.unique()) == 96
    assert len({tuple(draw.tolist()) for draw in draws}) == 4 and len({tuple(w.tolist()) for w in weights}) == 1


def test_what_is_refused_is_said_once(tiny, tmp_path):
    """A batch that does not divide: one line, exit status not 0, nothing written."""
    status, _, err = end(torchrun("byol.py", *flags(**tiny(run_dir=tmp_path / "run", batch_size=33))))
    assert status != 0 and len(errors(err)) == 1 and "--batch-size 33" in errors(err)[0], err
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(refused, tiny, monkeypatch):
    for name, value in (("WORLD_SIZE", 2), ("RANK", 1), ("LOCAL_RANK", 1)):
        monkeypatch.setattr(common, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # in which the first process would speak
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(importlib.import_module("simclr"), *flags(**tiny(device="cuda")), says=["1 GPUs", "--nproc-per-node"])


def test_processes_with_different_arguments(tiny, tmp_path):
    """As on two machines whose commands differ: the flag is named, and nothing is written."""
    script = tmp_path / "start.py"
    script.write_text("import os, runpy, sys\nsys.argv[1:] = [*sys.argv[2:], '--seed', os.environ['RANK']]\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nrunpy.run_path({str(ROOT / 'simclr.py')!r}, run_name='__main__')")  # fmt: skip
    status, _, err = end(torchrun(script, "-", *flags(**tiny(run_dir=tmp_path / "run"))))
    assert status != 0 and len(errors(err)) == 1 and "--seed 1" in errors(err)[0], err
    assert not (tmp_path / "run").exists()


def test_one_process_dies(tiny, tmp_path):
    """The others end soon, and nothing hangs."""
    process = torchrun("barlow_twins.py", *flags(**tiny(run_dir=tmp_path / "run", epochs=100_000)))
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    victim = max(int(pid) for pid in children.stdout.split())
    os.kill(victim, signal.SIGKILL)
    status, _, err = end(process, timeout=60)
    assert status != 0 and "exitcode  : -9" in err and len(errors(err)) <= 1, err


def test_two_machines(tiny, tmp_path):
    """Two torchrun agents, as on two machines, that find each other by torchrun's rendezvous."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=1", "byol.py",
             *flags(**tiny(run_dir=tmp_path / "run", epochs=2))]  # fmt: skip
    agents = [torchrun(*words, processes=1) for _ in range(2)]
    ends = [end(agent) for agent in agents]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert sum(out.count("wrote ") for _, out, _ in ends) == 1
    assert json.loads((tmp_path / "run" / "args.json").read_text())["processes"] == 2
    with np.load(tmp_path / "run" / "embeddings.npz") as file:
        assert file["train_features"].shape == (96, 128) and np.isfinite(file["train_features"]).all()
