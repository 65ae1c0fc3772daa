import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_manager import class_labels, train_samples
from images import read_image
from pre_process_sysu import get_args_parser, main
from readers.arrays import ArrayFiles
from utils import run_script

SCRIPT = Path(__file__).parents[1] / "pre_process_sysu.py"


@pytest.fixture
def root(tmp_path):
    """A tiny SYSU-MM01: ids 3 and 8 train, 5 validate, 1 tests; two images an id and camera."""
    root = tmp_path / "SYSU MM01"
    (root / "exp").mkdir(parents=True)
    for split, ids in {"train": "3,8", "val": "5", "test": "1"}.items():
        (root / "exp" / f"{split}_id.txt").write_text(f"{ids}\n")
    rng = np.random.default_rng(0)
    for camid in (1, 3, 4):
        for pid in (1, 3, 5, 8):
            folder = root / f"cam{camid}" / f"{pid:04d}"
            folder.mkdir(parents=True)
            for index in (1, 2):
                pixels = rng.integers(0, 256, (40, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04d}.jpg")
    return root


def run(*arguments):
    """The command as it is typed."""
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def run_here(capsys):
    """The same without the seconds that a fresh interpreter takes: (exit status, standard error)."""

    def run_here(*arguments):
        with pytest.raises(SystemExit) as exit_:
            run_script(main, lambda: get_args_parser().parse_args(list(map(str, arguments))))
        return exit_.value.code or 0, capsys.readouterr().err

    return run_here


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_arrays_hold_the_training_images(root):
    result = run("--data-path", root, "--img-h", 24, "--img-w", 8, "--workers", 2)
    assert result.returncode == 0, result.stderr
    samples = train_samples("sysu", root)
    arrays = ArrayFiles(root, 24, 8).load({modality: part.paths for modality, part in samples.items()})
    for modality, number in {"visible": 12, "infrared": 6}.items():
        expected = np.stack([read_image(path, 24, 8) for path in samples[modality].paths])
        assert len(expected) == number
        np.testing.assert_array_equal(arrays.images[modality], expected)
        np.testing.assert_array_equal(arrays.labels[modality], class_labels(samples)[modality])
        assert f"{number} {modality} images" in result.stdout
    assert arrays.pids == [3, 5, 8]
    assert "3 identities" in result.stdout
    assert result.stderr == ""  # no bar in a pipe


def test_output_and_the_underscored_flags(root, tmp_path, run_here):
    before = names(root)
    status, errors = run_here(
        "--data_path", root, "--img_h", 12, "--img_w", 8, "--output", tmp_path / "new" / "arrays"
    )
    assert status == 0, errors
    assert ArrayFiles(tmp_path / "new" / "arrays", 12, 8).load().images["visible"].shape == (12, 12, 8, 3)
    assert names(root) == before


def test_every_unreadable_image_is_listed_and_nothing_is_left_behind(root):
    bad = [root / "cam1/0003/0001.jpg", root / "cam4/0008/0002.jpg", root / "cam3/0005/0001.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:300])
    bad[2].write_text("not an image")
    before = names(root)
    result = run("--data-path", root, "--img-h", 24, "--img-w", 8)
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert all(str(path) in message for path in bad)
    assert "Traceback" not in result.stderr
    assert names(root) == before


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--data-path", "/nowhere"], "/nowhere"),
        (["--img-h", "0"], "--img-h"),
        (["--workers", "0"], "--workers"),
        (["--output", "OUT"], "OUT"),
    ],
)
def test_bad_arguments_are_refused_by_name(root, tmp_path, arguments, culprit, run_here):
    (tmp_path / "OUT").touch()  # a file where a folder is wanted
    arguments = [str(tmp_path / "OUT") if argument == "OUT" else argument for argument in arguments]
    status, errors = run_here("--data-path", root, "--img-w", 8, *arguments)
    assert status == 2
    assert culprit in errors.strip().splitlines()[-1]


def test_missing_index_file(root, run_here):
    (root / "exp" / "val_id.txt").unlink()
    status, errors = run_here("--data-path", root)
    assert status == 2
    assert "val_id.txt" in errors


def test_a_second_run_replaces_the_first(root, run_here):
    run_here("--data-path", root, "--img-h", 24, "--img-w", 8)
    shutil.copy(root / "cam1/0003/0001.jpg", root / "cam1/0003/0003.jpg")
    assert run_here("--data-path", root, "--img-h", 24, "--img-w", 8)[0] == 0
    paths = {modality: part.paths for modality, part in train_samples("sysu", root).items()}
    assert ArrayFiles(root, 24, 8).load(paths).images["visible"].shape == (13, 24, 8, 3)


def test_arrays_of_another_size_are_replaced_with_a_word(root, run_here):
    small, large = (("--data-path", root, "--img-h", h, "--img-w", 8) for h in (24, 32))
    assert run_here(*small) == (0, "")
    assert run_here(*small) == (0, "")  # the same size is not spoken of
    status, errors = run_here(*large)
    assert status == 0
    assert errors.splitlines() == [
        f"{root}/train_{word}_resized_img.npy: its {number} images of 24x8 are replaced by 32x8"
        for word, number in (("rgb", 12), ("ir", 6))
    ]
    assert ArrayFiles(root, 32, 8).load().images["visible"].shape == (12, 32, 8, 3)


def test_the_pixel_range_is_found_told_given_and_kept(root, run_here):
    values = np.linspace(51241, 52181, 40 * 16).astype(np.uint16).reshape(40, 16)
    for file in sorted(root.glob("cam3/*/*.jpg")):
        Image.fromarray(values).save(file.with_suffix(".png"))
        file.unlink()
    small = ("--data-path", root, "--img-h", 24, "--img-w", 8)
    status, errors = run_here(*small)
    assert status == 0
    assert "infrared: 6 of 6 training images have more than eight bits, values 51,241 to 52,181" in errors
    assert ArrayFiles(root, 24, 8).load().pixel_range == (51241, 52181)
    assert np.ptp(ArrayFiles(root, 24, 8).load().images["infrared"]) > 240
    assert run_here(*small, "--pixel-range", 51000, 53000)[0] == 0
    assert ArrayFiles(root, 24, 8).load().pixel_range == (51000, 53000)
    before = names(root)
    status, errors = run_here(*small, "--pixel-range", 0, 100)
    assert status == 2
    assert "--pixel-range 0 100: 6 of 6 images have values outside it" in errors.splitlines()[-1]
    assert names(root) == before
