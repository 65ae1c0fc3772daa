"""A run's settings: the dataset's defaults, replaced by the checkpoint's, replaced by the command line's."""

import argparse
import os
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from augmentation import PAD
from checkpoints import STATE, load_checkpoint, saved_settings
from data_manager import DATASETS
from engine.files import MAY_CHANGE, Run, run_name
from evaluation.protocols import mode_name
from loss import BASELINE_WEIGHTS, LOSSES, MARGIN, PROXIES, WEIGHTS
from model import ARCHS, STEMS
from utils import Parser, UserError, at_least, data_flags, device_flags, positive, seed_number


def get_args_parser() -> Parser:
    """The command line of train.py; defaults that depend on the dataset are in dataset_defaults."""
    words, parents = "Train memory-based contrastive embedding.", [data_flags(), device_flags()]
    parser = Parser(prog="train.py", description=words, parents=parents)
    add = parser.add_argument_group("dataset").add_argument
    add("--dataset", choices=DATASETS, default="sysu", help="the dataset to train on")
    add("--array-path", metavar="DIR", help="folder of the training arrays (default: the dataset's)")
    add(
        "--pixel-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="values that become grey 0 and 255 in images of more than eight bits (default: found from the "
        "training images)",
    )  # fmt: skip
    add(
        "--test-identities", type=at_least(1), metavar="N",
        help="draw N test identities, once, of own images without a split",
    )  # fmt: skip
    add("--trial", type=trial, metavar="N", help="RegDB's split, 1 to 10, or all in turn (default: 1)")
    add(
        "--cache", choices=("auto", "device", "host", "disk"), default="auto",
        help="where the training images are kept; auto: the GPU if they fit in a third of its free memory, "
        "else memory-mapped from disk",
    )  # fmt: skip
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHS, default="resnet50", help="the network's trunk")
    add(
        "--stem", choices=STEMS, default="two-stream",
        help="two-stream: a first convolution per modality; shared: one for all, as in the released code",
    )  # fmt: skip
    add(
        "--weights", default="imagenet", metavar="imagenet|none|FILE",
        help="initial weights; FILE: a state dict of torchvision or a checkpoint to fine-tune",
    )  # fmt: skip
    add = parser.add_argument_group("training").add_argument
    add(
        "--epochs", type=at_least(0), default=160, metavar="N",
        help="number of epochs; 0: evaluate and save the untrained network",
    )  # fmt: skip
    add("--lr", type=positive, default=3.5e-4, metavar="RATE", help="the learning rate after the warm-up")
    add(
        "--warmup-epochs", type=at_least(1), default=10, metavar="N",
        help="epochs over which the rate rises to --lr",
    )  # fmt: skip
    add(
        "--decay-epochs", type=at_least(0), nargs=2, metavar="N",
        help="the rate falls tenfold after the first and again from the second on, epochs counted from 0 "
        "(default: 20 40, RegDB 30 60)",
    )  # fmt: skip
    add(
        "--batch-size", type=at_least(1), default=8, metavar="IDENTITIES",
        help="identities that a batch of each process holds",
    )  # fmt: skip
    add(
        "--num-pos", type=at_least(1), metavar="IMAGES",
        help="images that a batch holds of each identity and modality (default: 4, RegDB 5)",
    )  # fmt: skip
    add(
        "--pad", type=at_least(0), default=PAD, metavar="PIXELS",
        help="border that is padded before random cropping; less for smaller images",
    )  # fmt: skip
    add("--seed", type=seed_number, default=0, metavar="N", help="seed of everything that is drawn")
    add("--deterministic", action="store_true", help="use only algorithms that repeat exactly, on a GPU too")
    add("--compile", action="store_true", help="torch.compile the network: a slow start, no gain on a CPU")
    add_method_flags(parser)
    add = parser.add_argument_group("evaluation during training").add_argument
    add(
        "--mode", type=mode_name, metavar="MODE",
        help="what is searched where: all or indoor (default: all); RegDB and LLCM: visible-to-infrared or "
        "infrared-to-visible (default: visible-to-infrared)",
    )  # fmt: skip
    add(
        "--select", choices=("test", "val", "last"), default="test",
        help="choose _best.t on the test split, as the literature does; on the val ids, which are then not "
        "trained on (sysu); or not at all",
    )  # fmt: skip
    add("--eval-start", type=at_least(0), default=10, metavar="N", help="evaluate only after epoch N")
    add("--eval-every", type=at_least(1), default=2, metavar="N", help="evaluate every N epochs")
    add = parser.add_argument_group("outputs and resuming").add_argument
    add("--name", help="name of the run (default: one made of its settings)")
    add("--model-path", default="save_model", metavar="DIR", help="folder to write checkpoints to")
    add("--log-path", default="log", metavar="DIR", help="folder to write logs and TensorBoard's events to")
    add("--resume", metavar="FILE|auto", help="continue a run; auto: the one of these settings")
    add("--overwrite", action="store_true", help="replace the run of these settings")
    add(
        "--check", action="store_true",
        help="try data, one step, one evaluation batch and the outputs, and report what was found",
    )  # fmt: skip
    return parser


