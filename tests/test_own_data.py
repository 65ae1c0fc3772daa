"""readers/own.py: own images from folders or a CSV, split in three ways; one line says what is wrong."""

import functools
import logging
import os
import re
import shlex
import unicodedata

import numpy as np
import pytest
from conftest import REPOSITORY, run_script, tiny_flags
from layouts import keys, refused, write
from PIL import Image

import synthetic
from checkpoints import load_checkpoint
from data_manager import (
    DATASETS,
    dataset_root,
    gallery_samples,
    query_samples,
    read_split,
    refuse_shared,
    train_samples,
)
from evaluation.protocols import Evaluation, Protocol
from readers.own import draw_split, numbers
from retrieval.embeddings import find_images
from tools.check import check

V2I, I2V = DATASETS["folder"].modes


def people(root, pids=("ann", "bob", "cid", "dan"), split=""):
    """Two images of each pid and modality, empty files, one of them a folder deeper."""
    for modality in ("visible", "infrared"):
        for pid in pids:
            write(root / split / modality / pid / "b.jpg")
            write(root / split / modality / pid / "a day/a.TIF")
    return root


def table(root, text):
    """A CSV of these lines, and the images that it names."""
    write(root / "images.csv", text)
    for line in text.splitlines()[1:]:
        write(root / line.split(",")[0])
    return root


CSV = """path,pid,camid,modality,split
a/1.png,ann,door,visible,train
a/2.png,ann,hall,infrared,train
b/1.png,7,door,visible,test
b/2.png,7,door,infrared,test
"""


def paths_of(samples, root):
    return [os.path.relpath(path, root) for path in samples.paths]


# --- layouts


def test_identity_folders_are_read_in_order_at_any_depth(tmp_path):
    root = people(tmp_path)
    write(root / "test_identities.txt", "# a comment\nbob\n\ndan\r\n")
    for mode, query, gallery in ((V2I, "visible", "infrared"), (I2V, "infrared", "visible")):
        for samples, modality in (
            (query_samples("folder", root, mode), query),
            (gallery_samples("folder", root, mode), gallery),
        ):
            assert paths_of(samples, root) == [
                f"{modality}/{pid}/{file}" for pid in ("bob", "dan") for file in ("a day/a.TIF", "b.jpg")
            ]
            assert samples.pids.tolist() == [1, 1, 3, 3]  # places among all four, sorted
            assert samples.camids.tolist() == [0] * 4
            assert samples.modality == modality
    trained = train_samples("folder", root)
    assert {modality: part.pids.tolist() for modality, part in trained.items()} == {
        "visible": [0, 0, 2, 2],
        "infrared": [0, 0, 2, 2],
    }


def test_linked_identities_are_read(tmp_path):
    root = people(tmp_path / "data", ("ann", "bob"))
    for modality in ("visible", "infrared"):
        (root / modality / "bob").rename(tmp_path / f"{modality} bob")
        (root / modality / "bob").symlink_to(tmp_path / f"{modality} bob")
    write(root / "test_identities.txt", "bob")
    assert len(query_samples("folder", root)) == 2


def test_what_is_really_the_same_folder_is_walked_once(tmp_path, caplog):
    """Links back into the folder multiply no image, and none changes its identity or modality."""
    root = people(tmp_path / "data", ("ann", "bob", "cid", "dan"))
    write(root / "test_identities.txt", "bob\ndan")
    write(root / "contact sheet.jpg")
    expected = {split: read_split("folder", root, split) for split in ("train", "test")}
    (root / "visible/ann/a loop").symlink_to(root / "visible/ann")
    (root / "visible/ann/to everything").symlink_to(root)
    (root / "visible/ann/to infrared").symlink_to(root / "infrared")
    (root / "visible/aaron").symlink_to(root / "visible/bob")  # before bob, who keeps his images
    (root / "visible/cid/itself").symlink_to("itself")
    for split, parts in expected.items():
        for modality, samples in parts.items():
            assert keys(read_split("folder", root, split)[modality]) == keys(samples)
    (warning,) = caplog.messages
    assert "folders that are walked already, through a link (4: visible/aaron, …)" in warning
    (root / "visible/eve").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere/deeper/1.jpg")
    assert len(find_images(root, "--images").paths) == 18
    assert paths_of(read_split("folder", root, "test")["visible"], root) == paths_of(
        expected["test"]["visible"], root
    )


