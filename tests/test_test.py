import importlib.util
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, run_script

import images
import synthetic
from checkpoints import load_checkpoint, save_checkpoint
from evaluation import models as testing
from evaluation.embedding import TestImages
from tests.oracles import evaluate_loop
from utils import UserError

spec = importlib.util.spec_from_file_location(
    "test_script", REPOSITORY / "test.py"
)  # Python has a `test` too
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

WAYS = ("visible-to-infrared", "infrared-to-visible")


class TinyNetwork(torch.nn.Module):
    """A projection of coarse pixels that stands in for the ResNet, and counts the images that it embeds."""

    dim = 16
    embedded = 0

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, visible=None, infrared=None):
        images = infrared if visible is None else visible
        TinyNetwork.embedded += len(images)
        return (F.adaptive_avg_pool2d(images, (4, 2)).flatten(1) @ self.weight).float()


def write_tiny(path, seed=0, **facts):
    """A checkpoint of a TinyNetwork; facts: what else it says of itself."""
    weight = torch.randn(24, TinyNetwork.dim, generator=torch.Generator().manual_seed(seed))
    save_checkpoint({"net": {"weight": weight}, "epoch": 7} | facts, path)
    return path


@pytest.fixture
def tiny(monkeypatch):
    """Let test.py build a TinyNetwork from what it is given."""
    monkeypatch.setattr(
        testing, "build_model", lambda checkpoint, path: TinyNetwork(checkpoint["net"]["weight"])
    )


@pytest.fixture
def evaluate(capsys):
    """Run test.py in this process on the CPU and return what it wrote: .out and .err."""

    def run(*words):
        flags = ["--gpu", "-1", "--workers", "1", "--amp", "off"]
        script.main([*map(str, words), *flags])
        return capsys.readouterr()

    return run


@pytest.fixture
def sysu_flags(tiny, sysu, tmp_path):
    path = write_tiny(
        tmp_path / "sysu_best.t", args={"dataset": "sysu", "img_h": 32, "img_w": 16, "epochs": 9}
    )
    return "--resume", path, "--data-path", sysu


