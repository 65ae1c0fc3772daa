"""What several test files use: the scripts as a user runs them, a tiny SYSU-MM01, a finished run on it."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import narrow
import numpy as np
import pytest
import torch
import torchvision
import warm
from PIL import Image

import synthetic
import train
from checkpoints import save_checkpoint
from data_manager import class_labels, train_samples
from model import TwoStreamResNet
from readers.arrays import ArrayFiles, TrainingImages
from tools import commands
from utils import run_script as run_main

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits, and long where cores are shared
DISK = 2e9  # bytes that the tests need for temporary files
REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # tests run side by side: one thread each
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(REPOSITORY),  # for python -m
}


def command(script, *args):
    """The words of `python SCRIPT ARGS` for a script of the repository, or of `python -m PACKAGE ARGS`."""
    words = [str(REPOSITORY / script)] if script.endswith(".py") else ["-m", script]
    return [sys.executable, *words, *map(str, args)]


def run_script(script, *args, cwd, env=None, timeout=300):
    """Run a script of the repository in the folder cwd and return its CompletedProcess, with text."""
    env = os.environ | ENVIRONMENT | (env or {})
    return warm.run(command(script, *args), cwd=cwd, env=env, capture_output=True, timeout=timeout)


def tiny_flags(root):
    """Flags that train on the dataset at root in seconds, on the CPU, the same on every machine."""
    return [
        "--data-path", str(root), "--img-h", "32", "--img-w", "16", "--arch", "resnet18", "--weights", "none",
        "--batch-size", "4", "--num-pos", "2", "--gpu", "-1", "--amp", "off", "--workers", "1",
    ]  # fmt: skip


def draw_sysu(root, identities=8, seed=0, size=(32, 16)):
    """Draw a tiny SYSU-MM01, with training arrays of a size; a fifth of the identities are for validation."""
    synthetic.draw_dataset(synthetic.plan_sysu(identities, 4, 2, seed), root, seed, height=48, width=24)
    samples = train_samples("sysu", root)
    paths = {modality: those.paths for modality, those in samples.items()}
    pids = sorted({int(pid) for pid in samples["visible"].pids})
    ArrayFiles(root, *size).write(TrainingImages(paths, class_labels(samples), pids), workers=1)
    return root


def draw_images(folder, number, size=(12, 30), seed=0):
    """Write smooth images of that PIL size, return their paths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(number):
        small = Image.fromarray(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8))
        paths.append(str(folder / f"{k:04d}.png"))
        small.resize(size).save(paths[-1])
    return paths


def save_values(path, values):
    """Write an array as an image, as Pillow does it; return the path."""
    Image.fromarray(values).save(path)
    return str(path)


def ramp(low, high, dtype, shape=(20, 8)):
    """An image with all of low..high, as far as it has pixels."""
    return np.linspace(low, high, shape[0] * shape[1]).astype(dtype).reshape(shape)


def random_checkpoint(path, seed=0, **settings):
    """Write the checkpoint of an untrained ResNet-18 for 32x16 images, none of its layers the identity."""
    torch.manual_seed(seed)
    settings = {"arch": "resnet18", "stem": "two-stream", "img_h": 32, "img_w": 16, "amp": "off"} | settings
    network = TwoStreamResNet(settings["arch"], settings["stem"])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    checkpoint = {"net": network.state_dict(), "cmc": [], "mAP": 0.0, "mINP": 0.0, "epoch": 0}
    save_checkpoint(checkpoint | {"args": settings}, path)
    return str(path)


def outputs(model, dtype=torch.float32):
    """A network's answers to two images of each modality, always the same ones, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 2, 3, 32, 16, generator=generator).to(dtype)
    with torch.no_grad():
        return model.eval()(images[0], images[1])


def read_slowly(path, height, width):
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rows = rgb.resize((width, rgb.height), Image.Resampling.LANCZOS)  # first, as up to Pillow 12
    return np.array(rows.resize((width, height), Image.Resampling.LANCZOS))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="how often the kill test kills a run (10)")


def pytest_sessionstart(session):
    """Say so where the disk is nearly full: what fails then would not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # no worker of xdist has it
    folder = tempfile.gettempdir()
    if reporter and (free := shutil.disk_usage(folder).free) < DISK:
        reporter.write_line(
            f"only {free / 1e9:.1f} GB are free in {folder}: the tests need {DISK / 1e9:.0f} GB"
        )


@pytest.fixture
def whole_resnet18(monkeypatch):
    """ResNet-18 with all its channels in this process."""
    monkeypatch.setattr(torchvision.models, "get_model", narrow.WHOLE)


@pytest.fixture
def warm_commands(monkeypatch):
    """tools.commands.run without a new interpreter for each script."""
    instead = SimpleNamespace(run=warm.run, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(commands, "subprocess", instead)


@pytest.fixture
def train_here(tmp_path, monkeypatch, capsys):
    """train.py without a new interpreter, in the folder tmp_path/work: (exit status, output, error lines)."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def train_here(*args):
        argv = list(map(str, args))
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as exit_:
            run_main(train.main, lambda: argv)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err.strip().splitlines()

    return train_here


@pytest.fixture(scope="session")
def sysu(tmp_path_factory):
    """The folder of a tiny SYSU-MM01, shared: tests that change it work on a copy."""
    return draw_sysu(tmp_path_factory.mktemp("data") / "sysu")


@pytest.fixture(scope="session")
def trained(sysu, tmp_path_factory):
    """A finished run of two epochs, each evaluated: (the folder it ran in, its CompletedProcess)."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*tiny_flags(sysu), "--epochs", "2", "--eval-start", "0", "--eval-every", "1"]
    done = run_script("train.py", *flags, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done
