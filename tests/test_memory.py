"""memory.py against the released code's values and a loop written from docs/method.md, section 5."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memory import ClusterMemory, MemoryBank
from utils import MODALITIES

GOLDEN = Path(__file__).parent / "golden"


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)


def naive_update(proxies, features, labels, momentum, hard):
    proxies = proxies.clone()
    for y in sorted(set(labels.tolist())):
        own = features[labels == y].float()
        if hard:
            similarities = [float(f @ proxies[y]) for f in own]
            q = own[similarities.index(min(similarities))]
        else:
            q = own.mean(0)
        moved = momentum * proxies[y] + (1 - momentum) * q
        proxies[y] = moved / moved.norm()
    return proxies


@pytest.mark.parametrize("name", ["mce_gx0", "mce_gx1"])
def test_three_steps_agree_with_the_released_code(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    centers = torch.tensor(golden["centers"])
    bank = MemoryBank(*centers.shape[1:])
    bank.reset(dict(zip(MODALITIES, centers, strict=True)))
    for step in range(3):
        labels = torch.tensor(golden[f"ids{step}"])
        features = F.normalize(torch.tensor(golden[f"feat{step}"])).chunk(3)
        bank.update(dict(zip(MODALITIES, features, strict=True)), labels)
        tables = torch.stack([bank.shared.proxies, *(getattr(bank, m).proxies for m in MODALITIES)])
        np.testing.assert_allclose(tables.numpy(), golden[f"mem{step}"], atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("labels", [[3], [1, 1, 1], [0, 1, 2, 3], [4, 0, 4, 2, 0, 4]])
def test_update_is_the_loop(hard, dtype, labels):
    labels = torch.tensor(labels)
    memory = ClusterMemory(5, 7, momentum=0.25, hard=hard)
    memory.reset(unit(5, 7))
    features = unit(len(labels), 7, seed=1, dtype=dtype)
    expected = naive_update(memory.proxies, features, labels, 0.25, hard)
    memory.update(features, labels)
    torch.testing.assert_close(memory.proxies, expected)


def test_update_leaves_other_classes_and_the_centers_alone():
    memory = ClusterMemory(6, 4)
    start = unit(6, 4)
    memory.reset(start)
    memory.update(unit(2, 4, seed=3), torch.tensor([1, 1]))
    assert torch.equal(memory.centers, start)
    changed = (memory.proxies != start).any(1)
    assert changed.tolist() == [False, True, False, False, False, False]


def test_update_takes_no_gradient_and_keeps_none():
    memory = ClusterMemory(3, 4)
    memory.reset(unit(3, 4))
    features = unit(2, 4, seed=1).requires_grad_()
    memory.update(features, torch.tensor([0, 2]))
    assert not memory.proxies.requires_grad


def test_reset_copies_and_checks_the_shape():
    memory, centers = ClusterMemory(3, 4), unit(3, 4)
    memory.reset(centers)
    centers.zero_()
    assert memory.proxies.abs().sum() > 0
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        memory.reset(unit(4, 4))


def test_bank_reset_normalises_the_modalities_but_not_their_mean():
    means = {modality: 3 * unit(5, 8, seed=k) for k, modality in enumerate(MODALITIES)}
    bank = MemoryBank(5, 8)
    bank.reset(means)
    for modality in MODALITIES:
        torch.testing.assert_close(getattr(bank, modality).centers, means[modality] / 3)
    torch.testing.assert_close(bank.shared.centers, sum(means.values()) / 9)
    assert (bank.shared.centers.norm(dim=1) < 0.99).all()


def test_logits_divide_by_the_temperature_and_choose_the_table():
    memory = ClusterMemory(3, 4, temperature=0.5, momentum=0.0)
    memory.reset(torch.eye(3, 4))
    memory.update(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([0]))
    feature = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert memory.logits(feature).tolist() == [[0.0, 0.0, 0.0]]
    assert memory.logits(feature, historical=True).tolist() == [[2.0, 0.0, 0.0]]


def test_a_bank_without_aux_is_of_two_modalities():
    means = {modality: unit(5, 8, seed=k) for k, modality in enumerate(("visible", "infrared"))}
    bank = MemoryBank(5, 8)
    bank.reset(means)
    torch.testing.assert_close(bank.shared.centers, (means["visible"] + means["infrared"]) / 2)
    labels, before = torch.tensor([1, 1, 4]), bank.shared.proxies.clone()
    features = {modality: unit(3, 8, seed=7 + k) for k, modality in enumerate(means)}
    bank.update(features, labels)
    expected = naive_update(before, torch.cat(list(features.values())), labels.repeat(2), 0.1, hard=True)
    torch.testing.assert_close(bank.shared.proxies, expected)
    assert not bank.aux.proxies.any()


def test_a_banks_settings_reach_its_tables():
    bank = MemoryBank(5, 8, temperature=0.2, shared_momentum=0.6, momentum=0.8, shared_hard=False)
    means = {modality: unit(5, 8, seed=k) for k, modality in enumerate(MODALITIES)}
    bank.reset(means)
    labels = torch.tensor([0, 0, 3])
    features = {modality: unit(3, 8, seed=7 + k) for k, modality in enumerate(means)}
    everything, before = torch.cat(list(features.values())), bank.shared.proxies.clone()
    torch.testing.assert_close(bank.shared.logits(everything), everything @ before.T / 0.2)
    bank.update(features, labels)
    for modality in MODALITIES:
        expected = naive_update(means[modality], features[modality], labels, 0.8, hard=False)
        torch.testing.assert_close(getattr(bank, modality).proxies, expected)
    expected = naive_update(before, everything, labels.repeat(3), 0.6, hard=False)
    torch.testing.assert_close(bank.shared.proxies, expected)
