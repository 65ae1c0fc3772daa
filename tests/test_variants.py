"""The method's settings and the baselines, from the command line to the step, the log and the checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags

import train
from devices import Processes
from engine.settings import parse_args
from engine.training import build_training
from loss import LOSSES, WEIGHTS
from model import from_checkpoint

VARIANTS = {  # flags: where the setting arrives
    "--temperature 0.2": lambda bank, _: bank.aux.temperature == 0.2,
    "--momentum 0.5": lambda bank, _: (bank.infrared.momentum, bank.shared.momentum) == (0.5, 0.1),
    "--shared-momentum 0.5": lambda bank, _: (bank.aux.momentum, bank.shared.momentum) == (0.25, 0.5),
    "--update mean": lambda bank, _: not bank.shared.hard,
    "--proxies both": lambda _, loss: loss.proxies == "both",
    "--margin 0.7": lambda _, loss: loss.margin == 0.7,
    "--loss-weights align=0 aux=2.5": lambda _, loss: loss.weights == WEIGHTS | {"align": 0, "aux": 2.5},
    "--loss hard-triplet": lambda _, loss: getattr(loss, "triplet", None) == "hard-triplet",
    "--loss hard-triplet --margin 0.7": lambda _, loss: loss.margin == 0.7,
    "--loss weighted-triplet": lambda _, loss: getattr(loss, "triplet", None) == "weighted-triplet",
    "--loss weighted-triplet --loss-weights triplet=2": lambda _, loss: loss.weights.get("triplet") == 2,
}


def training_of(root, *flags):
    return build_training(parse_args([*tiny_flags(root), *flags]), None, Processes())


def checkpoint(which):
    [path] = Path().glob(f"save_model/*_{which}.t")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_setting_reaches_what_it_names_the_log_and_the_runs_name(sysu, flags):
    plain, training = training_of(sysu), training_of(sysu, *flags.split())
    assert VARIANTS[flags](training.bank, training.loss)
    assert not VARIANTS[flags](plain.bank, plain.loss)
    assert training.args.name != plain.args.name
    assert flags.split()[-1] in training.describe()["settings"]
    for name, weight in plain.model.state_dict().items():  # variants start from the same weights
        assert torch.equal(weight, training.model.state_dict()[name])


def test_without_aux_the_other_images_are_the_same(sysu):
    trainings = training_of(sysu), training_of(sysu, "--no-aux")
    assert trainings[0].args.name != trainings[1].args.name
    steps = [list(training.loader.epoch(0)) for training in trainings]
    for (full, labels), (two, same_labels) in zip(*steps, strict=True):
        assert torch.equal(labels, same_labels)
        assert set(two) == {"visible", "infrared"}
        assert all(torch.equal(images, full[modality]) for modality, images in two.items())
    assert [training.images_per_step for training in trainings] == [3 * 4 * 2, 2 * 4 * 2]
    assert "4 identities x 2 images x 2 in each" in trainings[1].describe()["a step"]


def test_a_run_without_aux_images_and_without_a_term_logs_every_term(sysu, train_here):
    flags = ["--no-aux", "--loss-weights", "align=0", "--epochs", 1]
    status, output, errors = train_here(*tiny_flags(sysu), *flags)
    assert (status, errors) == (0, [])
    [line] = [line[20:] for line in output.splitlines() if line[20:].startswith("epoch 1/1: ")]
    total, *terms = (
        float(words.split()[-1]) for words in line.partition(")")[0].replace("(", ", ").split(", ")
    )
    values = dict(zip(WEIGHTS, terms, strict=True))
    assert values["aux"] == 0
    assert values["align"] > 0
    expected = sum(weight * values[name] for name, weight in WEIGHTS.items() if name != "align")
    assert total == pytest.approx(expected, abs=5e-3)
    assert checkpoint("last")["args"]["no_aux"] is True


def test_a_baselines_step_reads_before_and_behind_the_neck(sysu):
    training = training_of(sysu, "--loss", "weighted-triplet")
    images, labels = next(iter(training.loader.epoch(0)))
    network, baseline = copy.deepcopy(training.model), copy.deepcopy(training.loss)
    pooled = network.train().pooled(torch.cat([images["visible"], images["aux"]]), images["infrared"])
    expected, terms = baseline({}, labels, network.neck(pooled), pooled)
    [losses] = train.train_one_epoch(training, [(images, labels)], 0).tolist()
    assert losses == pytest.approx([expected.item(), *(term.item() for term in terms.values())], rel=1e-5)
    assert not torch.equal(baseline.classifier.weight, training.loss.classifier.weight)  # it is trained


@pytest.mark.parametrize("name", LOSSES[1:])
def test_a_baselines_classifier_is_beside_the_network_and_survives_a_resume(sysu, train_here, name):
    flags = [*tiny_flags(sysu), "--loss", name, "--eval-start", 0, "--eval-every", 1]
    assert train_here(*flags, "--epochs", 2)[0] == 0
    whole = checkpoint("last")
    best = checkpoint("best")
    assert train_here(*flags, "--epochs", 1, "--overwrite")[0] == 0
    assert train_here(*flags, "--epochs", 2, "--resume", "auto")[0] == 0
    resumed = checkpoint("last")
    assert list(whole["loss"]) == ["classifier.weight"]
    for part in ("net", "loss"):
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), key
    assert not any("classifier" in key for key in whole["net"])
    assert "loss" not in best
    [path] = Path().glob("save_model/*_best.t")
    from_checkpoint(path)


def test_a_baseline_builds_no_memory(sysu, train_here, monkeypatch):
    monkeypatch.setattr(train, "extract_features", None)
    assert train_here(*tiny_flags(sysu), "--loss", "hard-triplet", "--epochs", 1)[0] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss-weights", "align"], "align is not TERM=WEIGHT"),
        (["--loss-weights", "align=-1"], "with a weight of at least 0"),
        (["--loss-weights", "alight=1"], "terms are shared, visible, infrared, aux, align, center, identity"),
        (["--loss-weights", "aux=1", "triplet=1"], "--loss mce has no term triplet, only shared, visible"),
        (["--loss", "hard-triplet", "--loss-weights", "aux=1"], "has no term aux, only identity, triplet"),
        (
            ["--loss", "hard-triplet", "--temperature", "1"],
            "--temperature: --loss hard-triplet has no memory",
        ),
        (["--loss", "weighted-triplet", "--margin", "1"], "--margin: --loss weighted-triplet has none"),
        (["--momentum", "1.5"], "from 0 to 1"),
        (["--margin", "0"], "positive"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(train_here, flags, words):
    status, _, errors = train_here(*flags)
    assert status == 2
    assert len(errors) == 1
    assert words in errors[0]
