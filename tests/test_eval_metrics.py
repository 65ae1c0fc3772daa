"""eval_metrics.py against the released code's values, against naive loops, and on degenerate inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

import eval_metrics
from eval_metrics import (
    Metrics,
    Trial,
    eval_features,
    eval_llcm,
    eval_regdb,
    eval_sysu,
    evaluate_queries,
    ignored_pairs,
    k_reciprocal,
    matched,
    summarize,
)
from evaluation import counting
from tests.oracles import evaluate_loop, ignored_images

CAMERAS = {"sysu": ((3, 6), (1, 2, 4, 5)), "regdb": ((1,), (2,)), "llcm": ((1, 2, 4), range(1, 10))}


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "metrics.npz")


def unit(rng, num, dim):
    features = rng.standard_normal((num, dim))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def draw(protocol, seed=0, num_query=60, num_gallery=150, num_pids=15):
    """Random pids (not contiguous, some without a match) and camids of a query and a gallery."""
    rng = np.random.default_rng(seed)
    pids = rng.choice(1000, num_pids, replace=False)
    q_cameras, g_cameras = CAMERAS[protocol]
    return (
        rng.choice(pids, num_query),
        rng.choice(pids[:-2], num_gallery),
        rng.choice(q_cameras, num_query),
        rng.choice(g_cameras, num_gallery),
    )


def eval_distmat(protocol, distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    if protocol == "regdb":
        return eval_regdb(distmat, q_pids, g_pids, max_rank)
    function = {"sysu": eval_sysu, "llcm": eval_llcm}[protocol]
    return function(distmat, q_pids, g_pids, q_camids, g_camids, max_rank)


def assert_same(ours, expected, tolerance=1e-9):
    assert ours[0].dtype == np.float64
    assert isinstance(ours[1], float)
    assert isinstance(ours[2], float)
    assert ours[0].shape == np.shape(expected[0])
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


# ---- against the released code


def test_golden_metrics(golden):
    distmat, q_pids, g_pids = golden["distmat"], golden["q_pids"], golden["g_pids"]
    results = {
        "sysu": eval_sysu(distmat, q_pids, g_pids, golden["q_camids"], golden["g_camids"]),
        "regdb": eval_regdb(distmat, q_pids, g_pids),
        "llcm": eval_llcm(distmat, q_pids, g_pids, golden["lq"], golden["lg"]),
    }
    for name, result in results.items():
        np.testing.assert_allclose(result.cmc, golden[f"{name}_cmc"], rtol=0, atol=1e-6)
        np.testing.assert_allclose((result.mAP, result.mINP), golden[name], rtol=0, atol=1e-12)


# ---- against naive loops


@pytest.mark.parametrize("shot", [1, 10])
def test_ten_published_style_trials_agree_with_the_loop(shot):
    """SYSU-MM01's protocol: fixed queries; each trial draws shot images of each (identity, camera)."""
    rng = np.random.default_rng(shot)
    pids = rng.choice(500, 24, replace=False)
    q_pids, q_camids = np.repeat(pids, 6), np.tile([3, 3, 3, 6, 6, 6], 24)
    query_features = unit(rng, len(q_pids), 32)
    cells = [(pid, camid) for pid in np.sort(pids) for camid in (1, 2, 4, 5) if (pid + camid) % 5]
    images = {cell: unit(rng, 14, 32) for cell in cells}
    g_pids, g_camids = (np.repeat(ids, shot) for ids in zip(*cells, strict=True))
    trials = []
    for _ in range(10):
        drawn = [images[cell][rng.permutation(14)[:shot]] for cell in cells]
        trials.append(Trial(query_features, np.concatenate(drawn), q_pids, g_pids, q_camids, g_camids))
    results = [evaluate_queries(trial, "sysu").metrics() for trial in trials]
    expected = [evaluate_loop(-trial[0] @ trial[1].T, *trial[2:], "sysu") for trial in trials]
    assert len(results) == 10
    for result, loop in zip(results, expected, strict=True):
        assert_same(result, loop)
    mean, std = summarize(results)
    assert_same(mean, [np.mean(values, axis=0) for values in zip(*expected, strict=True)])
    assert_same(std, [np.std(values, axis=0) for values in zip(*expected, strict=True)])


@pytest.mark.parametrize("protocol", CAMERAS)
@pytest.mark.parametrize("seed", range(4))
def test_distmat_agrees_with_the_loop(protocol, seed):
    ids = draw(protocol, seed)
    distmat = np.random.default_rng(seed).standard_normal((60, 150))  # negative distances among them
    assert_same(eval_distmat(protocol, distmat, *ids), evaluate_loop(distmat, *ids, protocol))


