"""The network in other runtimes: as an ONNX graph, which ONNX Runtime or OpenVINO runs on the CPU."""

import importlib
import io
import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import nn

from augmentation import MEAN, STD
from evaluation.flags import RUNTIMES as RUNTIMES
from model import folded
from utils import UserError

OPSET = 17  # ONNX Runtime has it since 1.12; from 18 on, some runtimes ignore the axes of norms


class Graph(nn.Module):
    """What is exported: images (N, H, W, 3) RGB, 0 to 255 -> unit features (N, D) float32, of one modality.

    Float or uint8 pixels; the network is folded, see model.folded.
    """

    def __init__(self, network: nn.Module, modality: str):
        super().__init__()
        self.network, self.modality = network, modality
        self.register_buffer("mean", 255 * torch.from_numpy(MEAN))
        self.register_buffer("std", 255 * torch.from_numpy(STD))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise the pixels, embed them, normalise the features."""
        pixels = images if images.is_floating_point() else images.float()
        normalized = ((pixels - self.mean) / self.std).permute(0, 3, 1, 2)
        outputs = self.network(**{self.modality: normalized})
        return outputs / outputs.norm(dim=1, keepdim=True).clamp(min=1e-12)  # normalize would expand shapes


class Outputs(nn.Module):
    """What `--runtime` runs: normalised images (N, 3, H, W) float32 -> BNNeck outputs (N, D)."""

    def __init__(self, network: nn.Module, modality: str):
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images."""
        return self.network(**{self.modality: images})


def needed(name: str) -> ModuleType:
    """The module called name; UserError, saying what to install, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"other runtimes than torch need {name}: pip install {name}") from error


def to_onnx(module: nn.Module, example: torch.Tensor) -> bytes:
    """The ONNX file of a module from `images` (the example's shape, any number) to `features`."""
    needed("onnx")  # by torch's exporter
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # Of torch's two exporters the older one, which needs ONNX alone; the check tells whether it erred.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (example,), file, dynamo=False, opset_version=OPSET,
            input_names=["images"], output_names=["features"],
            dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        )  # fmt: skip
    return file.getvalue()


def open_graph(
    graph: bytes, runtime: str, dtype: torch.dtype | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images to features, computed by runtime with torch's number of threads.

    dtype: OpenVINO's precision, None for float32, which it would not keep to by itself on every CPU.
    UserError: the runtime is not installed.
    """
    threads = torch.get_num_threads()
    if runtime == "onnx":
        onnxruntime = needed("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["features"], {"images": images})[0]
    openvino = needed("openvino")
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    return lambda images: compiled(images)[0]


class OtherRuntime(nn.Module):
    """A network that another runtime runs on the CPU; extract_features takes it for a TwoStreamResNet."""

    def __init__(
        self, network: nn.Module, runtime: str, height: int, width: int, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.dim, self.stem, self.dtype = network.dim, network.stem, dtype
        example = torch.zeros(2, 3, height, width)
        stems = ("visible",) if network.stem == "shared" else ("visible", "infrared")
        self.run = {m: open_graph(to_onnx(Outputs(network, m), example), runtime, dtype) for m in stems}

    def forward(
        self, visible: torch.Tensor | None = None, infrared: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalised images (N, 3, H, W) of one modality -> BNNeck outputs (N, D)."""
        images, modality = (visible, "visible") if infrared is None else (infrared, "infrared")
        run = self.run["visible" if self.stem == "shared" else modality]
        return torch.from_numpy(run(images.contiguous().numpy()))


def for_evaluation(
    network: nn.Module,
    device: torch.device,
    runtime: str = "torch",
    size: tuple[int, int] | None = None,
    amp: str = "auto",
) -> nn.Module:
    """The network ready to embed images: folded, on the device, or in another runtime.

    Args:
        network: as model.build_model gives it.
        device: the CPU for other runtimes.
        runtime: in flags.RUNTIMES.
        size: height, width of the images; other runtimes need them.
        amp: `--amp`; of the other runtimes OpenVINO computes in bfloat16 where that is typed, else float32.

    Raises:
        UserError: a runtime that is not installed, that does not run there or has no such precision.
    """
    network = folded(network)
    if runtime == "torch":
        return network.to(device, memory_format=torch.channels_last)
    if device.type != "cpu":
        raise UserError(f"--runtime {runtime} runs on the CPU: add --gpu -1")
    if amp == "fp16" or (amp, runtime) == ("bf16", "onnx"):
        raise UserError(f"--runtime {runtime} does not compute in {amp}: add --amp off")
    return OtherRuntime(network, runtime, *size, torch.bfloat16 if amp == "bf16" else None)
