"""Helpers of every script: errors, the log, safe writing of files, shared flags. Does not import torch."""

import argparse
import contextlib
import gc
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TextIO

log = logging.getLogger("mce")

LOG_FORMAT = "%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"  # of the lines of a run, 20 characters of clock

MODALITIES = ("visible", "infrared", "aux")  # the order of a batch's rows in memory and loss


class UserError(Exception):
    """Bad input. The message is one line that names the file or flag; scripts print it and exit with 2."""


def run_script(
    main: Callable[[argparse.Namespace], int | None], get_args: Callable[[], argparse.Namespace]
) -> None:
    """Run main(get_args()) and exit: with its result or 0, with 2 after a UserError, with 130 after Ctrl-C.

    SIGTERM exits with 143, after cleaning up, for example removing a partly written file.
    """
    gc.freeze()  # what is imported stays: looking for garbage in it at the end would take most of a second
    gc.enable()
    previous = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        sys.exit(main(get_args()))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            leave(sys.exc_info()[1])


def leave(error: BaseException) -> None:
    """End this process, one of those that torchrun started, as error would, but at once.

    Python takes torch apart at its end, which takes a second or more of a core: the other processes, which
    learn of an end by their broken connections, and torchrun would wait for it.
    """
    status = error.code or 0 if isinstance(error, SystemExit) else 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def log_to_terminal(quiet: bool = False, stream: TextIO | None = None, clock: bool = False) -> None:
    """Write the log to stream (default: standard output); quiet: only warnings; clock: with date and time."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(logging.Formatter(*LOG_FORMAT if clock else ("%(message)s",)))
    log.handlers[:] = [handler]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; imports none of them."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "Pillow"):  # an imported torch also says its build: +cu130
        found[name] = str(getattr(sys.modules.get(name), "__version__", metadata.version(name)))
    return found


def refuse_unwritable(folder: str | os.PathLike) -> None:
    """Raise UserError, before long work, if files cannot be written in folder; leaves nothing behind."""
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"can this be written?")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name next to path; on success flush it to disk and rename it, else remove it.

    So path is always either the old file or the complete new one. An OSError (a full disk, a folder without
    write permission) becomes a UserError that names path.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would lock out colleagues
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


# Command lines


class Help(argparse.HelpFormatter):
    """Help that says the default of each flag that has one, unless the flag's own words do."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        silent = isinstance(default, bool | list) or default in (None, argparse.SUPPRESS)
        told = silent or "(default: " in action.help
        return action.help if told else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse that accepts --img_h for --img-h, has no abbreviations, raises UserError and says defaults."""

    def __init__(self, **kwargs: object):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Replace underscores in flag names by hyphens, then parse."""
        words = sys.argv[1:] if args is None else args
        names = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
        words = [name.replace("_", "-") + equals + value for name, equals, value in names]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        """Raise UserError, which run_script prints."""
        raise UserError(f"{message} (--help lists the flags)")


def before_torch() -> None:
    """For scripts, before they import torch: exit with 2 if a file of --resume or --weights is missing.

    The import takes half a minute from a slow disk. All else about the flags is left to the script's parser.
    Until run_script, no garbage is collected: a tenth of the import would be spent on looking for some.
    """
    gc.disable()
    parser = Parser(add_help=False)
    for flag in ("--resume", "--weights"):
        parser.add_argument(flag, nargs="*", default=[])
    parser.add_argument("--model-path", default="save_model")  # test.py looks there too
    with contextlib.suppress(UserError):
        args, others = parser.parse_known_args()
        for name in {*args.resume, *args.weights} - {"auto", "imagenet", "none"}:
            several = "{trial}" in name or "{seed}" in name
            found = Path(name).exists() or Path(args.model_path, name).exists()
            if not (several or found) and not {"-h", "--help"} & set(others):
                print(f"{Path(sys.argv[0]).name}: error: no file at {name}", file=sys.stderr)
                sys.exit(2)


def at_least(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    """An argparse type: an integer from minimum to maximum."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, not {value}")
        return value

    parse.__name__ = "integer"  # for argparse's own error message
    return parse


seed_number = at_least(0, 2**32 - 1)  # NumPy's range


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def add_size_flags(add: Callable, height: str = "the checkpoint's", width: str = "the checkpoint's") -> None:
    """Add the flags of an image's size; height, width: what is said of their defaults."""
    pixels = {"type": at_least(8), "metavar": "PIXELS"}
    add("--img-h", **pixels, help=f"height that images are resized to (default: {height})")
    add("--img-w", **pixels, help=f"width that images are resized to (default: {width})")


def data_flags(*sizes: str) -> Parser:
    """Flags of every script that reads a dataset's images; sizes: see add_size_flags."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR", help="the dataset's folder (default: data/<dataset>)")
    sizes = sizes or ("384 SYSU-MM01 and LLCM, 288 RegDB", "128 SYSU-MM01, 144 RegDB and LLCM")
    add_size_flags(add, *sizes)
    return parser


def device_flags(amp: str | None = "auto") -> Parser:
    """Flags of every script that runs the network; amp: the default of --amp, None: the checkpoint's."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=at_least(-1), metavar="INDEX", help="the GPU to run on; -1: the CPU (default: 0)")
    add(
        "--workers", type=at_least(0), default=min(8, os.cpu_count() or 1), metavar="N",
        help="threads that decode images, at least one",
    )  # fmt: skip
    precision = "precision that the network runs in; auto: the fastest native one; off: float32"
    precision += "" if amp else " (default: the checkpoint's)"
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default=amp, help=precision)
    add(
        "--test-batch", "--test-batch-size", type=at_least(1), default=64, metavar="IMAGES",
        help="images that are embedded at a time, in evaluation and memory building",
    )  # fmt: skip
    return parser
