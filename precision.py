"""Reduced precision: which one --amp means, and whether this machine computes it rightly.

No flag of a CPU or GPU is believed. Before it is used, one batch passes through the network in float32; each
convolution and each product of the non-local blocks is repeated in the reduced precision, on what float32
gave it, and compared. Whole networks cannot be compared: rounding errors grow from layer to layer, so that
an untrained network's bfloat16 gradient points elsewhere with nothing wrong. docs/performance.md, Precision.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from devices import Processes
from utils import UserError, log

aten = torch.ops.aten

BOUND = 2.0  # largest error, in units of the precision's epsilon; docs/performance.md: why
LARGE = 12  # exponent: float16 ends just below 2^16
REPEATS = 3  # of every product: some faults come only now and then


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the precision that --amp means on device, None for float32. Also sets torch's TF32 switches.

    `auto` is the fastest precision that the device names as its own. `off` is float32 everywhere: it also
    turns off TF32, which cuDNN would use for convolutions.
    """
    torch.backends.cudnn.allow_tf32 = amp != "off"
    torch.backends.cuda.matmul.allow_tf32 = False  # for the products of losses, memory and metrics
    if amp == "auto":
        if device.type == "cuda":
            if torch.cuda.get_device_capability(device) >= (8, 0):
                return torch.bfloat16
            return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
        return torch.bfloat16 if cpu_has_bfloat16() else None
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on the CPU use auto, bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16 or AMX); only Linux reports it."""
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


@dataclass(frozen=True)
class Disagreement:
    """A result of reduced precision that is further from float32's than rounding takes it."""

    layer: str
    what: str  # output, input gradient, weight gradient or bias gradient
    error: float  # the distance, relative to the norm that it may be compared with
    bound: float  # that rounding stays below

    def __str__(self) -> str:
        rounding = f"rounding by less than {self.bound:.2g}"
        return f"the {self.what} of {self.layer} is off by {self.error:.2g}, {rounding}"


def settle(
    amp: str,
    model: nn.Module,
    batch: Callable[[], Mapping[str, torch.Tensor]],
    processes: Processes,
    training: bool = False,
) -> torch.dtype | None:
    """Return the precision to compute with: what --amp means, float32 (None) where `auto` would be wrong.

    A typed precision is compared too, and kept. Either way one warning says what differs. All processes
    get the same answer, and each must call this.

    Args:
        amp: the value of --amp.
        model: the network, on its device, with the weights that it starts from.
        batch: gives the images, see check; called only where there is something to compare. {}: none can be
            read, which the command says.
        processes: of the command.
        training: compare gradients too.
    """
    device = next(model.parameters()).device
    dtype = autocast_dtype(amp, device)
    if dtype is None:
        return None
    images = batch()
    found = processes.all_gather_object(check(model, images, dtype, training) if images else None)
    if not any(found):
        return dtype
    if processes.rank == 0:
        worst = max(filter(None, found), key=lambda disagreement: disagreement.error)
        choice = "float32 is used instead" if amp == "auto" else "it is used as asked for"
        name = str(dtype).removeprefix("torch.")
        log.warning("--amp %s: this machine computes %s wrongly: %s; %s", amp, name, worst, choice)
    return None if amp == "auto" else dtype


