"""What test.py and tools.report share of their command lines."""

import argparse

from data_manager import DATASETS
from evaluation.protocols import Protocol, mode_name
from reranking import RERANKING
from utils import Parser, UserError, data_flags, device_flags

RUNTIMES = ("torch", "onnx", "openvino")  # of the network, see runtimes.py


def evaluation_flags() -> Parser:
    """Flags of the commands that evaluate; what is not typed comes from checkpoints or the dataset."""
    size = "the checkpoint's, or the dataset's"
    parser = Parser(add_help=False, parents=[data_flags(size, size), device_flags(amp=None)])
    add = parser.add_argument_group("methods", "The others are compared with the first.").add_argument
    add(
        "--resume", nargs="+", default=[], metavar="FILE",
        help="checkpoints of this project, of the released code or of AGW; RegDB: of one trial, or with "
        "{trial} in the name; with {seed} in the name: all seeds of a method",
    )  # fmt: skip
    add(
        "--features", nargs="+", default=[], metavar="FILE",
        help="features of any network: what --save-features or --save-mat wrote, query_f and gallery_f in a "
        ".npz or .mat, or a .npy with --images; {trial} and {seed} as in --resume",
    )  # fmt: skip
    add("--images", metavar="LIST", help="text or CSV that has a path a line, in the order of FEATURES.npy")
    add("--distance", choices=("cosine", "euclidean"), default="cosine", help="how --features are compared")
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--dataset", choices=DATASETS, help="the dataset to evaluate on (default: the checkpoint's, or sysu)")
    add(
        "--mode", type=mode_name, nargs="+", metavar="MODE",
        help="what is searched where: all or indoor (default: all); RegDB and LLCM: visible-to-infrared or "
        "infrared-to-visible, or -thermal (default: both)",
    )  # fmt: skip
    add(
        "--shot", type=int, nargs="+", choices=(1, 10), default=[1],
        help="images that a gallery of sysu holds of each identity and camera (default: 1)",
    )  # fmt: skip
    add(
        "--galleries", choices=("seeded", "published"), default="seeded",
        help="sysu: drawn by random.Random(trial), or the dataset authors' exp/rand_perm_cam.mat",
    )  # fmt: skip
    add("--trial", metavar="N", help="one trial, or all (default: all; of a RegDB trial's model: its own)")
    add("--allow-short", action="store_true", help="accept galleries with fewer images than --shot")
    add(
        "--ignore-same-camera", action="store_true",
        help="own images: ignore gallery images of the query's identity and camera, and let CMC count "
        "identities, as LLCM does",
    )  # fmt: skip
    add("--rerank", nargs="+", choices=RERANKING, default=[], help="add rows with re-ranked galleries")
    add(
        "--model-path", default="save_model", metavar="DIR",
        help="second folder to look for checkpoints in",
    )  # fmt: skip
    return parser


def settings_of(
    parser: Parser, words: list[str], dataset: str, trial: str | None, saved: dict[str, object]
) -> argparse.Namespace:
    """The settings of an evaluation: the dataset's, replaced by a checkpoint's, replaced by typed ones.

    Args:
        parser: with evaluation_flags.
        words: the command line.
        dataset: that is evaluated on.
        trial: unless one is typed; None: all.
        saved: what the checkpoint was trained with.

    Raises:
        UserError: flags that do not fit each other.
    """
    facts = DATASETS[dataset]
    modes = ["all"] if dataset == "sysu" else list(facts.modes)
    parser.set_defaults(
        dataset=dataset, trial=trial or "all", mode=modes, img_h=facts.height, img_w=facts.width, amp="auto"
    )
    kept = {key: saved[key] for key in ("img_h", "img_w", "amp") if saved.get(key) is not None}
    parser.set_defaults(**kept)
    args = parser.parse_args(words)
    if args.ignore_same_camera and args.dataset != "folder":
        raise UserError(f"--ignore-same-camera is for own images; {facts.title} has its own rule")
    if args.distance != "cosine" and (args.rerank or not args.features):
        raise UserError("--distance euclidean is for --features, without --rerank, which takes unit features")
    return args


def protocols_of(args: argparse.Namespace) -> list[Protocol]:
    """The protocols that are asked for, each once."""
    return [
        Protocol(args.dataset, mode, shot, args.galleries, ignore_same_camera=args.ignore_same_camera)
        for mode in dict.fromkeys(args.mode) for shot in dict.fromkeys(args.shot)
    ]  # fmt: skip


def chosen_trials(args: argparse.Namespace) -> list[int]:
    """The trials of --trial: one, or all of the dataset."""
    facts = DATASETS[args.dataset]
    if args.trial in (None, "all"):
        return list(facts.trials)
    if args.trial not in map(str, facts.trials):
        first, last = facts.trials[0], facts.trials[-1]
        raise UserError(
            f"--trial {args.trial}: {facts.title} has the trials {first} to {last}; choose one, or all"
        )
    return [int(args.trial)]
