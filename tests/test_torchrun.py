"""torchrun starts train.py: what ends one process ends all, and a killed or stopped run goes on.

Two processes over gloo; test_processes.py compares what they compute with one.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import ENVIRONMENT, REPOSITORY, draw_sysu, tiny_flags
from test_resilience import epochs_of, numbers_of, only

from checkpoints import load_checkpoint

TRAIN = REPOSITORY / "train.py"
EPOCHS = 6
SOON = 20  # seconds within which all ends; the launcher itself gives a process 30 before it kills it


class Torchrun:
    """torchrun with two processes, in a folder; what all of them print goes to the folder's `output`."""

    def __init__(self, folder, *words, restarts=0):
        folder.mkdir(exist_ok=True)
        self.output = folder / "output"
        options = "--standalone", "--nproc_per_node", 2, "--max-restarts", restarts
        words = ["-m", "torch.distributed.run", *options, *words]
        env = os.environ | ENVIRONMENT
        self.launcher = warm.start(words, folder, env, self.output, self.output)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.join()

    def processes(self):
        """The ids of the processes that it has started, and that have not ended."""
        pid = self.launcher.pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the launcher has ended
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def epochs(self):
        """How many epochs it has told of."""
        return self.output.read_text().count(": loss ")

    def wait_for(self, words):
        """Wait until it has printed words."""
        self.wait(lambda: words in self.output.read_text())

    def wait(self, done, seconds=120):
        """Wait until something is done, and assert that it is before the launcher ends."""
        deadline = time.monotonic() + seconds
        while not done():
            assert self.launcher.is_alive(), self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)

    def end(self, seconds=120):
        """Wait for the end; return the launcher's exit status and what was printed."""
        processes = self.processes()
        self.launcher.join(seconds)
        output = self.output.read_text()
        assert self.launcher.exitcode is not None, output
        for pid in processes:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        return self.launcher.exitcode, output


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """One step an epoch: it takes long, as every batch norm waits for the other process."""
    root = draw_sysu(tmp_path_factory.mktemp("data") / "sysu", 4)
    return [*tiny_flags(root), "--batch-size", 2, "--num-pos", 8, "--epochs", EPOCHS, "--eval-start", 2]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """The folder of a run that was left alone, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("torchrun") / "undisturbed"
    with Torchrun(folder, TRAIN, *flags) as run:
        run.wait(run.processes)
        began = time.monotonic()
        status, output = run.end()
    assert status == 0, output
    return folder, time.monotonic() - began


def same_run(folder, other):
    """Assert that two finished runs of as many processes are the same, bit for bit."""
    one, two = (load_checkpoint(only(each, "save_model/*_last.t")) for each in (folder, other))
    assert one["epoch"] == two["epoch"] == EPOCHS
    assert [name for name, value in one["net"].items() if not torch.equal(two["net"][name], value)] == []
    for index, moments in one["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(two["optimizer"]["state"][index][key], value)
    logs, histories = (
        [only(each, f"log/sysu_log/*.{end}") for each in (folder, other)] for end in ("log", "jsonl")
    )
    assert epochs_of(logs[0]) == epochs_of(logs[1])
    assert numbers_of(histories[0]) == numbers_of(histories[1])


def test_two_processes_train_one_run_that_one_can_continue(undisturbed, tmp_path, train_here):
    folder, _ = undisturbed
    output = (folder / "output").read_text()
    assert "2 process(es)" in output
    assert output.count(f"epoch {EPOCHS}/{EPOCHS}") == 1  # one of them speaks
    assert output.count("finished: ") == 1
    assert "an epoch: 1 steps" in output  # as many as one process with the whole batch has
    assert only(folder, "log/sysu_log/*.log").read_text().count(f"epoch {EPOCHS}/{EPOCHS}") == 1
    shutil.copytree(folder / "save_model", tmp_path / "copy")
    last = only(tmp_path, "copy/*_last.t")
    status, output, _ = train_here("--resume", last, "--epochs", EPOCHS + 1)
    assert status == 0
    assert "a step: 4 identities x 8 images x 3 in each process, 96 images in all" in output
    assert load_checkpoint(last)["epoch"] == EPOCHS + 1


def test_killed_processes_go_on_by_themselves_and_end_as_if_left_alone(undisturbed, flags, tmp_path):
    """A kill, after which both start anew; a signal to the launcher; and a kill of the continued run."""
    alone, seconds = undisturbed
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng, folder, words = random.Random(seed), tmp_path / "run", [TRAIN, *flags, "--resume", "auto"]

    def wait_a_while(run):
        run.wait(lambda: len(run.processes()) == 2)
        time.sleep(rng.uniform(0, seconds / EPOCHS))

    def kill_one(run):
        before = run.processes()
        os.kill(rng.choice(before), signal.SIGKILL)
        run.wait(lambda: not set(before) & set(run.processes()), SOON)

    with Torchrun(folder, *words, restarts=3) as run:
        if rng.random() < 0.5:
            run.wait_for("epoch 1/")
        wait_a_while(run)
        kill_one(run)
        if rng.random() < 0.5:
            done = run.epochs()
            run.wait(lambda: run.epochs() > done)
        else:
            wait_a_while(run)
        run.launcher.terminate()
        status, output = run.end(SOON)
    assert status != 0
    starts = output.count("running on the CPU")
    assert starts <= 2, output  # the restarted processes do not wait for ended ones, and fail in turn
    with Torchrun(folder, *words, restarts=3) as run:
        wait_a_while(run)
        kill_one(run)
        status, output = run.end(60)
    assert status == 0, output
    assert output.count("running on the CPU") <= starts + 2, output
    same_run(folder, alone)


BROKEN = """import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
if os.environ["RANK"] == "1":
    from memory import MemoryBank
    steps, update = [], MemoryBank.update
    def broken(bank, *args):
        steps.append(None)
        if len(steps) == 3:
            raise RuntimeError("something is broken here")
        update(bank, *args)
    MemoryBank.update = broken
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


