"""Files from elsewhere, damaged in a thousand ways: each is read right or refused in one line, and none runs code.

`python tests/test_fuzz.py FOLDER` damages the whole files in FOLDER, each kind in a process of its own, whose memory and
time are then its own too. All is drawn from SEED: number 17 of a kind is the same file every time.
"""

import copy
import faulthandler
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import traceback
import warnings
import zipfile
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, flags

import common

SEED = 0
COUNTS = {"checkpoint.pt": 300, "encoder.pt": 300, "embeddings.npz": 400, "images.npz": 400}
MOST_SECONDS, MOST_MEMORY = 10, 2**30  # of one file; of all files of a kind, over what the process had at its start
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ResourceWarning)  # Python does not show these

# ------------------------------------------------------------------------------------------ damage to bytes


def flip(data, a, b, n, rng):
    data[a] ^= 1 << int(rng.integers(8))


def overwrite(data, a, b, n, rng):
    data[a : a + n] = rng.bytes(len(data[a : a + n]))


def count_up(data, a, b, n, rng):  # a length, an offset, a code that is off by little
    data[a] = (data[a] + int(rng.choice([-2, -1, 1, 2]))) % 256


def zero(data, a, b, n, rng):
    data[a : a + n] = bytes(len(data[a : a + n]))


def truncate(data, a, b, n, rng):
    del data[a:]


def remove(data, a, b, n, rng):
    del data[a : a + n]


def duplicate(data, a, b, n, rng):
    data[b:b] = data[a : a + n]


def swap(data, a, b, n, rng):
    a, b = sorted([a, b])
    n = min(n, b - a, len(data) - b)
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


def append(data, a, b, n, rng):
    data += rng.bytes(n)


FAULTS = [flip, flip, flip, overwrite, overwrite, count_up, count_up, zero, truncate, remove, duplicate, swap, append]


def damaged(data, rng, hot=None):
    """One to three faults. `hot` are places where something is to break: elsewhere lie megabytes of weights."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if data:
            places = hot if hot is not None and rng.random() < 0.8 else np.arange(len(data))
            a, b = (min(int(rng.choice(places)), len(data) - 1) for _ in range(2))
            FAULTS[rng.integers(len(FAULTS))](data, a, b, int(2 ** rng.integers(0, 8)), rng)
    return bytes(data)


# ------------------------------------------------------------------------------------------ damage to archives


@lru_cache(1)
def _unpack(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def unpack(whole):
    """The members of an archive: name and content."""
    return list(_unpack(whole))


def pack(members, compression=()):
    """An archive whose checksums are right, whatever is in it. `compression`: name -> how that member is packed."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of two members of the same name
        for name, content in members:
            archive.writestr(name, content, dict(compression).get(name, zipfile.ZIP_STORED))
    return buffer.getvalue()


