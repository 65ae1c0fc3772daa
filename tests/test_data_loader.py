"""data_loader.py: identity batches and the loaders of training, memory and evaluation."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images

import data_loader
from augmentation import augment, draw_augmentation, normalize
from data_loader import IdentitySampler, TrainLoader, evaluation_batches, read_ahead
from images import UnreadableImages, decode
from utils import UserError

CPU = torch.device("cpu")


# --- identity batches

MANY = {
    "visible": np.random.default_rng(1).permutation(np.arange(12).repeat(np.arange(1, 13))),
    "infrared": np.random.default_rng(2).permutation(np.arange(12).repeat(3)),
}


@pytest.mark.parametrize(("batch_size", "num_pos"), [(1, 1), (5, 4), (12, 3)])
def test_batches_are_of_distinct_identities(batch_size, num_pos):
    sampler = IdentitySampler(MANY, batch_size, num_pos, seed=3)
    steps = list(sampler.epoch(0))
    assert len(steps) == len(sampler) == 78 // (batch_size * num_pos) + 1
    for labels, visible, infrared in steps:
        assert len(np.unique(labels)) == batch_size
        np.testing.assert_array_equal(labels, labels[::num_pos].repeat(num_pos))
        np.testing.assert_array_equal(MANY["visible"][visible], labels)
        np.testing.assert_array_equal(MANY["infrared"][infrared], labels)


def test_sysu_has_696_steps():
    labels = {"visible": np.arange(22258) % 395, "infrared": np.arange(11909) % 395}
    assert len(IdentitySampler(labels, 8, 4, seed=0)) == 696


def test_images_are_drawn_with_replacement_and_all_of_them_are():
    sampler = IdentitySampler(MANY, 12, 8, seed=0)
    rows = np.stack([visible for epoch in range(200) for _, visible, _ in sampler.epoch(epoch)])
    counts = np.bincount(rows.ravel(), minlength=78)
    expected = rows.size / 12 / np.bincount(MANY["visible"])[MANY["visible"]]
    np.testing.assert_allclose(counts / expected, 1, atol=0.35)
    assert (counts[MANY["visible"] == 0] == len(rows) * 8).all()  # one image, taken eight times a step


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def epoch(seed, number):
        return np.stack([np.concatenate(step) for step in IdentitySampler(MANY, 4, 2, seed).epoch(number)])

    np.testing.assert_array_equal(epoch(1, 5), epoch(1, 5))
    assert (epoch(1, 5) != epoch(1, 6)).any()
    assert (epoch(1, 5) != epoch(2, 5)).any()


def test_processes_share_the_batch_that_one_would_draw():
    parts = [IdentitySampler(MANY, 4, 2, seed=0, rank=rank, world_size=3) for rank in range(3)]
    assert [len(part) for part in parts] == [78 // 24 + 1] * 3
    for steps in zip(*(part.epoch(2) for part in parts), strict=True):
        assert len(np.unique(np.concatenate([labels for labels, _, _ in steps]))) == 12
    for whole, *steps in zip(
        IdentitySampler(MANY, 12, 2, seed=0).epoch(2), *(p.epoch(2) for p in parts), strict=True
    ):
        for column, shares in zip(whole, zip(*steps, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(shares), column)


def test_too_many_identities_are_refused():
    with pytest.raises(UserError, match=r"--batch-size 13: .* 12 training identities"):
        IdentitySampler(MANY, 13, 1, seed=0)
    with pytest.raises(UserError, match="--batch-size 5 in each of 3 processes"):
        IdentitySampler(MANY, 5, 1, seed=0, world_size=3)


# --- loaders


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    images = {}
    for modality, part in MANY.items():
        np.save(tmp_path / f"{modality}.npy", rng.integers(0, 256, (len(part), 16, 8, 3), dtype=np.uint8))
        images[modality] = np.load(tmp_path / f"{modality}.npy", mmap_mode="r")
    return images


def make_loader(stored, cache="auto", **shares):
    sampler = IdentitySampler(MANY, 4, 2, 7, **shares)
    return TrainLoader(stored, sampler, "sysu", CPU, cache)


def test_an_epoch_is_the_same_with_every_cache(stored):
    caches = ("disk", "host", "device")
    epochs = [list(make_loader(stored, cache).epoch(3)) for cache in caches]
    for steps in zip(*epochs, strict=True):
        for images, labels in steps:
            assert torch.equal(labels, steps[0][1])
            assert all(torch.equal(images[modality], part) for modality, part in steps[0][0].items())


def test_pixels_stay_on_the_disk_where_a_gpu_has_no_room_for_them(stored, monkeypatch):
    size = sum(part.nbytes for part in stored.values())
    sampler = IdentitySampler(MANY, 4, 2, 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * size - 3, 10 * size))
    assert TrainLoader(stored, sampler, "sysu", torch.device("cuda", 0)).cache == "disk"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size - 1, 10 * size))
    with pytest.raises(UserError, match="--cache device: the images need"):
        TrainLoader(stored, sampler, "sysu", torch.device("cuda", 0), "device")


def test_an_epoch_yields_the_drawn_images_augmented(stored):
    loader = make_loader(stored)
    assert loader.cache == "disk"  # on the CPU the page cache does the rest
    steps = list(loader.epoch(2))
    assert len(steps) == len(loader.sampler)
    rng = data_loader.generator(7, 2, "augmentation")
    for (images, labels), (expected, visible, infrared) in zip(steps, loader.sampler.epoch(2), strict=True):
        np.testing.assert_array_equal(labels, expected)
        rows = {"visible": visible, "infrared": infrared, "aux": visible}
        for modality, part in rows.items():
            source = torch.from_numpy(
                np.array(stored["infrared" if modality == "infrared" else "visible"][part])
            )
            draws = draw_augmentation(rng, 8, 16, 8, modality, "sysu")
            assert torch.equal(images[modality], augment(source, draws))


def test_processes_share_the_augmented_images_that_one_would_have(stored):
    whole = next(TrainLoader(stored, IdentitySampler(MANY, 12, 2, 7), "sysu", CPU).epoch(1))
    shares = [next(make_loader(stored, rank=rank, world_size=3).epoch(1)) for rank in range(3)]
    for modality, images in whole[0].items():
        assert torch.equal(torch.cat([own[modality] for own, _ in shares]), images)
    assert torch.equal(torch.cat([labels for _, labels in shares]), whole[1])


def test_a_loader_stops_its_thread_with_its_consumer(stored):
    before = threading.active_count()
    loader = make_loader(stored)
    for items in (loader.epoch(0), loader.memory_batches("aux", 4, 0)):
        next(items)
        items.close()
        assert threading.active_count() == before


def test_read_ahead_raises_what_its_items_raise_and_closes_them():
    closed = []

    def items():
        try:
            yield 1
            raise ValueError("broken")
        finally:
            closed.append(True)

    received = []
    with pytest.raises(ValueError, match="broken"):
        received.extend(read_ahead(items(), CPU))
    assert closed == [True]
    before = threading.active_count()
    ahead = []
    stopped = read_ahead((ahead.append(k) or k for k in range(100)), CPU)
    assert [next(stopped), next(stopped)] == [0, 1]
    stopped.close()
    assert len(ahead) < 10  # of a hundred: memory holds a few batches
    assert threading.active_count() == before


def test_a_stop_is_not_hidden_by_a_thread_that_is_still_reading(monkeypatch):
    """Ctrl-C while the thread was starting: the pool does not wait for it."""

    class Unjoined(data_loader.ThreadPoolExecutor):
        def shutdown(self, **_):
            super().shutdown(wait=False, cancel_futures=True)

    monkeypatch.setattr(data_loader, "ThreadPoolExecutor", Unjoined)
    reading, release = threading.Event(), threading.Event()

    def items():
        yield 1
        reading.set()
        release.wait()
        yield 2

    ahead = read_ahead(items(), CPU)
    assert next(ahead) == 1
    assert reading.wait(30)
    with pytest.raises(KeyboardInterrupt):
        ahead.throw(KeyboardInterrupt())
    release.set()


@pytest.mark.parametrize("cache", ["disk", "device"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_memory_batches_cover_every_image_once(stored, cache, world_size):
    for modality in ("visible", "infrared", "aux"):
        source = "infrared" if modality == "infrared" else "visible"
        whole = normalize(torch.from_numpy(np.array(stored[source])))
        if modality == "aux":
            channel = data_loader.generator(7, 4, "memory").integers(3, size=len(whole))
            whole = normalize(torch.from_numpy(np.array(stored[source])), channel)
        for rank in range(world_size):
            loader = make_loader(stored, cache, rank=rank, world_size=world_size)
            batches = list(loader.memory_batches(modality, 5, 4))
            assert torch.equal(torch.cat([images for images, _ in batches]), whole[rank::world_size])
            labels = torch.cat([labels for _, labels in batches])
            np.testing.assert_array_equal(labels, MANY[source][rank::world_size])


def test_evaluation_batches_read_paths_and_arrays_alike(tmp_path):
    paths = draw_images(tmp_path, 11)
    array = np.concatenate(list(decode(paths, 20, 8, 2)))
    for source in (paths, array):
        batches = list(evaluation_batches(source, 20, 8, 4, CPU, 2))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert torch.equal(torch.cat(batches), normalize(torch.from_numpy(array)))


def test_evaluation_batches_list_unreadable_images_and_stop(tmp_path):
    paths = draw_images(tmp_path, 30)
    before = threading.active_count()
    batches = evaluation_batches(paths, 20, 8, 4, CPU, 2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    Path(paths[29]).write_bytes(b"")
    Path(paths[1]).write_bytes(b"")
    with pytest.raises(UnreadableImages) as error:
        list(evaluation_batches(paths, 20, 8, 4, CPU, 2))
    assert len(error.value.failures) == 2
