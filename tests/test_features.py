"""evaluation/files.py and features.py: anyone's features give the protocols' numbers, or a line why not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ENVIRONMENT, REPOSITORY

import readers.samples
from data_manager import read_split
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import Features, score
from tests.oracles import evaluate_loop
from utils import UserError

spec = importlib.util.spec_from_file_location("test_script", REPOSITORY / "test.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

LLCM_MODE = "--mode", "visible-to-infrared"
MODES = "--mode", "all", "indoor"


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run test.py here: (its JSON, what it printed, its messages)."""

    def run(*words):
        out = tmp_path / "out.json"
        script.main([*map(str, words), "--gpu", "-1", "--json", str(out)])
        captured = capsys.readouterr()
        return json.loads(out.read_text()), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def images(sysu):
    """Every test image of the tiny SYSU-MM01, and unit features of its persons, less alike in some."""
    rng = np.random.default_rng(0)
    split = read_split("sysu", sysu, "test")
    pids = np.unique(split["visible"].pids)
    centers = rng.standard_normal((len(pids), 12))
    features = {}
    for modality, samples in split.items():
        own = centers[np.searchsorted(pids, samples.pids)]
        own = own + rng.uniform(0.3, 2, (len(own), 1)) * rng.standard_normal(own.shape)
        features[modality] = (own / np.linalg.norm(own, axis=1, keepdims=True)).astype(np.float32)
    return split, features


@pytest.fixture(scope="module")
def expected(sysu, images):
    """The mAP of each trial of all and indoor, from the features themselves."""
    split, features = images
    evaluation = Evaluation.draw(sysu, [Protocol("sysu", "all"), Protocol("sysu", "indoor")], range(10))
    tensors = {modality: torch.from_numpy(own) for modality, own in features.items()}
    scores = score(evaluation, Features.of_images(split, tensors), intervals=False)
    return [[each.metrics.mAP for each in trials] for trials in scores.values()]


def arrays_of(images):
    split, features = images
    return {
        f"{modality}_{key}": value
        for modality, samples in split.items()
        for key, value in (
            ("features", features[modality]),
            ("paths", np.array(samples.paths)),
            ("pids", samples.pids),
            ("camids", samples.camids),
        )
    }


def write_npz(images, folder):
    np.savez(folder / "f.npz", **arrays_of(images))
    return [folder / "f.npz"]


def write_mat(images, folder):
    scipy.io.savemat(folder / "f.mat", arrays_of(images))
    return [folder / "f.mat"]


def write_npy_and_list(images, folder):
    """The images in another order, with paths of another machine, as float64 in big-endian order."""
    split, features = images
    paths = [path for samples in split.values() for path in samples.paths]
    array = np.concatenate(list(features.values()))
    order = np.random.default_rng(1).permutation(len(paths))
    np.save(folder / "f.npy", array[order].astype(">f8"))
    elsewhere = ["D:\\data\\" + "\\".join(Path(paths[k]).parts[-3:]) for k in order]
    (folder / "list.csv").write_text("row,path\n" + "".join(f'{k},"{p}"\n' for k, p in enumerate(elsewhere)))
    return [folder / "f.npy", "--images", folder / "list.csv"]


def write_cells(images, folder):
    split, features = images
    for modality, samples in split.items():
        for camid in np.unique(samples.camids):
            cells = np.empty((1, 600), object)
            for pid in range(1, 601):
                cells[0, pid - 1] = features[modality][(samples.camids == camid) & (samples.pids == pid)]
            scipy.io.savemat(folder / f"feature_cam{camid}.mat", {"feature": cells})
    return [folder]


@pytest.mark.parametrize("write", [write_npz, write_mat, write_npy_and_list, write_cells])
def test_every_format_by_path_gives_the_protocols_numbers(sysu, images, expected, evaluate, tmp_path, write):
    flags = write(images, tmp_path)
    report, out, _ = evaluate("--features", *flags, "--data-path", sysu, *MODES)
    assert [result["mode"] for result in report["results"]] == ["all", "indoor"]
    for result, values in zip(report["results"], expected, strict=True):
        found = [result["trials"][str(trial)]["mAP"] for trial in range(10)]
        np.testing.assert_allclose(found, values, atol=1e-12)
    assert f"{flags[0]}: " in out
    assert "features by path" in out.splitlines()[1]


