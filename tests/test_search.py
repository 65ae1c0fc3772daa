"""tools.search: the nearest rows, exactly, of the gallery that the same checkpoint made."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, REPOSITORY, draw_images, random_checkpoint, run_script
from PIL import Image

from checkpoints import fingerprint, load_checkpoint
from reranking import RERANKING
from retrieval import codes
from retrieval import search as library
from retrieval.embeddings import open_embedder
from retrieval.search import nearest
from retrieval.shards import Embeddings, Manifest, Shard, shards_of, write_manifest, write_shard
from tools import embed, search
from utils import UserError

DIM = 64


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


def write_rows(folder, parts):
    """Write float16 rows as shards."""
    folder.mkdir(exist_ok=True)
    write_manifest(folder, Manifest("00", parts[0].shape[1], "visible", 32, 16, "float32", "in", "a.t", True))
    for k, rows in enumerate(parts):
        records = [{"path": f"/{k}/{row}.png", "size": 1, "mtime_ns": 1} for row in range(len(rows))]
        write_shard(folder, f"000-{k:06d}", rows, records)


def unit(number, dim=DIM, seed=7):
    queries = torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(queries)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which pages are mapped")
def test_pages_of_the_rows_are_given_back(tmp_path):
    rows = write_embeddings(tmp_path, [4000, 4000])
    gallery = Embeddings(tmp_path)
    _, positions = nearest(torch.from_numpy(rows[::800]), gallery, 3)
    np.testing.assert_array_equal(positions[:, 0], np.arange(0, 8000, 800))
    held = re.findall(
        rf"{tmp_path}/\S+\.npy\n(?:\w+:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
    )
    assert held == ["0", "0"]  # both are open, for the next search


def drop(folder, shard, lines):
    """Take lines out of a shard's table, as tools.embed does when images vanish."""
    table = Shard(folder / f"000-{shard:06d}.csv")
    table.replace([record for k, record in enumerate(table.records()) if k not in lines])


# Exactly


def exactly(queries, rows, top, allowed=None):
    """The best rows of each query by correctly rounded sums, the lowest position first among equal ones."""
    products = (
        [math.fsum(row * query) for row in rows.astype(np.float64)] for query in queries.double().numpy()
    )
    similarities = np.array(list(products))
    if allowed is not None:
        similarities[~allowed] = -np.inf
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(similarities, order, 1), order


def drawn(kind, count, dim):
    """Rows (count, dim) float16 that are hard to tell apart, each kind in its own way."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((count, dim))
    if kind == "clustered":
        rows += rng.standard_normal((20, dim))[rng.integers(20, size=count)]
    elif kind == "alike":  # similarities of 0.999 and more, as an untrained network gives
        rows = rng.standard_normal(dim) + 0.02 * rows
    elif kind == "repeated":
        rows = rows[rng.integers(9, size=count)]
    elif kind == "single values":  # the whole length in one dimension, which no scale suits
        rows = 1e-3 * rows + 5 * np.eye(dim)[rng.integers(dim, size=count)] * rng.choice([-1, 1], (count, 1))
    elif kind == "outliers":
        rows *= np.where(np.arange(dim) < 3, 40, 1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture
def by_codes(monkeypatch):
    """Use codes also for few rows; the fixture's value counts the blocks in which they were used."""
    monkeypatch.setattr(library, "LARGEST", 64)
    monkeypatch.setattr(library, "SMALLEST", 64)
    monkeypatch.setattr(library, "PRODUCTS", 4096)
    monkeypatch.setattr(library, "DENSE", 1.0)
    used = []
    method = library._Search._by_codes
    monkeypatch.setattr(
        library._Search, "_by_codes", lambda *words: (used.append(method(*words)), used[-1])[1]
    )
    return used


