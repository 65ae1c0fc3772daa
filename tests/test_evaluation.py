import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_images, tiny_flags

from augmentation import normalize
from data_manager import DATASETS, Samples
from devices import Processes
from eval_metrics import eval_sysu
from evaluation import embedding, scoring
from evaluation.embedding import TestImages
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import rerank_title, reranking_of, rerankings_of, score
from evaluation.tables import Counts, counts_of, warnings
from images import read_image
from reranking import ONE_AT_A_TIME, RERANKING, affinity_inference
from utils import UserError

ALL, INDOOR = Protocol("sysu", "all"), Protocol("sysu", "indoor")


class Pixels(torch.nn.Module):
    """A network whose features are coarse pixels."""

    dim = 24

    def forward(self, visible=None, infrared=None):
        images = infrared if visible is None else visible
        return F.adaptive_avg_pool2d(images, (4, 2)).flatten(1)


def embed(images, trial=None, processes=None, **more):
    """The features of TestImages, or of an evaluation's at 32x16; with flip=True both."""
    images = images if isinstance(images, TestImages) else TestImages(images, 32, 16)
    cpu = torch.device("cpu")
    found = images.embed(Pixels(), cpu, None, 7, 1, processes or Processes(), trial, **more)
    return found if more else found[0]


def test_titles_spell_the_protocol_out():
    assert ALL.title == "SYSU-MM01, all, single-shot, seeded galleries"
    multi = Protocol("sysu", "indoor", 10, "published", "val")
    assert multi.row == "indoor, multi-shot, published galleries, val ids"
    assert Protocol("llcm", "visible-to-infrared").title == "LLCM, visible to infrared"


def test_features_and_scores(sysu):
    """Each image has one row, whichever protocols and trials use it; scores are those of its rows."""
    evaluated = Evaluation.draw(sysu, [ALL, INDOOR], range(10))
    used = {path for pair in evaluated.samples.values() for samples in pair for path in samples.paths}
    images = evaluated.images()
    assert sum(map(len, images.values())) == len(used)
    assert set(images["visible"].paths) | set(images["infrared"].paths) == used
    features = embed(evaluated)
    assert {m: len(own) for m, own in features.tensors.items()} == {m: len(own) for m, own in images.items()}
    np.testing.assert_allclose(features.tensors["visible"].norm(dim=1), 1, rtol=1e-6)
    scores = score(evaluated, features)
    assert [[each.trial for each in scores[protocol]] for protocol in (ALL, INDOOR)] == [list(range(10))] * 2
    query, gallery = evaluated.samples[INDOOR, 4]
    q, g = features.of(query), features.of(gallery)
    rows = features.rows["infrared"]
    torch.testing.assert_close(q[3], features.tensors["infrared"][rows[query.paths[3]]])
    expected = eval_sysu(-q @ g.T, query.pids, gallery.pids, query.camids, gallery.camids)
    found = scores[INDOOR][4]
    np.testing.assert_array_equal(found.metrics.cmc, expected.cmc)
    assert found.metrics.mAP == pytest.approx(expected.mAP, abs=1e-12)
    assert found.values.ap[found.values.counted].mean() == pytest.approx(expected.mAP, abs=1e-12)
    assert found.jackknife.persons == tuple(np.unique(query.pids[found.values.counted]).tolist())
    (one,) = score(evaluated, features, trial=4, intervals=False)[INDOOR]
    assert (one.metrics.mAP, one.jackknife) == (found.metrics.mAP, None)


def test_an_image_of_several_parts_is_listed_once():
    """Query, galleries and further images overlap; pids and camids stay with their paths."""

    def some(modality, *numbers):
        numbers = np.array(numbers)
        return Samples([f"{modality}{k}" for k in numbers], numbers + 5, numbers + 1, modality)

    visible, more = some("visible", 2, 0), some("visible", 0, 3)
    evaluated = Evaluation(
        {(ALL, 0): (some("infrared", 1), visible), (ALL, 1): (some("infrared", 4, 1), some("visible", 2))},
        more=[more],
    )
    images = evaluated.images()
    assert images["visible"].paths == ["visible2", "visible0", "visible3"]
    assert images["visible"].pids.tolist() == [7, 5, 8]
    assert images["infrared"].camids.tolist() == [2, 5]
    assert evaluated.images(0)["infrared"].paths == ["infrared1"]


def test_kept_images_are_decoded_once(sysu, monkeypatch):
    decoded = []
    original = embedding.decode
    monkeypatch.setattr(
        embedding, "decode", lambda paths, *a, **k: decoded.append(len(paths)) or original(paths, *a, **k)
    )
    evaluated = Evaluation.draw(sysu, [ALL], [0, 1])
    kept = TestImages(evaluated, 32, 16)
    kept.load(1, Processes())
    first, second, one = embed(kept), embed(kept), embed(kept, trial=1)
    assert sorted(decoded) == sorted(map(len, evaluated.images().values()))
    from_files = embed(evaluated)
    for modality, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[modality], rtol=0, atol=0)
        torch.testing.assert_close(tensor, from_files.tensors[modality], rtol=0, atol=1e-6)
        wanted = evaluated.images(1)[modality]
        torch.testing.assert_close(one.of(wanted), first.of(wanted), rtol=0, atol=1e-6)
        others = set(evaluated.images()[modality].paths) - set(wanted.paths)
        rows = [one.rows[modality][path] for path in others]
        assert (one.tensors[modality][rows] == 0).all()


