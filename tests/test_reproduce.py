"""tools/reproduce.py, whole, on tiny datasets of the three layouts."""

import json
import re
import shutil
import sys
from argparse import Namespace

import pytest

import synthetic
from reporting.paper import tables
from tools import reproduce
from utils import UserError

FLAGS = [
    "--incomplete", "--gpu", "-1", "--amp", "off", "--workers", "1", "--img-h", "32", "--img-w", "16",
    "--arch", "resnet18", "--weights", "none", "--batch-size", "4", "--num-pos", "1", "--epochs", "1",
]  # fmt: skip
PLANS = {
    "sysu": synthetic.plan_sysu(4, 2, 1, 0),
    "regdb": synthetic.plan_regdb(4, 2, 1, 0),
    "llcm": synthetic.plan_llcm(4, 2, 1, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    for name, plan in PLANS.items():
        synthetic.draw_dataset(plan, folder / "data" / name, height=48, width=24, workers=0)
    return folder


@pytest.fixture
def reproduced(warm_commands, monkeypatch, capfd):
    """tools.reproduce in a folder, its commands as processes: the lines that were printed."""

    def reproduced(folder, *flags):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--data-path", "data", *flags, *FLAGS])
        reproduce.main(reproduce.get_args_parser().parse_known_args())
        return capfd.readouterr().out.splitlines()

    return reproduced


def commands_of(lines):
    return [line for line in lines if line.startswith("$ ")]


def test_it_makes_the_table_and_only_what_is_missing(folder, reproduced):
    assert len(commands_of(reproduced(folder))) == 5 + 3 + 3
    results = (folder / "reproduce" / "RESULTS.md").read_text()
    rows = [line[2:-2].split(" | ") for line in results.splitlines() if line.startswith("| ")]
    report = json.loads((folder / "reproduce" / "regdb_shared_seed0_test.json").read_text())
    mean, first = report["results"][0]["mean"], report["results"][0]["trials"]["1"]
    means, trials = [row for row in rows if row[0] == "visible to infrared"][:2]
    assert means[3:5] == ["93.15", "88.32"]
    rank1, mAP, *gaps = (float(means[k]) for k in (1, 2, 5, 6))
    assert [rank1, mAP] == pytest.approx([100 * mean["cmc"][0], 100 * mean["mAP"]], abs=5e-3)
    assert gaps == pytest.approx([rank1 - 93.15, mAP - 88.32], abs=0.011)
    assert trials[1:3] == ["0", f"{100 * first['cmc'][0]:.2f} / {100 * first['mAP']:.2f}"]
    for words in (
        "all, multi-shot, published galleries", "74.77", "## LLCM", "**not complete**", "versions: Python ",
        "device: cpu", "batch_size 4", "regdb_shared_seed0_train",
    ):  # fmt: skip
        assert words in results, words

    assert commands_of(reproduced(folder)) == []
    path = folder / "reproduce" / "done.json"
    done = json.loads(path.read_text())
    del done["llcm_shared_seed0_test"]
    path.write_text(json.dumps(done))
    [command] = commands_of(reproduced(folder))
    assert command.startswith("$ python test.py --resume reproduce/save_model/llcm_shared_seed0_best.t")


def test_a_dry_run_prints_the_commands_and_an_estimate_and_writes_nothing(folder, reproduced, tmp_path):
    shutil.copytree(folder / "data" / "llcm", tmp_path / "data" / "llcm")
    shutil.copytree(folder / "data" / "sysu", tmp_path / "data" / "sysu")
    before = sorted(tmp_path.rglob("*"))
    elsewhere = ("--array-path", "arrays", "--pixel-range", "10", "90")  # the estimate needs neither
    lines = reproduced(tmp_path, "--dry-run", "--seeds", "2", "--stem", "shared", "two-stream", *elsewhere)
    printed = [line for line in lines if line.startswith("python ")]
    assert len(printed) == 1 + 2 * 4 + 2 + 3 * 4  # of LLCM and of SYSU-MM01, which has published galleries
    assert sum("--stem two-stream --seed 1" in line for line in printed) == 2
    [line] = [line for line in lines if line.startswith("llcm: ")]
    timed = r"llcm: 4 trainings, 1 epochs of \d+ steps of [\d.]+ s: [\d.]+ h; memory of the process: at most "
    assert re.match(timed, line)
    assert re.match(r"an estimate, .*: [\d.]+ hours, [\d.]+ GB of disk$", lines[-1])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_incomplete_dataset_stops_it_unless_allowed(folder, tmp_path):
    words = ["--data-path", str(folder / "data"), "--output", str(tmp_path)]
    args, extra = reproduce.get_args_parser().parse_known_args(words)
    assert extra == []
    with pytest.raises(UserError, match="regdb is not complete"):
        reproduce.do("regdb_check", reproduce.plan(args, [])["regdb_check"], args, {})


def test_the_time_of_what_was_stopped_counts(tmp_path, monkeypatch):
    args = Namespace(output=str(tmp_path), incomplete=False)
    clock = iter([0, 10, 100, 103])
    monkeypatch.setattr(reproduce.time, "perf_counter", lambda: next(clock))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce.do("sysu_train", ("train.py", "--seed", 1), args, {})
    done = json.loads((tmp_path / "done.json").read_text())
    assert done == {"sysu_train": {"seconds": 10}}
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: (0, ""))
    reproduce.do("sysu_train", ("train.py", "--seed", 1), args, done)
    assert done["sysu_train"] == {
        "seconds": 13,
        "command": ["python", "train.py", "--seed", "1"],
        "status": 0,
    }


@pytest.mark.parametrize(("flags", "words"), [(["--epoch", "1"], "--epoch"), (["--lr", "0"], "--lr")])
def test_a_wrong_flag_is_told_before_anything_runs(folder, flags, words):
    args, extra = reproduce.get_args_parser().parse_known_args(["--data-path", str(folder / "data"), *flags])
    with pytest.raises(UserError, match=words):
        reproduce.plan(args, extra)


def test_preprocessing_writes_where_training_looks(folder):
    flags = ["--array-path", "arrays", "--pixel-range", "10", "90"]
    args, extra = reproduce.get_args_parser().parse_known_args(["--data-path", str(folder / "data"), *flags])
    commands = reproduce.plan(args, extra)
    assert commands["sysu_preprocess"][-5:] == ("--output", "arrays", "--pixel-range", 10, 90)
    train = next(
        words for name, words in commands.items() if name.startswith("sysu") and name.endswith("_train")
    )
    assert set(flags) < set(map(str, train))


def test_a_folder_without_datasets_is_refused(tmp_path):
    args, _ = reproduce.get_args_parser().parse_known_args(["--data-path", str(tmp_path)])
    with pytest.raises(UserError, match="none of the folders sysu, regdb, llcm"):
        reproduce.plan(args, [])


def test_several_seeds_give_mean_and_deviation(tmp_path):
    for seed, mAP in ((0, 0.5), (1, 0.7)):
        metrics = {"cmc": [0.25] * 20, "mAP": mAP}
        row = {"dataset": "llcm", "mode": "visible-to-infrared", "shot": 1, "galleries": "seeded"}
        report = {"checkpoints": [{"args": {}, "selection": "the last epoch"}], "results": [
            row | {"mean": metrics, "trials": {"0": metrics}}]}  # fmt: skip
        (tmp_path / f"llcm_shared_seed{seed}_test.json").write_text(json.dumps(report))
    parts = tables([tmp_path / f"llcm_shared_seed{seed}_test.json" for seed in range(3)], "shared")
    assert "| visible to infrared | 25.00 ± 0.00 | 60.00 ± 14.14 | - | - | - | - |" in parts[1]
