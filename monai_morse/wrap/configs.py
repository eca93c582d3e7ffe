"""The config files of a bundle as data: entries, references to them, nesting, inserting.

An entry is known by its id, ``train::trainer::loss_function``, wherever it stands: nested, or as a key
``train#trainer#loss_function`` of a file that lies over another. :class:`Configs` finds entries by id. Where it moves one,
whatever reaches into it follows, in all files.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from monai_morse.errors import InputError

from .report import WrapReport

__all__ = ["FILE", "Configs", "normal_id"]

FILE = r"\.(?:json|ya?ml)(?:#|::)"  # a macro's file: %configs/train.json#network_def
_SEP = r"(?:#|::)"
_TENSORRT = ("torch.jit.load", "trt_compile", "torch_tensorrt")


def normal_id(key: Any) -> str:
    return str(key).lstrip("+").replace("#", "::")  # + merges a value into another file's


def _entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every entry below ``node``: its id, and the container and key that hold it."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield prefix + normal_id(key), node, key
        yield from _entries(value, f"{prefix}{normal_id(key)}::")


def _reference(entry_id: str) -> str:
    """A pattern of what refers to an entry by its id from inside a string."""
    return rf"(?:[@%]|{FILE})" + _SEP.join(map(re.escape, entry_id.split("::")))


class Configs:
    """The config files of a bundle, by name, and edits of all of them."""

    def __init__(self, folder: Path, report: WrapReport) -> None:
        self.folder = folder
        self.files: dict[str, dict] = {}
        self.commented: list[str] = []
        for path in sorted((folder / "configs").iterdir()):
            if path.suffix not in (".json", ".yaml", ".yml") or path.name == "metadata.json":
                continue
            text = path.read_text()
            if any(word in text for word in _TENSORRT):
                path.unlink()
                report.left.append(f"configs/{path.name}: left out, it runs a compiled file of the original network")
                continue
            try:
                config = ConfigParser.load_config_file(path)
            except Exception as error:
                raise InputError(f"{path.name} cannot be read: {error}") from error
            if isinstance(config, dict):  # else a list of data
                self.files[path.name] = config
            if path.suffix != ".json" and re.search(r"^\s*#|\s# ", text, re.MULTILINE):
                self.commented.append(path.name)
        self.unchanged = copy.deepcopy(self.files)
        # a sigmoid a class, in the loss or the postprocessing: classes do not exclude one another
        self.multilabel = any(i.endswith("::sigmoid") and c[k] is True for _, i, c, k in self.entries())

    def write(self) -> None:
        for name, config in self.files.items():
            path = self.folder / "configs" / name
            if config == self.unchanged[name]:
                continue
            if path.suffix == ".json":
                path.write_text(json.dumps(config, indent=4) + "\n")
                continue
            path.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120))

    def entries(self) -> Iterator[tuple[str, str, Any, Any]]:
        for name, config in self.files.items():
            for entry_id, container, key in _entries(config):
                yield name, entry_id, container, key

    def find(self, entry_id: str) -> list[tuple[str, Any, Any]]:
        """Where entries of this id stand: file, container, key."""
        return [(name, container, key) for name, i, container, key in self.entries() if i == entry_id]

    def objects(self, kind: str) -> list[tuple[str, str, dict]]:
        """File, id and definition of the objects whose class has a name of this pattern."""
        found = [(name, i, c[k]) for name, i, c, k in self.entries() if isinstance(c[k], dict)]
        return [f for f in found if re.fullmatch(kind, str(f[2].get("_target_", "")).split(".")[-1])]

    def nest(self, entry_id: str, under: str, outer: Callable[[Any], Any]) -> None:
        """Replace each value ``v`` of an entry by ``outer(v)``, which holds ``v`` as ``under``, and follow it everywhere."""
        for name, container, key in self.find(entry_id):
            _make_absolute(self.files[name], entry_id)
            container[key] = outer(container[key])
        self._move(entry_id, lambda child, sep: f"{under}{sep}{child}")

    def insert(self, entry_id: str, items: list) -> None:
        """Put items before those of a list, wherever it is given; references by position follow."""
        for _, container, key in self.find(entry_id):
            if isinstance(container[key], list) and not str(key).startswith("+"):
                container[key][:0] = copy.deepcopy(items)
        self._move(entry_id, lambda child, sep: str(int(child) + len(items)) if child.isdigit() else child)

    def _move(self, entry_id: str, new: Callable[[str, str], str]) -> None:
        """Follow the children of an entry that moved from ``child`` to ``new(child, separator)``."""
        inside = f"{entry_id}::"
        reference = re.compile(rf"({_reference(entry_id)})({_SEP})(\w+)")
        for _, i, container, key in list(self.entries()):
            if isinstance(container[key], str):
                container[key] = reference.sub(lambda m: m[1] + m[2] + new(m[3], m[2]), container[key])
            outside = i[: len(i) - len(normal_id(key))]
            if i.startswith(inside) and not outside.startswith(inside):  # a key that reaches into the entry: "network_def#norm"
                sep = "#" if "#" in key else "::"
                child, *rest = i.removeprefix(inside).split("::")
                moved = sep.join([*entry_id.removeprefix(outside).split("::"), new(child, sep), *rest])
                _rename(container, key, ("+" if key.startswith("+") else "") + moved)


def _rename(container: dict, old: str, new: str) -> None:
    items = [(new if k == old else k, v) for k, v in container.items()]
    container.clear()
    container.update(items)


def _make_absolute(config: dict, entry_id: str) -> None:
    """Relative references (``@#a``, ``@##a``) below an entry that is about to move one level down, spelled out."""
    for i, container, key in _entries(config):
        if (i == entry_id or i.startswith(f"{entry_id}::")) and isinstance(container[key], str):
            if re.search(rf"[@%]{_SEP}", container[key]):
                container[key] = ConfigParser.resolve_relative_ids(i, container[key])
