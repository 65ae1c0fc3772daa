"""Draw a synthetic dataset:

python -m synthetic --dataset sysu --data-path data/sysu-synthetic --contact-sheet people.png
"""

import argparse
import os

from synthetic import PLANS, SIZES, contact_sheet, draw_dataset
from utils import Parser, at_least, run_script, seed_number


def get_args_parser() -> Parser:
    """The command line of this script."""
    parser = Parser(
        prog="python -m synthetic",
        description="Draw a synthetic dataset of people in the layout of SYSU-MM01, RegDB, LLCM or own data.",
    )
    train, test, images = (
        ", ".join(f"{name} {size}" for name, size in zip(SIZES, column, strict=True))
        for column in zip(*SIZES.values(), strict=True)
    )
    some, one = at_least(2), at_least(1)
    add = parser.add_argument
    add("--dataset", choices=SIZES, required=True, help="the dataset whose layout is drawn")
    add("--data-path", required=True, metavar="DIR", help="folder to draw into, new or empty")
    add("--identities", type=some, metavar="N", help=f"identities to train on (default: {train})")
    add("--test-identities", type=some, metavar="N", help=f"identities to test on (default: {test})")
    add("--images", type=one, metavar="N", help=f"images of each identity and camera (default: {images})")
    add("--img-h", type=at_least(16), default=160, metavar="PIXELS", help="height of the images")
    add("--img-w", type=at_least(8), default=64, metavar="PIXELS", help="width of the images")
    add("--seed", type=seed_number, default=0, metavar="N", help="the same seed gives the same bytes")
    workers = {"type": at_least(0), "default": os.cpu_count() or 1, "metavar": "N"}
    add("--workers", **workers, help="processes that draw images")
    add("--contact-sheet", metavar="FILE.png", help="also write a picture of some identities")
    return parser


def main(args: argparse.Namespace) -> None:
    """Draw the dataset of a command line and print what was drawn."""
    given = (args.identities, args.test_identities, args.images)
    sizes = [
        default if value is None else value for value, default in zip(given, SIZES[args.dataset], strict=True)
    ]
    plan = PLANS[args.dataset](*sizes, args.seed)
    draw_dataset(plan, args.data_path, args.seed, args.img_h, args.img_w, args.workers)
    people = f"{sizes[0]} training and {sizes[1]} test identities"
    if args.dataset == "folder":
        people = (
            f"{sizes[0] + sizes[1]} identities, which --test-identities {sizes[1]} of train.py will split"
        )
    print(f"{args.data_path}: {len(plan.photos)} images of {people}")
    if args.contact_sheet:
        contact_sheet(plan, args.data_path, args.contact_sheet)
        print(f"{args.contact_sheet}: a contact sheet")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
