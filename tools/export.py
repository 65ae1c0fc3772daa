"""Export a checkpoint's network for other runtimes, one ONNX graph for each stem:

    python -m tools.export --resume RUN_best.t --output model.onnx

writes model_visible.onnx and model_infrared.onnx, or model.onnx alone where both modalities share a stem.
Input: images (N, height, width, 3) RGB of 0 to 255, resized. Output: unit features (N, D) float32. Every
graph is compared with torch, on images, before any is written; model_check.npz has these images and their
features, to compare in any other runtime. docs/runtimes.md shows their use.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from augmentation import normalize
from evaluation.flags import RUNTIMES
from evaluation.runtimes import Graph, open_graph, to_onnx
from model import extract_features
from retrieval.embeddings import find_images, open_embedder
from utils import Parser, UserError, add_size_flags, log, log_to_terminal, run_script, whole_file

LARGEST_DIFFERENCE = 1e-4  # of a number of a feature, both in float32
LARGEST_DEVIATION = 1e-4  # of a feature's length from 1
CHECKED = 16  # images


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.export", description="Export a checkpoint's network as ONNX graphs, checked."
    )
    add = parser.add_argument
    checkpoint = "a checkpoint of this project, of the released code or of AGW"
    add("--resume", required=True, metavar="FILE", help=checkpoint)
    add("--output", required=True, metavar="FILE.onnx", help="file to write; a stem's name is put in")
    add("--images", metavar="DIR", help="images to check with (default: data/<the checkpoint's dataset>)")
    add("--check", choices=RUNTIMES[1:], default="onnx", help="the runtime to check the graphs in")
    add(
        "--input", choices=("uint8", "float32"), default="uint8",
        help="the type of the pixels; converters to float16 need float32",
    )  # fmt: skip
    add_size_flags(add)
    return parser


def check(found: np.ndarray, wanted: np.ndarray) -> tuple[str, bool]:
    """What differs between two runtimes' unit features (N, D) of the same images, and whether that is little.

    A cosine would not see a wrong length, nor two images that change places.
    """
    length = np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max()
    difference = np.abs(found - wanted).max()
    alike, other = (features.astype(np.float64) @ features.T for features in (wanted, found))
    for similarity in (alike, other):
        np.fill_diagonal(similarity, -np.inf)
    rows = np.arange(len(wanted))
    lost = alike.max(1) - alike[rows, other.argmax(1)] if len(rows) > 1 else np.zeros(1)
    kept = int((lost < LARGEST_DIFFERENCE).sum())  # another image that is as near is no change
    words = (
        f"lengths within {length:.1e} of 1, largest difference {difference:.1e}, "
        f"nearest neighbour kept by {kept} of {len(lost)}"
    )
    good = length < LARGEST_DEVIATION and difference < LARGEST_DIFFERENCE and kept == len(lost)
    return words, bool(good)


def compare(graph: bytes, runtime: str, pixels: np.ndarray, wanted: np.ndarray) -> tuple[str, bool]:
    """Check a graph in a runtime on images (N, H, W, 3): one, all, and one again, in a single session."""
    run = open_graph(graph, runtime)
    one, many, again = run(pixels[:1]), run(pixels), run(pixels[:1])
    words, good = check(many, wanted)
    for single in (one, again):
        good = good and check(single, wanted[:1])[1]
    return words, good


def torch_features(network: nn.Module, pixels: np.ndarray, modality: str) -> np.ndarray:
    """Unit features (N, D) of images (N, H, W, 3) uint8, by torch in float32."""
    return extract_features(network, [normalize(torch.from_numpy(pixels))], modality).numpy()


def main(args: argparse.Namespace) -> None:
    """Export, check and write."""
    log_to_terminal(stream=sys.stderr)
    output = Path(args.output)
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: a name that ends in .onnx")
    embedder, saved = open_embedder(args.resume, args.img_h, args.img_w)
    if not args.images and not Path("data", saved.get("dataset", "sysu")).is_dir():
        raise UserError("--images DIR: give some images to check the graphs with")
    paths = find_images(args.images or Path("data", saved.get("dataset", "sysu")), "--images").paths
    paths = [paths[k] for k in np.unique(np.linspace(0, len(paths) - 1, CHECKED).astype(int))]
    pixels = np.stack([embedder.pixels(path) for path in paths])

    network = embedder.network
    graphs, checked = {}, {"images": pixels.astype(args.input)}
    for modality in ("visible",) if network.stem == "shared" else ("visible", "infrared"):
        suffix = "" if network.stem == "shared" else f"_{modality}"
        path = output.with_name(f"{output.stem}{suffix}.onnx")
        example = torch.from_numpy(checked["images"][:1]).expand(2, -1, -1, -1)
        graphs[path] = to_onnx(Graph(network, modality), example)
        checked[f"features{suffix}"] = wanted = torch_features(network, pixels, modality)
        words, good = compare(graphs[path], args.check, checked["images"], wanted)
        log.info("%s in %s: %s (%d images)", path, args.check, words, len(paths))
        if not good:
            raise UserError(f"{path} is not written: its features differ from torch's ({words})")
    for path, graph in graphs.items():
        with whole_file(path) as temporary:
            temporary.write_bytes(graph)
    path = output.with_name(f"{output.stem}_check.npz")
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **checked)
    log.info(
        "in any runtime: checked = np.load(%r); np.abs(YOURS(checked['images']) - checked[%r]).max() < %g",
        str(path), list(checked)[1], LARGEST_DIFFERENCE,
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
