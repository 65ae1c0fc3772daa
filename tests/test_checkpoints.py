"""checkpoints.py: files of strangers are read without running them, ours are whole or not at all."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch

from checkpoints import load_checkpoint, read_torch_file, save_checkpoint
from utils import UserError

NET = {"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.num_batches_tracked": torch.tensor(3)}


class Command:
    """What unpickling it ordinarily runs: a command that makes a file."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def same(a, b):
    """Whether what was read is what was written, with its types."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor | np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and a == b


# --- what is refused


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["os.system", "open", "eval", "a class of its own"])
def test_code_is_refused_and_does_not_run(kind, legacy, tmp_path):
    trace, path = tmp_path / "it ran", tmp_path / "evil.t"
    value = {
        "os.system": Command(os.system, f"touch '{trace}'"),
        "open": Command(open, str(trace), "w"),
        "eval": Command(eval, f"open({str(trace)!r}, 'w')"),
        "a class of its own": collections.UserDict(a=1),
    }[kind]
    torch.save({"net": NET, "cmc": value}, path, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(path) is not legacy
    named = {
        "os.system": "posix.system",
        "open": "io.open",
        "a class of its own": "collections.UserDict",
    }.get(kind, kind)
    with pytest.raises(UserError, match=rf"evil\.t is refused: it holds {named}, which is no plain data"):
        load_checkpoint(path)
    assert not trace.exists()
    if kind != "a class of its own":  # the attack is real: the ordinary unpickler runs it
        torch.load(path, weights_only=False)
        assert trace.exists()


def test_a_bare_pickle_that_runs_code_is_refused(tmp_path):
    trace, path = tmp_path / "it ran", tmp_path / "evil.t"
    path.write_bytes(pickle.dumps(Command(os.system, f"touch '{trace}'"), protocol=2))
    with pytest.raises(UserError, match=r"evil\.t is refused"):
        read_torch_file(path)
    assert not trace.exists()


def whole_checkpoint():
    buffer = io.BytesIO()
    torch.save({"net": {"w": torch.zeros(4000)}}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"epoch,loss\n1,0.5\n",
        np.random.default_rng(0).bytes(4096),
        b"PK\x03\x04" + np.random.default_rng(1).bytes(4096),
        b"\x80\x02" + np.random.default_rng(2).bytes(4096),
        whole_checkpoint()[:-1000],
        whole_checkpoint()[:300],
    ],
    ids=["empty", "zero", "text", "noise", "noise-zip", "noise-pickle", "cut-zip", "cut-early"],
)
def test_broken_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "broken.t"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"broken\.t is refused: it is not a complete file of torch\.save$"
    ) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    save_checkpoint({"net": NET}, tmp_path / "run.t")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match=r"^cannot read .*run\.t: Permission denied$"):
        load_checkpoint(tmp_path / "run.t")


@pytest.mark.parametrize("name", ["missing.t", "folder"])
def test_what_is_no_file_is_told(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"^no file at .*{name}$"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"net": {}},
        {"net": None},
        {"net": {"w": 1.0}},
        {"state_dict": {"epoch": 3}},
        {"w": NET["conv1.weight"], "epoch": 3},
        [NET],
        torch.zeros(3),
        {"net": NET["conv1.weight"]},
    ],
)
def test_what_is_no_checkpoint_is_told(content, tmp_path):
    torch.save(content, tmp_path / "other.t")
    with pytest.raises(UserError, match=r"other\.t is not a checkpoint: it is no state dict and has none"):
        load_checkpoint(tmp_path / "other.t")


# --- what is read


NUMBERS = {
    "cmc": np.linspace(0, 1, 20, dtype=np.float32),
    "mAP": np.float64(0.5),
    "mINP": np.float32(0.25),
    "epoch": np.int64(42),
    "flag": np.bool_(True),
    "half": np.arange(4, dtype=np.float16).reshape(2, 2),
    "labels": np.array([[3, 1], [2, 0]], order="F"),
    "pixels": np.arange(6, dtype=np.uint8),
    "args": {"dataset": "sysu", "decay_epochs": [20, 40], "lr": 3.5e-4, "resume": None, "size": (384, 128)},
}


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_values_are_read(legacy, tmp_path):
    checkpoint = {"net": NET} | NUMBERS
    path = tmp_path / "run.t"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    assert same(checkpoint, load_checkpoint(path))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_values_are_read_by_the_names_of_both_numpys(module, tmp_path):
    here = (b"numpy.core" if np.__version__.startswith("1.") else b"numpy._core") + b".multiarray"
    buffer = io.BytesIO()
    torch.save({"net": NET} | NUMBERS, buffer)
    path = tmp_path / "other_numpy.t"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"c" + here + b"\n") == 2  # scalar and _reconstruct, as text
                content = content.replace(b"c" + here + b"\n", b"c" + module + b"\n")
            target.writestr(name, content)
    assert same({"net": NET} | NUMBERS, load_checkpoint(path))


def test_reading_allows_nothing_to_others(tmp_path):
    torch.save({"net": NET} | NUMBERS, tmp_path / "run.t")
    before = set(torch.serialization.get_safe_globals())
    load_checkpoint(tmp_path / "run.t")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", ["net", "state_dict", "model", None])
def test_weights_are_read_bare_or_wrapped(key, legacy, tmp_path):
    content = NET if key is None else {"epoch": 3, key: NET}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    assert same({"net": NET} | ({"epoch": 3} if key else {}), load_checkpoint(tmp_path / "weights.pth"))


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_containers_are_read(legacy, tmp_path):
    counts = collections.defaultdict(list, a=[1], b=[])
    content = {
        "net": NET,
        "args": argparse.Namespace(img_h=288, log_path=pathlib.Path("log") / "run", lr=0.1),
        "counts": counts,
        "sums": collections.defaultdict(float, a=0.5),
        "scheduler": {"milestones": collections.Counter([20, 50])},
    }
    torch.save(content, tmp_path / "run.t", _use_new_zipfile_serialization=not legacy)
    found = load_checkpoint(tmp_path / "run.t")
    args = vars(found["args"])
    assert str(args.pop("log_path")) == os.path.join("log", "run")
    assert args == {"img_h": 288, "lr": 0.1}
    assert found["counts"] == {"a": [1], "b": []}
    assert found["sums"] == {"a": 0.5}
    assert found["scheduler"] == content["scheduler"]


def test_a_whole_pickled_network_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.BatchNorm1d(2), tmp_path / "run.t")
    with pytest.raises(
        UserError,
        match=r"run\.t is refused: it holds torch\.nn\.modules\.batchnorm\.BatchNorm1d, .*state_dict",
    ):
        load_checkpoint(tmp_path / "run.t")


OTHERS = {  # a few names of each network's state dict, from the repositories' code
    "DEEN": [
        "visible_module.visible.conv1.weight",
        "DEE.FC11.weight",
        "MFA1.CNL.g.weight",
        "bottleneck.weight",
    ],
    "MPANet": ["backbone.conv1.weight", "spatial_attention.weight", "bn_neck.weight", "classifier.weight"],
    "fast-reid": ["backbone.conv1.weight", "heads.bottleneck.0.weight", "heads.weight", "pixel_mean"],
    "torchreid": ["conv1.conv.weight", "conv2.0.conv1.conv.weight", "fc.0.weight", "classifier.weight"],
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused_by_name_with_the_way_out(name, prefix, tmp_path):
    weights = {prefix + key: torch.zeros(1) for key in OTHERS[name]}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "best.t")
    with pytest.raises(UserError, match=rf"best\.t is a network of {name}, .* test\.py --features$"):
        load_checkpoint(tmp_path / "best.t")


# --- what is written


def test_a_checkpoint_comes_back_and_needs_no_trust(tmp_path):
    path = tmp_path / "save_model" / "run_last.t"
    checkpoint = {"net": NET, "epoch": 3, "best": None, "args": NUMBERS["args"]}
    save_checkpoint(checkpoint, path)
    assert same(checkpoint, torch.load(path, weights_only=True))
    assert os.listdir(path.parent) == ["run_last.t"]


def test_weights_are_stored_contiguous(tmp_path):
    """As safetensors wants them, however the network of a run holds them."""
    weights = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).state_dict()
    assert not weights["weight"].is_contiguous()
    save_checkpoint({"net": weights}, tmp_path / "run.t")
    found = load_checkpoint(tmp_path / "run.t")["net"]
    assert same(weights, found)
    assert all(value.is_contiguous() for value in found.values())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("unexpected pos 64 vs 0\nmore"),
            r"torch could not write the complete file: is the disk full\?",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_disk_that_fills_up_costs_nothing(error, told, tmp_path, monkeypatch):
    path = tmp_path / "run_last.t"
    save_checkpoint({"net": NET, "epoch": 1}, path)

    def fail_midway(checkpoint, file):
        file.write_bytes(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail_midway)
        with pytest.raises(UserError, match=rf"^cannot write .*run_last\.t: {told}$"):
            save_checkpoint({"net": NET, "epoch": 2}, path)
    assert load_checkpoint(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["run_last.t"]
