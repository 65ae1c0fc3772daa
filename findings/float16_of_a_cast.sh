#!/usr/bin/env bash
# onnxconverter-common 1.16.0 makes float16 graphs of a Cast that ONNX Runtime refuses to load.
#
# A graph that takes uint8 pixels begins with Cast(to=float32). The converter declares the Cast's output as
# float16 and leaves the Cast writing float32. onnx.checker finds nothing wrong with the result; ONNX Runtime
# says "Type (tensor(float16)) of output arg ... does not match expected type (tensor(float))". It is the same
# with keep_io_types=True and False. With float32 pixels and no Cast the graph loads.
#
# Seen with onnxconverter-common 1.16.0, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11:
#   uint8, as written: loads
#   uint8, float16, keep_io_types=True: Type Error: Type (tensor(float16)) of output arg (f) of node () does
#     not match expected type (tensor(float)).
#   uint8, float16, keep_io_types=False: the same
#   float32, as written: loads
#   float32, float16, keep_io_types=True: loads
#   float32, float16, keep_io_types=False: loads
#   as described
# Exit status 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    onnxconverter-common==1.16.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxconverter_common.float16 import convert_float_to_float16


def graph(pixels):
    """pixels (n, 3) divided by 255, in float32; with a Cast before it where they are uint8."""
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)] if pixels == "uint8" else []
    nodes.append(helper.make_node("Div", ["f" if nodes else "x", "scale"], ["y"]))
    kind = TensorProto.UINT8 if pixels == "uint8" else TensorProto.FLOAT
    body = helper.make_graph(
        nodes, "pixels", [helper.make_tensor_value_info("x", kind, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(np.float32([255]), "scale")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outcome(model):
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error).split(" : ")[-1]
    return "loads"


expected = True
for pixels in ("uint8", "float32"):
    print(f"{pixels}, as written: {outcome(graph(pixels))}")
    for keep in (True, False):
        half = convert_float_to_float16(graph(pixels), keep_io_types=keep)
        onnx.checker.check_model(half)
        said = outcome(half)
        print(f"{pixels}, float16, keep_io_types={keep}: {said}")
        expected = expected and (said == "loads") == (pixels == "float32")
    expected = expected and outcome(graph(pixels)) == "loads"
print("as described" if expected else "this has changed")
sys.exit(not expected)
PYTHON
