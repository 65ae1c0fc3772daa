"""engine/: names that tell runs apart, one writer at a time, logs and checkpoints that fit together."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import load_checkpoint, save_checkpoint
from engine.files import MAY_CHANGE, Run, environment, run_name
from engine.settings import (
    STATE,
    dataset_defaults,
    get_args_parser,
    open_run,
    parse_args,
    settings_to_resume,
    typed_settings,
)
from utils import UserError, log, log_to_terminal, versions

NET = {"w": torch.zeros(3)}
# A value of each flag that is not its default.
OTHER = {
    "data_path": "elsewhere", "img_h": 64, "img_w": 32, "gpu": -1, "workers": 99,
    "amp": "off", "test_batch": 7, "array_path": "arrays", "cache": "disk", "arch": "resnet18",
    "stem": "shared", "weights": "none", "epochs": 3, "lr": 0.1, "warmup_epochs": 1,
    "decay_epochs": [1, 2], "batch_size": 2,
    "num_pos": 1, "pad": 2, "proxies": "both", "seed": 5, "deterministic": True, "compile": True,
    "mode": "indoor", "select": "val", "eval_start": 0, "eval_every": 1, "model_path": "models",
    "log_path": "logs", "name": "mine", "resume": "auto", "overwrite": True, "check": True,
    "pixel_range": [0.0, 9.0], "test_identities": 3, "loss": "hard-triplet", "loss_weights": ["aux=0"],
    "temperature": 0.1, "momentum": 0.5, "shared_momentum": 0.2, "update": "mean", "margin": 0.1,
    "no_aux": True,
}  # fmt: skip


def defaults_of(dataset="sysu"):
    return vars(get_args_parser().parse_args([])) | dataset_defaults(dataset) | {"dataset": dataset}


def name_of(words="", **changes):
    args = parse_args(words.split())
    return run_name(vars(args) | changes, defaults_of(args.dataset))


@pytest.fixture
def run(tmp_path):
    run = Run("toy_p4", "sysu", tmp_path / "save_model", tmp_path / "log")
    run.acquire()
    yield run
    run.release()


# --- names


def test_the_name_of_a_plain_run():
    assert name_of() == "sysu_p4_n8_lr0.00035_seed0"
    assert name_of("--dataset regdb --trial 3") == "regdb_p5_n8_lr0.00035_seed0"
    assert parse_args(["--dataset", "llcm"]).name == "llcm_p4_n8_lr0.00035_seed0"
    assert re.fullmatch(r"llcm_p4_n8_lr0\.00035_seed0_[0-9a-f]{6}", name_of("--dataset llcm --stem shared"))


def test_a_run_is_named_as_the_user_says(tmp_path):
    args, run, _ = open_run(
        typed_settings(["--name", "my first/run", "--model-path", str(tmp_path), "--dataset", "regdb"])
    )
    assert args.name == "my first/run"
    assert run.last == tmp_path / "my-first-run_trial_1_last.t"


def test_every_setting_is_in_the_name_unless_it_may_change_within_a_run():
    defaults = defaults_of()
    assert OTHER.keys() | {"dataset", "trial"} == defaults.keys()  # a new flag wants a value here
    assert defaults.keys() > MAY_CHANGE
    names = {key: name_of(**{key: value}) for key, value in OTHER.items()}
    for key, name in names.items():
        assert (name == name_of()) is (key in MAY_CHANGE), key
    fixed = [name for key, name in names.items() if key not in MAY_CHANGE]
    assert len(set(fixed)) == len(fixed)
    assert max(map(len, names.values())) < 50


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"weights": "a/b.pth"}, {"weights": "a-b.pth"}),
        ({"weights": "a/" * 99 + "b.pth"}, {"weights": "a/" * 99 + "c.pth"}),
        ({"weights": "w_amp-off"}, {"weights": "w", "amp": "off"}),
        ({"decay_epochs": [12, 3]}, {"decay_epochs": [1, 23]}),
    ],
)
def test_settings_that_look_alike_have_different_names(one, other):
    assert name_of(**one) != name_of(**other)


@pytest.mark.parametrize("weights", ["/models/my model (1)*?.pth", "../../x", "ü" * 100, "a\nb", "\udcff"])
def test_a_name_is_one_that_a_file_can_have(weights, tmp_path):
    everything = OTHER | {"weights": weights, "mode": "infrared-to-visible"}
    run = Run(name_of("--dataset regdb", **everything), "regdb", tmp_path, tmp_path / "log", trial=10)
    assert run.name.endswith("_trial_10")
    assert Path(run.name).name == run.name
    run.acquire()  # makes files of that name
    run.save({"net": NET, "history": []}, True, "the best")
    run.release()


# --- the lock


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_refuses_a_second_process_and_ends_with_the_first(tmp_path):
    folders = tmp_path / "save_model", tmp_path / "log"
    run = Run("toy_p4", "sysu", *folders)
    run.acquire()
    run.release()
    command = [sys.executable, "-c", HOLD, folders[0] / ".toy_p4.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=r"^another process is training toy_p4 in .*save_model right"):
                run.acquire()
            other = Run("toy_p5", "sysu", *folders)  # another run is not in the way
            other.acquire()
            other.release()
            leftover = folders[0] / ".toy_p4_last.t.abc.part"  # as a process that is killed writing leaves it
            leftover.write_bytes(b"half")
        finally:
            holder.kill()
    run.acquire()
    assert not leftover.exists()
    run.release()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for folders in [(tmp_path / "file", tmp_path / "log"), (tmp_path / "models", tmp_path / "file")]:
        with pytest.raises(UserError, match=r"^cannot write in .*file"):
            Run("toy_p4", "sysu", *folders).refuse_unwritable()


# --- what a run leaves


def test_files_are_where_they_are_looked_for(run, tmp_path):
    assert run.best == tmp_path / "save_model" / "toy_p4_best.t"
    assert run.last == tmp_path / "save_model" / "toy_p4_last.t"
    assert run.log == tmp_path / "log" / "sysu_log" / "toy_p4.log"
    assert run.events == tmp_path / "log" / "vis_log" / "toy_p4"


def test_best_says_how_it_was_chosen_and_is_without_the_state_of_training(run):
    checkpoint = {
        "net": NET,
        "epoch": 1,
        "optimizer": {"lr": 1},
        "scaler": {},
        "history": [],
        "args": {"a": 1},
    }
    run.save(checkpoint, is_best=False, selection="by rank-1")
    assert not run.best.exists()
    run.save(checkpoint, is_best=True, selection="by rank-1")
    assert load_checkpoint(run.last).keys() == checkpoint.keys()
    best = load_checkpoint(run.best)
    assert best.keys() == {"net", "epoch", "args", "selection"}
    assert best["selection"] == "by rank-1"


def test_a_run_that_is_there_is_not_overwritten_and_the_way_on_is_told(run):
    run.refuse_to_overwrite(epochs=3)  # nothing there
    save_checkpoint({"net": NET, "epoch": 2}, run.last)
    with pytest.raises(UserError, match=r"toy_p4_last\.t is a run that stopped after epoch 2 of 3: --resume"):
        run.refuse_to_overwrite(epochs=3)
    with pytest.raises(UserError, match=r"toy_p4_last\.t is a finished run \(2 epochs\): --overwrite"):
        run.refuse_to_overwrite(epochs=2)
    save_checkpoint({"net": NET, "epoch": 2, "evaluated": 0}, run.last)  # its last evaluation failed
    with pytest.raises(UserError, match=r"stopped after epoch 2 of 2: --resume auto continues it"):
        run.refuse_to_overwrite(epochs=2)
    run.best.touch()
    run.last.unlink()  # as who makes room does it
    with pytest.raises(UserError, match=r"toy_p4_best\.t is of a run whose toy_p4_last\.t is gone"):
        run.refuse_to_overwrite(epochs=2)


def test_remove_takes_all_of_the_run_and_nothing_else(run, tmp_path):
    run.events.mkdir()
    other = tmp_path / "save_model" / "toy_p40_last.t"
    mine = [run.best, run.last, run.log, run.history, run.events / "events.0"]
    for path in [*mine, other]:
        path.write_bytes(b"x")
    run.remove()
    assert not any(path.exists() for path in [*mine, run.events])
    assert other.exists()
    run.remove()  # and again, with nothing there


def test_the_log_is_appended_to(run, caplog):
    caplog.set_level(logging.INFO, log.name)
    for line in ("epoch 1", "epoch 2"):
        run.open_log({})
        log.info(line)
        run.release()
        log.info("not for this log")
    lines = run.log.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["epoch 1", "epoch 2"]


def record_of(epoch, evaluated=False):
    record = {"epoch": epoch, "epochs": 9, "rate": 1e-3, "loss": {"total": 2.5, "shared": 1.5}, "steps": 8}
    record["seconds"] = {"memory": 1.0, "steps": 4.0, "waiting": 1.0, "left": 3725.4}
    record["images_per_second"] = 48.0
    metrics = {"rank-1": 0.5, "mAP": 0.25}
    evaluation = {"protocol": "SYSU-MM01, all", "metrics": metrics, "best": epoch == 2}
    return record | ({"evaluation": evaluation} if evaluated else {})


def said(run):
    return [line.split(" ", 2)[2] for line in run.log.read_text().splitlines()]


def test_the_history_is_logged_as_far_as_the_log_does_not_have_it(run, caplog):
    """Killed after a checkpoint, at whatever place in its log's writing, and continued: every line once."""
    caplog.set_level(logging.INFO, log.name)
    for history in ([record_of(1)], [record_of(1), record_of(2)], [record_of(1), record_of(2, True)]):
        for _ in range(2):  # the second time, the log has it
            run.open_log({"command": "train"})
            run.publish(history)
            run.release()
            lines = [line for line in said(run) if line != "command: train"]
            assert len(set(lines)) == len(lines)
        assert [json.loads(line) for line in run.history.read_text().splitlines()] == history
    epoch = "epoch {}/9: loss 2.500 (shared 1.500), rate 1.00e-03; memory 1.0 s, steps 4.0 s, 48 images/s, "
    epoch += "waiting for input 25.0 %; 1:02:05 left"
    evaluated = "  SYSU-MM01, all, after epoch 2: rank-1 50.00  mAP 25.00  (best so far)"
    assert lines == [epoch.format(1), epoch.format(2), evaluated]
    run.publish([])  # of a run of an earlier version
    assert len(run.history.read_text().splitlines()) == 2


