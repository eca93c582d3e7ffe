"""The Synapse multi-organ CT protocol: 8 of BTCV's 13 organs, 18 patients to train and 12 to test, from what groups have.

That is BTCV's download (NIfTI, 13 organs), or the slices and volumes that TransUNet's authors made of it, of which copies
differ in the order of labels and in how the axes lie: both are found from the anatomy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from monai_morse.data.cases import claim_folder, write_listing
from monai_morse.data.checks import find_problem, no_hounsfield
from monai_morse.data.files import atomic_write
from monai_morse.data.scans import read_scan
from monai_morse.errors import InputError

__all__ = ["ORGANS", "prepare_synapse"]

NAME = "Synapse multi-organ CT"
ORGANS = ("aorta", "gallbladder", "left_kidney", "right_kidney", "liver", "pancreas", "spleen", "stomach")
"""Labels 1 to 8, in TransUNet's order"""
BTCV = (
    *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "inferior_vena_cava"),
    *("portal_and_splenic_veins", "pancreas", "right_adrenal_gland", "left_adrenal_gland"),
)
"""BTCV's labels 1 to 13"""
TRAIN = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
WINDOW = (-125, 275)  # HU; what the protocol clips to
# HU that an organ's median may have, with or without contrast; gallbladder and stomach may hold anything
PLAUSIBLE = {"aorta": (10, 500), "left_kidney": (0, 350), "right_kidney": (0, 350), "liver": (-20, 250)}
PLAUSIBLE |= {"pancreas": (-30, 250), "spleen": (10, 300)}

Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # HU (X, Y, Z), labels in the order of ORGANS, affine


def _to_organs(names: Sequence[str]) -> np.ndarray:
    """Our label of each label 0, 1, .. of a data set that calls its labels 1, 2, .. by these names."""
    return np.array([0, *(ORGANS.index(n) + 1 if n in ORGANS else 0 for n in names)], np.uint8)


# --- BTCV's download


def _btcv_cases(images: Path, labels: Path) -> dict[int, Callable[[], Case]]:
    image, label = (_numbered(d, rf"{k}(\d+)\.nii(\.gz)?") for d, k in ((images, "img"), (labels, "label")))
    return {n: partial(_read_btcv, image[n], label.get(n)) for n in image}


