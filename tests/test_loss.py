"""loss.py against the released code's values and against loops written from docs/method.md, section 6."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from devices import Processes
from loss import (
    BASELINE_WEIGHTS,
    MCE,
    WEIGHTS,
    Baseline,
    align_loss,
    center_triplet_loss,
    hard_triplet_loss,
    mce_loss,
    weighted_triplet_loss,
)
from memory import MemoryBank
from utils import MODALITIES

GOLDEN = Path(__file__).parent / "golden"


def random_bank(num_classes=6, dim=8, updated=True):
    torch.manual_seed(0)
    bank = MemoryBank(num_classes, dim)
    bank.reset({modality: torch.randn(num_classes, dim) for modality in MODALITIES})
    if updated:
        bank.update(random_features(num_classes, dim, seed=5), torch.arange(num_classes))
    return bank


def random_features(n, dim=8, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(3, n, dim, generator=generator), dim=-1).to(dtype)
    return dict(zip(MODALITIES, features, strict=True))


@pytest.mark.parametrize(("name", "proxies"), [("mce_gx0", "historical"), ("mce_gx1", "updated")])
def test_three_steps_agree_with_the_released_code(name, proxies):
    golden = np.load(GOLDEN / f"{name}.npz")
    centers = torch.tensor(golden["centers"])
    bank = MemoryBank(*centers.shape[1:])
    bank.reset(dict(zip(MODALITIES, centers, strict=True)))
    for step in range(3):
        labels = torch.tensor(golden[f"ids{step}"])
        raw = torch.tensor(golden[f"feat{step}"], requires_grad=True)
        features = dict(zip(MODALITIES, F.normalize(raw).chunk(3), strict=True))
        total, terms = mce_loss(features, labels, bank, proxies=proxies)
        total.backward()
        bank.update(features, labels)
        assert total.item() == pytest.approx(float(golden[f"loss{step}"]), rel=1e-5)
        found = [terms[k].item() for k in ("center", "shared", "visible", "infrared", "aux", "align")]
        np.testing.assert_allclose(found, golden[f"terms{step}"], rtol=1e-5)
        np.testing.assert_allclose(raw.grad.numpy(), golden[f"grad{step}"], atol=1e-5)


def naive_cross_entropy(features, labels, table, temperature=0.05):
    """Of a table of proxies, or with temperature 1 of a classifier's weights."""
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        logits = [float(feature @ proxy) / temperature for proxy in table]
        top = max(logits)
        total += top + math.log(sum(math.exp(v - top) for v in logits)) - logits[label]
    return total / len(labels)


def naive_softmax(values):
    top = max(values)
    exponentials = [math.exp(v - top) for v in values]
    return [v / sum(exponentials) for v in exponentials]


def naive_align(features, tables, temperature=0.05):
    seen_as = {
        "visible": ("infrared", "visible"),
        "infrared": ("visible", "infrared"),
        "aux": ("aux", "infrared"),
    }
    total, rows = 0.0, 0
    for modality, (teacher_modality, teacher_table) in seen_as.items():
        if modality not in features:
            continue
        for own, other in zip(features[modality], features[teacher_modality], strict=True):
            student = naive_softmax([float(own @ c) / temperature for c in tables[modality]])
            teacher = naive_softmax([float(other @ c) / temperature for c in tables[teacher_table]])
            total += sum(
                t * (math.log(t) - math.log(s)) for t, s in zip(teacher, student, strict=True) if t > 0
            )
            rows += 1
    return total / rows


def naive_center_triplet(features, labels, centers, margin=0.3):
    total = 0.0
    for feature, label in zip(features, labels, strict=True):
        positive = float((feature - centers[label]).norm())
        others = [float((feature - centers[j]).norm()) for j in set(labels) - {label}]
        total += max(0.0, positive - min(others) + margin) if others else 0.0
    return total / len(labels)


