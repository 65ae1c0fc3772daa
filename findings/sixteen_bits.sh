#!/usr/bin/env bash
# What three usual readers make of a thermal camera's 16-bit and float images, without a word.
#
# Found with Pillow 13.0.0, torchvision 0.29.1 (torch 2.14.1), NumPy 2.4.6, tifffile 2026.3.3, Python 3.11:
#  - Pillow swaps the bytes of a big-endian TIFF of int16, int32 or float32 if it is compressed (Deflate here): kelvin
#    become numbers like 1e+38, or NaN. Uncompressed, or unsigned, or little-endian, it is right; tifffile is right always.
#  - Pillow's smooth resizing of mode I;16B, which a big-endian uint16 TIFF opens in, gives noise over the
#    whole range: 29,000 to 31,500 becomes 145 to 64,654.
#  - torchvision's to_tensor (v1) makes int16 of a 16-bit image: counts from 32,768 (in centi-kelvin 54.5 degrees
#    Celsius) become negative, so the hottest pixels become the coldest. v2's to_image is right.
# Way out: tifffile.imread for TIFF, resize after reducing to 8 bits or as float32, and v2.functional.to_image.
#
# Output seen:
#   int16, big-endian, Deflate: stored 29000 to 31500, Pillow reads -32650 to 32378
#   int32, big-endian, Deflate: stored 29000 to 31500, Pillow reads -2139750400 to 2121924608
#   float32, big-endian, Deflate: stored 290 to 315, Pillow reads -1.479499861e+38 to 2.334314488e+38
#   uint16, big-endian, resized with Lanczos: stored 29000 to 31500, Pillow gives 145 to 64654
#   to_tensor of 32767 32768 40000 65535 gives torch.int16 32767 -32768 -25536 -1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  numpy==2.4.6 Pillow==13.0.0 tifffile==2026.3.3 torch==2.14.1 torchvision==0.29.1
cd "$work"
venv/bin/python - <<'PY'
import numpy as np
import tifffile
from PIL import Image
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2.functional import to_image

changed = []
values = np.linspace(29000, 31500, 160).reshape(20, 8)
for dtype, scale in (("int16", 1), ("int32", 1), ("float32", 100)):
    stored = (values / scale).astype(dtype)
    tifffile.imwrite("a.tif", stored, byteorder=">", compression="zlib")
    with Image.open("a.tif") as image:
        read = np.asarray(image)
    print(
        f"{dtype}, big-endian, Deflate: stored {stored.min():g} to {stored.max():g}, "
        f"Pillow reads {read.min():.10g} to {read.max():.10g}"
    )
    if not np.array_equal(tifffile.imread("a.tif"), stored) or np.array_equal(read, stored):
        changed.append(dtype)

tifffile.imwrite("a.tif", values.astype(np.uint16), byteorder=">")
with Image.open("a.tif") as image:
    small = np.asarray(image.resize((4, 10), Image.Resampling.LANCZOS))
print(f"uint16, big-endian, resized with Lanczos: stored 29000 to 31500, Pillow gives {small.min()} to {small.max()}")
if 29000 - 300 < small.min() and small.max() < 31500 + 300:
    changed.append("Lanczos")

counts = np.array([[32767, 32768, 40000, 65535]], np.uint16)
tensor = to_tensor(Image.fromarray(counts))
print("to_tensor of", *counts[0], "gives", tensor.dtype, *tensor.flatten().tolist())
if tensor.flatten().tolist() != [32767, -32768, -25536, -1]:
    changed.append("to_tensor")
if not np.array_equal(to_image(Image.fromarray(counts))[0].numpy(), counts):
    changed.append("to_image")
raise SystemExit(f"this has changed: {changed}" if changed else 0)
PY
