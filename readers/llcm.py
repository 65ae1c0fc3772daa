"""LLCM: nine cameras in low light (docs/method.md, section 8).

vis/0001/0001_c01_s185535_f7010_vis.jpg  nir/…        listed in idx/train_vis.txt and idx/train_nir.txt
test_vis/cam{1..9}/0003/…  test_nir/cam{1,2,4..9}/…    of the ids in idx/test_id.txt

vis and nir also hold the test images, which test_vis and test_nir repeat: they are not read there.
"""

import os
import re
from pathlib import Path

from readers.lists import number, read_ids, read_index
from readers.samples import (
    BOTH_WAYS,
    CAPTURED,
    Dataset,
    Samples,
    cells_samples,
    draw_cells,
    list_samples,
    refuse_both,
    refuse_unpaired,
)  # fmt: skip

WORDS = {"visible": "vis", "infrared": "nir"}  # modality -> its name in files


def _file(root: str | os.PathLike, modality: str) -> Path:
    return Path(root, "idx", f"train_{WORDS[modality]}.txt")


def _camid(path: str) -> int:
    """The NN of _cNN_ in the file's name, else 0."""
    match = re.search(r"_c([0-9]{1,9})_", os.path.basename(path))
    return int(match[1]) if match else 0


class LLCM(Dataset):
    """See the file's docstring; training images in the order of the lists, whose labels are the pids."""

    def read(self, root, split, trial, problems=None) -> dict[str, Samples]:
        """See Dataset; both modalities must have the same training pids."""
        if split == "train":
            samples = {m: list_samples(_file(root, m), root, m, _camid, problems) for m in CAPTURED}
            return refuse_unpaired(samples, root, "train split", problems)
        cells = self.cells(root, split, [Path(root, "idx/test_id.txt")], problems)
        return {m: cells_samples(cells[m], m, root, split) for m in cells if cells[m]}

    def gallery(self, root, mode, trial, shot, galleries, split, short) -> Samples:
        """One image of each (id, camera), drawn."""
        modality = self.gallery_modality(mode)
        cells = self.cells(root, split, [Path(root, "idx/test_id.txt")])
        return cells_samples(draw_cells(cells[modality], shot, trial), modality, root, split)

    def refuse_shared(self, root, trial, split) -> None:
        """See Dataset. The id of a training image is the number of its folder."""
        tests = Path(root, "idx/test_id.txt")
        tested = set(read_ids(tests)) if tests.is_file() else set()
        for file in (_file(root, modality) for modality in CAPTURED):
            paths = [path for _, path, _ in read_index(file)] if file.is_file() else []
            trained = {number(os.path.basename(os.path.dirname(path))) for path in paths}
            refuse_both(file, tests, "id", tested & trained)


DATASET = LLCM(
    "LLCM", 384, 144, 4, "sysu", (20, 40), range(10), BOTH_WAYS, "idx",
    cameras={
        modality: {c: f"test_{word}/cam{c}" for c in range(1, 10) if (word, c) != ("nir", 3)}
        for modality, word in WORDS.items()
    },
    repeating=tuple(WORDS.values()),
    published={
        (("train",), "both", "all"): (713, 30921),
        (("test",), "both", "all"): (351, 15846),
        (("train", "test"), "both", "all"): (1064, 46767),
    },
)  # fmt: skip
