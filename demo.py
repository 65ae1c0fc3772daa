"""The complete pipeline on a synthetic dataset: draw, preprocess, train, test, report. Needs no data and
takes minutes on a CPU:

    python demo.py

It runs the real scripts and prints each command first.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_manager import DATASETS
from eval_metrics import summarize
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import Features, score
from tools.commands import machine_flags, run
from utils import Parser, device_flags, run_script, seed_number

IDENTITIES, TEST_IDENTITIES, IMAGES = 210, 40, 2  # many people, few images per camera
SIZE = ("--img-h", "64", "--img-w", "48")
# To train from scratch within minutes: a small network, a high rate, and one stem for both modalities. With
# ImageNet weights and 160 epochs none of this is needed.
NETWORK = ("--arch", "resnet18", "--stem", "shared", "--weights", "none")
BATCHES = ("--batch-size", "16", "--num-pos", "1", "--pad", "3")  # 10 are too much for such small images
SCHEDULE = ("--lr", "0.001", "--warmup-epochs", "2", "--decay-epochs", "6", "8")
EPOCHS = 9


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Draw, preprocess, train and test on synthetic data, and make a report.",
        parents=[device_flags()],
    )
    add = parser.add_argument
    add("--output", default="demo", metavar="DIR", help="folder to write everything to")
    add("--seed", type=seed_number, default=0, metavar="N", help="seed of everything that is drawn")
    return parser


def chance(root: Path, protocol: Protocol, seed: int) -> dict[str, float]:
    """The metrics of random features, averaged over ten trials.

    Args:
        root: the dataset's folder.
        protocol: to evaluate.
        seed: of the features.
    """
    evaluation = Evaluation.draw(root, [protocol], DATASETS[protocol.dataset].trials)
    generator = torch.Generator().manual_seed(seed)
    images = evaluation.images()
    drawn = {m: torch.randn(len(samples), 64, generator=generator) for m, samples in images.items()}
    features = Features.of_images(images, {m: F.normalize(tensor) for m, tensor in drawn.items()})
    scores = score(evaluation, features, intervals=False)[protocol]
    mean, _ = summarize([one.metrics for one in scores])
    return {"cmc": mean.cmc, "mAP": mean.mAP, "mINP": mean.mINP}


def verdict(results: dict[str, dict]) -> str:
    """Whether training was worth it: what holds on every machine, where numbers differ.

    results: {"chance", "untrained", "trained": metrics}.
    """
    found = [results[name]["mAP"] for name in ("chance", "untrained", "trained")]
    if found[2] > max(found[:2]):
        return "The trained network ranks better than chance and the untrained network."
    return "The trained network ranks no better than chance or the untrained network: something is wrong."


def main(args: object) -> None:
    """Run the pipeline and print the results before and after training."""
    out = Path(args.output, f"seed{args.seed}")
    data, untrained, trained = out / "sysu", out / "untrained", out / "trained"
    if data.exists():
        print(f"{data} exists and is used again; remove {out} to start from scratch")
    else:
        people = ("--identities", IDENTITIES, "--test-identities", TEST_IDENTITIES, "--images", IMAGES)
        run("-m synthetic", "--dataset", "sysu", "--data-path", data, *people, "--seed", args.seed)
    run("pre_process_sysu.py", "--data-path", data, *SIZE, "--workers", args.workers)
    machine = machine_flags(args)
    settings = (
        "--data-path", data, *SIZE, *NETWORK, *BATCHES, *SCHEDULE, "--seed", args.seed, "--select", "last",
        *machine, "--overwrite",
    )  # fmt: skip
    print("\nFirst an untrained network (0 epochs) for comparison, then the training.")
    for folder, epochs in ((untrained, 0), (trained, EPOCHS)):
        run("train.py", *settings, "--epochs", epochs, "--model-path", folder, "--log-path", folder / "log")
    results, checkpoints = {}, {}
    for name, folder in (("untrained", untrained), ("trained", trained)):
        # Earlier demos with another precision may have left other runs here: take the newest.
        checkpoints[name] = max(folder.glob("*_last.t"), key=lambda path: path.stat().st_mtime_ns)
        numbers = out / f"{name}.json"
        run("test.py", "--resume", checkpoints[name], "--data-path", data, *machine, "--json", numbers)
        results[name] = json.loads(numbers.read_text())["results"][0]["mean"]
    results["chance"] = chance(data, Protocol("sysu", "all"), args.seed)
    both = (checkpoints["trained"], checkpoints["untrained"])
    run("-m tools.report", "--resume", *both, "--data-path", data, *machine, "--output", out / "report")

    identities = (data / "exp" / "test_id.txt").read_text().count(",") + 1
    words = "never seen in training, infrared to visible, per cent, mean of ten trials"
    print(f"\n{identities} identities {words}")
    print(f"{'':10}{'rank-1':>8}{'rank-10':>9}{'mAP':>8}{'mINP':>8}")
    for name in ("chance", "untrained", "trained"):
        found = results[name]
        values = np.array([found["cmc"][0], found["cmc"][9], found["mAP"], found["mINP"]]) * 100
        print(f"{name:10}" + "{:8.2f}{:9.2f}{:8.2f}{:8.2f}".format(*values))
    print(f"\n{verdict(results)}")
    print(f"checkpoints: {untrained}, {trained}; curves: tensorboard --logdir {trained / 'log'}")
    print(f"report: open {out / 'report' / 'index.html'} in a browser")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
