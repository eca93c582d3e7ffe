"""Scans with any header that NIfTI can write, through every command; a wrong geometry, or an end without a name, is a find.

    python -m tools.fuzz_geometry --minutes 60 --seed 0

What must hold: the output has the scan's shape and its affine to 1e-6, or the scan is refused by name. Each round writes a
cohort of random scans, runs a command on it in this process, with a network that marks what is bright, and looks at what is
left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

from monai_morse.data import scan_name
from monai_morse.data.checks import find_problem
from monai_morse.data.grids import Limits
from monai_morse.errors import InputError, find_input_error
from monai_morse.prepare import prepare_mpmri, prepare_synapse
from monai_morse.prepare.synapse import TEST, TRAIN

ROOT = Path(__file__).resolve().parents[1]
GOOD: dict[str, Any] = {
    "shape": (20, 24, 18),
    "affine": np.diag([1.0, 1.0, 1.0, 1.0]),  # the sform
    "sform_code": 1,
    "qform": None,  # an affine; None: the sform without its shear
    "qform_code": 1,
    "pixdim": None,  # three numbers; None: those of the qform
    "unit": 2,  # mm; 0 unknown, 1 m, 3 micrometres
    "dtype": "int16",
    "scaling": (1.0, 0.0),  # slope and intercept
    "byteorder": "<",
    "version": 1,  # of NIfTI
    "values": None,  # a function of the voxels; None: as they are
}
"""What a scan is written as, but for changes"""


def bright(shape: Sequence[int]) -> np.ndarray:
    """Where a scan of this shape is bright: boxes that no flip or turn leaves as they are."""
    mask = np.zeros(shape, bool)
    x, y, z, *_ = (max(1, n) for n in (*shape, 1, 1))
    box = mask.reshape(x, y, z, -1)
    box[: -(-x // 2), : -(-y // 3)] = box[-(-x // 4) - 1 : -(-3 * x // 4), y // 2 :, : -(-2 * z // 3)] = True
    return mask


def write_scan(path: Path, label: bool = False, **changes: Any) -> Path:
    """A NIfTI file written field by field, so that its header may say anything; see ``GOOD``.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        label: write what is bright as 1; default False, values as fat and soft tissue have them in HU.
    """
    h = {**GOOD, **changes}
    mask = bright(h["shape"])
    dtype = np.dtype(h["dtype"]).newbyteorder(h["byteorder"])
    darkest = 25 if dtype.kind == "u" else -100
    voxels = mask.astype(float) if label else darkest + 200 * mask + np.random.default_rng(0).normal(0, 5, mask.shape).round()
    voxels = h["values"](voxels) if h["values"] else voxels
    header = (nib.Nifti1Header if h["version"] == 1 else nib.Nifti2Header)(endianness=h["byteorder"])
    header.set_data_dtype(dtype)
    header["dim"][: 1 + len(mask.shape)] = [mask.ndim, *mask.shape]
    affine = np.asarray(h["affine"], float)
    qform = affine if h["qform"] is None else h["qform"]
    if h["qform_code"] and np.isfinite(qform).all() and np.linalg.norm(qform[:3, :3], axis=0).all():
        header.set_qform(qform, 1, strip_shears=True)
    elif np.isfinite(qform).all():
        header["pixdim"][1:4] = np.linalg.norm(qform[:3, :3], axis=0)
    header["sform_code"], header["qform_code"] = h["sform_code"], h["qform_code"]
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    if h["pixdim"] is not None:
        header["pixdim"][1:4] = h["pixdim"]
    header["xyzt_units"] = h["unit"]
    slope, intercept = h["scaling"]
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"] = 352 if h["version"] == 1 else 544
    header["magic"] = b"n+1" if h["version"] == 1 else b"n+2\x00\r\n\x1a\n"
    stored = (voxels - intercept) / slope if np.isfinite([slope, intercept]).all() and slope else voxels
    with np.errstate(all="ignore"):
        stored = stored.round().astype(dtype) if dtype.kind in "iu" else stored.astype(dtype)
    content = header.binaryblock + bytes(4) + stored.tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    return path


class Bright(torch.nn.Module):
    """Marks voxels brighter than most as class 1: a network whose map tells whether its input lay right.

    Args:
        num_classes: channels of the logits. level: of the input, above which a voxel is bright.
    """

    def __init__(self, num_classes: int = 2, level: float = 0.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.level = torch.nn.Parameter(torch.tensor(float(level)))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = 10 * (x[:, :1] - self.level)
        return torch.cat([-logits, logits, *[-100.0 + 0 * logits] * (self.num_classes - 2)], dim=1)


# --- commands, in this process

CLASSES = {"hippocampus_mri_morse": 3, "liver_mpmri_morse": 2, "synapse_ct_morse": 9}


def run(bundle: str, files: Sequence[str], out: Path, **words: Any) -> None:
    """``monai.bundle run`` of a bundle's configs, with :class:`Bright` for a network unless ``words`` give one.

    Raises:
        InputError: as the command does, which then ends with exit code 1.
    """
    folder = ROOT / "bundles" / bundle
    level = 0.35 if "synapse" in bundle else 0.0  # of the window; of what is normalised
    network = {"_target_": "tools.fuzz_geometry.Bright", "num_classes": CLASSES[bundle], "level": level}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(Bright(CLASSES[bundle], level).state_dict(), out / "weights.pt")
    parser = ConfigParser()
    parser.read_config([str(folder / "configs" / f"{name}.yaml") for name in files])
    parser.update({"bundle_root": str(folder), "output_dir": str(out), "device": "$torch.device('cpu')", "amp": False})
    parser.update({"network_def": network, "weights": str(out / "weights.pt"), **words})
    checks = [step for step in parser["initialize"] if "usable_cases" in step]
    try:
        for steps in (checks, parser["run"]):
            parser["steps"] = steps
            parser.get_parsed_content("steps")
    except Exception as error:
        found = find_input_error(error)
        if found is None or found is error:
            raise
        raise found from error


def infer(bundle: str, scans: Path, out: Path, **words: Any) -> None:
    """Label maps ``out/NAME_seg.nii.gz`` of a folder of scans."""
    run(bundle, ["inference"], out, dataset_dir=str(scans), label_maps=True, **words)


def write_listing(folder: Path, classes: int, names: Iterable[str], **more: Any) -> None:
    """``dataset.json`` of cases ``images/NAME`` and ``labels/NAME``."""
    cases = [{"image": f"images/{n}", "label": f"labels/{n}", **more} for n in names]
    labels = {str(i): f"class {i}" if i else "background" for i in range(classes)}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": cases}))


def evaluate(bundle: str, dataset: Path, out: Path, **words: Any) -> None:
    """``metrics.csv`` and ``predictions/NAME.nii.gz`` of all cases of a data set."""
    names = [f"class {i}" for i in range(1, CLASSES[bundle])]
    words = {"split": "all", "class_names": names, "dataset_dir": str(dataset), **words}
    run(bundle, ["train", "evaluate"], out, **words)


TINY = {
    "_target_": "Morse",
    "backbone": {"_target_": "UNet", "out_channels": 3, "in_channels": 1, "channels": [4, 8], "strides": [2]},
    "num_experts": 2,
    "mixture": {"width": 4, "gate_stride": 4},
    "head": {"width": 4, "num_frequencies": 4},
    "points": {"num_train": 32, "num_eval": 32},
}


def train(dataset: Path, out: Path, **words: Any) -> None:
    """An epoch on all cases of a data set and a validation on the same; the hippocampus bundle."""
    backbone = {**TINY["backbone"], "spatial_dims": 3}
    cases = f"$monai_morse.data.msd_cases('{dataset}', 'all')"
    words = {"train_cases": cases, "val_cases": cases, "dataset_dir": str(dataset), "ckpt_dir": str(out), **words}
    words |= {"network_def": {**TINY, "backbone": backbone}, "max_epochs": 1, "patch_size": [16, 16, 16]}
    run("hippocampus_mri_morse", ["train"], out, class_names=["class 1", "class 2"], **words)


# --- chance


def random_affine(rng: np.random.Generator) -> np.ndarray:
    """A good affine as float32 holds it: turned, flipped, its axes swapped, now and then sheared, its voxels of any shape."""
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0] if rng.random() < 0.7 else np.eye(3)[rng.permutation(3)]
    matrix = rotation * rng.choice([-1, 1], 3) * rng.choice([0.4, 0.78125, 1.0, 1.0004, 1.5, 3.3, 5.0], 3)
    if rng.random() < 0.3:
        matrix[:, 0] += rng.uniform(-0.5, 0.5) * matrix[:, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, rng.normal(0, 200, 3)
    return affine.astype(np.float32).astype(float)


def _odd_affine(rng: np.random.Generator) -> np.ndarray:
    affine = random_affine(rng)
    row, column = rng.integers(0, 3), rng.integers(0, 4)
    affine[row, column] = rng.choice([np.nan, np.inf, -np.inf, 0, 1e-20, 1e5, 1e12, 1e30])
    if rng.random() < 0.5:
        affine[:3, rng.integers(0, 3)] *= rng.choice([0, 1e-3, 1e3, 20])
    return affine


def _odd_values(rng: np.random.Generator) -> Any:
    scale = 10.0 ** rng.integers(-40, 40)
    spike, place = rng.choice([np.nan, np.inf, 1e10, -1e30, 1e200]), rng.random()

    def change(voxels: np.ndarray) -> np.ndarray:
        if place < 0.3:
            return voxels * scale
        if place < 0.5:
            return voxels * 0 + 3
        flat = voxels.copy().ravel()
        flat[: int(1 + flat.size * (place - 0.5) ** 4)] = spike
        return flat.reshape(voxels.shape)

    return change


def random_header(rng: np.random.Generator) -> dict[str, Any]:
    """Changes of ``GOOD`` that a header may have, most of them harmless, some not."""
    shape = [int(n) for n in rng.choice([1, 2, 5, 9, 14, 20, 24], 3, p=[0.1, 0.05, 0.05, 0.1, 0.2, 0.3, 0.2])]
    shape += [1] * int(rng.choice(4, p=[0.8, 0.1, 0.05, 0.05]))
    changes: dict[str, Any] = {"affine": random_affine(rng), "shape": tuple(shape)}
    rounded = np.round(np.linalg.norm(changes["affine"][:3, :3], axis=0), int(rng.integers(0, 4)))
    odd: dict[str, Any] = {
        "affine": _odd_affine(rng),
        "shape": [(shape[0], shape[1]), (*shape[:3], 2), (*shape[:3], 1, 3), (0, 4, 4)][rng.integers(0, 4)],
        "sform_code": int(rng.choice([0, 2, 3, 4, 5, 99, -1])),
        "qform_code": int(rng.choice([0, 0, 0, 2, 4, 99, -1])),
        "qform": random_affine(rng) if rng.random() < 0.8 else _odd_affine(rng),
        "pixdim": [rounded, -rounded, rounded * 0, rounded * np.nan, rng.uniform(0.1, 5, 3), rounded * 1e3][rng.integers(0, 6)],
        "unit": int(rng.choice([0, 1, 3, 8, 10, 11, 255])),
        "dtype": str(rng.choice("uint8 uint16 uint32 uint64 int8 int32 int64 float32 float64 longdouble complex64".split())),
        "scaling": [(0.5, 10.0), (-1.0, 0.0), (0.0, 0.0), (np.nan, 1.0), (np.inf, 0.0), (1e-30, 0.0)][rng.integers(0, 6)],
        "byteorder": ">",
        "version": 2,
        "values": _odd_values(rng),
    }
    for name in rng.permutation(list(odd))[: rng.choice(5, p=[0.15, 0.35, 0.25, 0.15, 0.1])]:
        changes[str(name)] = odd[str(name)]
    return changes


def write_random(path: Path, rng: np.random.Generator, **changes: Any) -> None:
    """A scan with these changes, now and then with some bytes of its header, or of its file, made others."""
    header = {**changes}
    try:
        write_scan(path, **header)
    except (nib.spatialimages.HeaderDataError, OverflowError, ValueError):  # what cannot be written at all
        write_scan(path)
    if rng.random() < 0.2:
        packed = path.name.endswith(".gz")
        content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        for place in rng.integers(40, 352, rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        path.write_bytes(gzip.compress(bytes(content), 1) if packed else bytes(content))
    if rng.random() < 0.03:
        content = bytearray(path.read_bytes())
        content[rng.integers(0, len(content))] ^= 1 << rng.integers(0, 8)
        path.write_bytes(bytes(content))


# --- what must hold


class Find(Exception):
    """Something that must not be."""


def _check_grid(scan: Path, found: Path, prepared: bool = False) -> None:
    """The same shape and affine; a prepared scan has three axes, and an sform, of float32, where its source had none."""
    image, made = nib.load(scan), nib.load(found)
    shape = image.shape
    while prepared and len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if made.shape != shape:
        raise Find(f"{scan.name} has shape {shape}, {found.name} {made.shape}")
    # a map's affine is stored in single precision; a scan's may be finer, where it is made of a qform's angles
    if not np.allclose(made.affine, image.affine, rtol=np.finfo(np.float32).eps / 2, atol=1e-5 if prepared else 1e-6):
        raise Find(f"{scan.name} has affine {image.affine.tolist()}, {found.name} {made.affine.tolist()}")


def _check_overlay(scan: Path, found: Path) -> None:
    """The map marks what is bright in the scan, where that is fine enough for a grid of 1 mm."""
    image, marked = nib.load(scan), np.asarray(nib.load(found).dataobj) == 1
    voxels = np.asarray(image.dataobj, float)
    if min(image.shape[:3]) < 9 or np.linalg.norm(image.affine[:3, :3], axis=0).min() < 0.7:
        return
    truth = voxels > voxels.mean()
    if 2 * (marked & truth).sum() < 0.5 * (marked.sum() + truth.sum()):
        raise Find(f"{found.name} does not lie on {scan.name}")


def try_inference(folder: Path, rng: np.random.Generator) -> Counter:
    """Scans, each done on its grid or refused by name."""
    scans = [folder / "scans" / f"s{i}_.nii{rng.choice(['', '.gz'])}" for i in range(8)]
    for scan in scans:
        write_random(scan, rng, **random_header(rng))
    bundle = str(rng.choice(list(CLASSES)))
    patch = [24, 24] if "synapse" in bundle else [24, 24, 24]
    refused = ""
    with _listening() as lines:
        try:
            infer(bundle, folder / "scans", folder / "out", patch_size=patch, **{"limits#voxels": 3e6})
        except InputError as error:
            refused = str(error)
    for scan in scans:
        found = folder / "out" / f"{scan_name(scan)}_seg.nii.gz"
        if found.exists():
            _check_grid(scan, found)
            if "hippocampus" in bundle:
                _check_overlay(scan, found)
        elif scan.name not in refused or not any(scan.name in line for line in lines):
            raise Find(f"{scan.name} is neither done nor refused by name")
    if any("monai_morse.cohort: failed" in line for line in lines):
        raise Find("a scan that passed the checks failed: " + "; ".join(lines))
    done = len(list((folder / "out").glob("*_seg.nii.gz")))
    return Counter({f"{bundle} done": done, f"{bundle} refused": len(scans) - done})


def try_pairs(folder: Path, rng: np.random.Generator) -> Counter:
    """Images and labels: what the checks accept is scored and trained on."""
    names = [f"s{i}_.nii.gz" for i in range(6)]
    for name in names:
        changes = random_header(rng)
        write_random(folder / "images" / name, rng, **changes)
        other = {k: v for k, v in changes.items() if k in ("affine", "shape", "sform_code", "qform_code", "qform")}
        if rng.random() < 0.5:  # a little, or a lot, elsewhere
            other["affine"] = other["affine"] * (1 + rng.choice([1e-7, 1e-5, 1e-4, 1e-3, 1e-2]) * rng.normal(size=(4, 4)))
            other["affine"][3] = [0, 0, 0, 1]
        write_random(folder / "labels" / name, rng, label=True, **other)
    cases = [{k: str(folder / f"{k}s" / n) for k in ("image", "label")} for n in names]
    with _listening():
        limits = Limits(resampled_to=(1, 1, 1), voxels=3e6)
        good = [Path(c["image"]).name for c in cases if find_problem(c, 3, limits=limits) is None]
        if good:
            write_listing(folder, 3, good)
            words = {"limits#voxels": 3e6}
            if rng.random() < 0.5:
                train(folder, folder / "out", **words)
                return Counter({"trained on": len(good), "not trained on": len(names) - len(good)})
            evaluate("hippocampus_mri_morse", folder, folder / "out", patch_size=[24, 24, 24], **words)
            for name in good:
                _check_grid(folder / "images" / name, folder / "out" / "predictions" / name)
    return Counter({"evaluated": len(good), "not evaluated": len(names) - len(good)})


def try_mpmri(folder: Path, rng: np.random.Generator) -> Counter:
    """Phases and masks: what is written has its source's grid, what is not is told of."""
    for patient in range(3):
        changes = random_header(rng)
        for phase in ("pre", "arterial", "venous"):
            write_random(
                folder / f"data/p{patient}/{phase}.nii.gz", rng, **(changes if rng.random() < 0.6 else random_header(rng))
            )
        write_random(folder / f"data/p{patient}/mask.nii.gz", rng, label=True, **{k: changes[k] for k in ("affine", "shape")})
    with _listening():
        try:
            prepare_mpmri(folder / "data", folder / "out")
        except InputError:  # nothing was usable
            pass
    skipped = (folder / "out" / "skipped.csv").read_text()
    done = 0
    for patient in range(3):
        for phase in ("pre", "arterial", "venous"):
            name = f"p{patient}_{phase}.nii.gz"
            found = folder / "out" / "imagesTr" / name
            if found.exists():
                done += 1
                _check_grid(folder / f"data/p{patient}/{phase}.nii.gz", found, prepared=True)
                if not np.array_equal(nib.load(found).affine, nib.load(folder / "out" / "labelsTr" / name).affine):
                    raise Find(f"{name}: the label's affine is another than the image's")
            elif f"p{patient},{phase}," not in skipped:
                raise Find(f"{name} is neither written nor told of")
    return Counter({"mpmri written": done, "mpmri refused": 9 - done})


