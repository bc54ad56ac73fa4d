"""The flags that choose whose energy an operation takes."""

from __future__ import annotations

import argparse


def add_silicon_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--node`` and ``--precision``, which ``ecoformer.cost.find_prices`` reads."""
    parser.add_argument(
        "--node", default="45nm", metavar="{45nm,7nm}", help="of the silicon (%(default)s)"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        metavar="{float32,float16,bfloat16,int8}",
        help="of all operations and values (%(default)s)",
    )
