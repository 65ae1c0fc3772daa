"""Write a checkpoint in the released code's format, with reproducible weights: make_checkpoint.py OUT.t"""

import ast
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

arrays = np.load(Path(__file__).with_name("backbone.npz"))


def value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
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


net = {
    str(k): value(str(k), ast.literal_eval(str(s)))
    for k, s in zip(arrays["keys"], arrays["shapes"], strict=True)
}
cmc = np.linspace(0.5, 1.0, 20, dtype=np.float32)
torch.save(
    {"net": net, "cmc": cmc, "mAP": np.float64(0.5), "mINP": np.float64(0.4), "epoch": 42}, sys.argv[1]
)
