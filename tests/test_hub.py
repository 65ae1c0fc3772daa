"""hubconf.py: torch.hub loads the network, whatever modules the caller has; the documents' examples run."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, draw_images, random_checkpoint

from model import TwoStreamResNet
from retrieval.embeddings import open_embedder

pytestmark = pytest.mark.usefixtures("whole_resnet18")  # what a new interpreter has

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
EXAMPLES = [
    (page.name, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if "torch.hub.load" in block
]


def test_there_is_an_example():
    assert EXAMPLES


@pytest.mark.parametrize(("page", "block"), EXAMPLES)
def test_the_example_runs_as_printed(page, block, tmp_path):
    checkpoint = random_checkpoint(tmp_path / "RUN_best.t")
    paths = draw_images(tmp_path / "in", 3)
    for path, name in zip(paths, ("night.png", "day_1.png", "day_2.png"), strict=True):
        shutil.copy(path, tmp_path / name)
    code = block.replace("path/to/mce", str(REPOSITORY))
    assert code != block
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    embedder, _ = open_embedder(checkpoint)
    wanted = embedder(paths[:1], "infrared") @ embedder(paths[1:], "visible").T
    printed = re.search(r"tensor\(\[\[(.*?)\]\]", done.stdout)
    torch.testing.assert_close(
        torch.tensor([list(map(float, printed[1].split(",")))]), wanted, atol=2e-4, rtol=0
    )


CALLER = """
import sys
sys.path.insert(0, {project!r})
import utils
before = set(sys.modules)
import torch
embedder = torch.hub.load({repository!r}, "mce", checkpoint={checkpoint!r}, source="local")
import model, utils as again
assert again is utils and utils.MINE and model.MINE
assert embedder([{image!r}], "infrared").shape == (1, 512)
assert not {{"results", "retrieval.embeddings", "checkpoints"}} & set(sys.modules)
assert {repository!r} not in sys.path
"""


def test_the_caller_s_modules_stay_the_caller_s(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("utils.py", "model.py", "images.py"):
        (project / name).write_text("MINE = True\n")
    code = CALLER.format(
        project=str(project), repository=str(REPOSITORY), image=draw_images(tmp_path / "in", 1)[0],
        checkpoint=random_checkpoint(tmp_path / "a.t"),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_inside_the_repository_its_modules_are_the_same(tmp_path):
    before = dict(sys.modules)
    embedder = torch.hub.load(
        str(REPOSITORY), "mce", checkpoint=random_checkpoint(tmp_path / "a.t"), source="local"
    )
    assert isinstance(embedder.network, TwoStreamResNet)
    assert before.items() <= sys.modules.items()
