"""Dozens of training steps against plain_mce.py, which shares no code with the product.

In float64 the two agree to about 1e-11 over fifty steps, so 1e-8 has room for other processors and none for
another method. In float32 rounding alone moves the losses apart, about threefold at each step while Adam is
new: only the first steps can be compared, as the last test does.
"""

import plain_mce
import pytest
import torch
from conftest import tiny_flags

import train
from devices import Processes
from engine.settings import parse_args
from engine.training import build_training
from utils import MODALITIES

STEPS = 4  # of each epoch
EPOCHS = (0, 9, 20, 21, 40)  # warm-up, the base rate, and both falls


def plain_weights(model):
    """The weights and running statistics of a ResNet-18 in float64, under plain_mce's names."""
    state = {}
    for key, value in model.state_dict().items():
        words, value = key.split("."), value.double().clone()
        if words[0] == "stems":
            words = [words[1], ("conv1", "bn1")[int(words[2])], words[3]]
        elif words[0] in ("layer2", "layer3"):  # blocks and non-local blocks in turn
            k, words = int(words[1]), [words[0], str(int(words[1]) // 2), *words[2:]]
            if k % 2 and words[2] == "theta_phi_g":
                for part, row in zip(("theta", "phi", "g"), value.split(1), strict=True):
                    state[".".join([*words[:2], "nonlocal", part, words[3]])] = row
                continue
            if k % 2:
                words[2:3] = ["nonlocal", {"expand": "out", "bn": "norm"}[words[2]]]
        elif words[0] == "pool":
            words[0] = "gem"
        if words[-1] != "num_batches_tracked":
            state[".".join(words)] = value
    return state


def double(images):
    return {modality: those.double() for modality, those in images.items()}


def memory_of(training, epoch):
    """Every other image and label that the epoch's reset embeds, by modality: enough, and half the time."""
    parts = {m: list(zip(*training.loader.memory_batches(m, 64, epoch), strict=True)) for m in MODALITIES}
    return [{m: torch.cat(part[k])[::2] for m, part in parts.items()} for k in (0, 1)]


def compare(root, epochs, steps, monkeypatch, *flags, dtype=torch.float64, tolerance=1e-8):
    """Train both and fail at the first step and term that differ by more than tolerance (relative)."""
    args = parse_args([*tiny_flags(root), "--batch-size", "3", *flags])
    training = build_training(args, None, Processes())
    weights = plain_weights(training.model)
    data = []  # for each epoch its number, its memory, its batches: drawn before the product turns float64
    for epoch in epochs:
        images, labels = memory_of(training, epoch)
        batches = [(double(part), those) for part, those in list(training.loader.epoch(epoch))[:steps]]
        data.append((epoch, (double(images), labels), batches))
    if dtype == torch.float64:
        training.model.double()
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # where the product asks for float32
        for table in ("shared", *MODALITIES):
            memory = getattr(training.bank, table)
            memory.proxies, memory.centers = memory.proxies.double(), memory.centers.double()
    found = []
    for epoch, (images, labels), batches in data:
        monkeypatch.setattr(
            training.loader,
            "memory_batches",
            lambda modality, *_, images=images, labels=labels: [
                (images[modality].to(dtype), labels[modality])
            ],
        )
        for group in training.optimizer.param_groups:
            group["lr"] = train.learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs)
        torch.set_default_dtype(dtype)
        try:
            train.rebuild_memory(training, epoch)
            batches = [({m: part[m].to(dtype) for m in MODALITIES}, those) for part, those in batches]
            found += train.train_one_epoch(training, batches, epoch).tolist()
        finally:
            torch.set_default_dtype(torch.float32)
    expected = plain_mce.train(weights, data, args.stem, len(training.bank.shared.proxies), args.proxies)
    assert len(found) == len(expected) == len(epochs) * steps
    for step, (values, (total, terms)) in enumerate(zip(found, expected, strict=True)):
        for name, value in zip(("total", *plain_mce.WEIGHTS), values, strict=True):
            plain = total if name == "total" else terms[name]
            assert value == pytest.approx(plain, rel=tolerance), (
                f"first divergence: step {step + 1}, {name}: {value!r} here, {plain!r} in plain_mce"
            )


def test_two_stems_train_as_the_page_says(sysu, monkeypatch):
    compare(sysu, EPOCHS, STEPS, monkeypatch)


def test_the_shared_stem_and_both_proxies_train_as_the_page_says(sysu, monkeypatch):
    compare(sysu, (0, 1), 2, monkeypatch, "--stem", "shared", "--proxies", "both")


def test_float32_stays_near_until_rounding_has_grown(sysu, monkeypatch):
    compare(sysu, (0,), 3, monkeypatch, dtype=torch.float32, tolerance=2e-3)
