"""reranking.py against the released code's values, against naive loops, and on degenerate inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import reranking
from evaluation import half_precision
from evaluation import k_reciprocal as encoding
from reranking import ONE_AT_A_TIME, RERANKING, affinity_inference, graph_propagation, k_reciprocal
from tests.oracles import affinity_inference_loop, graph_propagation_loop, k_reciprocal_loop


def unit(rng, num, dim):
    features = rng.standard_normal((num, dim))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_golden_k_reciprocal():
    golden = np.load(Path(__file__).parent / "golden" / "metrics.npz")
    features = golden["qf"], golden["gf"]
    ours = k_reciprocal(*features)
    assert ours.dtype == np.float32
    assert np.abs(ours - golden["k_reciprocal"]).max() < 5e-3
    assert np.abs(k_reciprocal_loop(*features) - golden["k_reciprocal"]).max() < 5e-3


def test_distances_are_rounded_to_half_precision_once():
    rng = np.random.default_rng(13)
    features = torch.from_numpy(unit(rng, 700, 64)).half()
    steps = torch.randint(-1, 2, (300, 64), generator=torch.Generator().manual_seed(0))
    features[:300] = features[300:600] + 2**-24 * steps  # so near that float16 has few digits for it
    squared = torch.empty(700, 700)
    halves, largest = half_precision.distances(features, squared)
    exact = cdist(features.numpy(), features.numpy())
    np.testing.assert_array_equal(halves, exact.astype(np.float16))
    np.testing.assert_allclose(squared, exact**2, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(largest, squared.amax(1))
    twice = exact.astype(np.float32).astype(np.float16) != exact.astype(np.float16)
    assert (twice & (exact > 0.1)).any()
    assert (exact[exact > 0] < 2**-14).any()


def drawn_rows(rng, count):
    """Rows of uint16 values: few or many different ones, sorted, reversed, as distances are, in waves."""
    for _ in range(count):
        num, values = rng.integers(1, 1500), rng.choice([1, 2, 5, 50, 400, 60000])
        row = rng.integers(0, values, num)
        yield from (row, np.sort(row), np.sort(row)[::-1], np.abs(np.arange(num) - num // 2) % values)
        yield np.clip(values / 2 + values / 8 * rng.standard_normal(num), 0, values)


def test_the_first_of_a_sort_are_those_of_the_whole_sort(monkeypatch):
    if not half_precision._follows_numpy():
        pytest.skip(f"NumPy {np.__version__} sorts in another way here: rows are sorted whole")
    rng = np.random.default_rng(14)
    for row in drawn_rows(rng, 60):
        monkeypatch.setattr(half_precision, "SHORT", int(rng.choice([16, 64, 500])))
        size = int(rng.integers(1, min(len(row), 40) + 1))
        row = np.ascontiguousarray(row, np.uint16)
        found = half_precision.sort_rows(torch.from_numpy(row.view(np.float16))[None], size)[0]
        np.testing.assert_array_equal(found, np.argsort(row)[:size])


def test_where_numpy_sorts_otherwise_rows_are_sorted_whole(monkeypatch):
    first = half_precision._first_of_argsort
    monkeypatch.setattr(half_precision, "_first_of_argsort", lambda row, size: first(row, size)[::-1])
    half_precision._follows_numpy.cache_clear()
    row = np.arange(2 * half_precision.SHORT, dtype=np.uint16)
    found = half_precision.sort_rows(torch.from_numpy(row.view(np.float16))[None], 5)[0]
    half_precision._follows_numpy.cache_clear()
    np.testing.assert_array_equal(found, np.arange(5))


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 1, 0.0), (5, 9, 1.0), (1, 1, 0.5)])
def test_k_reciprocal_agrees_with_the_loop(k1, k2, lambda_value):
    rng = np.random.default_rng(9)
    centers = unit(rng, 12, 16)[rng.integers(0, 12, 150)]
    features = centers + 0.15 * rng.standard_normal((150, 16))  # identities
    features[100:] = features[50:100]  # and equal images: the nearest one may be another
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features = features.astype(np.float32)  # else float64 rounds to half at once, and ours by way of float32
    arguments = features[:60], features[60:], k1, k2, lambda_value
    np.testing.assert_allclose(
        k_reciprocal(*arguments), k_reciprocal_loop(*arguments, dtype=np.float64), atol=1e-5
    )


@pytest.mark.parametrize(("num_query", "num_gallery"), [(1, 1), (1, 4), (3, 1), (5, 8), (10, 11)])
def test_k_reciprocal_with_fewer_images_than_neighbours(num_query, num_gallery):
    rng = np.random.default_rng(10)
    features = [unit(rng, num, 8).astype(np.float32) for num in (num_query, num_gallery)]
    np.testing.assert_allclose(
        k_reciprocal(*features), k_reciprocal_loop(*features, dtype=np.float64), atol=1e-5
    )


def test_k_reciprocal_of_equal_images():
    distmat = k_reciprocal(np.ones((3, 4)) / 2, np.ones((50, 4)) / 2)
    assert distmat.shape == (3, 50)
    assert np.isfinite(distmat).all()


def test_k_reciprocal_in_small_steps(monkeypatch):
    rng = np.random.default_rng(11)
    features = unit(rng, 20, 8), unit(rng, 30, 8)
    expected = k_reciprocal(*features)
    monkeypatch.setattr(encoding, "PAIRS", 1)
    for module, name, size in (
        (half_precision, "TILE", 7),
        (half_precision, "SHORT", 16),
        (encoding, "ROWS", 3),
    ):
        monkeypatch.setattr(module, name, size)
    np.testing.assert_array_equal(k_reciprocal(*features), expected)


def people(seed, num_query, num_gallery, dim=16):
    """Unit features of a few people, float32: neighbourhoods within and across them."""
    rng = np.random.default_rng(seed)
    num = num_query + num_gallery
    features = unit(rng, 6, dim)[rng.integers(0, 6, num)] + 0.1 * rng.standard_normal((num, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features[:num_query].astype(np.float32), features[num_query:].astype(np.float32)


@pytest.mark.parametrize("sizes", [(40, 60), (7, 3), (1, 1)])
@pytest.mark.parametrize(("k1", "k2"), [(4, 1), (2, 2), (20, 6)])
def test_affinity_inference_agrees_with_the_loop(sizes, k1, k2):
    features = people(1, *sizes)
    np.testing.assert_allclose(
        affinity_inference(*features, k1, k2), affinity_inference_loop(*features, k1, k2), atol=1e-5
    )


@pytest.mark.parametrize("sizes", [(40, 60), (7, 3), (1, 1)])
@pytest.mark.parametrize(("k1", "k2"), [(26, 7), (5, 2), (3, 3)])
def test_graph_propagation_agrees_with_the_loop(sizes, k1, k2):
    features = people(2, *sizes)
    np.testing.assert_allclose(
        graph_propagation(*features, k1, k2), graph_propagation_loop(*features, k1, k2), atol=1e-5
    )


def test_blocks_do_not_change_the_result(monkeypatch):
    features = people(3, 20, 30)
    expected = affinity_inference(*features), graph_propagation(*features)
    monkeypatch.setattr(reranking, "BLOCK", 7)
    for function, distmat in zip((affinity_inference, graph_propagation), expected, strict=True):
        np.testing.assert_allclose(function(*features), distmat, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RERANKING)
def test_tensors_give_tensors_and_arrays_arrays(name):
    features = people(4, 10, 20)
    distmat = RERANKING[name](*map(torch.from_numpy, features))
    assert distmat.dtype == torch.float32
    from_arrays = RERANKING[name](*features)
    assert isinstance(from_arrays, np.ndarray)
    np.testing.assert_allclose(distmat, from_arrays, atol=1e-6)


@pytest.mark.parametrize("name", RERANKING)
def test_features_that_are_not_unit_are_refused(name):
    query, gallery = people(5, 10, 20)
    with pytest.raises(ValueError, match=r"must be unit, and their norms are 1 to 5"):
        RERANKING[name](query, gallery * np.linspace(1, 5, 20)[:, None])
    RERANKING[name](torch.from_numpy(query).half(), torch.from_numpy(gallery).bfloat16())  # rounded is unit


def single_calls(function, query, gallery, *more):
    """The oracle of one query at a time: a call of the function for each."""
    return np.concatenate([function(query[k : k + 1], gallery, *more) for k in range(len(query))])


def in_single_precision(query, gallery, sizes):
    """What k_reciprocal ranks: squared distances, the largest, and who is nearest, equal ones in order."""
    images = torch.cat([query, gallery]).double()
    products = images @ images.T
    lengths = products.diagonal()
    squared = (lengths[:, None] + lengths - 2 * products).clamp(min=0).float()
    nearest = np.argsort(squared.numpy(), axis=1, kind="stable")[:, : max(sizes)]
    return squared[: len(query), len(query) :].contiguous(), squared.amax(1), nearest


@pytest.mark.parametrize("far", [False, True])  # far: queries are farther than the gallery's images
@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 1, 0.0), (5, 9, 0.5), (1, 1, 1.0), (130, 6, 0.3)]
)
def test_k_reciprocal_one_query_at_a_time_is_a_call_for_each(k1, k2, lambda_value, far, monkeypatch):
    query, gallery = people(6, 25, 120)
    query[3:6] = gallery[:3]  # equal images
    gallery[60:80] = gallery[40:60]
    gallery[80:] = gallery[80:] + 2 * gallery[80] if far else gallery[80:]
    gallery[80:] /= np.linalg.norm(gallery[80:], axis=1, keepdims=True)
    query = np.where(far & (np.arange(25) >= 6)[:, None], -query, query)
    monkeypatch.setattr(encoding, "_rank", in_single_precision)
    expected = single_calls(k_reciprocal, query, gallery, k1, k2, lambda_value)
    found = ONE_AT_A_TIME["k-reciprocal"](query, gallery, k1, k2, lambda_value)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("sizes", [(12, 90), (7, 3), (1, 1)])
@pytest.mark.parametrize(("k1", "k2"), [(26, 7), (5, 2), (3, 3)])
def test_gnn_one_query_at_a_time_is_a_call_for_each(sizes, k1, k2):
    features = people(7, *sizes)
    expected = single_calls(graph_propagation, *features, k1, k2)
    np.testing.assert_allclose(ONE_AT_A_TIME["gnn"](*features, k1, k2), expected, atol=1e-5)


def test_one_query_at_a_time_differs_from_a_call_only_where_half_precision_has_ties():
    query, gallery = (torch.from_numpy(each) for each in people(15, 40, 30, 64))
    found, same, tied = ONE_AT_A_TIME["k-reciprocal"](query, gallery, 6, 3), [], []
    for k in range(len(query)):
        roots, _ = half_precision.distances(
            half_precision.as_released(torch.cat([query[k : k + 1], gallery]))
        )
        squares = roots * roots
        ordered = (squares / half_precision.divisor(squares.amax(1, keepdim=True))).float().sort(1).values
        tied.append(len(half_precision.with_ties(ordered, half_precision.sizes_of(6, 3, 31))) > 0)
        same.append((found[k] - k_reciprocal(query[k : k + 1], gallery, 6, 3)[0]).abs().max() < 2e-6)
    assert all(equal or tie for equal, tie in zip(same, tied, strict=True))
    assert sum(tied) < len(tied)  # else nothing was compared


@pytest.mark.parametrize(("num_query", "num_gallery"), [(1, 1), (3, 1), (5, 8), (4, 21)])
def test_one_query_at_a_time_with_fewer_images_than_neighbours(num_query, num_gallery, monkeypatch):
    features = people(8, num_query, num_gallery)
    monkeypatch.setattr(encoding, "_rank", in_single_precision)
    expected = single_calls(k_reciprocal, *features)
    np.testing.assert_allclose(ONE_AT_A_TIME["k-reciprocal"](*features), expected, atol=2e-6)


def test_aim_has_no_partner_since_its_queries_do_not_affect_each_other():
    features = people(9, 12, 40)
    np.testing.assert_allclose(
        affinity_inference(*features), single_calls(affinity_inference, *features), atol=1e-6
    )
    assert set(RERANKING) - set(ONE_AT_A_TIME) == {"aim"}
    for name, function in ONE_AT_A_TIME.items():  # and the others' do
        assert np.abs(function(*features) - RERANKING[name](*features)).max() > 1e-3
        tensors = function(*map(torch.from_numpy, features))
        assert tensors.dtype == torch.float32
        np.testing.assert_allclose(tensors, function(*features), atol=1e-6)