def hot_places(whole):
    """All of an archive but the arrays in it: headers, pickles, the directory."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        spans = [(archive.start_dir, len(whole))]
        for info in archive.infolist():
            content = info.file_size if info.filename.endswith(".pkl") else min(128, info.file_size)
            spans.append((info.header_offset, info.header_offset + 100 + content))
    return np.concatenate([np.arange(*span) for span in spans])


def damaged_member(whole, rng):
    """One member is damaged, and the archive around it is in order."""
    members = unpack(whole)
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(".pkl")]
    i = pickles[0] if pickles and rng.random() < 0.7 else int(rng.integers(len(members)))
    name, content = members[i]
    hot = None if name.endswith(".pkl") else np.arange(min(len(content), 128) or 1)
    members[i] = name, damaged(content, rng, hot)
    return pack(members)


def damaged_archive(whole, rng):
    """Members are missing, there twice, renamed, exchanged, or packed in another way."""
    members, how = unpack(whole), int(rng.integers(5))
    i, j = (int(rng.integers(len(members))) for _ in range(2))
    if how == 0:
        del members[i]
    elif how == 1:
        members.append((members[i][0], members[j][1]))
    elif how == 2:
        members[i] = damaged(members[i][0].encode(), rng).decode(errors="replace") or "x", members[i][1]
    elif how == 3:
        members[i], members[j] = (members[i][0], members[j][1]), (members[j][0], members[i][1])
    how_packed = [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA][j % 3]
    return pack(members, {members[i][0]: how_packed} if how == 4 else ())


# ------------------------------------------------------------------------------------------ damage to values


LAUGHS = ("ha",)
for _ in range(40):
    LAUGHS = (LAUGHS, LAUGHS)  # little in a file, and to print it would take a terabyte


@lru_cache(1)
def load(whole):
    return torch.load(io.BytesIO(whole), weights_only=True)


def strange_value(old, rng):
    """What may stand in the place of a value in a .pt file."""
    values = [None, True, 0, -1, 7, 2**40, 2**70, 1e308, -0.5, float("nan"), "", "x" * 300, "a\nb", [], [[]], {}, (1, 2),
              {"a": 1}, torch.zeros(()), torch.zeros(0), torch.ones(3, dtype=torch.int64), torch.zeros(1).expand(2**40),
              torch.ones(2, 2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(2**40, device="meta"),
              LAUGHS]  # fmt: skip
    if isinstance(old, torch.Tensor):
        values += [old.double(), old.half(), old[..., None], old.flatten(), old * float("nan"), old.reshape(-1)[:1],
                   old.to_sparse(), old.to("meta"), old.to(torch.complex64),
                   torch.nn.Parameter(old.float()), old.float().requires_grad_(), old.reshape(-1)[:1].expand(2 * old.numel()), torch.cat([old.flatten()[:1]] * 2)]  # fmt: skip
    return values[rng.integers(len(values))]


def damaged_value(whole, rng):
    """A value somewhere in a .pt file is another, missing, or has another name."""
    content = node = copy.copy(load(whole))
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(node[key], (dict, list)) and len(node[key])) or rng.random() < 0.1:
            break
        node[key] = copy.copy(node[key])
        node = node[key]
    what = rng.random()
    if what < 0.8 or not isinstance(node, dict):
        node[key] = strange_value(node[key], rng)
    else:
        value = node.pop(key)
        if what < 0.9:
            node[int(rng.integers(3))] = value
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


SHAPES = [(10**12,), (2**63,), (2**70,), (2**31, 2**31, 8), (-1, 8), (-1, -8), (-96, 8, 8), (), (0,), (0, 8, 8), (0, 10**9),
          (96, 0), (1,) * 40, (2**16,), (10**9,), (96, 8, 8), (96, 1), (40, 8, 8, 3)]  # fmt: skip
TYPES = ["|O", "<f2", "<f4", ">f4", "<f8", "<f16", "<c8", "|b1", "|i1", "|u1", ">i8", "<u8", "<i2", "<M8[s]", "|S0", "<U0",
         "|V0", "|V8", "<U1", "<U99999999", [("a", "|O")], [("a", "<f4", (2**20,))], [("a", "<f4")], "nonsense", 3]  # fmt: skip


def npy_header(descr, order, shape):
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def damaged_header(whole, rng):
    """One array's header claims another shape, type or order; what follows is as it was, or none, or as claimed."""
    members = unpack(whole)
    i = int(rng.integers(len(members)))
    name, content = members[i]
    array = np.load(io.BytesIO(content))
    shape, descr = array.shape, np.lib.format.dtype_to_descr(array.dtype)
    what = int(rng.integers(1, 8))
    shape = SHAPES[rng.integers(len(SHAPES))] if what & 1 else shape
    descr = TYPES[rng.integers(len(TYPES))] if what & 2 else descr
    body = array.tobytes()
    body = [body, body, b"", bytes(2**16)][rng.integers(4)]
    try:
        claimed = int(np.prod(shape, dtype=object)) * np.dtype(descr).itemsize
        body = bytes(claimed) if 0 <= claimed <= 2**22 and rng.random() < 0.5 else body
    except Exception:
        pass
    members[i] = name, npy_header(descr, bool(what & 4), shape) + body
    return pack(members)


def claims(whole):
    """Each array in turn as many items, of which none takes a byte."""
    members = unpack(whole)
    for i, (name, _) in enumerate(members):
        for descr, shape in (("<U0", (10**9,)), ("|V0", (10**9,)), ("<U1", (10**8, 0)), ("<f4", (0, 10**9))):
            yield pack([*members[:i], (name, npy_header(descr, False, shape)), *members[i + 1 :]])


