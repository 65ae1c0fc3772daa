"""Tables of results, ready to paste: per cent with two decimals, as plain text, Markdown or LaTeX."""

from collections.abc import Sequence

STYLES = ("text", "markdown", "latex")
COLUMNS = ("rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP")


def per_cent(metrics: object) -> list[str]:
    """What stands in COLUMNS, for metrics with .cmc (at least 20,), .mAP and .mINP in [0, 1]."""
    values = (*(metrics.cmc[k - 1] for k in (1, 5, 10, 20)), metrics.mAP, metrics.mINP)
    return [f"{100 * value:.2f}" for value in values]


def results_table(heading: Sequence[str], rows: Sequence[tuple[str, object]], style: str = "text") -> str:
    """The lines of heading and an aligned table of rows, (title, metrics) each, in one of STYLES.

    LaTeX has the heading as comments, since a caption is the paper's own affair.
    """
    cells = [["protocol", *COLUMNS], *([title, *per_cent(metrics)] for title, metrics in rows)]
    if style == "latex":
        special = str.maketrans({character: "\\" + character for character in "%_&#$"})
        cells = [[cell.translate(special) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    if style == "markdown":
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]
        return "\n\n".join([*heading, "\n".join(body)])
    if style == "latex":
        body = [" & ".join(line) + r" \\" for line in lines]
        begin = [*(f"% {line}" for line in heading), r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}"]
        return "\n".join([*begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])
    return "\n".join([*heading, *("  ".join(line) for line in lines)])