@pytest.mark.parametrize("protocol", CAMERAS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, torch.bfloat16])
def test_ties_rank_in_gallery_order_whatever_the_dtype(protocol, dtype):
    ids = draw(protocol)
    steps = np.random.default_rng(1).integers(-3, 4, (60, 150))
    if isinstance(dtype, torch.dtype):
        distmat = torch.from_numpy(steps).to(dtype)
        ids = tuple(map(torch.from_numpy, ids))
    else:
        distmat = steps.astype(dtype)
    expected = evaluate_loop(steps, *map(np.asarray, ids), protocol)
    assert_same(eval_distmat(protocol, distmat, *ids), expected)


@pytest.mark.parametrize("protocol", CAMERAS)
def test_all_distances_equal_or_infinite(protocol):
    ids = draw(protocol)
    for value in (0.0, np.inf, -np.inf):
        distmat = np.full((60, 150), value)
        assert_same(eval_distmat(protocol, distmat, *ids), evaluate_loop(distmat, *ids, protocol))


@pytest.mark.parametrize("protocol", CAMERAS)
def test_one_tie_between_a_match_and_another_identity(protocol):
    """The one tied pair, in both gallery orders, decides rank-1."""
    q_camids, g_camids = np.array([6]), np.array([1, 2, 4])
    for g_pids in ([7, 8, 7], [8, 7, 7]):
        ids = np.array([7]), np.array(g_pids), q_camids, g_camids
        distmat = np.array([[0.25, 0.25, 0.5]])
        result = eval_distmat(protocol, distmat, *ids)
        assert result.cmc[0] == (g_pids[0] == 7)
        assert_same(result, evaluate_loop(distmat, *ids, protocol))


@pytest.mark.parametrize("protocol", CAMERAS)
@pytest.mark.parametrize("ties", [False, True])
def test_more_matches_than_are_counted_one_by_one(protocol, ties):
    rng = np.random.default_rng(3)
    q_pids, g_pids = rng.choice([5, 9], 12), rng.choice([5, 9, 11], 400, p=[0.7, 0.2, 0.1])
    assert (g_pids == 5).sum() > counting.FEW_MATCHES
    ids = q_pids, g_pids, rng.choice(CAMERAS[protocol][0], 12), rng.choice(CAMERAS[protocol][1], 400)
    distmat = rng.integers(0, 50, (12, 400)) if ties else rng.standard_normal((12, 400))
    assert_same(eval_distmat(protocol, distmat, *ids), evaluate_loop(distmat, *ids, protocol))


@pytest.mark.parametrize("protocol", CAMERAS)
def test_blocks_do_not_change_the_result(protocol, monkeypatch):
    rng = np.random.default_rng(4)
    ids = draw(protocol)
    features = unit(rng, 60, 16), unit(rng, 150, 16)
    expected = evaluate_loop(-features[0] @ features[1].T, *ids, protocol)
    for product, cached in ((1, 1), (900, 300), (10**4, 10**3), (10**6, 10**6)):
        monkeypatch.setattr(eval_metrics, "PRODUCT", product)
        monkeypatch.setattr(eval_metrics, "CACHED", cached)
        assert_same(eval_features(*features, *ids, protocol), expected)


@pytest.mark.parametrize("protocol", CAMERAS)
def test_torch_and_numpy_features_agree(protocol):
    rng = np.random.default_rng(5)
    ids = draw(protocol)
    features = unit(rng, 60, 16), unit(rng, 150, 16)
    from_numpy = eval_features(*features, *ids, protocol)
    tensors = [torch.from_numpy(array).float().requires_grad_() for array in features]
    with torch.autocast("cpu", torch.bfloat16):  # metrics stay in float32
        from_torch = eval_features(*tensors, *map(torch.from_numpy, ids), protocol)
    assert_same(from_torch, from_numpy)


# ---- degenerate inputs


def test_one_query_one_image():
    for protocol in CAMERAS:
        ids = np.array([[4], [4], [6], [1]])
        assert_same(eval_distmat(protocol, np.array([[0.5]]), *ids, max_rank=3), (np.ones(3), 1.0, 1.0))


def test_gallery_smaller_than_max_rank_holds_the_last_value():
    distmat, q_pids, g_pids = np.array([[0.1, 0.2, 0.3]]), np.array([1]), np.array([3, 2, 1])
    camids = np.array([6]), np.array([1, 1, 1])
    expected = np.r_[0.0, 0.0, np.ones(18)]
    np.testing.assert_array_equal(eval_sysu(distmat, q_pids, g_pids, *camids).cmc, expected)
    np.testing.assert_array_equal(eval_regdb(distmat, q_pids, g_pids).cmc, expected)


