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
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from evaluation.similarity import BINS, Similarities, equal_error_rate, overlap
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
    figure, axes = _panels(1, len(curves), 5.2 * len(curves), 3.6)
    for axis, (protocol, lines) in zip(axes[0], curves.items(), strict=True):
        for k, (label, (mean, deviation)) in enumerate(lines.items()):
            ranks, style = np.arange(1, len(mean) + 1), k % len(COLORS)
            name = textwrap.fill(f"{label}: rank-1 {100 * mean[0]:.2f} %", 36)
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
        axis.legend(loc="lower right")
    return figure


@in_style
def histogram(pairs: Mapping[str, Mapping[str, Similarities]]) -> Figure:
    """Similarities within and between identities: a row for each label, a panel for each kind of pair.

    pairs: {label: {kind: Similarities}}, see similarity.sample_similarities.
    """
    kinds = list(dict.fromkeys(kind for those in pairs.values() for kind in those))
    figure, axes = _panels(len(pairs), len(kinds), 7.4, 0.7 + 1.9 * len(pairs), sharex=True, sharey="row")
    lowest = min(min(v.min() for v in pair) for those in pairs.values() for pair in those.values())
    for row, (label, those) in zip(axes, pairs.items(), strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            if kind not in those:
                axis.set_axis_off()
                continue
            pair = those[kind]
            looks = (("between", COLORS[1], "", 0.35), ("within", COLORS[0], "////", 0.35))
            for name, color, hatch, alpha in looks:
                share = np.histogram(getattr(pair, name).clip(-1, 1), BINS)[0] / len(getattr(pair, name))
                axis.stairs(100 * share, BINS, fill=True, facecolor=color, alpha=alpha, hatch=hatch)
                axis.stairs(100 * share, BINS, color=color, linewidth=1.3, label=f"{name} identities",
                            linestyle="-" if name == "within" else "--")  # fmt: skip
            numbers = f"overlap {100 * overlap(pair):.1f} %, EER {100 * equal_error_rate(pair):.1f} %"
            axis.set_title(f"{kind.replace('-', '–')}\n{numbers}")
            axis.set_xlim(max(-1, math.floor(lowest * 10) / 10), 1)
        row[0].set_ylabel(f"{label}\npairs (%)" if len(pairs) > 1 else "pairs (%)")
    for axis in axes[-1]:
        axis.set_xlabel("cosine similarity")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@in_style
def embedding(points: np.ndarray, pids: np.ndarray, modalities: Sequence[str], method: str) -> Figure:
    """Features in the plane: a colour for each identity and its pid, a mark for each modality.

    points: (n, 2); pids: (n,); modalities: n of "visible" and "infrared"; method: what placed the points.
    """
    figure, axes = _panels(1, 1, 6.6, 5.4)
    axis, modalities = axes[0, 0], np.array(modalities)
    known = np.unique(pids)
    shades = matplotlib.colormaps["turbo"](np.linspace(0.06, 0.94, len(known)))
    shades = shades[np.argsort(np.arange(len(known)) * 7 % max(1, len(known)), kind="stable")]  # apart
    for pid, shade in zip(known, shades, strict=True):
        for modality, mark, fill in (("visible", "o", shade), ("infrared", "^", (0, 0, 0, 0))):
            own = points[(pids == pid) & (modalities == modality)]
            edge, line = (INK, 0.5) if modality == "visible" else (shade, 1.4)
            axis.scatter(*own.T, 26, marker=mark, facecolors=[fill], edgecolors=[edge], linewidths=line)
    for pid in known:
        own = points[pids == pid]
        middle = own[np.square(own - np.median(own, axis=0)).sum(1).argmin()]
        halo = [withStroke(linewidth=2.5, foreground=PAPER)]
        axis.annotate(
            str(pid), middle, (4, 4), textcoords="offset points", fontsize=8, weight="bold", path_effects=halo
        )
    for modality, mark in (("visible", "o"), ("infrared", "^")):
        axis.scatter(
            [], [], marker=mark, facecolors=INK if mark == "o" else "none", edgecolors=INK, label=modality
        )
    axis.set(title=f"{method} of {len(points)} images of {len(known)} identities, each labelled with its pid")
    axis.set_xticks([], [])
    axis.set_yticks([], [])
    axis.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@in_style
def cameras(pairs: Mapping[tuple[int, int], tuple[float, float]]) -> Figure:
    """Rank-1 and mAP by camera pair as two heat maps; pairs: {(query, gallery): (rank-1, mAP) in [0, 1]}."""
    rows, columns = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    figure, axes = _panels(1, 2, max(4.6, 1.8 + 1.5 * len(columns)), 1.3 + 0.55 * len(rows))
    for axis, name, which in zip(axes[0], ("rank-1 (%)", "mAP (%)"), (0, 1), strict=True):
        values = np.array([[100 * pairs[row, column][which] for column in columns] for row in rows])
        low, high = (np.nan_to_num(bound(values)) for bound in (np.nanmin, np.nanmax))
        axis.imshow(values, cmap="cividis", vmin=low - 5, vmax=high + 5, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            text, color = (f"{value:.1f}", "#ffffff" if value < (low + high) / 2 else "#000000")
            if np.isnan(value):
                text, color = "none", INK
            axis.text(x, y, text, ha="center", va="center", color=color)
        axis.set(title=name, xlabel="gallery camera", ylabel="query camera")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


@in_style
def images(rows: Sequence[Sequence[tuple[np.ndarray, str, str]]], heading: Sequence[str] = ()) -> Figure:
    """Rows of images: of rankings, or of activation maps.

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
            if y == 0 and heading:
                axis.text(y=bottom + tall + 0.06, s=heading[x], fontsize=8, va="bottom", **middle)
    axis.set(xlim=(0, size[0]), ylim=(0, size[1]))  # imshow has moved them
    return figure


def overlay(image: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey with an activation map (H, W) in [0, 1] over it."""
    grey = image.mean(axis=2, keepdims=True)
    heat = 255 * matplotlib.colormaps["inferno"](activation)[..., :3]
    weight = 0.25 + 0.5 * activation[..., None]
    return ((1 - weight) * grey + weight * heat).round().astype(np.uint8)


@in_style
def curves(runs: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Learning curves: a panel for each quantity, a line for each run.

    runs: {label: {quantity: {epoch: value}}}.
    """
    names = list(dict.fromkeys(name for those in runs.values() for name in those))
    last = max(max(curve) for those in runs.values() for curve in those.values())
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = _panels(rows, columns, 8.6, 0.5 + 1.75 * rows + 0.18 * len(runs))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for k, (label, those) in enumerate(runs.items()):
            curve, style = those.get(name, {}), k % len(COLORS)
            axis.plot(
                list(curve), list(curve.values()), color=COLORS[style], linestyle=DASHES[style], label=label,
                marker=MARKS[style] if len(curve) < 12 else "", markersize=3,
            )  # fmt: skip
        axis.set_title(f"{name} (%)" if name in ("rank-1", "mAP", "mINP") else name)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        axis.set_xlim(0, last + 0.5)
        if name != "rate":
            axis.set_ylim(bottom=0)
    for axis in axes.flat[max(0, len(names) - columns) : len(names)]:
        axis.set_xlabel("epoch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1)
    return figure
