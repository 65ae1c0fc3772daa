"""tools.embed: shards of features and their tables, continued, kept up to date, of one kind in a folder."""

import csv
import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, draw_images, random_checkpoint, run_script
from PIL import Image

import precision
from checkpoints import fingerprint, load_checkpoint, save_checkpoint
from images import read_image
from retrieval.embeddings import embed_files, find_images, open_embedder, readable_batches
from retrieval.shards import Embeddings, Manifest, read_manifest, shards_of, write_manifest, write_shard
from tools import embed
from utils import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.t")


@pytest.fixture
def run(checkpoint, tmp_path):
    """Embed images into tmp_path/out and return the exit status."""

    def run(images, *flags, resume=checkpoint, modality="infrared"):
        words = ["--resume", resume, "--images", images, "--modality", modality, "--output", tmp_path / "out"]
        args = [*words, "--gpu", "-1", "--workers", "2", "--test-batch", "3", *flags]
        return embed.main(embed.get_args_parser().parse_args(list(map(str, args))))

    return run


def contents(folder):
    """{path: (feature, the table's line)}, read as the documentation tells users to."""
    found = {}
    for table in folder.glob("*.csv"):
        features = np.load(table.with_suffix(".npy"), mmap_mode="r")
        assert features.dtype == np.float16
        with open(table, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            for line in csv.DictReader(stream):
                assert line["path"] not in found
                found[line["path"]] = features[int(line["row"])], line
    return found


def embedded_anew(checkpoint, paths, modality="infrared"):
    embedder, _ = open_embedder(checkpoint)
    return {path: embedder([path], modality)[0].numpy() for path in paths}


def same(features, wanted):
    assert set(features) == set(wanted)
    for path, feature in wanted.items():
        found = features[path][0].astype(np.float32)
        np.testing.assert_allclose(found, feature, atol=1e-3)
        assert abs(np.linalg.norm(found) - 1) < 2**-11  # as much as float16 rounds each value
        assert found @ feature > 0.9999 * np.linalg.norm(found)


def test_features_are_those_of_the_images(run, checkpoint, tmp_path):
    paths = draw_images(tmp_path / "in", 5) + draw_images(tmp_path / "in" / "below", 2, seed=1)
    assert run(tmp_path / "in") == 0
    same(contents(tmp_path / "out"), embedded_anew(checkpoint, paths))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.fingerprint == fingerprint(load_checkpoint(checkpoint))
    assert (manifest.dim, manifest.modality, manifest.height, manifest.width) == (64, "infrared", 32, 16)
    assert (manifest.precision, manifest.complete) == ("float32", True)


def test_only_what_is_new_or_changed_is_embedded_again(run, checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    paths = draw_images(folder, 6)
    run(folder)
    draw_images(folder, 1, seed=9)  # the first is another image now
    os.remove(paths[1])
    new = draw_images(folder / "new", 2, seed=5)
    read = []
    monkeypatch.setattr(
        embed, "embed_files", lambda e, paths, *rest: (read.extend(paths), embed_files(e, paths, *rest))[1]
    )
    assert run(folder) == 0
    assert sorted(read) == sorted([paths[0], *new])
    left = [path for path in [*paths, *new] if path != paths[1]]
    same(contents(tmp_path / "out"), embedded_anew(checkpoint, left))
    read.clear()
    assert run(folder) == 0
    assert read == []


def test_unreadable_files_are_listed_and_left_out(run, tmp_path, capsys):
    folder = tmp_path / "in"
    paths = draw_images(folder, 10)
    for path in (paths[0], paths[4], paths[9]):
        with open(path, "w") as file:
            file.write("no image")
    assert run(folder) == 1
    errors = capsys.readouterr().err
    assert [line for line in errors.splitlines() if line.startswith("cannot read")] == [
        f"cannot read {path} (not an image)" for path in (paths[0], paths[4], paths[9])
    ]
    assert "7 embedded, 0 as they were, 0 dropped, 3 unreadable" in errors
    assert set(contents(tmp_path / "out")) == set(paths) - {paths[0], paths[4], paths[9]}
    for path in (paths[0], paths[4], paths[9]):
        os.remove(path)
    assert run(folder) == 0


def test_nothing_but_unreadable_files(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    assert run(tmp_path / "in") == 1
    with pytest.raises(UserError, match="embeddings of no images"):
        Embeddings(tmp_path / "out")


KILLED = """
import os, signal, sys
sys.path.append({tests!r})
import narrow  # as here
from tools import embed
from retrieval import shards
embed.SHARD_ROWS = 6
write, written = shards.Shard.replace, []
def write_or_die(shard, records):
    if len(written) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)  # the rows are there, their table is not
    written.append(shard)
    write(shard, records)
shards.Shard.replace = write_or_die
embed.main(embed.get_args_parser().parse_args(sys.argv[1:]))
"""


def test_a_killed_run_goes_on(run, checkpoint, tmp_path, monkeypatch):
    paths = draw_images(tmp_path / "in", 14)
    words = ["--resume", checkpoint, "--images", tmp_path / "in", "--modality", "infrared"]
    words += ["--output", tmp_path / "out", "--gpu", "-1", "--test-batch", "3"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(after=1, tests=os.path.dirname(__file__)), *map(str, words)],
        cwd=tmp_path, env=os.environ | ENVIRONMENT, timeout=120, check=False,
    )  # fmt: skip
    assert killed.returncode == -9
    out = tmp_path / "out"
    assert len(list(out.glob("*.npy"))) == 2
    assert len(contents(out)) == 6
    assert not read_manifest(out).complete
    (out / ".000-000007.npy.abc.part").write_bytes(b"half")
    (out / "my-own.npy").write_bytes(b"stays")
    read = []
    monkeypatch.setattr(
        embed, "embed_files", lambda e, paths, *rest: (read.extend(paths), embed_files(e, paths, *rest))[1]
    )
    assert run(tmp_path / "in") == 0
    assert read == paths[6:]
    same(contents(out), embedded_anew(checkpoint, paths))
    assert len(list(out.glob("*.npy"))) == len(shards_of(out)) + 1
    assert list(out.glob("*.part")) == list(out.glob(".*.part")) == []
    assert read_manifest(out).complete


def test_what_a_table_knows_is_kept_and_kept_up_to_date(run, checkpoint, tmp_path):
    paths = draw_images(tmp_path / "in", 3)
    table = tmp_path / "t.csv"
    table.write_text(
        "pid,path,modality,size\n007,in/0000.png,infrared,big\nAnna,in/0001.png,visible,\nBo,in/0002.png,infrared,\n"
    )
    assert run(table) == 0
    same(contents(tmp_path / "out"), embedded_anew(checkpoint, [paths[0], paths[2]]))
    line = contents(tmp_path / "out")[paths[0]][1]
    assert (line["pid"], line["modality"], int(line["size"])) == (
        "007",
        "infrared",
        os.path.getsize(paths[0]),
    )
    table.write_text(table.read_text().replace("Bo", "Børge"))
    before = [shard.array.stat().st_mtime_ns for shard in shards_of(tmp_path / "out")]
    assert run(table) == 0
    assert contents(tmp_path / "out")[paths[2]][1]["pid"] == "Børge"
    assert [shard.array.stat().st_mtime_ns for shard in shards_of(tmp_path / "out")] == before


def test_a_tables_columns_may_have_the_names_of_a_shards_own(run, checkpoint, tmp_path):
    """Rows are the array's, what the user knew comes back, and a shard's table can be embedded again."""
    paths = draw_images(tmp_path / "in", 4)
    own = {"row": "B 7", "size": "large", "mtime_ns": "noon", "_row": "left", "pid": "9"}
    lines = [f"{path},{','.join(own.values())}" for path in reversed(paths)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join([f"path,{','.join(own)}", *lines]), encoding="utf-8")
    for time in range(3):
        assert run(table) == 0
        same(contents(tmp_path / "out"), embedded_anew(checkpoint, paths))
        records = Embeddings(tmp_path / "out").records(np.arange(4))
        assert {record["path"]: record["known"] for record in records} == dict.fromkeys(paths, own)
        assert find_images(tmp_path / "out/000-000000.csv", "--images").columns == tuple(own)
        table = (tmp_path / "out").rename(tmp_path / f"out {time}") / "000-000000.csv"


def test_rows_that_an_older_version_mixed_up_are_refused(tmp_path):
    write_manifest(tmp_path, Manifest("00", 4, "visible", 32, 16, "float32", "in"))
    records = [{"path": f"/{k}.png", "size": 1, "mtime_ns": 1} for k in range(3)]
    write_shard(tmp_path, "000-000000", np.zeros((3, 4), np.float16), records)
    table = tmp_path / "000-000000.csv"
    assert len(Embeddings(tmp_path)) == 3
    table.write_text(table.read_text().replace("\n0,", "\n2,").replace("\n1,", "\n0,"))
    with pytest.raises(UserError, match=f"{table}: its column row is not the array's rows"):
        Embeddings(tmp_path)


def test_file_names_may_be_anything(run, tmp_path):
    (path,) = draw_images(tmp_path / "in", 1)
    names = [os.fsdecode(b'caf\xe9, "old".png'), "ü\nü.PNG"]
    for name in names:
        os.link(path, tmp_path / "in" / name)
    assert run(tmp_path / "in") == 0
    assert set(contents(tmp_path / "out")) == {path, *(str(tmp_path / "in" / name) for name in names)}
    assert {r["path"] for r in Embeddings(tmp_path / "out").records(np.arange(3))} == set(
        contents(tmp_path / "out")
    )
    assert run(tmp_path / "in") == 0
    assert len(contents(tmp_path / "out")) == 3


def test_modalities_have_their_own_stems(run, checkpoint, tmp_path):
    paths = draw_images(tmp_path / "in", 2)
    run(tmp_path / "in", modality="visible")
    same(contents(tmp_path / "out"), embedded_anew(checkpoint, paths, "visible"))
    with pytest.raises(UserError, match="was made with modality visible, this run has infrared"):
        run(tmp_path / "in", modality="infrared")


def test_rows_are_coded_also_those_that_were_not(run, tmp_path):
    paths = draw_images(tmp_path / "in", 3)
    run(tmp_path / "in")
    (shard,) = shards_of(tmp_path / "out")
    codes = shard.coded.read_bytes()
    assert shard.codes((3, 64)).codes.any(axis=1).all()
    shard.coded.unlink()  # a folder of an earlier version
    os.remove(paths[0])
    (tmp_path / "out" / "000-000009.codes").write_bytes(b"of a run that was killed before its table")
    run(tmp_path / "in")
    assert shard.coded.read_bytes() == codes
    assert [path.name for path in (tmp_path / "out").glob("*.codes")] == [shard.coded.name]
    for path in paths[1:]:
        os.remove(path)
    draw_images(tmp_path / "in" / "new", 1)
    run(tmp_path / "in")
    assert len(list((tmp_path / "out").glob("*.codes"))) == len(shards_of(tmp_path / "out")) == 1


def test_another_run_s_folder_is_refused(run, tmp_path):
    draw_images(tmp_path / "in", 2)
    draw_images(tmp_path / "other", 2)
    run(tmp_path / "in")
    other = random_checkpoint(tmp_path / "b.t", seed=1)
    before = contents(tmp_path / "out")
    for images, flags, words in (
        ("in", {"resume": other}, "made with fingerprint"),
        ("other", {}, "made with images"),
    ):
        with pytest.raises(UserError, match=words):
            run(tmp_path / images, **flags)
    with pytest.raises(UserError, match="made with height 32, this run has 48"):
        run(tmp_path / "in", "--img-h", "48")
    assert set(contents(tmp_path / "out")) == set(before)
    with (
        embed.opened(tmp_path / "out", read_manifest(tmp_path / "out")),
        pytest.raises(UserError, match="another tools"),
    ):
        run(tmp_path / "in")


def test_a_list_says_which(run, tmp_path, capsys):
    paths = draw_images(tmp_path / "in", 3)
    listed = tmp_path / "images.txt"
    listed.write_text(f"in/0002.png\r\n{paths[0]}\nin/gone.png\n\nin/0002.png\n")
    assert run(listed) == 1
    assert f"cannot read {tmp_path}/in/gone.png (no such file)" in capsys.readouterr().err
    assert set(contents(tmp_path / "out")) == {paths[0], paths[2]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gone", None, "--images gone: no such file or folder"),
        ("a.doc", "", "--images a.doc: no folder, list"),
        ("a.txt", "\n", "--images a.txt: no images there"),
        ("a.txt", "b.png\nc.png", "--images a.txt: none of its files exists; the first would be .*b.png"),
        ("a.csv", "", "--images a.csv: its first line names no column `path`"),
        ("a.csv", "path,pid\nx.png,1\ny.png\n", "--images a.csv, line 3: 1 values, 2 columns"),
        ("a.csv", 'path,pid\n"x.png,1\n', "--images a.csv: cannot be read: unexpected end of data"),
        ("a.csv", "path,pid,PID\n", "--images a.csv: .* a column twice"),
        ("empty", "folder", "--images empty: no images there"),
    ],
)
def test_bad_lists(name, text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "folder":
        (tmp_path / name).mkdir()
    elif text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        find_images(name, "--images")


def test_batches_keep_order_and_size(tmp_path):
    paths = draw_images(tmp_path, 21)
    for k in (0, 7, 8, 20):
        paths[k] = str(tmp_path / f"gone{k}.png")
    rows, failures = [], []
    read = functools.partial(read_image, height=8, width=4)
    for pixels, those, failed in readable_batches(paths, read, batch_size=5, workers=3):
        assert all((image == read(paths[row])).all() for image, row in zip(pixels, those, strict=True))
        assert len(those) <= 5
        rows += those
        failures += failed
    assert rows == [k for k in range(21) if k not in (0, 7, 8, 20)]
    assert failures == [f"{paths[k]} (no such file)" for k in (0, 7, 8, 20)]


def test_two_processes_share_the_work(checkpoint, tmp_path):
    paths = draw_images(tmp_path / "in", 7)
    (tmp_path / "in" / "bad.png").write_text("no image")
    words = ["--resume", checkpoint, "--images", tmp_path / "in", "--modality", "infrared"]
    words += ["--output", tmp_path / "out"]
    launcher = "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tools.embed"
    done = run_script(*launcher, *words, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert "7 embedded, 0 as they were, 0 dropped, 1 unreadable" in done.stderr, done.stderr
    assert done.stderr.count("running on the CPU") == 1
    assert done.stderr.count("cannot read ") == 1
    assert done.returncode == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.csv")) == [
        "000-000000.csv",
        "001-000000.csv",
    ]
    same(contents(tmp_path / "out"), embedded_anew(checkpoint, paths))


def test_fingerprints_tell_weights_apart(checkpoint):
    first = load_checkpoint(checkpoint)
    net = first["net"]
    assert fingerprint({"net": dict(reversed(net.items()))}) == fingerprint(first)
    key = "neck.running_mean"
    assert fingerprint({"net": net | {key: net[key] + 1e-6}}) != fingerprint(first)


def test_the_embedder_takes_files_and_open_images(checkpoint, tmp_path):
    paths = draw_images(tmp_path, 2)
    embedder, _ = open_embedder(checkpoint)
    with Image.open(paths[1]) as image:
        features = embedder([paths[0], image], "infrared")
        assert image.size == (12, 30)
    torch.testing.assert_close(features, embedder(paths, "infrared"))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert not torch.allclose(features, embedder(paths, "visible"), atol=1e-2)
    for images, modality in (([], "visible"), (paths[0], "visible"), (paths, "thermal")):
        with pytest.raises(ValueError, match=r"images is a list|modality is visible"):
            embedder(images, modality)


@pytest.mark.parametrize("right", [True, False])
def test_the_embedder_uses_reduced_precision_where_it_is_native_and_right(right, tmp_path, monkeypatch):
    paths = draw_images(tmp_path, 3)
    path = random_checkpoint(tmp_path / "a.t", amp="auto", img_h=64, img_w=32)  # bfloat16 is right there
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    exact = open_embedder(path)[0](paths, "infrared")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    if not right:
        wrong = precision.Disagreement("layer3.0.conv2", "output", 0.5, 0.01)
        monkeypatch.setattr(precision, "check", lambda *_: wrong)
    embedder, _ = open_embedder(path)
    found = embedder(paths, "infrared")
    assert torch.equal(found, exact) != right  # float32's, to the bit, where bfloat16 is wrong
    assert (found * exact).sum(1).min() > 0.99
    calls = []
    monkeypatch.setattr(precision, "check", lambda *_: calls.append(1))
    embedder(paths, "visible")
    assert not calls  # compared once


def test_deep_images_are_read_in_the_checkpoint_s_range(tmp_path):
    values = np.linspace(7000, 9000, 32 * 16, dtype=np.uint16).reshape(32, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    bytes_ = ((values.astype(float) - 7000) * 256 / 2000).clip(0, 255).astype(np.uint8)
    Image.fromarray(bytes_).save(tmp_path / "plain.png")
    embedder, _ = open_embedder(random_checkpoint(tmp_path / "a.t", pixel_range=[7000.0, 9000.0]))
    deep, plain = (embedder([tmp_path / name], "infrared") for name in ("deep.png", "plain.png"))
    torch.testing.assert_close(deep, plain)


def test_a_network_that_gives_nan_is_refused(run, tmp_path):
    draw_images(tmp_path / "in", 2)
    broken = random_checkpoint(tmp_path / "b.t")
    checkpoint = load_checkpoint(broken)
    checkpoint["net"]["neck.running_mean"][:] = float("nan")
    save_checkpoint(checkpoint, broken)
    with pytest.raises(UserError, match=r"gives NaN or infinity for .*0000.png"):
        run(tmp_path / "in", resume=broken)
