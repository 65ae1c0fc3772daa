"""tools.search: the nearest rows, exact or through an index, of the gallery that the same checkpoint made."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY, draw_images, random_checkpoint, run_script
from PIL import Image

from checkpoints import fingerprint, load_checkpoint
from retrieval import search as library
from retrieval.embeddings import open_embedder
from retrieval.search import nearest, nearest_by_index, open_index
from retrieval.shards import Embeddings, Manifest, Shard, shards_of, write_manifest, write_shard
from tools import embed, search
from utils import UserError, log_to_terminal

DIM = 512


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.t")


def write_embeddings(folder, counts, seed=0, made_by="00", dim=DIM, complete=True, identities=40):
    """Write shards of random unit rows around some centres; return them (N, dim) as float32."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((identities, dim))
    write_manifest(folder, Manifest(made_by, dim, "visible", 32, 16, "float32", "in", "a.t", complete))
    rows = []
    for k, count in enumerate(counts):
        features = centers[rng.integers(identities, size=count)] + rng.standard_normal((count, dim))
        rows.append((features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16))
        records = [
            {"path": f"/{k}/{row}.png", "size": 1, "mtime_ns": 1, "pid": f"p{row}"} for row in range(count)
        ]
        write_shard(folder, f"000-{k:06d}", rows[-1], records)
    return np.concatenate(rows).astype(np.float32)


def unit(number, dim=DIM, seed=7):
    queries = torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(queries)


def drop(folder, shard, lines):
    """Take lines out of a shard's table, as tools.embed does when images vanish."""
    table = Shard(folder / f"000-{shard:06d}.csv")
    table.replace([record for k, record in enumerate(table.records()) if k not in lines])


@pytest.mark.parametrize("top", [1, 7, 500])
def test_exact_search_is_one_product(tmp_path, monkeypatch, top):
    monkeypatch.setattr(library, "BLOCK", 16)
    rows = write_embeddings(tmp_path, [50, 16, 3])
    drop(tmp_path, 0, {0, 20})
    drop(tmp_path, 2, {2})
    rows = np.delete(rows, [0, 20, 68], axis=0)
    queries = unit(5)
    similarities, positions = nearest(queries, Embeddings(tmp_path), top)
    wanted = queries.numpy() @ rows.T
    order = np.argsort(-wanted, axis=1)[:, :top]
    assert positions.tolist() == order.tolist()
    np.testing.assert_allclose(similarities, np.take_along_axis(wanted, order, 1), atol=1e-6)