def add_method_flags(parser: Parser) -> None:
    """Add the flags that choose a variant of the method: docs/method.md, sections 5 and 6."""
    add = parser.add_argument_group("method").add_argument
    add(
        "--loss", choices=LOSSES, default="mce",
        help="the others are baselines without a memory: cross-entropy and a triplet loss",
    )  # fmt: skip
    mce, baseline = (
        ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        for weights in (WEIGHTS, BASELINE_WEIGHTS)
    )
    add(
        "--loss-weights", type=term_weight, nargs="+", metavar="TERM=WEIGHT",
        help=f"change the weights of some terms (default: {mce}; of the baselines: {baseline})",
    )  # fmt: skip
    add("--temperature", type=positive, default=0.05, help="what the memory's logits are divided by")
    add("--momentum", type=fraction, default=0.25, help="weight of a modality's old proxy")
    add("--shared-momentum", type=fraction, default=0.1, help="weight of the old shared proxy")
    add(
        "--update", choices=("hard", "mean"), default="hard",
        help="what updates a shared proxy: its identity's least similar feature, or the mean",
    )  # fmt: skip
    add("--proxies", choices=PROXIES, default="historical", help="what the align term compares with")
    add("--margin", type=positive, default=MARGIN, help="margin of the terms center and hard triplet")
    add("--no-aux", action="store_true", help="make no aux images: two modalities, three memories")


def term_weight(text: str) -> str:
    """An argparse type: TERM=WEIGHT with a weight of at least 0."""
    name, _, weight = text.partition("=")
    if name not in WEIGHTS | BASELINE_WEIGHTS or not 0 <= float(weight or "nan") < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text} is not TERM=WEIGHT with a weight of at least 0; "
            f"the terms are {', '.join(WEIGHTS | BASELINE_WEIGHTS)}"
        )
    return text


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def loss_weights(args: argparse.Namespace) -> dict[str, float]:
    """The weight of each term of the run's loss."""
    weights = dict(WEIGHTS if args.loss == "mce" else BASELINE_WEIGHTS)
    for name, _, weight in (words.partition("=") for words in args.loss_weights or ()):
        if name not in weights:
            raise UserError(
                f"--loss-weights: --loss {args.loss} has no term {name}, only {', '.join(weights)}"
            )
        weights[name] = float(weight)
    return weights


def trial(text: str) -> str:
    """An argparse type: "1" to "10", or "all"."""
    if text not in ("all", *map(str, DATASETS["regdb"].trials)):
        raise argparse.ArgumentTypeError(f"{text} is not a trial of RegDB: 1 to 10, or all")
    return text


def dataset_defaults(name: str) -> dict[str, object]:
    """The defaults of the flags that depend on the dataset."""
    facts = DATASETS[name]
    return {
        "img_h": facts.height,
        "img_w": facts.width,
        "num_pos": facts.num_pos,
        "decay_epochs": list(facts.decay_epochs),
        "mode": facts.modes[0],
        "trial": "1" if name == "regdb" else None,
    }


def typed_settings(command: Sequence[str]) -> dict[str, object]:
    """The settings that the words of a command line set, and the words themselves, as `command`."""
    parser, absent = get_args_parser(), object()
    # argparse gives a default only to what the namespace does not have yet.
    nothing = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), absent))
    typed = vars(parser.parse_args(command, nothing))
    return {key: value for key, value in typed.items() if value is not absent} | {"command": list(command)}


def parse_args(command: Sequence[str]) -> argparse.Namespace:
    """The settings of a new run. Raises UserError: see settings_of."""
    return settings_of(typed_settings(command))


def settings_of(
    typed: Mapping[str, object],
    saved: Mapping[str, object] | None = None,
    path: str | os.PathLike | None = None,
    world_size: int = 1,
) -> argparse.Namespace:
    """The settings of a run: defaults, replaced by the dataset's, a checkpoint's, and those that were typed.

    Args:
        typed: see typed_settings.
        saved: settings of the run to resume, see settings_to_resume.
        path: the checkpoint that holds them, for messages.
        world_size: processes that share a batch; a run's name does not depend on how many they are.

    Raises:
        UserError: settings that do not fit together, or that contradict the run to resume.
    """
    saved = saved or {}
    for key in saved.keys() & typed.keys() - MAY_CHANGE:
        if typed[key] != saved[key]:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {typed[key]} contradicts {path}, whose run has {saved[key]}")
    defaults = vars(get_args_parser().parse_args([]))
    dataset = (defaults | saved | typed)["dataset"]
    defaults |= dataset_defaults(dataset)
    args = argparse.Namespace(**defaults | saved | typed)
    refuse_contradictions(args, defaults)
    if args.name is None:
        args.name = run_name(vars(args) | {"batch_size": args.batch_size * world_size}, defaults)
    return args


