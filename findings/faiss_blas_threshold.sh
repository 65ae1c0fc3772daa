#!/usr/bin/env bash
# FAISS 1.15.1: a flat index takes longer for 128 queries than for 256.
#
# distance_compute_blas_threshold, which decides from when on queries are compared by one matrix product, is
# 128,000 by default; with 20,000 rows, 128 queries are still compared one by one, and take 7 times as long as 256.
# A comparison with FAISS's flat index at some ten to two hundred queries measures that, unless the threshold is
# set to 20 first. The answers are the same.
#
# Seen with faiss-cpu 1.15.1, numpy 2.4.6, Python 3.11, an AMD EPYC with AVX2 (CPU seconds of one thread):
#   default threshold 128000
#   32 queries: 0.184 s, with a threshold of 20 0.025 s
#   128 queries: 0.683 s, with a threshold of 20 0.058 s
#   256 queries: 0.097 s, with a threshold of 20 0.107 s
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import faiss
import numpy as np

faiss.omp_set_num_threads(1)
rng = np.random.default_rng(0)
rows = rng.standard_normal((20000, 512), dtype=np.float32)
index = faiss.IndexFlatIP(512)
index.add(rows)


def search(number, threshold):
    faiss.cvar.distance_compute_blas_threshold = threshold
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        found = index.search(rows[:number], 10)[1]
        seconds.append(time.thread_time() - start)
    return min(seconds), found


default, taken = faiss.cvar.distance_compute_blas_threshold, {}
print("default threshold", default)
for number in (32, 128, 256):
    (taken[number], found), (other, again) = search(number, default), search(number, 20)
    print(f"{number} queries: {taken[number]:.3f} s, with a threshold of 20 {other:.3f} s")
    assert (found == again).mean() > 0.999
as_described = default > 20 and taken[128] > 1.5 * taken[256]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
