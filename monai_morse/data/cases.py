"""Which scans a data set lists, and how they are split into folds."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_morse.config import check_choice, parse_number, typed_arguments
from monai_morse.errors import InputError

from .files import atomic_write, case_names, check_writable

__all__ = ["msd_cases", "msd_class_names"]

logger = logging.getLogger(__name__)


def read_listing(dataset_dir: str | Path) -> dict:
    listing = Path(dataset_dir) / "dataset.json"
    if not Path(dataset_dir).is_dir():
        where = "with --dataset_dir (the demo: --data, or make demo DATA=..)"
        raise InputError(f"no dataset folder at {dataset_dir}; give the folder that holds dataset.json {where}")
    if not listing.is_file():
        raise InputError(f"{listing} does not exist; the folder must have the MSD layout: dataset.json, imagesTr/, labelsTr/")
    try:
        content = json.loads(listing.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{listing} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("training", []), list):
        raise InputError(f"{listing} must be an object whose 'training' is a list, as in the MSD layout")
    return content


def write_listing(dataset_dir: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(dataset_dir / "dataset.json") as partial:
        partial.write_text(json.dumps(content, indent=1))


def claim_folder(out: Path, name: str, what: str) -> None:
    """See that ``out`` can be written: it is new, empty or holds a data set of this ``name``, which may be replaced.

    Raises:
        InputError: when it is a file or holds something that is no ``what``.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a new folder with --out")
    if out.exists() and any(out.iterdir()):
        if not (out / "dataset.json").is_file() or read_listing(out).get("name") != name:
            raise InputError(f"{out} is not empty and holds no {what}; give a new folder with --out")
    check_writable(out)


def msd_class_names(dataset_dir: str | Path) -> list[str]:
    """Names of the foreground classes, in label order, from ``dataset.json``.

    Raises:
        InputError: when it is missing, broken or its labels are not 0, 1, 2, ...
    """
    labels = read_listing(dataset_dir).get("labels", {})
    if not isinstance(labels, dict) or len(labels) < 2 or set(labels) != {str(i) for i in range(len(labels))}:
        raise InputError(f"{dataset_dir}/dataset.json: labels must be numbered 0 (background), 1, 2, ..., got {labels}")
    return [str(labels[str(i)]) for i in range(1, len(labels))]


@typed_arguments
def msd_cases(
    dataset_dir: str | Path,
    split: str = "train",
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """Cases of an MSD folder: ``{"image": path, "label": path, "name": name}`` each, absolute paths.

    Folds are drawn by *patient*: entries of ``dataset.json`` with the same ``"patient"``, or without that key the same label
    file, never stand on both sides. The split depends on the listing, ``num_folds`` and ``seed`` alone. Names are those of
    :func:`monai_morse.data.case_names`, of all cases listed: a case has one name in every split.

    Args:
        dataset_dir: folder with ``dataset.json``.
        split: ``"train"`` (all folds but one), ``"val"`` (that fold), ``"all"``, or ``"test"`` (the listing's images without
            labels).
        fold: the fold held back, 0 to ``num_folds - 1``; default 0.
        num_folds: default 5.
        seed: of the draw; default 0.
        class_names: names meant for labels 1, 2, ..; default: those of ``dataset.json``. As many are needed; other names are
            logged.

    Raises:
        InputError: for a missing or broken listing, an image listed twice, an unknown split or fold, more folds than patients,
            or another number of classes.
    """
    root = Path(dataset_dir).resolve()
    listing = read_listing(dataset_dir)
    if class_names is not None:
        listed = msd_class_names(dataset_dir)
        if isinstance(class_names, str) or len(class_names) != len(listed):
            raise InputError(f"class_names must be a list of {len(listed)} names for {root}'s {listed}, got {class_names!r}")
        if [str(n).lower() for n in class_names] != [n.lower() for n in listed]:
            logger.warning("%s calls its classes %s; they are named %s here", root, listed, list(class_names))
    entries = listing.get("training", [])
    own = sorted({str(e["split"]) for e in entries if isinstance(e, Mapping) and "split" in e})
    if split == "test" and not own:
        images = [str(root / (e["image"] if isinstance(e, Mapping) else e)) for e in listing.get("test", [])]
        return [{"image": image, "name": name} for image, name in zip(images, _names(root, images))]
    if not entries:
        raise InputError(f"{root}/dataset.json lists no training cases")
    broken = [e for e in entries if not isinstance(e, Mapping) or not {"image", "label"} <= e.keys()]
    if broken:
        raise InputError(f"{root}/dataset.json: every training case needs an image and a label, got {broken[0]}")
    check_choice("split", split, (*own, "all") if own else ("train", "val", "all", "test"))
    cases = [{k: str(root / e[k]) for k in ("image", "label")} for e in entries]
    for case, name in zip(cases, _names(root, [c["image"] for c in cases])):
        case["name"] = name
    if split == "all" or own:
        return [c for c, e in zip(cases, entries) if split in ("all", e.get("split"))]
    spellings: dict[str, str] = {}  # of a label, the first
    owners = [
        str(e.get("patient", spellings.setdefault(os.path.realpath(c["label"]), e["label"]))) for c, e in zip(cases, entries)
    ]
    patients = sorted(set(owners))
    if len(patients) < 2:
        raise InputError(f"{root} has one patient, {patients[0]}: to train and to validate, two at least are needed; add cases")
    parse_number(num_folds, f"{root} has {len(patients)} patients: num_folds", int, f"[2, {len(patients)}]")
    parse_number(fold, f"fold, of {num_folds},", int, f"[0, {num_folds - 1}]")
    random.Random(seed).shuffle(patients)
    held_back = set(patients[fold::num_folds])
    return [c for c, owner in zip(cases, owners) if (owner in held_back) == (split == "val")]


def _names(root: Path, images: list[str]) -> list[str]:
    try:
        return case_names(images)
    except InputError as error:
        raise InputError(f"{root}/dataset.json: {error}") from error
