"""The files of a dataset: find images in folders, read lists of ids and images; values in messages."""

import contextlib
import functools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from utils import UserError, log

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k",
)  # fmt: skip
CLUTTER = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}  # of operating systems, beside hidden files
# Folders of file servers and operating systems, beside hidden ones: Synology, QNAP, Windows, macOS, Linux.
WASTE = {
    "@eadir", "#recycle", "#snapshot", "@tmp", "@recycle", "@recently-snapshot", "$recycle.bin",
    "system volume information", "__macosx", "lost+found", "thumbs", "thumbnails",
}  # fmt: skip
JUNK = "-1"  # Market-1501's pid of boxes that are nobody, which its evaluation ignores
JUNK_KIND = "junk, of pid -1"


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has done so."""
    log.warning(message)


def refuse(message: str, problems: list[str] | None) -> None:
    """Raise UserError; or, if problems is a list, append to it: tools.check reports all problems at once."""
    if problems is None:
        raise UserError(message)
    problems.append(message)


def listed(values: Iterable, most: int = 30) -> str:
    """Values for a message: `1, 2, 3`, at most `most` of them; sets are sorted."""
    words = [str(value) for value in (sorted(values) if isinstance(values, set) else values)]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def number(text: str) -> int | None:
    """text as a number; None unless it consists of 1 to 18 digits, which fit int64."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def refuse_separator(file: str | os.PathLike, header: Sequence[str]) -> None:
    """Refuse the first line of a table whose values are separated by other characters than commas."""
    for character, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and character in header[0]:
            raise UserError(f"{file}: its values are separated by {word}: save it with commas")


def is_image(name: str) -> bool:
    """Whether a file has an image's suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


class Folder(NamedTuple):
    """What a folder holds: paths in file-name order, without hidden files and clutter."""

    path: str
    images: list[str]
    broken: list[str]  # dangling links with an image's suffix
    others: list[str]  # files of other suffixes
    below: list[str]  # folders

    def refuse_misnamed(self, problems: list[str] | None = None) -> None:
        """Refuse what is only named like an image: to skip it would change every gallery drawn after it."""
        for path in sorted(self.broken + list(filter(is_image, self.below))):
            refuse(f"{path}: named like an image, but a folder or a dangling link", problems)


_listed: dict[str, Folder] = {}  # filled and emptied by list_folders_once
_keep_listed = False


@contextlib.contextmanager
def list_folders_once() -> Iterator[None]:
    """Within this block a folder is listed once: for reading a dataset several times, trial by trial."""
    global _keep_listed
    _keep_listed = True
    try:
        yield
    finally:
        _keep_listed = False
        _listed.clear()


class Finder:
    """Finds the image files below root, and remembers what it passes over: {kind: paths}."""

    def __init__(self, root: str | os.PathLike, problems: list[str] | None = None):
        self.root, self.problems = root, problems
        self.passed: dict[str, list[str]] = defaultdict(list)

    def scan(self, path: str) -> Folder:
        """What a folder holds; nothing if it does not exist. Refuses a folder that cannot be listed."""
        if path in _listed:
            return _listed[path]
        found = Folder(path, [], [], [], [])
        entries: list[os.DirEntry] = []
        try:
            with os.scandir(path) as stream:
                entries = sorted(stream, key=lambda entry: entry.name)
        except FileNotFoundError:
            pass
        except OSError as error:
            refuse(f"{path}: cannot be listed: {error.strerror}", self.problems)
        for entry in entries:
            name = entry.name.lower()
            if name.startswith(".") or name in CLUTTER:
                continue
            if name == JUNK or name.startswith(f"{JUNK}_"):
                self.passed[JUNK_KIND].append(entry.path)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if name in WASTE:
                    self.passed["folders of thumbnails or waste"].append(entry.path)
                else:
                    found.below.append(entry.path)
            elif is_image(name):
                is_file = not entry.is_symlink() or os.path.isfile(entry.path)
                (found.images if is_file else found.broken).append(entry.path)
            else:
                found.others.append(entry.path)
                self.passed[f"files {os.path.splitext(name)[1] or 'without a suffix'}"].append(entry.path)
        if _keep_listed:
            _listed[path] = found
        return found

    def images(self, path: str) -> list[str]:
        """The images of one folder."""
        folder = self.scan(path)
        folder.refuse_misnamed(self.problems)
        return folder.images

    def walk(self, tops: Sequence[str]) -> list[Folder]:
        """The folders tops and all below them, each before those in it, links followed.

        What is really the same folder is walked once, first without links: so an image belongs to the folder
        that it lies in. A link to a folder that holds a top is not followed.
        """
        found, waiting, links = [], list(reversed(tops)), []
        seen = {_identity(parent) for top in tops for parent in Path(os.path.realpath(top)).parents}
        while waiting or links:
            path = waiting.pop() if waiting else links.pop(0)
            if (identity := _identity(path)) in seen:
                self.passed["folders that are walked already, through a link"].append(path)
                continue
            seen.add(identity)
            found.append(self.scan(path))
            for below in found[-1].below:
                (links if os.path.islink(below) else waiting).append(below)
        return sorted(found, key=lambda folder: folder.path.split(os.sep))

    def report(self) -> None:
        """Warn of what was passed over, each kind with its number and first path."""
        kinds = [
            f"{kind} ({len(paths)}: {os.path.relpath(min(paths), self.root)}{', …' * (len(paths) > 1)})"
            for kind, paths in sorted(self.passed.items())
            if paths
        ]
        if kinds:
            warn_once(f"{self.root}: not read: {', '.join(kinds)}")


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error.strerror}") from error
    return status.st_dev, status.st_ino


def read_text(path: Path) -> str:
    """A text file's content without its BOM; UserError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; it lists a split of the dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of a text file, without CR, trailing commas and blank lines."""
    lines = enumerate((line.strip().rstrip(",").rstrip() for line in read_text(path).split("\n")), start=1)
    return [(count, line) for count, line in lines if line]


