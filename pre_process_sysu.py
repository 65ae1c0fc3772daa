"""Decode the training images of SYSU-MM01 once, into the arrays that train.py reads.

    python pre_process_sysu.py --data-path DIR

Writes train_{rgb,ir}_resized_{img,label}.npy with the identities of train_id.txt and val_id.txt (5 GB at the
default size), and train_resized.json, which records the images that they were made from.
"""

import argparse
import os
import sys
import time

import numpy as np

from data_manager import DATASETS, class_labels, dataset_root, train_samples
from readers.arrays import ArrayFiles, TrainingImages
from utils import Parser, at_least, data_flags, log_to_terminal, run_script


def get_args_parser() -> Parser:
    """The command line."""
    sysu = DATASETS["sysu"]
    parser = Parser(description=__doc__.split("\n")[0], parents=[data_flags()])
    parser.set_defaults(img_h=sysu.height, img_w=sysu.width)
    add = parser.add_argument
    add("--output", metavar="DIR", help="folder of the arrays (default: --data-path, where train.py looks)")
    add(
        "--pixel-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="values that become grey 0 and 255 in images of more than eight bits (default: found from the "
        "training images)",
    )  # fmt: skip
    workers = {"type": at_least(1), "default": os.cpu_count(), "metavar": "N"}
    add("--workers", **workers, help="threads that decode images")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the arrays and print what was written."""
    log_to_terminal(stream=sys.stderr)
    start = time.perf_counter()
    root = dataset_root("sysu", args.data_path)
    samples = train_samples("sysu", root)
    paths = {modality: samples[modality].paths for modality in samples}
    pids = np.unique(samples["visible"].pids)
    source = TrainingImages(paths, class_labels(samples), pids)
    arrays = ArrayFiles(args.output or root, args.img_h, args.img_w)
    arrays.write(source, args.workers, args.pixel_range)
    for modality, (file, _) in arrays.files.items():
        size = f"{args.img_h}x{args.img_w}, {file.stat().st_size / 1e6:.1f} MB"
        print(f"{file}: {len(paths[modality])} {modality} images {size}")
    print(f"{len(pids)} identities in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
