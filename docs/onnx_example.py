"""How alike people in images are, without torch: python onnx_example.py model_infrared.onnx IMAGE…"""

import sys

import numpy as np
import onnxruntime
from PIL import Image


def embed(model: str, paths: list[str]) -> np.ndarray:
    """Unit features (N, D) float32 of N image files; their products are cosines."""
    session = onnxruntime.InferenceSession(model)
    _, height, width, _ = session.get_inputs()[0].shape
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = [np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)) for image in images]
    return session.run(["features"], {"images": np.stack(pixels)})[0]


if __name__ == "__main__":
    features = embed(sys.argv[1], sys.argv[2:])
    print(np.round(features @ features.T, 4))