def strange_array(old, rng):
    """What may stand in the place of an array in an .npz file."""
    old = np.atleast_1d(old)
    size = old.shape[:1]
    arrays = [old.astype(object), old[:-1], old[..., None], old[:0], np.float64(3), np.array("{}"), np.zeros(size, "<f4"),
            np.full(size, -1), np.full(size, 2**62), np.full(size, 2**64 - 1, np.uint64), np.zeros(size, np.uint8),
            np.zeros((*size, 1), np.uint8), np.zeros((*size, 4, 9), np.uint8), np.zeros((*size, 1, 1, 3), np.uint8),
            np.full((*size, 3), np.nan), np.full((*size, 3), 1e300), np.full((*size, 8), 6e4, np.float16),
            np.zeros((*size, 1)), np.asfortranarray(old), old[::-1], np.arange(len(old)),
            np.array("[" * 10**5), np.array(["a\0b\nc"] * 12), np.zeros(size, "f4,f4")]  # fmt: skip
    return arrays[rng.integers(len(arrays))]


def damaged_array(whole, rng):
    """One array is another one, or called like another one."""
    members = unpack(whole)
    i = int(rng.integers(len(members)))
    buffer = io.BytesIO()
    np.save(buffer, strange_array(np.load(io.BytesIO(members[i][1])), rng), allow_pickle=True)
    members[i] = members[i][0], buffer.getvalue()
    return pack(members)


def mutations(whole, kind, count, seed=SEED):
    """`count` damaged forms of a file, drawn; and what is known to be worth a try."""
    ways = [None, damaged_member, damaged_archive] + (
        [damaged_value] * 2 if kind.endswith(".pt") else [damaged_header, damaged_header, damaged_array]
    )
    hot = hot_places(whole)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        way = ways[i % len(ways)]
        yield damaged(whole, rng, hot) if way is None else way(whole, rng)
    yield from claims(whole) if kind.endswith(".npz") else ()


# ------------------------------------------------------------------------------------------ reading, and what is promised


class Restored(Exception):
    """Carries what main had when the checkpoint was in the network."""


def read_checkpoint(path):
    """As the command line with --resume does, up to where training would begin, and a step of the optimizer."""
    words = json.loads((path.parent / "words.json").read_text())
    module, args = importlib.import_module(words.pop("method")), {**words, "run_dir": str(path.parent), "resume": True}
    restore, steps = common.Run.restore, 3

    def stop(run, steps_per_epoch, **modules):
        restore(run, steps_per_epoch, **modules)
        raise Restored(run, modules)

    try:
        common.Run.restore = stop
        module.main(module.Args(**args))
    except Restored as end:
        run, modules = end.args
    finally:
        common.Run.restore = restore
    step, logged, stats = (run.checkpoint[key] for key in ("step", "epochs_logged", "stats"))
    assert type(step) is int and 0 <= step <= steps * words["epochs"]
    assert type(logged) is int and 0 <= logged <= words["epochs"] and type(run.checkpoint["wandb_id"]) is str
    assert stats.shape == (steps, 3) and stats.dtype == torch.float32 and stats.device.type == "cpu"
    stats[0] = 1  # as the training writes into it
    assert stats[1:].isnan().any() or (stats[1:] != 1).any()
    optimizer, fresh = modules["optimizer"], module.make_optimizer(torch.nn.Linear(2, 2), words["weight_decay"])
    settings = [[{key: value for key, value in group.items() if key not in ("params", "lr")} for group in one.param_groups]
                for one in (optimizer, fresh)]  # fmt: skip
    assert settings[0] == settings[1]  # a run has its own, whatever the file says
    for group in optimizer.param_groups:
        for p in group["params"]:
            momentum = optimizer.state.get(p, {}).get("momentum_buffer", p)
            for tensor in (p, momentum):
                assert tensor.shape == p.shape and tensor.dtype == torch.float32 and tensor.layout == torch.strided
                assert tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= 4 * tensor.numel()
            p.grad = torch.zeros_like(p)
    optimizer.step()