LATE = """import os, runpy, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
if os.environ["RANK"] == "1":
    with open("late", "w") as file:
        file.write(str(os.getpid()))
    os.rename("late", "pid")
    time.sleep(600)
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_process_that_is_killed_before_it_joins_ends_the_one_that_waits(flags, tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    with Torchrun(tmp_path, tmp_path / "late.py", TRAIN, *flags) as run:
        run.wait((tmp_path / "pid").exists)
        run.wait_for("running on the CPU")
        time.sleep(2)  # then it waits
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        status, _ = run.end(SOON)
    assert status == 1


def test_an_error_of_one_process_ends_all_with_that_error(flags, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    with Torchrun(tmp_path, tmp_path / "broken.py", TRAIN, *flags) as run:
        run.wait_for("something is broken here")
        status, output = run.end(SOON)
    assert status == 1
    assert output.count("RuntimeError: something is broken here") == 1
    assert load_checkpoint(only(tmp_path, "save_model/*_last.t"))["epoch"] == 2  # the third failed


def test_what_ends_one_of_two_processes_ends_both_in_lines(flags, tmp_path):
    root = shutil.copytree(flags[flags.index("--data-path") + 1], tmp_path / "sysu")
    pid = int((root / "exp" / "test_id.txt").read_text().split(",")[0])
    broken = sorted(root.glob(f"cam[36]/{pid:04d}/*.jpg"))[0]
    broken.write_bytes(b"no image")
    with Torchrun(tmp_path / "run", TRAIN, *flags, "--data-path", root, "--epochs", 1) as run:
        status, output = run.end()
    assert status != 0
    assert f"train.py: error: cannot read 1 image: {broken}" in output
    assert 'train.py", line' not in output  # of a traceback


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_all_processes_together(flags, tmp_path, signum):
    """It tells them, and one of them says how to go on."""
    with Torchrun(tmp_path / "run", TRAIN, *flags, "--epochs", 1000, "--eval-start", 999) as run:
        run.wait_for("epoch 1/1000")
        os.killpg(run.launcher.pid, signum)
        _, output = run.end(SOON)
    assert output.count("stopped; to continue: torchrun --nproc_per_node 2 ") == 1, output
    assert "DistBackendError" not in output
    assert load_checkpoint(only(tmp_path, "run/save_model/*_last.t"))["epoch"] == len(
        re.findall(r"^.{20}epoch ", output, re.MULTILINE)
    )
