#!/usr/bin/env bash
# Pillow 13.0.0 resizes to other pixels than every Pillow before it, and only for some sizes.
#
# A resize has a horizontal and a vertical pass, and the image between them is rounded and clipped to eight bits,
# so that the order of the passes matters. Up to 12.3.0 the horizontal pass comes first. 13.0.0 takes the vertical
# pass first for 397x131 -> 384x128 and 160x64 -> 64x48 (height x width), the horizontal one for 512x512 ->
# 128x128 and 480x640 -> 288x144. Between 12.0.0 and 13.0.0, 39 % of the values of a noise image change with
# Lanczos (397x131 -> 384x128), by up to 38 grey levels; 28 % of those of a smooth picture saved as JPEG, by up
# to 4. So arrays of training images made under one version and test images resized under the other do not belong
# together. Two calls, one axis each, fix the order in every version. The decoders (JPEG, WebP, JPEG 2000) gave the
# same values in 10.1.0 and 13.0.0.
#
# Seen: Pillow 10.1.0, 11.3.0, 12.0.0, 12.1.1, 12.2.0, 12.3.0 and 13.0.0 from PyPI, x86-64, Linux, Python 3.11. Printed:
#   10.1.0: 397x131 horizontal, 160x64 horizontal, 512x512 horizontal, 480x640 horizontal
#   12.3.0: 397x131 horizontal, 160x64 horizontal, 512x512 horizontal, 480x640 horizontal
#   13.0.0: 397x131 vertical, 160x64 vertical, 512x512 horizontal, 480x640 horizontal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/first.py" <<'PY'
import numpy as np
import PIL
from PIL import Image

words = []
for height, width, tall, wide in ((397, 131, 384, 128), (160, 64, 64, 48), (512, 512, 128, 128), (480, 640, 288, 144)):
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image, lanczos = Image.fromarray(noise), Image.Resampling.LANCZOS
    whole = image.resize((wide, tall), lanczos)
    one_by_one = {
        "horizontal": image.resize((wide, height), lanczos).resize((wide, tall), lanczos),
        "vertical": image.resize((width, tall), lanczos).resize((wide, tall), lanczos),
    }
    first = [name for name, other in one_by_one.items() if other.tobytes() == whole.tobytes()]
    words.append(f"{height}x{width} {' or '.join(first) or 'neither'}")
print(f"{PIL.__version__}: {', '.join(words)}")
PY
for version in 10.1.0 12.3.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "Pillow==$version" "numpy==2.2.6"
  "$folder/$version/bin/python" "$folder/first.py" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'SEEN' && echo "as stated"
10.1.0: 397x131 horizontal, 160x64 horizontal, 512x512 horizontal, 480x640 horizontal
12.3.0: 397x131 horizontal, 160x64 horizontal, 512x512 horizontal, 480x640 horizontal
13.0.0: 397x131 vertical, 160x64 vertical, 512x512 horizontal, 480x640 horizontal
SEEN