def read_encoder(path):
    encoder, info = common.load_encoder(path)
    assert not encoder.training and all(p.dtype == torch.float32 for p in encoder.parameters())
    for key, kind in dict(image_size=int, width=int, feature_dim=int, encoder=str, class_names=list).items():
        assert type(info[key]) is kind, key
    assert 1 <= info["image_size"] <= 1024 and all(type(name) is str for name in info["class_names"])
    for key in ("mean", "std"):
        assert [type(value) for value in info[key]] == [float] * 3 and np.isfinite(info[key]).all(), key
    assert min(info["std"]) > 0
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with torch.no_grad():
        features = encoder(common.normalise(images, info["mean"], info["std"]))
    assert features.shape == (2, info["feature_dim"]) and features.dtype == torch.float32


def read_images(path):
    images = common.load_images("npz", path)
    size = images.train.shape[2]
    assert len(images.train) > 0 and size >= 1
    for part in ("train", "test"):
        pixels, labels = getattr(images, part), getattr(images, f"{part}_labels")
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3
        assert pixels.shape[2:] == (size, size) or not len(pixels)
        assert labels.dtype == torch.int64 and labels.shape == pixels.shape[:1]
        assert not len(labels) or -1 <= labels.min() <= labels.max() < len(images.class_names)
    assert np.isfinite([images.mean, images.std]).all() and min(images.std) > 0
    assert images.class_names == [str(i) for i in range(len(images.class_names))]


def read_embeddings(path):
    data = importlib.import_module("knn_eval").read_embeddings(path)
    for part in ("train", "test"):
        features, labels = data[f"{part}_features"], data[f"{part}_labels"]
        assert features.dtype.kind == "f" and features.ndim == 2 and features.size and np.isfinite(features).all()
        assert labels.dtype == np.int64 and labels.shape == features.shape[:1] and not (labels == -1).any()
    assert data["train_features"].shape[1] == data["test_features"].shape[1]
    assert type(data["meta"]) is dict and all(type(name) is str for name in data["class_names"])


READERS = {"checkpoint.pt": read_checkpoint, "encoder.pt": read_encoder, "embeddings.npz": read_embeddings,
           "images.npz": read_images}  # fmt: skip


def outcome(read, path):
    """'read', 'refused', or what went wrong."""
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            read(path)
            found = "read"
        except common.UserError as error:
            found = "refused" if len(str(error).splitlines()) == 1 and error.status == 2 else f"says {error!r}"
        except BaseException:
            found = traceback.format_exc(limit=-4)
    shown = [str(w.message) for w in caught if not issubclass(w.category, HIDDEN)]
    return f"warns: {shown}" if shown else found


def fuzz(folder, kind):
    """All damaged forms of one file; prints as JSON what became of them."""
    path, whole = folder / kind, (folder / kind).read_bytes()
    (folder / "at").unlink(missing_ok=True)
    found = outcome(READERS[kind], path)
    assert found == "read", found
    wrong, counts, at = {}, {"read": 0, "refused": 0}, os.open(folder / "at", os.O_CREAT | os.O_WRONLY)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, content in enumerate(mutations(whole, kind, COUNTS[kind])):
        path.write_bytes(content)
        os.pwrite(at, b"%9d" % i, 0)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of computing; kills, also where native code hangs
        found = outcome(READERS[kind], path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found in counts:
            counts[found] += 1
        else:
            wrong[i] = found
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps(dict(kind=kind, **counts, grown=grown, wrong=wrong)), flush=True)


def in_processes(folder):
    """Each kind in a process of its own, which may crash or be killed."""
    faulthandler.enable()
    for kind in READERS:
        process = os.fork()
        if not process:
            resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # for the sake of the machine
            fuzz(folder, kind)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status:
            at = (folder / "at").read_text().strip() if (folder / "at").exists() else "none"
            print(json.dumps(dict(kind=kind, wrong={at: f"the process ended with {status}"})), flush=True)


# ------------------------------------------------------------------------------------------ tests


