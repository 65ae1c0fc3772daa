import functools
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import tiny_flags
from PIL import Image

from data_manager import (
    DATASETS,
    class_labels,
    dataset_root,
    gallery_samples,
    query_samples,
    refuse_shared,
    train_samples,
)
from evaluation.protocols import Evaluation, Protocol
from readers.lists import IMAGE_SUFFIXES
from utils import UserError

TRAIN, VAL, TEST = (3, 12), (7,), (2, 40)
CAMERAS = (1, 2, 3, 4, 5, 6)


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def small_sysu(root, images=3):
    """A SYSU-MM01 of empty files: every id in every camera, except that id 40 is not in camera 5."""
    for split, pids in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        write(root / f"exp/{split}_id.txt", ",".join(map(str, reversed(pids))) + "\n")
        for pid in pids:
            for camid in CAMERAS:
                folder = root / f"cam{camid}/{pid:04d}"
                folder.mkdir(parents=True)
                for index in range(1, images + 1 if (pid, camid) != (40, 5) else 1):
                    (folder / f"{index:04d}.jpg").touch()
    return root


def permutations(root, images=3, edit=lambda cells: None):
    """exp/rand_perm_cam.mat for small_sysu(root): nested cells as MATLAB saves them, uint8, some empty."""
    rng = np.random.default_rng(0)
    cameras = np.empty((6, 1), dtype=object)
    for camid in CAMERAS:
        cells = np.empty((45, 1), dtype=object)
        for pid in range(1, 46):
            count = images if pid in TRAIN + VAL + TEST and (pid, camid) != (40, 5) else 0
            rows = [rng.permutation(count) + 1 for _ in range(10)]
            cells[pid - 1, 0] = np.array(rows, dtype=np.uint8).reshape(10, count)
        cameras[camid - 1, 0] = cells
    edit(cameras)
    scipy.io.savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cameras})
    return cameras


def regdb(root, pids=(0, 3)):
    for trial in range(1, 11):
        for split, offset in (("train", 0), ("test", 100)):
            for folder, word in (("Visible", "visible"), ("Thermal", "thermal")):
                lines = []
                for pid in pids:
                    for index in (2, 1):
                        path = f"{folder}/{offset + pid}/photo {index} é.bmp"
                        write(root / path)
                        lines.append(f"{path} {pid}")
                write(root / f"idx/{split}_{word}_{trial}.txt", "\n".join(lines) + "\n")
    return root


def llcm(root):
    for word in ("vis", "nir"):
        lines = []
        for pid in (1, 5):
            path = f"{word}/{pid:04d}/{pid:04d}_c0{pid}_s185535_f7010_{word}.jpg"
            write(root / path)
            lines.append(f"{path} {pid - 1}")
        write(root / f"idx/train_{word}.txt", "\n".join(lines))
        for pid in (9, 30):
            for camid in (1, 3, 4):
                for index in range(5):
                    write(root / f"test_{word}/cam{camid}/{pid:04d}/{pid:04d}_{index}.png")
    write(root / "idx/test_id.txt", "30,9")
    return root


def keys(samples):
    assert samples.pids.dtype == samples.camids.dtype == np.int64
    assert len(samples) == len(samples.paths) == len(samples.pids) == len(samples.camids)
    return list(zip(samples.pids.tolist(), samples.camids.tolist(), samples.paths, strict=True))