def test_autocast_leaves_the_loss_and_the_update_in_float32():
    features, labels = random_features(6), torch.tensor([4, 4, 0, 0, 2, 2])
    results = []
    for enabled in (False, True):
        bank = random_bank()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total, terms = mce_loss(features, labels, bank)
            bank.update(features, labels)
        assert {term.dtype for term in terms.values()} == {torch.float32}
        results.append((total, bank.shared.proxies, bank.visible.proxies))
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("labels", [[2], [1, 1], [0, 3], [4, 4, 0, 0, 2, 2]])
@pytest.mark.parametrize("proxies", ["historical", "updated", "both"])
def test_every_term_is_the_loop(labels, proxies):
    bank, features = random_bank(), random_features(len(labels))
    double = {modality: f.double() for modality, f in features.items()}
    total, terms = mce_loss(features, torch.tensor(labels), bank, proxies=proxies)
    everything = torch.cat([double[m] for m in MODALITIES])
    expected = {
        "shared": naive_cross_entropy(everything, labels * 3, bank.shared.proxies.double()),
        "center": naive_center_triplet(everything, labels * 3, bank.shared.centers.double()),
    }
    for modality in MODALITIES:
        table = getattr(bank, modality).proxies.double()
        expected[modality] = naive_cross_entropy(double[modality], labels, table)
    historical = naive_align(double, {m: getattr(bank, m).centers.double() for m in MODALITIES})
    updated = naive_align(double, {m: getattr(bank, m).proxies.double() for m in MODALITIES})
    expected["align"] = {"historical": historical, "updated": updated, "both": (historical + updated) / 2}[
        proxies
    ]
    assert set(terms) == set(expected) == set(WEIGHTS)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert total.item() == pytest.approx(
        sum(WEIGHTS[name] * value for name, value in expected.items()), rel=1e-4
    )