def test_every_image_of_the_same_pid():
    rng = np.random.default_rng(6)
    for protocol in CAMERAS:
        ids = (np.full(9, 3), np.full(30, 3), rng.choice([3, 6], 9), rng.choice([1, 2, 3], 30))
        distmat = rng.random((9, 30))
        assert_same(eval_distmat(protocol, distmat, *ids), (np.ones(20), 1.0, 1.0))


def test_sysu_ignores_camera_2_for_camera_3_only():
    """The other identity's camera-2 image is nearest; only the camera-6 query sees it."""
    distmat, q_pids, g_pids = np.array([[0.1, 0.2]] * 2), np.array([1, 1]), np.array([2, 1])
    cmc, mAP, _ = eval_sysu(distmat, q_pids, g_pids, np.array([3, 6]), np.array([2, 4]))
    assert (cmc[0], cmc[1], mAP) == (0.5, 1.0, 0.75)


def test_llcm_ignores_the_same_pid_in_the_same_camera_only():
    distmat, q_pids, g_pids = np.array([[0.1, 0.2, 0.3]]), np.array([1]), np.array([1, 2, 1])
    cmc, mAP, mINP = eval_llcm(distmat, q_pids, g_pids, np.array([5]), np.array([5, 5, 6]))
    assert (cmc[0], cmc[1], mAP, mINP) == (0.0, 1.0, 0.5, 0.5)


def test_no_query_left():
    camids = np.array([3, 3]), np.array([2, 2])
    pids = np.array([1, 2]), np.array([1, 2])
    distmat = np.zeros((2, 2))
    for call in (
        lambda: eval_sysu(distmat, *pids, *camids),
        lambda: eval_llcm(distmat, *pids, camids[1], camids[1]),
        lambda: eval_regdb(distmat, pids[0], pids[1] + 5),
        lambda: eval_regdb(distmat[:, :0], pids[0], pids[1][:0]),
        lambda: eval_regdb(distmat[:0], pids[0][:0], pids[1]),
    ):
        with pytest.raises(ValueError, match="no query has a match"):
            call()