def try_synapse(folder: Path, rng: np.random.Generator) -> Counter:
    """CTs and BTCV's labels, the bright part as liver."""
    numbers = [*TRAIN[:4], *TEST[:2]]
    for number in numbers:
        changes = {**random_header(rng)}
        write_random(folder / f"raw/img/img{number:04d}.nii.gz", rng, **changes)
        other = {k: changes[k] for k in ("affine", "shape")}
        write_random(folder / f"raw/label/label{number:04d}.nii.gz", rng, label=True, values=lambda v: 6 * v, **other)
    with _listening():
        try:
            said = prepare_synapse(folder / "raw", folder / "out")
        except InputError as error:
            said = str(error)
    done = 0
    for number in numbers:
        found = folder / f"out/imagesTr/case{number:04d}.nii.gz"
        if found.exists():
            done += 1
            _check_grid(folder / f"raw/img/img{number:04d}.nii.gz", found, prepared=True)
        elif f"case{number:04d}" not in said:
            raise Find(f"case {number} is neither written nor told of")
    return Counter({"synapse written": done, "synapse refused": len(numbers) - done})


ROUNDS = (try_inference, try_inference, try_pairs, try_mpmri, try_synapse)


class _listening:
    """Collects what is logged meanwhile, logger and message; the terminal hears nothing."""

    def __enter__(self) -> list[str]:
        lines: list[str] = []
        self.handler = logging.Handler(logging.WARNING)
        self.handler.emit = lambda record: lines.append(f"{record.name}: {record.getMessage()}")  # type: ignore[method-assign]
        logging.getLogger().addHandler(self.handler)
        return lines

    def __exit__(self, *args: Any) -> None:
        logging.getLogger().removeHandler(self.handler)


