"""tools/ablation.py: real runs of two variants, and the table of made-up ones."""

import json
import statistics
import sys

import numpy as np
import pytest

from engine.settings import parse_args
from tools import ablation
from tools.commands import machine_flags
from utils import UserError

FLAGS = ["--quick", "--seeds", "1", "--gpu", "-1", "--amp", "off", "--workers", "1", "--output", "out"]


def ablate(*flags):
    sys.argv[1:] = [*FLAGS, *flags]
    ablation.main(ablation.get_args_parser().parse_args())


@pytest.mark.parametrize("variant", ablation.VARIANTS)
def test_every_variant_is_a_command_line_of_its_own(variant):
    args, full = (
        vars(parse_args([*ablation.TRAINING, *flags.split()])) for flags in (ablation.VARIANTS[variant], "")
    )
    changed = {key for key in full.keys() - {"name", "command"} if args[key] != full[key]}
    assert len(changed) == (variant != ablation.FULL)


def test_it_trains_what_is_missing_and_writes_the_table(warm_commands, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablation.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    variants = {ablation.FULL: "", "untrained": "--epochs 0"}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    (tmp_path / "page.md").write_text(f"before\n{ablation.BEGIN}\nold\n{ablation.END}\nafter\n")
    ablate("--table", "page.md")
    printed = capfd.readouterr().out
    assert "about 0 min left" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["runs"].keys() == variants.keys()
    found = results["runs"][ablation.FULL]["0"]
    report = json.loads((tmp_path / "out" / "full-method_seed0.json").read_text())
    indoor = next(row for row in report["results"] if row["mode"] == "indoor")
    assert found["indoor mAP"] == pytest.approx(100 * indoor["mean"]["mAP"])
    with np.load(tmp_path / "out" / "full-method_seed0.npz") as features:  # for other protocols, afterwards
        assert len(features["visible_features"]) == len(features["visible_paths"]) > 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert f"| {found['all rank-1']:.1f} (one run) | {found['all mAP']:.1f} (one run) |" in page

    (tmp_path / "out" / "results.json").write_text(
        json.dumps(results | {"runs": {ablation.FULL: results["runs"][ablation.FULL]}})
    )
    asked = []
    monkeypatch.setattr(ablation, "draw_data", lambda *_: None)
    monkeypatch.setattr(ablation, "train_and_test", lambda _, *run: asked.append(run[:2]) or found)
    ablate()
    assert asked == [("untrained", "0")]
    with pytest.raises(UserError, match=r"results\.json has runs of other settings"):
        ablate("--amp", "bf16")


def run_of(all_mAP, indoor_mAP):
    return {"all rank-1": 10.0, "all mAP": all_mAP, "indoor rank-1": 20.0, "indoor mAP": indoor_mAP}


def test_the_table_pairs_the_runs_of_one_seed():
    full = {"0": run_of(30, 50), "1": run_of(40, 40), "2": run_of(35, 45)}
    other = {"0": run_of(31, 40), "1": run_of(43, 30)}  # one run is missing
    lines = ablation.table({ablation.FULL: full, "two stems": other}).splitlines()
    assert len(lines) == 2 + len(ablation.VARIANTS)
    cells = {line.split(" | ")[0][2:]: line[2:-2].split(" | ") for line in lines}
    assert cells[ablation.FULL][1:4] == ["3", "10.0 ± 0.0", "35.0 ± 5.0"]
    assert cells["two stems"][1] == "2"
    assert cells["two stems"][3] == f"37.0 ± {statistics.stdev([31, 43]):.1f}"
    assert cells["two stems"][-2:] == [f"+2.0 ± {statistics.stdev([1, 3]):.1f}", "-10.0 ± 0.0"]
    assert cells["without `align`"][1:3] == ["0", "not measured"]
    assert len(ablation.table({ablation.FULL: full}, first=3).splitlines()) == 2 + 3
    assert len(ablation.table({ablation.FULL: full, "two stems": other}, first=1).splitlines()) == 2 + 2


LONGER = ["--epochs", "24", "--lr", "0.5", "--weights", "a.t"]


@pytest.mark.parametrize(
    ("words", "schedule"),
    [([], ["0.001", "1", "4", "6", "6", "none"]), (LONGER, ["0.5", "4", "16", "24", "24", "a.t"])],
)
def test_a_longer_schedule_has_the_same_shape(words, schedule):
    flags = list(map(str, ablation.training_flags(ablation.get_args_parser().parse_args(words))))
    args = parse_args(flags)
    found = [args.lr, args.warmup_epochs, *args.decay_epochs, args.epochs, args.weights]
    assert list(map(str, found)) == schedule


def test_a_page_without_the_marks_is_refused_and_kept(tmp_path):
    (tmp_path / "page.md").write_text("my own words")
    with pytest.raises(UserError, match=r"page\.md: no file with one"):
        ablation.write_table(tmp_path / "page.md", "table")
    assert (tmp_path / "page.md").read_text() == "my own words"


@pytest.mark.parametrize(("gpu", "words"), [([], []), (["--gpu", "1"], ["--gpu", "1"])])
def test_a_gpu_that_was_not_typed_is_not_passed_on(gpu, words):
    flags = list(map(str, machine_flags(ablation.get_args_parser().parse_args(gpu))))
    assert flags[: len(words)] == words
    assert ("--gpu" in flags) is bool(words)
