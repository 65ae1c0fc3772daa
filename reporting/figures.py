"""Figures for the report and for papers, in one style: legible in grey, and whatever colours a reader sees.

Each function takes plain arrays and returns a matplotlib figure, which `save` writes as PNG and PDF and `svg`
turns into a picture that follows the colours of the page around it.
"""

import io
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from evaluation.cameras import CameraScores
from evaluation.similarity import Similarities, equal_error_rate, overlap, shares
from utils import whole_file

INK, PAPER = "#1c2127", "#fefefe"  # in a page: the text's colour and the page's
# Okabe and Ito's, which colour-blind readers tell apart; a line has a dash and a mark of its own besides.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKS = "osD^vP"
RIGHT, WRONG, NEUTRAL = "#009e73", "#d55e00", "#7d858f"
KINDS = {"right": (RIGHT, "✓"), "wrong": (WRONG, "✗"), "ignored": (NEUTRAL, "–"), "query": (INK, "")}
STYLE = {
    "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8,
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": NEUTRAL, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "lines.linewidth": 1.6, "legend.frameon": False, "hatch.linewidth": 0.6,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mce",
}  # fmt: skip
in_style = matplotlib.rc_context(STYLE)


def _panels(rows: int, columns: int, width: float, height: float, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels, (rows, columns) axes; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


@in_style
def save(figure: Figure, folder: str | os.PathLike, name: str) -> list[Path]:
    """Write folder/name.png (200 dpi) and .pdf; the paths. UserError where that cannot be done."""
    paths = [Path(folder, f"{name}.{suffix}") for suffix in ("png", "pdf")]
    for path in paths:
        with whole_file(path) as temporary:
            date = {"CreationDate": None} if path.suffix == ".pdf" else {}  # the same data, the same file
            figure.savefig(temporary, format=path.suffix[1:], dpi=200, metadata=date)
        figure.set_layout_engine("none")  # all is where it belongs
    return paths


@in_style
def svg(figure: Figure) -> str:
    """The figure as an <svg> element in the colours of its page (CSS: --paper, --series-0 …)."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # a page has several figures, an id may be in it once
    for k, color in enumerate(COLORS):  # a dark page may want some of them lighter
        text = text.replace(color, f"var(--series-{k}, {color})")
    return text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")


@in_style
def cmc(curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """CMC curves: a panel for each protocol, a line for each label, a band of one standard deviation.

    curves: {protocol: {label: (mean (R,), deviation over trials (R,)), in [0, 1]}}.
    """
    many = max(len(lines) for lines in curves.values())
    below = 0.33 * many if many > 3 else 0  # inches: where they would cover the curves, their names are below
    figure, axes = _panels(1, len(curves), 4.4 * len(curves), 3.5 + below)
    for axis, (protocol, lines) in zip(axes[0], curves.items(), strict=True):
        for k, (label, (mean, deviation)) in enumerate(lines.items()):
            ranks, style = np.arange(1, len(mean) + 1), k % len(COLORS)
            name = textwrap.fill(f"{label}: rank-1 {100 * mean[0]:.2f} %", 34)
            axis.fill_between(
                ranks, 100 * (mean - deviation), 100 * (mean + deviation),
                color=COLORS[style], alpha=0.18, linewidth=0,
            )  # fmt: skip
            axis.plot(
                ranks, 100 * mean, color=COLORS[style], linestyle=DASHES[style], marker=MARKS[style],
                markevery=(k % 5, 5), markersize=4, label=name,
            )  # fmt: skip
        axis.set(title=protocol, xlabel="rank", ylabel="matching rate (%)", xlim=(0.5, len(ranks) + 0.5))
        low = min(0.9, *(mean[0] for mean, _ in lines.values()))
        axis.set_ylim(100 * max(0, low - 0.45 * (1 - low)), 101)  # room for the legend
        axis.set_xticks([1, *range(5, len(ranks) + 1, 5)])
        if len(lines) <= 3:
            axis.legend(loc="lower right")
        else:
            axis.legend(loc="upper left", bbox_to_anchor=(0, -0.18))
    return figure


@in_style
def histogram(kinds: Mapping[str, Mapping[str, Similarities]], edges: Mapping[str, np.ndarray]) -> Figure:
    """Similarities within and between identities: a row for each label, a panel for each kind of pair.

    kinds: {kind: {label: Similarities}}, see similarity.sample_similarities. edges: {label: of its bins}, its
    own, since the similarities of a network before training differ by a thousandth of those after it.
    """
    labels = list(dict.fromkeys(label for those in kinds.values() for label in those))
    size = max(3.4, 2.5 * len(kinds)), 0.7 + 1.9 * len(labels)
    figure, axes = _panels(len(labels), len(kinds), *size, sharex="row", sharey="row")
    for row, label in zip(axes, labels, strict=True):
        for axis, (kind, those) in zip(row, kinds.items(), strict=True):
            if label not in those:
                axis.set_axis_off()
                continue
            pair = those[label]
            for name, color, hatch in (("between", COLORS[1], ""), ("within", COLORS[0], "////")):
                share = shares(getattr(pair, name), edges[label])
                axis.stairs(100 * share, edges[label], fill=True, facecolor=color, alpha=0.35, hatch=hatch)
                axis.stairs(100 * share, edges[label], color=color, linewidth=1.3, label=f"{name} identities",
                            linestyle="-" if name == "within" else "--")  # fmt: skip
            numbers = f"overlap {100 * overlap(pair):.1f} %, EER {100 * equal_error_rate(pair):.1f} %"
            axis.set_title(f"{kind.replace('-', '–')}\n{numbers}")
            axis.set_xlim(edges[label][0], edges[label][-1])
            axis.xaxis.get_major_locator().set_params(nbins=4)
            axis.ticklabel_format(axis="x", useOffset=False)
        row[0].set_ylabel(textwrap.fill(label, 20) + "\npairs (%)" if len(labels) > 1 else "pairs (%)")
    for axis in axes[-1]:
        axis.set_xlabel("cosine similarity")
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True)) or dict(
        zip(*reversed(axes[-1][-1].get_legend_handles_labels()), strict=True)
    )
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


@in_style
def embedding(points: np.ndarray, pids: np.ndarray, modalities: Sequence[str], method: str) -> Figure:
    """Features in the plane: lines join an identity's images to its pid, a mark for each modality.

    A colour is used for several identities, those that lie far apart, since nobody tells twenty colours from
    each other: the lines say who is who.

    points: (n, 2); pids: (n,); modalities: n of "visible" and "infrared"; method: what placed the points.
    """
    figure, axes = _panels(1, 1, 5, 4.6)
    axis, modalities = axes[0, 0], np.array(modalities)
    known = np.unique(pids)
    centers = np.stack([np.median(points[pids == pid], axis=0) for pid in known])
    shades = np.array(COLORS)[far_apart(centers, len(COLORS))]
    for pid, center, shade in zip(known, centers, shades, strict=True):
        own = points[pids == pid]
        lines = np.stack([own, np.broadcast_to(center, own.shape), np.full(own.shape, np.nan)], 1)
        axis.plot(*lines.reshape(-1, 2).T, color=shade, linewidth=0.6, alpha=0.6, zorder=1)
        for modality, mark, fill in (("visible", "o", shade), ("infrared", "^", "none")):
            part = points[(pids == pid) & (modalities == modality)]
            axis.scatter(*part.T, 24, marker=mark, facecolors=fill, edgecolors=shade, linewidths=1.2)
    span = np.ptp(points, axis=0).clip(1e-12)
    inches = np.array([4.6, 3.8])  # of the axes, about: labels are placed as if these were exact
    sizes = np.array([[0.085 * len(str(pid)) + 0.04, 0.13] for pid in known]) * span / inches
    for pid, center, place in zip(known, centers, free_places(centers, sizes), strict=True):
        axis.annotate(
            str(pid), center, place, ha="center", va="center", fontsize=8, weight="bold", zorder=5,
            path_effects=[withStroke(linewidth=2.5, foreground=PAPER)],
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": INK, "shrinkA": 4, "shrinkB": 0},
        )  # fmt: skip
    for modality, mark in (("visible", "o"), ("infrared", "^")):
        axis.scatter(
            [], [], marker=mark, facecolors=INK if mark == "o" else "none", edgecolors=INK, label=modality
        )
    axis.set(title=f"{method} of {len(points)} images of {len(known)} identities, each with its pid")
    axis.margins(0.08)
    axis.set_xticks([], [])
    axis.set_yticks([], [])
    axis.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def far_apart(centers: np.ndarray, count: int) -> np.ndarray:
    """(n,) of count colours, for centers (n, 2): each time the colour whose nearest bearer is farthest."""
    chosen = np.full(len(centers), -1)
    for k in range(len(centers)):
        distances = np.linalg.norm(centers - centers[k], axis=1)
        nearest = [distances[chosen == color].min(initial=np.inf) for color in range(count)]
        chosen[k] = int(np.argmax(nearest))
    return chosen


def free_places(centers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(n, 2) middles of labels of those sizes (n, 2) near centers (n, 2), none of which covers another.

    Tried are ever wider rings around a center; a label has an empty place sooner or later.
    """
    places: list[np.ndarray] = []
    step = sizes.max(0)
    for k, center in enumerate(centers):
        taken, room = np.array(places).reshape(-1, 2), (sizes[:k] + sizes[k]) / 2
        for ring in range(len(centers) + 1):
            angles = np.arange(8 * ring + 1) / (8 * ring + 1) * 2 * np.pi + np.pi / 4
            tried = center + step * (ring + 0.4) * np.stack([np.cos(angles), np.sin(angles)], 1)
            free = (np.abs(tried[:, None] - taken) >= room).any(2).all(1)
            if free.any():
                places.append(tried[free.argmax()])
                break
    return np.array(places)


@in_style
def cameras(measures: Mapping[str, CameraScores]) -> Figure:
    """Heat maps by camera pair, with the numbers that each value stands on; measures: of "rank-1", "mAP"."""
    both = [sorted({pair[side] for pairs in measures.values() for pair in pairs}) for side in (0, 1)]
    rows, columns = both
    size = len(measures) * max(3.4, 1.6 + 0.75 * len(columns)), 1.5 + 0.6 * len(rows)
    figure, axes = _panels(1, len(measures), *size)
    for axis, (name, pairs) in zip(axes[0], measures.items(), strict=True):
        grid = [[pairs.get((row, column)) for column in columns] for row in rows]
        values = np.array(
            [[getattr(score, name.replace("-", "_")) if score else np.nan for score in line] for line in grid]
        )
        values *= 100
        low, high = (np.nan_to_num(bound(values)) for bound in (np.nanmin, np.nanmax))
        heat = axis.imshow(values, cmap="cividis", vmin=low - 0.5, vmax=high + 0.5, aspect="auto")
        figure.colorbar(heat, ax=axis, label=f"{name} (%)").outline.set_visible(False)
        for (y, x), value in np.ndenumerate(values):
            score, color = grid[y][x], "#ffffff" if value < (low + high) / 2 else "#000000"
            text = "none"
            if np.isnan(value):
                color = INK
            else:
                text = f"{value:.1f}\n{score.queries:,.6g} × {score.gallery:,.6g}"
            axis.text(x, y, text, ha="center", va="center", color=color, fontsize=7.5)
        axis.set(title=f"{name}; queries × gallery images", xlabel="gallery camera", ylabel="query camera")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


@in_style
def images(rows: Sequence[Sequence[tuple[np.ndarray, str, str]]], heading: Sequence[str] = ()) -> Figure:
    """Rows of images: of rankings, or with maps beside them.

    rows: (image (H, W, 3) uint8, kind in KINDS or "", caption under it) each; rows may be short. heading:
    what stands above the columns. A right image has a whole frame and a tick, a wrong one a dashed frame and
    a cross, an ignored one is pale and has a dotted frame.
    """
    columns = max(map(len, rows))
    height, width, _ = rows[0][0][0].shape
    wide, tall, below, gap = 0.72, 0.72 * height / width, 0.2, 0.1  # inches
    size = columns * (wide + gap) + gap, len(rows) * (tall + below + gap) + gap + 0.15
    figure = Figure(figsize=size)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all, in inches: a hundred would take seconds to draw
    axis.set_axis_off()
    for y, row in enumerate(rows):
        bottom = gap + below + (len(rows) - 1 - y) * (tall + below + gap)
        for x, (image, kind, caption) in enumerate(row):
            left = gap + x * (wide + gap)
            place = (left, left + wide, bottom, bottom + tall)
            alpha = 0.35 if kind == "ignored" else 1
            axis.imshow(image, alpha=alpha, interpolation="bilinear", extent=place, aspect="auto")
            color, mark = KINDS.get(kind, (INK, ""))
            if kind:
                dash = {"wrong": (0, (4, 2)), "ignored": (0, (1, 1))}.get(kind, "-")
                line = {"edgecolor": color, "linestyle": dash, "linewidth": 1 if kind == "query" else 2.2}
                axis.add_patch(Rectangle((left, bottom), wide, tall, fill=False, **line))
            middle = {"x": left + wide / 2, "ha": "center"}
            axis.text(y=bottom - 0.05, s=f"{mark} {caption}".strip(), fontsize=6.5, va="top", **middle)
    for x, words in enumerate(heading[:columns]):
        left = gap + x * (wide + gap)
        axis.text(left + wide / 2, size[1] - gap - 0.09, words, fontsize=8, va="bottom", ha="center")
    axis.set(xlim=(0, size[0]), ylim=(0, size[1]))  # imshow has moved them
    return figure


def overlay(image: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey; orange where parts (H, W), in [-1, 1], adds, blue where it takes."""
    grey = np.broadcast_to(image.mean(axis=2, keepdims=True), image.shape)
    hue = np.where(parts[..., None] > 0, *(255 * np.array(to_rgb(COLORS[k])) for k in (1, 0)))
    weight = 0.85 * np.abs(parts)[..., None]
    return ((1 - weight) * grey + weight * hue).round().astype(np.uint8)


@in_style
def curves(quantities: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Learning curves: a panel for each quantity, a line for each run.

    quantities: {quantity: {label: {epoch: value}}}. A run with a single value, as of a network that was not
    trained, is no curve: it is a level line across the panel.
    """
    labels = list(dict.fromkeys(label for those in quantities.values() for label in those))
    columns = min(4, len(quantities))
    rows = math.ceil(len(quantities) / columns)
    size = max(3.4, 2.15 * columns), 0.7 + 1.75 * rows + 0.18 * len(labels)
    figure, axes = _panels(rows, columns, *size)
    handles = {}
    for axis in axes.flat[len(quantities) :]:
        axis.set_axis_off()
    for axis, (name, those) in zip(axes.flat, quantities.items(), strict=False):
        last = max(max(curve) for curve in those.values())
        for label, curve in those.items():
            k = labels.index(label)
            style = {"color": COLORS[k % len(COLORS)], "linestyle": DASHES[k % len(COLORS)], "label": label}
            if len(curve) == 1:
                handles[label] = axis.axhline(*curve.values(), linewidth=1, **style)
            else:
                mark = MARKS[k % len(COLORS)] if len(curve) < 12 else ""
                (handles[label],) = axis.plot(
                    *zip(*curve.items(), strict=True), marker=mark, markersize=3, **style
                )
        axis.set_title(f"{name} (%)" if name in ("rank-1", "mAP", "mINP") else name)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        axis.set_xlim(0, last + 0.5)
        if name != "rate":
            axis.set_ylim(bottom=0)
    for axis in axes.flat[max(0, len(quantities) - columns) : len(quantities)]:
        axis.set_xlabel("epoch")
    if len(labels) > 1 or len(quantities) > 1:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=1)
    return figure