def read_ids(path: Path) -> list[int]:
    """The ids of a file of comma-separated ids, sorted, each once."""
    pids = set()
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: lists no ids")
    for count, line in lines:
        for word in filter(None, map(str.strip, line.split(","))):
            if (pid := number(word)) is None:
                raise UserError(f"{path}, line {count}: {word!r} is not an id")
            pids.add(pid)
    return sorted(pids)


def read_index(path: Path) -> list[tuple[int, str, str]]:
    """(line number, path, label) of each line `path label` of a list; the label is "" if it is missing."""
    split = ((count, *line.rsplit(None, 1)) for count, line in read_lines(path))  # a path may hold spaces
    return [(count, os.path.normpath(words[0]), "".join(words[1:])) for count, *words in split]


def path_problem(root: str | os.PathLike, path: str) -> str | None:
    """Describe what is wrong with a path from a list; None if it is valid.

    A path must be relative to root, the dataset's folder, and stay below it.
    """
    parts = PureWindowsPath(path)  # knows both kinds of slash, and drives
    if parts.anchor or ".." in parts.parts:
        for base in (os.path.abspath(root), os.path.realpath(root)):
            inside = os.path.relpath(os.path.join(base, path), base)
            if not parts.drive and "\\" not in path and not inside.startswith(os.pardir):
                return f"{path!r} must be written relative to {root}, as {inside!r}"
        return f"{path!r} is outside the dataset"
    if "\0" not in path and os.path.isfile(os.path.join(root, path)):
        return None
    return f"there is no image file {path!r} in {root}{other_form(os.path.join(root, path))}"


def other_form(path: str) -> str:
    """Words for a message, if a file that is missing exists under its name in another Unicode form."""
    forms = (form for form in ("NFC", "NFD") if "\0" not in path)
    names = {form: unicodedata.normalize(form, path) for form in forms}
    form = next((form for form, name in names.items() if name != path and os.path.isfile(name)), None)
    return f": the file's name is in another Unicode form, {form}: rewrite the list in it" if form else ""


def index_labels(file: Path, root: str | os.PathLike, problems: list[str] | None = None) -> dict[str, int]:
    """{path relative to root: label} of a list of images, in its order.

    Args:
        file: the list, with lines `path label`.
        root: the dataset's folder.
        problems: a list that collects problems, instead of raising UserError.

    Raises:
        UserError: a wrong label, an invalid path, a path with two labels, or an empty list.
    """
    labels, repeated = {}, []
    for count, path, label in read_index(file):
        where = f"{file}, line {count}"
        if not label:
            refuse(f"{where}: {path!r} has no label", problems)
        elif (pid := number(label)) is None:
            refuse(f"{where}: the label {label!r} is not a number", problems)
        elif problem := path_problem(root, path):
            refuse(f"{where}: {problem}", problems)
        elif path not in labels:
            labels[path] = pid
        elif labels[path] == pid:
            repeated.append(count)
        else:
            refuse(f"{where}: {path!r} has label {pid} here and {labels[path]} above", problems)
    if repeated:
        warn_once(f"{file}: images that are listed twice are used once: line {listed(repeated)}")
    if not labels:
        refuse(f"{file}: lists no images", problems)
    return labels
