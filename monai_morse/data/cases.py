"""Which scans there are, how they are split into folds, and whether their files can be used."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monai_morse.config import check_choice, parse_number, typed_arguments
from monai_morse.errors import InputError

from .dicom import is_dicom_scan, read_scan
from .files import atomic_write, check_writable

__all__ = ["check_split", "find_problem", "msd_cases", "msd_class_names", "raise_if_skipped", "usable_cases"]

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
    """Cases of an MSD folder: ``{"image": path, "label": path}`` each, absolute paths.

    Folds are drawn by *patient*: entries of ``dataset.json`` with the same ``"patient"``, or without that key the same label
    file, never stand on both sides. The split depends on the listing, ``num_folds`` and ``seed`` alone.

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
        InputError: for a missing or broken listing, an unknown split or fold, more folds than patients, or another number of
            classes.
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
        return [{"image": str(root / (e["image"] if isinstance(e, Mapping) else e))} for e in listing.get("test", [])]
    if not entries:
        raise InputError(f"{root}/dataset.json lists no training cases")
    broken = [e for e in entries if not isinstance(e, Mapping) or not {"image", "label"} <= e.keys()]
    if broken:
        raise InputError(f"{root}/dataset.json: every training case needs an image and a label, got {broken[0]}")
    check_choice("split", split, (*own, "all") if own else ("train", "val", "all", "test"))
    if split == "all" or own:
        wanted = [e for e in entries if split in ("all", e.get("split"))]
        return [{k: str(root / e[k]) for k in ("image", "label")} for e in wanted]
    patients = sorted({str(e.get("patient", e["label"])) for e in entries})
    if len(patients) < 2:
        raise InputError(f"{root} has one patient, {patients[0]}: to train and to validate, two at least are needed; add cases")
    parse_number(num_folds, f"{root} has {len(patients)} patients: num_folds", int, f"[2, {len(patients)}]")
    parse_number(fold, f"fold, of {num_folds},", int, f"[0, {num_folds - 1}]")
    random.Random(seed).shuffle(patients)
    held_back = set(patients[fold::num_folds])

    return [
        {k: str(root / e[k]) for k in ("image", "label")}
        for e in entries
        if (str(e.get("patient", e["label"])) in held_back) == (split == "val")
    ]


def load_scan(path: str) -> tuple[Any, np.ndarray]:
    """A scan, NIfTI or DICOM series, and its voxels as stored; an :class:`InputError` where there are none to read."""
    if not is_dicom_scan(path) and not Path(path).is_file():
        raise InputError("the file does not exist")
    try:
        image = read_scan(path)
        return image, np.asanyarray(image.dataobj)
    except InputError:
        raise
    except Exception as error:  # nibabel, zlib, gzip and ITK each have their own
        kind = "DICOM" if is_dicom_scan(path) else "NIfTI"
        raise InputError(f"cannot be read, truncated or not {kind} ({type(error).__name__}: {error})") from error


def _corners(image: Any) -> np.ndarray:
    far = np.array(image.shape[:3]) - 1
    grid = np.array(np.meshgrid(*[[0, f] for f in far], indexing="ij")).reshape(3, -1)
    return image.affine[:3, :3] @ grid + image.affine[:3, 3:]


def voxel_fault(voxels: np.ndarray, in_channels: int = 1) -> str | None:
    """Why these can be no scan's voxels; None where they can."""
    expected = 3 if in_channels == 1 else 4
    if voxels.ndim != expected or (in_channels > 1 and voxels.shape[-1] != in_channels):
        wanted = f"a {expected}D image with {in_channels} channel(s)"
        return f"expected {wanted}, got shape {voxels.shape}; split or stack its channels"
    if voxels.dtype.kind not in "biuf":
        return f"voxels of type {voxels.dtype} are no intensities; convert the scan to one number a voxel"
    if not np.isfinite(voxels).all():
        count = int(voxels.size - np.isfinite(voxels).sum())
        return f"{count} voxels are NaN or infinite; repair or remove the scan"
    return None