@pytest.mark.parametrize("proxies", ["historical", "both"])
def test_without_aux_images_the_terms_are_over_the_two_modalities(proxies):
    labels, bank = [4, 4, 0, 0, 2, 2], random_bank()
    features = random_features(len(labels))
    del features["aux"]
    total, terms = mce_loss(features, torch.tensor(labels), bank, proxies=proxies)
    double = {modality: f.double() for modality, f in features.items()}
    everything = torch.cat([double["visible"], double["infrared"]])
    tables = [{m: getattr(bank, m).centers.double() for m in MODALITIES}]
    if proxies == "both":
        tables.append({m: getattr(bank, m).proxies.double() for m in MODALITIES})
    expected = {
        "shared": naive_cross_entropy(everything, labels * 2, bank.shared.proxies.double()),
        "visible": naive_cross_entropy(double["visible"], labels, bank.visible.proxies.double()),
        "infrared": naive_cross_entropy(double["infrared"], labels, bank.infrared.proxies.double()),
        "aux": 0.0,
        "align": sum(naive_align(double, those) for those in tables) / len(tables),
        "center": naive_center_triplet(everything, labels * 2, bank.shared.centers.double()),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert total.item() == pytest.approx(sum(WEIGHTS[k] * v for k, v in expected.items()), rel=1e-4)


def test_weights_weigh_the_sum_and_not_the_terms():
    bank, features, labels = random_bank(), random_features(4), torch.tensor([0, 0, 1, 1])
    _, plain = mce_loss(features, labels, bank)
    total, terms = mce_loss(features, labels, bank, weights=dict.fromkeys(WEIGHTS, 0.0) | {"aux": 2.0})
    assert total.item() == pytest.approx(2 * plain["aux"].item())
    assert terms["align"].item() == pytest.approx(plain["align"].item())


def test_a_weight_of_nought_stops_a_terms_gradient_and_keeps_its_value():
    bank, labels = random_bank(), torch.tensor([0, 0, 1, 1])
    features = random_features(4)
    features["aux"].requires_grad_()
    weights = dict.fromkeys(WEIGHTS, 0.0) | {"visible": 1.0, "infrared": 1.0}
    total, terms = mce_loss(features, labels, bank, weights=weights)
    assert terms["aux"] > 0
    total.backward()
    assert features["aux"].grad.abs().max() == 0


def test_margin_and_proxies_reach_the_loss_through_its_object():
    bank, features, labels = random_bank(), random_features(4), torch.tensor([0, 0, 1, 1])
    settings = {"weights": WEIGHTS | {"shared": 3.0}, "proxies": "updated", "margin": 0.7}
    expected, expected_terms = mce_loss(features, labels, bank, **settings)
    total, terms = MCE(bank, **settings, processes=Processes())(features, labels, None, None)
    assert total == expected
    assert terms == expected_terms
    assert terms["center"] > mce_loss(features, labels, bank)[1]["center"]


def test_another_word_for_proxies_is_refused():
    with pytest.raises(ValueError, match="historical, updated, both"):
        mce_loss(random_features(1), torch.tensor([0]), random_bank(), proxies="newest")


def test_the_teacher_has_no_gradient():
    bank, features = random_bank(), random_features(3)
    features["infrared"].requires_grad_()
    frozen = dict(features, infrared=features["infrared"].detach())
    align_loss(features, bank).backward()
    with_teacher = features["infrared"].grad
    student_only = features["infrared"].detach().clone().requires_grad_()
    student = bank.infrared.logits(student_only, True).log_softmax(1)
    teacher = bank.infrared.logits(frozen["visible"], True).softmax(1)
    (F.kl_div(student, teacher, reduction="sum") / 9).backward()
    torch.testing.assert_close(with_teacher, student_only.grad)


def test_gradients_are_finite_where_a_feature_is_its_own_centre():
    centers = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    features = centers[[0, 1]].clone().requires_grad_()
    center_triplet_loss(features, torch.tensor([0, 1]), centers, margin=3.0).backward()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_float32_whatever_the_features_are(dtype):
    bank, labels = random_bank(), torch.tensor([0, 0, 1, 1])
    features = random_features(4, dtype=dtype)
    total, terms = mce_loss(features, labels, bank)
    reference, _ = mce_loss({m: f.float() for m, f in features.items()}, labels, bank)
    assert total.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    torch.testing.assert_close(total, reference)


BATCHES = [[2], [1, 1], [0, 3], [0, 0, 3], [4, 4, 0, 0, 2, 2], [5, 0, 5, 1, 5, 1, 0]]


def random_rows(n, dim=8):
    return 2 * torch.randn(n, dim, generator=torch.Generator().manual_seed(3))


def naive_triplet(rows, labels, weighted, margin=0.3):
    total = 0.0
    for a, (anchor, label) in enumerate(zip(rows, labels, strict=True)):
        others = [
            (float((anchor - rows[k]).norm()), labels[k] == label) for k in range(len(labels)) if k != a
        ]
        positives, negatives = ([d for d, same in others if same == wanted] for wanted in (True, False))
        if not positives or not negatives:
            continue
        if weighted:
            far = sum(w * d for w, d in zip(naive_softmax(positives), positives, strict=True))
            weights = naive_softmax([-d for d in negatives])
            near = sum(w * d for w, d in zip(weights, negatives, strict=True))
            total += math.log(1 + math.exp(far - near))
        else:
            total += max(0.0, max(positives) - min(negatives) + margin)
    return total / len(labels)


@pytest.mark.parametrize("labels", BATCHES)
@pytest.mark.parametrize("weighted", [False, True])
def test_triplet_losses_are_the_loop_with_finite_gradients(labels, weighted):
    rows = random_rows(len(labels)).requires_grad_()
    loss = (weighted_triplet_loss if weighted else hard_triplet_loss)(rows, torch.tensor(labels))
    expected = naive_triplet(rows.detach().double(), labels, weighted)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    loss.backward()
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("triplet", [hard_triplet_loss, weighted_triplet_loss])
def test_a_triplet_loss_of_equal_rows_is_finite_and_so_is_its_gradient(triplet):
    rows = torch.ones(4, 3, requires_grad=True)
    loss = triplet(rows, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3 if triplet is hard_triplet_loss else math.log(2), rel=1e-5)
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("name", ["hard-triplet", "weighted-triplet"])
@pytest.mark.parametrize("labels", BATCHES)
def test_a_baseline_is_identity_and_triplet_of_every_modality(name, labels):
    outputs = random_rows(3 * len(labels))
    pooled = outputs.square()
    baseline = Baseline(name, 6, 8, {"identity": 0.5, "triplet": 2.0}, 0.9, Processes())
    torch.nn.init.normal_(baseline.classifier.weight)
    total, terms = baseline({}, torch.tensor(labels), outputs, pooled)
    classifier = baseline.classifier.weight.detach().double()
    identity = naive_cross_entropy(outputs.double(), labels * 3, classifier, temperature=1)
    triplet = naive_triplet(pooled.double(), labels * 3, name == "weighted-triplet", margin=0.9)
    found = {name: term.item() for name, term in terms.items()}
    assert found == pytest.approx({"identity": identity, "triplet": triplet}, rel=1e-4, abs=1e-6)
    assert total.item() == pytest.approx(0.5 * identity + 2 * triplet, rel=1e-4)
    assert set(terms) == set(BASELINE_WEIGHTS)
