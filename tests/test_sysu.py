"""SYSU-MM01's reader: order, galleries, id files, what is no image."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from layouts import CAMERAS, keys, llcm, permutations, refused, small_sysu, write
from PIL import Image

from data_manager import (
    class_labels,
    gallery_samples,
    query_samples,
    train_samples,
)
from readers.lists import IMAGE_SUFFIXES


def test_sysu_training_images_in_order(tmp_path):
    root = small_sysu(tmp_path)
    samples = train_samples("sysu", root)
    for modality, camids in (("visible", (1, 2, 4, 5)), ("infrared", (3, 6))):
        expected = [
            (pid, camid, str(root / f"cam{camid}/{pid:04d}/{index:04d}.jpg"))
            for pid in (3, 7, 12)
            for camid in camids
            for index in range(1, 4)
        ]
        assert keys(samples[modality]) == expected
        assert samples[modality].modality == modality
    assert set(train_samples("sysu", root, split="train")["visible"].pids.tolist()) == {3, 12}


def test_labels_are_dense_and_sorted_by_pid(tmp_path):
    samples = train_samples("sysu", small_sysu(tmp_path))
    labels = class_labels(samples)
    for modality, part in samples.items():
        assert labels[modality].dtype == np.int64
        assert [{3: 0, 7: 1, 12: 2}[pid] for pid in part.pids.tolist()] == labels[modality].tolist()


def test_sysu_leaves_out_ids_in_one_modality_and_names_them(tmp_path, caplog):
    root = small_sysu(tmp_path)
    for pid, camids in ((3, (3, 6)), (7, (1, 2, 4, 5))):
        for camid in camids:
            for file in (root / f"cam{camid}/{pid:04d}").iterdir():
                file.unlink()
    samples = train_samples("sysu", root)
    assert {*samples["visible"].pids.tolist()} == {*samples["infrared"].pids.tolist()} == {12}
    assert [(r.name, r.levelname) for r in caplog.records] == [("mce", "WARNING")]
    assert "3, 7" in caplog.text
    write(root / "exp/train_id.txt", "3")
    refused(lambda: train_samples("sysu", root, split="train"), root)


def test_sysu_queries_are_all_infrared_images_in_order(tmp_path):
    root = small_sysu(tmp_path)
    expected = [
        (pid, camid, str(root / f"cam{camid}/{pid:04d}/{index:04d}.jpg"))
        for pid in (2, 40)
        for camid in (3, 6)
        for index in range(1, 4)
    ]
    for mode in ("all", "indoor"):
        assert keys(query_samples("sysu", root, mode, trial=4)) == expected
    assert query_samples("sysu", root).modality == "infrared"
    assert set(query_samples("sysu", root, split="val").pids.tolist()) == {7}


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize("shot", [1, 10])
def test_sysu_seeded_galleries(tmp_path, mode, shot):
    root = small_sysu(tmp_path, images=12)
    drawn = set()
    for trial in range(10):
        rng = random.Random(trial)
        expected = []
        for pid in (2, 40):
            for camid in {"all": (1, 2, 4, 5), "indoor": (1, 2)}[mode]:
                folder = root / f"cam{camid}/{pid:04d}"
                if (pid, camid) == (40, 5):
                    continue
                files = sorted(os.listdir(folder))
                chosen = [rng.choice(files)] if shot == 1 else rng.sample(files, 10)
                expected += [(pid, camid, str(folder / file)) for file in chosen]
        gallery = gallery_samples("sysu", root, mode, trial, shot)
        assert keys(gallery) == expected
        assert gallery.modality == "visible"
        drawn.add(tuple(gallery.paths))
    assert len(drawn) > 1
    assert set(gallery_samples("sysu", root, mode, 0, shot, split="val").pids.tolist()) == {7}


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize("shot", [1, 10])
def test_sysu_published_galleries(tmp_path, mode, shot):
    root = small_sysu(tmp_path, images=12)
    cameras = permutations(root, images=12)
    for trial in range(10):
        expected = [
            (pid, camid, str(root / f"cam{camid}/{pid:04d}/{position:04d}.jpg"))
            for pid in (2, 40)
            for camid in {"all": (1, 2, 4, 5), "indoor": (1, 2)}[mode]
            for position in cameras[camid - 1, 0][pid - 1, 0][trial, :shot]
        ]
        assert keys(gallery_samples("sysu", root, mode, trial, shot, "published")) == expected


@pytest.mark.parametrize("galleries", ["seeded", "published"])
def test_sysu_short_cells(tmp_path, galleries):
    root = small_sysu(tmp_path, images=4)
    permutations(root, images=4)
    refused(
        lambda: gallery_samples("sysu", root, "all", 0, 10, galleries),
        "id 2 camera 1 (4), id 2 camera 2 (4)",
        "--allow-short",
    )
    gallery = gallery_samples("sysu", root, "all", 0, 10, galleries, allow_short=True)
    assert len(gallery) == 4 * 7
    assert len(set(gallery.paths)) == 4 * 7


def test_sysu_changed_tree_is_seen(tmp_path):
    root = small_sysu(tmp_path)
    before = len(query_samples("sysu", root))
    (root / "cam3/0002/0001.jpg").unlink()
    assert len(query_samples("sysu", root)) == before - 1


def edited(camid, pid, value):
    def edit(cameras):
        cameras[camid - 1, 0][pid - 1, 0] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (edited(4, 2, np.tile(np.arange(1, 5), (10, 1))), ("id 2", "camera 4", "image 4", "are 3")),
        (edited(4, 2, np.tile(np.arange(1, 3), (10, 1))), ("id 2", "camera 4", "3 images")),
        (edited(4, 2, np.tile(np.arange(3), (10, 1))), ("id 2", "camera 4")),
        (edited(4, 2, np.ones((10, 3))), ("id 2", "camera 4")),
        (edited(4, 2, np.tile(np.arange(3) + 0.5, (10, 1))), ("id 2", "camera 4")),
        (edited(4, 2, np.full((10, 3), np.nan)), ("id 2", "camera 4")),
        (edited(4, 2, np.tile(np.arange(1, 4), (9, 1))), ("id 2", "camera 4", "(9, 3)")),
        (edited(4, 2, np.zeros((0, 0))), ("id 2", "camera 4", "(0, 0)")),
        (edited(4, 2, "text"), ("id 2", "camera 4")),
        (edited(5, 40, np.tile(np.arange(1, 4), (10, 1))), ("id 40", "camera 5", "image 3", "are 0")),
    ],
)
def test_sysu_permutations_of_other_images_are_refused(tmp_path, edit, words):
    root = small_sysu(tmp_path)
    permutations(root, edit=edit)
    refused(lambda: gallery_samples("sysu", root, galleries="published"), "rand_perm_cam.mat", *words)


def test_sysu_permutation_files_that_are_none(tmp_path):
    root = small_sysu(tmp_path)
    file = root / "exp/rand_perm_cam.mat"

    def call():
        return gallery_samples("sysu", root, galleries="published")

    refused(call, file, "missing", "wuancong/SYSU-MM01", "evaluation/data_split")
    good = permutations(root)
    whole = file.read_bytes()
    for content in (b"", b"no MATLAB file at all" * 20, whole[: len(whole) // 2]):
        file.write_bytes(content)
        refused(call, file)
    for name, value in (("other", good), ("rand_perm_cam", good[:5]), ("rand_perm_cam", np.ones((6, 1)))):
        scipy.io.savemat(file, {name: value})
        refused(call, file, "rand_perm_cam")


def test_sysu_id_zero(tmp_path):
    root = small_sysu(tmp_path)
    for camid in CAMERAS:
        write(root / f"cam{camid}/0000/0001.jpg")
    write(root / "exp/test_id.txt", "0,2")
    permutations(root)
    assert set(query_samples("sysu", root).pids.tolist()) == {0, 2}
    refused(lambda: gallery_samples("sysu", root, galleries="published"), "id 0", "start at 1")


def test_id_files_as_people_save_them(tmp_path):
    root = small_sysu(tmp_path)
    (root / "exp/test_id.txt").write_bytes("\ufeff 40, 2 ,2,\r\n\r\n,\r\n40\r\n".encode())
    assert sorted(set(query_samples("sysu", root).pids.tolist())) == [2, 40]
    assert len(query_samples("sysu", root)) == 2 * 2 * 3


@pytest.mark.parametrize("word", ["x", "2.5", "-2", "2 40", "1e3", "9" * 30, "٣"])
def test_ids_that_are_not_numbers(tmp_path, word):
    root = small_sysu(tmp_path)
    write(root / "exp/test_id.txt", f"2\n40,{word}\n")
    refused(lambda: query_samples("sysu", root), "test_id.txt, line 2", word)


def test_id_files_without_ids(tmp_path):
    root = small_sysu(tmp_path)
    file = root / "exp/test_id.txt"
    file.write_bytes(b"\xff\xfe2\x00")
    refused(lambda: query_samples("sysu", root), file, "UTF-8")
    write(file, "\n,\n")
    refused(lambda: query_samples("sysu", root), file, "no ids")
    file.unlink()
    refused(lambda: gallery_samples("sysu", root), file, "missing")
    file.mkdir()
    refused(lambda: gallery_samples("sysu", root), file)
    (root / "exp/val_id.txt").unlink()
    refused(lambda: train_samples("sysu", root), root / "exp/val_id.txt")
    assert len(train_samples("sysu", root, split="train")["infrared"]) == 2 * 2 * 3


def test_ids_without_images(tmp_path):
    root = small_sysu(tmp_path)
    write(root / "exp/test_id.txt", "2,41,40,50")
    for call in (query_samples, gallery_samples):
        refused(lambda call=call: call("sysu", root), "test", "41, 50")
    write(root / "exp/train_id.txt", "3,42")
    refused(lambda: train_samples("sysu", root), "trainval", "id 42")


def test_what_is_no_image_is_passed_over(tmp_path):
    root = small_sysu(tmp_path)
    before = gallery_samples("sysu", root, shot=10, allow_short=True).paths
    for name in ("Thumbs.db", ".DS_Store", "._0001.jpg", ".hidden.jpg", "notes.txt", "0001.jpg.part"):
        write(root / "cam1/0002" / name)
    (root / "cam1/0002/folder").mkdir()
    assert gallery_samples("sysu", root, shot=10, allow_short=True).paths == before
    for name in ("x.JPG", "y.jpeg", "z.Png", "é w.bmp"):
        write(root / "cam3/0002" / name)
    names = [Path(path).name for path in query_samples("sysu", root).paths]
    assert names[3:7] == ["x.JPG", "y.jpeg", "z.Png", "é w.bmp"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_image_suffix_is_read_and_is_one_of_pillows(tmp_path, suffix):
    assert suffix in Image.registered_extensions()
    root = small_sysu(tmp_path)
    for file in [*root.glob("cam3/*/*"), *root.glob("cam6/*/*")]:
        file.rename(file.with_suffix(suffix))
    assert len(query_samples("sysu", root)) == 2 * 2 * 3
    assert len(train_samples("sysu", root)["infrared"]) == 3 * 2 * 3


def test_thermal_formats_are_images():
    assert {".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".jp2"} <= set(IMAGE_SUFFIXES)


@pytest.mark.parametrize(("modality", "cameras"), [("infrared", (3, 6)), ("visible", (1, 2, 4, 5))])
def test_the_modality_without_images_is_named(tmp_path, modality, cameras):
    root = small_sysu(tmp_path)
    for camid in cameras:
        for file in root.glob(f"cam{camid}/*/*"):
            file.rename(file.with_suffix(".raw"))
    refused(lambda: train_samples("sysu", root), f"no {modality} images")
    call = query_samples if modality == "infrared" else gallery_samples
    refused(lambda: call("sysu", root), f"the test split has no {modality} images")


def test_cameras_that_a_layout_does_not_have_are_named_once(tmp_path, caplog):
    root = small_sysu(tmp_path / "sysu")
    for camid in (7, 8):
        write(root / f"cam{camid}/0002/0001.jpg")
    (root / "cam9").mkdir()  # empty: nothing is lost
    write(root / "camera.txt")
    for call in (train_samples, query_samples, gallery_samples):
        call("sysu", root)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].endswith("no such camera: cam7, cam8")
    root = llcm(tmp_path / "llcm")
    write(root / "test_nir/cam10/0009/0001.jpg")
    query_samples("llcm", root)
    assert caplog.messages[1].endswith("no such camera: test_nir/cam10, test_nir/cam3")