def test_saved_features_are_read_again(sysu, images, evaluate, tmp_path):
    np.savez(tmp_path / "f.npz", **arrays_of(images))
    again = tmp_path / "again.npz"
    first, _, _ = evaluate("--features", tmp_path / "f.npz", "--data-path", sysu, "--save-features", again)
    second, _, _ = evaluate("--features", again, "--data-path", sysu)
    assert first["results"][0]["mean"] == second["results"][0]["mean"]


def test_matlab_s_cells_are_written_from_features(sysu, images, evaluate, tmp_path):
    flags = write_npy_and_list(images, tmp_path)
    evaluate("--features", *flags, "--data-path", sysu, "--save-mat", tmp_path / "cells")
    flags = [flags[0], tmp_path / "cells", *flags[1:]]
    again, *_ = evaluate("--features", *flags, "--data-path", sysu, *MODES)
    same = [result["difference"] for result in again["results"] if result["method"].endswith("cells")]
    assert [abs(own["mAP"]["value"]) < 1e-12 for own in same] == [True, True]


def test_the_images_are_not_read(sysu, images, evaluate, tmp_path, monkeypatch):
    """Not even to look for copies of training images: that takes longer than all else."""
    monkeypatch.setattr(readers.samples, "same_content", lambda *_: pytest.fail("images are read"))
    evaluate("--features", *write_npz(images, tmp_path), "--data-path", sysu)


# ---- one query and gallery


def pair(images, rng, rows=slice(None)):
    """A query and gallery of SYSU-MM01's all-search in the field's export."""
    split, features = images
    query, gallery = split["infrared"], split["visible"]
    return {
        "query_f": features["infrared"][rows],
        "query_label": query.pids[rows],
        "query_cam": query.camids[rows],
        "gallery_f": features["visible"],
        "gallery_label": gallery.pids,
        "gallery_cam": gallery.camids,
    }


def renamed(arrays, names):
    return {key.split("_")[0] + "_" + names[key.split("_")[1]]: value for key, value in arrays.items()}


@pytest.mark.parametrize("kind", ["npz", "mat", "names", "float16", "float labels"])
def test_the_field_s_export_gives_one_row(images, evaluate, tmp_path, kind):
    arrays = pair(images, None)
    if kind == "names":
        arrays = renamed(arrays, {"f": "feature", "label": "pid", "cam": "camid"})
    if kind == "float16":
        arrays |= {key: arrays[key].astype(np.float16) for key in ("query_f", "gallery_f")}
    if kind == "float labels":
        arrays |= {key: arrays[key].astype(float) for key in ("query_label", "gallery_label")}
    file = tmp_path / ("f.mat" if kind == "mat" else "f.npz")
    (scipy.io.savemat if kind == "mat" else lambda path, a: np.savez(path, **a))(file, arrays)
    report, out, err = evaluate("--features", file, "--dataset", "sysu")
    (result,) = report["results"]
    query, gallery = (arrays[next(k for k in arrays if k.startswith(side))] for side in ("query", "gallery"))
    features = (values.astype(np.float32).astype(np.float64) for values in (query, gallery))
    split, _ = images
    ids = [(split[m].pids, split[m].camids) for m in ("infrared", "visible")]
    q, g = features
    _, mAP, _ = evaluate_loop(-q @ g.T, ids[0][0], ids[1][0], ids[0][1], ids[1][1], "sysu")
    assert result["mean"]["mAP"] == pytest.approx(mAP, abs=1e-3 if kind == "float16" else 1e-12)
    assert result["galleries"] == "the file's"
    assert "the query and gallery of the file" in out.splitlines()[0]
    assert ("stored as float64, and all are whole numbers" in err) == (kind == "float labels")