# --- resuming


def arguments(tmp_path, words=""):
    return ["--model-path", f"{tmp_path}/save_model", "--log-path", f"{tmp_path}/log", *words.split()]


def trained(tmp_path, words=""):
    """The path of a checkpoint that a run with these settings leaves."""
    args, run, checkpoint = open_run(typed_settings(arguments(tmp_path, words)))
    assert checkpoint is None
    state = dict.fromkeys(STATE) | {"epoch": 2, "world_size": 1, "optimizer": {}}
    save_checkpoint(state | {"net": NET, "args": vars(args)}, run.last)
    return run.last


def test_resume_auto_finds_the_run_of_these_settings_alone(tmp_path):
    last = trained(tmp_path, "--seed 3")
    _, run, checkpoint = open_run(typed_settings(arguments(tmp_path, "--seed 3 --resume auto")))
    assert (run.last, checkpoint["epoch"]) == (last, 2)
    assert open_run(typed_settings(arguments(tmp_path, "--seed 4 --resume auto")))[2] is None
    assert open_run(typed_settings(arguments(tmp_path, "--seed 3")))[2] is None


def test_resume_auto_finds_a_run_that_was_moved(tmp_path):
    last = trained(tmp_path / "old", "--seed 3")
    (tmp_path / "new").mkdir()
    last.parent.rename(tmp_path / "new" / "save_model")
    args, run, checkpoint = open_run(typed_settings(arguments(tmp_path / "new", "--seed 3 --resume auto")))
    assert checkpoint["epoch"] == 2
    assert run.last == tmp_path / "new" / "save_model" / last.name
    assert args.log_path == f"{tmp_path}/new/log"


