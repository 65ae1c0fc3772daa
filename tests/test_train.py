import dataclasses
import functools
import io
import json
import re
import shutil
import statistics
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_flags
from PIL import Image
from plain_training import (
    PlainTraining,
    assert_step,
    plain_tables,
    recorded,
    start_training,
    state,
    tables,
    take_steps,
)
from rounding import Hardware

import precision
import synthetic
import train
from checkpoints import load_checkpoint, save_checkpoint
from data_manager import DATASETS, train_samples
from engine import launch
from engine.events import Board
from engine.files import Run
from engine.settings import STATE, open_run, parse_args, typed_settings
from engine.training import Progress, build_test_images
from eval_metrics import Metrics
from loss import WEIGHTS
from train import evaluate_if_due, fit, learning_rate, rebuild_memory, train_one_epoch

TERMS = ("shared", "visible", "infrared", "aux", "align", "center")


def files(folder):
    """Every visible file below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("[!.]*") if p.is_file())


def only(folder, pattern):
    [path] = folder.glob(pattern)
    return path


# The step and the epoch: what they do to weights, statistics and memory (tests/defects.py tries these tests)


@pytest.mark.parametrize("proxies", ["historical", "both"])
def test_steps_do_what_the_method_says(sysu, proxies):
    training = start_training(sysu, "--proxies", proxies)
    rebuild_memory(training, 0)
    plain, batches, states = PlainTraining(training), list(training.loader.epoch(0))[:3], []
    losses = train_one_epoch(training, recorded(training, batches, states), 0)
    for k, batch in enumerate(batches):
        plain.load(states[k])
        expected = plain.step(*batch, training.args.lr)
        torch.testing.assert_close(losses[k], expected, rtol=1e-4, atol=1e-4)
        assert_step(states[k], states[k + 1], plain.state())


def test_visible_and_aux_images_go_through_one_stem_and_infrared_through_the_other(sysu):
    training = start_training(sysu)
    convolutions = {}
    for name, stem in training.model.stems.items():
        stem[1].momentum = 1.0  # running statistics are the last batch's
        convolutions[name] = deepcopy(stem[0])
    size = (4, 3, 32, 16)
    images = {
        "visible": torch.full(size, 1.0),
        "aux": torch.full(size, 3.0),
        "infrared": torch.full(size, -2.0),
    }
    train_one_epoch(training, [(images, torch.tensor([0, 0, 1, 1]))], 0)
    for name, modalities in {"visible": ("visible", "aux"), "infrared": ("infrared",)}.items():
        maps = convolutions[name](torch.cat([images[modality] for modality in modalities]))
        found = training.model.stems[name][1].running_mean
        torch.testing.assert_close(found, maps.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
    counts = {name: int(v) for name, v in training.model.state_dict().items() if "num_batches" in name}
    assert set(counts.values()) == {1}  # one pass through everything


def test_a_step_in_a_scaled_loss_is_the_same_step(sysu):
    begin, steps = {}, []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=512.0)):
        training = start_training(sysu)
        training.scaler = scaler  # as float16 on a GPU has it
        rebuild_memory(training, 0)
        begin = state(training)
        take_steps(training, 2)
        steps.append(state(training))
    assert_step(begin, *steps)


def test_a_step_that_overflows_changes_no_weight_and_halves_the_scale(sysu):
    training = start_training(sysu)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    rebuild_memory(training, 0)
    begin = deepcopy(dict(training.model.named_parameters()))
    take_steps(training, 1)
    assert training.scaler.get_scale() == 2.0**126
    for name, weight in training.model.named_parameters():
        assert torch.equal(weight, begin[name]), name


def test_amp_is_the_precision_of_steps_and_of_the_memory(sysu, monkeypatch):
    monkeypatch.setattr(precision, "check", lambda *_: None)  # tests/test_precision.py has it
    training = start_training(sysu, "--amp", "bf16")
    seen = []
    training.model.layer1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with Hardware():  # some CPUs compute maps of 2x1 wrongly, most slowly
        rebuild_memory(training, 0)
        take_steps(training, 1)
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16}
    assert all(table.dtype == torch.float32 for table in tables(training).values())


def test_the_memory_is_rebuilt_from_class_means_of_features_as_in_evaluation(sysu):
    training = start_training(sysu, "--test-batch", 7)
    take_steps(training, 1)  # statistics of its own, in training mode
    begin = deepcopy(training.model.state_dict())
    rebuild_memory(training, 3)
    assert all(torch.equal(value, begin[name]) for name, value in training.model.state_dict().items())
    expected = plain_tables(training, training.model, 3)
    for name, table in tables(training).items():
        torch.testing.assert_close(table, expected[name.split(".")[0]], rtol=1e-4, atol=1e-5, msg=name)


class KeptRun(Run):
    """A run that keeps in memory what it is told to save."""

    def __init__(self, folder, training):
        super().__init__("kept", "sysu", folder / "save_model", folder / "log")
        self.training, self.saved, self.chosen = training, {}, []

    def save(self, checkpoint, is_best=False, selection=""):
        self.saved[checkpoint["epoch"]] = deepcopy(checkpoint) | tables(self.training)
        self.chosen += [checkpoint["epoch"]] if is_best else []


@pytest.fixture(scope="module")
def epochs(sysu, tmp_path_factory):
    """Five epochs of one step each: the training, and {epoch: what was saved after it}, from 0 on."""
    schedule = ["--epochs", 5, "--warmup-epochs", 2, "--decay-epochs", 2, 4]
    training = start_training(sysu, "--batch-size", 8, "--num-pos", 8, "--select", "last", *schedule)
    assert len(training.loader.sampler) == 1
    run = KeptRun(tmp_path_factory.mktemp("kept"), training)
    progress = Progress()
    run.save(training.state() | progress.state())
    fit(training, build_test_images(training), progress, run)
    return training, run.saved


def test_each_epoch_steps_with_its_own_rate(epochs):
    """Adam's moments say which way the epoch's step went; the rate is how far."""
    training, saved = epochs
    places = {name: k for k, (name, w) in enumerate(training.model.named_parameters()) if w.requires_grad}
    rates = []
    for epoch in range(1, 6):
        before, after, adam = saved[epoch - 1]["net"], saved[epoch]["net"], saved[epoch]["optimizer"]["state"]
        moved = length = 0.0
        for name, k in places.items():
            assert adam[k]["step"] == epoch
            mean, square = adam[k]["exp_avg"] / (1 - 0.9**epoch), adam[k]["exp_avg_sq"] / (1 - 0.999**epoch)
            direction = (mean / (square.sqrt() + 1e-8)).double()
            moved += float(((before[name].double() - after[name].double()) * direction).sum())
            length += float(direction.square().sum())
        rates.append(moved / length)
    args = training.args
    expected = [learning_rate(epoch, args.lr, args.warmup_epochs, args.decay_epochs) for epoch in range(5)]
    assert expected == pytest.approx([3.5e-4 * factor for factor in (0.5, 1, 1, 0.1, 0.01)])
    assert rates == pytest.approx(expected, rel=1e-2)


def test_each_epoch_begins_with_a_memory_of_the_network_as_it_is(epochs):
    training, saved = epochs
    model = deepcopy(training.model)
    for epoch in range(5):
        model.load_state_dict(saved[epoch]["net"])
        for name, table in plain_tables(training, model, epoch).items():
            torch.testing.assert_close(saved[epoch + 1][f"{name}.centers"], table, rtol=1e-4, atol=1e-5)


def test_the_best_epoch_has_the_highest_map_and_is_the_first_of_equal_ones(sysu, tmp_path, monkeypatch):
    training = start_training(sysu, "--epochs", 5, "--eval-start", 0, "--eval-every", 1)
    run, maps = KeptRun(tmp_path, training), [0.3, 0.5, 0.5, 0.4, 0.5]
    evaluation, progress = build_test_images(training), Progress()
    results = [(Metrics(np.full(20, 0.6), mAP, 0.2), {}) for mAP in maps]
    monkeypatch.setattr(train, "evaluate", lambda *_: results[progress.epoch - 1])
    for epoch in range(1, 6):
        progress.epoch = epoch
        evaluate_if_due(training, evaluation, progress, run, Board(None, 0))
    assert run.chosen == [1, 2]
    assert progress.best == {"epoch": 2, "rank1": 0.6, "mAP": 0.5, "mINP": 0.2}


BORDERS = {  # grey value of what a crop reaches into: docs/method.md, section 3
    "sysu": {"visible": 0, "infrared": 0, "aux": 0},
    "regdb": {"visible": 127, "infrared": 127, "aux": 0},
    "llcm": {"visible": 0, "infrared": 0, "aux": 0},
}


@pytest.mark.parametrize("dataset", BORDERS)
def test_each_dataset_is_augmented_by_its_recipe(dataset, sysu, tmp_path):
    root = sysu
    if dataset != "sysu":
        root = tmp_path / dataset
        synthetic.draw_dataset(synthetic.PLANS[dataset](4, 2, 2, 0), root, 0, height=32, width=16)
    training = start_training(root, "--dataset", dataset)
    loader, colour = training.loader, np.array([40, 110, 220], np.uint8)
    loader.images = {modality: np.full_like(own, colour) for modality, own in loader.images.items()}
    batches = [images for epoch in range(4) for images, _ in loader.epoch(epoch)]
    for modality, border in BORDERS[dataset].items():
        images = torch.cat([own[modality] for own in batches])  # (n, 3, H, W)

        def share(grey, images=images):
            """Of pixels that were this grey and are normalised, by whichever channel's constants."""
            normal = (grey / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
            return sum((images[:, 0] - value).abs() < 1e-5 for value in normal).float().mean()

        assert share(border) > 0.05, modality
        assert share(127 - border) == 0, modality
        one_channel = (images.amax(1) - images.amin(1)).amax((1, 2)) < 1e-5
        expected = {"visible": 0, "infrared": 0 if dataset == "regdb" else 7 / 8, "aux": 1}[modality]
        assert one_channel.float().mean() == pytest.approx(expected, abs=0.15 * (0 < expected < 1)), modality


# What the command line means


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ((20, 40), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 20: 1, 21: 0.1, 39: 0.1, 40: 0.01, 159: 0.01}),  # SYSU, LLCM
        ((30, 60), {0: 0.1, 9: 1, 30: 1, 31: 0.1, 59: 0.1, 60: 0.01, 159: 0.01}),  # RegDB
    ],
)
def test_learning_rate(decay, expected):
    rates = {epoch: train.learning_rate(epoch, 3.5e-4, 10, decay) for epoch in expected}
    assert rates == pytest.approx({epoch: 3.5e-4 * factor for epoch, factor in expected.items()})


