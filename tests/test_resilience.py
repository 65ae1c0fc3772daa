"""A run is killed, stopped, starved of disk and fed rubbish. pytest --kills N: more kills."""

import errno
import itertools
import json
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
import warm
from conftest import ENVIRONMENT, REPOSITORY, command, tiny_flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import loss
import synthetic
import train
from checkpoints import load_checkpoint
from engine.files import Run
from engine.settings import open_run, typed_settings
from readers import arrays

EPOCHS = 4


def only(folder, pattern):
    [path] = folder.glob(pattern)
    return path


def start(folder, *args):
    """train.py in a process group of its own, in a folder; what it prints goes to the folder's `output`."""
    folder.mkdir(exist_ok=True)
    words, output = command("train.py", *args)[1:], folder / "output"
    return warm.Started(words, warm.start(words, folder, os.environ | ENVIRONMENT, output, output))


def wait_until_it_says(words, process, folder, seconds=300):
    """Wait until the process has printed words or has ended."""
    deadline = time.monotonic() + seconds
    while words not in (output := (folder / "output").read_text()) and process.poll() is None:
        assert time.monotonic() < deadline, output
        time.sleep(0.02)


def stop_everything(process):
    """Kill what is left of a process and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Killed and resumed


def kill_and_resume(folder, flags, kills, rng, epoch_seconds):
    """Start runs in folder, kill and resume each at random moments, until all kills are spent and it is done.

    Returns the folders of the runs: more than one where a run was done before its kill came.
    """
    done = []
    while kills or not done or (folder / str(len(done))).exists():
        run = folder / str(len(done))
        process = start(run, *flags, "--resume", "auto")
        try:
            if kills:
                wait_until_it_says("\n", process, run)
                process.wait(rng.uniform(0, 2 * epoch_seconds))
            assert process.wait(300) == 0, (run / "output").read_text()
            done.append(run)
        except subprocess.TimeoutExpired:
            assert kills, "the run did not end"
            kills -= 1
        finally:
            stop_everything(process)
    return done


def epochs_of(log):
    """What a log says of each epoch, without the times."""
    lines = [line[20:].split("; memory")[0] for line in log.read_text().splitlines()]
    return [line for line in lines if line.startswith(("epoch ", "  SYSU-MM01"))]


def numbers_of(history):
    """The records of a history, without what is a measure of time or tells of one process."""
    records = [json.loads(line) for line in history.read_text().splitlines()]
    for record in records:
        for key in ("seconds", "images_per_second", "gigabytes", "made_with"):
            del record[key]
        record.get("evaluation", {}).pop("seconds", None)
    return records


def scalars_of(events):
    """{tag: [(step, value)]} as TensorBoard shows them, without what is a measure of time."""
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if " of " not in tag and "second" not in tag]
    # An evaluation that was killed before its checkpoint is repeated: TensorBoard shows one point twice.
    points = {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}
    return {tag: list(dict.fromkeys(those)) for tag, those in points.items()}


def test_killed_runs_end_as_one_left_alone(sysu, tmp_path, pytestconfig):
    flags = [*tiny_flags(sysu), "--epochs", EPOCHS, "--eval-start", 0, "--eval-every", 2]
    alone = tmp_path / "alone"
    process = start(alone, *flags)
    try:
        wait_until_it_says("run: ", process, alone)
        began = time.monotonic()
        assert process.wait(300) == 0, (alone / "output").read_text()
    finally:
        stop_everything(process)
    epoch_seconds = (time.monotonic() - began) / EPOCHS

    seed, kills = random.randrange(10**6), pytestconfig.getoption("kills")
    print(f"seed {seed}")
    with ThreadPoolExecutor(2) as pool:
        parts = [
            pool.submit(
                kill_and_resume, tmp_path / name, flags, share, random.Random(seed + share), epoch_seconds
            )
            for name, share in (("a", kills // 2), ("b", kills - kills // 2))
            if (tmp_path / name).mkdir() is None
        ]
        runs = [run for part in parts for run in part.result()]

    expected = load_checkpoint(only(alone, "save_model/*_last.t"))
    expected_best = load_checkpoint(only(alone, "save_model/*_best.t"))
    for run in runs:
        last = load_checkpoint(only(run, "save_model/*_last.t"))
        best = load_checkpoint(only(run, "save_model/*_best.t"))
        for key in ("epoch", "cmc", "mAP", "mINP", "best", "data", "protocol"):
            assert last[key] == expected[key], key
            assert best[key] == expected_best[key], key
        for name, weight in expected["net"].items():
            assert torch.equal(last["net"][name], weight), name
            assert torch.equal(best["net"][name], expected_best["net"][name]), name
        for index, moments in expected["optimizer"]["state"].items():
            for key, value in moments.items():
                assert torch.equal(last["optimizer"]["state"][index][key], value)
        assert epochs_of(only(run, "log/sysu_log/*.log")) == epochs_of(only(alone, "log/sysu_log/*.log"))
        assert numbers_of(only(run, "log/sysu_log/*.jsonl")) == numbers_of(
            only(alone, "log/sysu_log/*.jsonl")
        )
        assert scalars_of(only(run, "log/vis_log/*")) == scalars_of(only(alone, "log/vis_log/*"))
        assert not list(run.glob("save_model/.*.part"))
    assert len(epochs_of(only(alone, "log/sysu_log/*.log"))) == EPOCHS + EPOCHS // 2
    scalars = scalars_of(only(alone, "log/vis_log/*"))
    assert [step for step, _ in scalars["loss/total"]] == list(range(1, EPOCHS + 1))
    assert [step for step, _ in scalars["mAP"]] == [2, 4]


# Stopped


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_says_how_to_go_on(sysu, tmp_path, monkeypatch, signum, status):
    flags = [*tiny_flags(sysu), "--epochs", 1000, "--eval-start", 999]
    folder = tmp_path / "run"
    process = start(folder, *flags)
    try:
        wait_until_it_says("epoch 1/1000", process, folder)
        os.killpg(process.pid, signum)  # as a terminal and a batch system send it
        assert process.wait(120) == status, (folder / "output").read_text()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # nobody is left of its group
    finally:
        stop_everything(process)
    output = (folder / "output").read_text()
    assert "Traceback" not in output
    words = shlex.split(output.splitlines()[-1].partition("to continue: ")[2])
    assert words[0] == "python"
    assert words[1].endswith("train.py")
    monkeypatch.chdir(folder)
    args, run, checkpoint = open_run(typed_settings(words[2:]))
    assert checkpoint["epoch"] >= 1
    assert args.epochs == 1000
    assert checkpoint["epoch"] == len(re.findall(r"^.{20}epoch ", output, re.MULTILINE))
    run.acquire()  # its lock is free
    run.release()


@pytest.mark.parametrize("status", [143, 2])
def test_an_evaluation_costs_no_epoch_whatever_ends_it(sysu, train_here, monkeypatch, status):
    """The epoch is on disk before it is evaluated; the evaluation is repeated when the run is continued."""
    flags = [*tiny_flags(sysu), "--epochs", 2, "--eval-start", 0, "--eval-every", 1]
    assert train_here(*flags, "--model-path", "alone")[0] == 0
    evaluate = train.evaluate

    def end(training, evaluation):
        if load_checkpoint(only(Path(), "save_model/*_last.t"))["epoch"] == 2:
            return evaluate(training, evaluation)
        if status == 2:
            raise train.UserError("no query has a match")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "evaluate", end)
    assert train_here(*flags)[0] == status
    last = load_checkpoint(only(Path(), "save_model/*_last.t"))
    assert (last["epoch"], last["evaluated"], last["best"]) == (1, -1, None)
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert train_here(*flags, "--resume", "auto")[0] == 0
    for which in ("best", "last"):
        ours, expected = (load_checkpoint(only(Path(), f"{f}/*_{which}.t")) for f in ("save_model", "alone"))
        assert ours["best"] == expected["best"]
        assert all(torch.equal(ours["net"][name], value) for name, value in expected["net"].items())


@pytest.mark.parametrize("at", [1, 2, 4])  # after epoch 1, after its evaluation, after the last evaluation
def test_what_was_saved_but_not_logged_is_logged_when_the_run_is_continued(sysu, train_here, monkeypatch, at):
    flags = [*tiny_flags(sysu), "--epochs", 2, "--eval-start", 0, "--eval-every", 1]
    calls, publish = itertools.count(), Run.publish

    def killed(run, history):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        publish(run, history)

    monkeypatch.setattr(Run, "publish", killed)
    assert train_here(*flags)[0] == 143
    for _ in range(2):  # the second time nothing is left to do
        assert train_here(*flags, "--resume", "auto")[0] == 0
    log = only(Path(), "log/sysu_log/*.log")
    found = [line for line in epochs_of(log) if line.startswith(("epoch", "  SYSU"))]
    begins = ["epoch 1/2: loss", "  SYSU-MM01", "epoch 2/2: loss", "  SYSU-MM01"]
    assert [line[: len(begin)] for line, begin in zip(found, begins, strict=True)] == begins
    records = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert all(f"after epoch {k + 1}: " in found[2 * k + 1] for k in range(2))
    commands = [record["made_with"]["command"].endswith("--resume auto") for record in records]
    assert commands == [False, at < 3]


def test_a_signal_stops_the_decoding_of_images(tmp_path, train_here, monkeypatch):
    """Of RegDB's training images, which are decoded on the first run; nothing of them is left."""
    root = tmp_path / "regdb"
    synthetic.draw_dataset(synthetic.plan_regdb(4, 2, 2, 0), root, height=48, width=24)
    original = arrays.decode

    def interrupted(*args, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from original(*args, **settings)

    monkeypatch.setattr(arrays, "decode", interrupted)
    status, output, _ = train_here(*tiny_flags(root), "--dataset", "regdb", "--epochs", 1)
    assert status == 143
    assert output.splitlines()[-1].endswith("--resume auto")
    assert not [path for path in root.iterdir() if "resized" in path.name]
    status, output, _ = train_here(*tiny_flags(root), "--dataset", "regdb", "--epochs", 1, "--overwrite")
    assert status == 143  # before anything was replaced: the same command is to be given again
    assert output.splitlines()[-1].endswith("--overwrite")


# Two runs


def test_the_second_run_is_refused_while_the_first_lives(sysu, tmp_path, monkeypatch, train_here):
    flags = [*tiny_flags(sysu), "--epochs", 1000, "--eval-start", 999]
    folder = tmp_path / "work"
    process = start(folder, *flags)
    try:
        wait_until_it_says("run: ", process, folder)
        for more in ([], ["--overwrite"], ["--resume", "auto"]):
            status, _, errors = train_here(*flags, *more)
            assert status == 2
            assert "another process is training" in errors[0]
        assert process.poll() is None
        process.kill()
        process.wait()
        _, run, _ = open_run(typed_settings(list(map(str, flags))))
        run.acquire()  # a dead process holds no lock
        run.release()
    finally:
        stop_everything(process)


def test_a_run_clears_its_own_leftovers_and_nobody_elses(tmp_path):
    mine, others = tmp_path / ".a_last.t.x1.part", tmp_path / ".a_seed1_last.t.x2.part"
    for path in (mine, others):
        path.touch()
    run = Run("a", "sysu", tmp_path, tmp_path / "log")
    run.acquire()
    run.release()
    assert not mine.exists()
    assert others.exists()  # another run may be writing it just now


def test_the_seed_decides_the_weights(sysu, tmp_path, train_here):
    flags = [*tiny_flags(sysu), "--epochs", 1]
    weights = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        status, output, _ = train_here(*flags, "--seed", seed, "--model-path", tmp_path / name)
        assert status == 0, output
        weights[name] = load_checkpoint(only(tmp_path / name, f"*_seed{seed}_*_last.t"))["net"]
        shutil.rmtree("log")
    assert all(torch.equal(weights["again"][key], value) for key, value in weights["first"].items())
    assert not torch.equal(weights["other"]["neck.weight"], weights["first"]["neck.weight"])


# Full disks


@pytest.fixture
def unfinished(trained, tmp_path):
    """A copy of a run after two epochs: (its `_last.t`, the flags that continue it for a third)."""
    shutil.copytree(trained[0], tmp_path / "copy")
    last = only(tmp_path / "copy", "save_model/*_last.t")
    return last, ["--resume", last, "--log-path", tmp_path / "copy" / "log", "--epochs", 3]


@pytest.mark.parametrize("size", [1_000_000, 20_000, 2_000])  # no checkpoint fits; no log either
def test_a_full_disk_leaves_the_former_checkpoint(unfinished, train_here, size):
    last, flags = unfinished
    before = last.read_bytes()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))  # Python ignores SIGXFSZ: writes fail
    try:
        status, _, errors = train_here(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert status == 2
    assert len(errors) == 1, errors
    assert "cannot write" in errors[0]
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*.part"))
    assert train_here(*flags)[0] == 0  # with room again, it goes on
    assert len(epochs_of(only(last.parents[1], "log/sysu_log/*.log"))) == 6


def test_events_that_cannot_be_written_stop_the_run(unfinished, train_here, monkeypatch):
    last, flags = unfinished
    before = last.read_bytes()

    def full(writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
    status, _, errors = train_here(*flags)
    assert status == 2
    assert "No space left on device" in errors[-1]
    assert "vis_log" in errors[-1]
    assert last.read_bytes() == before


# What is not finite


def test_weights_that_are_not_finite_stop_the_run(sysu, tmp_path, train_here):
    state = torchvision.models.get_model("resnet18").state_dict()
    state["layer1.0.conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "resnet18.pth")
    flags = [*tiny_flags(sysu), "--weights", tmp_path / "resnet18.pth", "--epochs", 1]
    status, _, errors = train_here(*flags)
    assert status == 2
    assert len(errors) == 1
    assert all(
        words in errors[0] for words in ("epoch 1, step 1", "total", "shared", "no checkpoint was saved")
    )
    assert not list(Path("save_model").glob("*.t"))


def spoil(monkeypatch, at, how):
    """Let the at-th loss (from 1) be spoilt: how(total, terms) -> (total, terms)."""
    steps = []

    def spoilt(*args, **kwargs):
        steps.append(None)
        total, terms = mce_loss(*args, **kwargs)
        return how(total, terms) if len(steps) == at else (total, terms)

    mce_loss = loss.mce_loss
    monkeypatch.setattr(loss, "mce_loss", spoilt)


def test_a_loss_that_is_not_finite_stops_the_run(unfinished, train_here, monkeypatch):
    last, flags = unfinished
    before = last.read_bytes()
    inf = torch.tensor(torch.inf)
    spoil(monkeypatch, 3, lambda total, terms: (total, terms | {"align": inf}))
    status, _, errors = train_here(*flags)
    assert status == 2
    assert "epoch 3, step 3: align;" in errors[0]
    assert f"the last good checkpoint is {last}, after epoch 2" in errors[0]
    assert last.read_bytes() == before


def test_a_weight_that_is_not_finite_stops_the_run(unfinished, train_here, monkeypatch):
    last, flags = unfinished
    before = last.read_bytes()
    spoil(monkeypatch, 8, lambda total, terms: (total + (0 * total).sqrt(), terms))  # 0, its gradient NaN
    status, _, errors = train_here(*flags)
    assert status == 2
    assert "the weight " in errors[0]
    assert "after epoch 3" in errors[0]
    assert f"the last good checkpoint is {last}" in errors[0]
    assert last.read_bytes() == before


# Files that would run code


class Code:
    """Its pickle, once read, creates the file at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_runs_nothing(sysu, tmp_path, train_here, capsys, save):
    file, proof = tmp_path / "gift_last.t", tmp_path / "owned"
    gift = {"net": {"weight": torch.ones(1)}, "args": {}, "optimizer": Code(proof)}
    save(gift, file)
    for flag in ("--resume", "--weights"):
        status, _, errors = train_here(*tiny_flags(sysu), flag, file)
        assert status == 2
        assert str(file) in errors[0]
    test = runpy.run_path(str(REPOSITORY / "test.py"))
    with pytest.raises(train.UserError, match="gift_last"):
        test["main"](["--resume", str(file), "--data-path", str(sysu)])
    assert not proof.exists()
    save([Code(proof)], file)
    torch.load(file, weights_only=False) if save is torch.save else pickle.loads(file.read_bytes())
    assert proof.exists()  # read without care, it does run
