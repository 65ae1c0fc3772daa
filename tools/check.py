"""Check whether a dataset is complete: compare its counts with the published ones and decode every image.

    python -m tools.check --dataset sysu --data-path DIR

Exit status 0: complete; 1: not complete; 2: dataset not found.
"""

import argparse
import os
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

import data_manager
from data_manager import CAPTURED, DATASETS, Samples
from images import UnreadableImages, decode
from readers.lists import Finder, listed, number
from readers.own import draw_split
from readers.ranges import find_pixel_range
from utils import Parser, UserError, at_least, log_to_terminal, run_script, seed_number

Splits = dict[str, dict[str, Samples]]  # split -> modality -> images; RegDB's are "train 1", "test 1", …


def check(name: str, root: str | os.PathLike, workers: int = 1) -> tuple[list[str], bool]:
    """Compare a dataset with the published counts and decode every image: (lines to print, complete).

    Complete means: every published count matches and there are no problems, such as an id without images, an
    id or image in two splits, a malformed index line or a broken image: what train.py and test.py refuse, by
    the same functions. Files and ids in no split are only noted.
    """
    problems: list[str] = []
    splits = read_splits(name, root, problems)
    paths = {path for split in splits.values() for images in split.values() for path in images.paths}
    problems = [*dict.fromkeys([*problems, *unreadable(name, splits, workers)])]  # splits may share a problem
    rows = count_rows(splits, DATASETS[name].published)
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
    if wrong and not problems:
        lines.append(
            f"note: {root}: other counts are right for a part of {DATASETS[name].title} or a synthetic one: "
            "train.py works with it, with a --batch-size up to its identities; results cannot be compared"
        )
    complete = not wrong and not problems
    lines.append("complete" if complete else f"not complete: {wrong} counts differ, {len(problems)} problems")
    return lines, complete


def read_splits(name: str, root: str | os.PathLike, problems: list[str]) -> Splits:
    """Read every split that can be read, as train.py and test.py do; append what is wrong to problems."""

    def attempt(function: Callable, *args: object) -> dict | None:
        try:
            return function(name, root, *args)
        except UserError as error:
            problems.append(str(error))
            return None

    dataset, splits = DATASETS[name], {}
    for trial in dataset.trials if name == "regdb" else (None,):
        for split in dataset.splits:
            title = split if trial is None else f"{split} {trial}"
            splits[title] = attempt(data_manager.read_split, split, trial, problems)
        for tested in dataset.splits[1:] if name == "sysu" else ("test",):
            attempt(data_manager.refuse_shared, trial, tested)
        if not problems:  # else they would say the same in other words
            attempt(data_manager.train_samples, trial)
            for mode in dataset.modes:
                attempt(data_manager.query_samples, mode, trial)
                attempt(data_manager.gallery_samples, mode, trial)
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


def unreadable(name: str, splits: Splits, workers: int) -> list[str]:
    """Decode every image as training and evaluation do; a line for each that cannot be used."""
    problems, ranges = [], {}
    for trial in {title.partition(" ")[2] for title in splits}:
        trained = [part for title, part in splits.items() if title in (f"train {trial}".strip(), "val")]
        paths = {m: [p for part in trained if m in part for p in part[m].paths] for m in CAPTURED}
        try:
            ranges[trial] = find_pixel_range(paths, workers)
        except UserError as error:
            problems.append(str(error))
    used = {  # an image of several trials is decoded once for each range
        (path, ranges.get(title.partition(" ")[2]))
        for title, split in splits.items()
        for samples in split.values()
        for path in samples.paths
    }
    with tqdm(total=len(used), desc="decoding", unit="image", disable=None) as bar:
        for pixel_range in dict.fromkeys(pixel_range for _, pixel_range in used):
            paths = sorted(path for path, other in used if other == pixel_range)
            size = DATASETS[name].height, DATASETS[name].width
            try:
                for pixels in decode(paths, *size, workers, pixel_range=pixel_range):
                    bar.update(len(pixels))
            except UnreadableImages as error:
                problems += error.failures
    return problems


def not_taken(name: str, root: str | os.PathLike, taken: set[str]) -> list[str]:
    """What is in the dataset's folders but in no split: cameras, ids and files, a line for each kind.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        taken: the paths of all images of the splits.
    """
    cameras = DATASETS[name].unknown_cameras(root)
    names = set(map(os.path.basename, taken))
    known = {number(os.path.basename(os.path.dirname(path))) for path in taken}
    apart = tuple(os.path.join(root, part, "") for part in (DATASETS[name].index_folder, *cameras) if part)
    pids, images, others = set(), [], []
    for folder in Finder(root).walk([str(root)]):
        if folder.path == str(root) or os.path.join(folder.path, "").startswith(apart):
            continue  # training arrays lie in root
        pid = number(os.path.basename(folder.path))
        left = [path for path in [*folder.images, *folder.broken] if path not in taken]
        if os.path.relpath(folder.path, root).startswith(DATASETS[name].repeating):
            left = [path for path in left if os.path.basename(path) not in names]
        if pid is not None and pid not in known:
            pids |= {pid for _ in left}
        else:
            images += [os.path.relpath(path, root) for path in left]
        others += [os.path.relpath(path, root) for path in folder.others]
    kinds = {
        f"not read, because {DATASETS[name].title} has no such camera: ": cameras,
        "not used, in no split: id ": pids,
        f"images not taken, {len(images)}: ": images,
        f"files without an image's suffix not taken, {len(others)}: ": others,
    }
    return [kind + listed(names) for kind, names in kinds.items() if names]


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.check",
        description="Check whether a dataset is complete; exit status 0 if it is, 1 if not.",
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=DATASETS, help="the dataset to check")
    add("--data-path", metavar="DIR", help="the dataset's folder (default: data/<dataset>)")
    add(
        "--test-identities", type=at_least(1), metavar="N",
        help="draw N test identities, once, of own images without a split",
    )  # fmt: skip
    add("--seed", type=seed_number, default=0, metavar="N", help="seed of that draw")
    workers = {"type": at_least(1), "default": os.cpu_count(), "metavar": "N"}
    add("--workers", **workers, help="threads that decode images")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the result of the check; return 0 if the dataset is complete, else 1."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for what a terminal cannot show of a file's name
    log_to_terminal(stream=sys.stderr)
    root = data_manager.dataset_root(args.dataset, args.data_path)
    if args.test_identities is not None:
        if args.dataset != "folder":
            raise UserError(f"--test-identities: {DATASETS[args.dataset].title} already has a split")
        draw_split(root, args.test_identities, args.seed)
    lines, complete = check(args.dataset, root, args.workers)
    print("\n".join(lines))
    return 0 if complete else 1


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