def check(
    model: nn.Module, images: Mapping[str, torch.Tensor], dtype: torch.dtype, training: bool
) -> Disagreement | None:
    """Compare each product of one pass in reduced precision with float32's; return the worst that is wrong.

    Args:
        model: as TwoStreamResNet; its weights, buffers, gradients and mode stay as they are.
        images: {"visible": (n, 3, H, W), "infrared": (m, 3, H, W)} float32, either or both, on its device.
        dtype: torch.bfloat16 or torch.float16.
        training: in training mode, with the gradients of weights and inputs; else in evaluation mode, and
            outputs alone.
    """
    errors = None
    while errors is None:
        try:
            errors = errors_of(model, images, dtype, training)
        except torch.OutOfMemoryError:  # float32 takes twice the memory: with half of the images, then
            if max(map(len, images.values())) < 4:
                raise
            images = {modality: some[: (len(some) + 1) // 2] for modality, some in images.items()}
    if next(iter(images.values())).is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # a run tells of its own
    bound = BOUND * torch.finfo(dtype).eps
    (layer, what), error = max(errors.items(), key=lambda item: item[1], default=(("", ""), 0.0))
    return Disagreement(layer, what, error, bound) if error > bound else None


def errors_of(
    model: nn.Module, images: Mapping[str, torch.Tensor], dtype: torch.dtype, training: bool
) -> dict[tuple[str, str], float]:
    """{(layer, what): the largest error of REPEATS, relative}, infinite where not a number. See check."""
    device, before = next(model.parameters()).device, model.training
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # running statistics
    with ExitStack() as stack:
        stack.callback(model.train, before)
        comparison = stack.enter_context(_Comparison(dtype))
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(partial(comparison.enter, name)))
            stack.enter_context(module.register_forward_hook(comparison.leave))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.set_grad_enabled(training))
        model.train(training)
        features = F.normalize(torch.func.functional_call(model, buffers, kwargs=dict(images)))
        if training:  # any gradient will do, because each layer is compared on its own
            draws = torch.Generator(device).manual_seed(0)
            direction = torch.randn(features.shape, generator=draws, device=device)
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            torch.autograd.grad(features, weights, direction, allow_unused=True)
    return comparison.largest()


