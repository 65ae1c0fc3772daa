"""The command line of train.py."""

import argparse
import os

from augmentation import PAD
from data_manager import DATASETS
from loss import PROXIES
from model import ARCHS, STEMS
from utils import Parser, UserError, at_least, data_flags, device_flags, positive, seed_number, typed_flags


def training_parser() -> Parser:
    """The command line; what depends on the dataset has its default from DATASETS."""
    parser = Parser(
        description="Train memory-based contrastive embedding. Defaults stand in brackets.",
        parents=[data_flags(), device_flags()],
    )
    data = next(group for group in parser._action_groups if group.title == "data")
    data.add_argument("--dataset", choices=DATASETS, default="sysu", help="which dataset (sysu)")
    data.add_argument("--array-path", metavar="DIR", help="training arrays (the dataset's folder)")
    data.add_argument("--trial", metavar="N", default="1", help="RegDB's split, 1 to 10, or all in turn (1)")
    data.add_argument(
        "--cache", choices=("auto", "device", "host", "disk"), default="auto",
        help="where the training pixels live; auto: the GPU if they fit in a third of its free memory, "
        "else memory-mapped from disk (auto)",
    )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--arch", choices=ARCHS, default="resnet50", help="trunk (resnet50)")
    network.add_argument(
        "--stem", choices=STEMS, default="two-stream", help="shared: as in the released code (two-stream)"
    )
    network.add_argument(
        "--weights", default="imagenet", metavar="imagenet|none|FILE", help="where training starts (imagenet)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=at_least(0),
        default=160,
        metavar="N",
        help="epochs in all; 0: evaluate and save the untrained network (160)",
    )
    training.add_argument("--lr", type=positive, default=3.5e-4, metavar="RATE", help="base rate (0.00035)")
    training.add_argument(
        "--warmup-epochs", type=at_least(1), default=10, metavar="N",
        help="epochs over which the rate rises to its base (10)",
    )  # fmt: skip
    training.add_argument(
        "--decay-epochs", type=at_least(0), nargs=2, metavar="N",
        help="the rate falls tenfold after the first and again from the second on, epochs counted from 0 "
        "(20 40, RegDB 30 60)",
    )  # fmt: skip
    training.add_argument(
        "--batch-size", type=at_least(1), default=8, metavar="IDENTITIES",
        help="identities of a batch, per process (8)",
    )  # fmt: skip
    training.add_argument(
        "--num-pos", type=at_least(1), metavar="IMAGES",
        help="images of an identity and modality in a batch (4, RegDB 5)",
    )  # fmt: skip
    training.add_argument(
        "--pad", type=at_least(0), default=PAD, metavar="PIXELS",
        help=f"border that random crops reach into; less for images smaller than the paper's ({PAD})",
    )  # fmt: skip
    training.add_argument(
        "--proxies",
        choices=PROXIES,
        default="historical",
        help="what the align term compares with (historical)",
    )
    training.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of all randomness (0)")
    training.add_argument(
        "--deterministic", action="store_true", help="only algorithms that give the same again, on a GPU too"
    )
    training.add_argument(
        "--compile", action="store_true", help="torch.compile the network: a slow start, and on a CPU no gain"
    )
    evaluation = parser.add_argument_group("evaluation during training")
    evaluation.add_argument(
        "--mode",
        metavar="MODE",
        help="protocol: all or indoor (all); RegDB and LLCM: visible-to-infrared "
        "or infrared-to-visible (visible-to-infrared)",
    )
    evaluation.add_argument(
        "--select", choices=("test", "val", "last"), default="test",
        help="_best.t is chosen on the test split, as the literature does; on the val ids, which are then "
        "not trained on (sysu); or not at all (test)",
    )  # fmt: skip
    evaluation.add_argument(
        "--eval-start", type=at_least(0), default=10, metavar="N", help="after epoch N (10)"
    )
    evaluation.add_argument(
        "--eval-every", type=at_least(1), default=2, metavar="N", help="every N epochs (2)"
    )
    outputs = parser.add_argument_group("outputs and resuming")
    outputs.add_argument(
        "--model-path", default="save_model", metavar="DIR", help="folder of checkpoints (save_model)"
    )
    outputs.add_argument(
        "--log-path", default="log", metavar="DIR", help="folder of logs and of TensorBoard's events (log)"
    )
    outputs.add_argument(
        "--resume", metavar="FILE|auto", help="go on with a run; auto: the one of these settings"
    )
    outputs.add_argument("--overwrite", action="store_true", help="replace a run of these settings")
    outputs.add_argument(
        "--check",
        action="store_true",
        help="try data, one step, one evaluation batch and the outputs, and say what was found",
    )
    return parser


