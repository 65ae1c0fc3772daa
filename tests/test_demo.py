"""demo.py: the whole pipeline by the real scripts, at a size that takes seconds."""

import json
import re

import pytest
from conftest import ENVIRONMENT

import demo
from utils import UserError


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"IDENTITIES": 6, "TEST_IDENTITIES": 4, "IMAGES": 1, "EPOCHS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "SIZE", ("--img-h", "32", "--img-w", "16"))
    monkeypatch.setattr(demo, "BATCHES", ("--batch-size", "4", "--num-pos", "1"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_the_demo(tiny, warm_commands, tmp_path, capfd):
    args = demo.get_args_parser().parse_args(
        ["--output", str(tmp_path), "--seed", "3", "--workers", "1", "--amp", "off"]
    )
    demo.main(args)
    out = capfd.readouterr().out
    scripts = re.findall(r"^\$ python (\S+\.py|-m \w+)", out, re.MULTILINE)
    assert scripts == [
        "-m synthetic", "pre_process_sysu.py", *["train.py"] * 2, *["test.py"] * 2, "-m tools",
    ]  # fmt: skip
    assert "\n4 identities never seen in training" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.count(".") == 4}
    folder = tmp_path / "seed3"
    for name in ("untrained", "trained"):
        mean = json.loads((folder / f"{name}.json").read_text())["results"][0]["mean"]
        values = [mean["cmc"][0], mean["cmc"][9], mean["mAP"], mean["mINP"]]
        assert rows[name] == [f"{100 * value:.2f}" for value in values]
    assert 0 < float(rows["chance"][2]) < 100
    better = float(rows["trained"][2]) > max(float(rows[name][2]) for name in ("chance", "untrained"))
    assert ("\nThe trained network ranks better than" in out) == better
    page = folder / "report" / "index.html"
    assert out.splitlines()[-1] == f"report: open {page} in a browser"
    assert f"{100 * mean['cmc'][0]:.2f}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("chance", "untrained", "trained", "good"),
    [(0.04, 0.1, 0.6, True), (0.04, 0.1, 0.07, False), (0.1, 0.04, 0.07, False), (0.1, 0.1, 0.1, False)],
)
def test_a_demo_that_did_not_learn_says_so(chance, untrained, trained, good):
    mAPs = {"chance": chance, "untrained": untrained, "trained": trained}
    said = demo.verdict({name: {"mAP": value} for name, value in mAPs.items()})
    assert ("something is wrong" in said) is not good


def test_a_second_demo_draws_only_for_another_seed(tmp_path, monkeypatch, capsys):
    def stop(script, *_):
        raise UserError(script)

    monkeypatch.setattr(demo, "run", stop)
    (tmp_path / "seed3" / "sysu").mkdir(parents=True)
    for seed, first in ((3, "pre_process_sysu.py"), (4, "-m synthetic")):
        args = demo.get_args_parser().parse_args(["--output", str(tmp_path), "--seed", str(seed)])
        with pytest.raises(UserError, match=first):
            demo.main(args)
        assert ("exists and is used again" in capsys.readouterr().out) == (seed == 3)


def test_a_script_that_fails_ends_the_demo(tmp_path, capfd):
    with pytest.raises(UserError, match=r"pre_process_sysu\.py failed with status 2: see above"):
        demo.run("pre_process_sysu.py", "--data-path", tmp_path / "nowhere")
    assert "nowhere" in capfd.readouterr().err