class _Comparison(TorchDispatchMode):
    """Inside, every product in float32 is repeated in reduced precision, forward and backward.

    It sees what autograd and autocast call in the end, whatever the layer: aten's convolution, its backward,
    and products of maps.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.errors: dict[tuple[str, str], torch.Tensor] = {}  # on the device, so that nothing waits for it
        self.inside: list[str] = []  # the modules whose forward is under way
        self.layers: dict[int, str] = {}  # the address of a weight -> its layer, for its gradient
        self.run: list[bool] = []  # cuDNN's switches as the run has them

    def __enter__(self) -> "_Comparison":
        cudnn = torch.backends.cudnn
        self.run = [cudnn.benchmark, cudnn.allow_tf32]
        cudnn.benchmark = False  # for float32 there is no need to look for the fastest algorithm
        if self.dtype == torch.float16:  # TF32 rounds as float16 does, and is no reference for it
            cudnn.allow_tf32 = False
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = self.run

    def enter(self, name: str, *_: object) -> None:
        """A hook: the forward of the module called name begins."""
        self.inside.append(name)

    def leave(self, *_: object) -> None:
        """A hook: the innermost forward ends."""
        self.inside.pop()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None):
        """Compute as ever; compare where it is a product."""
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self.layers[args[1].data_ptr()] = self.inside[-1]
            self._compare_convolution(result, *args)
        elif func is aten.convolution_backward.default:
            self._compare_gradients(result, *args)
        elif func is aten.mul.Tensor and self.inside and all(_is_map(factor) for factor in args):
            self._compare_product(result, *args)
        return result

    def _enlargement(self, a: torch.Tensor, b: torch.Tensor, product: torch.Tensor | None = None) -> tuple:
        """Exponents that bring small factors to about 1, where float16 has all its digits; else None.

        So small weights that a run rightly rounds to nothing do not count as wrong. The product stays below
        LARGE, and what is too large for float16 is left as it is.
        """
        if self.dtype != torch.float16:  # bfloat16 has float32's range
            return None, None
        ka, kb = ((-_exponent(factor)).clamp(min=0) for factor in (a, b))
        if product is not None:
            room = (LARGE - _exponent(product)).clamp(min=0)
            ka = torch.minimum(ka, room)
            kb = torch.minimum(kb, room - ka)
        return ka, kb

    def _compare_convolution(self, y, x, weight, bias, *how) -> None:
        kx, kw = self._enlargement(x, weight, y)
        x, weight = _scaled(x, kx), _scaled(weight, kw)
        noise = aten.convolution.default(x.square(), weight.square().sum(0, keepdim=True), None, *how).sum()
        bias = None if bias is None else _scaled(bias, kx, kw).to(self.dtype)
        x, weight = x.to(self.dtype), weight.to(self.dtype)
        exact = {"output": (_scaled(y, kx, kw), noise)}
        self._compare(self.inside[-1], exact, lambda: [aten.convolution.default(x, weight, bias, *how)])

    def _compare_product(self, y, a, b) -> None:
        ka, kb = self._enlargement(a, b, y)
        a, b = _scaled(a, ka).to(self.dtype), _scaled(b, kb).to(self.dtype)
        exact = {"output": (_scaled(y, ka, kb), 0)}
        self._compare(self.inside[-1], exact, lambda: [aten.mul.Tensor(a, b)])

    def _compare_gradients(self, gradients, dy, x, weight, sizes, *how) -> None:
        layer, (*convolution, wanted) = self.layers[weight.data_ptr()], how
        dx, dweight, dbias = (g if wants else None for g, wants in zip(gradients, wanted, strict=True))
        kx, kw = self._enlargement(x, weight)
        k = None
        if kx is not None:  # the gradients to the upper end of the range, as the run's GradScaler does
            shifts = ((dy, 0), (dx, kw), (dweight, kx), (dbias, 0))
            k = LARGE - torch.stack([_exponent(t) + shift for t, shift in shifts if t is not None]).amax()
        dy, x, weight = _scaled(dy, k), _scaled(x, kx), _scaled(weight, kw)
        squares = dy.square()
        exact = {}
        if dx is not None:
            noise = squares.sum((0, 2, 3)).dot(weight.square().sum((1, 2, 3)))
            exact["input gradient"] = _scaled(dx, k, kw), noise
        if dweight is not None:
            window = weight.new_ones(1, 1, *weight.shape[2:])
            seen = aten.convolution.default(x.square().sum(1, keepdim=True), window, None, *convolution)
            noise = (seen * squares.sum(1, keepdim=True)).sum()
            exact["weight gradient"] = _scaled(dweight, k, kx), noise
        if dbias is not None:
            exact["bias gradient"] = _scaled(dbias, k), squares.sum()
        dy, x, weight = (t.to(self.dtype) for t in (dy, x, weight))

        def repeat() -> list[torch.Tensor]:
            found = aten.convolution_backward.default(dy, x, weight, sizes, *how)
            return [g for g, wants in zip(found, wanted, strict=True) if wants]

        self._compare(layer, exact, repeat)

    def _compare(
        self,
        layer: str,
        exact: Mapping[str, tuple[torch.Tensor, torch.Tensor | float]],
        repeat: Callable[[], list[torch.Tensor]],
    ) -> None:
        """Keep the largest error of what repeat gives in reduced precision.

        exact: {what: (float32's result, sum of the squares of all products that it adds up)}. The roundings
        of these add up as independent ones do, so that an error is relative to the root of this sum where a
        result is small because its terms cancel, and to the result where they do not.
        """
        for _ in range(REPEATS):
            torch.backends.cudnn.benchmark = self.run[0]  # the algorithms that the run will use
            results = repeat()
            torch.backends.cudnn.benchmark = False
            for (what, (true, noise)), found in zip(exact.items(), results, strict=True):
                scale = (true.norm().square() + noise).sqrt()
                error = (true - found).norm() / scale.clamp(min=1e-30)
                error = torch.where(scale.isfinite(), error, 0)  # else float32 is no reference
                former = self.errors.get((layer, what), error)
                self.errors[layer, what] = torch.maximum(former, error)

    def largest(self) -> dict[tuple[str, str], float]:
        """{(layer, what): error}, infinite where it is not a number."""
        if not self.errors:  # a network without products
            return {}
        errors = torch.stack(list(self.errors.values())).nan_to_num(torch.inf, torch.inf)
        return dict(zip(self.errors, errors.tolist(), strict=True))


def _is_map(factor: object) -> bool:
    return isinstance(factor, torch.Tensor) and factor.ndim == 4


def _scaled(tensor: torch.Tensor, *exponents: torch.Tensor | None) -> torch.Tensor:
    """The tensor times two to the power of all exponents (None: 0)."""
    return tensor if exponents[0] is None else torch.ldexp(tensor, sum(exponents))


def _exponent(tensor: torch.Tensor) -> torch.Tensor:
    """Of the power of two just below the largest absolute value; 0 for zeros. A scalar on the device."""
    peak = torch.linalg.vector_norm(tensor, torch.inf)
    return torch.where(peak > 0, peak, 1).log2().floor().clamp(-99, 99).int()
