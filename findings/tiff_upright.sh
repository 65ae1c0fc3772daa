#!/usr/bin/env bash
# Pillow garbles an uncompressed 8-bit TIFF with an Orientation tag of 5 to 8, if it is opened by its name.
#
# Found with Pillow 11.0.0 to 13.0.0 (Linux, Python 3.11); 10.4.0 is right. Image.open(name) maps the file into
# memory with the size that the image has after turning, so its rows are cut at the wrong places. The same
# file opened as a stream, or compressed, is right. Nothing is raised: a photo of a person that a camera or
# scanner stored lying on its side becomes stripes, in a data set as in `torchvision.datasets.ImageFolder`.
# Way out: open the file and give Pillow the stream, or drop the tag (and turn the image) first.
#
# Output seen:
#   Pillow 10.4.0: opened by name right, opened as a stream right, compressed with LZW right
#   Pillow 13.0.0: opened by name WRONG, opened as a stream right, compressed with LZW right
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat > "$work/try.py" <<'PY'
import sys

import numpy as np
import PIL
from PIL import Image

stored = np.arange(40 * 24, dtype=np.uint16).reshape(40, 24) % 251
upright = np.rot90(stored, -1)  # Orientation 6: the stored rows are the columns of the image, from the right
exif = Image.Exif()
exif[274] = 6
Image.fromarray(stored.astype(np.uint8)).save("plain.tif", exif=exif)
Image.fromarray(stored.astype(np.uint8)).save("lzw.tif", exif=exif, compression="tiff_lzw")


def word(source):
    with Image.open(source) as image:
        return "right" if np.array_equal(np.asarray(image), upright) else "WRONG"


with open("plain.tif", "rb") as stream:
    words = [word("plain.tif"), word(stream), word("lzw.tif")]
print("Pillow {}: opened by name {}, opened as a stream {}, compressed with LZW {}".format(PIL.__version__, *words))
sys.exit(words != sys.argv[1:])
PY
cd "$work"
for version in 10.4.0 13.0.0; do
  venv/bin/pip install --quiet --disable-pip-version-check "numpy==2.4.6" "Pillow==$version"
  if [ "$version" = 13.0.0 ]; then first=WRONG; else first=right; fi
  venv/bin/python try.py $first right right || { echo "this has changed"; exit 1; }
done