def middle_of_an_epoch(checkpoint):
    """The checkpoint as it is where a run was stopped in its last epoch, so that a resumed run has steps to go."""
    content = torch.load(checkpoint, weights_only=True)
    content.update(step=7, epochs_logged=2)
    torch.save(content, checkpoint)


@pytest.fixture(scope="module")
def small(tiny):
    """small(**changes): the arguments of a run with few weights."""
    return lambda **changes: tiny(encoder="resnet10", weight_decay=5e-4, **changes)


@pytest.fixture(scope="module")
def ran(small, tmp_path_factory):
    """ran(name): the folder of one whole run of a method, which no test may change."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name):
        if not (folder / name).exists():
            module = importlib.import_module(name)
            module.main(module.Args(**small(run_dir=str(folder / name))))
        return folder / name

    return run


@pytest.fixture(scope="module")
def fuzzed(ran, small, tiny_npz, tmp_path_factory):
    """kind -> what became of its damaged forms."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("checkpoint.pt", "encoder.pt", "embeddings.npz"):
        shutil.copy(ran("simclr") / name, folder)
    shutil.copy(tiny_npz, folder / "images.npz")
    middle_of_an_epoch(folder / "checkpoint.pt")
    (folder / "words.json").write_text(json.dumps(dict(small(), method="simclr")))
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {result.pop("kind"): {**result, "stderr": done.stderr} for result in found}


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(fuzzed, kind):
    result = fuzzed[kind]
    wrong = {}
    for i, what in result["wrong"].items():
        wrong.setdefault(what, []).append(i)
    assert not wrong, "\n".join(
        [f"number {', '.join(i)}: {what}" for what, i in wrong.items()] + [result["stderr"][-999:]]
    )
    print(f"{kind}: {result['read']} read, {result['refused']} refused, {result['grown'] / 2**20:.0f} MB")
    assert result["read"] + result["refused"] >= COUNTS[kind] >= 300
    assert result["read"] >= 10 and result["refused"] >= 100  # else the faults are too small or too large to tell
    assert result["grown"] < MOST_MEMORY


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_command(result, before, folder):
    """Worked, or one line and all as it was before, or a training that diverged."""
    assert "Traceback" not in result.err and not result.warnings, result
    assert not list(folder.rglob("*.tmp"))
    if result.status == 0:
        assert not result.err, result
        return
    assert len(result.err.splitlines()) == 1 and result.err.startswith("error: "), result
    assert result.status == 2 or "finite" in result.err or "loss is" in result.err, result
    assert result.status == 1 or contents(folder) == before


def test_command_line_resumes(run_cli, small, method, ran, tmp_path):
    """Damaged checkpoints through the whole command: where one is read, the run goes on with it to its end."""
    folder, seed = tmp_path / "run", METHODS.index(method.__name__) + 1
    shutil.copytree(ran(method.__name__), folder)
    middle_of_an_epoch(folder / "checkpoint.pt")
    statuses, whole = [], (folder / "checkpoint.pt").read_bytes()
    for content in [whole, *mutations(whole, "checkpoint.pt", 5, seed)]:
        (folder / "checkpoint.pt").write_bytes(content)
        before = contents(tmp_path)
        result = run_cli(method, *flags(**small(run_dir=folder, resume=True)))
        check_command(result, before, tmp_path)
        statuses.append(result.status)
    assert statuses[0] == 0 and 2 in statuses


def test_command_line_trains(run_cli, small, tiny_npz, tmp_path):
    simclr, path, statuses = importlib.import_module("simclr"), tmp_path / "bad.npz", []
    for i, content in enumerate(islice(mutations(tiny_npz.read_bytes(), "images.npz", 15, 1), 15)):
        path.write_bytes(content)
        before = contents(tmp_path)
        result = run_cli(simclr, *flags(**small(data_dir=path, run_dir=tmp_path / f"run{i}", epochs=1, image_size=8)))
        check_command(result, before, tmp_path)
        statuses.append(result.status)
    assert {0, 2} <= set(statuses)


