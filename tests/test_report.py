"""tools/report.py: its numbers are test.py's, its page works in a browser, and bad input is told."""

import argparse
import html
import importlib.util
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, run_script

import synthetic
from checkpoints import load_checkpoint, save_checkpoint
from data_manager import Samples
from evaluation.features import FeatureFile
from evaluation.methods import Method, find_methods
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import Features, rerank_title
from reporting import report as results_report
from reporting import sprites
from reporting.evaluated import Evaluated
from reporting.evaluated import labels as labels_of
from reporting.report import FIGURES, Findings
from tools import report
from utils import UserError, log

MACHINE = ("--gpu", "-1", "--workers", "1")


@pytest.fixture(autouse=True)
def log_as_before():
    """Take back what a command that runs in this process does to the log."""
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(scope="module")
def runs(trained):
    """The two checkpoints of a finished run."""
    folder, _ = trained
    best, last = sorted((folder / "save_model").glob("*.t"))
    return best, last


@pytest.fixture(scope="module")
def page(sysu, trained, runs, tmp_path_factory):
    """The folder of a report of two checkpoints, with re-ranking."""
    folder = tmp_path_factory.mktemp("report")
    done = run_script(
        "tools.report", "--resume", *runs, "--data-path", sysu, "--rerank", "k-reciprocal",
        "--output", folder / "new" / "report", *MACHINE, cwd=trained[0],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""
    assert f"wrote {folder / 'new' / 'report' / 'index.html'}" in done.stderr
    return folder / "new" / "report"


@pytest.fixture
def report_here(capsys, monkeypatch, tmp_path):
    """tools.report in this process, on the CPU; returns what it logged."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        report.main([*map(str, words), *MACHINE])
        return capsys.readouterr().err

    return run


def data_of(text):
    """What the page's script reads."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def rows_of(text):
    """The rows of the page's first table: lists of what is in their cells, as text."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("</tr>")[:-1])
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in cells]


def test_the_numbers_are_those_of_test_py(page, runs, sysu, tmp_path):
    spec = importlib.util.spec_from_file_location("test_script", REPOSITORY / "test.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = {(row[0], row[1]): row[2:] for row in rows_of((page / "index.html").read_text())}
    assert len(rows) == 6  # plain, re-ranked, re-ranked one query at a time
    for path, label in zip(runs, ("best", "last"), strict=True):
        words = ("--resume", path, "--data-path", sysu, "--rerank", "k-reciprocal")
        script.main([*map(str, words), *MACHINE, "--json", str(tmp_path / "r.json")])
        for result in json.loads((tmp_path / "r.json").read_text())["results"]:
            title = "all, single-shot, seeded galleries"
            title += rerank_title(result["rerank"])
            expected = []
            for part in ("mean", "std"):
                numbers = result[part]
                values = [*(numbers["cmc"][k - 1] for k in (1, 5, 10, 20)), numbers["mAP"], numbers["mINP"]]
                expected.append([f"{100 * value:.2f}" for value in values])
            cells = rows[label, title]
            assert cells[:6] == [f"{mean} ±{deviation}" for mean, deviation in zip(*expected, strict=True)]
            counts = {
                name: {own[name] for own in result["counts"].values()} for name in ("queries", "gallery")
            }
            assert [{cells[6]}, {cells[7]}] == [set(map(str, numbers)) for numbers in counts.values()]
            assert cells[9] == "10"  # trials


def test_the_page_says_what_the_numbers_stand_on(page, runs):
    text = (page / "index.html").read_text()
    data = data_of(text)
    for row in rows_of(text):
        assert row[8] == str(len(data["lists"][0]["queries"]))
        assert row[10] == str(len({data["pids"][q] for q in data["lists"][0]["queries"]}))
    for path in runs:
        checkpoint = load_checkpoint(path)
        assert f"epoch {checkpoint['epoch']} of 2; {checkpoint['selection']}" in html.unescape(text)
    assert "python " in text
    assert "torch " + torch.__version__ in text  # of the run, from its log
    assert "--batch-size" in text


def test_the_lists_are_the_rankings(page):
    """Mean AP and share of first images right, of the lists, are trial 0's metrics; the marks agree."""
    data = data_of((page / "index.html").read_text())
    assert len(data["lists"]) == 4
    for each in data["lists"]:
        assert (each["trial"], each["rule"][0]) == (0, "same room")
        for q, images, kinds, distances in zip(
            each["queries"], each["images"], each["kinds"], each["distances"], strict=True
        ):
            assert distances == sorted(distances)
            assert len(images) == len(kinds) == len(distances)
            assert kinds.count("i") <= 10
            for image, kind in zip(images, kinds, strict=True):
                same_room = data["camids"][q] == 3 and data["camids"][image] == 2
                same = data["pids"][q] == data["pids"][image]
                assert kind == ("i" if same_room else "r" if same else "w")
        for kinds, first in zip(each["kinds"], each["first"], strict=True):
            assert (kinds.replace("i", "")[0] == "r") == (first == 1)


def test_each_figure_lies_beside_the_page(page):
    assert {path.name for path in page.iterdir()} == {
        "index.html", *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "pdf")),
    }  # fmt: skip
    text = (page / "index.html").read_text()
    assert text.count("<svg") == len(FIGURES) - 1  # the page has a browser of rankings instead of a figure