def test_regdb_needs_no_cameras_but_a_mode(images, evaluate, tmp_path):
    arrays = {key: value for key, value in pair(images, None).items() if not key.endswith("cam")}
    np.savez(tmp_path / "f.npz", **arrays)
    words = "--features", tmp_path / "f.npz", "--dataset", "regdb"
    with pytest.raises(UserError, match="which --mode"):
        evaluate(*words)
    report, _, _ = evaluate(*words, "--mode", "thermal-to-visible")
    q, g = arrays["query_f"].astype(float), arrays["gallery_f"].astype(float)
    ids = arrays["query_label"], arrays["gallery_label"], np.zeros(len(q)), np.zeros(len(g))
    _, mAP, _ = evaluate_loop(-q @ g.T, *ids, "regdb")
    assert report["results"][0]["mean"]["mAP"] == pytest.approx(mAP, abs=1e-12)
    with pytest.raises(UserError, match=r"no query_cam, which the rules of SYSU-MM01 need"):
        evaluate("--features", tmp_path / "f.npz", "--dataset", "sysu")


def test_features_that_are_not_unit_are_divided_and_told(images, evaluate, tmp_path):
    arrays, rng = pair(images, None), np.random.default_rng(0)
    np.savez(tmp_path / "unit.npz", **arrays)
    for side in ("query_f", "gallery_f"):
        arrays[side] = arrays[side] * rng.uniform(0.2, 5, (len(arrays[side]), 1))
    np.savez(tmp_path / "longer.npz", **arrays)
    unit, _, quiet = evaluate("--features", tmp_path / "unit.npz")
    longer, out, told = evaluate("--features", tmp_path / "longer.npz")
    assert longer["results"][0]["mean"]["mAP"] == pytest.approx(unit["results"][0]["mean"]["mAP"], abs=1e-6)
    assert "not unit" not in quiet
    assert told.count("features are not unit (norms 0.") == 2
    assert "divided by norms of 0." in out.splitlines()[1]


@pytest.mark.parametrize("kind", ["nearly unit", "huge", "tiny"])
def test_the_cosine_is_of_unit_features_whatever_their_lengths(images, evaluate, tmp_path, kind):
    arrays, rng = pair(images, None), np.random.default_rng(0)
    np.savez(tmp_path / "unit.npz", **arrays)
    for side in ("query_f", "gallery_f"):
        length = rng.uniform(0.9901, 1.0099, (len(arrays[side]), 1))
        length = {"huge": 1e60, "tiny": 1e-60}.get(kind, length)
        arrays[side] = arrays[side].astype(float) * length
    np.savez(tmp_path / "longer.npz", **arrays)
    report, _, told = evaluate("--features", tmp_path / "unit.npz", tmp_path / "longer.npz")
    one, other = (result["mean"]["mAP"] for result in report["results"])
    assert one == pytest.approx(other, abs=1e-12)
    assert ("features are not unit" in told) == (kind != "nearly unit")


def test_the_euclidean_distance_is_of_features_as_they_are(images, evaluate, tmp_path):
    """Also far away from 0, where squares of lengths would cancel."""
    arrays, rng = pair(images, None), np.random.default_rng(0)
    for side in ("query_f", "gallery_f"):
        arrays[side] = (arrays[side] * rng.uniform(0.2, 5, (len(arrays[side]), 1)) + 100).astype(np.float32)
    np.savez(tmp_path / "f.npz", **arrays)
    report, out, _ = evaluate("--features", tmp_path / "f.npz", "--distance", "euclidean")
    q, g = (arrays[side].astype(float) for side in ("query_f", "gallery_f"))
    distmat = np.linalg.norm(q[:, None] - g, axis=2)
    ids = (arrays[f"{side}_{key}"] for key in ("label", "cam") for side in ("query", "gallery"))
    _, mAP, _ = evaluate_loop(distmat, *ids, "sysu")
    assert report["results"][0]["mean"]["mAP"] == pytest.approx(mAP, abs=1e-4)
    assert "Euclidean distance" in out.splitlines()[1]
    with pytest.raises(UserError, match="--rerank"):
        evaluate("--features", tmp_path / "f.npz", "--distance", "euclidean", "--rerank", "aim")


