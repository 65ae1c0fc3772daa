"""RegDB: one visible and one thermal camera, ten splits, each in four lists (docs/method.md, section 8).

Visible/…  Thermal/…
idx/{train,test}_{visible,thermal}_{1..10}.txt    lines `relative/path label`
"""

import os
from pathlib import Path

from readers.lists import read_index
from readers.samples import BOTH_WAYS, CAPTURED, Dataset, Samples, list_samples, refuse_both, refuse_unpaired

WORDS = {"visible": "visible", "infrared": "thermal"}  # modality -> its name in the lists
CAMIDS = {"visible": 1, "infrared": 2}
TRIALS = range(1, 11)


def _file(root: str | os.PathLike, split: str, modality: str, trial: int | None) -> Path:
    return Path(root, "idx", f"{split}_{WORDS[modality]}_{trial or TRIALS[0]}.txt")


class RegDB(Dataset):
    """See the file's docstring; images and pids in the order of the lists, whose labels are the pids."""

    def read(self, root, split, trial, problems=None) -> dict[str, Samples]:
        """See Dataset; both modalities must have the same pids."""
        samples = {m: self._listed(root, split, m, trial, problems) for m in CAPTURED}
        return refuse_unpaired(samples, root, f"{split} split {trial}", problems)

    def test(self, root, modality, trial, split) -> Samples:
        """See Dataset."""
        return self._listed(root, split, modality, trial)

    def _listed(self, root, split, modality, trial, problems=None) -> Samples:
        file = _file(root, split, modality, trial)
        return list_samples(file, root, modality, lambda _: CAMIDS[modality], problems)

    def refuse_shared(self, root, trial, split) -> None:
        """See Dataset. Labels start at 0 in each list, so identities are folders, unless one has several."""
        for modality in CAPTURED:
            files = [_file(root, kind, modality, trial) for kind in ("train", "test")]
            if all(file.is_file() for file in files):
                trained, tested = ({path: label for _, path, label in read_index(file)} for file in files)
                refuse_both(*files, "image", trained.keys() & tested.keys())
                refuse_both(*files, "folder", _identity_folders(trained) & _identity_folders(tested))


def _identity_folders(labels: dict[str, str]) -> set[str]:
    """The folders of {path: label}; none if a folder has several labels, so is not a single identity."""
    pairs = {(os.path.dirname(path), label) for path, label in labels.items()}
    folders = {folder for folder, _ in pairs}
    return folders if len(folders) == len(pairs) else set()


DATASET = RegDB(
    "RegDB", 288, 144, 5, "regdb", (30, 60), TRIALS, BOTH_WAYS, "idx",
    published={
        ((f"{split} {trial}",), modality, str(CAMIDS[modality])): (206, 2060)
        for trial in TRIALS for split in ("train", "test") for modality in CAPTURED
    },
)  # fmt: skip