def test_resuming_a_file_takes_its_settings_and_stays_in_its_folder(tmp_path):
    last = trained(tmp_path, "--arch resnet18 --num-pos 2 --epochs 4 --name mine")
    args, run, checkpoint = open_run(typed_settings(["--resume", str(last), "--epochs", "9"]))
    assert (args.arch, args.num_pos, args.epochs, args.name) == ("resnet18", 2, 9, "mine")
    assert (run.last, checkpoint["epoch"]) == (last, 2)


def test_every_setting_of_a_run_is_read_again():
    settings = OTHER | {"dataset": "regdb", "trial": "3"}
    known = settings | {"command": ["--lr", "7"], "of_another_version": [1]}  # neither is a flag
    assert settings_to_resume({"net": {}, "args": known}, "run_last.t") == settings


def test_only_what_was_typed_is_typed(tmp_path):
    words = ["--lr", "0.00035", "--img_h=64", "--no-aux", "--decay-epochs", "20", "40"]  # some are defaults
    expected = {"lr": 3.5e-4, "img_h": 64, "no_aux": True, "decay_epochs": [20, 40], "command": words}
    assert typed_settings(words) == expected
    last = trained(tmp_path, "--lr 0.1")
    with pytest.raises(UserError, match=r"^--lr 0\.00035 contradicts .*_last\.t, whose run has 0\.1$"):
        open_run(typed_settings(["--resume", str(last), "--lr", "0.00035"]))


