"""Check whether a dataset is complete: compare its counts with the published ones and decode every image.

    python -m tools.check --dataset sysu --data-path DIR

Exit status 0: complete; 1: not complete; 2: dataset not found.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data_manager import CAPTURED, DATASETS, Samples, dataset_root, read_split, refuse_shared, unknown_cameras
from readers.lists import IMAGE_SUFFIXES, listed, number
from readers.own_data import draw_split
from utils import Parser, UserError, at_least, log_to_terminal, run_script, seed_number

Splits = dict[str, dict[str, Samples]]  # split -> modality -> images; RegDB's are "train 1", "test 1", …

# (splits, modality, camera) -> (identities, images); None: not published.
PUBLISHED = {
    "sysu": {
        (("train",), "both", "all"): (296, None),
        (("val",), "both", "all"): (99, None),
        (("train", "val"), "visible", "all"): (395, 22258),
        (("train", "val"), "infrared", "all"): (395, 11909),
        (("test",), "visible", "1"): (None, 1374),
        (("test",), "visible", "2"): (None, 1565),
        (("test",), "infrared", "3"): (None, 1883),
        (("test",), "visible", "4"): (None, 1918),
        (("test",), "visible", "5"): (None, 1918),
        (("test",), "infrared", "6"): (None, 1920),
        (("test",), "infrared", "all"): (None, 3803),
        (("test",), "both", "all"): (96, None),
    },
    "regdb": {
        ((f"{split} {trial}",), modality, camera): (206, 2060)
        for trial in DATASETS["regdb"].trials
        for split in ("train", "test")
        for modality, camera in (("visible", "1"), ("infrared", "2"))
    },
    "llcm": {
        (("train",), "both", "all"): (713, None),
        (("train", "test"), "both", "all"): (1064, 46767),
    },
}
CLUTTER = {"thumbs.db", "desktop.ini", "ehthumbs.db"}  # files of operating systems, besides hidden files


def check(name: str, root: str | os.PathLike) -> tuple[list[str], bool]:
    """Compare a dataset with the published counts and decode every image: (lines to print, complete).

    Complete means: every published count matches and there are no problems, such as an id without images, an
    id or image in two splits, a malformed index line or a broken image. Files and ids in no split are only
    noted.
    """
    problems: list[str] = []
    splits = read_splits(name, root, problems)
    paths = {path for split in splits.values() for images in split.values() for path in images.paths}
    problems = [*dict.fromkeys(problems), *unreadable(sorted(paths))]  # two splits may share a problem
    rows = count_rows(splits, PUBLISHED.get(name, {}))
    wrong = sum(row[-1] == "differs" for row in rows)

    table = [("split", "modality", "camera", "ids", "published", "images", "published", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{DATASETS[name].title} in {root}", ""]
    for row in table:
        texts = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        texts[:2] = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join(texts).rstrip())
    lines.append("")
    lines += [f"problem: {problem}" for problem in problems]
    lines += [f"note: {root}: {note}" for note in (not_taken(name, root, paths) if paths else ())]
    complete = not wrong and not problems
    lines.append("complete" if complete else f"not complete: {wrong} counts differ, {len(problems)} problems")
    return lines, complete


def read_splits(name: str, root: str | os.PathLike, problems: list[str]) -> Splits:
    """Read every split that can be read; append what is wrong to problems."""

    def attempt(function: Callable, *args: object) -> dict | None:
        try:
            return function(name, root, *args)
        except UserError as error:
            problems.append(str(error))
            return None

    splits = {}
    trials = DATASETS[name].trials if name == "regdb" else (None,)
    for trial in trials:
        for split in ("train", "val", "test") if name == "sysu" else ("train", "test"):
            title = split if trial is None else f"{split} {trial}"
            splits[title] = attempt(read_split, split, trial, problems)
        attempt(refuse_shared, trial)
    if name == "sysu":
        attempt(refuse_shared, None, "val")
    return {title: split for title, split in splits.items() if split is not None}


def count_rows(splits: Splits, published: dict) -> list[tuple[str, ...]]:
    """The table's rows: one for each split, modality and camera, and one for each published count."""
    counts = {key: (set(), []) for key in published}  # (splits, modality, camera) -> {(split, pid)}, [images]
    groups = list(dict.fromkeys([*((split,) for split in splits), *(key[0] for key in published)]))
    for group, split in [(together, split) for together in groups for split in together]:
        for modality, samples in splits.get(split, {}).items():
            for camid in np.unique(samples.camids):
                pids = samples.pids[samples.camids == camid].tolist()
                camera = (group, modality, str(camid))
                if len(group) == 1:
                    counts.setdefault(camera, (set(), []))
                for key in (camera, (group, modality, "all"), (group, "both", "all")):
                    if key in counts:
                        counts[key][0].update((split, pid) for pid in pids)
                        counts[key][1].append(len(pids))
    rows = []
    for key in sorted(
        counts, key=lambda key: (groups.index(key[0]), (*CAPTURED, "both").index(key[1]), key[2])
    ):
        actual = len(counts[key][0]), sum(counts[key][1])
        expected = published.get(key, (None, None))
        differs = any(want not in (None, have) for have, want in zip(actual, expected, strict=True))
        numbers = (
            "-" if n is None else f"{n:,}" for pair in zip(actual, expected, strict=True) for n in pair
        )
        rows.append(("+".join(key[0]), *key[1:], *numbers, "differs" if differs else ""))
    return rows