def refused(call, *words):
    """call() raises UserError in one line that holds the words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


# --- facts


def test_facts():
    assert set(DATASETS) == {"sysu", "regdb", "llcm", "folder"}
    assert [(d.height, d.width, d.num_pos) for d in DATASETS.values()] == [
        (384, 128, 4),
        (288, 144, 5),
        (384, 144, 4),
        (288, 144, 5),
    ]
    assert DATASETS["sysu"].modes == ("all", "indoor")
    assert DATASETS["regdb"].modes == DATASETS["llcm"].modes == ("visible-to-infrared", "infrared-to-visible")
    assert list(DATASETS["regdb"].trials) == list(range(1, 11))
    assert DATASETS["sysu"].gallery_modality("indoor") == "visible"
    assert DATASETS["llcm"].gallery_modality("visible-to-infrared") == "infrared"


# --- SYSU-MM01


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


# --- what is trained on is not tested on


def test_train_and_test_refuse_what_is_in_both_splits(sysu, tmp_path, train_here):
    root = shutil.copytree(sysu, tmp_path / "sysu")
    tested = (root / "exp/test_id.txt").read_text().strip()
    write(root / "exp/train_id.txt", f"{(root / 'exp/train_id.txt').read_text().strip()},{tested}")
    status, _, errors = train_here("--check", *tiny_flags(root))
    assert status == 2
    assert "test_id.txt: also in train_id.txt" in errors[-1]
    for copies in (True, False):  # the lists are compared without reading an image
        draw = functools.partial(Evaluation.draw, root, [Protocol("sysu", "all")], [0], copies=copies)
        refused(draw, "also in train_id.txt")


@pytest.mark.parametrize("split", ["train", "val"])
def test_sysu_test_ids_that_are_trained_on_are_refused(tmp_path, split):
    root = small_sysu(tmp_path)
    file = root / f"exp/{split}_id.txt"
    write(file, f"{file.read_text()},40")
    for call in (train_samples, query_samples):
        refused(lambda call=call: call("sysu", root), root / "exp/test_id.txt", file.name, "id 40")


def test_sysu_val_ids_that_are_trained_on_are_refused_only_where_they_are_tested_on(tmp_path):
    root = small_sysu(tmp_path)
    write(root / "exp/val_id.txt", "7,12")
    refused(lambda: query_samples("sysu", root, split="val"), "val_id.txt", "train_id.txt", "id 12")
    assert set(train_samples("sysu", root)["visible"].pids.tolist()) == {3, 7, 12}


def test_a_test_split_alone_can_be_tested_on(tmp_path):
    root = small_sysu(tmp_path / "sysu")
    for name in ("train", "val"):
        (root / f"exp/{name}_id.txt").unlink()
    assert len(query_samples("sysu", root)) == 2 * 2 * 3
    root = regdb(tmp_path / "regdb")
    (root / "idx/train_visible_1.txt").unlink()
    assert len(query_samples("regdb", root)) == 4
    root = llcm(tmp_path / "llcm")
    (root / "idx/train_vis.txt").unlink()
    assert len(query_samples("llcm", root)) == 30


@pytest.mark.parametrize("lines", ["whole", "one image", "another image of an identity"])
def test_regdb_test_images_that_are_trained_on_are_refused(tmp_path, lines):
    root = regdb(tmp_path)
    train, test = (root / f"idx/{split}_thermal_2.txt" for split in ("train", "test"))
    trained, tested = (file.read_text(encoding="utf-8") for file in (train, test))
    if lines == "another image of an identity":
        write(root / "Thermal/3/new.bmp")
        write(test, f"{tested}Thermal/3/new.bmp 7\n")
    else:
        write(test, trained if lines == "whole" else trained.splitlines()[0] + "\n" + tested)
    words = {"whole": "image Thermal/0/photo 1", "one image": "image Thermal/0/photo 2"}
    word = words.get(lines, "folder Thermal/3")
    for call in (train_samples, query_samples):
        refused(lambda call=call: call("regdb", root, trial=2), test, train.name, word)
        call("regdb", root, trial=1)


def test_regdb_folders_that_are_no_identities_are_not_compared(tmp_path):
    root = tmp_path
    for split, first in (("train", 0), ("test", 2)):
        for folder, word in (("Visible", "visible"), ("Thermal", "thermal")):
            names = [f"{folder}/{first + label}.bmp" for label in (0, 1)]
            for name in names:
                write(root / name)
            write(root / f"idx/{split}_{word}_1.txt", f"{names[0]} 0\n{names[1]} 1\n")
    assert len(train_samples("regdb", root)["visible"]) == len(query_samples("regdb", root)) == 2


@pytest.mark.parametrize("line", ["nir/0009/new.jpg 7", "test_nir/cam4/0030/0030_1.png 1"])
def test_llcm_test_ids_that_are_trained_on_are_refused(tmp_path, line):
    root = llcm(tmp_path)
    path, label = line.split()
    write(root / path)
    write(root / f"vis/{Path(path).parent.name}/new.jpg")
    for word, name in (("nir", path), ("vis", f"vis/{Path(path).parent.name}/new.jpg")):
        with open(root / f"idx/train_{word}.txt", "a") as file:
            file.write(f"\n{name} {label}")
    for call in (train_samples, query_samples):
        refused(lambda call=call: call("llcm", root), "test_id.txt", "train_", "id")


def test_what_only_looks_like_an_image_is_refused(tmp_path):
    root = small_sysu(tmp_path)
    (root / "cam3/0002/0013.jpg").mkdir()
    refused(lambda: query_samples("sysu", root), "cam3/0002/0013.jpg")
    (root / "cam3/0002/0013.jpg").rmdir()
    (root / "cam3/0002/0014.jpg").symlink_to(root / "gone.jpg")
    refused(lambda: query_samples("sysu", root), "cam3/0002/0014.jpg")
    (root / "cam3/0002/0014.jpg").unlink()
    (root / "cam3/0002/0014.jpg").symlink_to(root / "cam3/0002/0001.jpg")
    assert len(query_samples("sysu", root)) == 2 * 2 * 3 + 1
    for file in (root / "cam6/0002").iterdir():
        file.unlink()
    (root / "cam6/0002").rmdir()
    write(root / "cam6/0002")
    refused(lambda: query_samples("sysu", root), "cam6/0002")


def test_linked_datasets_are_read(tmp_path):
    small_sysu(tmp_path / "disk")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert len(query_samples("sysu", tmp_path / "data")) == 2 * 2 * 3


def test_gallery_of_no_images(tmp_path):
    root = small_sysu(tmp_path)
    for pid in TEST:
        for camid in (1, 2):
            for file in (root / f"cam{camid}/{pid:04d}").iterdir():
                file.unlink()
    refused(lambda: gallery_samples("sysu", root, "indoor"), root, "visible")


def test_files_of_other_suffixes_are_named(tmp_path, caplog):
    root = small_sysu(tmp_path)
    for name in ("cam1/0003/0004.avif", "cam2/0012/0009.heic", "cam4/0003/0008.avif", "cam1/0099/1.avif"):
        write(root / name)
    train_samples("sysu", root)
    assert caplog.messages == [
        f"{root}: not read: files .avif (2: cam1/0003/0004.avif, …), files .heic (1: cam2/0012/0009.heic)"
    ]


def test_copies_in_a_published_dataset_are_warned_of(tmp_path, caplog):
    """Nobody can change the authors' files, so a run goes on: two trials here, of which one has copies."""
    root = regdb(tmp_path)
    for name in ("Visible/0/photo 1 é.bmp", "Thermal/103/photo 2 é.bmp"):
        write(root / name, "one picture")
    write(root / "idx/train_visible_2.txt", "Visible/3/photo 1 é.bmp 3")
    for trial in (1, 2):
        refuse_shared("regdb", root, trial)
    (warning,) = caplog.messages
    assert "byte for byte: Thermal/103/photo 2 é.bmp is Visible/0/photo 1 é.bmp" in warning