def refuse_contradictions(args: argparse.Namespace, defaults: Mapping[str, object]) -> None:
    """Raise UserError for settings that do not fit together."""
    facts = DATASETS[args.dataset]
    if args.mode not in facts.modes:
        raise UserError(f"--mode {args.mode}: {facts.title} has only {', '.join(facts.modes)}")
    if args.decay_epochs[0] > args.decay_epochs[1]:
        raise UserError(f"--decay-epochs: {args.decay_epochs[1]} comes before {args.decay_epochs[0]}")
    if args.trial is not None and args.dataset != "regdb":
        raise UserError(f"--trial: {facts.title} has one training split; only RegDB has ten")
    if args.test_identities is not None and args.dataset != "folder":
        raise UserError(f"--test-identities: {facts.title} already has a split")
    if args.select == "val" and args.dataset != "sysu":
        raise UserError("--select val: only SYSU-MM01 has val ids")
    loss_weights(args)
    if args.loss != "mce":
        for key in ("temperature", "momentum", "shared_momentum", "update", "proxies"):
            if vars(args)[key] != defaults[key]:
                raise UserError(f"--{key.replace('_', '-')}: --loss {args.loss} has no memory")
    if args.loss == "weighted-triplet" and args.margin != defaults["margin"]:
        raise UserError("--margin: --loss weighted-triplet has none")


def settings_to_resume(checkpoint: dict, path: str | os.PathLike) -> dict[str, object]:
    """The settings of the run to resume, checked as if they came from a command line.

    Raises:
        UserError: a setting that the command line would refuse; the message names path.
    """
    settings, parser, words = saved_settings(checkpoint, path), get_args_parser(), []
    known = settings.keys() & vars(parser.parse_args([])).keys()
    for key in sorted(known):
        flag, value = "--" + key.replace("_", "-"), settings[key]
        if isinstance(value, list):
            words += [flag, *map(plain_number, value)]
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    try:
        checked = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{path}: invalid settings: {error}") from error
    return {key: checked[key] for key in known}


def plain_number(value: object) -> str:
    """A value as a word of a command line; argparse takes -1e-05 for a flag, -0.00001 for a number."""
    return format(Decimal(repr(value)), "f") if isinstance(value, float) else str(value)


def open_run(typed: Mapping[str, object], world_size: int = 1) -> tuple[argparse.Namespace, Run, dict | None]:
    """Find the run of a command line: its settings, its files and its checkpoint (None: start from scratch).

    --resume FILE resumes the run of that checkpoint, in its folder. --resume auto resumes the run with these
    settings, if it has a checkpoint. The batch of a resumed run stays what it was in all, however many
    processes share it now.

    Args:
        typed: see typed_settings.
        world_size: processes that share a batch.

    Raises:
        UserError: see settings_of; or a checkpoint that cannot be resumed.
    """

    def run_of(args: argparse.Namespace) -> Run:
        return Run(args.name, args.dataset, args.model_path, args.log_path, args.trial)

    resume = typed.get("resume")
    if resume and "overwrite" in typed:
        raise UserError("--resume continues a run, --overwrite replaces it: give only one of them")
    if resume in (None, "auto"):
        args = settings_of(typed, world_size=world_size)
        path = run_of(args).last
        if resume is None or not path.exists():
            return args, run_of(args), None
        places = {"model_path": args.model_path, "log_path": args.log_path}
    else:
        path = Path(resume)
        places = {"model_path": str(path.parent)}
    checkpoint = load_checkpoint(path)
    saved = settings_to_resume(checkpoint, path)
    state = checkpoint.keys() >= STATE and {type(checkpoint[key]) for key in ("epoch", "world_size")} == {int}
    if not state or not saved.keys() >= {"batch_size", "dataset", "name"}:
        raise UserError(f"--resume {path}: no training state in this file: resume from a run's _last.t")
    identities = saved["batch_size"] * checkpoint["world_size"]
    if identities % world_size:
        raise UserError(
            f"--resume {path}: the run has {identities} identities in a batch, which {world_size} processes "
            "cannot share"
        )
    saved["batch_size"] = identities // world_size
    args = settings_of(typed, saved | places, path, world_size)
    return args, run_of(args), checkpoint
