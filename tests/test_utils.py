"""utils.py: errors of one line, files that are complete or not there, shared flags."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import conftest
import pytest
from conftest import REPOSITORY

from utils import (
    Parser,
    UserError,
    at_least,
    before_torch,
    data_flags,
    device_flags,
    positive,
    run_script,
    whole_file,
)


def example_parser():
    parser = Parser(prog="example", parents=[data_flags(), device_flags()])
    parser.add_argument("--mode", nargs="+", default=["all"])
    parser.add_argument("--check", action="store_true")
    return parser


def test_help_says_a_default_once_and_only_where_there_is_one():
    parser = Parser(prog="example")
    parser.add_argument("--zero", type=int, default=0, help="a number")
    parser.add_argument("--own", default="x", help="a word (default: the checkpoint's)")
    parser.add_argument("--check", action="store_true", help="try it")
    parser.add_argument("--json", metavar="FILE", help="write it")
    lines = [line.rsplit("  ", 1)[-1] for line in parser.format_help().splitlines()[-4:]]
    assert lines == ["a number (default: 0)", "a word (default: the checkpoint's)", "try it", "write it"]


# --- run_script


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (143, 143)])
def test_a_script_exits_with_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: args.returned, lambda: argparse.Namespace(returned=returned))
    assert (stop.value.code or 0) == status


def test_what_a_script_imports_is_no_garbage():
    code = """
import gc, utils
utils.before_torch()
assert not gc.isenabled()  # while torch is imported
right = lambda _: gc.isenabled() and gc.get_freeze_count() > 1000
utils.run_script(lambda args: 7 if right(args) else 8, list)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 7


def test_a_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    def main(args):
        raise UserError("--batch-size 9: there are only 4 training identities")

    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main, argparse.Namespace)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == "train.py: error: --batch-size 9: there are only 4 training identities\n"
    )


def test_sigterm_is_status_143_and_clears_a_file_half_written(tmp_path):
    def main(args):
        with whole_file(tmp_path / "result") as temporary:
            temporary.write_text("half of it")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_script(main, argparse.Namespace)
    assert stop.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_is_status_130_without_a_traceback(capsys):
    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(main, argparse.Namespace)
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_reader_who_has_seen_enough_is_no_error():
    code = "from utils import run_script\nrun_script(lambda _: [print(k) for k in range(10**6)], list)"
    command = f"{sys.executable} -c '{code}' | head -1"
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_other_errors_keep_their_traceback():
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main, argparse.Namespace)


# --- whole_file


def test_whole_file_appears_under_its_name_alone(tmp_path):
    path = tmp_path / "new" / "folder" / "table.json"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["table.json"]


@pytest.mark.parametrize("former", ["the former", None])
def test_an_exception_inside_keeps_the_former_file_and_leaves_nothing(tmp_path, former):
    path = tmp_path / "table.json"
    if former:
        path.write_text(former)

    def write_half():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt  # which is no Exception

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == (
        {"table.json": former} if former else {}
    )


def test_a_disk_error_inside_is_told_as_the_files(tmp_path):
    path = tmp_path / "table.json"
    told = pytest.raises(UserError, match=r"cannot write .*table\.json: No space left on device$")
    with told, whole_file(path):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    told = pytest.raises(UserError, match=r"^cannot write .*file/table\.json: File exists$")
    with told, whole_file(tmp_path / "file" / "table.json"):
        pytest.fail("there is nothing to write to")


def test_a_folder_in_the_files_place_is_told(tmp_path):
    (tmp_path / "table.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*table\.json: "), whole_file(tmp_path / "table.json"):
        pass
    assert os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        with whole_file(tmp_path / "table.json"):
            pass
        assert os.umask(umask) == umask  # finding it out has not changed it
    finally:
        os.umask(former)
    assert (tmp_path / "table.json").stat().st_mode & 0o777 == mode


# --- command lines


@pytest.mark.parametrize("words", [["--img_h", "64", "--img_w=32"], ["--img-h=64", "--img-w", "32"]])
def test_underscores_in_the_names_of_flags_are_hyphens(words):
    args = example_parser().parse_args(words)
    assert (args.img_h, args.img_w) == (64, 32)


def test_underscores_in_values_stay():
    args = example_parser().parse_args(["--data_path=my_data/--img_h", "--mode", "in_door", "a__ll"])
    assert (args.data_path, args.mode) == ("my_data/--img_h", ["in_door", "a__ll"])


def test_the_words_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["example", "--data_path", "my_data"])
    assert example_parser().parse_args().data_path == "my_data"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--img-h", "7"], "--img-h: must be at least 8, not 7"),
        (["--img-h", "tall"], "--img-h: invalid integer value: 'tall'"),
        (["--gpu", "-2"], "--gpu: must be at least -1, not -2"),
        (["--amp", "fp8"], "--amp: invalid choice: 'fp8'"),
        (["--data-pa", "DIR"], "unrecognized arguments: --data-pa"),  # no abbreviations
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--mode"], "--mode: expected at least one argument"),
    ],
)
def test_wrong_flags_are_user_errors_of_one_line(words, told):
    with pytest.raises(UserError) as error:
        example_parser().parse_args(words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_at_least():
    assert at_least(1)("1") == 1
    for text in ("0", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            at_least(1)(text)
    with pytest.raises(ValueError, match=r"1\.5"):
        at_least(1)("1.5")


def test_positive():
    assert positive("3.5e-4") == 0.00035
    for text in ("0", "-1", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            positive(text)
    with pytest.raises(ValueError, match="fast"):
        positive("fast")


# --- a mistyped checkpoint


@pytest.mark.parametrize(
    "script",
    ["train.py", "test.py", "tools/report.py", "tools/search.py", "tools/export.py", "tools/embed.py"],
)
def test_a_missing_checkpoint_is_told_before_torch_is_imported(script, tmp_path):
    """A torch that cannot be imported stands for one that takes long."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, REPOSITORY / script, "--gpu=-1", "--resume", "gone_best.t"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == f"{Path(script).name}: error: no file at gone_best.t\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("--resume=gone_best.t --model_path elsewhere", "gone_best.t"),
        ("--resume there_best.t gone_best.t --flip", "gone_best.t"),
        ("--resume auto --weights gone.pth", "gone.pth"),
        ("--resume there_best.t --weights none", None),
        ("--resume below_best.t --model-path models", None),
        ("--resume gone_trial_{trial}_best.t", None),
        ("--resume", None),
        ("--resume gone_best.t --help", None),
        ("--weights imagenet", None),
        ("", None),
    ],
)
def test_which_file_is_missing(words, missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *words.split()])
    (tmp_path / "there_best.t").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "below_best.t").touch()
    monkeypatch.setattr("gc.disable", lambda: None)
    if missing is None:
        before_torch()
        return
    with pytest.raises(SystemExit) as stop:
        before_torch()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: no file at {missing}\n"


@pytest.mark.parametrize(("free", "lines"), [(1.94e9, 1), (2.1e9, 0)])
def test_a_disk_that_is_nearly_full_is_told_before_the_tests(free, lines, monkeypatch):
    said, session = [], MagicMock()
    session.config.pluginmanager.get_plugin.return_value.write_line = said.append
    monkeypatch.setattr(conftest.shutil, "disk_usage", lambda folder: MagicMock(free=free))
    conftest.pytest_sessionstart(session)
    assert len(said) == lines
    assert all(line.startswith("only 1.9 GB are free in ") for line in said)