def test_positions_lead_to_rows_and_records(tmp_path):
    rows = write_embeddings(tmp_path, [5, 4])
    drop(tmp_path, 0, {1})
    gallery = Embeddings(tmp_path)
    assert len(gallery) == 8
    positions = np.array([7, 0, 1, 4])
    assert gallery.records(positions) == [
        {"path": path, "known": {"pid": pid}}
        for path, pid in (("/1/3.png", "p3"), ("/0/0.png", "p0"), ("/0/2.png", "p2"), ("/1/0.png", "p0"))
    ]
    np.testing.assert_array_equal(gallery.take(positions).float(), rows[[8, 0, 2, 5]])


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Search tmp_path/gallery and return (exit status, standard output, standard error)."""

    def run(query, *flags):
        words = ["--resume", checkpoint, "--gallery", tmp_path / "gallery", "--query", query]
        words += ["--query-modality", "infrared", "--gpu", "-1", *flags]
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        status = search.main(search.get_args_parser().parse_args(list(map(str, words))))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def made_by(checkpoint):
    return fingerprint(load_checkpoint(checkpoint))


def test_from_images_to_results(run, checkpoint, tmp_path):
    """Embed, then search, as users type it: every image finds itself first."""
    paths = draw_images(tmp_path / "in", 4)
    table = tmp_path / "t.csv"
    table.write_text("path,pid\n" + "".join(f"in/{k:04d}.png,P{k}\n" for k in range(4)))
    words = ["--resume", checkpoint, "--images", table, "--modality", "infrared", "--gpu", "-1"]
    words += ["--output", tmp_path / "gallery", "--img-h", "40"]  # not what the checkpoint says
    assert embed.main(embed.get_args_parser().parse_args(list(map(str, words)))) == 0

    words = ["--resume", checkpoint, "--gpu", "-1", "--gallery", "gallery", "--query", "in"]
    words += ["--query-modality", "infrared", "--top", "3", "--json", "--report", "report"]
    done = run_script("tools.search", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["query"] for result in results] == paths
    for k, result in enumerate(results):
        first, *others = result["hits"]
        assert first.pop("similarity") == pytest.approx(1, abs=1e-3)
        assert first == {"rank": 1, "path": paths[k], "known": {"pid": f"P{k}"}}
        assert [hit["rank"] for hit in others] == [2, 3]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 * (1 + 3)
    assert page.count("pid P2") >= 1

    _, output, _ = run(tmp_path / "in", "--top", "3")
    heading, first, *_ = output.splitlines()
    assert (heading, first.split()) == (paths[0], ["1", first.split()[1], paths[0], "pid", "P0"])


def test_unreadable_queries(run, made_by, tmp_path):
    write_embeddings(tmp_path / "gallery", [3], made_by=made_by)
    draw_images(tmp_path / "in", 2)
    bad = tmp_path / "in" / "bad.png"
    bad.write_text("no image")
    status, output, errors = run(tmp_path / "in")
    assert status == 1
    assert f"cannot read {bad} (not an image)" in errors
    assert len(output.splitlines()) == 2 * (1 + 3)
    with pytest.raises(UserError, match=r"cannot read 1 image: .*bad.png \(not an image\)"):
        run(bad)


def test_other_galleries_are_refused(run, made_by, tmp_path):
    (query,) = draw_images(tmp_path / "in", 1)
    gallery = tmp_path / "gallery"
    with pytest.raises(UserError, match="no embeddings there"):
        run(query)
    write_embeddings(gallery, [3], made_by="0123")
    with pytest.raises(UserError, match=r"embedded by another checkpoint, a.t \(0123, D = 512\), not by"):
        run(query)
    write_embeddings(gallery, [3], made_by=made_by, dim=256)
    with pytest.raises(UserError, match="D = 256"):
        run(query)
    write_embeddings(gallery, [3], made_by=made_by)
    np.save(gallery / "000-000000.npy", np.zeros((3, 256), np.float16))
    with pytest.raises(UserError, match=r"000-000000.npy: float16 \(3, 256\) is not float16 \(N, 512\)"):
        run(query)
    write_embeddings(gallery, [3], made_by=made_by)
    np.save(gallery / "000-000000.npy", np.zeros((2, DIM), np.float16))
    with pytest.raises(UserError, match=r"000-000000.csv: names row 2 of"):
        run(query)
    (gallery / "000-000000.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"000-000000.npy: missing, or not a NumPy array"):
        run(query)
    (gallery / "000-000000.csv").write_text("path\nx\n")
    with pytest.raises(UserError, match=r"000-000000.csv: not a table of embeddings"):
        run(query)
    (gallery / "000-000000.csv").unlink()
    with pytest.raises(UserError, match="embeddings of no images"):
        run(query)
    (gallery / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest.json: not a manifest of embeddings"):
        run(query)


def test_an_interrupted_gallery_is_searched_with_a_warning(run, made_by, tmp_path):
    (query,) = draw_images(tmp_path / "in", 1)
    write_embeddings(tmp_path / "gallery", [3], made_by=made_by, complete=False)
    status, output, errors = run(query)
    assert status == 0
    assert len(output.splitlines()) == 1 + 3
    assert "tools.embed was interrupted" in errors


def test_a_page_shows_what_is_left(tmp_path):
    (path,) = draw_images(tmp_path / "in", 1)
    deep = str(tmp_path / "deep.png")
    Image.fromarray(np.arange(700, 712, dtype=np.uint16).reshape(4, 3)).save(deep)
    hits = [
        {"rank": 1, "similarity": 0.6, "path": deep, "known": {}},
        {"rank": 2, "similarity": 0.5, "path": "/gone/<b>.png", "known": {"pid": "<i>"}},
    ]
    results = [{"query": path, "hits": hits}]
    page = search.save_report(tmp_path / "r", results, "heading", (700.0, 712.0)).read_text()
    assert page.count("data:image") == 2
    assert "2: 0.5000  /gone/&lt;b&gt;.png  pid &lt;i&gt; (cannot be read)" in page


# Through an index


@pytest.fixture
def faiss():
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed: pip install faiss-cpu")
    faiss.omp_set_num_threads(1)
    return faiss


def test_an_index_finds_what_exact_search_finds(faiss, tmp_path, capsys):
    rows = write_embeddings(tmp_path, [900, 700])
    drop(tmp_path, 0, {3})
    gallery = Embeddings(tmp_path)
    log_to_terminal()
    index = open_index(gallery, 10)
    (path,) = tmp_path.glob("index-*.faiss")
    assert float(capsys.readouterr().out.split(f"{path}: recall@10 ")[1].split()[0]) >= 0.95
    queries = torch.nn.functional.normalize(torch.from_numpy(rows[5:1500:50]) + 0.02 * unit(30))
    wanted, exact = nearest(queries, gallery, 10)
    similarities, positions = nearest_by_index(index, queries, gallery, 10)
    assert (positions[:, :, None] == exact[:, None]).any(1).float().mean() > 0.95
    same = positions == exact
    assert same.any(dim=0).all()
    torch.testing.assert_close(similarities[same], wanted[same], atol=1e-6, rtol=0)  # compared exactly
    assert (similarities.diff(dim=1) <= 0).all()


def test_an_index_is_built_once_and_refused_when_older(faiss, run, made_by, tmp_path, monkeypatch):
    (query,) = draw_images(tmp_path / "in", 1)
    gallery = tmp_path / "gallery"
    write_embeddings(gallery, [1200], made_by=made_by)
    run(query, "--index")
    monkeypatch.setattr(library, "build_index", None)
    status, output, _ = run(query, "--index")
    assert (status, len(output.splitlines())) == (0, 11)
    (index,) = gallery.glob("index-*.faiss")
    drop(gallery, 0, {5})
    with pytest.raises(UserError, match=f"{index} is older than its shards"):
        run(query, "--index")
    index.rename(gallery / f"index-{Embeddings(gallery).digest()}.faiss").write_bytes(b"half")
    with pytest.raises(UserError, match="not a whole index"):
        run(query, "--index")


def test_few_rows_need_no_index(faiss, run, made_by, tmp_path):
    (query,) = draw_images(tmp_path / "in", 1)
    write_embeddings(tmp_path / "gallery", [3], made_by=made_by)
    with pytest.raises(UserError, match=r"--index: .*gallery has 3 rows, too few"):
        run(query, "--index")


def test_without_faiss_one_line_says_what_to_install(run, made_by, tmp_path, monkeypatch):
    (query,) = draw_images(tmp_path / "in", 1)
    write_embeddings(tmp_path / "gallery", [3], made_by=made_by)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="--index needs FAISS: pip install faiss-cpu"):
        run(query, "--index")
    assert len(shards_of(tmp_path / "gallery")) == 1


# In a store


def test_the_document_s_store_finds_what_exact_search_finds(checkpoint, tmp_path):
    pytest.importorskip("lancedb", reason="the store is not installed: pip install lancedb")
    write_embeddings(tmp_path / "gallery", [300, 200])
    drop(tmp_path / "gallery", 1, {0, 7})
    shutil.copy(checkpoint, tmp_path / "RUN_best.t")
    (query,) = draw_images(tmp_path / "in", 1)
    shutil.copy(query, tmp_path / "night.png")
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "lancedb" in block]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gallery = Embeddings(tmp_path / "gallery")
    embedder, _ = open_embedder(checkpoint)
    similarities, positions = nearest(embedder([query], "infrared"), gallery, 10)
    wanted = gallery.records(positions[0].numpy())
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1:] for line in lines] == [[image["path"], image["known"]["pid"]] for image in wanted]
    found = torch.tensor([float(line[0]) for line in lines])
    torch.testing.assert_close(found, similarities[0], atol=2e-4, rtol=0)
