"""Write a checkpoint of other people's code, with reproducible weights:

    make_checkpoint.py OUT.t [released|agw|base] [PREFIX]

released: of the released code (backbone.npz). agw: of AGW's, with non-local blocks and generalised-mean
pooling with the constant exponent 3. base: the same code's plain baseline, which has neither (it pools by the
mean), as only the missing NL_ keys tell. PREFIX comes before every key: "module.", as DataParallel writes it.

agw.npz has the keys, and what AGW's own network (mangye16/Cross-Modal-Re-ID-baseline at e817a26, evaluation
mode, float64) answers for these images: agw_pool, agw_fc, base_pool, base_fc: unit features (4, 2048) before
and after the neck, visible rows first.

    rng = np.random.RandomState(7)
    visible = rng.standard_normal((2, 3, 96, 48)).astype("f4")
    infrared = rng.standard_normal((2, 3, 96, 48)).astype("f4")
"""

import ast
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

# Of each of AGW's three whole ResNets, the parts that its forward pass leaves out.
UNUSED = re.compile(r"(visible_module|thermal_module)\.\w+\.layer|base_resnet\.base\.(conv1|bn1)\.")
out = sys.argv[1]
kind = sys.argv[2] if len(sys.argv) > 2 else "released"
prefix = sys.argv[3] if len(sys.argv) > 3 else ""


def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    if UNUSED.match(key):  # a single number in the file; a network that used it would give NaN
        return torch.tensor(float("nan")).expand(shape)
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if key.endswith("running_var"):
        array = rng.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        array = 0.1 * rng.standard_normal(shape)
    elif "NL_" in key:
        array = 0.02 * rng.standard_normal(shape)
    elif key.endswith("bn3.weight"):
        array = rng.uniform(0.1, 0.3, shape)
    elif len(shape) == 4:
        array = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
    elif key.endswith("pool.p"):
        array = np.array([2.7])
    elif key.endswith(".weight"):
        array = rng.uniform(0.3, 0.9, shape)
    else:
        array = 0.05 * rng.standard_normal(shape)
    return torch.tensor(np.asarray(array, dtype=np.float32))


arrays = np.load(Path(__file__).with_name("backbone.npz" if kind == "released" else "agw.npz"))
names = ("keys", "shapes") if kind == "released" else (f"{kind}_keys", f"{kind}_shapes")
net = {
    prefix + str(k): value(str(k), ast.literal_eval(str(s)))
    for k, s in zip(*(arrays[name] for name in names), strict=True)
}
cmc = np.linspace(0.5, 1.0, 20, dtype=np.float32)
torch.save({"net": net, "cmc": cmc, "mAP": np.float64(0.5), "mINP": np.float64(0.4), "epoch": 42}, out)
