"""The words of a bundle's command line, asked before any work: each must be one that its configs have, and in its range."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import run

from monai_morse.config import check_choice, parse_bool, parse_number
from monai_morse.data.checks import limits_of
from monai_morse.engines import COORDINATES
from monai_morse.errors import InputError
from monai_morse.losses import SCHEDULES
from monai_morse.weights import read_checkpoint

__all__ = ["check_values", "check_words"]


def check_words() -> None:
    """See that what ``monai.bundle run`` was given is known to its configs, and that their words are what they may be.

    Called first in ``initialize``, ``$monai_morse.words.check_words()``: a wrong word, of the command line or of a file, ends
    the run before data are read. Goes by the command line of the process, and does nothing in any other program. Words of
    the network are its own to check, and words that are made of others, such as ``max_epochs`` of the data, are not asked.

    Raises:
        InputError: naming the first word that is wrong and what it may be, or that no config has.
    """
    given = _given(sys.argv) if sys.argv[1:2] == ["run"] else {}
    if given.get("args_file"):
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    if not given.get("config_file") or given.get("tracking"):
        return
    config = ConfigParser.load_config_files(given["config_file"])
    _check_known(given, config)
    parser = ConfigParser(config)
    parser.update({name: value for name, value in given.items() if _word(name) in config})
    asked = [name for name in WORDS if parser.get(name) is not None and "#" not in str(parser.get(name))]
    words = {}
    for name in asked:  # one by one, for words may be made of others: num_classes of class_names
        words[name] = parser.get_parsed_content(name)
        WORDS[name](name, words[name])
    _check_together(words)


def check_values(**words: Any) -> None:
    """See that words have values that they may have.

    Args:
        words: by name, of those in ``WORDS``.

    Raises:
        InputError: naming the first one that is wrong and what it may be.

    >>> check_values(batch_size=2, overlap=0.5, amp="false", spacing=[1, 1, 2.5], device="cpu")
    >>> check_values(overlap=1.5)
    Traceback (most recent call last):
    monai_morse.errors.InputError: overlap must be a number in [0, 1), got 1.5
    """
    for name, value in words.items():
        WORDS[name](name, value)
    _check_together(words)


def _check_together(words: Mapping[str, Any]) -> None:
    """See that words agree with each other."""
    axes, stride = words.get("patch_size"), words.get("stride")
    if axes and isinstance(stride, (list, tuple)) and len(stride) != len(axes):
        raise InputError(f"stride must be a whole number or {len(axes)} of them, as patch_size has, got {stride!r}")
    names, count = words.get("class_names"), words.get("num_classes")
    if names and count and count != len(names) + 1:
        raise InputError(f"num_classes must be {len(names) + 1}, the background and each of class_names, got {count}")


# --- what a word may be: functions of its name and value that raise


def _number(kind: type, within: str) -> Callable[[str, Any], None]:
    return lambda name, value: parse_number(value, name, kind, within, exact=True)  # MONAI and torch take no others


def _numbers(check: Callable[[str, Any], None], counts: Sequence[int], or_one: bool = False) -> Callable[[str, Any], None]:
    """A list of so many numbers, or one for all."""

    def check_all(name: str, value: Any) -> None:
        if or_one and not isinstance(value, (list, tuple)):
            check(name, value)
            return
        if not isinstance(value, (list, tuple)) or len(value) not in counts:
            raise InputError(f"{name} must be a list of {' or '.join(map(str, counts))} numbers, got {value!r}")
        for number in value:
            check(f"{name}, each of {value!r},", number)

    return check_all


def _choice(choices: Iterable[str]) -> Callable[[str, Any], None]:
    return lambda name, value: check_choice(name, value, choices)


def _truth(name: str, value: Any) -> None:
    parse_bool(value, name)


def _names(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v for v in value):
        raise InputError(f"""{name} must be a list of names, such as "['liver','spleen']", got {value!r}""")
    if len(set(value)) < len(value):
        raise InputError(f"{name} must be a list of different names, got {value!r}")


def _window(name: str, value: Any) -> None:
    _numbers(_number(float, "(-inf, inf)"), [2])(name, value)
    if value[0] >= value[1]:
        raise InputError(f"{name} must be a list of two numbers, the smaller first, got {value!r}")


def _device(name: str, value: Any) -> None:
    try:
        torch.empty(1, device=value)
    except (RuntimeError, AssertionError, TypeError) as error:  # of another name, not there, or not built in
        raise InputError(f"{name} must be one that torch has here, such as cpu or cuda:0, got {value!r}") from error


def _checkpoint(name: str, value: Any) -> None:
    read_checkpoint(value)


COUNT, FROM_0, SHARE = _number(int, "[1, inf)"), _number(int, "[0, inf)"), _number(float, "[0, 1]")
WORDS: dict[str, Callable[[str, Any], Any]] = {
    "backbone_rate": _number(float, "[0, inf)"),
    "class_names": _names,
    "coordinates": _choice(COORDINATES),
    "device": _device,
    "finetune_from": _checkpoint,
    "lambda_rend": _number(float, "(0, inf)"),
    "limits": lambda name, value: limits_of(value),
    "learning_rate": _number(float, "(0, inf)"),
    "num_classes": _number(int, "[2, inf)"),
    "num_val": FROM_0,
    "num_workers": FROM_0,
    "overlap": _number(float, "[0, 1)"),
    "patch_size": _numbers(COUNT, [2, 3]),
    "render_scale": _numbers(COUNT, [3], or_one=True),
    "schedule": _choice(SCHEDULES),
    "seed": FROM_0,
    "spacing": _numbers(_number(float, "(0, inf)"), [3]),
    "stride": _numbers(COUNT, [2, 3], or_one=True),
    "window": _window,
}
WORDS |= dict.fromkeys(("flip_prob", "rot_flip_prob", "cache_rate"), SHARE)
WORDS |= dict.fromkeys(("batch_size", "epoch_length", "in_channels", "iterations", "max_epochs"), COUNT)
WORDS |= dict.fromkeys(("sw_batch_size", "val_interval"), COUNT)
WORDS |= dict.fromkeys(
    ("amp", "check_data", "compile", "dicom_seg", "freeze_backbone", "label_maps", "overwrite", "resume"), _truth
)
WORDS |= dict.fromkeys(
    ("save_boundary_errors", "save_pictures", "save_predictions", "save_uncertainty", "sync_batch_norm"), _truth
)


# --- which words there are


def _word(name: str) -> str:
    """The word at the left margin that a name of a command line is of."""
    return re.split("#|::", name)[0]


def _check_known(given: Iterable[str], config: Iterable[str]) -> None:
    """See that ``monai.bundle run`` was given names that its config has: any other would be taken and of no effect."""
    known = {_word(name).lstrip("+") for name in config}
    for name in given:
        word = _word(name)
        if word not in known | inspect.signature(run).parameters.keys():
            near = difflib.get_close_matches(word, known, 1, 0.7)
            hint = f"did you mean --{near[0]}?" if near else "give one at the left margin of its configs"
            raise InputError(f"--{name}: the bundle has no word {word!r}; {hint}")


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """Names and values of a command line as Python Fire, which MONAI uses, reads them."""
    from fire.parser import DefaultParseValue

    given: dict[str, Any] = {}
    for word, following in zip(arguments, [*arguments[1:], ""]):
        found = re.fullmatch(r"--?([A-Za-z_][^=\s]*)(?:=(.*))?", word, re.DOTALL)
        if found:
            given[found[1].replace("-", "_")] = DefaultParseValue(following if found[2] is None else found[2])
    return given