def test_what_is_passed_over_is_named_with_its_number(tmp_path, caplog):
    root = people(tmp_path)
    write(root / "test_identities.txt", "bob\ndan")
    expected = keys(query_samples("folder", root))
    for waste in ("@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/b.jpg", "Thumbs/b.jpg", "#recycle/b.jpg"):
        write(root / "visible" / waste)
        write(root / "visible/bob" / waste)
    for silent in (".thumbnails/b.jpg", ".AppleDouble/b.jpg", "._b.jpg", "Thumbs.db", ".@__thumb/b.jpg"):
        write(root / "visible/bob" / silent)
    assert keys(query_samples("folder", root)) == expected
    for name in ("x.avif", "Y.AVIF", "notes.txt", "README"):
        write(root / "visible/bob" / name)
    assert keys(query_samples("folder", root)) == expected
    assert caplog.messages == [
        f"{root}: not read: folders of thumbnails or waste (8: visible/#recycle, …)",
        f"{root}: not read: files .avif (2: visible/bob/Y.AVIF, …), files .txt (1: visible/bob/notes.txt), "
        "files without a suffix (1: visible/bob/README), "
        "folders of thumbnails or waste (8: visible/#recycle, …)",
    ]


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_junk_is_nobody(tmp_path, caplog, layout):
    """Pid -1, Market-1501's junk, is in no split, and tools.embed leaves it out."""
    root = table(tmp_path, CSV) if layout == "table" else people(tmp_path)
    if layout == "folders":
        write(root / "test_identities.txt", "bob\ndan")
    expected = [keys(query_samples("folder", root)), keys(train_samples("folder", root)["visible"])]
    count = len(find_images(root, "--images").paths)
    for modality in ("visible", "infrared"):
        write(root / modality / "-1/1.jpg")
        write(root / modality / "-1_c1s1_000401_03.jpg")
    if layout == "table":
        for split in ("train", "test"):
            lines = [
                f"{modality}/-1/{split}.jpg,-1,door,{modality},{split}"
                for modality in ("visible", "infrared")
            ]
            table(root, "\n".join([(root / "images.csv").read_text().strip(), *lines]))
        found = find_images(root / "images.csv", "--images")
        assert len(found.paths) == 4
        assert "4 images of pid -1, junk, are left out" in caplog.text
    assert [keys(query_samples("folder", root)), keys(train_samples("folder", root)["visible"])] == expected
    assert len(find_images(root, "--images").paths) == count
    assert "junk, of pid -1 (4: infrared/-1, …)" in caplog.text


def test_the_camera_in_a_files_name_is_read(tmp_path):
    root = people(tmp_path)
    write(root / "test_identities.txt", "bob\ndan")
    names = (
        "c2_0001.jpg",
        "0002_c3s1_000451_03.jpg",
        "0005_c04_s185535_f7010_vis.jpg",
        "disc7_1.jpg",
        "c9.jpg",
    )
    for name in names:
        write(root / "visible/bob" / name)
    camids = dict(
        zip(*(lambda s: (paths_of(s, root), s.camids.tolist()))(query_samples("folder", root)), strict=True)
    )
    assert [camids[f"visible/bob/{name}"] for name in names] == [2, 3, 4, 0, 0]


def test_copies_in_training_and_test_are_refused(tmp_path):
    """The same picture under another name is found by its content."""
    root = people(tmp_path)
    write(root / "test_identities.txt", "bob\ndan")
    write(root / "visible/ann/b.jpg", "one picture")
    write(root / "visible/bob/new.jpg", "two picture")  # as long
    refuse_shared("folder", root)
    write(root / "infrared/dan/later.jpg", "one picture")
    words = (
        "1 test images are also training images, byte for byte: infrared/dan/later.jpg is visible/ann/b.jpg"
    )
    refused(lambda: refuse_shared("folder", root), words)
    for published_too in (True, False):
        draw = functools.partial(Evaluation.draw, root, [Protocol("folder", V2I)], [0], copies=published_too)
        refused(draw, words)
    assert any(words in line for line in check("folder", root)[0] if line.startswith("problem: "))


def test_two_unicode_forms_of_a_name(tmp_path):
    """macOS writes é as e and an accent: another name elsewhere, that looks the same."""
    composed, apart = (unicodedata.normalize(form, "josé") for form in ("NFC", "NFD"))
    root = table(tmp_path / "paths", CSV.replace("a/1.png", f"{composed}.png"))
    query_samples("folder", root)
    (root / f"{composed}.png").rename(root / f"{apart}.png")
    refused(lambda: query_samples("folder", root), "images.csv, line 2", "another Unicode form, NFD")
    (tmp_path / "list.txt").write_text(str(root / f"{composed}.png"), encoding="utf-8")
    refused(lambda: find_images(tmp_path / "list.txt", "--images"), "another Unicode form, NFD")
    root = people(tmp_path / "pids", ("ann", "bob", composed))
    (root / "visible" / composed).rename(root / "visible" / apart)
    write(root / "test_identities.txt", "bob")
    refused(lambda: train_samples("folder", root), "two Unicode forms", ascii(composed), ascii(apart))


