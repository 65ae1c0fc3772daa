"""The network: a ResNet with one stem per modality, non-local blocks, GeM pooling and a BNNeck.

docs/method.md, section 4. The trunk is torchvision's; layer4 keeps layer3's resolution.
"""

import math
import os
import re
from collections.abc import Iterable
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from checkpoints import load_checkpoint, load_weights
from utils import UserError

ARCHS = ("resnet50", "resnet18")
STEMS = ("two-stream", "shared")
NON_LOCAL_BLOCKS = {"layer2": 2, "layer3": 3}  # after how many of a layer's last residual blocks


class NonLocal(nn.Module):
    """Non-local block with one inner channel: BN(expand(theta (phi . g) / HW)) + x.

    With one channel the (HW, HW) affinity has rank one, so the block takes time linear in HW. Every output
    channel of expand is the same map y times a weight, so BN's statistics follow from those of y, and expand
    and BN together are one 1x1 convolution of y. This saves passes over (N, K, H, W), and rounding errors in
    subtracting the means of nearly constant maps. Parameters, buffers and gradients equal the plain form's.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.theta_phi_g = nn.Conv2d(channels, 3, 1)
        self.expand = nn.Conv2d(1, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)  # so that the block starts as the identity
        nn.init.zeros_(self.bn.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K, H, W)."""
        theta, phi, g = self.theta_phi_g(x).split(1, dim=1)  # each (N, 1, H, W)
        y = theta * (phi * g).float().mean((2, 3), keepdim=True).to(theta.dtype)
        return x + F.conv2d(y, *self.expand_and_normalise(y))

    def expand_and_normalise(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (K, 1, 1, 1) and bias (K,) of bn(expand(y)) as one convolution of y (N, 1, H, W)."""
        bn, weight, bias = self.bn, self.expand.weight, self.expand.bias
        mean, var = bn.running_mean, bn.running_var
        with torch.autocast(y.device.type, enabled=False):
            if self.training:
                y_var, y_mean = torch.var_mean(y.float(), correction=0)
                mean = weight.flatten() * y_mean + bias
                var = weight.flatten().square() * y_var
                with torch.no_grad():
                    bn.running_mean.lerp_(mean, bn.momentum)
                    bn.running_var.lerp_(var * (y.numel() / (y.numel() - 1)), bn.momentum)
                    bn.num_batches_tracked.add_(1)
            scale = bn.weight * (var + bn.eps).rsqrt()
            weight, bias = weight * scale.view(-1, 1, 1, 1), bn.bias + scale * (bias - mean)
        return weight.to(y.dtype), bias.to(y.dtype)


class GeM(nn.Module):
    """Generalised-mean pooling: (mean over positions of max(x, 1e-6)^p)^(1/p), p learnable; in float32."""

    def __init__(self, p: float = 3.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K) float32."""
        # Exponentials of logarithms take about half the time of pow and its gradient.
        with torch.autocast(x.device.type, enabled=False):  # powers in bfloat16 are too inexact
            powers = self.p * x.float().clamp(min=1e-6).log()
            return ((powers.logsumexp((2, 3)) - math.log(x[0, 0].numel())) / self.p).exp()


def stem_of(resnet: nn.Module) -> nn.Sequential:
    """A new stem with copies of resnet's first convolution and batch norm."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    stem[0].load_state_dict(resnet.conv1.state_dict())
    stem[1].load_state_dict(resnet.bn1.state_dict())
    return stem


def imagenet_weights(arch: str) -> dict[str, torch.Tensor]:
    """torchvision's IMAGENET1K_V1 weights of arch; UserError if they cannot be downloaded."""
    try:
        return torchvision.models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: torchvision could not download the weights of {arch} ({error}); "
            "without internet access, use --weights FILE (a state dict of torchvision) or --weights none"
        ) from error