def test_bad_input_is_named():
    distmat, pids = np.zeros((2, 3)), (np.array([1, 2]), np.array([1, 2, 2]))
    for value, message in (
        (lambda: eval_regdb(np.where([[1, 0, 0]] * 2, np.nan, distmat), *pids), "distmat holds NaN"),
        (lambda: eval_regdb(distmat, pids[1], pids[1]), r"q_pids must have shape \(2,\)"),
        (lambda: eval_sysu(distmat, *pids, pids[0], pids[0]), r"g_camids must have shape \(3,\)"),
        (lambda: eval_regdb(distmat[0], *pids), "distmat must be"),
        (lambda: eval_regdb(distmat, *pids, max_rank=0), "max_rank"),
        (lambda: eval_features(distmat.T, distmat.T, *pids[::-1], None, None, "market"), "protocol"),
        (lambda: eval_features(np.full((2, 4), np.nan), np.zeros((3, 4)), *pids, None, None, "regdb"), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            value()


@pytest.mark.parametrize("protocol", CAMERAS)
def test_inputs_are_left_as_they_are(protocol):
    q_pids, g_pids, q_camids, g_camids = draw(protocol)
    q_pids = np.random.default_rng(6).choice(g_pids, len(q_pids))  # so that no row is left out
    ids = q_pids, g_pids, q_camids, g_camids
    distmat = np.random.default_rng(7).integers(0, 4, (60, 150)).astype(np.float32)  # ties
    before = distmat.copy()
    eval_distmat(protocol, torch.from_numpy(distmat), *ids)
    np.testing.assert_array_equal(distmat, before)
    distmat.setflags(write=False)
    eval_distmat(protocol, distmat, *ids)
    np.testing.assert_array_equal(distmat, before)


@pytest.mark.parametrize("protocol", CAMERAS)
def test_which_queries_have_a_match(protocol):
    q_pids, g_pids, q_camids, g_camids = draw(protocol, num_gallery=40)
    expected = []
    for pid, camid in zip(q_pids, q_camids, strict=True):
        ignored = ignored_images(protocol, pid, camid, g_pids, g_camids)
        expected.append(bool((g_pids[~ignored] == pid).any()))
    assert 0 < sum(expected) < len(expected)
    assert matched(protocol, q_pids, g_pids, q_camids, g_camids).tolist() == expected


# ---- each query's own values


@pytest.mark.parametrize("protocol", CAMERAS)
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_values_of_each_query_are_those_of_the_query_alone(protocol, distance):
    rng = np.random.default_rng(8)
    ids = q_pids, g_pids, q_camids, g_camids = draw(protocol, num_gallery=40)
    features = unit(rng, 60, 16), unit(rng, 40, 16)
    if distance == "euclidean":
        features = [50 + rng.uniform(1, 3, (len(values), 1)) * values for values in features]
    values = evaluate_queries(Trial(*features, *ids), protocol, distance=distance)
    q, g = (array.astype(np.float32).astype(float) for array in features)
    distmat = -q @ g.T if distance == "cosine" else np.linalg.norm(q[:, None] - g, axis=2)
    assert 0 < values.counted.sum() < 60
    for k in range(60):
        ignored = ignored_images(protocol, q_pids[k], q_camids[k], g_pids, g_camids)
        assert values.counted[k] == (g_pids[~ignored] == q_pids[k]).any()
        if values.counted[k]:
            own = distmat[k : k + 1], q_pids[k : k + 1], g_pids, q_camids[k : k + 1], g_camids
            cmc, ap, inp = evaluate_loop(*own, protocol, 40)
            assert (values.ap[k], values.inp[k]) == pytest.approx((ap, inp), abs=1e-12)
            assert values.first[k] == 1 + (cmc == 0).sum()
        else:
            assert (np.isnan(values.ap[k]), np.isnan(values.inp[k]), values.first[k]) == (True, True, 0)


@pytest.mark.parametrize("protocol", CAMERAS)
def test_which_pairs_are_ignored(protocol):
    q_pids, g_pids, q_camids, g_camids = draw(protocol)
    expected = [
        ignored_images(protocol, pid, camid, g_pids, g_camids)
        for pid, camid in zip(q_pids, q_camids, strict=True)
    ]
    np.testing.assert_array_equal(ignored_pairs(protocol, q_pids, g_pids, q_camids, g_camids), expected)


# ---- ids and features as other programs write them


@pytest.mark.parametrize("dtype", [">i4", "<u2", "float64", ">f4", "uint8"])
def test_ids_of_any_kind_of_whole_numbers(dtype):
    ids = tuple(values % 200 if dtype == "uint8" else values for values in draw("sysu"))
    distmat = np.random.default_rng(1).standard_normal((60, 150))
    written = [values.astype(dtype) for values in ids]
    assert_same(eval_sysu(distmat, *written), evaluate_loop(distmat, *ids, "sysu"))
    assert_same(eval_sysu(distmat.astype(">f8"), *ids), evaluate_loop(distmat, *ids, "sysu"))


def test_ids_that_are_none_are_refused_by_name():
    distmat, (q_pids, g_pids, q_camids, g_camids) = np.zeros((60, 150)), draw("sysu")
    fraction = g_pids.astype(float)
    fraction[3] += 0.25
    for ids, message in (
        ((q_pids.astype(str), g_pids, q_camids, g_camids), "q_pids: numbers are needed, not <U"),
        ((q_pids, g_pids.astype(object), q_camids, g_camids), "g_pids: numbers are needed, not object"),
        ((q_pids, fraction, q_camids, g_camids), r"g_pids must be whole numbers, and \d+\.25 is none"),
        ((q_pids, torch.from_numpy(fraction), q_camids, g_camids), "g_pids must be whole numbers"),
        ((q_pids, np.full(150, np.nan), q_camids, g_camids), "g_pids must be whole numbers, and nan"),
        ((q_pids, g_pids, q_camids - 1, g_camids - 1), "cameras of SYSU-MM01 are 1 to 6, .* are 0 to 4"),
        ((q_pids, g_pids, q_camids + 1, g_camids), "q_camids: the cameras .* are 4 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_sysu(distmat, *ids)


def test_features_that_are_not_unit_are_refused():
    rng, ids = np.random.default_rng(0), draw("sysu")
    query, gallery = unit(rng, 60, 16), unit(rng, 150, 16)
    longer = gallery * np.linspace(0.2, 5, 150)[:, None]
    with pytest.raises(ValueError, match=r"must be unit, and their norms are 0\.2 to 5"):
        eval_features(query, longer, *ids, "sysu")
    rounded = torch.from_numpy(query).bfloat16(), torch.from_numpy(gallery).half()
    eval_features(*rounded, *map(torch.from_numpy, ids), "sysu")


def test_trials_re_ranked():
    rng = np.random.default_rng(12)
    ids = draw("sysu")
    trial = Trial(unit(rng, 60, 16), unit(rng, 150, 16), *ids)
    result = evaluate_queries(trial, "sysu", k_reciprocal).metrics(10)
    assert isinstance(result, Metrics)
    distmat = k_reciprocal(trial.query_features, trial.gallery_features)
    assert_same(result, evaluate_loop(distmat, *ids, "sysu", 10))