def _read_btcv(image_path: Path, label_path: Path | None) -> Case:
    if label_path is None:
        raise InputError(f"{image_path} has no label")
    problem = find_problem({"image": str(image_path), "label": str(label_path)}, len(BTCV) + 1)
    if problem:
        raise InputError(problem)
    image, label = read_scan(image_path), read_scan(label_path)
    return np.asanyarray(image.dataobj), _to_organs(BTCV)[np.asanyarray(label.dataobj).astype(int)], image.affine


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Files of a folder by the number in their name."""
    matches = [(re.fullmatch(pattern, p.name), p) for p in sorted(folder.iterdir())] if folder.is_dir() else []
    return {int(m[1]): p for m, p in matches if m}


# --- the slices and volumes of TransUNet's authors


def _read_h5(path: Path, keys: Sequence[str] = ("image", "label")) -> list[np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise InputError("reading .h5 volumes needs h5py: pip install monai_morse[synapse]") from error
    with h5py.File(path) as file:
        return [np.asarray(file[key]) for key in keys]


def _read_slices(paths: Mapping[int, Path]) -> list[np.ndarray]:
    missing = set(range(max(paths) + 1)) - paths.keys()
    if missing:
        raise InputError(f"{paths[max(paths)].parent}: slices {sorted(missing)[:5]} are missing; restore them")
    slices = []
    for number in sorted(paths):
        with np.load(paths[number], allow_pickle=False) as file:
            slices.append((file["image"], file["label"]))
    return [np.stack(arrays) for arrays in zip(*slices)]


def _transunet_cases(place: Path) -> tuple[dict[int, Callable[[], Case]], str]:
    volumes = _numbered(place / "test_vol_h5", r"case(\d+)\.npy\.h5")
    slices: dict[int, dict[int, Path]] = {}
    for path in sorted((place / "train_npz").glob("*.npz")):
        if match := re.fullmatch(r"case(\d+)_slice(\d+)\.npz", path.name):
            slices.setdefault(int(match[1]), {})[int(match[2])] = path
    names, affine = _found_from_anatomy(list(volumes.values()))
    readers: dict[int, Callable[[], list[np.ndarray]]] = {n: partial(_read_slices, s) for n, s in slices.items()}
    readers |= {n: partial(_read_h5, p) for n, p in volumes.items()}
    remark = (
        f"labels were {', '.join(names)}; axes were taken to run {'-'.join(nib.aff2axcodes(affine))}; this form does not tell "
        "the spacing, 1 mm is written: figures in mm are in voxels"
    )
    return {n: partial(_converted, read, names, affine) for n, read in readers.items()}, remark


def _converted(read: Callable[[], list[np.ndarray]], names: Sequence[str], affine: np.ndarray) -> Case:
    image, label = read()
    if image.ndim != 3 or image.shape != label.shape:
        raise InputError(f"image of shape {image.shape} and label of shape {label.shape}: expected the same, three axes")
    if not np.isfinite(image).all() or image.min() < -0.5 or image.max() > 1.5:
        raise InputError(f"image from {image.min():.3g} to {image.max():.3g}: expected 0 to 1")
    if label.min() < 0 or label.max() > len(names):
        raise InputError(f"labels {label.min()} to {label.max()}: expected 0 to {len(names)}")
    return image * (WINDOW[1] - WINDOW[0]) + WINDOW[0], _to_organs(names)[label.astype(int)], affine


def _found_from_anatomy(volumes: Sequence[Path]) -> tuple[Sequence[str], np.ndarray]:
    """Which labels a copy has and how its axes lie, from the organs' sizes and places in its volumes (D, H, W)."""
    counts, places = np.zeros(len(BTCV) + 1), []
    for path in tqdm(volumes, desc="finding labels and axes", unit="volume"):
        try:
            label = _read_h5(path, ["label"])[0].astype(np.uint8)
        except InputError:  # h5py is missing
            raise
        except Exception:  # it will be skipped
            continue
        counts += np.bincount(label.ravel(), minlength=len(counts))[: len(counts)]
        found = [np.argwhere(label == k) for k in range(1, len(counts))]
        places.append([v.mean(0) if len(v) else np.full(3, np.nan) for v in found])
    kept = [n for n in BTCV if n in ORGANS]  # the 8 organs in BTCV's order, as some copies have them
    if counts[len(ORGANS) + 1 :].any():
        names: Sequence[str] = BTCV
    else:  # of labels 2 and 4, one is the right kidney and the smaller one the gallbladder
        names = ORGANS if counts[2] < counts[4] else kept
    at = {n: np.nanmean([p[i] for p in places] or [[np.nan] * 3], axis=0) for i, n in enumerate(names) if n in ORGANS}
    right, front = at["liver"] - at["spleen"], at["stomach"] - at["aorta"]
    top = at["liver"] - (at["left_kidney"] + at["right_kidney"]) / 2
    if not np.isfinite([right, front, top]).all():
        raise InputError("no volume in test_vol_h5 shows all organs: cannot tell how its axes lie; give a complete copy")
    across = 1 if abs(right[1] * front[2]) > abs(right[2] * front[1]) else 2
    affine = np.eye(4)
    affine[:3, :3] = 0
    for world, (axis, direction) in enumerate(((across, right), (3 - across, front), (0, top))):
        affine[world, axis] = np.sign(direction[axis])
    return names, affine


# --- both


def _check_hounsfield(hu: np.ndarray, label: np.ndarray) -> None:
    """See that a case is in Hounsfield units: its organs have plausible values, and fat is where fat is.

    Raises:
        InputError: with the numbers, where most organs do not, or there is none.
    """
    found = {n: hu[label == k] for k, n in enumerate(ORGANS, start=1) if n in PLAUSIBLE}
    medians = {n: float(np.median(values)) for n, values in found.items() if values.size}
    outside = [n for n, median in medians.items() if not PLAUSIBLE[n][0] <= median <= PLAUSIBLE[n][1]]
    lacking = no_hounsfield(hu, ["fat", "soft tissue"])  # of the rest, the organs tell
    if lacking or len(outside) > len(medians) / 2:
        numbers = ", ".join(f"{n} {m:.4g} ({PLAUSIBLE[n][0]} to {PLAUSIBLE[n][1]} expected)" for n, m in medians.items())
        raise InputError(f"no CT in HU: {lacking + '; ' if lacking else ''}medians {numbers}; give the scan as downloaded")


