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

from evaluation.runtimes import Graph, OtherRuntime, for_evaluation, to_onnx
from model import extract_features
from retrieval.embeddings import open_embedder
from tools import export
from utils import UserError

onnx_installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))),
    reason="ONNX is not installed: pip install onnx onnxruntime",
)


openvino_installed = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason="OpenVINO is not installed: pip install openvino"
)
RUNTIMES = ["onnx", pytest.param("openvino", marks=openvino_installed)]


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
@pytest.mark.parametrize("type_", ["uint8", "float32"])
def test_batches_of_any_size(type_, tmp_path, images):
    import onnxruntime

    checkpoint = random_checkpoint(tmp_path / "a.t")
    words = "--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in"
    run(*words, "--input", type_)
    session = onnxruntime.InferenceSession(tmp_path / "m_visible.onnx")
    embedder, _ = open_embedder(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 16, 3), dtype=np.uint8)
    wanted = embedder([Image.fromarray(one) for one in pixels], "visible")
    for number in (1, 2, 7, 1):
        (found,) = session.run(None, {"images": pixels[:number].astype(type_)})
        np.testing.assert_allclose(found, wanted[:number], atol=1e-5)


@onnx_installed
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_shared_stem_makes_one_graph_and_its_check(runtime, tmp_path, images, capsys):
    checkpoint = random_checkpoint(tmp_path / "a.t", stem="shared")
    words = "--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in"
    run(*words, "--check", runtime)
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m.onnx", "m_check.npz"]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path / 'm.onnx'} in {runtime}: lengths within ")
    assert float(first.split("largest difference ")[1].split(",")[0]) < 1e-5
    assert first.endswith("nearest neighbour kept by 5 of 5 (5 images)")
    # the line that is printed, with ONNX Runtime for another runtime
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = {"np": np, "YOURS": lambda images: session.run(None, {"images": images})[0]}
    load, compare = last.removeprefix("in any runtime: ").split("; ")
    exec(load, names)
    assert eval(compare, names)
    assert not eval(compare, names | {"YOURS": lambda images: names["checked"]["features"][::-1]})


@onnx_installed
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_graph_has_only_what_every_runtime_gets_right(arch, tmp_path):
    """No sums of logarithms, idle casts, shapes, late opsets: docs/runtimes.md says where each fails."""
    import onnx

    embedder, _ = open_embedder(random_checkpoint(tmp_path / "a.t", arch=arch))
    for pixels, casts in ((torch.uint8, 1), (torch.float32, 0)):
        example = torch.zeros(2, 32, 16, 3, dtype=pixels)
        graph = onnx.load_from_string(to_onnx(Graph(embedder.network, "visible"), example))
        kinds = [node.op_type for node in graph.graph.node]
        assert [opset.version for opset in graph.opset_import] == [17]
        # OpenVINO ignores the axes of these, MNN those of the others from opset 18 on.
        assert not {"ReduceLogSumExp", "ReduceLogSum", "ReduceL1"} & set(kinds)
        assert {"ReduceMean", "ReduceL2"} <= set(kinds)
        assert kinds.count("Cast") == casts  # ncnn stops at one, converters to float16 trip over them
        assert not {"Shape", "Expand", "Gather", "ConstantOfShape"} & set(kinds)
        assert kinds.count("BatchNormalization") == 1  # the neck: the others are in the convolutions


def wrong(change):
    """A stand-in for to_onnx: the graph of a network whose outputs change changes."""

    class Wrong(torch.nn.Module):
        def __init__(self, graph):
            super().__init__()
            self.graph = graph

        def forward(self, images):
            return change(self.graph(images))

    return lambda module, example: to_onnx(Wrong(module), example)