def test_command_line_judges(run_cli, ran, tmp_path):
    knn_eval, path, statuses = importlib.import_module("knn_eval"), tmp_path / "bad.npz", []
    whole = (ran("simclr") / "embeddings.npz").read_bytes()
    for content in islice(mutations(whole, "embeddings.npz", 15, 1), 15):
        path.write_bytes(content)
        before = contents(tmp_path)
        result = run_cli(knn_eval, path, *flags(ks=3, embedding_2d="none", device="cpu"))
        check_command(result, before, tmp_path)
        statuses.append(result.status)
    assert {0, 2} <= set(statuses)


# ------------------------------------------------------------------------------------------ code


class Code:
    """Unpickled, it calls what makes a file."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


WAYS_TO_RUN = {
    "open": lambda path: Code(open, path, "w"),
    "system": lambda path: Code(os.system, f"echo > '{path}'"),
    "exec": lambda path: Code(exec, f"open({path!r}, 'w')"),
    "inside": lambda path: Code(torch.storage._load_from_bytes, saved(Code(open, path, "w"))),
}


def with_code(whole, code):
    """A .pt file's forms with code in them."""
    content = {key: value for key, value in load(whole).items() if "state" not in key}  # less to read
    first = next(iter(content))
    members = unpack(saved(content))
    members = [(name, pickle.dumps(code) if name.endswith(".pkl") else data) for name, data in members]
    yield pickle.dumps(code)
    yield saved({**content, first: code})
    yield saved({**content, "one more": [code]})
    yield saved({**content, first: code}, _use_new_zipfile_serialization=False)
    yield pack(members)
    yield pack([*members, ("archive/constants.pkl", pickle.dumps(code))])


def npz_with_code(whole, code):
    members = unpack(whole)
    for i, (name, _) in enumerate(members):
        one, records = np.empty(3, dtype=object), np.empty(3, dtype=[("a", object), ("b", "f4")])
        one[:] = records["a"][:] = code
        for array in (one, records, None):
            buffer = io.BytesIO(pickle.dumps(code))
            if array is not None:
                np.save(buffer, array, allow_pickle=True)
            yield pack([*members[:i], (name, buffer.getvalue()), *members[i + 1 :]])
    yield pickle.dumps(code)
    buffer = io.BytesIO()
    np.save(buffer, one, allow_pickle=True)
    yield buffer.getvalue()


@pytest.fixture(params=WAYS_TO_RUN)
def code(request, tmp_path):
    """What makes a file when it is unpickled, as is shown first; at the end the file must not be there."""
    marker = tmp_path / "the code ran"
    made = WAYS_TO_RUN[request.param](str(marker))
    pickle.loads(pickle.dumps(made))
    assert marker.exists()
    marker.unlink()
    yield made
    assert not marker.exists()


def test_no_code_from_a_checkpoint(run_cli, small, method, ran, tmp_path, code):
    (tmp_path / "run").mkdir()
    for content in with_code((ran(method.__name__) / "checkpoint.pt").read_bytes(), code):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        before = contents(tmp_path)
        result = run_cli(method, *flags(**small(run_dir=tmp_path / "run", resume=True)))
        assert result.status == 2
        check_command(result, before, tmp_path)


def test_no_code_from_an_encoder(ran, tmp_path, code):
    for content in with_code((ran("simclr") / "encoder.pt").read_bytes(), code):
        (tmp_path / "encoder.pt").write_bytes(content)
        with pytest.raises(common.UserError, match="encoder.pt"):
            common.load_encoder(tmp_path / "encoder.pt")


def test_no_code_from_arrays(run_cli, small, tiny_npz, ran, tmp_path, code):
    bad = tmp_path / "bad.npz"
    embeddings, simclr = (ran("simclr") / "embeddings.npz").read_bytes(), importlib.import_module("simclr")
    for content in npz_with_code(embeddings, code):
        bad.write_bytes(content)
        result = run_cli(importlib.import_module("knn_eval"), bad)
        assert result.status == 2 and "bad.npz" in result.err
        check_command(result, contents(tmp_path), tmp_path)
    for content in npz_with_code(tiny_npz.read_bytes(), code):
        bad.write_bytes(content)
        result = run_cli(simclr, *flags(**small(data_dir=bad, run_dir=tmp_path / "run")))
        assert result.status == 2 and "bad.npz" in result.err
        check_command(result, contents(tmp_path), tmp_path)


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
