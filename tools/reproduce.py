"""The paper's table from one command: check, preprocess, train and test whatever datasets are there:

    python -m tools.reproduce --data-path data --dry-run
    python -m tools.reproduce --data-path data --seeds 3 --gpu 0

DATA has a folder for each dataset: sysu, regdb, llcm. Writes RESULTS.md, and after every command again. Stop
it when you like: the same command does what is missing. Flags that it does not know are train.py's.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_loader import IdentitySampler
from data_manager import DATASETS, Samples, class_labels, train_samples
from engine.settings import parse_args
from model import STEMS
from reporting.paper import markdown, tables
from tools.commands import machine_flags, run, words_of
from utils import Parser, UserError, at_least, device_flags, log_to_terminal, run_script, whole_file

PUBLIC = ("sysu", "regdb", "llcm")


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tools.reproduce",
        description="Check, preprocess, train and test whatever datasets are there, and write the paper's "
        "table. Flags that are not listed are train.py's.",
        parents=[device_flags()],
    )
    add = parser.add_argument
    add("--data-path", required=True, metavar="DATA", help=f"the folder that has {', '.join(PUBLIC)}")
    add("--output", default="reproduce", metavar="DIR", help="folder to write everything to")
    add(
        "--seeds", type=at_least(1), default=1, metavar="N",
        help="how many models to train of each setting, seeds 0 to N-1",
    )  # fmt: skip
    add(
        "--stem", choices=STEMS, nargs="+", default=["shared"],
        help="shared: the paper's numbers are of it; two-stream: rows of their own (default: shared)",
    )  # fmt: skip
    add("--incomplete", action="store_true", help="go on with a dataset that tools.check calls incomplete")
    dry_run = "print what is missing, with an estimate from a few timed steps"
    add("--dry-run", action="store_true", help=dry_run)
    return parser


def plan(args: argparse.Namespace, extra: list[str]) -> dict[str, tuple[object, ...]]:
    """The commands, by name, in their order; UserError if DATA has no dataset or extra has a wrong flag."""
    out, machine, commands = Path(args.output), machine_flags(args), {}
    for dataset in PUBLIC:
        root = Path(args.data_path, dataset)
        if not root.is_dir():
            continue
        settings = parse_args(["--dataset", dataset, *extra])
        commands[f"{dataset}_check"] = ("-m tools.check", "--dataset", dataset, "--data-path", root)
        if dataset == "sysu":
            size = ("--img-h", settings.img_h, "--img-w", settings.img_w)
            size += ("--output", settings.array_path) if settings.array_path else ()
            size += ("--pixel-range", *settings.pixel_range) if settings.pixel_range else ()
            commands["sysu_preprocess"] = ("pre_process_sysu.py", "--data-path", root, *size)
        trials, suffix = (("--trial", "all"), "_trial_{trial}") if dataset == "regdb" else ((), "")
        for stem, seed in itertools.product(args.stem, range(args.seeds)):
            name = f"{dataset}_{stem}_seed{seed}"
            commands[f"{name}_train"] = (
                "train.py", *extra, "--dataset", dataset, "--data-path", root, *trials, "--stem", stem,
                "--seed", seed, *machine, "--name", name, "--model-path", out / "save_model",
                "--log-path", out / "log", "--resume", "auto",
            )  # fmt: skip
            best = out / "save_model" / f"{name}{suffix}_best.t"
            test = ("test.py", "--resume", best, "--data-path", root, *machine)
            test += ("--allow-short",) if args.incomplete else ()
            protocols = {"": ()}
            if dataset == "sysu":
                both = ("--mode", "all", "indoor", "--shot", 1, 10, "--galleries")
                protocols = {"_seeded": (*both, "seeded")}
                if (root / "exp" / "rand_perm_cam.mat").exists():
                    protocols["_published"] = (*both, "published")
            for which, words in protocols.items():
                report = out / f"{name}{which}_test.json"
                commands[f"{name}{which}_test"] = (*test, *words, "--json", report)
    if not commands:
        raise UserError(f"--data-path {args.data_path}: none of the folders {', '.join(PUBLIC)} is there")
    return commands


def do(name: str, command: tuple[object, ...], args: argparse.Namespace, done: dict[str, dict]) -> None:
    """Run a command of the plan and note it in done; of one that is stopped, the time that it took so far."""
    start = time.perf_counter()
    before = done.get(name, {})
    done[name] = {"seconds": 0.0 if "command" in before else before.get("seconds", 0.0)}
    try:
        status, _ = run(*command, accepted=(0, 1) if name.endswith("_check") else (0,))
        if status and not args.incomplete:
            raise UserError(f"{command[4]} is not complete, see above: --incomplete goes on all the same")
        done[name] |= {"command": words_of(*command), "status": status}
    finally:
        done[name]["seconds"] += time.perf_counter() - start
        with whole_file(Path(args.output, "done.json")) as temporary:
            temporary.write_text(json.dumps(done, indent=1), encoding="utf-8")


def estimate(missing: dict[str, tuple[object, ...]], extra: list[str], args: argparse.Namespace) -> None:
    """Print what the missing trainings will take, from two tiny epochs on synthetic images of their size."""
    hours = size = 0.0
    eight_bits = list(extra)  # as synthetic images have
    for k in [k for k, word in enumerate(extra) if word.replace("_", "-") == "--pixel-range"]:
        del eight_bits[k : k + 3]
    for dataset in PUBLIC:
        runs = [name for name in missing if name.startswith(f"{dataset}_") and name.endswith("_train")]
        if not runs:
            continue
        splits = 10 if dataset == "regdb" else 1
        settings = parse_args(["--dataset", dataset, *extra])
        samples = train_samples(dataset, Path(args.data_path, dataset), 1 if dataset == "regdb" else None)
        images = embedded(samples)
        sampler = IdentitySampler(class_labels(samples), settings.batch_size, settings.num_pos, 0)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, dataset)
            people = ("--identities", 2 * settings.batch_size, "--test-identities", 2, "--images", 1)
            run("-m synthetic", "--dataset", dataset, "--data-path", root, *people, quiet=True)
            if dataset == "sysu":
                shape = ("--img-h", settings.img_h, "--img-w", settings.img_w)
                run("pre_process_sysu.py", "--data-path", root, *shape, quiet=True)
            run(
                "train.py", *eight_bits, "--dataset", dataset, "--stem", args.stem[0], *machine_flags(args),
                "--data-path", root, "--array-path", root, "--model-path", folder, "--log-path", folder,
                "--epochs", 2, "--weights", "none", "--name", "timing", "--overwrite", quiet=True,
            )  # fmt: skip
            [history] = Path(folder).glob("*_log/timing*.jsonl")
            record = json.loads(history.read_text().splitlines()[-1])  # the first steps are slower
            checkpoints = sum(path.stat().st_size for path in Path(folder).glob("timing*.t"))
            few = embedded(train_samples(dataset, root, 1 if dataset == "regdb" else None))
        step, image = record["seconds"]["steps"] / record["steps"], record["seconds"]["memory"] / few
        epoch = len(sampler) * step + images * image
        memory = ", ".join(
            f"memory of the {name}: at most {peak:.1f} GB" for name, peak in record["gigabytes"].items()
        )
        own = len(runs) * splits * settings.epochs * epoch / 3600
        arrays = (
            splits * sum(len(part.paths) for part in samples.values()) * settings.img_h * settings.img_w * 3
        )
        hours, size = hours + own, size + (arrays + len(runs) * splits * checkpoints) / 1e9
        print(
            f"{dataset}: {len(runs) * splits} trainings, {settings.epochs} epochs of {len(sampler)} steps of "
            f"{step:.2f} s: {own:.1f} h; {memory}"
        )
    print(
        "an estimate, from a few timed steps of each dataset on synthetic images, without evaluations: "
        f"{hours:.1f} hours, {size:.1f} GB of disk"
    )


def embedded(samples: Mapping[str, Samples]) -> int:
    """How many images the memory's reset embeds: visible ones twice, as they are and as aux images."""
    return 2 * len(samples["visible"].paths) + len(samples["infrared"].paths)


