"""Small datasets in the layouts of SYSU-MM01, RegDB and LLCM; what tests of readers share."""

import numpy as np
import pytest
import scipy.io

from utils import UserError

TRAIN, VAL, TEST = (3, 12), (7,), (2, 40)
CAMERAS = (1, 2, 3, 4, 5, 6)


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def small_sysu(root, images=3):
    """A SYSU-MM01 of empty files: every id in every camera, except that id 40 is not in camera 5."""
    for split, pids in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        write(root / f"exp/{split}_id.txt", ",".join(map(str, reversed(pids))) + "\n")
        for pid in pids:
            for camid in CAMERAS:
                folder = root / f"cam{camid}/{pid:04d}"
                folder.mkdir(parents=True)
                for index in range(1, images + 1 if (pid, camid) != (40, 5) else 1):
                    (folder / f"{index:04d}.jpg").touch()
    return root


def permutations(root, images=3, edit=lambda cells: None):
    """exp/rand_perm_cam.mat for small_sysu(root): nested cells as MATLAB saves them, uint8, some empty."""
    rng = np.random.default_rng(0)
    cameras = np.empty((6, 1), dtype=object)
    for camid in CAMERAS:
        cells = np.empty((45, 1), dtype=object)
        for pid in range(1, 46):
            count = images if pid in TRAIN + VAL + TEST and (pid, camid) != (40, 5) else 0
            rows = [rng.permutation(count) + 1 for _ in range(10)]
            cells[pid - 1, 0] = np.array(rows, dtype=np.uint8).reshape(10, count)
        cameras[camid - 1, 0] = cells
    edit(cameras)
    scipy.io.savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cameras})
    return cameras


def regdb(root, pids=(0, 3)):
    for trial in range(1, 11):
        for split, offset in (("train", 0), ("test", 100)):
            for folder, word in (("Visible", "visible"), ("Thermal", "thermal")):
                lines = []
                for pid in pids:
                    for index in (2, 1):
                        path = f"{folder}/{offset + pid}/photo {index} é.bmp"
                        write(root / path)
                        lines.append(f"{path} {pid}")
                write(root / f"idx/{split}_{word}_{trial}.txt", "\n".join(lines) + "\n")
    return root


def llcm(root):
    for word in ("vis", "nir"):
        lines = []
        for pid in (1, 5):
            path = f"{word}/{pid:04d}/{pid:04d}_c0{pid}_s185535_f7010_{word}.jpg"
            write(root / path)
            lines.append(f"{path} {pid - 1}")
        write(root / f"idx/train_{word}.txt", "\n".join(lines))
        for pid in (9, 30):
            for camid in (1, 3, 4):
                for index in range(5):
                    write(root / f"test_{word}/cam{camid}/{pid:04d}/{pid:04d}_{index}.png")
    write(root / "idx/test_id.txt", "30,9")
    return root


def keys(samples):
    assert samples.pids.dtype == samples.camids.dtype == np.int64
    assert len(samples) == len(samples.paths) == len(samples.pids) == len(samples.camids)
    return list(zip(samples.pids.tolist(), samples.camids.tolist(), samples.paths, strict=True))


def refused(call, *words):
    """call() raises UserError in one line that holds the words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)
