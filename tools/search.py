"""Find the images of a folder of embeddings (tools.embed's) that are most like one's own:

    python -m tools.search --resume RUN_best.t --gallery FOLDER --query IMAGE --query-modality infrared
    python -m tools.search --resume RUN_best.t --gallery FOLDER --query DIR --query-modality infrared --json

Exact; a query that the gallery has, by its path, does not find itself. --rerank aim reorders what is nearest,
each query for itself. Results go to standard output, everything else to standard error.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from devices import Processes, select_device
from images import PixelRange, UnreadableImages, read_image
from reranking import affinity_inference
from retrieval.embeddings import Found, embed_files, find_images, open_embedder, settle_precision
from retrieval.search import Allowed, nearest
from retrieval.shards import Embeddings
from utils import Parser, UserError, at_least, device_flags, log, log_to_terminal, run_script, whole_file

CANDIDATES = 100  # of a query, that --rerank reorders

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Search results</title>
<style>
body {{ font: 14px sans-serif; margin: 2em }}
ol {{ display: flex; flex-wrap: wrap; gap: 1em; padding: 0; list-style: none }}
li {{ width: 9em; overflow-wrap: anywhere; font-size: 12px }}
</style>
<h1>Search results</h1>
<p>{heading}</p>
{body}
</html>
"""


def get_args_parser() -> Parser:
    """The command line."""
    words, parents = "Search a folder of embeddings by images.", [device_flags(amp=None)]
    parser = Parser(prog="python -m tools.search", description=words, parents=parents)
    add = parser.add_argument
    add("--resume", required=True, metavar="FILE", help="the checkpoint that embedded FOLDER")
    add("--gallery", required=True, metavar="FOLDER", help="the folder that tools.embed wrote")
    add("--query", required=True, metavar="IMAGE|DIR", help="an image, or what tools.embed takes as --images")
    add("--query-modality", required=True, choices=("visible", "infrared"), help="modality of all queries")
    add("--top", type=at_least(1), default=10, metavar="N", help="how many images are found for each query")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--report", metavar="DIR", help="write a page with the images, DIR/index.html")
    add(
        "--exclude-same-camera", action="store_true",
        help="leave out images of the query's own camera, by the column camid of the gallery's table and of "
        "the queries' (or of the query in the gallery)",
    )  # fmt: skip
    add(
        "--rerank",
        choices=("aim",),
        help=f"reorder the {CANDIDATES} nearest by affinities to each other; similarities stay what they are",
    )
    add(
        "--min-similarity", type=cosine, default=-math.inf, metavar="S",
        help="leave out images that are less similar, -1 to 1 (default: leave out none)",
    )  # fmt: skip
    return parser


def cosine(text: str) -> float:
    """An argparse type: a number from -1 to 1."""
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from -1 to 1, not {text}")
    return value


def open_gallery(folder: str, fingerprint: str, dim: int, checkpoint: str) -> Embeddings:
    """The embeddings of folder; UserError if another checkpoint made them."""
    gallery = Embeddings(folder)
    made = gallery.manifest
    if (made.fingerprint, made.dim) != (fingerprint, dim):
        raise UserError(
            f"{folder} was embedded by another checkpoint, {made.checkpoint} ({made.fingerprint}, "
            f"D = {made.dim}), not by {checkpoint} ({fingerprint}, D = {dim})"
        )
    if not made.complete:
        log.warning("%s: tools.embed was interrupted: not all images are there", folder)
    return gallery


def own_positions(paths: Sequence[str], gallery: Embeddings) -> tuple[np.ndarray, list[str]]:
    """(where the gallery has these images (Q,), -1: nowhere; the camid of all the gallery's images (N))."""
    places, camids = dict.fromkeys(paths, -1), []
    for position, (path, camid) in enumerate(gallery.columns("path", "camid")):
        camids.append(camid)
        if path in places:
            places[path] = position
    return np.array([places[path] for path in paths]), camids


def other_cameras(found: Found, rows: Sequence[int], own: np.ndarray, camids: Sequence[str]) -> Allowed:
    """Which images are of another camera than a query, or of an unknown one.

    The camid of a query, rows of found, is what its table says, or the gallery of the same image. UserError:
    nobody says it.
    """
    numbers = {camid: number for number, camid in enumerate(dict.fromkeys(camids))}
    place = found.columns.index("camid") if "camid" in found.columns else None
    asked = []
    for row, position in zip(rows, own.tolist(), strict=True):
        camid = (found.values[row][place] if place is not None else "") or (
            camids[position] if position >= 0 else ""
        )
        if not camid or not any(numbers):
            which = found.paths[row] if not camid else "the gallery's images"
            raise UserError(f"--exclude-same-camera: no camid is known of {which}: a table's column says it")
        asked.append(numbers.get(camid, -1))
    asked, cameras = np.array(asked), np.array([numbers[camid] for camid in camids])
    return lambda query, position: cameras[position] != asked[query]


def told(known: dict[str, str]) -> str:
    """What is known of an image, in words."""
    return "".join(f"  {key} {value}" for key, value in known.items())


def query_name(result: dict) -> str:
    """A query's path, and whether the gallery has it."""
    return result["query"] + "  (in the gallery: left out)" * result["in_gallery"]


