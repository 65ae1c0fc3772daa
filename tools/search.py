"""Find the images of a folder of embeddings (tools.embed's) that are most like one's own:

    python -m tools.search --resume RUN_best.t --gallery FOLDER --query IMAGE --query-modality infrared
    python -m tools.search --resume RUN_best.t --gallery FOLDER --query DIR --query-modality infrared --json

Exact unless --index is given. Results go to standard output, everything else to standard error.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import refuse_missing_checkpoints

    refuse_missing_checkpoints()

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from devices import Processes, select_device
from images import PixelRange, UnreadableImages, read_image
from retrieval.embeddings import embed_files, find_images, open_embedder, settle_precision
from retrieval.search import nearest, nearest_by_index, open_index
from retrieval.shards import Embeddings
from utils import Parser, UserError, at_least, device_flags, log, log_to_terminal, run_script, whole_file

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
    parser = Parser(
        prog="python -m tools.search",
        description="Search a folder of embeddings by images. Defaults stand in brackets.",
        parents=[device_flags()],
    )
    parser.set_defaults(amp=None)
    parser.add_argument("--resume", required=True, metavar="FILE", help="the checkpoint that embedded FOLDER")
    parser.add_argument("--gallery", required=True, metavar="FOLDER", help="tools.embed's --output")
    parser.add_argument(
        "--query", required=True, metavar="IMAGE|DIR", help="an image, or what tools.embed takes as --images"
    )
    parser.add_argument(
        "--query-modality", required=True, choices=("visible", "infrared"), help="of the queries"
    )
    parser.add_argument("--top", type=at_least(1), default=10, metavar="N", help="results of a query (10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--report", metavar="DIR", help="write a page with the images, DIR/index.html")
    parser.add_argument(
        "--index", action="store_true",
        help="through a FAISS index in FOLDER, built if there is none: faster, and no longer exact",
    )  # fmt: skip
    return parser


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


def told(known: dict[str, str]) -> str:
    """What is known of an image, in words."""
    return "".join(f"  {key} {value}" for key, value in known.items())


def as_text(results: Sequence[dict]) -> str:
    """Results for people: a line for each query, and one for each hit below it."""
    lines = []
    for result in results:
        lines.append(result["query"])
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
        items = [figure(result["query"], f"query {result['query']}", pixel_range)]
        for hit in result["hits"]:
            text = f"{hit['rank']}: {hit['similarity']:.4f}  {hit['path']}{told(hit['known'])}"
            items.append(figure(hit["path"], text, pixel_range))
        rows.append(f"<ol>{''.join(items)}</ol>")
    path = Path(folder, "index.html")
    with whole_file(path) as temporary:
        page = PAGE.format(heading=html.escape(heading), body="\n".join(rows))
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def as_results(
    paths: Sequence[str], similarities: torch.Tensor, positions: torch.Tensor, gallery: Embeddings
) -> list[dict]:
    """[{"query", "hits": [{"rank", "similarity", "path", "known": {column: text}}]}], for JSON."""
    found = positions.unique()
    records = dict(zip(found.tolist(), gallery.records(found.numpy()), strict=True))
    return [
        {
            "query": path,
            "hits": [
                {"rank": rank, "similarity": value, **records[position]}
                for rank, (value, position) in enumerate(zip(values, row, strict=True), start=1)
                if position >= 0
            ],
        }
        for path, values, row in zip(paths, similarities.tolist(), positions.tolist(), strict=True)
    ]


def main(args: argparse.Namespace) -> int:
    """Search, print, and write what was asked for; return 1 if a query could not be read."""
    log_to_terminal(stream=sys.stderr)
    sys.stdout.reconfigure(errors="surrogateescape")  # a file's name may be any bytes
    found = find_images(args.query, "--query", args.query_modality)
    embedder, saved = open_embedder(args.resume)
    gallery = open_gallery(args.gallery, embedder.fingerprint, embedder.network.dim, args.resume)
    embedder.height, embedder.width = gallery.manifest.height, gallery.manifest.width
    index = open_index(gallery, args.top) if args.index else None

    device = select_device(args.gpu)
    embedder.to(device, memory_format=torch.channels_last)
    amp, modality = args.amp or saved.get("amp", "auto"), args.query_modality
    dtype = settle_precision(embedder, amp, found.paths, modality, args.test_batch, args.workers, Processes())
    features, paths, failed = [], [], []
    for part, rows, failures in embed_files(
        embedder, found.paths, modality, args.test_batch, args.workers, dtype
    ):
        features.append(part)
        paths += [found.paths[row] for row in rows]
        failed += failures
    if not paths:
        raise UnreadableImages(failed)
    for failure in failed:
        log.warning("cannot read %s", failure)
    queries = torch.cat(features)
    if index is None:
        similarities, positions = nearest(queries.to(device), gallery, args.top)
    else:
        similarities, positions = nearest_by_index(index, queries, gallery, args.top)

    results = as_results(paths, similarities, positions.cpu(), gallery)
    if args.report:
        how = "through an index" if index else "exactly"
        heading = f"{args.gallery}: {len(gallery):,} images, searched {how} with {args.resume}"
        log.info("wrote %s", save_report(args.report, results, heading, embedder.pixel_range))
    print(json.dumps(results, indent=1) if args.json else as_text(results))
    return int(bool(failed))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
