"""Words of configs and command lines: one of several, true or false."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from monai_morse.errors import InputError

__all__ = ["check_choice", "lookup", "parse_bool"]


def check_choice(name: str, word: str, words: Iterable[str]) -> None:
    """See that the word given for ``name`` is one of those known.

    >>> check_choice("experts", "sparse", ("none", "dense"))
    Traceback (most recent call last):
    monai_morse.errors.InputError: experts must be one of ('none', 'dense'), got 'sparse'
    """
    if word not in words:
        raise InputError(f"{name} must be one of {tuple(words)}, got {word!r}")


def lookup(name: str, word: str, table: Mapping[str, Any]) -> Any:
    """The entry of ``table`` that ``word``, given for ``name``, names; see :func:`check_choice`."""
    check_choice(name, word, table)
    return table[word]


def parse_bool(value: bool | str, name: str = "value") -> bool:
    """A yes or no from a config or a command line, where ``--resume true`` arrives as a string.

    Raises:
        InputError: for anything but true and false.

    >>> parse_bool(True), parse_bool("false")
    (True, False)
    """
    words = {"true": True, "false": False}
    if str(value).lower() not in words:
        raise InputError(f"{name} must be true or false, got {value!r}")
    return words[str(value).lower()]