def unreadable(paths: Iterable[str]) -> list[str]:
    """A line for each image that cannot be decoded."""

    def trouble(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                image.load()
        except UnidentifiedImageError:
            return f"{path}: not an image"
        except Exception as error:  # Pillow may raise anything for a broken file
            return f"{path}: cannot be decoded: {error}"
        return None

    paths = list(paths)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        lines = list(tqdm(pool.map(trouble, paths), "decoding", len(paths), unit="image", disable=None))
    return [line for line in lines if line]


def not_taken(name: str, root: str | os.PathLike, taken: set[str]) -> list[str]:
    """What is in the dataset's folders but in no split: cameras, ids and files, a line for each kind.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        taken: the paths of all images of the splits.
    """
    cameras = unknown_cameras(name, root)
    known = {number(os.path.basename(os.path.dirname(path))) for path in taken}
    pids, images, others = set(), [], []
    apart = {DATASETS[name].index_folder, *cameras}
    for folder, below, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        below[:] = sorted(
            part for part in below if not hidden(part) and os.path.normpath(f"{inside}/{part}") not in apart
        )
        if inside == ".":  # training arrays lie here
            continue
        pid = number(os.path.basename(folder))
        for file in sorted(file for file in files if not hidden(file)):
            if os.path.join(folder, file) in taken:
                continue
            if not file.lower().endswith(IMAGE_SUFFIXES):
                others.append(os.path.join(inside, file))
            elif pid is not None and pid not in known:
                pids.add(pid)
            else:
                images.append(os.path.join(inside, file))
    kinds = {
        f"not read, because {DATASETS[name].title} has no such camera: ": cameras,
        "not used, in no split: id ": pids,
        f"not taken, {len(images)} images: ": images,
        f"not taken, {len(others)} files without an image's suffix: ": others,
    }
    return [kind + listed(names) for kind, names in kinds.items() if names]


def hidden(name: str) -> bool:
    """Whether a file or folder is not part of a dataset."""
    return name.startswith(".") or name.lower() in CLUTTER


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.check",
        description="Check whether a dataset is complete; exit status 0 if it is, 1 if not.",
    )
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="which dataset")
    parser.add_argument("--data-path", metavar="DIR", help="the dataset's folder (data/<dataset>)")
    parser.add_argument(
        "--test-identities", type=at_least(1), metavar="N", help="own images: draw N test identities, once"
    )
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="seed of that draw (0)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the result of the check; return 0 if the dataset is complete, else 1."""
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # file names may hold characters that a terminal cannot show
    root = dataset_root(args.dataset, args.data_path)
    if args.test_identities is not None:
        if args.dataset != "folder":
            raise UserError(f"--test-identities: {DATASETS[args.dataset].title} already has a split")
        log_to_terminal(stream=sys.stderr)
        draw_split(root, args.test_identities, args.seed)
    lines, complete = check(args.dataset, root)
    print("\n".join(lines))
    return 0 if complete else 1


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
