"""Words of configs and command lines: one of several, true or false, a number."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from monai_morse.errors import InputError

__all__ = ["check_choice", "lookup", "parse_bool", "parse_number", "typed_arguments"]

F = TypeVar("F", bound=Callable[..., Any])  # a function or a class


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


def parse_number(value: Any, name: str = "value", kind: type = float, within: str = "(-inf, inf)", exact: bool = False) -> Any:
    """A number from a config or a command line, where it may arrive as a string.

    Args:
        value: a number, or one written out.
        name: what it is, for the error.
        kind: ``int``, a whole number, or ``float`` (default).
        within: the interval that it must lie in, in mathematics' notation; default: any finite number.
        exact: take no number written out, and no 2.0 for a whole number; default False.

    Raises:
        InputError: for anything else, naming the interval and the value.

    >>> parse_number("3", kind=int), parse_number(1e-3, within="(0, inf)")
    (3, 0.001)
    >>> parse_number(1, "alpha", within="[0, 1)")
    Traceback (most recent call last):
    monai_morse.errors.InputError: alpha must be a number in [0, 1), got 1
    """
    low, high = (float(end) for end in within[1:-1].split(","))
    other_kind = exact and not isinstance(value, numbers.Integral if kind is int else numbers.Real)
    try:
        number = math.nan if isinstance(value, bool) or other_kind else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    above = low < number or (within[0] == "[" and low == number)
    below = number < high or (within[-1] == "]" and number == high)
    if not (above and below and (kind is float or number.is_integer())):
        where = f" in {within}" if within != "(-inf, inf)" else ""
        raise InputError(f"{name} must be a {'whole ' if kind is int else ''}number{where}, got {value!r}")
    return int(value) if kind is int and str(value).isdigit() else kind(number)  # digits: also beyond float's precision


def typed_arguments(function: F) -> F:
    """Let a function, an ``__init__`` or a dataclass take a command line's words: MONAI hands on ``--amp false`` as a string.

    An argument annotated as ``bool``, ``int`` or ``float``, alone or beside ``None`` or a sequence of numbers, becomes what its
    word means in YAML, or an :class:`InputError` that names it. One that may be a ``str`` too is left as it is.

    >>> @typed_arguments
    ... def crop(sides: int | Sequence[int], pad: bool = False, limit: float | None = None):
    ...     return sides, pad, limit
    >>> crop("3", "false", "null"), crop(["3", 4], limit="1e-3")
    ((3, False, None), ([3, 4], False, 0.001))
    >>> crop(3, pad="maybe")
    Traceback (most recent call last):
    monai_morse.errors.InputError: crop: pad must be true or false, got 'maybe'
    """
    if inspect.isclass(function):
        function.__init__ = typed_arguments(function.__init__)  # type: ignore[method-assign]
        return function
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def with_types(*args: Any, **kwargs: Any) -> Any:
        hints = _hints(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own words for it
        for name, value in bound.arguments.items():
            bound.arguments[name] = _typed(value, hints.get(name), f"{owner}: {name}")
        return function(*bound.args, **bound.kwargs)

    return typing.cast(F, with_types)


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """A value as its annotation wants it; as it is where that names no truth or number."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if type(None) in kinds and (value is None or isinstance(value, str) and value.lower() in ("null", "~")):
        return None
    if str in kinds:
        return value
    if bool in kinds:
        return parse_bool(value, name)
    if isinstance(value, (list, tuple)):
        items = [typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is Sequence]
        return [_number(v, name, items[0]) for v in value] if items and items[0] in (int, float) else value
    of_number = [k for k in (float, int) if k in kinds]
    return _number(value, name, of_number[0]) if of_number else value


def _number(value: Any, name: str, kind: type) -> Any:
    number = parse_number(value, name, kind)
    return value if kind is float and isinstance(value, int) else number  # 1 is a float to Python too
