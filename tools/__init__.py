"""Commands that the paper does not have: `python -m tools.NAME --help`."""
