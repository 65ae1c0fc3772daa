"""Processes of the repository's scripts, without the seconds in which each of them would import torch.

They are forks of one process that has imported what the scripts import from elsewhere, and nothing of this
project. A script, its arguments, folder, environment, output and exit status are as in a new interpreter.
torchrun too is such a process, and forks those that it starts.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

PRELOADED = [
    "torch",
    "torchvision",
    "scipy.stats",
    "PIL.Image",
    "tqdm",
    "filelock",
    "torch.utils.tensorboard",
    "matplotlib.backends.backend_pdf",
    "sklearn.manifold",
    "jinja2",
    "narrow",  # ResNet-18, as here
]


@functools.cache
def warm_context(threads):
    """The context whose processes are forked; threads: OMP_NUM_THREADS, which torch reads when imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parent)}):
        multiprocessing.forkserver.ensure_running()
    return context


def run_words(words, cwd, paths):
    """Be `python WORDS` in the folder cwd, with this process's environment and output."""
    # Handlers are what a new interpreter has, whatever this process inherited from torchrun or a shell.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.path[:], sys.argv = [cwd, *added, *paths], words[1:]
        if words[1] == "torch.distributed.run":
            from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

            SubprocessHandler._popen = lambda self, args, env: Fork(paths, args, env)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:], sys.argv = [str(Path(words[0]).parent), *added, *paths], words
        runpy.run_path(words[0], run_name="__main__")


def be(words, cwd, env, paths, out, err):
    """Become the process of `python WORDS`, in a session of its own; out, err: files of its output."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(write_through=True)
    run_words(words, cwd, paths)


class Started:
    """A process of multiprocessing, with what is used here of subprocess.Popen."""

    def __init__(self, args, process):
        self.args, self.process, self.pid = args, process, process.pid

    def poll(self):
        """The exit status, negative after a signal; None: it runs."""
        return self.process.exitcode

    def wait(self, timeout=None):
        """Wait for its end and return the exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def kill(self):
        """End it at once."""
        self.process.kill()


class Fork(Started):
    """A process that torchrun starts, as a fork of torchrun's."""

    def __init__(self, paths, args, env):
        words = [word for word in args[1:] if word != "-u"]  # the output is not buffered anyway
        process = multiprocessing.get_context("fork").Process(target=self.be, args=(words, env, paths))
        process.start()
        super().__init__(args, process)
        os.setpgid(self.pid, self.pid)  # torchrun signals a group

    @staticmethod
    def be(words, env, paths):
        """Become the process of `python WORDS`."""
        os.environ.clear()
        os.environ.update(env)
        run_words(words, os.getcwd(), paths)


def start(words, cwd, env, out, err):
    """Start `python WORDS`, which leads a session of its own; its output goes to the files out and err."""
    here = Path(__file__).resolve().parents[1]
    paths = [path for path in sys.path if path and here not in (Path(path), *Path(path).parents)]
    for file in (out, err):
        Path(file).touch()
    context = warm_context(env.get("OMP_NUM_THREADS", "1"))
    arguments = list(map(str, words)), os.fspath(cwd), dict(env), paths, str(out), str(err)
    process = context.Process(target=be, args=arguments)
    process.start()
    return process


def run(command, *, cwd=None, env=None, capture_output=False, stdout=None, stderr=None, timeout=300, **_):
    """As subprocess.run of [sys.executable, …], of which it has what the tests use."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        into = out, out if stderr == subprocess.STDOUT else err
        process = start(command[1:], cwd or os.getcwd(), os.environ if env is None else env, *into)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), into[1].read_bytes())
        said = out.read_text(encoding="utf-8", errors="replace")
        complained = err.read_text(encoding="utf-8", errors="replace") if err.exists() else ""
    if not capture_output and stdout is None:
        os.write(1, said.encode())
        os.write(2, complained.encode())
        said = complained = None
    return subprocess.CompletedProcess(command, process.exitcode, said, complained)
