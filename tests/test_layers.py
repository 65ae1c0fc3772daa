"""The house: commands know library files, a library file knows only what stands before it, none a command."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("readers", "evaluation", "engine", "retrieval", "reporting", "synthetic", "tools")
LIBRARY = (  # each may import those before it
    "utils", "devices", "readers.formats", "images", "augmentation", "readers", "readers.lists",
    "readers.samples", "readers.sysu", "readers.regdb", "readers.llcm", "readers.own", "readers.ranges",
    "readers.arrays", "data_manager", "checkpoints", "data_loader", "memory", "loss", "model", "precision",
    "evaluation.half_precision", "evaluation.k_reciprocal", "evaluation.one_at_a_time", "reranking",
    "evaluation.counting", "eval_metrics", "evaluation", "engine", "retrieval", "reporting",
    "synthetic.scenes", "synthetic.people", "synthetic", "tools.commands",
)  # fmt: skip
COMMANDS = {"train", "test", "pre_process_sysu", "demo", "hubconf", "tools", "synthetic.__main__"}
WITHOUT_TORCH = ("utils", "images", "readers.lists", "readers.own", "data_manager", "synthetic")

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", *(f"{room}/*.py" for room in ROOMS))
    for path in ROOT.glob(pattern)
}


def place(file):
    """The entry of LIBRARY or COMMANDS that a file belongs to, its own or its package's; None: not ours."""
    names = (file, file.split(".")[0])
    return next((name for name in names if name in COMMANDS or name in LIBRARY), None)


def imports(path):
    """The modules that a file imports, wherever in it; `from a import b` counts as a.b where that exists."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


def test_every_file_has_its_place():
    assert {file for file in FILES if place(file) is None} == set()


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_imports_only_what_is_below_it(file):
    own = place(file)
    for imported in imports(FILES[file]):
        other = place(imported)
        if other is None or other == own:
            continue
        assert other not in COMMANDS, f"{file} imports the command {imported}"
        assert own in COMMANDS or LIBRARY.index(other) < LIBRARY.index(own), f"{file} imports {imported}"


def test_an_import_is_found_wherever_it_hides(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "import os, loss\nfrom model import TwoStreamResNet as Net\n"
        "def f():\n    import train\n    from evaluation import tables\n"
    )
    assert sorted(imports(path)) == ["evaluation.tables", "loss", "model", "os", "train"]


@pytest.mark.parametrize("file", WITHOUT_TORCH)
def test_what_needs_no_torch_does_not_wait_for_it(file):
    """The files that read or draw a dataset start at once; PIL is for those that have to do with pixels."""
    banned = {"torch", "torchvision"} | (
        {"PIL"} if file in ("utils", "readers.lists", "readers.own", "data_manager") else set()
    )
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