# ---- several methods


def test_methods_are_compared_with_the_first(sysu, images, evaluate, tmp_path):
    split, features = images
    np.savez(tmp_path / "a.npz", **arrays_of(images))
    rng = np.random.default_rng(5)
    worse = {m: own + 0.5 * rng.standard_normal(own.shape).astype(np.float32) for m, own in features.items()}
    np.savez(tmp_path / "b.npz", **arrays_of((split, worse)))
    words = "--features", tmp_path / "a.npz", tmp_path / "b.npz", "--data-path", sysu, *MODES
    report, out, _ = evaluate(*words)
    assert [Path(result["method"]).name for result in report["results"]] == ["a.npz", "b.npz"] * 2
    for first, second in zip(report["results"][::2], report["results"][1::2], strict=True):
        assert first["difference"] is None
        expected = second["mean"]["mAP"] - first["mean"]["mAP"]
        assert second["difference"]["mAP"]["value"] == pytest.approx(expected, abs=1e-12)
    lines = out.split("\nprotocol")[1].splitlines()
    assert [line[:3] for line in lines[1:]] == ["A: ", "B: "] * 2
    assert "difference of mAP to A" in lines[0]


def test_each_method_s_counts_are_told(images, evaluate, tmp_path):
    arrays = pair(images, None)
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **{k: v[1:] if k.startswith("query") else v for k, v in arrays.items()})
    report, out, _ = evaluate("--features", tmp_path / "a.npz", tmp_path / "b.npz")
    number = len(arrays["query_label"])
    assert re.search(rf"file's gallery: {number} queries.*; or {number - 1} queries", out)
    assert [result["std"] for result in report["results"]] == [None, None]  # of one gallery


def test_what_is_not_paired_is_not_subtracted(sysu, images, evaluate, tmp_path):
    np.savez(tmp_path / "a.npz", **pair(images, None))
    np.savez(tmp_path / "b.npz", **pair(images, None, slice(3, None)))
    report, out, _ = evaluate("--features", tmp_path / "a.npz", tmp_path / "b.npz")
    assert report["results"][1]["difference"] is None
    assert "not paired" in out


def test_seeds_are_averaged_and_both_sources_named(sysu, images, evaluate, tmp_path):
    split, features = images
    rng, means = np.random.default_rng(5), []
    for seed in (3, 10, 21):
        noisy = {
            m: own + 0.2 * rng.standard_normal(own.shape).astype(np.float32) for m, own in features.items()
        }
        np.savez(tmp_path / f"run_seed{seed}.npz", **arrays_of((split, noisy)))
        report, _, _ = evaluate("--features", tmp_path / f"run_seed{seed}.npz", "--data-path", sysu)
        means.append(report["results"][0]["mean"]["mAP"])
    report, out, _ = evaluate("--features", tmp_path / "run_seed{seed}.npz", "--data-path", sysu)
    (result,) = report["results"]
    assert result["mean"]["mAP"] == pytest.approx(np.mean(means), abs=1e-12)
    assert result["std_over_seeds"]["mAP"] == pytest.approx(np.std(means), abs=1e-12)
    assert "mean over 10 trials and 3 seeds" in out.splitlines()[0]
    assert "variation of training, deviation over 3 seeds: rank-1 " in out
    assert "variation of the gallery, deviation over 10 trials: rank-1 " in out
    with pytest.raises(UserError, match="no file with the number of a seed"):
        evaluate("--features", tmp_path / "other{seed}.npz", "--data-path", sysu)


# ---- what is refused


def changed(arrays, **values):
    return arrays | values


