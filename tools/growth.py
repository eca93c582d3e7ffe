"""How what MORSE adds to a backbone grows with voxels, experts, width, classes and points: time and memory.

    python -m tools.growth --out docs/growth.png

The backbone, a small 3D UNet, is not run: random decoder features of its shapes stand in, so that what is measured is MORSE's
own: the fastest of the repeats, and the most memory above what the features take. Each value has a process of its own.
Printed is the slope in log-log scale over the upper half of the values: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import matplotlib
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from tqdm import tqdm

from monai_morse import Morse
from monai_morse.networks import DecoderFeatures
from tools.cost import peak_memory, reset_peak

AXES: dict[str, list[int]] = {
    "voxels": [32**3, 48**3, 64**3, 96**3],
    "num_experts": [1, 2, 3, 4, 5],
    "width": [8, 16, 32, 64, 128],
    "classes": [2, 4, 8, 16, 32],
    "points": [1024, 4096, 16384, 65536],
}
USUAL = {"voxels": 48**3, "num_experts": 3, "width": 32, "classes": 4, "points": 8192}
FIGURES = ("inference", "training step", "memory, inference", "memory, training")


class Fixed(nn.Module):
    """Random logits and decoder features, in the shapes of a decoder that is never run."""

    def __init__(self, decoder: DecoderFeatures, x: Tensor) -> None:
        super().__init__()
        self.num_classes = decoder.num_classes
        self.logits = torch.rand(len(x), decoder.num_classes, *x.shape[2:], device=x.device, requires_grad=True)
        self.features = []
        for info in decoder.info:
            size = [round(s / r) for s, r in zip(x.shape[2:], info.reduction)]
            self.features.append(torch.rand(len(x), info.channels, *size, device=x.device, requires_grad=True))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.logits, self.features


def run(values: dict[str, int], preset: str, repeats: int) -> dict[str, float]:
    """Seconds and bytes of all but the backbone, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = round(values["voxels"] ** (1 / 3))
    net = Morse(
        BasicUNet(3, 1, values["classes"], features=(8, 8, 16, 32, 64, 8)),
        "dense",
        num_experts=values["num_experts"],
        preset=preset,
        mixture={"width": values["width"]},
        points={"num_eval": values["points"], "num_train": values["points"] // 4},
    ).to(device)
    x = torch.rand(1, 1, side, side, side, device=device)
    net.decoder = Fixed(net.decoder, x)
    result = {}

    def step() -> None:
        output = net(x, return_points=True)
        (output.coarse.mean() + output.point_logits.mean()).backward()
        net.zero_grad()

    for figure, job in (("inference", lambda: net(x)), ("training step", step)):
        net.train(figure == "training step")
        times = []
        with torch.set_grad_enabled(figure == "training step"):
            reset_peak(device)
            before = peak_memory(device)
            for _ in range(repeats + 1):
                start = time.perf_counter()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        result[figure] = min(times[1:])
        result["memory, " + figure.split()[0]] = peak_memory(device) - before
    return result


def alone(*arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def slope(x: list[int], y: list[float]) -> float:
    """Of the upper half of the values in log-log scale, by least squares; nan where an addition was too small to be seen."""
    if min(y) <= 0:
        return math.nan
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y)][len(x) // 2 :]
    mx, my = (statistics.mean(p[i] for p in pairs) for i in (0, 1))
    return sum((a - mx) * (b - my) for a, b in pairs) / sum((a - mx) ** 2 for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="light", choices=["light", "paper"])
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="growth.png", help="the picture")
    args = parser.parse_args()

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(args.axes), figsize=(3.2 * len(args.axes), 6), squeeze=False)
    print("| " + " | ".join(["what grows", "from", "to", *(f"slope of {f}" for f in FIGURES)]) + " |")
    print("| --- " * (3 + len(FIGURES)) + "|")
    jobs = tqdm(total=sum(len(AXES[a]) for a in args.axes), desc="growth", disable=None)
    for column, axis in enumerate(args.axes):
        added: dict[str, list[float]] = {f: [] for f in FIGURES}
        for value in AXES[axis]:
            values = {**USUAL, axis: value}
            own = alone(values, args.preset, args.repeats)
            for f in FIGURES:
                added[f].append(own[f])
            jobs.update()
        slopes = [slope(AXES[axis], added[f]) for f in FIGURES]
        numbers = ["too little to see" if math.isnan(s) else f"{s:.2f}" for s in slopes]
        print("| " + " | ".join([axis, f"{AXES[axis][0]:,}", f"{AXES[axis][-1]:,}", *numbers]) + " |", flush=True)
        for row, names in enumerate((FIGURES[:2], FIGURES[2:])):
            panel = panels[row, column]
            for name in names:
                y = [v if row == 0 else v / 2**20 for v in added[name]]
                panel.plot(AXES[axis], y, "o-", label=name)
                panel.plot(AXES[axis], [y[-1] * v / AXES[axis][-1] for v in AXES[axis]], ":", color="grey", linewidth=1)
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=("seconds", "MiB")[row] + " added")
            panel.set_xticks(AXES[axis], [f"{v:,}" for v in AXES[axis]], rotation=30, fontsize=7)
            panel.set_xticks([], minor=True)
            panel.legend(fontsize=7)
    figure.suptitle(f"What MORSE ({args.preset}) adds to a small 3D UNet; dotted: linear")
    figure.tight_layout()
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