def as_text(results: Sequence[dict]) -> str:
    """Results for people: a line for each query, and one for each hit below it."""
    lines = []
    for result in results:
        lines.append(query_name(result))
        for hit in result["hits"]:
            lines.append(f"{hit['rank']:5}  {hit['similarity']:.4f}  {hit['path']}{told(hit['known'])}")
    return "\n".join(lines)


def figure(path: str, text: str, pixel_range: PixelRange | None) -> str:
    """An item of an HTML list: an image, if it can be read, with text below."""
    picture = ""
    try:
        file = io.BytesIO()
        Image.fromarray(read_image(path, 144, 60, pixel_range)).save(file, "JPEG")
        picture = (
            f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"><br>'
        )
    except UnreadableImages:
        text += " (cannot be read)"
    return f"<li>{picture}{html.escape(text)}</li>"


def save_report(
    folder: str, results: Sequence[dict], heading: str, pixel_range: PixelRange | None = None
) -> Path:
    """Write a page that needs no other file: each query and its hits; pixel_range as images.read_image."""
    rows = []
    for result in results:
        items = [figure(result["query"], f"query {query_name(result)}", pixel_range)]
        for hit in result["hits"]:
            text = f"{hit['rank']}: {hit['similarity']:.4f}  {hit['path']}{told(hit['known'])}"
            items.append(figure(hit["path"], text, pixel_range))
        rows.append(f"<ol>{''.join(items)}</ol>")
    path = Path(folder, "index.html")
    with whole_file(path) as temporary:
        page = PAGE.format(heading=html.escape(heading), body="\n".join(rows))
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def reranked(
    queries: torch.Tensor, gallery: Embeddings, similarities: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What nearest has found, each query's first CANDIDATES in the order of affinity inference among them."""
    order = torch.arange(positions.shape[1], device=positions.device).repeat(len(positions), 1)
    for query, row, places in zip(queries, positions, order, strict=True):
        found = row[:CANDIDATES][row[:CANDIDATES] >= 0]
        if len(found) > 1:
            rows = F.normalize(gallery.take(found.cpu().numpy()).to(query.device).float())
            distances = affinity_inference(query[None], rows, k1=min(4, len(found)))[0]
            places[: len(found)] = distances.argsort(stable=True)
    return similarities.gather(1, order), positions.gather(1, order)


def as_results(
    paths: Sequence[str],
    own: np.ndarray,
    similarities: torch.Tensor,
    positions: torch.Tensor,
    gallery: Embeddings,
) -> list[dict]:
    """[{"query", "in_gallery", "hits": [{"rank", "similarity", "path", "known": {column: text}}]}]."""
    found = positions[positions >= 0].unique()
    records = dict(zip(found.tolist(), gallery.records(found.numpy()), strict=True))
    return [
        {
            "query": path,
            "in_gallery": position_of_own >= 0,
            "hits": [
                {"rank": rank, "similarity": value, **records[position]}
                for rank, (value, position) in enumerate(zip(values, row, strict=True), start=1)
                if position >= 0
            ],
        }
        for path, position_of_own, values, row in zip(
            paths, own.tolist(), similarities.tolist(), positions.tolist(), strict=True
        )
    ]


def main(args: argparse.Namespace) -> int:
    """Search, print, and write what was asked for; return 1 if a query could not be read."""
    log_to_terminal(stream=sys.stderr)
    sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
    found = find_images(args.query, "--query", args.query_modality)
    embedder, saved = open_embedder(args.resume)
    gallery = open_gallery(args.gallery, embedder.fingerprint, embedder.network.dim, args.resume)
    embedder.height, embedder.width = gallery.manifest.height, gallery.manifest.width

    device = select_device(args.gpu)
    embedder.to(device, memory_format=torch.channels_last)
    amp, modality = args.amp or saved.get("amp", "auto"), args.query_modality
    dtype = settle_precision(embedder, amp, found.paths, modality, args.test_batch, args.workers, Processes())
    features, rows, failed = [], [], []
    for part, read, failures in embed_files(
        embedder, found.paths, modality, args.test_batch, args.workers, dtype
    ):
        features.append(part)
        rows += read
        failed += failures
    if not rows:
        raise UnreadableImages(failed)
    for failure in failed:
        log.warning("cannot read %s", failure)
    paths = [found.paths[row] for row in rows]
    own, camids = own_positions(paths, gallery)
    other = other_cameras(found, rows, own, camids) if args.exclude_same_camera else None

    def allowed(query: np.ndarray, position: np.ndarray) -> np.ndarray:
        return (position != own[query]) & (True if other is None else other(query, position))

    queries = torch.cat(features).to(device)
    number = max(args.top, CANDIDATES) if args.rerank else args.top
    found = nearest(queries, gallery, number, allowed, args.min_similarity)
    if args.rerank:
        log.info("the order of the first %d is that of %s, not that of similarities", CANDIDATES, args.rerank)
        found = reranked(queries, gallery, *found)
    similarities, positions = (values[:, : args.top].cpu() for values in found)
    results = as_results(paths, own, similarities, positions, gallery)
    if args.report:
        heading = f"{args.gallery}: {len(gallery):,} images, searched with {args.resume}"
        heading += f", re-ranked by {args.rerank}" if args.rerank else ""
        log.info("wrote %s", save_report(args.report, results, heading, embedder.pixel_range))
    print(json.dumps(results, indent=1) if args.json else as_text(results))
    return int(bool(failed))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
