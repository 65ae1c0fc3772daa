"""The datasets by name: facts, roots, and that what is trained on is not tested on."""

import functools
import shutil
from pathlib import Path

import pytest
from conftest import tiny_flags
from layouts import TEST, llcm, refused, regdb, small_sysu, write

from data_manager import (
    DATASETS,
    dataset_root,
    gallery_samples,
    query_samples,
    refuse_shared,
    train_samples,
)
from evaluation.protocols import Evaluation, Protocol

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