def fuzz(minutes: float, seed: int = 0, keep: Path | None = None, rounds: int | None = None) -> tuple[Counter, list[str]]:
    """Rounds of chance until the time is over; what came out, and the finds.

    Args:
        minutes: how long. seed: of the first round, the next has the next. rounds: or as many; default: as time allows.
        keep: folder to keep a copy of each find's files; default: they are deleted.
    """
    outcomes: Counter = Counter()
    finds: list[str] = []
    end, told = time.monotonic() + 60 * minutes, time.monotonic()
    number = seed
    while time.monotonic() < end and (rounds is None or number < seed + rounds):
        rng = np.random.default_rng(number)
        attempt = ROUNDS[number % len(ROUNDS)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes += attempt(Path(folder), rng)
            except Exception as error:
                finds.append(f"seed {number}, {attempt.__name__}: {type(error).__name__}: {error}")
                print(finds[-1][:2000], flush=True)
                if keep:
                    shutil.copytree(folder, keep / f"{attempt.__name__}_{number}", dirs_exist_ok=True)
        number += 1
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{number - seed} rounds, {sum(outcomes.values())} scans, {len(finds)} finds", flush=True)
    outcomes["rounds"] = number - seed
    return outcomes, finds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, help="as many at most")
    parser.add_argument("--keep", type=Path, help="folder for the files of finds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes, finds = fuzz(args.minutes, args.seed, args.keep, args.rounds)
    for name, count in sorted(outcomes.items()):
        print(f"{name}: {count}")
    print(f"{len(finds)} finds")
    return bool(finds)


if __name__ == "__main__":
    raise SystemExit(main())
