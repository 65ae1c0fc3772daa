"""One set of drawn features, judged by this project and by the packages of other people that are installed.

    python -m tests.comparing
    python -m tests.comparing --features FILE.npz … --data-path DIR

docs/comparing.md says which packages, and has the tables that this prints. The second command asks what
re-ranking owes to the other queries, of networks' features that test.py --save-features wrote. Of a missing
package a line says `not measured`. Files of packages are loaded one by one, unchanged: their own imports want
much more.
"""

import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from eval_metrics import eval_llcm, eval_regdb, eval_sysu, evaluate_distmat
from evaluation.methods import find_methods
from evaluation.scoring import reranking_of
from reranking import ONE_AT_A_TIME, RERANKING
from test import get_args_parser

PERSONS, UNMATCHED = 40, 4  # the last ones have queries only
DIM = 64
QUERY_CAMERAS, GALLERY_CAMERAS = (3, 6), (1, 2, 4, 5)  # SYSU-MM01's; 2 and 3 are in the same room


def draw(seed: int = 0) -> dict[str, np.ndarray]:
    """Features as a network gives them, not normalised, of images and of their mirrors; pids and camids.

    Query features are shifted, as another modality's are, and lengths differ. Cameras 2 and 3 look alike.
    """
    rng = np.random.default_rng(seed)
    persons, rooms = rng.standard_normal((PERSONS, DIM)), 0.5 * rng.standard_normal((7, DIM))
    rooms[3] = rooms[2] + 0.1 * rng.standard_normal(DIM)
    shift, drawn = 0.5 * rng.standard_normal(DIM), {}
    for side, cameras, count in (("q", QUERY_CAMERAS, PERSONS), ("g", GALLERY_CAMERAS, PERSONS - UNMATCHED)):
        ids = [(p, c) for p in range(count) for c in cameras for _ in range(4)]
        pids, camids = np.array(ids).T
        clean = persons[pids] + rooms[camids] + (shift if side == "q" else 0)
        lengths = rng.uniform(5, 40, (len(pids), 1))
        for name in ("features", "mirrored"):
            noisy = clean + 1.6 * rng.standard_normal(clean.shape)
            drawn[f"{side}_{name}"] = unit(noisy) * lengths * rng.uniform(0.8, 1.25, lengths.shape)
        drawn |= {f"{side}_pids": pids, f"{side}_camids": camids}
    return drawn


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of unit norm."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def load(package: str, file: str) -> types.ModuleType:
    """A file of an installed package, without the package's own imports.

    Raises:
        ImportError: the package is not installed, or the file needs another one that is not.
    """
    root = importlib.util.find_spec(package)
    if root is None:
        raise ImportError(f"{package} is not installed")
    path = Path(root.origin).parent / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Cython's version is not built: Python's is the same
        spec.loader.exec_module(module)
    return module