def write_results(out: Path, commands: Iterable[str], done: dict[str, dict], stems: list[str]) -> None:
    """RESULTS.md: the tables, and what they were made with."""
    parts = ["# Results", f"Made by `{shlex.join(['python', '-m', 'tools.reproduce', *sys.argv[1:]])}`."]
    for dataset in PUBLIC:
        if f"{dataset}_check" not in commands:
            continue
        state = {0: "complete", 1: "**not complete**"}.get(done.get(f"{dataset}_check", {}).get("status"))
        parts += [f"## {DATASETS[dataset].title}", f"tools.check: {state}."]
        for stem in stems:
            tests = [n for n in commands if n.startswith(f"{dataset}_{stem}_") and n.endswith("_test")]
            parts += tables([out / f"{name}.json" for name in tests], stem)
    lines = {f"{platform.platform()}, {os.cpu_count()} cores"}
    for path in out.glob("log/*/*.jsonl"):
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            lines |= {f"{name}: {record['made_with'][name]}" for name in ("versions", "device")}
    parts += ["## Made with", "\n".join(f"- {line}" for line in sorted(lines))]
    hours = [(name, f"{own['seconds'] / 3600:.2f}") for name, own in done.items()]
    total = sum(own["seconds"] for own in done.values()) / 3600
    parts += [f"## Time: {total:.2f} hours", markdown([("command", "hours"), *hours])]
    with whole_file(out / "RESULTS.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(command: tuple[argparse.Namespace, list[str]]) -> None:
    """Do what is missing, in order, and write RESULTS.md after every command."""
    args, extra = command
    log_to_terminal(stream=sys.stderr)
    out = Path(args.output)
    path = out / "done.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    commands = plan(args, extra)
    missing = {
        n: words for n, words in commands.items() if done.get(n, {}).get("command") != words_of(*words)
    }
    if args.dry_run:
        for words in missing.values():
            print(shlex.join(words_of(*words)))
        estimate(missing, extra, args)
        return
    for name, words in missing.items():
        do(name, words, args, done)
        write_results(out, commands, done, args.stem)
    print(f"all done: {out / 'RESULTS.md'}")


if __name__ == "__main__":
    run_script(main, lambda: get_args_parser().parse_known_args())
