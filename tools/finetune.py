"""Fine-tuning against training from scratch with the same budget: hippocampus, its two parts merged, few scans.

    python -m tools.finetune --data /data/Task04_Hippocampus --out finetune

The scans to train on are drawn, for each seed anew, from those that the shipped weights were trained on; the figures are of the
scans held back from both. All trainings take as many steps; the last epoch's weights are scored, none is chosen.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_morse.data import msd_cases

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "hippocampus_mri_morse"
STARTS: dict[str, tuple[str, dict[str, str]]] = {
    "from scratch": ("", {}),
    "fine-tuned": (",'configs/finetune.yaml'", {}),
    "backbone at 0.0002, the rest at 0.002": (",'configs/finetune.yaml'", {"backbone_rate": "0.1"}),
    "backbone frozen, the rest at 0.002": (",'configs/finetune.yaml'", {"freeze_backbone": "true"}),
    "backbone frozen, the rest at 0.02": (",'configs/finetune.yaml'", {"freeze_backbone": "true", "learning_rate": "0.02"}),
    "backbone at 0.002, the rest at 0.02": (",'configs/finetune.yaml'", {"backbone_rate": "0.1", "learning_rate": "0.02"}),
}


def write_merged(cases: list[dict[str, str]], folder: Path) -> Path:
    """The cases as a data set in the MSD layout whose only class is any label above 0."""
    (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
    training = []
    for case in cases:
        label = nib.load(case["label"])
        path = folder / "labelsTr" / Path(case["label"]).name
        nib.save(nib.Nifti1Image((np.asarray(label.dataobj) > 0).astype(np.uint8), label.affine), path)
        training.append({"image": case["image"], "label": str(path)})
    listing = {"labels": {"0": "background", "1": "hippocampus"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(listing))
    return folder


def run(configs: str, log: Path, **options: object) -> None:
    """One ``monai.bundle run`` of the bundle."""
    words = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", configs]
    for name, value in {"bundle_root": ".", "class_names": "['hippocampus']", **options}.items():
        words += [f"--{name}", str(value)]
    with open(log, "a") as file:
        subprocess.run(words, cwd=BUNDLE, stdout=file, stderr=file, check=True, env={**os.environ, "TQDM_DISABLE": "1"})


def score(start: str, seed: int, data: Path, out: Path, scans: int, epochs: int, amp: bool) -> float:
    """Mean Dice on the scans held back, after one training."""
    cases = msd_cases(data, "train")
    train = write_merged(random.Random(seed).sample(cases, scans), out / f"train_{seed}")
    held_back = write_merged(msd_cases(data, "val"), out / "held_back")
    folder = out / f"{start.replace(' ', '_').replace('/', '_')}_{seed}"
    folder.mkdir(exist_ok=True)
    overlay, options = STARTS[start]
    everything = "$monai_morse.data.msd_cases({}, 'all')"
    run(
        f"['configs/train.yaml'{overlay}]",
        folder / "log.txt",
        dataset_dir=train,
        train_cases=everything.format("@dataset_dir"),
        val_cases=everything.format(f"'{held_back}'"),
        ckpt_dir=folder,
        output_dir=folder,
        max_epochs=epochs,
        val_interval=epochs,
        seed=seed,
        amp=amp,
        **options,
    )
    where = {"dataset_dir": held_back, "split": "all", "ckpt_dir": folder, "output_dir": folder, "amp": amp}
    run("['configs/train.yaml','configs/evaluate.yaml']", folder / "log.txt", save_predictions="false", **where)
    with open(folder / "metrics.csv") as file:
        return statistics.mean(float(row["dice"]) for row in csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Task04_Hippocampus")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    args = parser.parse_args()
    table: dict[str, list[float]] = {start: [] for start in args.starts}
    for seed in args.seeds:
        for start, row in table.items():
            row.append(score(start, seed, args.data, args.out.resolve(), args.scans, args.epochs, args.amp))
            print(f"seed {seed}, {start}: {row[-1]:.4f}", flush=True)
    print("| start | " + " | ".join(f"seed {s}" for s in args.seeds) + " | mean |")
    print("| --- |" + " --- |" * (len(args.seeds) + 1))
    for start, row in table.items():
        print(f"| {start} | " + " | ".join(f"{v:.4f}" for v in [*row, statistics.mean(row)]) + " |")


if __name__ == "__main__":
    main()