def rows() -> list[tuple[str, str, Callable[[], tuple[float | None, float]]]]:
    """(who, how, what gives rank-1 or None and mAP in [0, 1])."""
    drawn = draw()
    raw = drawn["q_features"], drawn["g_features"]
    q, g = map(unit, raw)
    ids = drawn["q_pids"], drawn["g_pids"]
    cameras = drawn["q_camids"], drawn["g_camids"]
    distmat = 1 - q @ g.T

    def ours(function, distances, *more):
        cmc, mean_ap, _ = function(distances, *more)
        return cmc[0], mean_ap

    def regdb(distances):
        return ours(eval_regdb, distances, *ids)

    def reid(package, file, *camids):
        found = load(package, file).evaluate_rank(distmat, *ids, *camids, use_cython=False)
        return found[0][0], np.mean(found[1])

    def sklearn():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of queries without a match
            matches = ids[0][:, None] == ids[1]
            pairs = zip(matches, -distmat, strict=True)
            return None, np.mean([average_precision_score(*pair) for pair in pairs])

    def metric_learning(k):
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

        names = ("precision_at_1", "mean_average_precision")
        features = (torch.from_numpy(x).float() for x in (q, g))
        pids = map(torch.from_numpy, ids)
        query, gallery, q_pids, g_pids = *features, *pids
        calculator = AccuracyCalculator(include=names, k=k, device=torch.device("cpu"))
        found = calculator.get_accuracy(query, q_pids, gallery, g_pids)
        return tuple(found[name] for name in names)

    def open_metric_learning(k):
        from oml.functional.metrics import calc_retrieval_metrics

        retrieved = torch.from_numpy(np.argsort(distmat, axis=1, kind="stable")[:, :k].copy())
        relevant = [torch.from_numpy(np.flatnonzero(pid == ids[1])) for pid in ids[0]]
        found = calc_retrieval_metrics(
            list(retrieved), relevant, cmc_top_k=(1,), map_top_k=(k,), precision_top_k=(), verbose=False
        )
        return float(found["cmc"][1]), float(found["map"][k])

    def torchmetrics(scores, top_k=None):
        from torchmetrics.retrieval import RetrievalMAP

        metric = RetrievalMAP(top_k=top_k)
        rows = torch.arange(len(q)).repeat_interleave(len(g))
        right = torch.from_numpy(ids[0][:, None] == ids[1])
        metric.update(torch.from_numpy(scores).flatten(), right.flatten(), rows)
        return None, float(metric.compute())

    def torchreid_reranking(query, gallery, root):
        module = load("torchreid", "reid/metrics/distance.py")
        tensors = [torch.from_numpy(x).float() for x in (query, gallery)]
        pairs = ((0, 1), (0, 0), (1, 1))
        between = [module.compute_distance_matrix(tensors[a], tensors[b], "euclidean") for a, b in pairs]
        between = [each.clamp(min=0).sqrt() if root else each for each in between]
        return regdb(load("torchreid", "reid/utils/rerank.py").re_ranking(*(x.numpy() for x in between)))

    def fastreid_jaccard(query, gallery):
        module = importlib.import_module("fastreid.utils.compute_dist")
        both = torch.from_numpy(np.concatenate([query, gallery])).float()
        jaccard = module.compute_jaccard_distance(both, search_option=3)[: len(query), len(query) :]
        return regdb(0.7 * jaccard + 0.3 * distmat)

    def flipped(combine):
        sides = [combine(drawn[f"{side}_features"], drawn[f"{side}_mirrored"]) for side in "qg"]
        return regdb(1 - unit(sides[0]) @ unit(sides[1]).T)

    same_room = tuple(np.where(camids == 3, 2, camids) for camids in cameras)
    unmatched_as_zero = np.isin(*ids).mean()
    plain = "everything counts, unmatched queries left out"
    torchreid, fastreid = ("torchreid", "reid/metrics/rank.py"), ("fastreid", "evaluation/rank.py")
    pml, oml = "pytorch-metric-learning", "open-metric-learning"
    k_reciprocal, alone = RERANKING["k-reciprocal"], ONE_AT_A_TIME["k-reciprocal"]
    return [
        ("here, eval_regdb", plain, lambda: regdb(distmat)),
        (
            "here, eval_sysu",
            "camera 2 ignored for camera 3",
            lambda: ours(eval_sysu, distmat, *ids, *cameras),
        ),
        ("here, eval_llcm", "rooms as cameras", lambda: ours(eval_llcm, distmat, *ids, *same_room)),
        ("torchreid", "camids as they are", lambda: reid(*torchreid, *cameras)),
        ("torchreid", "rooms as cameras", lambda: reid(*torchreid, *same_room)),
        ("fastreid", "camids as they are", lambda: reid(*fastreid, *cameras)),
        ("fastreid", "rooms as cameras", lambda: reid(*fastreid, *same_room)),
        ("here", "unmatched queries as zero", lambda: tuple(unmatched_as_zero * x for x in regdb(distmat))),
        ("scikit-learn", "average_precision_score, mean over all queries", sklearn),
        (pml, "k=None", lambda: metric_learning(None)),
        (pml, "k=5", lambda: metric_learning(5)),
        (oml, "k = the gallery", lambda: open_metric_learning(len(g))),
        (oml, "k=100, its default", lambda: open_metric_learning(100)),
        (oml, "map@5", lambda: open_metric_learning(5)),
        ("torchmetrics", "RetrievalMAP of negated distances", lambda: torchmetrics(-distmat)),
        ("torchmetrics", "RetrievalMAP of cosines", lambda: torchmetrics(1 - distmat)),
        ("torchmetrics", "RetrievalMAP of 1 + cosine", lambda: torchmetrics(2 - distmat)),
        ("torchmetrics", "RetrievalMAP of 1 + cosine, top_k=5", lambda: torchmetrics(2 - distmat, 5)),
        ("here", "roles swapped", lambda: ours(eval_regdb, distmat.T, *ids[::-1])),
        ("torchreid", "roles swapped", lambda: swapped(load(*torchreid), distmat, ids, cameras)),
        ("here", "features not normalised, Euclidean", lambda: regdb(euclidean(*raw))),
        ("here", "k-reciprocal, all queries together", lambda: regdb(k_reciprocal(q, g))),
        ("here", "k-reciprocal, one query at a time", lambda: regdb(alone(q, g))),
        ("torchreid", "re_ranking of its own distances", lambda: torchreid_reranking(q, g, False)),
        ("torchreid", "re_ranking of their roots", lambda: torchreid_reranking(q, g, True)),
        ("torchreid", "re_ranking, not normalised", lambda: torchreid_reranking(*raw, False)),
        ("fastreid", "Jaccard and cosine, normalised", lambda: fastreid_jaccard(q, g)),
        ("fastreid", "Jaccard not normalised, and cosine", lambda: fastreid_jaccard(*raw)),
        ("here", "flip: unit features averaged", lambda: flipped(lambda a, b: unit(a) + unit(b))),
        ("here", "flip: raw features averaged", lambda: flipped(lambda a, b: a + b)),
    ]