@onnx_installed
@pytest.mark.parametrize(
    "change",
    [
        lambda features: features * 1.001,  # a length, which a cosine does not see
        lambda features: features.flip(0),  # images change places, but for a batch of one
        lambda features: features / features.shape[0] ** 0.5,  # right for a batch of one
        lambda features: features + 0.01 * features[:, :1],
    ],
)
def test_a_graph_that_differs_is_refused(tmp_path, images, monkeypatch, change):
    checkpoint = random_checkpoint(tmp_path / "a.t")
    monkeypatch.setattr(export, "to_onnx", wrong(change))
    with pytest.raises(UserError, match=r"m_visible.onnx is not written: its features differ from torch's"):
        run("--resume", checkpoint, "--output", tmp_path / "m.onnx", "--images", tmp_path / "in")
    assert list(tmp_path.glob("m*")) == []


def test_the_check_sees_neighbours():
    features = np.eye(4, 8)
    features[1, 0], features[2, 3] = 0.50001, 0.5  # rows 1 and 0, 2 and 3 are alike
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    words, good = export.check(features, features)
    assert good
    assert words.endswith("kept by 4 of 4")
    assert export.check(features[:1], features[:1])[1]
    swapped = features[[0, 2, 1, 3]]
    words, good = export.check(swapped, features)
    assert not good
    assert not words.endswith("kept by 4 of 4")
    assert not export.check(features * np.float32(1.001), features)[1]
    assert not export.check(features * np.float32(np.nan), features)[1]


@onnx_installed
@pytest.mark.parametrize("stem", ["two-stream", "shared"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_in_another_runtime_gives_torch_s_features(runtime, stem, tmp_path):
    embedder, _ = open_embedder(random_checkpoint(tmp_path / "a.t", stem=stem))
    network, cpu = embedder.network, torch.device("cpu")
    other = for_evaluation(network, cpu, runtime, (32, 16))
    assert isinstance(other, OtherRuntime)
    images = torch.randn(5, 3, 32, 16).to(memory_format=torch.channels_last)
    for modality in ("visible", "infrared", "aux"):
        for flip in (False, True):
            wanted = extract_features(network, [images[:2], images[2:]], modality, flip=flip)
            found = extract_features(other, [images[:2], images[2:]], modality, flip=flip)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=rf"--runtime {runtime} runs on the CPU: add --gpu -1"):
        for_evaluation(network, torch.device("cuda"), runtime, (32, 16))
    with pytest.raises(UserError, match="does not compute in fp16: add --amp off"):
        for_evaluation(network, cpu, runtime, (32, 16), "fp16")


@onnx_installed
def test_commands_take_a_runtime(sysu, images, tmp_path):
    checkpoint = random_checkpoint(tmp_path / "a.t", dataset="sysu")
    tables, shards = [], []
    for runtime in ("torch", "onnx"):
        common = ["--resume", checkpoint, "--gpu", "-1", "--runtime", runtime]
        done = run_script("test.py", *common, "--data-path", sysu, "--trial", "0", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout)
        words = "--images", tmp_path / "in", "--modality", "infrared", "--output", runtime
        done = run_script("tools.embed", *common, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (shard,) = (tmp_path / runtime).glob("*.npy")
        shards.append(np.load(shard).astype(np.float32))
    assert tables[0] == tables[1]
    np.testing.assert_allclose(*shards, atol=2e-3)


@pytest.mark.parametrize(
    ("missing", "runtime"), [("onnx", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")]
)
@onnx_installed
def test_without_a_runtime_one_line_says_what_to_install(tmp_path, images, monkeypatch, missing, runtime):
    monkeypatch.setitem(sys.modules, missing, None)
    words = "--resume", random_checkpoint(tmp_path / "a.t"), "--images", tmp_path / "in", "--check", runtime
    with pytest.raises(UserError, match=f"need {missing}: pip install {missing}$"):
        run(*words, "--output", tmp_path / "m.onnx")
    assert list(tmp_path.glob("m*")) == []


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
        found = Graph(embedder.network, "infrared")(pixels)
    wanted = embedder([Image.fromarray(one.numpy()) for one in pixels], "infrared")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