def test_what_was_typed_wins_over_the_defaults_of_the_dataset():
    args = parse_args(
        ["--dataset", "regdb", "--num-pos", "4", "--decay-epochs", "20", "40", "--img-h", "384"]
    )
    assert (args.num_pos, args.decay_epochs, args.img_h) == (4, [20, 40], 384)  # SYSU-MM01's, but typed
    args = parse_args(["--dataset", "regdb"])
    assert (args.num_pos, args.decay_epochs, args.img_h, args.img_w) == (5, [30, 60], 288, 144)
    assert args.mode == "visible-to-infrared"


def test_the_released_spelling_of_flags():
    args = parse_args(
        ["--num_pos", "7", "--img_w=24", "--model_path", "a_b", "--log_path", "c_d", "--batch_size", "3"]
    )
    assert (args.num_pos, args.img_w, args.model_path, args.batch_size) == (7, 24, "a_b", 3)
    assert args.log_path == "c_d"


# A whole run


def test_a_run_says_what_it_does(trained):
    lines = [line[20:] for line in trained[1].stdout.splitlines()]  # without the clock
    for begin in ("command: python ", "versions: Python ", "training data: 8 identities", "device: cpu"):
        assert sum(line.startswith(begin) for line in lines) == 1, begin
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert all(f"{term} " in epochs[0] for term in TERMS)
    assert "rate 3.50e-05" in epochs[0]
    assert "rate 7.00e-05" in epochs[1]
    evaluations = [line for line in lines if line.startswith("  SYSU-MM01, all, single-shot")]
    assert len(evaluations) == 2
    assert all(word in evaluations[0] for word in ("after epoch 1: ", "rank-1", "mAP", "mINP"))
    assert re.search(r"; 0:00:\d\d left$", epochs[0])
    assert epochs[1].endswith("; 0:00:00 left")
    assert lines[-1].startswith("finished: save_model")
    assert trained[1].stderr == ""


