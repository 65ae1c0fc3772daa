"""Processes of the repository's scripts, without the seconds in which each of them would import torch.

They are forks of one process that has imported what the scripts import from elsewhere, and nothing of this
project. A script, its arguments, folder, environment, output and exit status are as in a new interpreter.
"""

import functools
import multiprocessing
import os
import runpy
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
]


@functools.cache
def warm_context(threads):
    """The context whose processes are forked; threads: OMP_NUM_THREADS, which torch reads when imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": threads}):
        multiprocessing.forkserver.ensure_running()
    return context


def be(words, cwd, env, paths, out, err):
    """Become the process of `python WORDS`; its output goes to the files out and err."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(write_through=True)
    added = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.path[:], sys.argv = [cwd, *added, *paths], words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:], sys.argv = [str(Path(words[0]).parent), *added, *paths], words
        runpy.run_path(words[0], run_name="__main__")


def run(command, *, cwd=None, env=None, capture_output=False, stdout=None, stderr=None, timeout=300, **_):
    """As subprocess.run of [sys.executable, …], of which it has what the tests use."""
    here = Path(__file__).resolve().parents[1]
    env = dict(os.environ if env is None else env)
    paths = [path for path in sys.path if path and here not in (Path(path), *Path(path).parents)]
    context = warm_context(env.get("OMP_NUM_THREADS", "1"))
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        out.touch()
        err.touch()
        words = list(map(str, command[1:]))
        into = str(out), str(out if stderr == subprocess.STDOUT else err)
        process = context.Process(target=be, args=(words, os.fspath(cwd or os.getcwd()), env, paths, *into))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), err.read_bytes())
        said, complained = (file.read_text(encoding="utf-8", errors="replace") for file in (out, err))
    if not capture_output and stdout is None:
        os.write(1, said.encode())
        os.write(2, complained.encode())
        said = complained = None
    return subprocess.CompletedProcess(command, process.exitcode, said, complained)
