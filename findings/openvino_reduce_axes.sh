#!/usr/bin/env bash
# OpenVINO 2026.4.1 ignores the attribute `axes` of ONNX's ReduceL1 and ReduceLogSum up to opset 17.
#
# It reduces over all axes, the batch too, and gives a single number in the place of one per row, without an
# error or a warning. ONNX Runtime 1.32.0 gives the rows. From opset 18 on, where axes are an input, both agree;
# ReduceL2, ReduceSumSquare and ReduceMean agree in both opsets. A later node broadcasts the single number, so
# a whole network returns the right shape with wrong values, and a batch of one may even look right.
#
# Seen with openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11:
#   ReduceL1 opset 17: onnxruntime (2, 3) [10. 26. 42.], openvino () [300.]
#   ReduceL1 opset 18: onnxruntime (2, 3) [10. 26. 42.], openvino (2, 3) [10. 26. 42.]
#   ReduceLogSum opset 17: onnxruntime (2, 3) [2.303 3.258 3.738], openvino () [5.704]
#   ReduceLogSum opset 18: onnxruntime (2, 3) [2.303 3.258 3.738], openvino (2, 3) [2.303 3.258 3.738]
#   ReduceL2 opset 17: onnxruntime (2, 3) [ 5.477 13.191 21.119], openvino (2, 3) [ 5.477 13.191 21.119]
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

x = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 2, 2)


def graph(kind, opset):
    """x (n, 3, 2, 2) reduced over its last two axes: (n, 3)."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 2, 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])]
    if opset < 18:
        node, constants = helper.make_node(kind, ["x"], ["y"], axes=[2, 3], keepdims=0), []
    else:
        node = helper.make_node(kind, ["x", "axes"], ["y"], keepdims=0)
        constants = [onnx.numpy_helper.from_array(np.array([2, 3]), "axes")]
    body = helper.make_graph([node], "reduction", inputs, outputs, constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


core, surprises = openvino.Core(), []
for kind, opset in (
    ("ReduceL1", 17), ("ReduceL1", 18), ("ReduceLogSum", 17), ("ReduceLogSum", 18), ("ReduceL2", 17),
):
    model = graph(kind, opset)
    right = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = core.compile_model(core.read_model(model), "CPU", settings)(x)[0]
    shown = [f"{y.shape} {np.round(y.ravel()[:3], 3)}" for y in (right, found)]
    print(f"{kind} opset {opset}: onnxruntime {shown[0]}, openvino {shown[1]}")
    agree = right.shape == found.shape and np.allclose(right, found, rtol=1e-4)
    surprises.append(agree == (kind == "ReduceL2" or opset == 18) and right.shape == (2, 3))
print("as described" if all(surprises) else "this has changed")
sys.exit(not all(surprises))
PYTHON