def _find_cases(source: Path) -> tuple[dict[int, Callable[[], Case]], str]:
    """How to read each case of a folder or of one in it, by number, and what is to be said of all."""
    for place in (source, *sorted(p for p in source.glob("*") if p.is_dir())):
        for images, labels in (("img", "label"), ("imagesTr", "labelsTr")):  # as downloaded, or as MONAI's tutorials have it
            if (place / images).is_dir() and (place / labels).is_dir():
                return _btcv_cases(place / images, place / labels), ""
        if (place / "train_npz").is_dir() and (place / "test_vol_h5").is_dir():
            return _transunet_cases(place)
    raise InputError(
        f"found neither img/ and label/ (BTCV's RawData/Training) nor train_npz/ and test_vol_h5/ (as TransUNet's authors "
        f"prepared it) in {source} or a folder in it; give the folder that holds them with --source"
    )


def prepare_synapse(source: str | Path, out: str | Path, name: str = NAME) -> str:
    """Write the Synapse data in the MSD layout: HU clipped to the protocol's window, labels 1 to 8 in TransUNet's order.

    ``dataset.json`` carries the protocol's split, 18 cases to train and 12 to test, by case number. A case that cannot be
    used is left out and told. Run again, it writes the same.

    Args:
        source: a folder, or the one above it, with BTCV's ``img`` and ``label`` (or ``imagesTr`` and ``labelsTr``, with the
            files' names as downloaded), or with ``train_npz`` and ``test_vol_h5``.
        out: folder to write, new or empty or an earlier one of this ``name``.
        name: of the data set, in ``dataset.json``.

    Returns:
        what was written, what was missing, what was left out and why.

    Raises:
        InputError: when there is no such folder, or no usable case to train or to test on, or ``out`` holds something else.
    """
    source, out = Path(source), Path(out).resolve()
    cases, remark = _find_cases(source)
    claim_folder(out, name, "prepared Synapse data")
    content: dict[str, Any] = {
        "name": name,
        "description": f"HU clipped to {list(WINDOW)}; the 18/12 split of TransUNet",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(i): n for i, n in enumerate(("background", *ORGANS))},
        "training": [],
    }
    write_listing(out, content)  # no case is listed before all are written
    entries, skipped = [], []
    for number in tqdm(sorted(cases.keys() & {*TRAIN, *TEST}), desc="preparing", unit="case"):
        case = f"case{number:04d}"
        try:
            image, label, affine = cases[number]()
            _check_hounsfield(image, label)
        except Exception as error:  # whatever one file does, the others are usable
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            skipped.append(f"  {case}: {reason}")
            continue
        entry = {kind: f"./{kind}sTr/{case}.nii.gz" for kind in ("image", "label")}
        for kind, voxels in (("image", np.round(image.clip(*WINDOW)).astype(np.int16)), ("label", label)):
            with atomic_write(out / entry[kind]) as partly:
                nib.save(nib.Nifti1Image(voxels, affine), partly)
        entries.append({**entry, "patient": case, "split": "train" if number in TRAIN else "test"})
    lines = []
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        count = sum(e["split"] == split for e in entries)
        missing = [f"case{n:04d}" for n in numbers if n not in cases]
        lines.append(f"{split}: {count} of {len(numbers)} cases" + (f"; missing: {', '.join(missing)}" if missing else ""))
        if not count:
            raise InputError("\n".join([f"{source} has no usable case to {split} on", *lines, *skipped]))
    write_listing(out, {**content, "numTraining": len(entries), "training": entries})
    other = len(cases.keys() - {*TRAIN, *TEST})
    lines += [f"{other} cases of other numbers are not of the protocol"] if other else []
    lines += [f"skipped {len(skipped)}:", *skipped] if skipped else []
    return "\n".join([f"{out}:", *lines, *([remark] if remark else [])])