class TwoStreamResNet(nn.Module):
    """The network: images of either modality -> BNNeck outputs. L2-normalised, these are *the* features.

    Args:
        arch: "resnet50" (D = 2048) or "resnet18" (D = 512).
        stem: "two-stream" (conv1 and bn1 per modality; visible and aux images share the visible one) or
            "shared" (one for all, as in the released code).
        weights: initial weights: None (random), "imagenet", or a file with a state dict of torchvision or a
            checkpoint of this project or the released code, whose shared stem fits either stem.

    Raises:
        UserError: weights that cannot be found or do not fit.
    """

    def __init__(self, arch: str = "resnet50", stem: str = "two-stream", weights: str | None = None):
        super().__init__()
        if arch not in ARCHS or stem not in STEMS:
            raise ValueError(f"arch is one of {ARCHS} and stem of {STEMS}, not {arch!r}, {stem!r}")
        self.arch, self.stem = arch, stem
        resnet = torchvision.models.get_model(arch)
        initial = {}
        if weights is not None:
            initial = imagenet_weights(arch) if weights == "imagenet" else load_weights(weights)
        if initial and "net" not in initial:
            load_backbone(resnet, initial, f"--weights {weights}")
        first = resnet.layer4[0]
        (first.conv2 if arch == "resnet50" else first.conv1).stride = (1, 1)
        first.downsample[0].stride = (1, 1)
        modalities = ("visible", "infrared") if stem == "two-stream" else ("shared",)
        self.stems = nn.ModuleDict({modality: stem_of(resnet) for modality in modalities})
        self.maxpool = resnet.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            with_non_local(getattr(resnet, name), NON_LOCAL_BLOCKS.get(name, 0))
            for name in ("layer1", "layer2", "layer3", "layer4")
        )
        self.pool = GeM()
        self.dim = resnet.fc.in_features
        self.neck = nn.BatchNorm1d(self.dim)
        self.neck.bias.requires_grad_(False)
        if "net" in initial:
            start_from(self, initial, f"--weights {weights}")

    def pooled(
        self, visible: torch.Tensor | None = None, infrared: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images (N, 3, H, W) of either or both modalities -> pooled features (N, D), visible rows first."""
        streams = [(name, x) for name, x in (("visible", visible), ("infrared", infrared)) if x is not None]
        if self.stem == "shared":  # one pass, so that batch statistics cover all images
            x = self.stems["shared"](torch.cat([x for _, x in streams]))
        else:
            x = torch.cat([self.stems[name](x) for name, x in streams])
        x = self.maxpool(x)
        return self.pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def forward(
        self,
        visible: torch.Tensor | None = None,
        infrared: torch.Tensor | None = None,
        with_pooled: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) of either or both modalities -> BNNeck outputs (N, D), visible rows first.

        with_pooled: return (outputs, pooled); the baselines' losses need the features before BNNeck too.
        """
        pooled = self.pooled(visible, infrared)
        with torch.autocast(pooled.device.type, enabled=False):
            outputs = self.neck(pooled)
        return (outputs, pooled) if with_pooled else outputs


def with_non_local(layer: nn.Sequential, count: int) -> nn.Sequential:
    """Add a non-local block after each of the last count residual blocks of layer."""
    blocks = []
    for k, block in enumerate(layer):
        blocks.append(block)
        if k >= len(layer) - count:
            blocks.append(NonLocal(block.conv1.in_channels if k else block.downsample[0].out_channels))
    return nn.Sequential(*blocks)


def load_backbone(resnet: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict of torchvision, without fc, into a torchvision ResNet; source is for messages."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # Old weights, such as torchvision's of 2017, have no num_batches_tracked.
    unneeded = {
        k: v
        for k, v in resnet.state_dict().items()
        if k.startswith("fc.") or k.endswith("num_batches_tracked")
    }
    load_strictly(resnet, unneeded | state, source)


def start_from(model: TwoStreamResNet, checkpoint: dict, source: str) -> None:
    """Load the network of a checkpoint into model; a shared stem initialises both stems if model has two."""
    trained = build_model(checkpoint, source)
    if trained.arch != model.arch or (trained.stem, model.stem) == ("two-stream", "shared"):
        raise UserError(
            f"{source} holds a {trained.arch} with a {trained.stem} stem, which does not fit a {model.arch} "
            f"with a {model.stem} stem: set --arch and --stem"
        )
    state = {}
    for key, value in trained.state_dict().items():
        for stem in model.stems if "stems.shared." in key else ("",):
            state[key.replace("stems.shared.", f"stems.{stem}.")] = value
    load_strictly(model, state, source)


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """load_state_dict that raises UserError, in one line that names source, if something does not fit."""
    expected = module.state_dict()
    misfits = [f"{key} is missing" for key in expected if key not in state]
    misfits += [f"{key} is unknown" for key in state if key not in expected]
    misfits += [
        f"{key} is {tuple(state[key].shape)} there, {tuple(expected[key].shape)} here"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    if misfits:
        more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(f"{source} does not fit the network: {misfits[0]}{more}")
    module.load_state_dict(state)


def from_checkpoint(path: str | os.PathLike) -> TwoStreamResNet:
    """The network of a checkpoint, in evaluation mode on the CPU.

    path: a checkpoint of this project (its `args` say how to build the network) or of the released code
    (always a shared stem; its class memories are ignored). Raises UserError, naming path, if it is missing,
    not a checkpoint, or does not fit.
    """
    return build_model(load_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | os.PathLike) -> TwoStreamResNet:
    """The network of a checkpoint that is already loaded; path is for messages. See from_checkpoint."""
    state = {key.removeprefix("module."): value for key, value in checkpoint["net"].items()}
    if any(key.startswith("backbone.") for key in state):
        arch, stem = "resnet50", "shared"
        state = translate_released(state)
    else:
        args = checkpoint.get("args")
        args = args if isinstance(args, dict) else {}
        arch, stem = args.get("arch"), args.get("stem")
        if arch not in ARCHS or stem not in STEMS:
            raise UserError(
                f"{path} is not a checkpoint of this project: its `args` have no known arch and stem"
            )
    model = TwoStreamResNet(arch, stem)
    load_strictly(model, state, str(path))
    return model.eval()


def translate_released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the released network's weights; only backbone and neck are kept."""
    translated, one_channel = {}, {}
    first_with = {"2": 4 - 2, "3": 6 - 3}  # NL_2.k follows block 2 + k of layer2's four, NL_3.k 3 + k of six
    for key, value in state.items():
        key = key.removeprefix("backbone.")
        if match := re.fullmatch(r"NL_([23])\.(\d)\.(.+)", key):
            layer, k, rest = match.groups()
            prefix = f"layer{layer}.{first_with[layer] + 2 * int(k) + 1}"
            if match := re.fullmatch(r"(theta|phi|g\.0)\.(weight|bias)", rest):
                one_channel[f"{prefix}.theta_phi_g.{match[2]}", match[1][:3]] = value
            else:
                rest = rest.replace("W.0.", "expand.").replace("W.1.", "bn.")
                translated[f"{prefix}.{rest}"] = value
        elif match := re.fullmatch(r"layer([23])\.(\d)\.(.+)", key):
            layer, k = match[1], int(match[2])
            # each non-local block shifts the blocks after it by one
            translated[f"layer{layer}.{k + max(0, k - first_with[layer])}.{match[3]}"] = value
        elif key.startswith(("conv1.", "bn1.")):
            translated[key.replace("conv1", "stems.shared.0").replace("bn1", "stems.shared.1")] = value
        elif key.startswith("bn_neck."):
            translated[key.replace("bn_neck", "neck")] = value
        elif key.startswith(("layer1.", "layer4.", "pool.")):
            translated[key] = value
    for key in {key for key, _ in one_channel}:
        tensors = [one_channel[key, name] for name in ("the", "phi", "g.0") if (key, name) in one_channel]
        translated[key] = torch.cat(tensors)
    return translated


@torch.inference_mode()
def extract_features(
    model: TwoStreamResNet,
    batches: Iterable[torch.Tensor],
    modality: str,
    dtype: torch.dtype | None = None,
    flip: bool = False,
) -> torch.Tensor:
    """Embed images.

    Args:
        model: in evaluation mode.
        batches: of normalised images (n, 3, H, W), on the model's device.
        modality: "visible", "infrared" or "aux" (which takes the visible stem).
        dtype: autocast's, None for float32.
        flip: also embed the mirror image.

    Returns:
        Unit features (N, D) float32 on the model's device. With flip (2, N, D): first the features of the
        images, then the means of image and mirror image, normalised again.
    """
    name = "infrared" if modality == "infrared" else "visible"

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            return F.normalize(model(**{name: images}))

    features = []
    for images in batches:
        unit = embed(images)
        features.append(torch.stack([unit, F.normalize(unit + embed(images.flip(3)))]) if flip else unit)
    return torch.cat(features, dim=-2)
