"""The released code's and AGW's networks give their outputs, in every command; other networks are refused."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_images, outputs, run_script

from checkpoints import image_size, load_checkpoint
from model import TwoStreamResNet, extract_features, folded, from_checkpoint
from retrieval.embeddings import open_embedder
from retrieval.shards import read_manifest
from utils import UserError

GOLDEN = Path(__file__).parent / "golden"


def make_checkpoint(*words):
    """Run tests/golden/make_checkpoint.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, words)])
        runpy.run_path(str(GOLDEN / "make_checkpoint.py"))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "released.t"
    make_checkpoint(path)
    return path


def test_the_released_checkpoint_gives_the_released_outputs(released):
    golden = np.load(GOLDEN / "backbone.npz")
    model = from_checkpoint(released)
    assert (model.arch, model.stem, model.training) == ("resnet50", "shared", False)
    images = torch.tensor(np.random.RandomState(33).standard_normal((3, 3, 96, 48)), dtype=torch.float32)
    with torch.no_grad():
        np.testing.assert_allclose(model.pooled(visible=images).numpy(), golden["raw"], atol=1e-4, rtol=1e-4)
    features = extract_features(model, [images[:2], images[2:]], "infrared")
    np.testing.assert_allclose(features.numpy(), golden["y"], atol=1e-4)


def test_class_memories_and_wrappers_in_a_released_checkpoint_are_left_out(released, tmp_path):
    checkpoint = torch.load(released, weights_only=False)
    net = {f"module.{key}": value for key, value in checkpoint["net"].items()}
    tables = {name: torch.zeros(4, 2048) for name in ("memory_rgb.features", "classifier.weight")}
    checkpoint["net"] = net | {f"module.{name}": table for name, table in tables.items()}
    torch.save(checkpoint, tmp_path / "wrapped.t")
    model, plain = from_checkpoint(tmp_path / "wrapped.t"), from_checkpoint(released)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_released_checkpoint_without_some_weights_is_refused(released, tmp_path):
    checkpoint = torch.load(released, weights_only=False)
    del checkpoint["net"]["backbone.NL_2.1.phi.weight"]
    torch.save(checkpoint, tmp_path / "broken.t")
    with pytest.raises(UserError, match=r"broken\.t does not fit.*theta_phi_g"):
        from_checkpoint(tmp_path / "broken.t")


@pytest.mark.parametrize("wrap", ["model", None])
def test_the_released_weights_are_read_bare_or_wrapped(wrap, released, tmp_path):
    weights = torch.load(released, weights_only=False)["net"]
    torch.save({wrap: weights} if wrap else weights, tmp_path / "run.t")
    model, plain = from_checkpoint(tmp_path / "run.t"), from_checkpoint(released)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("added", "shape"),
    [
        ("backbone.attention.fc.weight", (3,)),
        ("part_pool.weight", (3,)),
        ("backbone.NL_4.0.W.0.bias", (3,)),
        ("classifier.layers.0.weight", (3, 2048)),  # more than a table
        ("memory_attention.weight", (3, 2048, 1, 1)),  # a convolution
    ],
)
def test_a_module_that_the_released_network_lacks_is_refused_by_name(added, shape, released, tmp_path):
    checkpoint = torch.load(released, weights_only=False)
    checkpoint["net"][added] = torch.zeros(shape)
    torch.save(checkpoint, tmp_path / "more.t")
    with pytest.raises(UserError, match=rf"more\.t: {added} is no part of .*--features"):
        from_checkpoint(tmp_path / "more.t")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """{kind: path} of AGW's own files: the network and its plain baseline."""
    folder = tmp_path_factory.mktemp("family")
    for kind in ("agw", "base"):
        make_checkpoint(folder / f"{kind}.t", kind)
    return {kind: folder / f"{kind}.t" for kind in ("agw", "base")}


