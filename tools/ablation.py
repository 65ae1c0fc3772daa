"""What each part of the method is worth, on synthetic data; a night on two CPU cores:

    python -m tools.ablation --output ablation --table docs/evidence.md

Trains every variant with train.py and tests it with test.py, three times: run k of each has the same dataset,
initial weights and batches, those of seed k. Stop it when you like: the same command does what is missing.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

from tools.commands import machine_flags, run
from utils import Parser, UserError, at_least, device_flags, positive, run_script, whole_file

SIZE = ("--img-h", "48", "--img-w", "24")
PEOPLE = ("--identities", "100", "--test-identities", "40", "--images", "2", "--img-h", "96", "--img-w", "40")
TRAINING = (
    "--arch", "resnet18", "--stem", "shared", "--batch-size", "8", "--num-pos", "2",
    "--pad", "3", "--select", "last", "--mode", "all",
)  # fmt: skip
QUICK_PEOPLE = ("--identities", "8", "--test-identities", "3", "--images", "1", *PEOPLE[6:])
FULL = "full method"
VARIANTS = {  # in the order of the training, the most telling first; later flags win over TRAINING
    FULL: "",
    "baseline: identity and weighted triplet": "--loss weighted-triplet",
    "baseline: identity and hard triplet": "--loss hard-triplet",
    "without `align`": "--loss-weights align=0",
    "without the modality memories (`visible`, `infrared`, `aux`, `align`)": "--loss-weights visible=0 "
    "infrared=0 aux=0 align=0",
    "without the `shared` memory's term": "--loss-weights shared=0",
    "without `center`": "--loss-weights center=0",
    "without aux images": "--no-aux",
    "two stems": "--stem two-stream",
    "`shared` updated with means": "--update mean",
    "`align` on updated proxies": "--proxies updated",
    "`align` on both": "--proxies both",
    "without `visible`": "--loss-weights visible=0",
    "without `infrared`": "--loss-weights infrared=0",
    "without `aux`": "--loss-weights aux=0",
    "untrained": "--epochs 0",
}
MODES, METRICS = ("all", "indoor"), ("rank-1", "mAP")
BEGIN, END = "<!-- python -m tools.ablation writes this table -->", "<!-- end of the table -->"


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.ablation",
        description="Train the method's variants on synthetic data, and compare them with the full method.",
        parents=[device_flags()],
    )
    add = parser.add_argument
    one = at_least(1)
    add("--output", default="ablation", metavar="DIR", help="folder to write data, runs and results.json to")
    seeds = "how many models to train of each variant, seeds 0 to N-1"
    add("--seeds", type=one, default=3, metavar="N", help=seeds)
    first = "train only the first N variants"
    add("--first", type=one, default=len(VARIANTS), metavar="N", help=first)
    add("--epochs", type=at_least(6), default=6, metavar="N", help="number of epochs of every training")
    lr = "the learning rate of every training, after the warm-up"
    add("--lr", type=positive, default=0.001, metavar="RATE", help=lr)
    weights = "initial weights of every training, as train.py has them; none: random ones"
    add("--weights", default="none", metavar="imagenet|none|FILE", help=weights)
    add("--table", metavar="FILE.md", help="also put the table between the two marks in this file")
    add("--quick", action="store_true", help="take 8 identities and one epoch: whether it works, no evidence")
    return parser


def draw_data(root: Path, seed: int, quick: bool, workers: int) -> None:
    """The dataset of a seed, if it is not there yet."""
    if not root.exists():
        people = QUICK_PEOPLE if quick else PEOPLE
        run("-m synthetic", "--dataset", "sysu", "--data-path", root, *people, "--seed", seed, quiet=True)
    run("pre_process_sysu.py", "--data-path", root, *SIZE, "--workers", workers, quiet=True)


def training_flags(args: argparse.Namespace) -> list[object]:
    """What every variant is trained with; a longer schedule is the one of six epochs, stretched."""
    epochs = args.epochs
    schedule = ["--warmup-epochs", epochs // 6, "--decay-epochs", 2 * epochs // 3, epochs, "--epochs", epochs]
    return [*TRAINING, "--lr", args.lr, "--weights", args.weights, *schedule]


def train_and_test(out: Path, variant: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Per cent of each mode and metric, and the seconds that it took; leaves the log and the test images'
    features, and no checkpoint."""
    start = time.perf_counter()
    name = re.sub(r"\W+", "-", variant).strip("-") + f"_seed{seed}"
    data, last, report = out / f"sysu_seed{seed}", out / "save_model" / f"{name}_last.t", out / f"{name}.json"
    machine = machine_flags(args)
    own = (*(("--epochs", 1) if args.quick else ()), *VARIANTS[variant].split())
    run(
        "train.py", "--data-path", data, *SIZE, *training_flags(args), *own, "--seed", seed, *machine,
        "--name", name, "--model-path", last.parent, "--log-path", out / "log", "--resume", "auto",
        quiet=True,
    )  # fmt: skip
    run(
        "test.py", "--resume", last, "--data-path", data, "--mode", *MODES, *machine, "--json", report,
        "--save-features", report.with_suffix(".npz"), quiet=True,
    )  # fmt: skip
    means = {row["mode"]: row["mean"] for row in json.loads(report.read_text())["results"]}
    found = {f"{m} rank-1": 100 * means[m]["cmc"][0] for m in MODES}
    found |= {f"{m} mAP": 100 * means[m]["mAP"] for m in MODES}
    last.unlink()  # 45 of them are several GB
    return found | {"seconds": time.perf_counter() - start}


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation of the runs."""
    if not values:
        return "not measured"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else " (one run)"
    return f"{statistics.mean(values):{sign}.1f}{deviation}"


def table(runs: dict[str, dict[str, dict[str, float]]], first: int | None = None) -> str:
    """The first variants' results in Markdown: metrics, and the runs' differences from the full method's."""
    columns = [f"{mode} {metric}" for mode in MODES for metric in METRICS]
    heads = ["variant", "runs", *columns, *(f"Δ {mode} mAP" for mode in MODES)]
    lines = [heads, ["---", *(["--:"] * (len(heads) - 1))]]
    full = runs.get(FULL, {})
    for variant in [v for k, v in enumerate(VARIANTS) if first is None or k < first or v in runs]:
        own = runs.get(variant, {})
        cells = [spread([found[column] for found in own.values()]) for column in columns]
        for mode in MODES:
            pairs = [found[f"{mode} mAP"] - full[k][f"{mode} mAP"] for k, found in own.items() if k in full]
            cells.append("" if variant == FULL else spread(pairs, "+"))
        lines.append([variant, str(len(own)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(path: Path, text: str) -> None:
    """Put the table between the marks in a file; UserError if they are not there."""
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise UserError(f"--table {path}: no file with one {BEGIN} and one {END}") from error
    with whole_file(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(args: argparse.Namespace) -> None:
    """Do the runs that are missing, the most telling variants first, and write and print the table."""
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    training = list(map(str, training_flags(args)))
    settings = {"quick": args.quick, "amp": args.amp, "training": training, "people": list(PEOPLE)}
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        raise UserError(f"{path} has runs of other settings: choose another --output")
    runs, seeds = results["runs"], [str(seed) for seed in range(args.seeds)]
    missing = [
        (v, seed) for v in list(VARIANTS)[: args.first] for seed in seeds if seed not in runs.get(v, {})
    ]
    for seed in dict.fromkeys(seed for _, seed in missing):
        draw_data(out / f"sysu_seed{seed}", seed, args.quick, args.workers)
    for k, (variant, seed) in enumerate(missing):
        found = train_and_test(out, variant, seed, args)
        runs.setdefault(variant, {})[seed] = found
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
        mean = statistics.mean(own["seconds"] for done in runs.values() for own in done.values())
        left = (len(missing) - k - 1) * mean / 60
        print(
            f"{variant}, seed {seed}: all mAP {found['all mAP']:.1f}, {found['seconds']:.0f} s; "
            f"about {left:.0f} min left", flush=True,
        )  # fmt: skip
        if args.table:  # after every run: whenever it is stopped, the table is there
            write_table(Path(args.table), table(runs, args.first))
    print(table(runs, args.first))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
