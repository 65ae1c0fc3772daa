import numpy as np
import pytest
import scipy.io
import torch

from data_manager import Samples
from evaluation.exports import save_features, save_mat
from evaluation.files import mat_file
from evaluation.scoring import Features
from utils import UserError

ROWS = {"visible": {"b": 0, "a": 1, "c": 2}, "infrared": {"d": 0}}
TENSORS = {"visible": torch.arange(6.0).view(3, 2), "infrared": torch.tensor([[7.0, 8.0]])}
FEATURES = Features(ROWS, TENSORS)
SAMPLES = {
    "visible": Samples(["a", "b", "c"], np.array([4, 4, 2]), np.array([1, 1, 5]), "visible"),
    "infrared": Samples(["d"], np.array([2]), np.array([3]), "infrared"),
}


def test_features_of_each_modality_with_their_ids(tmp_path):
    save_features(tmp_path / "f.npz", FEATURES, SAMPLES)
    found = np.load(tmp_path / "f.npz")
    assert len(found.files) == 8
    np.testing.assert_array_equal(found["visible_features"], [[2, 3], [0, 1], [4, 5]])
    assert found["visible_paths"].tolist() == ["a", "b", "c"]
    assert found["visible_pids"].tolist() == [4, 4, 2]
    assert found["visible_camids"].tolist() == [1, 1, 5]
    assert found["infrared_camids"].tolist() == [3]


def test_one_mat_file_per_camera(tmp_path):
    save_mat(tmp_path, FEATURES, SAMPLES.values())
    assert sorted(tmp_path.iterdir()) == [mat_file(tmp_path, camid) for camid in (1, 3, 5)]
    cells = scipy.io.loadmat(mat_file(tmp_path, 1))["feature"]
    assert cells.shape == (1, 4)
    assert [cell.shape for cell in cells[0]] == [(0, 2), (0, 2), (0, 2), (2, 2)]
    np.testing.assert_array_equal(cells[0, 3], [[2, 3], [0, 1]])  # a, then b: the order of the samples
    assert cells[0, 3].dtype == np.float64
    np.testing.assert_array_equal(scipy.io.loadmat(mat_file(tmp_path, 3))["feature"][0, 1], [[7, 8]])


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_features(tmp_path / "file" / "f.npz", FEATURES, SAMPLES)
    with pytest.raises(UserError, match="cannot write"):
        save_mat(tmp_path / "file", FEATURES, SAMPLES.values())
