"""tools.export: graphs that give test.py's features, for any batch, or none at all."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, draw_images, random_checkpoint, run_script
from PIL import Image

from retrieval.embeddings import open_embedder
from tools import export
from utils import UserError

onnx_installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
    reason="ONNX is not installed: pip install onnx onnxruntime",
)


def run(*words):
    return export.main(export.get_args_parser().parse_args(list(map(str, words))))


@pytest.fixture
def images(tmp_path):
    return draw_images(tmp_path / "in", 5, size=(20, 50))


@onnx_installed
def test_the_example_gives_test_py_s_feature(sysu, tmp_path, images):
    """A PNG through Pillow, NumPy and onnxruntime, as users copy it."""
    checkpoint = random_checkpoint(tmp_path / "a.t", dataset="sysu")
    root = shutil.copytree(sysu, tmp_path / "sysu")
    for camera in ("cam3", "cam6"):
        for path in root.joinpath(camera).rglob("*.jpg"):
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
    words = ["--resume", checkpoint, "--data-path", root, "--gpu", "-1", "--amp", "off", "--trial", "0"]
    done = run_script("test.py", *words, "--save-features", "f.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "f.npz") as saved:
        paths, wanted = saved["infrared_paths"].tolist(), saved["infrared_features"]
    assert all(path.endswith(".png") for path in paths)

    run("--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", root)
    specification = importlib.util.spec_from_file_location("example", REPOSITORY / "docs" / "onnx_example.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    found = example.embed(str(tmp_path / "m_infrared.onnx"), paths)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(example.embed(str(tmp_path / "m_visible.onnx"), paths) - wanted).max() > 1e-2
    done = run_script("docs/onnx_example.py", tmp_path / "m_infrared.onnx", *paths[:2], cwd=tmp_path)
    assert done.stdout.splitlines()[0].split() == ["[[1.", f"{wanted[0] @ wanted[1]:.4f}".rstrip("0") + "]"]


@onnx_installed
def test_batches_of_any_size(tmp_path, images):
    import onnxruntime

    checkpoint = random_checkpoint(tmp_path / "a.t")
    run("--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in")
    session = onnxruntime.InferenceSession(tmp_path / "m_visible.onnx")
    embedder, _ = open_embedder(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 16, 3), dtype=np.uint8)
    wanted = embedder([Image.fromarray(one) for one in pixels], "visible")
    for number in (1, 2, 7):
        (found,) = session.run(None, {"images": pixels[:number]})
        np.testing.assert_allclose(found, wanted[:number], atol=1e-5)


@onnx_installed
def test_a_shared_stem_makes_one_graph(tmp_path, images, capsys):
    checkpoint = random_checkpoint(tmp_path / "a.t", stem="shared")
    run("--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in")
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["m.onnx"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'm.onnx'}: cosine with torch at least ")
    assert float(line.split("at least ")[1].split()[0]) >= 0.99999


@onnx_installed
def test_a_graph_that_differs_is_refused(tmp_path, images, monkeypatch):
    checkpoint = random_checkpoint(tmp_path / "a.t")
    monkeypatch.setattr(export, "MEAN", export.MEAN[::-1].copy())  # BGR for RGB
    with pytest.raises(UserError, match=r"m_visible.onnx is not written: its features differ from torch's"):
        run("--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in")
    assert list(tmp_path.glob("*.onnx")) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_onnx_one_line_says_what_to_install(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        run("--resume", tmp_path / "a.t", "--output", tmp_path / "m.onnx")


@onnx_installed
def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = random_checkpoint(tmp_path / "a.t")
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["--output", "m.pt"], r"--output m.pt: a name that ends in .onnx"),
        (["--output", "m.onnx"], r"--images DIR: give some images"),
        (["--output", "m.onnx", "--images", "empty"], r"--images empty: no images there"),
    ):
        with pytest.raises(UserError, match=message):
            run("--resume", checkpoint, *words)
    assert os.listdir(Path("empty")) == []


def test_the_exported_network_is_the_embedder_s(tmp_path, images):
    """In torch, whatever is installed."""
    embedder, _ = open_embedder(random_checkpoint(tmp_path / "a.t"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path).resize((16, 32))) for path in images]))
    with torch.no_grad():
        found = export.Graph(embedder.network, "infrared")(pixels)
    wanted = embedder([Image.fromarray(one.numpy()) for one in pixels], "infrared")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
