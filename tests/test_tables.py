import numpy as np
import pytest
from scipy.special import stdtrit

from eval_metrics import Metrics
from evaluation.exports import _intervals
from evaluation.intervals import Jackknife
from evaluation.tables import in_words, results_table

ROWS = [
    ("all, single-shot", Metrics(np.linspace(0.125, 1, 20), 0.72009, 0.5)),
    ("all_indoor, 100 %", Metrics(np.ones(20), 1.0, 0.0)),
]
HEADING = ["SYSU-MM01, per cent", "save_model/run_best.t"]
NUMBERS = [["12.50", "30.92", "53.95", "100.00", "72.01", "50.00"], [*["100.00"] * 4, "100.00", "0.00"]]


def test_text():
    first, second, *lines = results_table(HEADING, ROWS).splitlines()
    assert [first, second] == HEADING
    assert lines[0].split() == ["protocol", "rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP"]
    for line, (title, _), numbers in zip(lines[1:], ROWS, NUMBERS, strict=True):
        assert line.startswith(title)
        assert line.removeprefix(title).split() == numbers
    assert len(set(map(len, lines))) == 1, "not aligned"


def test_markdown():
    heading, second, table = results_table(HEADING, ROWS, "markdown").split("\n\n")
    assert [heading, second] == HEADING
    lines = table.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {7}
    assert all(set(cell) <= {"-", ":"} for cell in cells[1])
    assert cells[2:] == [[title, *numbers] for (title, _), numbers in zip(ROWS, NUMBERS, strict=True)]
    assert len(set(map(len, lines))) == 1, "not aligned"


def test_latex():
    first, second, begin, *lines, end = results_table(HEADING, ROWS, "latex").splitlines()
    assert [first, second] == [f"% {line}" for line in HEADING]
    assert (begin, end) == (r"\begin{tabular}{lrrrrrr}", r"\end{tabular}")
    rows = [line for line in lines if line != r"\hline"]
    assert all(line.endswith(r" \\") and line.count("&") == 6 for line in rows)
    assert rows[2].startswith(r"all\_indoor, 100 \% ")
    assert len(set(map(len, rows))) == 1, "not aligned"


def test_further_columns():
    *_, header, first, second = results_table([], ROWS, more={"p": ["", "0.250"]}).splitlines()
    assert header.split()[-1] == "p"
    assert (first.split()[-1], second.split()[-1]) == ("50.00", "0.250")
    lines = results_table([], ROWS, "latex", {"difference": ["1.0 ± 0.5", ""]}).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrr}"
    assert r"1.0 $\pm$ 0.5 \\" in lines[4]


@pytest.mark.parametrize(
    ("persons", "words"),
    [
        (96, "rank-1 74.8 ± 2.0, mAP 72.0 ± 4.0 (95 %, 96 persons)"),
        (30, "rank-1 74.8 ± 2.0, mAP 72.0 ± 4.0 (95 %, 30 persons)"),
        (29, "rank-1 74.8 ± 2.0, mAP 72.0 ± 4.0 (95 %, 29 persons, few persons)"),
        (10, "rank-1 74.8 ± 2.0, mAP 72.0 ± 4.0 (95 %, 10 persons, few persons)"),
        (9, "rank-1 74.8, mAP 72.0 (9 persons: too few for an interval)"),
        (2, "rank-1 74.8, mAP 72.0 (2 persons: too few for an interval)"),
    ],
)
def test_an_interval_in_words(persons, words):
    """The deviations are such that the half-widths are 4 and 2 points."""
    rng = np.random.default_rng(0)
    deleted = rng.standard_normal((persons, 2))
    deleted -= deleted.mean(0)
    deleted *= np.sqrt(persons / (persons - 1) / np.square(deleted).sum(0))  # a standard error of 1
    deleted *= np.array([0.04, 0.02]) / stdtrit(persons - 1, 0.975)
    jackknife = Jackknife(tuple(range(persons)), np.array([0.72, 0.748]), deleted, deleted)
    assert in_words(jackknife) == words


def test_json_tests_differences_alone():
    """That a single method's mAP is 0 is no hypothesis of anybody's."""
    rng = np.random.default_rng(0)
    jackknife = Jackknife(tuple(range(40)), np.array([0.72, 0.748]), *rng.random((2, 40, 2)))
    for tested in (True, False):
        found = _intervals(jackknife, test=tested)["mAP"]
        assert found["value"] == 0.72
        assert found["half"] > 0
        assert (found["p"] is not None) == tested
