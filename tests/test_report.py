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
from data_manager import Samples, read_split
from evaluation.cameras import cameras_of
from evaluation.exports import save_json
from evaluation.features import FeatureFile
from evaluation.methods import Method, find_methods
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import Features, rerank_title
from reporting import report as results_report
from reporting import rows, sprites
from reporting.comparing import Listed
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


def load_test_py():
    """test.py as a module, which Python's own `test` would hide."""
    spec = importlib.util.spec_from_file_location("test_script", REPOSITORY / "test.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_numbers_are_those_of_test_py(page, runs, sysu, tmp_path):
    script = load_test_py()
    rows = {(row[0], row[1]): row[2:] for row in rows_of((page / "index.html").read_text())}
    assert len(rows) == 6  # plain, re-ranked, re-ranked one query at a time
    for path, label in zip(runs, ("best", "last"), strict=True):
        words = ("--resume", path, "--data-path", sysu, "--rerank", "k-reciprocal")
        script.main([*map(str, words), *MACHINE, "--json", str(tmp_path / "r.json")])
        for result in json.loads((tmp_path / "r.json").read_text())["results"]:
            title = "all, single-shot, seeded galleries"
            title += rerank_title(result["rerank"])
            mean, halves = result["mean"], {k: own["half"] for k, own in result["intervals"].items()}
            values = [*(mean["cmc"][k - 1] for k in (1, 5, 10, 20)), mean["mAP"], mean["mINP"]]
            expected = [f"{100 * value:.2f}" for value in values]
            for place, measure in ((0, "rank-1"), (4, "mAP")):
                expected[place] += f" ±{100 * halves[measure]:.1f}" if halves[measure] else ""
            cells = rows[label, title]
            assert cells[:6] == expected
            assert (cells[6] == "") == (label == "best")  # the difference to the first
            del cells[6:10]
            counts = {
                name: {own[name] for own in result["counts"].values()} for name in ("queries", "gallery")
            }
            assert [{cells[6]}, {cells[7]}] == [set(map(str, numbers)) for numbers in counts.values()]
            assert cells[9] == "10"  # trials


def test_the_page_says_what_the_numbers_stand_on(page, runs):
    text = (page / "index.html").read_text()
    data = data_of(text)
    for row in rows_of(text):
        assert row[12] == str(len(data["lists"][0]["queries"]))
        assert row[14] == str(len({data["pids"][q] for q in data["lists"][0]["queries"]}))
    for path in runs:
        checkpoint = load_checkpoint(path)
        assert f"epoch {checkpoint['epoch']} of 2; {checkpoint['selection']}" in html.unescape(text)
    assert "python " in text
    assert "torch " + torch.__version__ in text  # of the run, from its log
    assert "--batch-size" in text


def test_the_lists_are_the_rankings(page):
    """Mean AP and share of first images right, of the lists, are trial 0's metrics; the marks agree."""
    data = data_of((page / "index.html").read_text())
    assert len(data["lists"]) == 6  # two checkpoints: plain, re-ranked, and that one query at a time
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
    assert text.count("<figure>") == len(FIGURES) - 1  # it has a browser of rankings instead of a figure
    assert text.count("<svg") > text.count("<figure>")  # a panel alone, so that a narrow screen wraps them


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
        (r"best.t: given twice", "--resume", runs[0], runs[0], "--output", "o"),
        (r"RegDB not found", *good, "--output", "o", "--dataset", "regdb"),
        (r"--figures: invalid choice: 'pie'", *good, "--output", "o", "--figures", "pie"),
    ):
        with pytest.raises(UserError, match=message):
            report_here(*words)
        assert not (tmp_path / "o").exists()


