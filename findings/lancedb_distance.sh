#!/usr/bin/env bash
# LanceDB 0.40.0: the cosine `_distance` of a search through an IVF_SQ index is twice 1 - cos, and once 1 - cos
# after rows were added.
#
# The index keeps unit vectors and answers with their squared distance, 2 (1 - cos), although the search asks for
# distance_type("cosine"). Without an index, with refine_factor, or while the table has rows that the index does not
# know, the same search of the same table answers 1 - cos. So a threshold on `_distance`, or a score 1 - _distance,
# changes its meaning when rows are added and again when the index is brought up to date. refine_factor(1) is enough.
#
# Seen with lancedb 0.40.0, pyarrow 26.0.1, numpy 2.4.6, Python 3.11 (_distance / (1 - cos) of ten results, median):
#   no index: 1.00
#   IVF_SQ: 2.00
#   IVF_SQ, refine_factor(1): 1.00
#   IVF_SQ, 100 rows added: 1.00
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    lancedb==0.40.0 pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/store" <<'PYTHON'
import sys

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import IvfSq

rng = np.random.default_rng(0)
rows = rng.standard_normal((4000, 64), dtype=np.float32) + 1
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
query = rows[0] + rows[1]
cosines = rows @ query / np.linalg.norm(query)


def arrow(vectors, first):
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 64)
    return pa.table({"vector": column, "id": np.arange(first, first + len(vectors))})


def ratio(refine=None):
    """The median of _distance / (1 - cos) of the ten nearest."""
    search = table.search(query).distance_type("cosine").nprobes(8).limit(10)
    hits = (search.refine_factor(refine) if refine else search).to_list()
    return float(np.median([hit["_distance"] / (1 - cosines[hit["id"]]) for hit in hits if hit["id"] < 4000]))


table = lancedb.connect(sys.argv[1]).create_table("rows", arrow(rows, 0))
seen = {"no index": ratio()}
table.create_index("vector", config=IvfSq(distance_type="cosine", num_partitions=8))
seen["IVF_SQ"] = ratio()
seen["IVF_SQ, refine_factor(1)"] = ratio(1)
table.add(arrow(-rows[:100], 4000))
seen["IVF_SQ, 100 rows added"] = ratio()
for name, value in seen.items():
    print(f"{name}: {value:.2f}")
as_described = [round(value, 1) for value in seen.values()] == [1.0, 2.0, 1.0, 1.0]
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