def test_figures_alone(report_here, runs, sysu, tmp_path):
    words = ("--resume", runs[0], "--data-path", sysu, "--output", tmp_path / "f")
    told = report_here(*words, "--figures", "ranking", "cameras", "--queries", "worst")
    assert "wrote ranking, cameras" in told
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        "ranking.png", "ranking.pdf", "cameras.png", "cameras.pdf",
    }  # fmt: skip


def test_a_checkpoint_without_a_log_has_no_curves(report_here, runs, sysu, tmp_path, monkeypatch):
    shutil.copy(runs[0], tmp_path / "lonely_best.t")
    words = ("--resume", tmp_path / "lonely_best.t", "--data-path", sysu, "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"--figures curves: no history \(RUN\.jsonl\) of these runs"):
        report_here(*words, "--figures", "curves")
    monkeypatch.setattr(results_report, "FIGURES", {name: FIGURES[name] for name in ("cmc", "curves")})
    report_here(*words)
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Nothing to show: no history (RUN.jsonl) of these runs" in text
    assert ('href="cmc.png"' in text, 'href="curves.png"' in text) == (True, False)
    assert not (tmp_path / "out" / "curves.png").exists()


def test_regdb_has_a_model_for_each_trial(report_here, sysu, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(results_report, "FIGURES", {})
    root = tmp_path / "regdb"
    synthetic.draw_dataset(synthetic.plan_regdb(4, 5, 3, 0), root, height=32, width=16)
    checkpoint = load_checkpoint(runs[0])
    for trial in ("1", "3"):
        settings = checkpoint["args"] | {"dataset": "regdb", "trial": trial}
        save_checkpoint(checkpoint | {"args": settings}, tmp_path / f"run_trial_{trial}_best.t")
    words = ("--data-path", root, "--output", tmp_path / "out")
    told = report_here("--resume", tmp_path / "run_trial_1_best.t", *words)
    assert "no checkpoint of trial 2, 4, 5, 6, 7, 8, 9, 10, left out of all means" in told
    rows = rows_of((tmp_path / "out" / "index.html").read_text())
    assert [row[1] for row in rows] == ["visible to infrared", "infrared to visible"]
    assert [row[-1] for row in rows] == ["2", "2"]  # trials
    path = str(tmp_path / "run_trial_1_best.t")
    command = ["--resume", path, *map(str, words), *MACHINE]
    (method,) = find_methods(report.get_args_parser, command)
    method.evaluate(torch.device("cpu"))
    assert method.trial == 1
    assert method.images.pixels == {}  # all of RegDB's would stay in memory
    with pytest.raises(UserError, match="no checkpoint of trial 2"):
        report_here("--resume", tmp_path / "run_trial_{trial}_best.t", "--trial", "2", *words)
    with pytest.raises(UserError, match=r"run_trial_1_best\.t: trained on RegDB, the first on SYSU-MM01"):
        report_here("--resume", runs[0], tmp_path / "run_trial_1_best.t", "--data-path", sysu, *words[2:])


def test_labels_are_what_distinguishes_the_checkpoints():
    def labels(*paths):
        return labels_of([Path(path) for path in paths])

    assert labels("m/a_b_best.t") == ["a_b_best"]
    assert labels("m/sysu_lr1_seed0_best.t", "m/sysu_lr2_seed0_best.t") == ["lr1", "lr2"]
    assert labels("m/a_best.t", "m/a_last.t", "m/a.t") == ["a_best", "a_last", "a"]
    assert labels("m/sysu_" + "x" * 90 + "_best.t") == ["sysu_" + "x" * 19 + "…xxxx_best"]
    assert labels("old/a_best.t", "new/a_best.t") == ["old", "new"]
    with pytest.raises(UserError, match="the same checkpoint twice"):
        labels("m/a.t", "m/a.t")


def test_bad_input_is_told(report_here, runs, sysu, tmp_path):
    (tmp_path / "file").write_text("")
    good = ("--resume", runs[0], "--data-path", sysu)
    for message, *words in (
        (r"--output .*file: .*is a file", *good, "--output", tmp_path / "file"),
        (r"--output .*file/x: .*is a file", *good, "--output", tmp_path / "file" / "x"),
        (r"no file at .*nowhere\.t", "--resume", "nowhere.t", "--output", "o"),
        (r"no file at \.", "--resume", "", "--output", "o"),  # a variable that is not set
        (r"--queries: no query of pid 99999", *good, "--output", "o", "--queries", "99999"),
        (r"--queries: middling is neither", *good, "--output", "o", "--queries", "middling"),
        (r"--trial 11: SYSU-MM01 has the trials 0 to 9", *good, "--output", "o", "--trial", "11"),
        (r"--log-path .*: no history at", *good, "--output", "o", "--log-path", tmp_path),
        (r"the same checkpoint twice", "--resume", runs[0], runs[0], "--output", "o"),
        (r"RegDB not found", *good, "--output", "o", "--dataset", "regdb"),
        (r"--figures: invalid choice: 'pie'", *good, "--output", "o", "--figures", "pie"),
    ):
        with pytest.raises(UserError, match=message):
            report_here(*words)
        assert not (tmp_path / "o").exists()


# ---- in a browser

in_browser = pytest.mark.skipif(browser.EXECUTABLE is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def problems(events):
    """Errors in the console, and what was asked of a network."""
    for method, told in events:
        if method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            yield told
        if method == "Network.requestWillBeSent" and not re.match(
            "file:|data:|blob:", told["request"]["url"]
        ):
            yield told["request"]["url"]


def shown(chromium):
    """The page's rows of queries: (pid, camera, AP in per cent or None, kinds of the images)."""
    return chromium.js(
        """[...document.querySelectorAll("#queries > li")].map((line) => {
            const words = line.querySelector(".query").textContent;
            const number = (pattern) => (words.match(pattern) ? Number(words.match(pattern)[1]) : null);
            return [number(/pid (\\d+)/), number(/camera (\\d+)/), number(/AP ([\\d.]+)/),
                [...line.querySelectorAll(".ranks > li")].map((item) => item.className[0]).join("")];
        })"""
    )


def choose(chromium, name, value):
    chromium.js(f"{{const e = document.getElementById('{name}'); e.value = '{value}'; "
                "e.dispatchEvent(new Event('change'))}")  # fmt: skip


@in_browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]
)
def test_the_page_opens(chromium, page, width, scheme):
    chromium.open(page / "index.html", width, 800, scheme)
    images = chromium.js(
        """Promise.all([...document.querySelectorAll(".thumb")].map(async (thumb) => {
            const image = new Image();
            image.src = thumb.style.backgroundImage.slice(5, -2);
            await image.decode();
            return image.naturalWidth * thumb.clientWidth;
        }))"""
    )
    assert len(images) > 20
    assert min(images) > 0
    assert chromium.js("document.documentElement.scrollWidth") <= width
    background = chromium.js("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 60) == (scheme == "dark")
    assert list(problems(chromium.events)) == []


@in_browser
def test_filters_change_what_is_shown(chromium, page):
    chromium.open(page / "index.html")
    data = data_of((page / "index.html").read_text())
    first = data["lists"][0]
    everyone = [
        (data["pids"][q], data["camids"][q], None if ap is None else round(100 * ap, 1), kinds)
        for q, ap, kinds in zip(first["queries"], first["ap"], first["kinds"], strict=True)
    ]

    def check(expected):
        assert [tuple(line) for line in shown(chromium)] == expected[:10]
        status = chromium.js("document.getElementById('status').textContent")
        assert status.startswith(f"{len(expected)} of {len(everyone)} queries")

    check(everyone)
    pid = everyone[-1][0]
    chromium.js("document.getElementById('pid').focus()")
    chromium.type(str(pid))
    check([line for line in everyone if line[0] == pid])
    chromium.js(
        "{const e = document.getElementById('pid'); e.value = ''; e.dispatchEvent(new Event('input'))}"
    )
    wrong = [line for line in everyone if line[3].replace("i", "")[0] == "w"]
    assert 0 < len(wrong) < len(everyone)
    choose(chromium, "outcome", "wrong")
    check(wrong)
    choose(chromium, "outcome", "all")
    choose(chromium, "query-camera", "6")
    check([line for line in everyone if line[1] == 6])
    cameras = [
        data["camids"][next(g for g, kind in zip(images, kinds, strict=True) if kind != "i")]
        for images, kinds in zip(first["images"], first["kinds"], strict=True)
    ]
    choose(chromium, "gallery-camera", str(cameras[-1]))
    check([line for line, camera in zip(everyone, cameras, strict=True)
           if line[1] == 6 and camera == cameras[-1]])  # fmt: skip
    choose(chromium, "query-camera", "")
    choose(chromium, "gallery-camera", "")
    for order, sign in (("worst", 1), ("best", -1)):
        choose(chromium, "order", order)
        assert [line[2] for line in shown(chromium)] == sorted(
            (line[2] for line in everyone), key=lambda ap: sign * ap
        )[:10]
    choose(chromium, "order", "dataset")
    assert any("i" in line[3] for line in shown(chromium))
    chromium.js("document.getElementById('ignored').click()")
    assert [line[3] for line in shown(chromium)] == [line[3].replace("i", "") for line in everyone[:10]]
    chromium.js("document.getElementById('next').click()")
    assert [line[0] for line in shown(chromium)] == [line[0] for line in everyone[10:20]]
    choose(chromium, "list", "1")
    assert [line[2] for line in shown(chromium)] == [round(100 * ap, 1) for ap in data["lists"][1]["ap"][:10]]
    assert list(problems(chromium.events)) == []


@in_browser
def test_a_keyboard_alone_reaches_everything(chromium, page):
    chromium.open(page / "index.html")
    name = "(e => e.id || e.getAttribute('aria-label') || e.getAttribute('href') || e.textContent)"
    focusable = "a[href], button:not(:disabled), select, input, summary, [tabindex]"
    wanted = chromium.js(
        f"[...document.querySelectorAll('{focusable}')].filter((e) => e.checkVisibility()).map({name})"
    )
    reached = []
    for _ in range(len(wanted) + 5):
        chromium.press("Tab")
        reached.append(chromium.js(f"{name}(document.activeElement)"))
    assert set(wanted) <= set(reached)
    assert {"list", "pid", "outcome", "query-camera", "gallery-camera", "order", "ignored", "next"} <= set(
        wanted
    )
    before = shown(chromium)
    chromium.js("document.getElementById('order').focus()")
    chromium.press("ArrowDown")
    assert shown(chromium) != before
    chromium.js("document.getElementById('next').focus()")
    chromium.press("Enter")
    assert "page 2" in chromium.js("document.getElementById('page').textContent")
    chromium.js("document.querySelector('summary').focus()")
    chromium.press("Enter")
    assert chromium.js("document.querySelector('details').open")


@in_browser
def test_a_screen_reader_is_told_everything(chromium, page):
    chromium.open(page / "index.html")
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    unnamed = [
        role
        for role, name in nodes
        if role in ("image", "img", "combobox", "checkbox", "searchbox", "button", "table") and not name
    ]
    assert unnamed == []
    images = [name for role, name in nodes if role in ("image", "img")]
    assert any(
        re.fullmatch(r"1: (right|wrong), pid \d+, camera \d, distance \d\.\d{3}", name) for name in images
    )
    assert any(re.fullmatch(r"ignored, same room, pid \d+, camera 2, distance .*", name) for name in images)
    levels = chromium.js(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


# ---- SYSU-MM01's size


def everyone():
    """SYSU-MM01's 3,803 queries and 301 gallery images, of 96 ids, with random features."""
    rng = np.random.default_rng(0)
    query, gallery = (
        Samples([f"{modality}{k}" for k in range(n)], np.sort(rng.integers(96, size=n)),
                rng.choice(cameras, n), modality)
        for modality, n, cameras in (("infrared", 3803, (3, 6)), ("visible", 301, (1, 2, 4, 5)))
    )  # fmt: skip
    evaluation = Evaluation({(Protocol("sysu", "all"), 0): (query, gallery)}, "a note")
    images = evaluation.images()
    tensors = {m: F.normalize(torch.randn(len(samples), 32)) for m, samples in images.items()}
    args = argparse.Namespace(dataset="sysu", img_h=384, img_w=128, rerank=[])
    file = FeatureFile("large", Features.of_images(images, tensors), [0], "random")
    method = Method("large", args, [[file]], evaluation)
    method.evaluate(torch.device("cpu"))
    return method


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of so many, with thumbnails of drawn people and a camera's noise."""
    patch, rng = pytest.MonkeyPatch(), np.random.default_rng(0)

    def thumbnails(paths, height, width, workers, pixel_range):
        smooth = rng.integers(0, 256, (16, height // 8 + 1, width // 8 + 1, 3))
        smooth = smooth.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        for start in range(0, len(paths), 64):
            noise = rng.integers(-12, 13, (min(64, len(paths) - start), height, width, 3), dtype=np.int16)
            yield (smooth[np.arange(len(noise)) % 16] + noise).clip(0, 255).astype(np.uint8)

    evaluated = Evaluated("large", everyone(), None)
    patch.setattr(results_report, "decode", thumbnails)
    patch.setattr(results_report, "write_figures", lambda *_: {})
    patch.setattr(Evaluated, "similarities", lambda self: {})
    folder = tmp_path_factory.mktemp("large")
    results_report.write_page(Findings([evaluated], ["random"]), folder, [], 1)
    patch.undo()
    return folder / "index.html"


def test_one_identity_has_no_histogram(monkeypatch):
    monkeypatch.setattr(Findings, "__init__", lambda self: None)
    findings = Findings()
    findings.similarities = {"alone": {}}
    assert findings.histogram() is None


def test_the_page_of_sysu_is_small(large):
    assert large.stat().st_size < 15e6
    assert "a note" in large.read_text()
    data = data_of(large.read_text())
    assert len(data["sheets"]) == -(-(3803 + 301) // (sprites.COLUMNS * sprites.ROWS))
    assert len(data["lists"][0]["queries"]) == 3803


@in_browser
def test_of_many_sheets_only_those_shown_are_decoded(chromium, large):
    chromium.open(large)
    used = "new Set([...document.querySelectorAll('.thumb')].map((e) => e.style.backgroundImage)).size"
    assert 1 < chromium.js(used) <= 20  # of 65
    choose(chromium, "outcome", "wrong")
    choose(chromium, "order", "worst")
    assert len(shown(chromium)) == 10
    assert list(problems(chromium.events)) == []