def swapped(module: types.ModuleType, distmat: np.ndarray, ids: tuple, cameras: tuple) -> tuple:
    """torchreid's rank-1 and mAP with the gallery's images as queries."""
    cmc, mean_ap = module.evaluate_rank(distmat.T, *ids[::-1], *cameras[::-1], use_cython=False)
    return cmc[0], mean_ap


def euclidean(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(Q, G) Euclidean distances."""
    return torch.cdist(torch.from_numpy(query), torch.from_numpy(gallery)).numpy()


def shares(words: list[str]) -> None:
    """Print a table of re-ranked rank-1 / mAP, the mean over trials, by the queries that take part.

    words: flags of test.py; a column for each network.
    """
    methods = find_methods(get_args_parser, words)
    for method in methods:
        method.evaluate(torch.device("cpu"))
    names = [Path(method.name).stem for method in methods]
    print(f"| re-ranking | queries | {' | '.join(names)} |\n|---|---|{'---:|' * len(names)}")

    def measure(method, rerank) -> str:
        found = []
        for (protocol, _), (query, gallery) in method.evaluation.samples.items():
            arrays = [method.features.of(samples).numpy() for samples in (query, gallery)]
            distmat = rerank(*arrays, query.pids, protocol)
            ids = query.pids, gallery.pids, query.camids, gallery.camids
            values = evaluate_distmat(distmat, *ids, protocol.rule).metrics()
            found.append((values.cmc[0], values.mAP))
        return " / ".join(f"{100 * x:.2f}" for x in np.mean(found, axis=0))

    def tell(name, queries, rerank):
        print(f"| {name} | {queries} | {' | '.join(measure(m, rerank) for m in methods)} |", flush=True)

    tell("none", "", lambda q, g, *_: 1 - q @ g.T)
    for name, alone in ONE_AT_A_TIME.items():
        rerank = RERANKING[name]

        def others(q, g, pids, _, rerank=rerank):
            """Each query with the other persons' alone."""
            kept = (np.flatnonzero((pids != pid) | (np.arange(len(q)) == k)) for k, pid in enumerate(pids))
            return np.stack([rerank(q[rows], g)[rows == k][0] for k, rows in enumerate(kept)])

        tell(name, "all", lambda q, g, *_, rerank=rerank: rerank(q, g))
        tell(name, "none of the query's own person", others)
        tell(name, "one at a time", lambda q, g, *_, alone=alone: alone(q, g))
    tell("aim", "no matter", lambda q, g, _, protocol: reranking_of(protocol, "aim")(q, g))

    def nearest_quarter(q, g, _, protocol):
        """As tools.search does it: what is further away stays where it is."""
        distmat = 1 - q @ g.T
        for query, row in zip(q, distmat, strict=True):
            places = np.argsort(row, kind="stable")[: len(g) // 4]
            row[places] = reranking_of(protocol, "aim")(query[None], g[places])[0] - 4  # 2 at most before
        return distmat

    tell("aim", "no matter; the nearest quarter of the gallery alone", nearest_quarter)


def main() -> None:
    """Print a table in Markdown; of a package that is missing, and why, on stderr."""
    if len(sys.argv) > 1:
        return shares(sys.argv[1:])
    print("| by | version | how | rank-1 | mAP |\n|---|---|---|---:|---:|")
    for who, how, measure in rows():
        name = who.partition(",")[0]
        try:
            version = "" if name == "here" else importlib.metadata.version(name)
            numbers = ["" if x is None else f"{100 * x:.2f}" for x in measure()]
        except ImportError as error:
            print(f"{who}: {error}", file=sys.stderr)
            version, numbers = "", ["not measured"] * 2
        print("| " + " | ".join((who, version, how, *numbers)) + " |")


if __name__ == "__main__":
    main()
