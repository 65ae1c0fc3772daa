#!/usr/bin/env bash
# Hugging Face datasets 4.4.1: "imagefolder" loads only the images whose path has a split's word, without a word.
#
# A folder of cameras with people below, train-station/ann/0.jpg and lobby/ann/0.jpg, loads as the split "train"
# with the images of train-station alone: those of lobby are gone, silently, since "train" in a path means a
# split, and then what has no such word belongs to none. File names do the same: test_cam_0.jpg beside cam_0.jpg
# leaves a split "test" and no training images. Folders whose name starts with __ are left out, and thumbnail
# folders of file servers (@eaDir) are images, which take all labels away because they lie deeper.
#
# Seen with datasets 4.4.1, Pillow 12.0.0, Python 3.11 (8, 8, 8 and 6 images lie there):
#   visible and infrared: {'train': (8, ['ann', 'bob'])}
#   train-station and lobby: {'train': (4, ['ann', 'bob'])}
#   test_cam_0.jpg and cam_0.jpg: {'test': (4, ['ann', 'bob'])}
#   ann, __bob and @eaDir: {'train': (4, None)}
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==4.4.1 pillow==12.0.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()


def load(title, names):
    """Draw a tiny image for each name and print {split: (images, labels)} of the folder."""
    root = Path(title.replace(" ", "_")).resolve()
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16), (k * 9, 40, 80)).save(root / name)
    splits = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(root) + ".cache")
    found = {name: (len(part), getattr(part.features.get("label"), "names", None)) for name, part in splits.items()}
    print(f"{title}: {found}")
    return found


people, two = ("ann", "bob"), range(2)
seen = [
    load("visible and infrared", [f"{m}/{p}/{k}.jpg" for m in ("visible", "infrared") for p in people for k in two]),
    load("train-station and lobby", [f"{c}/{p}/{k}.jpg" for c in ("train-station", "lobby") for p in people for k in two]),
    load("test_cam_0.jpg and cam_0.jpg", [f"{p}/{c}_{k}.jpg" for c in ("test_cam", "cam") for p in people for k in two]),
    load("ann, __bob and @eaDir", [f"{p}/{k}.jpg" for p in ("ann", "__bob", "@eaDir/x.jpg") for k in two]),
]
labels = ["ann", "bob"]
wanted = [{"train": (8, labels)}, {"train": (4, labels)}, {"test": (4, labels)}, {"train": (4, None)}]
print("as described" if seen == wanted else f"changed: not {wanted}")
sys.exit(seen != wanted)
PYTHON
