"""Do the experts specialise? The gate's weights on held-back cases, by place.

    python -m tools.gate --data data/Task04_Hippocampus
    python -m tools.gate --data data/Task04_Hippocampus --weights RUN/model_last.pt --set stride=2 patch_size=[48,64,48]

Runs a bundle's evaluation (the hippocampus bundle's, of fold 0) with the network's ``inspect`` in the network's place.
Printed for each expert, coarse to fine: the mean over voxels and their standard deviation within a case, both averaged over
the cases. A gate whose weights do not vary over a place mixes the same everywhere there, whatever it reads.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

from monai_morse.experiments.sweep import parse_options
from monai_morse.weights import read_checkpoint

BUNDLE = Path(__file__).parents[1] / "bundles" / "hippocampus_mri_morse"


def places(rendered: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks (V,) of what is looked at, from the maps (1, *S) of rendered voxels and labels."""
    inside = label.flatten() > 0
    return {"all voxels": torch.ones_like(inside), "the structures": inside, "re-rendered voxels": rendered.flatten() > 0}


def spread(weights: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation of the weights (N, V) over a mask (V,): (N, 2)."""
    chosen = weights[:, mask]
    return torch.stack([chosen.mean(1), chosen.std(1)], dim=1).numpy()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="the bundle's dataset_dir, such as the folder of MSD Task04_Hippocampus")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder of another bundle")
    parser.add_argument("--weights", help="default: the bundle's models/model.pt")
    parser.add_argument("--set", nargs="*", default=[], help="what else the weights were trained with, e.g. stride=2")
    parser.add_argument("--over", nargs="*", default=[], help="files in configs that lie over train.yaml, e.g. slices.yaml")
    parser.add_argument("--cases", type=int, default=40, help="at most")
    args = parser.parse_args(arguments)

    warnings.simplefilter("ignore")
    config = ConfigParser()
    config.read_config([args.bundle / "configs" / name for name in ("train.yaml", *args.over)])
    config.update({"bundle_root": str(args.bundle), "dataset_dir": args.data, **parse_options(" ".join(args.set))})
    dataset = config.get_parsed_content("validate#dataset")
    network, inferer = config.get_parsed_content("network").eval(), config.get_parsed_content("validate#inferer")
    state = read_checkpoint(args.weights or args.bundle / "models" / "model.pt", torch.device("cpu"))
    network.load_state_dict(state.get("model", state))
    found: dict[str, list[np.ndarray]] = {}
    for case in tqdm(dataset.data[: args.cases], desc="gate", disable=None):
        seen = dataset.transform(case)
        image = seen["image"][None].to(next(network.parameters()).device)
        with torch.no_grad():
            maps = inferer(image, network.inspect)
        weights, rendered = (maps[name].as_tensor().cpu()[0] for name in ("expert_weights", "rendered"))
        for name, mask in places(rendered, seen["label"].as_tensor()).items():
            found.setdefault(name, []).append(spread(weights.flatten(1), mask))
    experts = range(1, len(weights) + 1)
    print("| place | " + " | ".join(f"expert {i}" for i in experts) + " |\n" + "| --- " * (1 + len(weights)) + "|")
    for name, figures in found.items():
        print(f"| {name} | " + " | ".join(f"{mean:.2f} ± {std:.3f}" for mean, std in np.mean(figures, axis=0)) + " |")


if __name__ == "__main__":
    main()