@pytest.mark.parametrize("number", [3, 40])
@pytest.mark.parametrize("kind", ["random", "clustered", "alike", "repeated", "single values", "outliers"])
def test_the_nearest_are_the_nearest(tmp_path, monkeypatch, by_codes, kind, number):
    """Against correctly rounded sums, with codes and without, with one query and many, one thread and two."""
    rows = drawn(kind, 700, 256)
    write_rows(tmp_path, [rows[:400], rows[400:401], rows[401:]])
    noise = 0 if kind == "repeated" else 0.01
    queries = torch.nn.functional.normalize(
        torch.from_numpy(rows[:number]).float() + noise * unit(number, 256)
    )
    similarities, order = exactly(queries, rows, 10)
    with_codes, positions = nearest(queries, Embeddings(tmp_path), 10)
    assert any(pairs is not None for pairs in by_codes) or kind == "repeated"
    assert positions.tolist() == order.tolist()
    np.testing.assert_allclose(with_codes, similarities, rtol=6e-8, atol=0)  # float32 of them

    singly = [nearest(query[None], Embeddings(tmp_path), 10) for query in queries]
    assert torch.equal(torch.cat([found for found, _ in singly]), with_codes)
    assert torch.equal(torch.cat([found for _, found in singly]), positions)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        again = nearest(queries, Embeddings(tmp_path), 10)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(library, "coded_queries", lambda _: None)  # as on machines without such products
    for found in (again, nearest(queries, Embeddings(tmp_path), 10)):
        assert torch.equal(found[0], with_codes)
        assert torch.equal(found[1], positions)


@pytest.mark.parametrize("top", [1, 7, 500])
def test_rows_that_no_table_names_are_not_found(tmp_path, by_codes, top):
    rows = write_embeddings(tmp_path, [150, 16, 3])
    drop(tmp_path, 0, {0, 20})
    drop(tmp_path, 2, {2})
    for shard in shards_of(tmp_path)[1:2]:  # as written before there were codes
        shard.coded.unlink()
    rows = np.delete(rows, [0, 20, 168], axis=0)
    queries = unit(5)
    wanted, order = exactly(queries, rows, top)
    similarities, positions = nearest(queries, Embeddings(tmp_path), top)
    assert positions.tolist() == order.tolist()
    np.testing.assert_allclose(similarities, wanted, rtol=6e-8)


@pytest.mark.parametrize("number", [1, 9])
def test_only_allowed_rows_of_enough_similarity_are_found(tmp_path, by_codes, number):
    rows = drawn("clustered", 500, 256)
    write_rows(tmp_path, [rows[:300], rows[300:]])
    queries = torch.nn.functional.normalize(
        torch.from_numpy(rows[:number]).float() + 0.02 * unit(number, 256)
    )
    cameras = np.arange(500) % 3
    allowed = cameras != np.arange(number)[:, None] % 3
    wanted, order = exactly(queries, rows, 12, allowed)
    floor = float(np.median(wanted[:, :10]))
    similarities, positions = nearest(
        queries, Embeddings(tmp_path), 12, lambda query, position: cameras[position] != query % 3, floor
    )
    order[wanted < floor] = -1
    assert positions.tolist() == order.tolist()
    assert ((similarities == -torch.inf) == (positions == -1)).all()
    nothing = nearest(queries, Embeddings(tmp_path), 12, lambda query, position: (position + query) < 0)
    assert (nothing[1] == -1).all()