# --- RegDB


def test_regdb(tmp_path):
    root = regdb(tmp_path)
    samples = train_samples("regdb", root, trial=3)
    assert keys(samples["visible"]) == [
        (pid, 1, str(root / f"Visible/{pid}/photo {index} é.bmp")) for pid in (0, 3) for index in (2, 1)
    ]
    assert keys(samples["infrared"]) == [
        (pid, 2, str(root / f"Thermal/{pid}/photo {index} é.bmp")) for pid in (0, 3) for index in (2, 1)
    ]
    assert class_labels(samples)["infrared"].tolist() == [0, 0, 1, 1]  # the labels have holes
    for mode, query, gallery in (
        ("visible-to-infrared", "Visible", "Thermal"),
        ("infrared-to-visible", "Thermal", "Visible"),
    ):
        assert query_samples("regdb", root, mode, trial=10).paths == [
            str(root / f"{query}/{100 + pid}/photo {index} é.bmp") for pid in (0, 3) for index in (2, 1)
        ]
        assert gallery_samples("regdb", root, mode, trial=10).paths == [
            str(root / f"{gallery}/{100 + pid}/photo {index} é.bmp") for pid in (0, 3) for index in (2, 1)
        ]
    assert query_samples("regdb", root).modality == "visible"


def test_regdb_reads_the_files_of_its_trial(tmp_path):
    root = regdb(tmp_path)
    write(root / "Visible/55/only.bmp")
    write(root / "idx/test_visible_7.txt", "Visible/55/only.bmp 55")
    assert query_samples("regdb", root, trial=7).pids.tolist() == [55]
    assert 55 not in query_samples("regdb", root, trial=1).pids
    assert query_samples("regdb", root).paths == query_samples("regdb", root, trial=1).paths
    (root / "idx/train_thermal_2.txt").unlink()
    refused(lambda: train_samples("regdb", root, trial=2), "train_thermal_2.txt", "missing")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Visible/0/a.bmp", ("no label",)),
        ("Visible/0/photo 1 é.bmp", ("'é.bmp'", "not a number")),
        ("Visible/0/photo 1 é.bmp 1.5", ("'1.5'",)),
        ("Visible/0/photo 1 é.bmp -1", ("'-1'",)),
        ("Visible/0/gone.bmp 3", ("gone.bmp",)),
        ("Visible/0 3", ("Visible/0",)),
        ("Visible/0/nul\0.bmp 3", ("nul",)),
        ("/etc/passwd 3", ("outside",)),
        ("{root}/Visible/0/photo 2 é.bmp 0", ("relative", "as 'Visible/0/photo 2 é.bmp'")),
        ("../set/Visible/0/photo 2 é.bmp 0", ("relative", "as 'Visible/0/photo 2 é.bmp'")),
        ("Visible/../../secret.bmp 3", ("outside",)),
        ("..\\secret.bmp 3", ("outside",)),
        ("C:\\secret.bmp 3", ("outside",)),
        ("Visible/0/photo 2 é.bmp 3", ("label 3", "0 above")),
    ],
)
def test_bad_index_lines(tmp_path, line, words):
    root = regdb(tmp_path / "set")
    write(tmp_path / "secret.bmp")
    file = root / "idx/train_visible_1.txt"
    write(file, file.read_text(encoding="utf-8").splitlines()[0] + f"\n\n{line.format(root=root)}\n")
    refused(lambda: train_samples("regdb", root), f"{file}, line 3", *words)