def test_what_is_wrong_is_told_in_one_line(sysu, images, evaluate, tmp_path):
    bare, by_path = pair(images, None), arrays_of(images)
    bad = bare["query_f"].copy()
    bad[[2, 5]] = np.nan
    same = np.ones_like(bare["query_f"])
    short = {k: v[1:] if k.startswith("visible") else v for k, v in by_path.items()}
    double = {k: np.concatenate([v, v[:1]]) if k.startswith("visible") else v for k, v in by_path.items()}
    other = by_path["visible_pids"].copy()
    other[0] += 1
    swapped = {
        {"query": "gallery", "gallery": "query"}[k.split("_")[0]] + "_" + k.split("_")[1]: v
        for k, v in bare.items()
    }
    text = by_path | {"visible_pids": by_path["visible_pids"].astype(str)}
    zero = bare["gallery_f"] * (np.arange(len(bare["gallery_f"])) > 0)[:, None]
    ones = np.ones_like(by_path["visible_features"])
    multiples = np.outer(bare["gallery_label"], bare["query_f"][0])
    half, n = bare["query_label"] + 0.5, len(by_path["visible_pids"])
    cases = [
        ("2 features are not finite, for instance of .*query 2", changed(bare, query_f=bad)),
        ("all .* features are equal", changed(bare, query_f=same)),
        ("a feature is zero: .*gallery 0", changed(bare, gallery_f=zero)),
        ("query_label must be whole numbers, and .*5 is none", changed(bare, query_label=half)),
        ("query and gallery are swapped for all: query cameras", swapped),
        ("they count from 0", {k: v - 1 if k.endswith("cam") else v for k, v in bare.items()}),
        ("no query_label", {k: v for k, v in bare.items() if k != "query_label"}),
        ("query_label and query_pid: which one", changed(bare, query_pid=bare["query_label"])),
        (r"features \(12, .*features are \(N, D\)", changed(bare, query_f=bare["query_f"].T)),
        ("lengths", changed(bare, query_f=bare["query_f"][:, :5])),
        ("floating-point", changed(bare, query_f=(100 * bare["query_f"]).astype(np.int64))),
        (r"1 of .* images of SYSU-MM01 are missing, for instance cam\d/", short),
        ("1 of .* images are there twice, for instance", double),
        (r"1 of .* images have another id than the dataset's, .*\(id", changed(by_path, visible_pids=other)),
        ("visible_pids must be whole numbers", text),
        ("lacks visible_paths", {k: v for k, v in by_path.items() if k != "visible_paths"}),
        ("visible_pids for features", changed(by_path, visible_pids=by_path["visible_pids"][5:])),
        ("visible_features must be floating-point numbers", changed(by_path, visible_features=np.float32(3))),
        ("query_f must be floating-point numbers", changed(bare, query_f=np.float32(3))),
        ("visible: all .* equal", changed(by_path, visible_features=ones)),
        ("gallery: all .* equal", changed(bare, gallery_f=multiples)),
        ("are there twice", changed(by_path, visible_paths=by_path["visible_paths"][[0, *range(n - 1)]])),
    ]  # fmt: skip
    for number, (message, arrays) in enumerate(cases):
        file = tmp_path / f"case{number}.npz"
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=message) as caught:
            evaluate("--features", file, "--data-path", sysu, "--shot", 1, "--allow-short", "--mode", "all")
        assert "\n" not in str(caught.value)
        assert file.name in str(caught.value)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "broken.mat").write_bytes(b"no MATLAB")
    (tmp_path / "hdf.mat").write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"
    )
    np.save(tmp_path / "f.npy", bare["query_f"])
    (tmp_path / "list.txt").write_text("cam1/0001/0001.jpg\n")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "good.npz", **bare)
    _, first = np.unique([bare["gallery_label"], bare["gallery_cam"]], axis=1, return_index=True)
    np.savez(tmp_path / "single.npz", **{k: v[first] if k.startswith("g") else v for k, v in bare.items()})
    np.savez(tmp_path / "llcm.npz", **changed(bare, gallery_cam=np.full(len(bare["gallery_cam"]), 3)))
    for message, *words in (
        ("no such file", tmp_path / "none.npz"),
        ("not a complete .npz", tmp_path / "broken.npz"),
        ("not a complete .*MATLAB", tmp_path / "broken.mat"),
        ("MATLAB 7.3 file; save it with -v7", tmp_path / "hdf.mat"),
        ("a .npy needs --images LIST", tmp_path / "f.npy"),
        ("1 paths for features", tmp_path / "f.npy", "--images", tmp_path / "list.txt"),
        ("no feature_cam<N>.mat", tmp_path / "folder"),
        ("not a .npz, .mat or .npy", tmp_path / "list.txt"),
        ("SYSU-MM01's MATLAB cells, not regdb", tmp_path / "folder", "--dataset", "regdb"),
        ("--flip", tmp_path / "case0.npz", "--flip"),
        ("--images .*none.txt: no such file", tmp_path / "f.npy", "--images", tmp_path / "none.txt"),
        ("--images list.txt: it says what the rows of", tmp_path / "good.npz", "--images", "list.txt"),
        ("--features .*good.npz: given twice", tmp_path / "good.npz", tmp_path / "good.npz"),
        ("--amp, --img-h: for networks", tmp_path / "good.npz", "--img_h", "48", "--amp=off"),
        ("--trial 3: .*holds one query and gallery", tmp_path / "good.npz", "--trial", "3"),
        ("--galleries published: .*its own gallery", tmp_path / "good.npz", "--galleries", "published"),
        ("not a gallery of --mode indoor: query cameras", tmp_path / "good.npz", "--mode", "indoor"),
        ("one gallery image of an id and camera", tmp_path / "single.npz", "--shot", "10"),
        ("--save-mat: .*does not say which images", tmp_path / "good.npz", "--save-mat", tmp_path / "m"),
        (
            "--save-features: .*does not say which",
            tmp_path / "good.npz",
            "--save-features",
            tmp_path / "m.npz",
        ),
        (
            "not LLCM's visible queries in a gallery of infrared",
            tmp_path / "llcm.npz",
            "--dataset",
            "llcm",
            *LLCM_MODE,
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("--features", *words, "--data-path", sysu)
    with pytest.raises(UserError, match="nothing to evaluate"):  # not that --amp is for networks
        evaluate("--amp", "off", "--data-path", sysu)


def test_other_images_and_ids_are_told_and_not_used(sysu, images, expected, evaluate, tmp_path):
    arrays = arrays_of(images)
    more = {
        "features": arrays["visible_features"][:2],
        "paths": ["x/cam1/0900/0001.jpg", "y"],
        "pids": [900, 901],
    }
    for key, values in more.items():
        arrays[f"visible_{key}"] = np.concatenate([arrays[f"visible_{key}"], values])
    np.savez(tmp_path / "f.npz", **arrays)
    report, _, err = evaluate("--features", tmp_path / "f.npz", "--data-path", sysu, *MODES)
    assert report["results"][0]["trials"]["0"]["mAP"] == pytest.approx(expected[0][0], abs=1e-12)
    assert "of 2 ids that it lacks (such as 900), for instance" in err
    bare = pair(images, None)
    bare = {key: value - 1 if key.endswith("label") else value for key, value in bare.items()}
    np.savez(tmp_path / "b.npz", **bare)
    _, _, err = evaluate("--features", tmp_path / "b.npz", "--data-path", sysu)
    assert "ids are not test ids of SYSU-MM01, for instance" in err


# ---- speed and size


def test_files_are_judged_without_the_network_s_code(images, tmp_path):
    np.savez(tmp_path / "f.npz", **pair(images, None))
    code = (
        "import runpy, sys; sys.argv = ['test.py', '--features', 'f.npz', '--gpu', '-1']\n"
        f"try: runpy.run_path({str(REPOSITORY / 'test.py')!r}, run_name='__main__')\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print(*sorted({'torchvision', 'model', 'data_loader', 'augmentation', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "mAP" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