def test_a_figure_that_cannot_be_drawn_is_told_before_others_are_written(report_here, runs, sysu):
    load_test_py().main(
        ["--resume", str(runs[0]), "--data-path", str(sysu), *MACHINE, "--save-features", "f.npz"]
    )
    words = ("--features", "f.npz", "--dataset", "sysu", "--data-path", sysu, "--output", "o")
    with pytest.raises(UserError, match="--figures maps: features come without the network that made them"):
        report_here(*words, "--figures", "cmc", "maps")
    assert not Path("o").exists()


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
            const words = line.textContent;
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
    focusable = "a[href], button:not([tabindex='-1']), select, input, summary, [tabindex='0']"
    wanted = chromium.js(
        f"[...document.querySelectorAll(`{focusable}`)].filter((e) => e.checkVisibility()).map({name})"
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
    chromium.js("document.querySelector('#queries .thumb').focus()")
    for key, pattern in (("ArrowDown", "1: (right|wrong)"), ("ArrowDown", "2:"), ("ArrowUp", "1:")):
        chromium.press(key)  # from the query through its images
        assert re.match(f"{pattern}|ignored", chromium.js(f"{name}(document.activeElement)"))
    chromium.press("Enter")
    assert chromium.js("document.getElementById('enlarged').open")
    chromium.js("document.querySelector('#enlarged button').focus()")
    chromium.press("Enter")
    assert not chromium.js("document.getElementById('enlarged').open")
    assert chromium.js("document.activeElement.className") == "thumb"  # where it was
    chromium.js("document.getElementById('next').focus()")
    for _ in range(len(data_of((page / "index.html").read_text())["lists"][0]["queries"]) // 10):
        chromium.press("Enter")
    assert chromium.js("document.activeElement.id") == "next"  # on the last page, too
    chromium.js("document.getElementById('previous').focus()")
    for _ in range(9):
        chromium.press("Enter")
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
    images = [name for role, name in nodes if role == "button"]
    assert any(
        re.fullmatch(r"1: (right|wrong), pid \d+, camera \d, distance \d\.\d{3}", name) for name in images
    )
    assert any(re.fullmatch(r"ignored, same room, pid \d+, camera 2, distance .*", name) for name in images)
    levels = chromium.js(
        "[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


# ---- methods side by side


def write_features(root, path, noise, seed):
    """Features of every test image: a code of its identity and noise."""
    rng = np.random.default_rng(seed)
    codes, arrays = rng.normal(size=(1000, 16)), {}
    for modality, samples in read_split("sysu", root, "test").items():
        features = codes[samples.pids] + noise * rng.normal(size=(len(samples), 16))
        arrays |= {
            f"{modality}_features": features / np.linalg.norm(features, axis=1, keepdims=True),
            f"{modality}_paths": np.array(samples.paths),
            f"{modality}_pids": samples.pids,
            f"{modality}_camids": samples.camids,
        }
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def compared(sysu, tmp_path_factory):
    """The page of three files of features, and the evaluated methods."""
    folder, patch = tmp_path_factory.mktemp("compared"), pytest.MonkeyPatch()
    paths = [folder / f"{name}.npz" for name in "abc"]
    for k, path in enumerate(paths):
        write_features(sysu, path, 2 + k / 2, k)
    patch.setattr(results_report, "FIGURES", {"cmc": "curves"})
    words = ["--features", *map(str, paths), "--dataset", "sysu", "--data-path", str(sysu), *MACHINE]
    report.main([*words, "--output", str(folder / "out")])
    patch.undo()
    methods = find_methods(report.get_args_parser, [*words, "--output", "x"])
    for method in methods:
        method.evaluate(torch.device("cpu"))
    return folder / "out" / "index.html", methods


def values_of(method):
    """The values of trial 0 under the first protocol."""
    return method.results[method.evaluation.protocols[0], False, None].seeds[0][0].values


OUTCOMES = {"both": (1, 1), "first": (1, 0), "second": (0, 1), "neither": (0, 0)}


def test_the_page_pairs_every_method_with_the_first(compared):
    path, methods = compared
    a, *others = (values_of(method) for method in methods)
    text = path.read_text()
    section = text[text.index('<section id="side-by-side"') : text.index('<section id="rankings"')]
    rows = rows_of(section)
    assert [row[:2] for row in rows] == [["a", "b"], ["a", "c"]]
    for row, other in zip(rows, others, strict=True):
        right = np.stack([a.first == 1, other.first == 1], 1)
        expected = [int((right == pair).all(1)[a.counted].sum()) for pair in OUTCOMES.values()]
        assert list(map(int, row[3:])) == expected
        assert min(expected) > 0


def test_a_checkpoint_beside_a_file_with_its_own_gallery(report_here, runs, sysu, tmp_path, monkeypatch):
    """Each has its row, its numbers and its rankings; as their searches differ, nothing is paired."""
    arrays, rng = {}, np.random.default_rng(0)
    for side, modality in (("query", "infrared"), ("gallery", "visible")):
        samples = read_split("sysu", sysu, "test")[modality]
        arrays |= {
            f"{side}_f": rng.normal(size=(len(samples), 16)),
            f"{side}_label": samples.pids,
            f"{side}_cam": samples.camids,
        }
    np.savez(tmp_path / "own.npz", **arrays)
    words = ["--resume", runs[0], "--features", tmp_path / "own.npz", "--data-path", sysu]
    monkeypatch.setattr(results_report, "FIGURES", {"cmc": "curves"})
    report_here(*words, "--output", "out")
    load_test_py().main([*map(str, words), *MACHINE, "--json", "r.json"])
    results = json.loads(Path("r.json").read_text())["results"]
    text = Path("out/index.html").read_text()
    rows, labels = rows_of(text), labels_of([runs[0], tmp_path / "own.npz"])
    titles = "single-shot, seeded galleries", "up to 2 images of an id and camera, the file's gallery"
    for row, result, label, title in zip(rows, results, labels, titles, strict=True):
        assert row[:2] == [label, f"all, {title}"]
        assert row[6].startswith(f"{100 * result['mean']['mAP']:.2f}")
    assert 'id="side-by-side"' not in text
    lists = data_of(text)["lists"]
    assert [own["label"] for own in lists] == labels
    assert [own["search"] for own in lists] == [0, 1]
    assert [len(own["queries"]) for own in lists] == 2 * [len(arrays["query_label"])]


def test_the_cameras_are_the_same_in_text_json_and_page(compared, sysu, tmp_path, capsys):
    path, methods = compared
    files = [method.name for method in methods[:2]]
    words = ["--features", *files, "--dataset", "sysu", "--data-path", str(sysu), *MACHINE]
    load_test_py().main([*words, "--cameras", "--rerank", "k-reciprocal", "--json", str(tmp_path / "r.json")])
    told = capsys.readouterr().out.split("by pair of cameras\n")[1].splitlines()
    assert re.split(" {2,}", told[0])[1:] == [
        "query camera", "gallery camera", "rank-1", "mAP", "queries", "gallery images",
    ]  # fmt: skip
    text = path.read_text()
    page = rows_of(text[text.index('<section id="cameras"') :])
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["cameras"] is None for row in results] == [row["rerank"] is not None for row in results]
    found = [own for row in results for own in row["cameras"] or ()]
    expected = [
        (pair, score)
        for method in methods[:2]
        for pair, score in cameras_of(method, method.evaluation.protocols[0]).items()
    ]
    assert len(told) - 1 == len(found) == len(expected) == 2 * len(page) / 3
    assert any(own["mAP"] is None for own in found)
    for line, own, row, (pair, score) in zip(told[1:], found, page, expected, strict=False):
        assert re.split(" {2,}", line)[1:] == row[1:]
        assert (own["query_camera"], own["gallery_camera"]) == pair == (int(row[1]), int(row[2]))
        assert (own["queries"], own["gallery"]) == score[2:] == (float(row[5]), float(row[6]))
        for name, cell, value in zip(("rank_1", "mAP"), row[3:5], score[:2], strict=True):
            assert own[name] == (None if np.isnan(value) else value)
            assert cell == ("not compared" if np.isnan(value) else f"{100 * value:.2f}")
    load_test_py().main([*words, "--json", str(tmp_path / "r.json")])  # without the flag: the one table
    assert "cameras" not in capsys.readouterr().out
    assert not any(row["cameras"] for row in json.loads((tmp_path / "r.json").read_text())["results"])


@in_browser
def test_a_number_shows_its_queries_with_both_rankings(chromium, compared):
    path, _ = compared
    chromium.open(path)
    data = data_of(path.read_text())
    for row, other in ((1, 1), (2, 2)):
        a, b = data["lists"][0], data["lists"][other]
        for outcome, wanted in OUTCOMES.items():
            button = f"#side-by-side tbody tr:nth-child({row}) [data-outcome={outcome}]"
            number = int(chromium.js(f"document.querySelector('{button}').textContent"))
            chromium.js(f"document.querySelector('{button}').click()")
            status = chromium.js("document.getElementById('status').textContent")
            assert status.startswith(f"{number} of {len(a['queries'])} queries of trial 0")
            places = [q for q, (one, two) in enumerate(zip(a["first"], b["first"], strict=True))
                      if one and ((one == 1), (two == 1)) == wanted]  # fmt: skip
            assert len(places) == number
            lines = chromium.js(
                "[...document.querySelectorAll('#queries > li')].map((line) => [...line.querySelectorAll("
                "'.results > *')].map((part) => part.tagName === 'P' ? part.textContent : "
                "[...part.children].map((item) => item.className[0]).join('')))"
            )
            for q, line in zip(places, lines, strict=False):
                assert [line[1], line[3]] == [a["kinds"][q], b["kinds"][q]]
                for text, name, own in ((line[0], f"A: {a['label']}", a), (line[2], f"B: {b['label']}", b)):
                    ap = f"AP {100 * own['ap'][q]:.1f} %, first right: {own['first'][q]}"
                    assert text == f"{name}, {ap}"
    choose(chromium, "outcome", "all")
    choose(chromium, "order", "gain")
    gains = [a["ap"][q] - b["ap"][q] for q in range(len(a["queries"])) if a["first"][q]]
    first = chromium.js("document.querySelector('#queries .results').textContent")
    aps = [float(number) for number in re.findall(r"AP ([\d.]+) %", first)]
    assert aps[0] - aps[1] == pytest.approx(100 * max(gains), abs=0.11)
    choose(chromium, "other", "")  # what asks for two is gone
    assert chromium.js("document.getElementById('order').value") == "dataset"
    assert chromium.js("document.querySelectorAll('#queries > li:first-child .ranks').length") == 1
    assert list(problems(chromium.events)) == []


@in_browser
def test_the_identities_most_confused_lead_to_their_rankings(chromium, compared):
    path, _ = compared
    text = path.read_text()
    rows = rows_of(text[text.index('<section id="confused"') :])
    lists = data_of(text)["lists"]
    pids = data_of(text)["pids"]
    assert 0 < len(rows) <= 10
    totals = [sum(map(int, row[3:])) for row in rows]
    assert totals == sorted(totals, reverse=True)
    for pid, other, queries, *counts in rows:
        for number, own in zip(counts, lists, strict=True):
            first = [images[kinds.replace("i", "-").index(kinds.replace("i", "")[0])]
                     for images, kinds in zip(own["images"], own["kinds"], strict=True)]  # fmt: skip
            taken = [(pids[q], pids[g]) for q, g in zip(own["queries"], first, strict=True)]
            assert taken.count((int(pid), int(other))) == int(number)
            assert [pids[q] for q in own["queries"]].count(int(pid)) == int(queries)
    chromium.open(path)
    chromium.js("document.querySelector('#confused .count').click()")
    assert {line[0] for line in shown(chromium)} == {int(rows[0][0])}
    assert all(line[3].replace("i", "")[0] == "w" for line in shown(chromium))


@in_browser
def test_columns_are_sorted(chromium, compared):
    path, _ = compared
    chromium.open(path)
    column = chromium.js(
        "[...document.querySelectorAll('#results th')].findIndex((e) => e.textContent === 'mAP')"
    )
    rows = "[...document.querySelectorAll('#results tbody tr')]"
    cells = f"{rows}.map((e) => parseFloat(e.cells[{column}].textContent))"
    values = chromium.js(cells)
    head = f"document.querySelectorAll('#results th')[{column}]"
    for order in ("ascending", "descending", "ascending"):
        chromium.js(f"{head}.querySelector('button').focus()")
        chromium.press("Enter")
        assert chromium.js(cells) == sorted(values, reverse=order == "descending")
        assert chromium.js(f"{head}.ariaSort") == order
        assert chromium.js("document.activeElement.textContent") == "mAP"
    chromium.js("document.querySelectorAll('#results th button')[0].click()")
    labels = "[...document.querySelectorAll('#results tbody th')].map((e) => e.textContent)"
    assert chromium.js(labels) == ["a", "b", "c"]
    cameras = "#cameras tbody tr"
    numbers = f"[...document.querySelectorAll('{cameras}')].map((e) => parseFloat(e.cells[3].textContent))"
    chromium.js("document.querySelectorAll('#cameras thead button')[3].click()")
    found = chromium.js(numbers)
    assert None in found  # a pair that is not compared
    known = [number for number in found if number is not None]
    assert found == sorted(known) + [None] * (len(found) - len(known))


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_on_a_narrow_screen(chromium, compared, scheme):
    chromium.open(compared[0], 360, 800, scheme)
    chromium.js("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert chromium.js("document.documentElement.scrollWidth") <= 360
    parts = "[...document.querySelectorAll('.scroll')]"
    cut = f"{parts}.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.ariaLabel)"
    assert chromium.js(cut) == []
    cell = "document.querySelector('#results td:nth-child(3)')"
    assert chromium.js(f"getComputedStyle({cell}, '::before').content") == '"rank-1"'
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {"table", "row", "columnheader", "rowheader", "cell"} <= roles  # it still is a table


@in_browser
def test_a_click_enlarges(chromium, compared):
    chromium.open(compared[0])
    large = "document.querySelector('#enlarged .thumb:last-of-type').getBoundingClientRect().height"
    small = chromium.js("document.querySelector('#queries .ranks .thumb').getBoundingClientRect().height")
    label = chromium.js("document.querySelector('#queries .ranks .thumb').ariaLabel")
    chromium.js("document.querySelector('#queries .ranks .thumb').click()")
    assert chromium.js("document.querySelector('#enlarged').open")
    assert chromium.js(large) > 1.5 * small
    captions = chromium.js("[...document.querySelectorAll('#enlarged figcaption')].map((e) => e.textContent)")
    assert captions[0].startswith("query: pid ")
    assert captions[1:] == [label]
    assert chromium.js("document.querySelector('#enlarged').scrollHeight") <= 900
    chromium.js("document.querySelector('#enlarged').close()")
    chromium.js(
        "document.querySelector('#results figure svg').dispatchEvent(new Event('click', {bubbles: true}))"
    )
    assert chromium.js("document.querySelectorAll('#enlarged svg').length") == 1
    wide = "document.querySelector('#enlarged svg').clientWidth"
    assert chromium.js(wide) > 1.5 * chromium.js("document.querySelector('#results svg').clientWidth")
    assert list(problems(chromium.events)) == []


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


def test_a_number_has_its_interval_and_no_deviation_over_trials(tmp_path):
    each = Evaluated("large", everyone(), None)
    ((protocol, _, _),) = each.method.results
    (cells,) = rows.result_rows([Listed(protocol, each, None)])
    jackknife = each.method.results[protocol, False, None].jackknife
    for column, measure in ((2, "rank-1"), (6, "mAP")):
        value, half = jackknife.interval(measure)[:2]
        assert re.sub("<[^>]*>", "", cells[column]) == f"{100 * value:.2f} ±{100 * half:.1f}"
    assert not any("±" in cell for cell in cells[3:6] + cells[7:])
    line = rows.sure_rows([each])[0]
    assert line.startswith("large: all, single-shot, seeded galleries: rank-1 ")
    assert line.endswith(f"(95 %, {len(jackknife.persons)} persons)")
    save_json(tmp_path / "r.json", "cpu", [each.method])
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["intervals"]["mAP"]["half"] == half
    assert result["intervals"]["mAP"]["p"] is None  # there is nothing to test


def test_a_list_stands_beside_the_first_one_that_is_re_ranked_alike():
    method = everyone()
    method.args.rerank = ["aim"]
    method.results.clear()
    method.evaluate(torch.device("cpu"))
    ((protocol, _, _), _) = method.results
    pairs = [(label, rerank) for label in "AB" for rerank in (None, "aim")]
    lists = [Listed(protocol, Evaluated(label, method, None), rerank) for label, rerank in pairs]
    shown = [cells[:2] for cells in rows.side_by_side(lists)]
    plain, aim = ("", ", aim re-ranking")
    assert shown == [["A" + plain, "A" + aim], ["A" + plain, "B" + plain], ["A" + aim, "B" + aim]]


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