@pytest.mark.parametrize("kept", [False, True])
def test_processes_share_the_images(sysu, kept):
    """What two processes decode and embed each adds up to what one embeds."""
    shares, evaluated = [], Evaluation.draw(sysu, [ALL], [0])
    for rank in range(2):
        images = TestImages(evaluated, 32, 16)
        processes = Processes()
        processes.rank, processes.world_size, processes.all_reduce = rank, 2, lambda tensor: tensor
        if kept:
            images.load(1, processes)
            for modality, samples in evaluated.images().items():
                assert len(images.pixels[modality]) == len(range(rank, len(samples), 2))
        shares.append(embed(images, processes=processes).tensors)
    for modality, whole in embed(evaluated).tensors.items():
        torch.testing.assert_close(shares[0][modality] + shares[1][modality], whole, rtol=0, atol=1e-6)
        assert ((shares[0][modality] == 0).all(1) ^ (shares[1][modality] == 0).all(1)).all()


def test_short_galleries(sysu):
    multi = Protocol("sysu", "indoor", 10)
    with pytest.raises(UserError, match="--shot 10"):
        Evaluation.draw(sysu, [multi], [0])
    gallery_cells = Evaluation.draw(sysu, [INDOOR], [0]).samples[INDOOR, 0][1]
    short = Evaluation.draw(sysu, [INDOOR, multi], [0, 1], allow_short=True).short
    assert short == f"{len(gallery_cells)} (id, camera) of the galleries have too few images"
    assert Evaluation.draw(sysu, [INDOOR], [0], allow_short=True).short == ""


def test_features_that_cannot_be_scored(sysu):
    evaluated = Evaluation.draw(sysu, [ALL], [0])
    features = embed(evaluated)
    features.tensors["visible"][0] = torch.nan
    with pytest.raises(UserError, match=r"SYSU-MM01, all, .*NaN"):
        score(evaluated, features)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate")])
def test_too_little_memory_is_told(sysu, monkeypatch, error):
    def rerank(query, gallery):
        raise error

    evaluated = Evaluation.draw(sysu, [ALL], [0])
    monkeypatch.setattr(scoring, "reranking_of", lambda *_: rerank)
    with pytest.raises(UserError, match=r"not enough memory for gnn re-ranking of .* queries and .* gallery"):
        score(evaluated, embed(evaluated), "gnn")


def test_flipping_averages_an_image_and_its_mirror(sysu):
    evaluated = Evaluation.draw(sysu, [ALL], [0])
    plain, (again, both) = embed(evaluated), embed(evaluated, flip=True)
    for modality, rows in plain.rows.items():
        assert both.tensors[modality].shape == (len(rows), Pixels.dim)
        torch.testing.assert_close(again.tensors[modality], plain.tensors[modality], rtol=0, atol=0)
        path, row = next(iter(rows.items()))
        pixels = read_image(path, 32, 16)
        own, mirror = F.normalize(Pixels()(normalize(torch.from_numpy(np.stack([pixels, pixels[:, ::-1]])))))
        assert (own - mirror).abs().max() > 1e-3
        mean = F.normalize(own + mirror, dim=0)
        torch.testing.assert_close(both.tensors[modality][row], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("protocol", "neighbours"),
    [
        (ALL, (4, 1)),
        (INDOOR, (2, 2)),
        (Protocol("sysu", "indoor", 10), (20, 6)),
        (Protocol("regdb", "visible-to-infrared"), (8, 2)),
        (Protocol("llcm", "infrared-to-visible"), (8, 2)),
    ],
)
def test_affinity_inference_has_the_neighbourhoods_of_the_gallery(protocol, neighbours):
    features = [F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n))) for n in (20, 40)]
    expected = affinity_inference(*features, *neighbours)
    torch.testing.assert_close(reranking_of(protocol, "aim")(*features), expected)
    assert reranking_of(protocol, None) is None


def test_every_re_ranked_row_has_its_partner_one_query_at_a_time():
    names = rerankings_of(["k-reciprocal", "aim", "gnn"])
    expected = ["k-reciprocal", "k-reciprocal, one query at a time", "aim", "gnn", "gnn, one query at a time"]
    assert names == [None, *expected]
    assert rerankings_of([]) == [None]
    assert rerank_title(names[2]) == ", k-reciprocal re-ranking, one query at a time"
    for name in ("k-reciprocal", "gnn"):
        assert reranking_of(ALL, name) is RERANKING[name]
        assert reranking_of(ALL, f"{name}, one query at a time") is ONE_AT_A_TIME[name]


# ---- what the numbers are based on


