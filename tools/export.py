"""Export a checkpoint's network for other runtimes, one ONNX graph for each stem:

    python -m tools.export --resume RUN_best.t --output model.onnx

writes model_visible.onnx and model_infrared.onnx, or model.onnx alone where both modalities share a stem.
Input: images (N, height, width, 3) uint8 RGB, resized. Output: unit features (N, D) float32. Every graph is
checked with ONNX Runtime against torch, on images, before any is written. docs/runtimes.md shows their use.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import refuse_missing_checkpoints

    refuse_missing_checkpoints()

import argparse
import io
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from augmentation import MEAN, STD
from model import TwoStreamResNet
from retrieval.embeddings import Embedder, find_images, open_embedder
from utils import Parser, UserError, at_least, log, log_to_terminal, run_script, whole_file

SMALLEST_COSINE = 0.99999  # between ONNX Runtime's and torch's feature of an image, both in float32
CHECKED = 16  # images
OPSET = 17  # ONNX Runtime has it since 1.12


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.export", description="Export a checkpoint's network as ONNX graphs, checked."
    )
    parser.add_argument(
        "--resume", required=True, metavar="FILE", help="a checkpoint, ours or the released code's"
    )
    parser.add_argument("--output", required=True, metavar="FILE.onnx", help="a stem's name is put in")
    parser.add_argument(
        "--images", metavar="DIR", help="images to check with (data/<dataset>, of the checkpoint's dataset)"
    )
    parser.add_argument("--img-h", type=at_least(8), metavar="PIXELS", help="(the checkpoint's)")
    parser.add_argument("--img-w", type=at_least(8), metavar="PIXELS", help="(the checkpoint's)")
    return parser


def runtime_module() -> ModuleType:
    """ONNX Runtime; UserError, saying what to install, where it or ONNX is not there."""
    try:
        import onnx  # noqa: F401, torch's exporter asks for it
        import onnxruntime
    except ImportError as error:
        raise UserError("tools.export needs ONNX and its runtime: pip install onnx onnxruntime") from error
    return onnxruntime


class Graph(nn.Module):
    """What is exported: images (N, H, W, 3) uint8 RGB -> unit features (N, D) float32, of one modality."""

    def __init__(self, network: TwoStreamResNet, modality: str):
        super().__init__()
        self.network, self.modality = network, modality
        self.register_buffer("mean", 255 * torch.from_numpy(MEAN))
        self.register_buffer("std", 255 * torch.from_numpy(STD))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise the pixels, embed them, normalise the features."""
        pixels = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return F.normalize(self.network(**{self.modality: pixels}))


def export_graph(embedder: Embedder, modality: str) -> bytes:
    """The ONNX file of a modality, for batches of any size of images of the embedder's size."""
    example = torch.zeros(2, embedder.height, embedder.width, 3, dtype=torch.uint8)
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        # Of torch's two exporters the older one, which needs ONNX alone; the check tells whether it erred.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Graph(embedder.network, modality).eval(), (example,), file, dynamo=False, opset_version=OPSET,
            input_names=["images"], output_names=["features"],
            dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        )  # fmt: skip
    return file.getvalue()


def smallest_cosine(graph: bytes, embedder: Embedder, paths: list[str], modality: str) -> float:
    """The smallest cosine, over the images at paths, between ONNX Runtime's features and torch's."""
    session = runtime_module().InferenceSession(graph, providers=["CPUExecutionProvider"])
    pixels = np.stack([embedder.pixels(path) for path in paths])
    parts = [part for part in (pixels[:1], pixels[1:]) if len(part)]  # batches of one and of many
    found = np.concatenate([session.run(["features"], {"images": part})[0] for part in parts])
    wanted = embedder(paths, modality).numpy().astype(np.float64)
    found = found.astype(np.float64)
    lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
    return float(((wanted * found).sum(1) / lengths).min())


def main(args: argparse.Namespace) -> None:
    """Export, check and write."""
    log_to_terminal(stream=sys.stderr)
    runtime_module()
    output = Path(args.output)
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: a name that ends in .onnx")
    embedder, saved = open_embedder(args.resume, args.img_h, args.img_w)
    if not args.images and not Path("data", saved.get("dataset", "sysu")).is_dir():
        raise UserError("--images DIR: give some images to check the graphs with")
    paths = find_images(args.images or Path("data", saved.get("dataset", "sysu")), "--images").paths
    paths = [paths[k] for k in np.unique(np.linspace(0, len(paths) - 1, CHECKED).astype(int))]

    shared = embedder.network.stem == "shared"
    graphs = {}
    for modality in ("visible",) if shared else ("visible", "infrared"):
        path = output if shared else output.with_name(f"{output.stem}_{modality}.onnx")
        graphs[path] = export_graph(embedder, modality)
        cosine = smallest_cosine(graphs[path], embedder, paths, modality)
        log.info("%s: cosine with torch at least %.7f on %d images", path, cosine, len(paths))
        if not cosine >= SMALLEST_COSINE:
            raise UserError(f"{path} is not written: its features differ from torch's ({cosine:.7f})")
    for path, graph in graphs.items():
        with whole_file(path) as temporary:
            temporary.write_bytes(graph)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
