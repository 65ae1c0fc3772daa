"""RegDB's and LLCM's readers."""

import os
import random

import pytest
from layouts import keys, llcm, refused, regdb, write

from data_manager import (
    class_labels,
    gallery_samples,
    query_samples,
    train_samples,
)

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