def write_images(root, folders):
    """A tree of one tiny image a folder, and the files that list ids."""
    for folder in folders:
        draw_images(root / folder, 1)
    return root


def sysu_tree(root, cameras, pids=(1, 2)):
    (root / "exp").mkdir(parents=True)
    for name, ids in (("train", "7"), ("val", "8"), ("test", ",".join(map(str, pids)))):
        (root / "exp" / f"{name}_id.txt").write_text(ids)
    return write_images(root, [f"cam{camid}/{pid:04d}" for camid in cameras for pid in (*pids, 7, 8)])


def test_counts(sysu):
    evaluated = Evaluation.draw(sysu, [ALL, INDOOR], [0, 1])
    query, gallery = evaluated.samples[INDOOR, 1]
    counts = counts_of(evaluated)[INDOOR, 1]
    images = set(zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True))
    matches = [
        any(own == pid and (camid, other) != (3, 2) for own, other in images)
        for pid, camid in zip(query.pids, query.camids, strict=True)
    ]
    assert (counts.queries, counts.gallery, counts.counted) == (len(query), len(gallery), sum(matches))
    assert counts.identities == len({*query.pids, *gallery.pids})


def test_queries_that_ignore_every_match_do_not_count(tmp_path):
    evaluated = Evaluation.draw(sysu_tree(tmp_path / "sysu", (2, 3, 6)), [ALL], [0])
    counts = counts_of(evaluated)[ALL, 0]
    assert counts == Counts(queries=4, gallery=2, identities=2, candidates=2, counted=2)
    assert "4 queries, 2 of them without a match" in str(counts)


def test_counts_that_are_not_the_published_ones_are_a_warning_for_each_protocol(sysu):
    found = counts_of(Evaluation.draw(sysu, [ALL, INDOOR], range(10)))
    lines = warnings(found)
    assert len(lines) == 2
    for line, protocol, expected in zip(lines, (ALL, INDOOR), ((301, 3803), (112, 2208)), strict=True):
        counts, (gallery, counted) = found[protocol, 0], expected
        assert line == (
            f"{protocol.title}: not the published counts (in parentheses): {counts.queries} queries (3,803), "
            f"{counts.gallery} gallery images ({gallery}), {counts.identities} identities (96), "
            f"{counts.counted} queries with a match ({counted:,})"
        )
    published = {
        (ALL, 0): Counts(3803, 301, 96, 96, 3803),
        (INDOOR, 0): Counts(3803, 112, 96, 56, 2208),
    }
    assert warnings(published) == []
    (warning,) = warnings(published | {(INDOOR, 1): Counts(3803, 112, 96, 56, 2207)})
    assert warning.startswith(INDOOR.title)
    assert warning.endswith(": 2,207 queries with a match (2,208)")


def test_a_gallery_of_one_identity_means_nothing(tmp_path):
    evaluated = Evaluation.draw(sysu_tree(tmp_path / "sysu", (1, 6), pids=(4,)), [ALL], [0])
    assert warnings(counts_of(evaluated))[1].startswith(
        "a gallery has one identity only: its metrics mean nothing"
    )


def no_match_of_sysu(tmp_path):
    rule = "SYSU-MM01, all, .*no query has a match: .*camera 2, which queries of camera 3 ignore"
    return sysu_tree(tmp_path / "sysu", (2, 3)), ALL, rule


def no_match_of_llcm(tmp_path):
    folders = [f"test_{way}/cam4/{pid:04d}" for way in ("vis", "nir") for pid in (1, 2)]
    root = write_images(tmp_path / "llcm", folders)
    (root / "idx").mkdir()
    (root / "idx" / "test_id.txt").write_text("1,2")
    return root, Protocol("llcm", "visible-to-infrared"), "LLCM, visible to infrared: no query .*own camera"


def no_match_of_regdb(tmp_path):
    root = write_images(tmp_path / "regdb", ["Visible/1", "Thermal/2"])
    (root / "idx").mkdir()
    for word, folder in (("visible", "Visible/1"), ("thermal", "Thermal/2")):
        (root / "idx" / f"test_{word}_1.txt").write_text(f"{folder}/0000.png {folder[-1]}\n")
    return root, Protocol("regdb", "infrared-to-visible"), "RegDB, infrared to visible: .*no id is in both"


@pytest.mark.parametrize("tree", [no_match_of_sysu, no_match_of_llcm, no_match_of_regdb])
def test_what_cannot_be_evaluated_is_refused_at_once(tree, tmp_path, train_here, capsys):
    """The evaluation, and so train.py, with --check and without, before it reads a training image."""
    root, protocol, rule = tree(tmp_path)
    with pytest.raises(UserError, match=rule):
        Evaluation.draw(root, [protocol], [DATASETS[protocol.dataset].trials[0]])
    capsys.readouterr()  # a warning of copies, where no test before has given the log another place
    for more in ([], ["--check"]):
        flags = "--dataset", protocol.dataset, "--mode", protocol.mode, *tiny_flags(root), *more
        status, _, (error,) = train_here(*flags)
        assert status == 2
        assert re.search(rule, error)