def grid_misfit(label: Any, image: Any) -> str | None:
    """How the voxels of a label map, or another phase, do not lie on those of its image; None where they do."""
    shape, expected = tuple(label.shape), tuple(image.shape[:3])
    if shape != expected:
        return f"shape {shape} differs from its image's {expected}"
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0).min()
    shift = np.linalg.norm(_corners(image) - _corners(label), axis=0).max()
    return f"its affine puts it up to {shift:.3g} mm away from its image" if shift > 0.05 * spacing else None


def find_problem(case: Mapping[str, str], num_classes: int, in_channels: int = 1) -> str | None:
    """What makes a case unusable, naming the file and the remedy; None if nothing does.

    Args:
        case: paths by ``"image"`` and, optionally, ``"label"``.
        num_classes: labels must be integers in [0, num_classes - 1].
        in_channels: 1 wants a 3D image; more want a 4D image with that many along its last axis.
    """
    path = case["image"]
    try:
        image, voxels = load_scan(path)
        fault = voxel_fault(voxels, in_channels)
        if fault:
            return f"{path}: {fault}"
        if "label" not in case:
            return None
        path = case["label"]
        label, classes = load_scan(path)
    except InputError as error:
        return f"{path}: {error}; restore the file or remove the case from dataset.json"
    misfit = grid_misfit(label, image)
    if misfit:
        return f"{path}: {misfit}; resample the label to the image"
    found = np.unique(classes)
    wrong = found[(found != np.round(found)) | (found < 0) | (found >= num_classes)]
    if wrong.size:
        return (
            f"{path}: labels {[float(w) for w in wrong[:5]]} are outside 0 to {num_classes - 1}; map them or name every "
            "class in --class_names"
        )
    return None


def usable_cases(
    cases: Sequence[Mapping[str, str]], num_classes: int, in_channels: int = 1, skip: bool = False
) -> list[dict[str, str]]:
    """The cases whose files can be used, every file read and checked once.

    Args:
        cases: paths by ``"image"`` and ``"label"``.
        num_classes, in_channels: see :func:`find_problem`.
        skip: leave unusable cases out, with a logged error each, for cohorts at inference; default False: one unusable case
            is an error, for training.

    Raises:
        InputError: with up to ten problems; or, when skipping, if no case is left.
    """
    good: list[dict[str, str]] = []
    problems: list[str] = []
    for case in tqdm(cases, desc="checking scans", unit="scan", disable=len(cases) < 20, leave=False):
        try:
            problem = find_problem(case, num_classes, in_channels)
        except Exception as error:  # whatever else one file does, the others are usable
            found = f"{type(error).__name__}: {error}"
            problem = f"{case.get('image', case)}: cannot be checked ({found}); one readable file a case is needed"
        if problem is None:
            good.append(dict(case))
        else:
            problems.append(problem)
    if problems and not skip:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{len(problems)} of {len(cases)} cases cannot be used:\n  " + "\n  ".join(problems[:10]) + more)
    for problem in problems:
        logger.error("skipped: %s", problem)
    if not good:
        raise InputError("no usable case: " + (problems[0] if problems else "the list of cases is empty"))
    return good


def check_split(train: Sequence[Any], validation: Sequence[Any]) -> None:
    """See that there is something to train on and something to validate on.

    Raises:
        InputError: when one is empty. Without validation no weights would ever be the best, and none be kept.

    >>> check_split(["a"], [])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    monai_morse.errors.InputError: no case to validate on: of 1 case(s) at least one each is needed ...
    """
    for cases, what in ((train, "train"), (validation, "validate")):
        if not cases:
            raise InputError(
                f"no case to {what} on: of {len(train) + len(validation)} case(s) at least one each is needed to train and to "
                "validate; give more, or another split (MONAI Label: val_split)"
            )


def raise_if_skipped(cases: Iterable[Mapping[str, str]], used: Iterable[Mapping[str, str]]) -> None:
    """At the end of a cohort: raise an :class:`InputError` naming the cases that :func:`usable_cases` left out, if any."""
    done = {c["image"] for c in used}
    skipped = [c["image"] for c in cases if c["image"] not in done]
    if skipped:
        raise InputError(f"{len(skipped)} case(s) skipped, the others are done; see the log for why: {', '.join(skipped)}")
