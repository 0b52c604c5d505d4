"""Arguments, and what is said of those that do not fit."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hpctrain.cli.help import PROGRAM, USAGE
from hpctrain.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse in our voice: mistakes are UsageErrors, and options are never guessed."""

    def __init__(self, **options: Any) -> None:
        ours = {"prog": PROGRAM, "add_help": False, "allow_abbrev": False}
        super().__init__(**{**ours, **options})

    def error(self, message: str) -> NoReturn:
        raise usage_error(message, USAGE if self.prog == PROGRAM else self.format_usage())


def usage_error(message: str, usage: str = USAGE) -> UsageError:
    """Return the failure of a command line that does not fit."""
    # Every rank was given the same words.
    return UsageError(f"{message}\n{usage}", everywhere=True)


def number(text: str) -> int:
    """Return a number from 0 on; a type for arguments."""
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return found


def count(text: str) -> int:
    """Return a number from 1 on; a type for arguments."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