def test_any_pixel_range_of_a_run_is_read_again():
    for values in ([-3.1e-05, 1.0], [-2.5e-300, 1e300], [51241.0, 52181.0], [-7.0, -1.5]):
        assert settings_to_resume({"args": {"pixel_range": values}}, "run_last.t") == {"pixel_range": values}


def test_what_contradicts_the_resumed_run_is_refused(tmp_path):
    last = trained(tmp_path, "--arch resnet18")
    open_run(typed_settings(["--resume", str(last), "--arch", "resnet18"]))
    with pytest.raises(UserError, match=r"^--num-pos 2 contradicts .*_last\.t, whose run has 4$"):
        open_run(typed_settings(["--resume", str(last), "--num_pos", "2"]))


def test_a_checkpoint_without_the_state_of_training_cannot_be_resumed(tmp_path):
    save_checkpoint({"net": NET, "epoch": 2, "args": {}}, tmp_path / "run_best.t")
    with pytest.raises(
        UserError, match=r"run_best\.t: no training state in this file: resume from a run's _last"
    ):
        open_run(typed_settings(["--resume", str(tmp_path / "run_best.t")]))


@pytest.mark.parametrize("words", ["", "--dataset regdb", "--dataset regdb --trial 3"])
def test_a_resumed_trial_of_regdb_stays_its_own_run(words, tmp_path):
    last = trained(tmp_path, "--dataset regdb --trial 3")
    assert last.name.endswith("_trial_3_last.t")
    args, run, _ = open_run(typed_settings(["--resume", str(last), *words.split()]))
    assert (args.dataset, args.trial, run.last) == ("regdb", "3", last)


def test_another_trial_than_the_resumed_one_is_refused(tmp_path):
    last = trained(tmp_path, "--dataset regdb --trial 3")
    with pytest.raises(UserError, match=r"--trial 2 contradicts .*, whose run has 3"):
        open_run(typed_settings(["--resume", str(last), "--dataset", "regdb", "--trial", "2"]))


# --- what a result depends on


def test_the_environment_names_command_versions_and_revision(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--data-path", "my data"])
    found = environment()
    assert found["command"] == "python train.py --data-path 'my data'"
    for name, version in versions().items():
        assert f"{name} {version}" in found["versions"]
    assert "; source " in found["versions"]


@pytest.mark.parametrize(("quiet", "shown"), [(False, "progress\ntrouble\n"), (True, "trouble\n")])
def test_the_terminal_gets_the_log_and_only_warnings_when_quiet(quiet, shown, capsys, monkeypatch):
    for attribute in ("handlers", "level", "propagate"):
        monkeypatch.setattr(log, attribute, getattr(log, attribute))
    monkeypatch.setattr(log, "handlers", [])
    log_to_terminal(quiet)
    log.info("progress")
    log.warning("trouble")
    assert capsys.readouterr().out == shown