def test_split_folders(tmp_path):
    people(tmp_path, ("0004", "0021"), "train")
    people(tmp_path, ("0009",), "test")
    assert set(train_samples("folder", tmp_path)["infrared"].pids.tolist()) == {4, 21}  # numbers stay
    assert query_samples("folder", tmp_path).pids.tolist() == [9, 9]


def test_a_csv(tmp_path):
    root = table(tmp_path, CSV)
    trained = train_samples("folder", root)
    assert keys(trained["visible"]) == [(1, 1, str(root / "a/1.png"))]  # "7" comes before "ann"
    assert keys(trained["infrared"]) == [(1, 2, str(root / "a/2.png"))]  # cameras: door 1, hall 2
    assert keys(query_samples("folder", root)) == [(0, 1, str(root / "b/1.png"))]
    assert keys(gallery_samples("folder", root)) == [(0, 1, str(root / "b/2.png"))]


def test_a_csv_as_people_save_it(tmp_path):
    root = table(tmp_path, CSV)
    expected = keys(query_samples("folder", root))
    rows = [line.split(",") for line in CSV.splitlines()]
    text = "\r\n".join(", ".join([row[2], f'"{row[0]}"', row[1], row[4], row[3]]) for row in rows)
    text = text.replace("camid", "CamID") + "\r\n,,,,\r\n\r\n" + text.splitlines()[1]
    (root / "images.csv").write_bytes(("\ufeff" + text).encode())
    assert keys(query_samples("folder", root)) == expected


def test_a_csv_without_split_and_camid(tmp_path):
    root = table(tmp_path, "path,pid,modality\n" + "".join(
        f"{pid}{modality}.png,{pid},{modality}\n" for pid in "abc" for modality in ("visible", "infrared")
    ))  # fmt: skip
    draw_split(root, 1, seed=0)
    assert len(query_samples("folder", root)) == 1
    assert len(train_samples("folder", root)["visible"]) == 2
    assert query_samples("folder", root).camids.tolist() == [0]


@pytest.mark.parametrize(
    ("words", "first", "expected"),
    [
        (["10", "9", "0"], 0, {"0": 0, "9": 9, "10": 10}),
        (["10", "9", "x"], 0, {"10": 0, "9": 1, "x": 2}),
        (["1", "01"], 0, {"01": 0, "1": 1}),  # two people
        (["0", "1"], 1, {"0": 1, "1": 2}),
        ([], 1, {}),
    ],
)
def test_words_become_numbers(words, first, expected):
    assert numbers(words, first) == expected


# --- the drawn split


def test_the_split_is_drawn_once_and_the_same_for_the_same_seed(tmp_path, caplog):
    pids = [f"p{k}" for k in range(20)]
    drawn = {}
    with caplog.at_level(logging.INFO, logger="mce"):
        for name, seed in (("one", 3), ("two", 3), ("three", 4)):
            root = people(tmp_path / name, pids)
            draw_split(root, 5, seed)
            drawn[name] = (root / "test_identities.txt").read_text()
    assert drawn["one"] == drawn["two"] != drawn["three"]
    assert "5 of 20 identities" in caplog.text
    tested = query_samples("folder", root).pids
    assert len(set(tested.tolist())) == 5
    assert not set(tested.tolist()) & set(train_samples("folder", root)["visible"].pids.tolist())
    draw_split(root, 5, 99)  # a run with another seed has the same split
    assert (root / "test_identities.txt").read_text() == drawn["three"]
    refused(lambda: draw_split(root, 6, 4), "--test-identities 6", "test_identities.txt", "lists 5", "remove")


def test_only_identities_in_both_modalities_are_drawn(tmp_path):
    root = people(tmp_path, "abcd")
    write(root / "visible/lonely/1.jpg")
    refused(lambda: draw_split(root, 3, 0), "--test-identities 3", "4 identities")
    for seed in range(9):
        draw_split(root, 2, seed)
        assert "lonely" not in (root / "test_identities.txt").read_text()
        (root / "test_identities.txt").unlink()


