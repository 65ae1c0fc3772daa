"""The layers: scripts know library files, library files know only the bottom, and none knows a script."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BOTTOM = {
    "utils": set(),
    "devices": {"utils"},
    "checkpoints": {"utils"},
    "images": {"utils"},
    "augmentation": set(),
    "reranking": set(),
    "people": set(),
}  # file -> what of ours it may import
LIBRARY = {
    "data_manager",
    "data_loader",
    "model",
    "memory",
    "loss",
    "eval_metrics",
    "visualize",
    "runs",
    "tables",
    "exports",
}
# What scripts share, wiring library files together, with what of each other they may import:
BETWEEN = {"evaluation": set(), "flags": set(), "training": {"evaluation"}}
SCRIPTS = {"train", "test", "pre_process_sysu", "synthetic", "demo"}
WITHOUT_TORCH = ("utils", "images", "data_manager", "synthetic")

FILES = {path.stem: path for path in ROOT.glob("*.py")}
PLACED = BOTTOM.keys() | LIBRARY | BETWEEN.keys() | SCRIPTS


def imports(path):
    """What of the project's own a file imports, wherever in it: {(file, name or None)}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {(node.module.split(".")[0], alias.name) for alias in node.names}
    return {(file, name) for file, name in found if file in PLACED}


def allowed(file):
    """What of the project's own a file may import."""
    if file in BOTTOM:
        return BOTTOM[file]
    if file in LIBRARY:
        return set(BOTTOM)
    return BOTTOM.keys() | LIBRARY | (BETWEEN.keys() if file in SCRIPTS else BETWEEN[file])


def test_every_file_is_in_one_layer():
    assert FILES.keys() == PLACED
    assert sum(map(len, (BOTTOM, LIBRARY, BETWEEN, SCRIPTS))) == len(PLACED)


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_imports_only_what_is_below_it(file):
    assert not {other for other, _ in imports(FILES[file])} - allowed(file)


def test_an_import_is_found_wherever_it_hides(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import os, loss\n"
        "from model import TwoStreamResNet as Net\n"
        "def f():\n    import train\n    from test import main\n"
    )
    assert imports(path) == {("loss", None), ("model", "TwoStreamResNet"), ("train", None), ("test", "main")}


@pytest.mark.parametrize("file", WITHOUT_TORCH)
def test_what_needs_no_torch_does_not_wait_for_it(file):
    """The files that read or draw a dataset start at once; PIL is for those that have to do with pixels."""
    banned = {"torch", "torchvision"} | ({"PIL"} if file in ("utils", "data_manager") else set())
    code = f"import sys, {file}; print(*sorted({banned} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


def public_without_docstring(tree, prefix=""):
    """Names of public functions, classes and methods (not those inside functions) that have no docstring."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from public_without_docstring(node, f"{node.name}.")


@pytest.mark.parametrize("file", sorted(FILES))
def test_everything_public_says_what_it_is(file):
    tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the file itself"
    assert list(public_without_docstring(tree)) == []
