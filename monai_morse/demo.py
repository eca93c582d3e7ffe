"""``monai-morse demo``: MORSE next to its bare backbone, by ``monai.bundle run`` alone, ending in a table and a picture."""

from __future__ import annotations

import csv
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from monai_morse.bundles import bundle_folder
from monai_morse.config import typed_arguments
from monai_morse.data import ToScanGridd, atomic_write, msd_cases, msd_class_names, scan_name, usable_cases
from monai_morse.data.cases import read_listing
from monai_morse.errors import InputError
from monai_morse.handlers.evaluation import mean_of
from monai_morse.prepare import write_phantom
from monai_morse.visualize import boundary_picture

__all__ = ["run_demo"]

BUNDLE = bundle_folder() / "hippocampus_mri_morse"
SYSTEMS = {
    "baseline": {"experts": "none", "renderer": "none"},
    "MORSE": {"experts": "stochastic", "renderer": "anatomical"},
}
PATIENTS = 10
# where MORSE helps, docs/results.md: the backbone sees half the resolution, the renderer the voxels around each point
FINE = {"stride": 2, "network_def#points#num_eval": 8192}
VOXELS = 250_000  # of a resampled volume, so that two cores need seconds for it
ITERATIONS = 384
BATCH_SIZE = 1
LEARNING_RATE = 0.004


def plan(cases: Sequence[dict[str, str]]) -> tuple[list[float], list[int]]:
    """Spacing (mm) and patch size (voxels) for a data set, from the headers of its images.

    The finest axes are coarsened until the median volume has at most ``VOXELS`` voxels; the patch covers it up to
    64 x 64 x 48, in multiples of 16: eight are the backbone's, which sees half the resolution.
    """
    # the bundle resamples after turning scans to RAS
    headers = [nib.as_closest_canonical(nib.load(c["image"])).header for c in cases]
    spacing = np.median([h.get_zooms()[:3] for h in headers], axis=0).astype(float)
    extent = np.median([np.multiply(h.get_zooms()[:3], h.get_data_shape()[:3]) for h in headers], axis=0)
    while np.prod(extent / spacing) > VOXELS:
        spacing[spacing.argmin()] *= 1.1
    patch = [max(32, min(cap, 16 * math.ceil(n / 16))) for n, cap in zip(extent / spacing, (64, 64, 48))]
    return [round(float(s), 3) for s in spacing], patch


def _bundle_run(config: str, options: dict) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", config]
    command += ["--logging_file", str(BUNDLE / "configs" / "logging.conf"), "--bundle_root", str(BUNDLE)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    print("\n$ " + shlex.join(["python", *command[3:]]), flush=True)
    if subprocess.run(command).returncode:
        raise InputError("the run above failed; its message says why")


FIGURES = {"dice": 4, "jaccard": 4, "hd95_mm": 2, "asd_mm": 2, "seconds": 2}  # column of metrics.csv: digits


def format_table(reports: dict[str, Path]) -> str:
    """Markdown from each system's ``metrics.csv``: a row a class, figures as means over the cases where they exist."""
    lines = ["| system | class | Dice | Jaccard | 95HD (mm) | ASD (mm) | seconds / scan |", "| --- " * 7 + "|"]
    for system, path in reports.items():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for name in [*dict.fromkeys(r["class"] for r in rows), "all"]:
            chosen = [r for r in rows if name in (r["class"], "all")]
            cells = [mean_of([float(r[f] or math.nan) for r in chosen], digits) for f, digits in FIGURES.items()]
            lines.append(f"| {' | '.join([system, name, *cells])} |")
    return "\n".join(lines)


def _picture(out: Path, configs: list[str], options: dict, case: dict[str, str]) -> Path:
    """Draw the first held-back case: no choice of a case that looks well."""
    parser = ConfigParser()
    parser.read_config(configs)
    parser.update({**options, "bundle_root": str(BUNDLE)})
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(f"{options['ckpt_dir']}/model.pt", map_location="cpu", weights_only=True))
    preprocessing = parser.get_parsed_content("validate#preprocessing")
    item = preprocessing(case)
    window = SlidingWindowInferer(roi_size=options["patch_size"], overlap=0.5)
    device = parser.get_parsed_content("device")
    with torch.no_grad():
        seen: Any = window(item["image"][None].to(device), network.inspect)
    rendered = seen["rendered"][0].cpu()
    item["pred"] = MetaTensor((rendered > 0).float(), meta=item["image"].meta)
    points = np.asarray(ToScanGridd("pred")(item)["pred"][0]) > 0.5
    name = scan_name(case["image"])
    predictions = {s: nib.load(out / "runs" / s / "predictions" / f"{name}.nii.gz").get_fdata() for s in SYSTEMS}
    image = nib.load(case["image"]).get_fdata()
    return boundary_picture(
        out / "demo.png",
        image if image.ndim == 3 else image[..., 0],
        np.asarray(nib.load(case["label"]).dataobj),
        predictions,
        points,
        title=name,
    )


@typed_arguments
def run_demo(out: Path, data: Path | None = None, epochs: int | None = None) -> None:
    """Train, infer and evaluate both systems on the phantom, or on ``data`` in the MSD layout; print table and picture.

    Args:
        out: folder for data, runs, ``table.md`` and ``demo.png``.
        data: folder with ``dataset.json``; default: the phantom.
        epochs: of each training; default: as many as make about ``ITERATIONS`` iterations.

    Raises:
        InputError: when the data cannot be found, or a run fails.
    """
    started = time.time()
    out = out.resolve()
    if data is None:
        data = out / "phantom"
        if not (data / "dataset.json").is_file() or not read_listing(data).get("training"):
            write_phantom(data, PATIENTS)
    data = data.resolve()
    class_names = msd_class_names(data)
    in_channels = len(read_listing(data).get("modality", {"0": ""}))
    train, held_back = (msd_cases(data, split) for split in ("train", "val"))
    usable_cases(train + held_back, len(class_names) + 1, in_channels)
    spacing, patch = plan(train + held_back)
    batches = max(1, len(train) // BATCH_SIZE)
    epochs = epochs or max(2, round(ITERATIONS / batches))
    shared = {
        "dataset_dir": str(data),
        "class_names": class_names,
        "in_channels": in_channels,
        "check_data": False,
        "spacing": spacing,
        "patch_size": patch,
        **FINE,
        "flip_prob": 0.0,
        "max_epochs": epochs,
        "val_interval": max(1, epochs // 2),
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
    }
    reports, minutes = {}, {}
    configs = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "evaluate")]
    for system, words in SYSTEMS.items():
        run = out / "runs" / system
        shutil.rmtree(run, ignore_errors=True)  # an earlier demo's
        options = {**shared, **words, "ckpt_dir": str(run), "output_dir": str(run)}
        before = time.time()
        _bundle_run(configs[0], options)
        minutes[system] = (time.time() - before) / 60
        _bundle_run(str(configs), options)
        reports[system] = run / "metrics.csv"
    table = format_table(reports)
    table += "\n\n" + ", ".join(f"{s} trained {epochs} epochs in {m:.1f} minutes" for s, m in minutes.items())
    table += f"; means over {len(held_back)} scans of patients not trained on, which chose the epoch"
    with atomic_write(out / "table.md") as partial:
        partial.write_text(table + "\n")
    picture = _picture(out, configs, options, held_back[0])
    print(f"\n{table}\n\npicture: {picture}\ntable:   {out / 'table.md'}\ntotal:   {(time.time() - started) / 60:.1f} minutes")