def agw_images(dtype):
    rng = np.random.RandomState(7)
    return [torch.tensor(rng.standard_normal((2, 3, 96, 48)).astype("f4"), dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("kind", ["agw", "base"])
@pytest.mark.parametrize("fold", [False, True])
def test_agw_s_files_give_agw_s_outputs(kind, fold, family):
    golden = np.load(GOLDEN / "agw.npz")
    model = from_checkpoint(family[kind]).double()
    assert (model.arch, model.stem, model.training) == ("resnet50", "two-stream", False)
    with torch.no_grad():
        outputs, pooled = (folded(model) if fold else model)(*agw_images(torch.float64), with_pooled=True)
    np.testing.assert_allclose(F.normalize(pooled).numpy(), golden[f"{kind}_pool"], atol=1e-6)
    np.testing.assert_allclose(F.normalize(outputs).numpy(), golden[f"{kind}_fc"], atol=1e-6)


@pytest.mark.parametrize("kind", ["agw", "base"])
def test_training_starts_from_agw_s_network(kind, family):
    expected, model = outputs(from_checkpoint(family[kind])), TwoStreamResNet(weights=str(family[kind]))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-3, atol=1e-3)
    assert model.pool.p.item() == (3 if kind == "agw" else 1)
    with pytest.raises(UserError, match=r"base\.t holds a resnet50 with a two-stream stem"):
        TwoStreamResNet("resnet50", "shared", str(family["base"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_wrapped_and_in_a_legacy_file(dtype, family, tmp_path):
    net = torch.load(family["agw"], weights_only=False)["net"]
    net = {
        f"module.{key}": value.to(dtype) if value.is_floating_point() else value for key, value in net.items()
    }
    torch.save({"state_dict": net}, tmp_path / "half.t", _use_new_zipfile_serialization=False)
    model = from_checkpoint(tmp_path / "half.t")
    assert model.neck.weight.dtype == torch.float32
    same = (F.normalize(outputs(model)) * F.normalize(outputs(from_checkpoint(family["agw"])))).sum(1)
    assert same.min() > 0.999


def test_agw_s_wide_non_local_blocks_and_other_additions_are_refused(family, tmp_path):
    checkpoint = torch.load(family["agw"], weights_only=False)
    for key, shape in (("theta", (256, 512, 1, 1)), ("phi", (256, 512, 1, 1)), ("g.0", (256, 512, 1, 1))):
        checkpoint["net"][f"NL_2.0.{key}.weight"] = torch.zeros(shape)
    torch.save(checkpoint, tmp_path / "wide.t")
    with pytest.raises(UserError, match=r"wide\.t: its non-local blocks have 256 inner channels"):
        from_checkpoint(tmp_path / "wide.t")
    checkpoint = torch.load(family["base"], weights_only=False)
    checkpoint["net"]["part_attention.weight"] = torch.zeros(2)
    torch.save(checkpoint, tmp_path / "more.t")
    with pytest.raises(UserError, match=r"more\.t: part_attention\.weight is no part"):
        from_checkpoint(tmp_path / "more.t")


def test_training_starts_from_the_released_codes_network_with_either_stem(released):
    expected = outputs(from_checkpoint(released))
    for stem in ("shared", "two-stream"):
        torch.testing.assert_close(outputs(TwoStreamResNet("resnet50", stem, str(released))), expected)


# --- the size of the images, and every command


def test_the_size_is_as_typed_or_the_family_s_and_said(family, released, caplog):
    caplog.set_level("INFO")
    checkpoint = load_checkpoint(family["base"])
    assert image_size(checkpoint, "base.t", None, None, "sysu") == (288, 144)
    assert caplog.messages == ["base.t does not say its images' size: 288x144, unless --img-h and --img-w do"]
    caplog.clear()
    assert image_size(checkpoint, "base.t", 64, 32, "sysu") == (64, 32)
    checkpoint["args"] = {"img_h": 384, "img_w": 192, "trial": 1}  # a fork that says more than its family
    assert image_size(checkpoint, "base.t", None, None, "sysu") == (384, 192)
    assert image_size(load_checkpoint(released), "released.t", None, None, "llcm") == (384, 144)
    assert caplog.messages == []


def test_every_command_reads_agw_s_files(family, sysu, tmp_path):
    paths = draw_images(tmp_path / "in", 2)
    sizes = "--img-h", "32", "--img-w", "16", "--gpu", "-1", "--amp", "off"
    network = "--resume", family["base"], "--data-path", sysu, *sizes
    for words in (
        ("test.py", *network, "--trial", "0", "--dataset", "sysu"),
        ("tools.report", *network, "--output", "page"),
    ):
        done = run_script(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    words = "--resume", family["agw"], "--images", tmp_path / "in", "--modality", "infrared"
    done = run_script("tools.embed", *words, "--output", "out", "--gpu", "-1", "--amp", "off", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "agw.t does not say its images' size: 288x144" in done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.height, manifest.width, manifest.dim) == (288, 144, 2048)
    embedder, _ = open_embedder(family["agw"], 32, 16)
    pixels = torch.from_numpy(np.stack([embedder.pixels(path) for path in paths]))
    assert pixels.shape == (2, 32, 16, 3)
    torch.testing.assert_close(embedder(paths, "visible").norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", ["DEEN", "unknown"])
def test_test_py_refuses_another_network_in_one_line(kind, sysu, tmp_path):
    weights = {"DEE.FC11.weight": torch.zeros(1), "visible_module.visible.conv1.weight": torch.zeros(1)}
    torch.save(
        {"net": weights if kind == "DEEN" else {"encoder.weight": torch.zeros(1)}}, tmp_path / "other.t"
    )
    words = "--resume", "other.t", "--data-path", sysu, "--dataset", "sysu", "--gpu", "-1"
    done = run_script("test.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "other.t" in last, done.stderr
    assert "test.py --features" in last
    assert ("DEEN" in last) == (kind == "DEEN")