def test_a_run_writes_its_files_and_no_others(trained):
    folder = trained[0]
    log = only(folder, "log/sysu_log/*.log")
    events = only(folder, f"log/vis_log/{log.stem}/events.*")
    history = log.with_suffix(".jsonl")
    expected = [
        history,
        log,
        events,
        *(folder / "save_model" / f"{log.stem}_{which}.t" for which in ("best", "last")),
    ]
    assert files(folder) == [str(path.relative_to(folder)) for path in expected]
    assert re.fullmatch(r"sysu_p2_n4_lr0\.00035_seed0_[0-9a-f]{6}", log.stem)
    logged = [line[20:] for line in log.read_text().splitlines()]
    assert logged[0].startswith("command: python ")  # the first lines tell how to do it again
    assert logged[1].startswith("versions: Python ")
    assert "source " in logged[1]
    assert logged[2].startswith("settings: amp off, arch resnet18, array_path None, batch_size 4, ")
    assert logged[3].startswith("training data: 8 identities, 58 visible, 30 infrared images of 32x16, ")
    assert len(logged[3].rpartition(" ")[2]) == 16
    assert [line[20:] for line in trained[1].stdout.splitlines()][-len(logged) :] == logged


def test_a_run_writes_a_line_of_json_for_each_epoch(trained):
    path = only(trained[0], "log/sysu_log/*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["rate"] for record in records] == pytest.approx([3.5e-5, 7e-5])
    for record in records:
        assert list(record["loss"]) == ["total", *TERMS]
        total = sum(weight * record["loss"][name] for name, weight in WEIGHTS.items())
        assert record["loss"]["total"] == pytest.approx(total, rel=1e-5)
        assert record["steps"] == 8
        speed = 3 * 4 * 2 * record["steps"] / record["seconds"]["steps"]
        assert record["images_per_second"] == pytest.approx(speed)
        assert 0 <= record["seconds"]["waiting"] < record["seconds"]["steps"]
        assert 0 < record["gigabytes"]["process"] < 100
        assert record["made_with"].keys() == {"command", "versions", "network", "device"}
    last = load_checkpoint(only(trained[0], "save_model/*_last.t"))
    assert last["history"] == records
    metrics = {"rank-1": last["cmc"][0], "rank-10": last["cmc"][9], "mAP": last["mAP"], "mINP": last["mINP"]}
    assert records[1]["evaluation"]["metrics"] == metrics
    assert records[0]["evaluation"]["best"]


def test_on_a_terminal_a_bar_follows_the_steps(sysu, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    training = start_training(sysu)
    monkeypatch.setattr(sys, "stderr", terminal)
    watch = train.Watch(training, ["one", "two", "three"], 0)
    assert list(watch) == ["one", "two", "three"]
    assert (watch.bar.n, watch.bar.total) == (3, 8)
    assert "epoch 1:" in terminal.getvalue()


@pytest.mark.parametrize(("patience", "said"), [(0, [2, 4]), (60, [])])
def test_without_a_terminal_an_epoch_speaks_now_and_then(sysu, monkeypatch, caplog, patience, said):
    monkeypatch.setattr(train, "LOOK_EVERY", 2)
    monkeypatch.setattr(train, "SPEAK_EVERY", patience)
    training = start_training(sysu, "--epochs", 160)
    monkeypatch.setattr(train.log, "propagate", True)
    monkeypatch.setattr(train.log, "handlers", [])  # an earlier test may have left caplog's
    caplog.set_level("INFO", train.log.name)
    caplog.clear()
    take_steps(training, 5)
    pattern = r"  epoch 1, step (\d) of 8: loss \d+\.\d{3}, \d+ images/s, [\d:]+ left"
    assert [int(re.fullmatch(pattern, line)[1]) for line in caplog.messages] == said


def test_checkpoints_are_read_without_running_code_and_hold_the_result(trained):
    folder, done = trained
    best, last = (
        torch.load(only(folder, f"save_model/*_{which}.t"), weights_only=True) for which in ("best", "last")
    )
    assert {"net", "cmc", "mAP", "mINP", "epoch", "args"} <= best.keys() & last.keys()
    assert last["epoch"] == 2
    assert last["args"]["num_pos"] == 2
    assert last["args"]["mode"] == "all"
    assert "optimizer" in last
    assert "optimizer" not in best
    assert "highest mAP on the test split" in best["selection"]
    assert best["best"] == last["best"]
    assert best["epoch"] == best["best"]["epoch"]
    for checkpoint in (best, last):
        [line] = [line for line in done.stdout.splitlines() if f"after epoch {checkpoint['epoch']}:" in line]
        assert f"rank-1 {100 * checkpoint['cmc'][0]:.2f}" in line
        assert f"mAP {100 * checkpoint['mAP']:.2f}  mINP {100 * checkpoint['mINP']:.2f}" in line
    assert best["mAP"] >= last["mAP"]


def test_no_epochs_evaluate_and_save_the_untrained_network(sysu, train_here, tmp_path):
    status, output, errors = train_here(*tiny_flags(sysu), "--epochs", 0)
    assert (status, errors) == (0, [])
    assert "rank-1" in output
    last = torch.load(only(tmp_path, "work/save_model/*_last.t"), weights_only=True)
    assert last["epoch"] == 0
    assert 0 <= last["mAP"] <= 1
    assert not list(tmp_path.glob("work/save_model/*_best.t"))

    before = only(tmp_path, "work/log/sysu_log/*.log").read_text()
    status, output, errors = train_here(*tiny_flags(sysu), "--epochs", 0)
    assert status == 2
    assert "--overwrite" in errors[0]
    assert only(tmp_path, "work/log/sysu_log/*.log").read_text() == before
    assert train_here(*tiny_flags(sysu), "--epochs", 0, "--overwrite")[0] == 0
    assert only(tmp_path, "work/log/sysu_log/*.log").read_text().count("command: ") == 1  # not appended


def test_check_does_everything_but_write(sysu, train_here, tmp_path):
    status, output, errors = train_here(*tiny_flags(sysu), "--check")
    assert (status, errors) == (0, [])
    for words in (
        "training data: 8 identities",
        "one step: loss",
        "one evaluation batch",
        "checkpoints: about",
    ):
        assert words in output
    assert output.splitlines()[-1][20:].startswith("check passed")
    assert not list((tmp_path / "work").iterdir())


def test_a_compiled_network_is_saved_as_the_plain_one(sysu, trained, train_here, tmp_path, monkeypatch):
    compile_with = functools.partial(torch.compile, backend="eager")  # traces it, and spares a C++ compiler
    monkeypatch.setattr(torch, "compile", compile_with)
    status, _, errors = train_here(*tiny_flags(sysu), "--epochs", 1, "--compile")
    assert (status, errors) == (0, [])
    saved = load_checkpoint(only(tmp_path / "work" / "save_model", "*_last.t"))
    plain = load_checkpoint(only(trained[0] / "save_model", "*_last.t"))
    assert saved["net"].keys() == plain["net"].keys()


def test_check_refuses_what_cannot_be_written(sysu, train_here, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--model-path", "--log-path"):
        status, _, errors = train_here(*tiny_flags(sysu), "--check", flag, tmp_path / "file" / "below")
        assert status == 2
        assert str(tmp_path / "file" / "below") in errors[-1]


def test_select_val_trains_without_the_val_ids_and_evaluates_on_them(sysu, train_here, tmp_path, monkeypatch):
    built, build = [], launch.build_test_images
    monkeypatch.setattr(launch, "build_test_images", lambda *args: built.append(build(*args)) or built[0])
    status, output, _ = train_here(*tiny_flags(sysu), "--epochs", 1, "--select", "val")
    assert status == 0
    val = {int(pid) for pid in (sysu / "exp" / "val_id.txt").read_text().split(",")}
    kept = train_samples("sysu", sysu, split="train")
    assert not val & set(kept["visible"].pids)
    counts = f"{len(kept['visible'].pids)} visible, {len(kept['infrared'].pids)} infrared"
    assert f"training data: {8 - len(val)} identities, {counts}" in output
    evaluated = [samples.pids for samples in built[0].evaluation.images().values()]
    assert set(np.concatenate(evaluated)) == val
    best = load_checkpoint(only(tmp_path, "work/save_model/*_best.t"))
    assert "val ids" in best["selection"]
    assert "val ids" in best["protocol"]


def test_select_last_chooses_no_best(sysu, train_here, tmp_path):
    status, output, _ = train_here(*tiny_flags(sysu), "--epochs", 1, "--select", "last")
    assert status == 0
    assert "best" not in output
    assert [path.name[-7:] for path in tmp_path.glob("work/save_model/*.t")] == ["_last.t"]


def test_one_gpu_for_many_processes_is_refused(train_here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, errors = train_here("--gpu", "0")
    assert status == 2
    assert errors == [
        "train.py: error: --gpu 0: leave it out with torchrun: each process takes the GPU of its local rank"
    ]


# Resuming: what is refused, what may change (test_resilience.py resumes)


def test_settings_come_from_the_checkpoint_and_some_may_change(trained, monkeypatch, tmp_path):
    last = only(trained[0], "save_model/*_last.t")
    saved = load_checkpoint(last)["args"]
    changes = [
        "--epochs",
        "9",
        "--workers",
        "2",
        "--gpu",
        "1",
        "--data-path",
        "elsewhere",
        "--log-path",
        "logs",
        "--test-batch",
        "3",
    ]
    args, run, checkpoint = open_run(typed_settings(["--resume", str(last), *changes]))
    assert run.last == last
    assert checkpoint["epoch"] == 2
    assert (args.epochs, args.workers, args.gpu, args.data_path) == (9, 2, 1, "elsewhere")
    fixed = ("dataset", "arch", "img_h", "img_w", "num_pos", "batch_size", "lr", "seed", "weights", "amp")
    assert {key: vars(args)[key] for key in fixed} == {key: saved[key] for key in fixed}


@pytest.mark.parametrize(
    "flag",
    [
        "--num-pos 4", "--batch_size 2", "--lr 0.1", "--seed 1", "--arch resnet50", "--stem shared",
        "--img-h 64", "--dataset regdb", "--mode indoor", "--select last", "--eval-every 2",
        "--warmup-epochs 1", "--decay-epochs 1 2", "--weights imagenet", "--proxies both",
        "--deterministic", "--amp auto",
    ],
)  # fmt: skip
def test_flags_that_contradict_the_checkpoint_are_refused_by_name(trained, train_here, tmp_path, flag):
    last = only(trained[0], "save_model/*_last.t")
    status, _, errors = train_here("--resume", last, "--epochs", 9, *flag.split())
    assert status == 2
    assert len(errors) == 1
    assert flag.split()[0].replace("_", "-") in errors[0]
    assert str(last) in errors[0]
    assert files(tmp_path / "work") == []


def test_a_run_that_is_there_is_not_overwritten(sysu, trained, train_here):
    last = only(trained[0], "save_model/*_last.t")
    before = {path: (trained[0] / path).read_bytes() for path in files(trained[0])}
    outputs = ["--model-path", trained[0] / "save_model", "--log-path", trained[0] / "log"]
    flags = [*tiny_flags(sysu), "--eval-start", 0, "--eval-every", 1, *outputs]
    for epochs, words in ((2, "finished run (2 epochs)"), (3, "stopped after epoch 2 of 3: --resume auto")):
        status, _, errors = train_here(*flags, "--epochs", epochs)
        assert status == 2
        assert len(errors) == 1
        assert all(text in errors[0] for text in (words, "--overwrite", str(last)))
    status, output, _ = train_here(*flags, "--epochs", 2, "--resume", "auto")
    assert status == 0
    assert "is finished: 2 epochs" in output
    assert "trained on" not in output
    elsewhere = [*flags, "--data-path", "elsewhere"]  # own images have no other name
    status, output, _ = train_here(*elsewhere, "--epochs", 2, "--resume", "auto")
    assert f"it was trained on what was in {sysu}" in output
    status, _, errors = train_here(*flags, "--epochs", 2, "--resume", "auto", "--overwrite")
    assert status == 2
    assert {path: (trained[0] / path).read_bytes() for path in files(trained[0])} == before


# Bad input: one line that names it, status 2, and nothing written


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data-path /nowhere", ["/nowhere", "demo.py"]),
        ("--dataset sisu", ["--dataset", "sysu"]),
        ("--batch-size 9", ["--batch-size 9", "8 training identities"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--lr nan", ["--lr"]),
        ("--lr -1", ["--lr"]),
        ("--epochs many", ["--epochs"]),
        ("--epoch 2", ["--epoch "]),
        ("--mode outdoor", ["--mode", "outdoor", "indoor"]),
        ("--dataset regdb --mode back", ["--mode", "back", "infrared-to-visible"]),
        ("--seed 4294967296", ["--seed", "at most 4294967295"]),
        ("--decay-epochs 40 20", ["--decay-epochs", "20 comes before 40"]),
        ("--trial 2", ["--trial"]),
        ("--amp fp16", ["--amp fp16"]),
        ("--img-h 64", ["train_rgb_resized_img.npy", "pre_process_sysu.py", "--img-h 64"]),
        ("--array-path EMPTY", ["pre_process_sysu.py --data-path DATA --output EMPTY"]),
        ("--weights EMPTY/none.pth", ["EMPTY/none.pth"]),
        ("--resume EMPTY/none_last.t", ["EMPTY/none_last.t"]),
        ("--model-path FILE/below", ["FILE/below"]),
        ("--log-path FILE", ["FILE"]),
        ("--resume FILE", ["FILE"]),
        ("--weights FILE", ["FILE"]),
        ("--dataset regdb --trial 11", ["--trial", "11", "1 to 10"]),
    ],
)
def test_bad_input_is_refused_by_name(sysu, train_here, tmp_path, capsys, flags, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("a file")
    place = {"EMPTY": str(tmp_path / "EMPTY"), "FILE": str(tmp_path / "FILE"), "DATA": str(sysu)}
    for name, path in place.items():
        flags = flags.replace(name, path)
    status, _, errors = train_here(*tiny_flags(sysu), "--epochs", 1, *flags.split())
    assert status == 2
    assert len(errors) == 1, errors
    for word in words:
        for name, path in place.items():
            word = word.replace(name, path)
        assert word in errors[0]
    assert files(tmp_path / "work") == []


def test_a_checkpoint_with_impossible_settings_is_refused(trained, train_here, tmp_path):
    checkpoint = load_checkpoint(only(trained[0], "save_model/*_last.t"))
    for name, value in (("trial", "x"), ("batch_size", 0), ("lr", "fast"), ("deterministic", 1)):
        path = tmp_path / f"{name}_last.t"
        save_checkpoint(checkpoint | {"args": checkpoint["args"] | {name: value}}, path)
        status, _, errors = train_here("--resume", path)
        assert status == 2
        named = "trial 'x'" if name == "trial" else f"argument --{name.replace('_', '-')}: "
        assert errors[0].startswith(f"train.py: error: {path}: invalid settings: {named}")


def test_gpus_that_are_not_there(sysu, train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, _, errors = train_here(*tiny_flags(sysu), "--gpu", 99)
    assert status == 2
    assert "--gpu 99" in errors[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, output, _ = train_here(*tiny_flags(sysu), "--gpu", 99, "--check")
    assert status == 0
    assert "running on the CPU" in output


def test_imagenet_weights_without_a_network(sysu, train_here, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    status, _, errors = train_here(*tiny_flags(sysu), "--weights", "imagenet")
    assert status == 2
    assert "--weights imagenet" in errors[0]
    assert files(tmp_path / "work") == []


def edit_checkpoint(change):
    def edit(checkpoint):
        change(checkpoint)
        return checkpoint

    return edit


BROKEN_CHECKPOINTS = {
    "a list": lambda checkpoint: [1, 2],
    "no network": edit_checkpoint(lambda c: c.pop("net")),
    "no optimiser": edit_checkpoint(lambda c: c.pop("optimizer")),
    "no epoch": edit_checkpoint(lambda c: c.pop("epoch")),
    "settings missing": edit_checkpoint(lambda c: c.update(args={})),
    "other shapes": edit_checkpoint(lambda c: c["net"].update({"neck.weight": torch.ones(3)})),
    "weights missing": edit_checkpoint(lambda c: c["net"].pop("neck.weight")),
    "broken optimiser": edit_checkpoint(lambda c: c["optimizer"].update(state=7)),
    "another optimiser": edit_checkpoint(lambda c: c["optimizer"].update(param_groups=[])),
}


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_checkpoints_that_cannot_be_resumed_are_refused_by_name(sysu, trained, train_here, tmp_path, case):
    checkpoint = load_checkpoint(only(trained[0], "save_model/*_last.t"))
    path = tmp_path / "broken_last.t"
    torch.save(BROKEN_CHECKPOINTS[case](checkpoint), path)
    status, _, errors = train_here("--resume", path, "--epochs", 3)
    assert status == 2
    assert len(errors) == 1, errors
    assert str(path) in errors[0]


@pytest.fixture
def copy(sysu, tmp_path):
    """A copy of the dataset that a test may break, with its times."""
    return shutil.copytree(sysu, tmp_path / "sysu")


def an_image(root):
    return sorted(root.glob("cam1/*/*.jpg"))[0]


def save(root, name, array):
    np.save(root / f"train_{name}.npy", array)


BROKEN_DATA = {  # what a stranger does to a dataset: the words of the refusal
    "arrays missing": (lambda r: (r / "train_ir_resized_img.npy").unlink(), "train_ir_resized_img.npy"),
    "a float array": (
        lambda r: save(r, "rgb_resized_img", np.zeros((58, 32, 16, 3))), "train_rgb_resized_img.npy"
    ),
    "a flat array": (
        lambda r: save(r, "rgb_resized_img", np.zeros((58, 32), np.uint8)), "train_rgb_resized_img.npy"
    ),
    "labels with holes": (
        lambda r: save(r, "ir_resized_label", np.full(30, 7)), "train_ir_resized_label.npy"
    ),
    "pickled labels": (
        lambda r: np.save(r / "train_ir_resized_label.npy", np.array([{}] * 30)), "train_ir_resized_label.npy"
    ),
    "an image changed": (lambda r: Image.new("RGB", (24, 48)).save(an_image(r)), "pre_process_sysu.py"),
    "an image more": (lambda r: shutil.copy(an_image(r), an_image(r).with_name("0099.jpg")), "images"),
    "a folder named like an image": (lambda r: an_image(r).with_name("0099.jpg").mkdir(), "0099.jpg"),
    "a dangling link": (lambda r: an_image(r).with_name("0099.jpg").symlink_to("gone"), "0099.jpg"),
    "no list of ids": (lambda r: (r / "exp" / "test_id.txt").unlink(), "test_id.txt"),
    "a bad id": (lambda r: (r / "exp" / "train_id.txt").write_text("1,x\n"), "train_id.txt, line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_DATA)
def test_broken_datasets_are_refused_by_name(copy, train_here, tmp_path, case):
    breaks, words = BROKEN_DATA[case]
    breaks(copy)
    status, _, errors = train_here(*tiny_flags(copy), "--epochs", 1)
    assert status == 2
    assert len(errors) == 1, errors
    assert words in errors[0]
    assert files(tmp_path / "work") == []


def test_broken_test_images_are_listed_before_the_first_epoch(copy, train_here, tmp_path):
    pids = [int(pid) for pid in (copy / "exp" / "test_id.txt").read_text().split(",")]
    bad = [sorted((copy / f"cam{camera}").glob(f"{pid:04d}/*.jpg")) for camera in (3, 6) for pid in pids]
    bad = [images[0] for images in bad if images][:2]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:200])
    for words in (["--check"], ["--epochs", 3, "--eval-start", 2]):
        status, output, errors = train_here(*tiny_flags(copy), *words)
        assert status == 2
        assert len(errors) == 1, errors
        assert all(str(path) in errors[0] for path in bad)
        assert "epoch 1" not in output
    assert files(tmp_path / "work") == []


def test_what_datasets_collect_is_passed_over(copy, train_here):
    for name in ("Thumbs.db", ".DS_Store", "._0001.jpg"):
        an_image(copy).with_name(name).write_bytes(b"rubbish")
    for name in ("train", "val", "test"):  # as other systems save lists: BOM, CRLF, commas at the end
        path = copy / "exp" / f"{name}_id.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b",\r\n\r\n"))
    status, output, errors = train_here(*tiny_flags(copy), "--check")
    assert (status, errors) == (0, [])
    assert "training data: 8 identities, 58 visible, 30 infrared" in output


# --trial all


def trial_flags(folder):
    return ["--dataset", "regdb", "--trial", "all", "--gpu", "-1", "--model-path", f"{folder}", "--name", "t"]


def test_a_process_continues_no_trial_that_the_first_one_is_about_to_remove(
    tmp_path, monkeypatch, train_here
):
    class SecondProcess:
        rank, world_size = 1, 2

        def refuse_one_gpu(self, gpu):
            pass

        def start(self, device):
            pass

        def barrier(self):  # the first process comes to it when it has removed the former runs
            for path in tmp_path.glob("*.t"):
                path.unlink()

        def stop(self):
            pass

    words = [*trial_flags(tmp_path), "--trial", "3"]
    args, run, _ = open_run(typed_settings(words))
    state = {"net": {"w": torch.zeros(3)}, "epoch": 160, "world_size": 1, "args": vars(args)}
    save_checkpoint(dict.fromkeys(STATE) | state, run.last)
    continued = []
    monkeypatch.setattr(launch, "Processes", SecondProcess)
    monkeypatch.setattr(launch, "train_run", lambda args, run, checkpoint, *_: continued.append(checkpoint))
    assert train_here(*trial_flags(tmp_path))[0] == 0
    assert [checkpoint is not None for checkpoint in continued] == [False, False, True] + 7 * [False]
    continued.clear()
    assert train_here(*trial_flags(tmp_path), "--overwrite")[0] == 0
    assert continued == 10 * [None]


def test_all_trials_are_headed_once_and_have_a_mean(tmp_path, train_here, monkeypatch):
    monkeypatch.setitem(DATASETS, "regdb", dataclasses.replace(DATASETS["regdb"], trials=(1, 2)))
    synthetic.draw_dataset(synthetic.plan_regdb(4, 2, 2, 0), tmp_path / "regdb", 0, height=32, width=16)
    flags = [*tiny_flags(tmp_path / "regdb"), *trial_flags("models"), "--epochs", 0]
    status, output, errors = train_here(*flags)
    assert (status, errors) == (0, [])
    said = [line[20:] for line in output.splitlines()]
    counts = {
        name: sum(line.startswith(f"{name}: ") for line in said) for name in ("versions", "network", "run")
    }
    assert counts == {"versions": 1, "network": 1, "run": 2}
    for log in Path("log/regdb_log").glob("*.log"):  # which is read alone
        assert {"versions", "network", "run"} <= {
            line[20:].split(": ")[0] for line in log.read_text().splitlines()
        }
    maps = [100 * load_checkpoint(path)["mAP"] for path in Path("models").glob("*_last.t")]
    expected = f"mAP {statistics.mean(maps):.2f} ± {statistics.stdev(maps):.2f}"
    assert said[-1].startswith("RegDB, mean of 2 trials: rank-1 ")
    assert expected in said[-1]
    status, output, _ = train_here(*flags, "--resume", "auto")  # finished runs count too
    assert output.splitlines()[-1][20:] == said[-1]


def test_all_trials_cannot_continue_the_run_of_one(tmp_path, train_here):
    status, _, errors = train_here(*trial_flags(tmp_path), "--resume", tmp_path / "t_trial_1_last.t")
    assert status == 2
    assert "t_trial_1_last.t: a file is one trial's run" in errors[0]