def dataset_defaults(name: str) -> dict[str, object]:
    """The flags' defaults that a dataset decides."""
    if name not in DATASETS:  # a checkpoint may say anything
        raise UserError(f"--dataset {name}: choose from {', '.join(DATASETS)}")
    facts = DATASETS[name]
    return {
        "img_h": facts.height,
        "img_w": facts.width,
        "num_pos": facts.num_pos,
        "decay_epochs": list(facts.decay_epochs),
        "mode": facts.modes[0],
    }


def parse_training_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings; also what was typed of them, `typed`, and the `defaults` of all flags."""
    parser = training_parser()
    typed = typed_flags(parser, argv)
    dataset = typed.get("dataset", "sysu")
    parser.set_defaults(**dataset_defaults(dataset))
    defaults = vars(parser.parse_args([]))
    modes = DATASETS[dataset].modes
    if "resume" not in typed and "mode" in typed and typed["mode"] not in modes:
        parser.error(f"argument --mode: {typed['mode']} is none of {', '.join(modes)}")
    first, second = typed.get("decay_epochs", (0, 0))
    if first > second:
        parser.error(f"argument --decay-epochs: {second} comes before {first}")
    return argparse.Namespace(
        **defaults | typed, typed=typed, defaults=defaults, dataset_defaults=dataset_defaults
    )


def checked_settings(saved: dict[str, object], path: str | os.PathLike) -> dict[str, object]:
    """The settings in a checkpoint; UserError naming path and the first that no command line can give."""
    for action in training_parser()._actions:
        value = saved.get(action.dest)
        if value is None:
            continue
        try:
            if isinstance(action.const, bool):
                good = isinstance(value, bool)
            else:
                words = value if action.nargs and isinstance(value, list) else [value]
                good = [(action.type or str)(str(word)) for word in words] == words
            good = good and (not action.choices or value in action.choices)
            good = good and (action.dest != "trial" or value.isdecimal())  # a run is of one
        except (ValueError, argparse.ArgumentTypeError):
            good = False
        if not good:
            raise UserError(f"{path} holds a setting that cannot be: {action.option_strings[0]} {value!r}")
    return saved


def saved_settings(checkpoint: dict, path: str | os.PathLike) -> dict[str, object]:
    """The settings that a checkpoint was trained with, {dest: value}; none for the released code's.

    Raises UserError naming path for a setting that no command line can give.
    """
    settings = checkpoint.get("args")
    return checked_settings(settings, path) if isinstance(settings, dict) else {}


def trials_of(args: argparse.Namespace) -> list[int]:
    """The trials that --trial asks for; datasets other than RegDB have one training split."""
    valid = list(DATASETS[args.dataset].trials)
    if args.dataset != "regdb":
        if "trial" in args.typed:
            raise UserError(
                f"--trial: {DATASETS[args.dataset].title} has one training split; only RegDB has ten"
            )
        return valid[:1]
    if args.trial == "all":
        return valid
    if args.trial not in map(str, valid):
        raise UserError(f"--trial {args.trial}: RegDB's trials are {valid[0]} to {valid[-1]}, or all")
    return [int(args.trial)]