def test_images_with_a_split_of_their_own_are_not_split_again(tmp_path):
    refused(lambda: draw_split(table(tmp_path, CSV), 1, 0), "--test-identities 1", "are already split")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    root = people(tmp_path)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    refused(lambda: draw_split(root, 1, 0), f"cannot write {root}/test_identities.txt: Read-only file system")


# --- what is wrong, in one line


def lines(*rows, header="path,pid,camid,modality,split"):
    return lambda root: table(root, "\n".join([header, *rows]) + "\n")


def without(modality):
    def make(root):
        people(root)
        for path in (root / modality).rglob("*.*"):
            path.unlink()

    return make


def split_of(text):
    return lambda root: write(people(root) / "test_identities.txt", text)


GOOD = CSV.splitlines()[1:]
WRONG = {
    "nothing": (lambda root: None, ["neither images.csv nor the folders visible and infrared"]),
    "no visible images": (without("visible"), ["no visible images"]),
    "no infrared images": (without("infrared"), ["no infrared images"]),
    "no split": (lambda root: people(root), ["--test-identities N"]),
    "an image without an identity": (lambda root: write(people(root) / "visible/x.jpg"), ["visible/x.jpg"]),
    "two layouts": (lambda root: people(people(root), ["a"], "train"), ["train and visible"]),
    "no test folder": (lambda root: people(root, split="train"), ["the test split has no visible images"]),
    "no training folder": (lambda root: people(root, split="test"), ["the train split has no visible"]),
    "everyone is tested": (split_of("ann\nbob\ncid\ndan"), ["the train split has no visible images"]),
    "unknown identities": (split_of("ann\nzoe"), ["test_identities.txt", "without images: zoe"]),
    "an empty split": (split_of("# nobody\n"), ["test_identities.txt", "no identities"]),
    "an identity in both splits": (
        lambda root: people(people(root, split="train"), ["cid", "eve"], "test"),
        ["in both the train and the test split: pid cid"],
    ),
    "an empty CSV": (
        lambda root: write(root / "images.csv"),
        ["images.csv", "no column path, pid, modality"],
    ),
    "a CSV without lines": (lines(), ["images.csv", "lists no images"]),
    "an unknown column": (lines(*GOOD, header="path,pid,camera,modality,split"), ["unknown column camera"]),
    "an index of pandas": (
        lines(*(f"{k},{line}" for k, line in enumerate(GOOD)), header=",path,pid,camid,modality,split"),
        ["unknown column  (pandas writes one without a name, unless index=False)"],
    ),
    "semicolons": (lines(header="path;pid;modality"), ["images.csv: its values are separated by semicolons"]),
    "tabs": (lines(header="path\tpid\tmodality"), ["images.csv: its values are separated by tabs"]),
    "a missing column": (lines(*GOOD, header="path,camid,modality,split"), ["no column pid"]),
    "a column twice": (lines(*GOOD, header="path,pid,pid,modality,split"), ["twice"]),
    "too few values": (lines(*GOOD, "a/1.png,x"), ["images.csv, line 6: 2 values, not 5"]),
    "an open quote": (lines(*GOOD, '"a/1.png,x'), ["images.csv", "not a CSV file"]),
    "no pid": (lines(*GOOD, "a/1.png,,,visible,train"), ["line 6", "no pid"]),
    "another modality": (lines(*GOOD, "a/3.png,x,,thermal,train"), ["line 6", "'thermal'", "visible nor"]),
    "another split": (lines(*GOOD, "a/3.png,x,,visible,val"), ["line 6", "'val'", "train nor test"]),
    "no split in a line": (lines(*GOOD, "a/3.png,x,,visible,"), ["line 6", "''", "train nor test"]),
    "outside": (lines(*GOOD, "../x.png,x,,visible,test"), ["line 6", "'../x.png'", "outside"]),
    "a contradiction": (lines(*GOOD, "a/1.png,bob,,visible,test"), ["line 6", "different values"]),
    "one modality": (lines(*GOOD[::2]), ["no infrared images"]),
    "nobody in both modalities": (
        lines(*GOOD[:2], *GOOD[2:3], "c/2.png,8,,infrared,test"),
        ["no identity of the test split has images of both modalities"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_line(tmp_path, case):
    make, words = WRONG[case]
    make(tmp_path)
    split = "test" if "the test split" in words[0] or "of the test" in words[0] else "train"
    refused(lambda: read_split("folder", tmp_path, split), tmp_path, *words)
    printed, complete = check("folder", tmp_path)
    assert not complete
    assert len([line for line in printed if line.startswith("problem: ") and words[-1] in line]) == 1


def test_missing_files_of_a_csv(tmp_path):
    root = table(tmp_path, CSV)
    (root / "b/2.png").unlink()
    refused(lambda: query_samples("folder", root), "images.csv, line 5", "no image file 'b/2.png'")
    write(root / "images.csv", CSV.replace("b/1.png", str(root / "b/1.png")))
    refused(lambda: query_samples("folder", root), "images.csv, line 4", "as 'b/1.png'")


def test_training_identities_in_one_modality_are_left_out_and_named(tmp_path, caplog):
    root = people(tmp_path)
    write(root / "visible/eve/1.jpg")
    write(root / "test_identities.txt", "dan")
    assert set(train_samples("folder", root)["visible"].pids.tolist()) == {0, 1, 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pid eve" in caplog.text


def test_a_dataset_that_is_nowhere(tmp_path):
    refused(lambda: dataset_root("folder", tmp_path / "gone"), tmp_path / "gone")
    refused(lambda: train_samples("folder", people(tmp_path), trial=1), "--trial 1")


# --- commands


def draw(root, identities=6, tested=3):
    synthetic.draw_dataset(synthetic.plan_folder(identities, tested, 2, 0), root, 0, height=48, width=24)
    return root


def test_the_same_camera_is_ignored_only_where_it_is_known(tmp_path):
    root = table(tmp_path, CSV + "b/3.png,7,hall,infrared,test\n")
    plain, ignoring = (Protocol("folder", V2I, ignore_same_camera=flag) for flag in (False, True))
    evaluation = Evaluation.draw(root, [plain, ignoring], [0])
    assert (plain.rule, ignoring.rule) == ("regdb", "llcm")
    assert "same camera ignored" in ignoring.title
    query, gallery = evaluation.samples[ignoring, 0]
    assert (query.camids.tolist(), gallery.camids.tolist()) == ([1], [1, 2])
    write(root / "images.csv", CSV.replace("7,door,infrared", "7,,infrared"))
    Evaluation.draw(root, [plain], [0])
    refused(lambda: Evaluation.draw(root, [ignoring], [0]), "--ignore-same-camera", root / "b/2.png")


def test_sixteen_bit_infrared_images_train_and_test_by_one_range(tmp_path, train_here):
    root = draw(tmp_path / "data")
    for file in root.glob("infrared/*/*.jpg"):
        with Image.open(file) as image:
            values = np.asarray(image.convert("L")).astype(np.uint16) * 10 + 29000
        Image.fromarray(values).save(file.with_suffix(".png"))
        file.unlink()
    status, output, errors = train_here(
        "--dataset", "folder", *tiny_flags(root), "--test-identities", 3, "--epochs", 1, "--name", "warm"
    )
    assert status == 0, errors
    assert "infrared: 24 of 24 training images have more than eight bits" in output
    low, high = load_checkpoint("save_model/warm_last.t")["args"]["pixel_range"]
    assert 29000 <= low < high <= 31550
    words = ["--resume", "save_model/warm_best.t", "--gpu", -1, "--data-path", root]
    tested = run_script("test.py", *words, cwd=".")
    assert tested.returncode == 0, tested.stderr
    assert float(re.search(r"mAP ([0-9.]+)", output)[1]) == pytest.approx(  # as training measured it
        float(re.search(r"visible to infrared.* ([0-9.]+) +[0-9.]+$", tested.stdout, re.M)[1]), abs=0.011
    )
    seen = run_script("tools.report", *words, "--output", "figures", "--figures", "ranking", cwd=".")
    assert seen.returncode == 0, seen.stderr


def test_the_page_takes_a_folder_of_images_to_a_table(tmp_path):
    """Every command of docs/own-data.md, as it is typed there."""
    page = (REPOSITORY / "docs/own-data.md").read_text(encoding="utf-8")
    typed = [line for block in page.split("```")[1::2] for line in block.splitlines() if "python" in line]
    commands = [shlex.split(line, comments=True) for line in typed]
    assert {words[1] for words in commands} == {"-m", "train.py", "test.py"}
    assert any("--ignore-same-camera" in words for words in commands)
    for words in commands:
        assert words[0] == "python"
        words = words[2:] if words[1] == "-m" else words[1:]
        done = run_script(words[0], *words[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        if words[0] == "test.py":
            kind = ", same camera ignored" if "--ignore-same-camera" in words else ""
            assert re.search(
                rf"^visible to infrared{kind} +[0-9.]+ .*\n^infrared to visible{kind} +[0-9.]+ ",
                done.stdout,
                re.M,
            )