@pytest.fixture(scope="module")
def regdb(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "regdb"
    synthetic.draw_dataset(synthetic.plan_regdb(4, 5, 3, 0), root, height=32, width=16)
    return root


@pytest.fixture(scope="module")
def llcm(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "llcm"
    synthetic.draw_dataset(synthetic.plan_llcm(2, 4, 2, 0), root, height=32, width=16)
    return root


@pytest.fixture
def trials_of_regdb(tiny, tmp_path):
    """The ten trials' checkpoints, each with a network of its own."""
    settings = {"dataset": "regdb", "img_h": 32, "img_w": 16}
    for t in range(1, 11):
        write_tiny(tmp_path / f"run_trial_{t}_best.t", t, epoch=t, args=settings | {"trial": str(t)})
    return tmp_path


def table_of(text):
    """{title: its six numbers} of a table in plain text."""
    lines = text.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("protocol ")) + 1
    lines = (re.split(r"  +", line) for line in lines[first:])
    return {title: [float(number) for number in numbers] for title, *numbers in lines}


def in_table(metrics):
    """JSON's metrics as the table has them."""
    values = [metrics["cmc"][k - 1] for k in (1, 5, 10, 20)] + [metrics["mAP"], metrics["mINP"]]
    return [round(100 * value, 2) for value in values]


# ---- an oracle: docs/method.md, section 8, in naive loops


def naive_metrics(query, gallery, protocol):
    """Mean CMC, mAP, mINP; query and gallery: lists of (feature, pid, camid)."""
    distmat = np.array([[-float(feature @ other) for other, _, _ in gallery] for feature, _, _ in query])
    ids = [np.array([image[k] for image in images]) for k in (1, 2) for images in (query, gallery)]
    return dict(zip(("cmc", "mAP", "mINP"), evaluate_loop(distmat, *ids, protocol), strict=True))


def images_below(root, folder):
    return (
        sorted(os.path.join(folder, name) for name in os.listdir(root / folder))
        if (root / folder).is_dir()
        else []
    )


def naive_gallery(root, pids, folders, shot, trial, cells=None):
    """(path, pid, camid) drawn by a generator of the trial, or taken from the published cells."""
    generator, drawn = random.Random(trial), []
    for pid in sorted(pids):
        for camid, folder in folders.items():
            files = images_below(root, f"{folder}/{pid:04d}")
            if not files:
                continue
            if cells is not None:
                row = cells[camid - 1, 0].ravel()[pid - 1][trial]
                chosen = [files[position - 1] for position in row[:shot]]
            else:
                chosen = (
                    [generator.choice(files)] if shot == 1 else generator.sample(files, min(shot, len(files)))
                )
            drawn += [(path, pid, camid) for path in chosen]
    return drawn


def feature_of(archive, root):
    """{path below root: feature in float64} of a --save-features file."""
    return {
        os.path.relpath(path, root): feature.astype(np.float64)
        for modality in ("visible", "infrared")
        for path, feature in zip(archive[f"{modality}_paths"], archive[f"{modality}_features"], strict=True)
    }


def with_features(images, features):
    return [(features[path], pid, camid) for path, pid, camid in images]


def assert_equal(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("galleries", ["seeded", "published"])
def test_sysu_agrees_with_naive_loops(sysu, sysu_flags, evaluate, tmp_path, galleries):
    """Ranks are whole numbers, so float32 similarities give exactly what float64 ones give."""
    outputs = "--json", tmp_path / "r.json", "--save-features", tmp_path / "f.npz"
    protocol = "--mode", "all", "indoor", "--shot", 1, 10, "--galleries", galleries, "--allow-short"
    evaluate(*sysu_flags, *protocol, *outputs)
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    features = feature_of(np.load(tmp_path / "f.npz"), sysu)
    pids = sorted(map(int, (sysu / "exp/test_id.txt").read_text().split(",")))
    cells = (
        scipy.io.loadmat(sysu / "exp/rand_perm_cam.mat")["rand_perm_cam"]
        if galleries == "published"
        else None
    )
    query = [
        (path, pid, camid)
        for pid in pids
        for camid in (3, 6)
        for path in images_below(sysu, f"cam{camid}/{pid:04d}")
    ]
    assert {camid for _, _, camid in query} == {3, 6}, "the camera rule would go untested"
    assert [(r["mode"], r["shot"]) for r in results] == [
        ("all", 1),
        ("all", 10),
        ("indoor", 1),
        ("indoor", 10),
    ]
    for result in results:
        cameras = (1, 2, 4, 5) if result["mode"] == "all" else (1, 2)
        trials = [
            naive_metrics(
                with_features(query, features),
                with_features(
                    naive_gallery(sysu, pids, {c: f"cam{c}" for c in cameras}, result["shot"], t, cells),
                    features,
                ),
                "sysu",
            )
            for t in range(10)
        ]
        for t, expected in enumerate(trials):
            assert_equal(result["trials"][str(t)], expected)
        for name, value in trials[0].items():
            values = np.array([trial[name] for trial in trials])
            assert_equal(result["mean"], {name: values.mean(0)})
            assert_equal(result["std"], {name: np.sqrt(((values - values.mean(0)) ** 2).mean(0))})
            assert values.shape == (10, *np.shape(value))


def test_llcm_agrees_with_naive_loops(tiny, llcm, evaluate, tmp_path):
    path = write_tiny(tmp_path / "l.t", args={"dataset": "llcm", "img_h": 32, "img_w": 16})
    outputs = "--json", tmp_path / "r.json", "--save-features", tmp_path / "f.npz"
    evaluate("--resume", path, "--data-path", llcm, *outputs)
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    features = feature_of(np.load(tmp_path / "f.npz"), llcm)
    pids = sorted(map(int, (llcm / "idx/test_id.txt").read_text().split(",")))
    folders = {
        "visible": {c: f"test_vis/cam{c}" for c in range(1, 10)},
        "infrared": {c: f"test_nir/cam{c}" for c in (1, 2, 4, 5, 6, 7, 8, 9)},
    }
    assert [result["mode"] for result in results] == list(WAYS)
    for result in results:
        query_modality, _, gallery_modality = result["mode"].partition("-to-")
        query = [
            (path, pid, camid)
            for pid in pids
            for camid, folder in folders[query_modality].items()
            for path in images_below(llcm, f"{folder}/{pid:04d}")
        ]
        for t in range(10):
            expected = naive_metrics(
                with_features(query, features),
                with_features(naive_gallery(llcm, pids, folders[gallery_modality], 1, t), features),
                "llcm",
            )
            assert_equal(result["trials"][str(t)], expected)


def regdb_images(root, word, trial):
    lines = (root / f"idx/test_{word}_{trial}.txt").read_text().splitlines()
    return [(line.split()[0], int(line.split()[1]), 0) for line in lines]


def test_regdb_agrees_with_naive_loops(trials_of_regdb, regdb, evaluate, tmp_path):
    outputs = "--json", tmp_path / "r.json", "--save-features", tmp_path / "f.npz"
    flags = "--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb
    written = evaluate(*flags, "--trial", 4, *outputs)
    assert written.out.splitlines()[0] == "RegDB, per cent, trial 4 alone"
    assert "run_trial_4_best.t: trained on RegDB, epoch 4;" in written.out.splitlines()[1]
    features = feature_of(np.load(tmp_path / "f.npz"), regdb)
    images = {word: with_features(regdb_images(regdb, word, 4), features) for word in ("visible", "thermal")}
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    for result, (query, gallery) in zip(
        results, (("visible", "thermal"), ("thermal", "visible")), strict=True
    ):
        expected = naive_metrics(images[query], images[gallery], "regdb")
        assert_equal(result["trials"]["4"], expected)


# ---- what is evaluated


def test_each_image_is_decoded_and_embedded_once(sysu, sysu_flags, evaluate, monkeypatch):
    read = []
    original = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *size: read.append(path) or original(path, *size))
    TinyNetwork.embedded = 0
    evaluate(
        *sysu_flags, "--mode", "all", "indoor", "--shot", 1, 10, "--allow-short", "--rerank", "k-reciprocal"
    )
    assert len(read) == len(set(read)) == TinyNetwork.embedded
    pids = (sysu / "exp/test_id.txt").read_text().strip().split(",")
    assert len(read) == len([p for pid in pids for p in sysu.glob(f"cam*/{int(pid):04d}/*.jpg")])


def test_regdb_decodes_once_and_embeds_once_for_each_trial(trials_of_regdb, regdb, evaluate, monkeypatch):
    read = []
    original = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *size: read.append(path) or original(path, *size))
    TinyNetwork.embedded = 0
    evaluate("--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb)
    assert len(read) == len(set(read)) == 9 * 3 * 2
    assert TinyNetwork.embedded == 10 * 5 * 3 * 2


def test_regdb_table_of_ten_trials(trials_of_regdb, regdb, evaluate, tmp_path):
    """From any one trial's checkpoint: every trial's line, then the mean and the standard deviation."""
    report = tmp_path / "r.json"
    one = evaluate("--resume", trials_of_regdb / "run_trial_3_best.t", "--data-path", regdb, "--json", report)
    all_ = evaluate("--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb)
    assert one.out == all_.out
    first, second = one.out.splitlines()[:2]
    assert first == "RegDB, per cent, mean over 10 trials, each with its own model"
    assert (
        "run_trial_1_best.t and 9 siblings: trained on RegDB, epoch 1, 2, 3, 4, 5, 6, 7, 8, 9, 10;" in second
    )
    table = table_of(one.out)
    results = json.loads(report.read_text())["results"]
    assert len(table) == 2 * 12
    for result in results:
        title = result["mode"].replace("-", " ")
        for t in range(1, 11):
            assert table[f"{title}, trial {t}"] == in_table(result["trials"][str(t)])
        assert table[f"{title}, mean of 10"] == in_table(result["mean"])
        assert table[f"{title}, standard deviation"] == in_table(result["std"])
    assert len({tuple(line) for line in table.values()}) > 5, "every trial seems to have the same model"


def test_splits_of_regdb_share_persons(trials_of_regdb, regdb, evaluate, tmp_path):
    """Ten splits have more persons than one, but not ten times as many, and no interval is divided by ten."""
    report = tmp_path / "r.json"
    flags = "--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb, "--json", report
    evaluate(*flags)
    folders = {path.parent.name for path in (regdb / "Thermal").glob("*/*")}
    assert len(folders) == 9
    for result in json.loads(report.read_text())["results"]:
        assert result["intervals"]["mAP"]["persons"] == 9
    evaluate(*flags, "--trial", 4)
    for result in json.loads(report.read_text())["results"]:
        assert result["intervals"]["mAP"]["persons"] == 5


def test_two_trials_have_one_sibling(trials_of_regdb, regdb, evaluate):
    for t in range(3, 11):
        (trials_of_regdb / f"run_trial_{t}_best.t").unlink()
    written = evaluate("--resume", trials_of_regdb / "run_trial_1_best.t", "--data-path", regdb)
    assert "run_trial_1_best.t and 1 sibling: trained on RegDB" in written.out.splitlines()[1]


def test_drawn_galleries_have_their_deviation(sysu_flags, evaluate, tmp_path):
    written = evaluate(*sysu_flags, "--mode", "all", "indoor", "--json", tmp_path / "r.json")
    for result in json.loads((tmp_path / "r.json").read_text())["results"]:
        std = 100 * result["std"]["cmc"][0], 100 * result["std"]["mAP"]
        words = "variation of the gallery, deviation over 10 trials: rank-1 {:.2f}, mAP {:.2f}".format(*std)
        assert f"{result['mode']}, single-shot, seeded galleries: {words}" in written.out
    assert "variation" not in evaluate(*sysu_flags, "--trial", 3).out


def test_a_checkpoint_and_features_are_compared(sysu_flags, sysu, evaluate, tmp_path):
    """In the order of the flags; the features of the same network differ by nothing."""
    evaluate(*sysu_flags, "--save-features", tmp_path / "f.npz")
    other = write_tiny(tmp_path / "other.t", 1, args={"dataset": "sysu", "img_h": 32, "img_w": 16})
    resume, first, *rest = sysu_flags
    words = "--features", tmp_path / "f.npz", resume, first, other, *rest, "--json", tmp_path / "r.json"
    written = evaluate(*words)
    lines = written.out.splitlines()
    assert [line[:3] for line in lines[1:4]] == ["A: ", "B: ", "C: "]
    assert str(tmp_path / "f.npz") in lines[1]
    same, different = json.loads((tmp_path / "r.json").read_text())["results"][1:]
    assert same["difference"]["mAP"]["value"] == 0
    assert different["difference"]["mAP"]["value"] != 0
    assert same["mean"] != different["mean"]


def test_trials_in_folders_of_their_own(trials_of_regdb, regdb, evaluate):
    for t in (1, 2):
        (trials_of_regdb / str(t)).mkdir()
        (trials_of_regdb / f"run_trial_{t}_best.t").rename(trials_of_regdb / str(t) / "best.t")
    written = evaluate("--resume", trials_of_regdb / "{trial}" / "best.t", "--data-path", regdb)
    assert "mean over 2 of the 10 trials (1, 2)" in written.out.splitlines()[0]


def test_regdb_says_over_how_many_trials(trials_of_regdb, regdb, evaluate):
    for t in (2, 3, 5, 6, 7, 8, 9, 10):
        (trials_of_regdb / f"run_trial_{t}_best.t").unlink()
    written = evaluate("--resume", trials_of_regdb / "run_trial_4_best.t", "--data-path", regdb)
    assert "mean over 2 of the 10 trials (1, 4), each with its own model" in written.out.splitlines()[0]
    assert "visible to infrared, mean of 2" in table_of(written.out)
    (missing,) = (line for line in written.err.splitlines() if line.startswith("no checkpoint of trial"))
    assert "trial 2, 3, 5, 6, 7, 8, 9, 10, left out" in missing
    assert "run_trial_{trial}_best.t" in missing


def test_settings_come_from_the_checkpoint_and_typed_ones_win(sysu_flags, tmp_path):
    settings = tmp_path / "r.json"
    words = [*sysu_flags, "--gpu", -1, "--img_w", 24, "--json", settings]
    script.main(list(map(str, words)))
    found = json.loads(settings.read_text())["settings"]
    assert (found["dataset"], found["img_h"], found["img_w"], found["amp"]) == ("sysu", 32, 24, "auto")


def test_a_checkpoint_in_the_folder_of_models_is_found_by_its_name(tiny, sysu, evaluate, tmp_path):
    write_tiny(tmp_path / "models" / "found_best.t", args={"dataset": "sysu", "img_h": 32, "img_w": 16})
    flags = "--model-path", tmp_path / "models", "--data-path", sysu
    assert "found_best.t" in evaluate("--resume", "found_best.t", *flags).out


def test_a_model_that_was_trained_elsewhere_is_tested_on_every_trial(tiny, regdb, evaluate, tmp_path):
    path = write_tiny(tmp_path / "s.t", args={"dataset": "sysu", "img_h": 32, "img_w": 16})
    flags = "--resume", path, "--data-path", regdb, "--dataset", "regdb"
    TinyNetwork.embedded = 0
    written = evaluate(*flags)
    first, second = written.out.splitlines()[:2]
    assert first == "RegDB, per cent, mean over 10 trials, one model for all of them"
    assert f"{path}: trained on SYSU-MM01, epoch 7" in second
    assert TinyNetwork.embedded == 9 * 3 * 2, "an image was embedded for each of its trials"
    table, one = table_of(written.out), table_of(evaluate(*flags, "--trial", 2).out)
    assert table["visible to infrared, trial 2"] == one["visible to infrared"]
    assert len({tuple(table[f"visible to infrared, trial {t}"]) for t in range(1, 11)}) > 2


@pytest.mark.parametrize("facts", [{}, {"args": {"dataset": "regdb"}}])
def test_a_model_of_unknown_training_needs_a_trial(tiny, regdb, evaluate, tmp_path, facts):
    flags = "--resume", write_tiny(tmp_path / "u.t", **facts), "--data-path", regdb, "--dataset", "regdb"
    size = "--img-h", 32, "--img-w", 16
    with pytest.raises(UserError, match=r"u\.t does not record its trial: set --trial N"):
        evaluate(*flags)
    assert "one model for all" in evaluate(*flags, *size, "--trial", "all").out.splitlines()[0]
    assert "trial 3 alone" in evaluate(*flags, *size, "--trial", 3).out.splitlines()[0]


def test_a_model_of_regdb_is_tested_on_another_dataset(tiny, sysu, evaluate, tmp_path):
    path = write_tiny(
        tmp_path / "run_trial_4_best.t", args={"dataset": "regdb", "trial": "4", "img_h": 32, "img_w": 16}
    )
    written = evaluate("--resume", path, "--data-path", sysu, "--dataset", "sysu")
    assert written.out.splitlines()[0] == "SYSU-MM01, per cent, mean over 10 trials"
    assert "trained on RegDB" in written.out.splitlines()[1]


def test_a_model_of_regdb_without_siblings_is_tested_on_its_own_trial(tiny, regdb, evaluate, tmp_path):
    settings = {"dataset": "regdb", "trial": "4", "img_h": 32, "img_w": 16}
    flags = "--resume", write_tiny(tmp_path / "one.t", args=settings), "--data-path", regdb
    assert evaluate(*flags).out.splitlines()[0] == "RegDB, per cent, trial 4 alone"
    for trial in (5, "all"):
        with pytest.raises(UserError, match=r"one\.t was trained on trial 4, whose training images are"):
            evaluate(*flags, "--trial", trial)


def test_a_released_model_s_name_tells_what_it_was_trained_on(tiny, regdb, evaluate, tmp_path):
    path = write_tiny(tmp_path / "released_trial_4_best.t")
    flags = "--resume", path, "--data-path", regdb, "--dataset", "regdb", "--img-h", 32, "--img-w", 16
    assert evaluate(*flags, "--trial", 4).out.splitlines()[0] == "RegDB, per cent, trial 4 alone"
    with pytest.raises(UserError, match=r"was trained on trial 4, .*trial 5's test images: choose --trial 4"):
        evaluate(*flags, "--trial", 5)


def test_the_same_split_again_is_not_refused(tiny, regdb, evaluate, tmp_path):
    root = tmp_path / "regdb"
    shutil.copytree(regdb, root)
    for split in ("train", "test"):
        for word in ("visible", "thermal"):
            shutil.copy(root / f"idx/{split}_{word}_4.txt", root / f"idx/{split}_{word}_5.txt")
    path = write_tiny(tmp_path / "one.t", args={"dataset": "regdb", "trial": "4", "img_h": 32, "img_w": 16})
    assert "trial 5 alone" in evaluate("--resume", path, "--data-path", root, "--trial", 5).out


def test_thermal_is_infrared(trials_of_regdb, regdb, evaluate):
    flags = "--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb, "--trial", 1
    both = evaluate(*flags, "--mode", "visible-to-thermal", "thermal-to-visible").out
    assert both == evaluate(*flags, "--mode", "visible-to-infrared", "infrared-to-visible").out


def test_one_gpu_for_several_processes_is_refused(trained, sysu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = next(trained[0].glob("save_model/*_best.t"))
    with pytest.raises(UserError, match="--gpu 0: leave it out with torchrun"):
        script.main(["--resume", str(path), "--data-path", str(sysu), "--gpu", "0"])


def test_each_checkpoint_is_read_once(trials_of_regdb, regdb, sysu_flags, evaluate, monkeypatch):
    read = []
    original = testing.load_checkpoint
    monkeypatch.setattr(testing, "load_checkpoint", lambda path: read.append(str(path)) or original(path))
    evaluate("--resume", trials_of_regdb / "run_trial_3_best.t", "--data-path", regdb)
    assert len(read) == len(set(read)) == 10
    read.clear()
    evaluate(*sysu_flags)
    assert read == [str(sysu_flags[1])]


def test_images_are_decoded_again_for_another_pixel_range(tiny, regdb, evaluate, tmp_path, monkeypatch):
    for t in range(1, 11):
        settings = {"dataset": "regdb", "trial": str(t), "img_h": 32, "img_w": 16}
        settings["pixel_range"] = [0.0, 100.0] if t < 5 else [5.0, 200.0]
        write_tiny(tmp_path / f"run_trial_{t}_best.t", t, args=settings)
    loaded = []
    original = TestImages.load
    monkeypatch.setattr(
        TestImages, "load", lambda self, *a: loaded.append(self.pixel_range) or original(self, *a)
    )
    evaluate("--resume", tmp_path / "run_trial_{trial}_best.t", "--data-path", regdb)
    assert loaded == [[0.0, 100.0], [5.0, 200.0]]


def test_what_the_numbers_are_based_on(sysu_flags, evaluate, tmp_path):
    written = evaluate(*sysu_flags, "--mode", "all", "indoor", "--json", tmp_path / "r.json")
    _, _, all_, indoor, *warnings = written.out.split("\nprotocol ")[0].splitlines()
    warnings = [line for line in warnings if line.startswith("warning: ")]
    rows = table_of(written.out)
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(rows) == len(report["results"]) == 2
    for line, result in zip((all_, indoor), report["results"], strict=True):
        counts = result["counts"]["0"]
        assert line == (
            f"{result['mode']}, single-shot, seeded galleries: {counts['queries']} queries, "
            f"all with a match, {counts['gallery']} gallery images, {counts['identities']} identities"
        )
    assert report["warnings"] == [warning.removeprefix("warning: ") for warning in warnings]
    assert ["queries (3,803)" in warning for warning in warnings] == [True, True]  # of each protocol
    assert "warning" not in written.err


def test_selection_stands_in_the_heading(sysu_flags, evaluate):
    _, path, *_ = sysu_flags
    assert "epoch 7 of 9; how it was chosen is unknown" in evaluate(*sysu_flags).out.splitlines()[1]
    save_checkpoint(load_checkpoint(path) | {"selection": "chosen on the val ids"}, path)
    assert "epoch 7 of 9; chosen on the val ids" in evaluate(*sysu_flags).out.splitlines()[1]


def test_short_galleries_only_when_allowed_and_never_in_silence(sysu_flags, evaluate):
    with pytest.raises(UserError, match=r"--shot 10.*--allow-short.*id \d+ camera \d \(2\)"):
        evaluate(*sysu_flags, "--shot", 10)
    written = evaluate(*sysu_flags, "--shot", 10, "--allow-short")
    assert re.search(
        r"trials; \d+ \(id, camera\) of the galleries have too few images$", written.out.splitlines()[0]
    )
    assert (
        evaluate(*sysu_flags, "--allow-short").out.splitlines()[0]
        == "SYSU-MM01, per cent, mean over 10 trials"
    )


def test_rows_are_labelled_and_the_plain_one_is_first(sysu_flags, evaluate):
    modes = "--mode", "all", "indoor"
    more = "--flip", "--rerank", "k-reciprocal", "aim", "gnn"
    plain = table_of(evaluate(*sysu_flags, *modes).out)
    written = evaluate(*sysu_flags, *modes, *more).out
    assert "aim re-ranking: one query at a time it is the same" in written.splitlines()
    everything = table_of(written)
    rerankings = ["", ", k-reciprocal re-ranking", ", k-reciprocal re-ranking, one query at a time"]
    rerankings += [", aim re-ranking", ", gnn re-ranking", ", gnn re-ranking, one query at a time"]
    labels = [flip + rerank for flip in ("", ", flip") for rerank in rerankings]
    assert list(everything) == [title + label for title in plain for label in labels]
    assert {title: everything[title] for title in plain} == plain
    for title in plain:
        assert len({tuple(everything[title + rerank]) for rerank in rerankings}) > 2, "rows repeat each other"
    for rerank in rerankings:
        assert any(everything[title + rerank] != everything[title + ", flip" + rerank] for title in plain)


def test_saved_features_are_the_plain_ones(sysu_flags, evaluate, tmp_path):
    evaluate(*sysu_flags, "--save-features", tmp_path / "plain.npz")
    evaluate(*sysu_flags, "--flip", "--save-features", tmp_path / "flip.npz")
    plain, flip = np.load(tmp_path / "plain.npz"), np.load(tmp_path / "flip.npz")
    np.testing.assert_array_equal(flip["visible_features"], plain["visible_features"])


# ---- outputs


def test_json_tells_what_was_done(sysu_flags, evaluate, tmp_path):
    written = evaluate(*sysu_flags, "--json", tmp_path / "new" / "r.json", "--trial", 3)
    report = json.loads((tmp_path / "new" / "r.json").read_text())
    (checkpoint,) = report["checkpoints"]
    assert checkpoint["path"] == str(sysu_flags[1])
    assert (checkpoint["epoch"], checkpoint["args"]["img_w"]) == (7, 16)
    assert report["settings"]["galleries"] == "seeded"
    assert report["versions"]["torch"] == torch.__version__
    (result,) = report["results"]
    assert list(result["trials"]) == ["3"]
    (row,) = table_of(written.out).values()
    assert row == in_table(result["mean"]) == in_table(result["trials"]["3"])
    assert f"wrote {tmp_path / 'new' / 'r.json'}" in written.err


def test_mat_files_hold_every_test_image(sysu, sysu_flags, evaluate, tmp_path):
    evaluate(*sysu_flags, "--flip", "--save-mat", tmp_path / "mat", "--save-features", tmp_path / "f.npz")
    features = feature_of(np.load(tmp_path / "f.npz"), sysu)
    pids = list(map(int, (sysu / "exp/test_id.txt").read_text().split(",")))
    for camid in range(1, 7):
        cells = scipy.io.loadmat(tmp_path / "mat" / f"feature_cam{camid}.mat")["feature"]
        assert cells.shape == (1, max(pids))
        for pid in range(1, max(pids) + 1):
            paths = images_below(sysu, f"cam{camid}/{pid:04d}") if pid in pids else []
            expected = np.array([features[path] for path in paths]).reshape(-1, TinyNetwork.dim)
            np.testing.assert_array_equal(cells[0, pid - 1], expected)


@pytest.mark.skipif(shutil.which("octave-cli") is None, reason="GNU Octave is not installed")
def test_octave_reads_the_features(sysu, sysu_flags, evaluate, tmp_path):
    evaluate(*sysu_flags, "--save-mat", tmp_path / "mat", "--save-features", tmp_path / "f.npz")
    features = feature_of(np.load(tmp_path / "f.npz"), sysu)
    for camid in range(1, 7):
        pid = next(
            p
            for p in map(int, (sysu / "exp/test_id.txt").read_text().split(","))
            if (sysu / f"cam{camid}/{p:04d}").is_dir()
        )
        code = f"load('{tmp_path}/mat/feature_cam{camid}.mat'); x = feature{{{pid}}}; "
        code += "printf('%.17g ', x(2, :)); disp(size(x));"
        done = subprocess.run(
            ["octave-cli", "--norc", "--eval", code], capture_output=True, text=True, check=True
        )
        *numbers, rows, columns = map(float, done.stdout.split())
        paths = images_below(sysu, f"cam{camid}/{pid:04d}")
        assert (rows, columns) == (len(paths), TinyNetwork.dim)
        np.testing.assert_array_equal(numbers, features[paths[1]])


# ---- the whole: real networks, real commands


def test_a_checkpoint_gives_the_numbers_that_training_logged(trained, sysu, evaluate):
    folder, done = trained
    logged = re.findall(r"rank-1 ([\d.]+)  rank-10 ([\d.]+)  mAP ([\d.]+)  mINP ([\d.]+)", done.stdout)
    for which in ("best", "last"):
        (path,) = (folder / "save_model").glob(f"*_{which}.t")
        epoch = load_checkpoint(path)["epoch"]
        (row,) = table_of(evaluate("--resume", path, "--data-path", sysu).out).values()
        assert [row[0], row[2], row[4], row[5]] == [float(number) for number in logged[epoch - 1]]


def test_the_released_format(sysu, evaluate, monkeypatch, tmp_path):
    path = tmp_path / "released.t"
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", str(path)])
    runpy.run_path(str(REPOSITORY / "tests" / "golden" / "make_checkpoint.py"))
    out = evaluate(
        "--resume", path, "--data-path", sysu, "--dataset", "sysu", "--img-h", 32, "--img-w", 16
    ).out
    assert (
        out.splitlines()[1]
        == f"{path}: trained on an unknown dataset, epoch 42; how it was chosen is unknown"
    )
    assert len(table_of(out)) == 1


# ---- bad input


def test_bad_input_is_refused_in_one_line(sysu, regdb, sysu_flags, trials_of_regdb, evaluate, tmp_path):
    resume, path, *rest = sysu_flags
    regdb_flags = "--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    refused = [
        ("no file at", "--resume", tmp_path / "none.t", *rest),
        ("not a complete file of torch.save", "--resume", tmp_path / "file", *rest),
        ("no checkpoint of trial 1, 2, .*10", "--resume", "nothing_trial_{trial}_best.t"),
        ("only RegDB has", "--resume", "x_{trial}_best.t", "--dataset", "sysu", *rest),
        ("--trial 10: SYSU-MM01 has the trials 0 to 9", *sysu_flags, "--trial", 10),
        ("--trial 0: RegDB has the trials 1 to 10", *regdb_flags, "--trial", 0),
        ("--trial x", *regdb_flags, "--trial", "x"),
        ("--mode indoor: choose from visible-to", *regdb_flags, "--mode", "indoor"),
        ("--mode nowhere: choose from all, indoor", *sysu_flags, "--mode", "nowhere"),
        ("--shot 10", *regdb_flags, "--shot", 10),
        ("--galleries published", *regdb_flags, "--galleries", "published"),
        ("--save-mat is for SYSU-MM01", *regdb_flags, "--save-mat", tmp_path / "mat"),
        ("--save-features: .*--trial N", *regdb_flags, "--save-features", tmp_path / "f.npz"),
        ("SYSU-MM01 not found", resume, path, "--data-path", tmp_path / "nowhere"),
        ("cannot write in .*file", *sysu_flags, "--json", tmp_path / "file" / "r.json"),
        ("cannot write .*empty: it is a folder", *sysu_flags, "--json", tmp_path / "empty"),
        ("cannot write in .*file", *sysu_flags, "--save-mat", tmp_path / "file"),
    ]
    for setting, value in (("dataset", "market"), ("amp", True), ("img_h", "tall"), ("trial", "x")):
        foreign = write_tiny(tmp_path / f"{setting}.t", args={setting: value})
        message = rf"{setting}\.t: invalid settings: {setting} {value!r}"
        refused.append((message, "--resume", foreign, *rest))
    TinyNetwork.embedded = 0
    for message, *words in refused:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(*words)
        assert "\n" not in str(caught.value)
    assert TinyNetwork.embedded == 0, "refused only after the images were embedded"
    assert not list(tmp_path.rglob("*.part"))


def test_a_checkpoint_of_another_trial_is_refused(trials_of_regdb, regdb, evaluate):
    shutil.copy(trials_of_regdb / "run_trial_2_best.t", trials_of_regdb / "run_trial_5_best.t")
    with pytest.raises(UserError, match=r"run_trial_5_best\.t was trained on trial 2"):
        evaluate("--resume", trials_of_regdb / "run_trial_{trial}_best.t", "--data-path", regdb)


def test_a_missing_file_of_published_galleries_says_where_to_get_it(sysu, tiny, evaluate, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(sysu, root)
    (root / "exp" / "rand_perm_cam.mat").unlink()
    path = write_tiny(tmp_path / "s.t", args={"img_h": 32, "img_w": 16})
    with pytest.raises(UserError, match=r"rand_perm_cam\.mat: missing; the authors of SYSU-MM01 publish it"):
        evaluate("--resume", path, "--data-path", root, "--galleries", "published")


def test_flags_that_do_not_exist_or_fit_are_refused_by_name():
    for words, name in (("--dataset market", "--dataset"), ("--shots 1", "--shots"), ("--shot 2", "--shot")):
        with pytest.raises(UserError, match=name):
            script.get_args_parser().parse_args(["--resume", "x.t", *words.split()])
    with pytest.raises(UserError, match="--resume"):
        script.main([])


def test_the_command(sysu, tmp_path):
    done = run_script("test.py", "--resume", "none.t", "--dataset", "sysu", "--data-path", sysu, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "test.py: error: no file at none.t\n")
    assert not list(tmp_path.iterdir())
