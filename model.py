"""The network: a ResNet with one stem per modality, non-local blocks, GeM pooling and a BNNeck.

docs/method.md, section 4. The trunk is torchvision's; layer4 keeps layer3's resolution.
"""

import copy
import itertools
import math
import os
from collections.abc import Iterable
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from checkpoints import load_checkpoint, network_of, weights_of
from utils import UserError

ARCHS = ("resnet50", "resnet18")
STEMS = ("two-stream", "shared")
NON_LOCAL_BLOCKS = {"layer2": 2, "layer3": 3}  # after how many of a layer's last residual blocks

Images = torch.Tensor | None  # (N, 3, H, W) of one modality


def moments(x: torch.Tensor, dims: tuple[int, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Variance (without Bessel's correction) and mean over dims (None: all), and of how many values."""
    var, mean = torch.var_mean(x, dims, correction=0)
    return var, mean, x.numel() // mean.numel()


@torch.no_grad()
def track(bn: nn.Module, var: torch.Tensor, mean: torch.Tensor, count: int) -> None:
    """Move a batch norm's running statistics towards a batch's moments."""
    bn.running_mean.lerp_(mean, bn.momentum)
    bn.running_var.lerp_(var * (count / (count - 1)), bn.momentum)
    bn.num_batches_tracked.add_(1)


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
        self.moments = moments  # several processes need another: engine/distributed.py
        nn.init.zeros_(self.bn.weight)  # so that the block starts as the identity
        nn.init.zeros_(self.bn.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K, H, W)."""
        theta, phi, g = self.theta_phi_g(x).split(1, dim=1)  # each (N, 1, H, W)
        y = theta * at_least_float32(phi * g).mean((2, 3), keepdim=True).type_as(theta)
        if isinstance(self.bn, nn.Identity):  # folded into expand
            return x + self.expand(y)
        return x + F.conv2d(y, *self.expand_and_normalise(y))

    def expand_and_normalise(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (K, 1, 1, 1) and bias (K,) of bn(expand(y)) as one convolution of y (N, 1, H, W)."""
        bn, weight, bias = self.bn, self.expand.weight, self.expand.bias
        mean, var = bn.running_mean, bn.running_var
        with torch.autocast(y.device.type, enabled=False):
            if self.training:
                y_var, y_mean, count = self.moments(y.float())
                mean = weight.flatten() * y_mean + bias
                var = weight.flatten().square() * y_var
                track(bn, var, mean, count)
            scale = bn.weight * (var + bn.eps).rsqrt()
            weight, bias = weight * scale.view(-1, 1, 1, 1), bn.bias + scale * (bias - mean)
        return weight.to(y.dtype), bias.to(y.dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if its precision is lower; else x itself, so that an exported graph has no idle casts."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class GeM(nn.Module):
    """Generalised-mean pooling: (mean over positions of max(x, 1e-6)^p)^(1/p), p learnable; in float32."""

    def __init__(self, p: float = 3.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K) float32."""
        # Exponentials of logarithms take about half the time of pow and its gradient.
        with torch.autocast(x.device.type, enabled=False):  # powers in bfloat16 are too inexact
            powers = self.p * at_least_float32(x).clamp(min=1e-6).log()
            return ((powers.logsumexp((2, 3)) - math.log(x[0, 0].numel())) / self.p).exp()


class PowerMean(nn.Module):
    """(mean over positions of max(x, floor)^p + added)^(1/p): GeM with a constant p, for evaluation.

    AGW's network has p = 3, floor = 0, added = 1e-12; its plain baseline the mean, p = 1. Exported graphs are
    made of this form: some runtimes take ReduceLogSumExp, which GeM becomes, over the wrong axes.
    """

    def __init__(self, p: float, floor: float = 1e-6, added: float = 0.0):
        super().__init__()
        self.p, self.floor, self.added = p, floor, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K), float32 for lower precisions."""
        with torch.autocast(x.device.type, enabled=False):
            mean = at_least_float32(x).clamp(min=self.floor).pow(self.p).mean((2, 3))
            return (mean + self.added if self.added else mean).pow(1 / self.p)


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
        weights: initial weights: None (random), "imagenet", or a file: a state dict of torchvision, or a
            network that from_checkpoint reads, of which a shared stem fits either stem.

    Raises:
        UserError: weights that cannot be found or do not fit.
    """

    def __init__(self, arch: str = "resnet50", stem: str = "two-stream", weights: str | None = None):
        super().__init__()
        if arch not in ARCHS or stem not in STEMS:
            raise ValueError(f"arch is one of {ARCHS} and stem of {STEMS}, not {arch!r}, {stem!r}")
        self.arch, self.stem = arch, stem
        resnet = torchvision.models.get_model(arch)
        source, trained = f"--weights {weights}", None
        if weights == "imagenet":
            load_backbone(resnet, imagenet_weights(arch), source)
        elif weights is not None:
            trained = load_checkpoint(weights)
            if "conv1.weight" in (state := weights_of(trained)):  # as torchvision calls it
                trained = load_backbone(resnet, state, source)
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
        if trained:
            start_from(self, trained, source)

    def pooled(self, visible: Images = None, infrared: Images = None) -> torch.Tensor:
        """Images (N, 3, H, W) of either or both modalities -> pooled features (N, D), visible rows first."""
        streams = [(name, x) for name, x in (("visible", visible), ("infrared", infrared)) if x is not None]
        if self.stem == "shared":  # one pass, so that batch statistics cover all images
            images = [x for _, x in streams]
            x = self.stems["shared"](torch.cat(images) if len(images) > 1 else images[0])
        else:
            maps = [self.stems[name](x) for name, x in streams]
            x = torch.cat(maps) if len(maps) > 1 else maps[0]
        x = self.maxpool(x)
        return self.pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def forward(
        self, visible: Images = None, infrared: Images = None, with_pooled: bool = False
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
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # Old weights, such as torchvision's of 2017, have no num_batches_tracked.
    own = resnet.state_dict()
    unneeded = {k: own[k] for k in own if k.startswith("fc.") or k.endswith("num_batches_tracked")}
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
    # What other networks lack begins as what they have instead: a constant exponent, no non-local blocks.
    if isinstance(trained.pool, PowerMean):
        state["pool.p"] = torch.tensor([trained.pool.p])
    left_out = tuple(f"{name}." for name, part in trained.named_modules() if isinstance(part, nn.Identity))
    state |= {k: v for k, v in model.state_dict().items() if left_out and k.startswith(left_out)}
    load_strictly(model, state, source)


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """load_state_dict that raises UserError, in one line that names source, if something does not fit."""
    here, there = ({k: tuple(v.shape) for k, v in d.items()} for d in (module.state_dict(), state))
    misfits = [f"{key} is missing" for key in here if key not in there]
    misfits += [f"{key} is unknown" for key in there if key not in here]
    misfits += [f"{k} is {there[k]} there, {here[k]} here" for k in here if there.get(k, here[k]) != here[k]]
    if misfits:
        more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(f"{source} does not fit the network: {misfits[0]}{more}")
    module.load_state_dict(state)


def from_checkpoint(path: str | os.PathLike) -> TwoStreamResNet:
    """The network of a checkpoint, in evaluation mode on the CPU.

    path: a checkpoint of this project (its `args` say how to build the network), of the released code (a
    shared stem), or of AGW's family (two stems; the exponent of its pooling is the constant 3; its plain
    baseline has no non-local blocks and takes the mean). Class memories, classifiers and what AGW's code does
    not use are left out. Raises UserError, naming path, if it is missing, of anything else, or does not fit.
    """
    return build_model(load_checkpoint(path), path)


def build_model(checkpoint: dict, path: str | os.PathLike) -> TwoStreamResNet:
    """The network of a checkpoint that is already loaded; path is for messages. See from_checkpoint."""
    arch, stem, pooling, state = network_of(checkpoint, path)
    if arch not in ARCHS or stem not in STEMS:
        raise UserError(
            f"{path} holds no network of this project (its `args` have no known arch and stem), nor of the "
            "released code or AGW's family; evaluate its features instead, with test.py --features"
        )
    model = TwoStreamResNet(arch, stem)
    if pooling != "gem":
        model.pool = PowerMean(3.0, floor=0.0, added=1e-12) if pooling == "agw" else PowerMean(1.0, floor=0.0)
    if pooling == "mean":
        leave_out(model, [part for part in model.modules() if isinstance(part, NonLocal)])
    load_strictly(model, state, str(path))
    return model.eval()


def leave_out(network: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Put the identity in the place of each of parts."""
    for module in network.modules():
        for name, child in module.named_children():
            if any(child is part for part in parts):
                setattr(module, name, nn.Identity())


def folded(network: nn.Module) -> nn.Module:
    """A copy of a network for evaluation alone, which gives the same features in less time.

    Batch norms are folded into the convolutions before them, blocks that change nothing are left out, the
    exponent of the pooling is a constant. Later changes of network do not reach the copy.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    blocks = [part for part in network.modules() if isinstance(part, NonLocal)]
    normed = [block for block in blocks if isinstance(block.bn, nn.BatchNorm2d)]  # all, unless folded before
    leave_out(network, [block for block in normed if not block.bn.weight.any() and not block.bn.bias.any()])
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, conv), (after, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())
        for name, child in children:
            if isinstance(child, GeM):
                setattr(module, name, PowerMean(child.p.item()))
    return network


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
