"""What torch.hub loads from here: torch.hub.load(PATH, "mce", checkpoint="RUN_best.t", source="local")."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

dependencies = ["torch", "torchvision", "numpy", "scipy", "PIL", "filelock", "tqdm"]

ROOT = Path(__file__).resolve().parent


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """Inside, `import utils` means this repository's; before and after, whatever it meant to the caller.

    The files here have everyday names, and the caller's own project may have files of the same names.
    """
    names = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }

    def ours() -> dict[str, object]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    former = ours()
    here = {n: m for n, m in former.items() if ROOT in Path(getattr(m, "__file__", None) or "").parents}
    for name in former.keys() - here.keys():
        del sys.modules[name]
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(former)


def mce(checkpoint: str | os.PathLike) -> torch.nn.Module:
    """The Embedder of a checkpoint: image files or PIL images of a modality to unit features (N, D).

    checkpoint: of this project, the released code or AGW's family. On the CPU and in evaluation mode;
    `.to("cuda")` moves it. retrieval/embeddings.py documents its call. UserError: not a checkpoint.
    """
    with _own_modules():
        from retrieval.embeddings import open_embedder
    return open_embedder(checkpoint)[0]
