"""benchmarks/: baselines give what ours gives, and one table is printed; no time is asserted."""

from pathlib import Path

import pytest
import torch
import warm

import precision
from benchmarks import extraction, limits, memory_and_loss, timing, training_step
from benchmarks.__main__ import COLUMNS, NAMES, duration, get_args_parser, main, table, target_met
from benchmarks.workload import draw_sysu, training_of
from utils import MODALITIES, UserError

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = [
    "--amp=off",
    "--arch=resnet18",
    "--img-h=32",
    "--img-w=16",
    "--batch-size=4",
    "--num-pos=2",
    "--test-batch=5",
]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    root = tmp_path_factory.mktemp("workload") / "sysu"
    draw_sysu(root, 6, {"visible": 14, "infrared": 12}, 32, 16, noise=True)
    return training_of(root, "cpu", *TINY)


def test_the_stand_in_is_a_dataset_with_its_arrays(training):
    loader = training.loader
    assert {modality: len(images) for modality, images in loader.images.items()} == {
        "visible": 14,
        "infrared": 12,
    }
    assert sorted(loader.labels["visible"]) == sorted([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    assert loader.images["visible"].std() > 50


def test_memories_and_losses_agree_with_the_baseline():
    features, labels, bank = memory_and_loss.draw(20, "cpu", dim=16)
    memory_and_loss.check(features, labels, bank)
    bank.visible.momentum = 0.5
    with pytest.raises(AssertionError):
        memory_and_loss.check(features, labels, bank)


def test_the_plain_step_is_ours(training, monkeypatch):
    training.bank.reset({modality: torch.randn_like(training.bank.shared.proxies) for modality in MODALITIES})
    training_step.check(training)
    monkeypatch.setattr(training_step.PlainNonLocal, "forward", lambda self, x: x)
    with pytest.raises(AssertionError):
        training_step.check(training)


def test_extraction_agrees_with_single_images(training, monkeypatch):
    training.model.eval()
    extraction.check_rebuilding(training)
    random = {modality: torch.randn_like(training.bank.shared.proxies) for modality in MODALITIES}
    monkeypatch.setattr(extraction, "rebuild_memory", lambda training, _: training.bank.reset(random))
    with pytest.raises(AssertionError, match="the memory disagrees"):
        extraction.check_rebuilding(training)


def test_the_command_prints_one_table(monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)  # which no benchmark compares first
    context = warm.warm_context("1")  # instead of a new interpreter
    monkeypatch.setattr(timing.multiprocessing, "get_context", lambda _: context)
    quick = ("reranking", "memory_and_loss", "processes", "embedding", "search", "start_up", "preprocessing")
    main(get_args_parser().parse_args(["--quick", "--only", *quick, "--format", "markdown"]))
    heading, blank, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in heading
    assert blank == ""
    assert columns == f"| {' | '.join(COLUMNS)} |"
    works = [
        *("k-reciprocal", "k-reciprocal", "gnn"),
        *("k-reciprocal", "aim", "gnn"),
        "memories",
        "training",
        "embedding",
        *["exact"] * 5,
        *("start-up", "test.py"),
        "preprocessing,",
    ]
    runtimes = [row for row in rows if row.startswith("| resnet18 at ")]  # one for each that is installed
    assert any("folded" in row for row in runtimes)
    assert [row.split()[1] for row in rows if row not in runtimes] == works


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU here"):
        main(get_args_parser().parse_args(["--device", "cuda"]))


def test_every_script_is_in_the_table():
    shared = {"__init__", "__main__", "timing", "workload", "limits", "plain_input"}
    assert {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} - shared == set(NAMES)


def row(**values):
    return {"work": "w", "baseline_s": 2.0, "ours_s": 1.0, "ratio": 2.0, "bound": None, "note": ""} | values


@pytest.mark.parametrize(
    ("values", "met"),
    [
        ({}, None),
        ({"bound": 2.0}, True),
        ({"bound": 2.1}, False),
        ({"bound": ">= 60 x"}, False),
        ({"bound": "< 1.5 s"}, True),
        ({"bound": "< 1 s", "ours_s": 1.5}, False),
        ({"bound": "in words", "met": True}, True),
    ],
)
def test_targets(values, met):
    assert target_met(row(**values)) is met


def test_a_target_that_nothing_decides_is_a_defect():
    with pytest.raises(ValueError, match="in words"):
        target_met(row(bound="in words"))


def test_the_text_table_lines_up_and_durations_have_units():
    first, second = table([row(note="here")], "text").splitlines()
    assert first.index("note") == second.index("here")
    assert [duration(s) for s in (None, 12.34, 0.0123, 5e-6)] == ["–", "12.3 s", "12.3 ms", "5.00 µs"]


def test_operations_and_bytes_are_counted_without_computing():
    operations, total, products = limits.count(3, 32, 16, torch.bfloat16)
    twice = limits.count(6, 32, 16, torch.bfloat16)
    assert twice[0] == 2 * operations > 0
    assert 0 < products < total < twice[1] < 2 * total  # the weights are read once
