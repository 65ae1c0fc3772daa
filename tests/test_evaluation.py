import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluation
from devices import Processes
from eval_metrics import eval_sysu
from evaluation import Evaluation, Protocol
from utils import UserError

ALL, INDOOR = Protocol("sysu", "all"), Protocol("sysu", "indoor")


class Pixels(torch.nn.Module):
    """A network whose features are coarse pixels."""

    dim = 24

    def forward(self, visible=None, infrared=None):
        images = infrared if visible is None else visible
        return F.adaptive_avg_pool2d(images, (4, 2)).flatten(1)


def embed(evaluated, trial=None, processes=None):
    cpu = torch.device("cpu")
    return evaluated.features(Pixels(), cpu, None, 7, 1, processes or Processes(), trial)


def test_titles_spell_the_protocol_out():
    assert ALL.title == "SYSU-MM01, all, single-shot, seeded galleries"
    multi = Protocol("sysu", "indoor", 10, "published", "val")
    assert multi.row == "indoor, multi-shot, published galleries, val ids"
    assert Protocol("llcm", "visible-to-infrared").title == "LLCM, visible to infrared"


def test_features_and_scores(sysu):
    """Each image has one row, whichever protocols and trials use it; scores are those of its rows."""
    evaluated = Evaluation(sysu, [ALL, INDOOR], range(10), 32, 16)
    used = {path for samples in evaluated.all_samples() for path in samples.paths}
    assert sum(map(len, evaluated.rows.values())) == len(used)
    features = embed(evaluated)
    assert {modality: len(own) for modality, own in features.items()} == {
        modality: len(rows) for modality, rows in evaluated.rows.items()
    }
    np.testing.assert_allclose(features["visible"].norm(dim=1), 1, rtol=1e-6)
    scores = evaluated.score(features)
    assert [len(scores[protocol]) for protocol in (ALL, INDOOR)] == [10, 10]
    query, gallery = evaluated.samples[INDOOR, 4]
    q = features["infrared"][[evaluated.rows["infrared"][path] for path in query.paths]]
    g = features["visible"][[evaluated.rows["visible"][path] for path in gallery.paths]]
    expected = eval_sysu(-q @ g.T, query.pids, gallery.pids, query.camids, gallery.camids)
    np.testing.assert_array_equal(scores[INDOOR][4].cmc, expected.cmc)
    assert scores[INDOOR][4].mAP == pytest.approx(expected.mAP, abs=1e-12)
    assert evaluated.score(features, trial=4)[INDOOR][0].mAP == scores[INDOOR][4].mAP


def test_kept_images_are_decoded_once(sysu, monkeypatch):
    decoded = []
    original = evaluation.decode
    monkeypatch.setattr(
        evaluation, "decode", lambda paths, *a, **k: decoded.append(len(paths)) or original(paths, *a, **k)
    )
    evaluated = Evaluation(sysu, [ALL], [0, 1], 32, 16)
    evaluated.load(1, Processes())
    first, second, one = embed(evaluated), embed(evaluated), embed(evaluated, trial=1)
    assert sorted(decoded) == sorted(map(len, evaluated.rows.values()))
    from_files = embed(Evaluation(sysu, [ALL], [0, 1], 32, 16))
    for modality, rows in evaluated.rows.items():
        torch.testing.assert_close(first[modality], second[modality], rtol=0, atol=0)
        torch.testing.assert_close(first[modality], from_files[modality], rtol=0, atol=1e-6)
        wanted = [
            rows[path]
            for samples in evaluated.all_samples(1)
            if samples.modality == modality
            for path in samples.paths
        ]
        torch.testing.assert_close(one[modality][wanted], first[modality][wanted], rtol=0, atol=1e-6)
        others = sorted(set(rows.values()) - set(wanted))
        assert (one[modality][others] == 0).all()


@pytest.mark.parametrize("kept", [False, True])
def test_processes_share_the_images(sysu, kept):
    """What two processes decode and embed each adds up to what one embeds."""
    shares = []
    for rank in range(2):
        evaluated = Evaluation(sysu, [ALL], [0], 32, 16)
        processes = Processes()
        processes.rank, processes.world_size, processes.all_reduce = rank, 2, lambda tensor: tensor
        if kept:
            evaluated.load(1, processes)
            for modality, rows in evaluated.rows.items():
                assert len(evaluated.pixels[modality]) == len(range(rank, len(rows), 2))
        shares.append(embed(evaluated, processes=processes))
    evaluated = Evaluation(sysu, [ALL], [0], 32, 16)
    for modality, whole in embed(evaluated).items():
        torch.testing.assert_close(shares[0][modality] + shares[1][modality], whole, rtol=0, atol=1e-6)
        assert ((shares[0][modality] == 0).all(1) ^ (shares[1][modality] == 0).all(1)).all()


def test_short_galleries(sysu):
    multi = Protocol("sysu", "indoor", 10)
    with pytest.raises(UserError, match="--shot 10"):
        Evaluation(sysu, [multi], [0], 32, 16)
    gallery_cells = Evaluation(sysu, [INDOOR], [0], 32, 16).samples[INDOOR, 0][1]
    short = Evaluation(sysu, [INDOOR, multi], [0, 1], 32, 16, allow_short=True).short
    assert short == f"{len(gallery_cells)} (id, camera) of the galleries have too few images"
    assert Evaluation(sysu, [INDOOR], [0], 32, 16, allow_short=True).short == ""


def test_features_that_cannot_be_scored(sysu):
    evaluated = Evaluation(sysu, [ALL], [0], 32, 16)
    features = embed(evaluated)
    features["visible"][0] = torch.nan
    with pytest.raises(UserError, match=r"SYSU-MM01, all, .*NaN"):
        evaluated.score(features)