def test_index_files_as_people_save_them(tmp_path, caplog):
    root = regdb(tmp_path)
    file = root / "idx/test_visible_1.txt"
    expected = query_samples("regdb", root).paths
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[1:1] = ["", " \t", lines[0], "./" + lines[0]]
    text = "\ufeff" + ",\r\n".join(lines)
    file.write_bytes(text.replace(" 0,", "\t 0,").encode())
    assert query_samples("regdb", root).paths == expected
    assert [(r.name, r.levelname) for r in caplog.records] == [("mce", "WARNING")]
    assert "line 4, 5" in caplog.text
    write(file, "\n")
    refused(lambda: query_samples("regdb", root), file, "no images")


def test_lists_with_an_id_in_one_modality_are_refused(tmp_path):
    root = regdb(tmp_path / "regdb")
    file = root / "idx/train_thermal_1.txt"
    write(file, "\n".join(file.read_text(encoding="utf-8").splitlines()[:2]))
    refused(lambda: train_samples("regdb", root), "id 3", "train split 1")
    root = llcm(tmp_path / "llcm")
    file = root / "idx/train_vis.txt"
    write(file, file.read_text().splitlines()[1])
    refused(lambda: train_samples("llcm", root), "id 0")


# --- LLCM


def test_llcm_training(tmp_path):
    root = llcm(tmp_path)
    write(root / "vis/0005/other.jpg")
    with open(root / "idx/train_vis.txt", "a") as file:
        file.write("\nvis/0005/other.jpg 4")
    samples = train_samples("llcm", root, trial=9)
    assert keys(samples["visible"]) == [
        (0, 1, str(root / "vis/0001/0001_c01_s185535_f7010_vis.jpg")),
        (4, 5, str(root / "vis/0005/0005_c05_s185535_f7010_vis.jpg")),
        (4, 0, str(root / "vis/0005/other.jpg")),
    ]
    assert [pid for pid, _, _ in keys(samples["infrared"])] == [0, 4]