def test_a_sum_in_another_order_has_the_same_bits(tmp_path):
    rows = drawn("random", 50, 512)
    queries, order = unit(50, 512), np.random.default_rng(0).permutation(512)
    sums = []
    for k, places in enumerate((np.arange(512), order)):
        write_rows(tmp_path / str(k), [rows[:, places]])
        search = library._Search(queries[:, places], Embeddings(tmp_path / str(k)), 1, None, -1)
        sums.append(search.exact(np.arange(50), np.arange(50)))
    np.testing.assert_array_equal(*sums)
    wanted = [
        math.fsum(row * query)
        for row, query in zip(rows.astype(float), queries.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(sums[0], wanted, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("kind", ["random", "alike", "single values", "outliers"])
@pytest.mark.parametrize("number", [codes.FEW, 30])
def test_no_product_of_codes_is_further_off_than_its_bound(kind, number):
    """Queries along what rounding has lost are the worst there are: they come near the bound."""
    rows = drawn(kind, 80, 512)
    whole, facts = codes.encode(rows)
    scales, mean, (residual, length) = np.split(facts, [80, 80 + 512])
    coded = codes.Codes(whole, scales, mean, float(residual), float(length))
    turned = codes.rotate(torch.from_numpy(rows).double() - torch.from_numpy(mean).double())
    lost = turned - torch.from_numpy(scales[:, None] * whole.astype(np.float64))
    back = codes.rotate(torch.eye(512, dtype=torch.float64)) @ lost[:number].T  # R is orthogonal
    queries = torch.nn.functional.normalize(back.T).float()
    form = codes.coded_queries(queries.numpy())
    rough = (
        form.offset(coded)
        + form.scale * form.products(torch.from_numpy(whole), torch.from_numpy(scales)).double().numpy()
    )
    error = np.abs(rough - rows.astype(np.float64) @ queries.double().numpy().T)
    bound = form.bound(coded)
    assert (error <= bound).all()
    assert error.max() > 0.2 * bound.max()


def saturating(rows, packed):
    """As processors without VNNI multiply: two products are added in 16 bits. packed: queries, not packed."""
    pairs = ((rows.int() + 128)[:, None] * packed.int()).view(len(rows), len(packed), -1, 2).sum(3)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(2).float() - 128 * packed.sum(1)


@pytest.mark.parametrize(
    ("multiply", "levels"),
    [
        (lambda rows, packed: rows.float() @ packed.float().T, 127),
        (saturating, 63),
        (lambda rows, packed: rows.float() @ packed.float().T + 1, 0),
        (lambda rows, packed: torch.ops.onednn.no_such_product(rows, packed), 0),
    ],
)
def test_a_processor_s_product_is_tried_before_it_is_used(monkeypatch, multiply, levels):
    monkeypatch.setattr(codes, "_multiply", multiply)
    monkeypatch.setattr(codes, "_pack", lambda queries: queries)
    assert codes.int8_levels.__wrapped__() == levels
    if not levels:
        monkeypatch.setattr(codes, "int8_levels", codes.int8_levels.__wrapped__)
        assert codes.coded_queries(np.ones((codes.FEW + 1, 256), np.float32)) is None


def test_codes_of_other_rows_are_refused(tmp_path, by_codes):
    rows = drawn("clustered", 300, 256)
    write_rows(tmp_path, [rows])
    (shard,) = shards_of(tmp_path)
    file = shard.coded
    queries = torch.from_numpy(rows[:9]).float()
    shard.write_codes(rows[::-1].copy())
    with pytest.raises(UserError, match=f"{file}: not the codes of its rows: remove it"):
        nearest(queries, Embeddings(tmp_path), 10)
    for broken in (b"half", file.read_bytes()[:-99]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=f"{file}: not the codes of .*npy: remove it"):
            nearest(queries, Embeddings(tmp_path), 10)


# Galleries


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


def embedded(checkpoint, folder, table):
    """Embed the images of a CSV table, given as text, into folder/gallery."""
    file = folder / "t.csv"
    file.write_text(table)
    words = ["--resume", checkpoint, "--images", file, "--modality", "infrared", "--gpu", "-1"]
    words += ["--output", folder / "gallery", "--img-h", "40"]  # not what the checkpoint says
    assert embed.main(embed.get_args_parser().parse_args(list(map(str, words)))) == 0


def test_from_images_to_results(run, checkpoint, tmp_path):
    """Embed, then search, as users type it: a copy of every image is found first, the image itself never."""
    paths = draw_images(tmp_path / "in", 4)
    shutil.copytree(tmp_path / "in", tmp_path / "copies")
    embedded(checkpoint, tmp_path, "path,pid\n" + "".join(f"in/{k:04d}.png,P{k}\n" for k in range(4)))

    words = ["--resume", checkpoint, "--gpu", "-1", "--gallery", "gallery", "--query", "copies"]
    words += ["--query-modality", "infrared", "--top", "3", "--json", "--report", "report"]
    done = run_script("tools.search", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    copies = [path.replace("/in/", "/copies/") for path in paths]
    assert [(result["query"], result["in_gallery"]) for result in results] == [
        (path, False) for path in copies
    ]
    for k, result in enumerate(results):
        first, *others = result["hits"]
        assert first.pop("similarity") == pytest.approx(1, abs=1e-3)
        assert first == {"rank": 1, "path": paths[k], "known": {"pid": f"P{k}"}}
        assert [hit["rank"] for hit in others] == [2, 3]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 * (1 + 3)
    assert page.count("pid P2") >= 1

    _, output, _ = run(tmp_path / "copies", "--top", "3")
    heading, first, *_ = output.splitlines()
    assert (heading, first.split()) == (copies[0], ["1", first.split()[1], paths[0], "pid", "P0"])
    _, output, _ = run(tmp_path / "in")
    heading, *hits = output.splitlines()[:4]
    assert heading == f"{paths[0]}  (in the gallery: left out)"
    assert {hit.split()[2] for hit in hits} == set(paths[1:])


def test_the_same_camera_and_what_is_not_similar_are_left_out(run, checkpoint, tmp_path):
    paths = draw_images(tmp_path / "in", 5)
    lines = [f"in/{k:04d}.png,{camid}\n" for k, camid in enumerate(["c1", "c2", "c1", "", "c3"])]
    embedded(checkpoint, tmp_path, "path,camid\n" + "".join(lines))

    def found(query, *flags):
        (result,) = json.loads(run(query, "--json", *flags)[1])
        return {hit["path"]: hit["similarity"] for hit in result["hits"]}

    everything = found(paths[0])
    assert set(everything) == set(paths[1:])
    assert set(found(paths[0], "--exclude-same-camera")) == {paths[1], paths[3], paths[4]}
    (tmp_path / "new.png").write_bytes((tmp_path / "in" / "0000.png").read_bytes())
    table = tmp_path / "q.csv"
    table.write_text("path,camid\nnew.png,c2\n")
    assert set(found(table, "--exclude-same-camera")) == {*paths} - {paths[1]}
    similar = sorted(everything.values())
    least = (similar[1] + similar[2]) / 2
    assert found(paths[0], "--min-similarity", least) == {p: s for p, s in everything.items() if s > least}
    with pytest.raises(UserError, match=r"no camid is known of .*new.png: a table's column says it"):
        found(tmp_path / "new.png", "--exclude-same-camera")
    with pytest.raises(UserError, match=r"argument --min-similarity: must be from -1 to 1, not 90"):
        found(paths[0], "--min-similarity", "90")


@pytest.mark.parametrize("candidates", [1, 40, 100])
def test_what_is_nearest_is_reordered_by_affinities(tmp_path, candidates):
    """As test.py does it with a gallery that holds no more; what is not found stays at the end."""
    rows = torch.from_numpy(write_embeddings(tmp_path / "g", [70, 50])).float()
    queries = unit(3)
    gallery = Embeddings(tmp_path / "g")
    found = nearest(queries, gallery, candidates, at_least=0.05)
    similarities, positions = search.reranked(queries, gallery, *found)
    changed = 0
    for k, query in enumerate(queries):
        left = found[1][k][found[1][k] >= 0]
        assert 0 < len(left) < 120
        shown = F.normalize(rows[left])
        distances = RERANKING["aim"](query[None], shown, k1=min(4, len(left)))[0]
        wanted = left[distances.argsort()].tolist()
        changed += wanted != left.tolist()
        assert positions[k].tolist() == wanted + [-1] * (positions.shape[1] - len(wanted))
        values = dict(zip(found[1][k].tolist(), found[0][k].tolist(), strict=True))
        assert similarities[k].tolist() == [values[position] for position in positions[k].tolist()]
    assert changed == (0 if candidates == 1 else 3)


def test_reranking_looks_beyond_the_images_that_are_shown(run, made_by, tmp_path, monkeypatch):
    write_embeddings(tmp_path / "gallery", [150], made_by=made_by)
    (query,) = draw_images(tmp_path / "in", 1)
    (plain,) = json.loads(run(query, "--json", "--top", "150")[1])
    similarities = [hit["similarity"] for hit in plain["hits"]]
    found = {}
    for top in (3, 120):
        _, output, errors = run(query, "--json", "--top", top, "--rerank", "aim")
        assert "the order of the first 100 is that of aim" in errors
        found[top] = json.loads(output)[0]["hits"]
        assert [hit["rank"] for hit in found[top]] == list(range(1, top + 1))
    assert found[3] == found[120][:3] != plain["hits"][:3]
    values = [hit["similarity"] for hit in found[120]]
    assert sorted(values[:100], reverse=True) == similarities[:100] != values[:100]
    assert values[100:] == similarities[100:120]


def test_a_gallery_without_cameras_is_told(run, checkpoint, tmp_path):
    draw_images(tmp_path / "in", 2)
    embedded(checkpoint, tmp_path, "path\nin/0000.png\n")
    table = tmp_path / "q.csv"
    table.write_text("path,camid\nin/0001.png,c2\n")
    with pytest.raises(UserError, match="no camid is known of the gallery's images"):
        run(table, "--exclude-same-camera")


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
    with pytest.raises(UserError, match=r"embedded by another checkpoint, a.t \(0123, D = 64\), not by"):
        run(query)
    write_embeddings(gallery, [3], made_by=made_by, dim=256)
    with pytest.raises(UserError, match="D = 256"):
        run(query)
    write_embeddings(gallery, [3], made_by=made_by)
    np.save(gallery / "000-000000.npy", np.zeros((3, 256), np.float16))
    with pytest.raises(UserError, match=r"000-000000.npy: float16 \(3, 256\) is not float16 \(N, 64\)"):
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
    results = [{"query": path, "in_gallery": False, "hits": hits}]
    page = search.save_report(tmp_path / "r", results, "heading", (700.0, 712.0)).read_text()
    assert page.count("data:image") == 2
    assert "2: 0.5000  /gone/&lt;b&gt;.png  pid &lt;i&gt; (cannot be read)" in page


# In what others make


def code_with(word):
    """The one block of Python in docs/scale.md that has a word."""
    page = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if word in block]
    return code


def test_the_document_s_index_finds_what_exact_search_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss", minversion="1.15", reason="pip install faiss-cpu").omp_set_num_threads(1)
    rows = write_embeddings(tmp_path / "gallery", [900, 700])
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_with("RaBitQfs"), names)
    queries = torch.nn.functional.normalize(torch.from_numpy(rows[5:1500:50]) + 0.02 * unit(30))
    similarities, positions = nearest(queries, Embeddings(tmp_path / "gallery"), 10)
    found = [names["nearest"](query) for query in queries]
    assert torch.equal(torch.tensor([[position for _, position in row] for row in found]), positions)
    values = torch.tensor([[value for value, _ in row] for row in found])
    torch.testing.assert_close(values, similarities, atol=1e-6, rtol=0)


def test_the_document_s_store_finds_what_exact_search_finds(checkpoint, tmp_path):
    pytest.importorskip("lancedb", reason="the store is not installed: pip install lancedb")
    write_embeddings(tmp_path / "gallery", [300, 200])
    drop(tmp_path / "gallery", 1, {0, 7})
    shutil.copy(checkpoint, tmp_path / "RUN_best.t")
    (query,) = draw_images(tmp_path / "in", 1)
    shutil.copy(query, tmp_path / "night.png")
    here = f"import sys; sys.path.append({os.path.dirname(__file__)!r}); import narrow\n"
    done = subprocess.run(
        [sys.executable, "-c", here + code_with("lancedb")], cwd=tmp_path, env=os.environ | ENVIRONMENT,
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
