#!/usr/bin/env bash
# tinygrad 0.14.0's OnnxRunner takes a graph's free batch dimension from the first call and refuses any other.
#
# A graph whose input is ("n", 3) may be given 4 rows, then 4 again. 3 rows (the last batch of a folder) or 1 are
# then refused, with "Expected 4" although the graph says n. The number is kept in the runner for its life
# (OnnxRunner.variable_dims, filled by the first call, never emptied): a runner per batch size gives all of them.
# ONNX Runtime 1.32.0 takes all in a single session. No node is computed for this, so it needs no compiler.
#
# Seen with tinygrad 0.14.0, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11:
#   4 rows: onnxruntime (4, 3), one runner (4, 3), a new runner (4, 3)
#   4 rows: onnxruntime (4, 3), one runner (4, 3), a new runner (4, 3)
#   3 rows: onnxruntime (3, 3), one runner refused: input x has mismatch on dim=0. Expected 4, received 3., a new
#     runner (3, 3)
#   1 rows: onnxruntime (1, 3), one runner refused: input x has mismatch on dim=0. Expected 4, received 1., a new
#     runner (1, 3)
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    tinygrad==0.14.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
DEV=PYTHON XDG_CACHE_HOME="$folder" "$folder/venv/bin/python" - "$folder/graph.onnx" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner

inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", inputs, outputs)
model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, sys.argv[1])


def shape(run, rows):
    """The shape of the output for so many rows, or why there is none."""
    try:
        return str(run(np.ones((rows, 3), np.float32)).shape)
    except RuntimeError as error:
        return f"refused: {error}"


session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
runner = OnnxRunner(sys.argv[1])
surprises = []
for rows in (4, 4, 3, 1):
    right = shape(lambda x: session.run(None, {"x": x})[0], rows)
    found = shape(lambda x: runner({"x": Tensor(x)})["y"], rows)
    fresh = shape(lambda x: OnnxRunner(sys.argv[1])({"x": Tensor(x)})["y"], rows)
    print(f"{rows} rows: onnxruntime {right}, one runner {found}, a new runner {fresh}")
    surprises.append(right == fresh == f"({rows}, 3)" and (found == right if rows == 4 else "Expected 4" in found))
print("as described" if all(surprises) else "this has changed")
sys.exit(not all(surprises))
PYTHON
