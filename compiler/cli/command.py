"""What a verb is made of, and the arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from .console import Console

__all__ = [
    "Command",
    "add_model_arguments",
    "add_optimizer_arguments",
    "positive_float",
    "positive_int",
    "seed",
]

DTYPES = ("float64", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, slots=True)
class Command:
    """One verb.

    Args:
        name: the verb.
        summary: one line for the list of verbs.
        examples: command lines shown under its help.
        configure: adds its arguments to a parser.
        run: does it; raises CutsetError on failure.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], None]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How the factory's model is made: seed and element type."""
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the model's values and of dropout"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="convert the model and its float inputs (default: as made)"
    )


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Which optimizer trains, or is planned for."""
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="default: what the factory gives, else adamw; sgd has momentum 0.9",
    )
    parser.add_argument(
        "--lr", type=positive_float, metavar="RATE", help="learning rate (default: 0.001)"
    )


def seed(text: str) -> int:
    """An argument that torch takes as a seed: an integer of 64 bits."""
    number = int(text)
    if not -(1 << 63) <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of 64 bits")
    return number


def positive_int(text: str) -> int:
    """An argument that is an integer above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number


def positive_float(text: str) -> float:
    """An argument that is a finite number above zero."""
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return number