@pytest.mark.parametrize("mode", ["visible-to-infrared", "infrared-to-visible"])
def test_llcm_test(tmp_path, mode):
    root = llcm(tmp_path)
    words = {"visible": ("vis", (1, 3, 4)), "infrared": ("nir", (1, 4))}  # camera 3 took no infrared images
    query, _, gallery = mode.split("-")
    word, camids = words[query]
    assert keys(query_samples("llcm", root, mode)) == [
        (pid, camid, str(root / f"test_{word}/cam{camid}/{pid:04d}/{pid:04d}_{index}.png"))
        for pid in (9, 30)
        for camid in camids
        for index in range(5)
    ]
    word, camids = words[gallery]
    for trial in range(10):
        rng = random.Random(trial)
        expected = []
        for pid in (9, 30):
            for camid in camids:
                folder = root / f"test_{word}/cam{camid}/{pid:04d}"
                expected.append((pid, camid, str(folder / rng.choice(sorted(os.listdir(folder))))))
        assert keys(gallery_samples("llcm", root, mode, trial)) == expected


# --- names


def test_unknown_names_list_the_valid_ones(tmp_path):
    for call in (train_samples, query_samples, gallery_samples, dataset_root):
        refused(lambda call=call: call("sysuu", tmp_path), "sysuu", "sysu, regdb, llcm")
    for call in (query_samples, gallery_samples):
        refused(lambda call=call: call("sysu", tmp_path, "outdoor"), "outdoor", "all, indoor")
        refused(lambda call=call: call("llcm", tmp_path, "all"), "visible-to-infrared, infrared-to-visible")
        refused(lambda call=call: call("sysu", tmp_path, trial=10), "10", "0, 1, 2")
        refused(lambda call=call: call("regdb", tmp_path, trial=0), "1, 2, 3")
        refused(lambda call=call: call("sysu", tmp_path, split="train"), "test, val")
        refused(lambda call=call: call("llcm", tmp_path, split="val"), "val", "test")
    refused(lambda: train_samples("regdb", tmp_path, trial=11), "11", "9, 10")
    refused(lambda: train_samples("regdb", tmp_path, split="train"), "trainval")
    refused(lambda: train_samples("sysu", tmp_path, split="test"), "trainval, train")
    refused(lambda: gallery_samples("sysu", tmp_path, galleries="drawn"), "seeded, published")
    refused(lambda: gallery_samples("llcm", tmp_path, galleries="published"), "--galleries", "seeded")
    refused(lambda: gallery_samples("llcm", tmp_path, shot=10), "--shot 10")
    refused(lambda: gallery_samples("sysu", tmp_path, shot=0), "--shot 0")
    root = small_sysu(tmp_path)
    refused(lambda: gallery_samples("sysu", root, galleries="published", split="val"), "val")


def test_dataset_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: dataset_root("sysu"), "data/sysu", "data/sysu/exp", "--data-path", "python demo.py")
    small_sysu(tmp_path / "data/sysu")
    assert dataset_root("sysu") == Path("data/sysu")
    assert dataset_root("sysu", tmp_path / "data/sysu") == tmp_path / "data/sysu"
    refused(lambda: dataset_root("llcm", "data/sysu"), "LLCM", "data/sysu/idx")
