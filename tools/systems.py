"""Every system of the grid on every backbone, run just now: ``python -m tools.systems``.

A row is a backbone in 2D or 3D, a column a cell of experts x renderer. What a cell shows is found in two ways: the parameters
it adds, counted at the backbone's usual size with the default preset; and a tick if a tiny twin of it was trained a step and
gave logits of the right shape, or a cross.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    DynUNet,
    FlexibleUNet,
    MedNeXt,
    SegResNet,
    SegResNetDS,
    SwinUNETR,
    UNet,
    VNet,
)
from torch import nn
from tqdm import tqdm

from monai_morse.config import check_choice
from monai_morse.errors import short_errors
from monai_morse.losses import MorseLoss
from monai_morse.networks import Morse, TransUNet, UNet3D
from monai_morse.networks.morse import EXPERTS, RENDERERS

__all__ = ["BACKBONES", "CELLS", "TINY_OPTIONS", "Backbone", "System", "run_tiny", "systems", "systems_table"]

CELLS = tuple(itertools.product(EXPERTS, RENDERERS))
TINY_OPTIONS: dict[str, Any] = {
    "mixture": {"width": 8, "gate_stride": 2},
    "head": {"width": 8},
    "points": {"num_train": 64, "num_eval": 100},
}


@dataclass(frozen=True)
class Backbone:
    """How to build a backbone of one input channel, ``build(spatial_dims, classes)``, at its usual size and tiny.

    ``window`` is a size that the tiny one takes, ``num_experts`` the paper's N.
    """

    usual: Callable[[int, int], nn.Module]
    tiny: Callable[[int, int], nn.Module]
    window: tuple[int, int, int] = (32, 48, 16)
    dims: tuple[int, ...] = (2, 3)
    num_experts: int = 3


def _dynunet(filters: Sequence[int], deep_supervision: bool = False) -> Callable[[int, int], nn.Module]:
    n = len(filters)

    def build(dims: int, classes: int) -> nn.Module:
        strides = [1] + [2] * (n - 1)
        options: dict[str, Any] = {"deep_supervision": True, "deep_supr_num": 2} if deep_supervision else {}
        return DynUNet(dims, 1, classes, [3] * n, strides, strides[1:], filters=filters, **options)

    return build


def _mednext(width: int, ratio: int, blocks: int, **options: Any) -> Callable[[int, int], nn.Module]:
    options |= {f"{part}_expansion_ratio": ratio for part in ("encoder", "decoder", "bottleneck")}
    options |= {"blocks_down": [blocks] * 4, "blocks_bottleneck": blocks, "blocks_up": [blocks] * 4}
    return lambda d, k: MedNeXt(d, width, 1, k, **options)


def _tiny_transunet(dims: int, classes: int) -> nn.Module:
    small: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "resnet_units": (1, 1, 1)}
    return TransUNet(1, classes, 32, width_factor=0.5, decoder_channels=(16, 8, 8, 4), **small)


BACKBONES: dict[str, Backbone] = {
    "BasicUNet": Backbone(
        lambda d, k: BasicUNet(d, 1, k, features=(16, 32, 64, 128, 256, 16)),
        lambda d, k: BasicUNet(d, 1, k, features=(4, 4, 8, 16, 32, 4)),
        num_experts=5,
    ),
    "TransUNet": Backbone(lambda d, k: TransUNet(1, k), _tiny_transunet, dims=(2,)),
    "UNet3D": Backbone(lambda d, k: UNet3D(1, k), lambda d, k: UNet3D(1, k, features=4), dims=(3,)),
    "UNETR": Backbone(
        lambda d, k: UNETR(1, k, (96,) * d, spatial_dims=d),
        lambda d, k: UNETR(1, k, (32, 48, 16)[:d], 4, hidden_size=16, mlp_dim=32, num_heads=2, spatial_dims=d),
    ),
    "UNet": Backbone(
        lambda d, k: UNet(d, 1, k, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2),
        lambda d, k: UNet(d, 1, k, (4, 8, 16, 32), (2, 2, 2), num_res_units=1),
    ),
    "AttentionUnet": Backbone(
        lambda d, k: AttentionUnet(d, 1, k, (16, 32, 64, 128, 256), (2, 2, 2, 2)),
        lambda d, k: AttentionUnet(d, 1, k, (4, 8, 16, 32), (2, 2, 2)),
    ),
    "DynUNet": Backbone(_dynunet([32, 64, 128, 256, 320]), _dynunet([4, 8, 16, 32])),
    "DynUNet, deep supervision": Backbone(_dynunet([32, 64, 128, 256, 320], True), _dynunet([4, 8, 16, 32], True)),
    "SegResNet": Backbone(
        lambda d, k: SegResNet(d, 16, 1, k),
        lambda d, k: SegResNet(d, 8, 1, k, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    ),
    "SegResNetDS": Backbone(
        lambda d, k: SegResNetDS(d, 32, 1, k, dsdepth=4),
        lambda d, k: SegResNetDS(d, 4, 1, k, blocks_down=(1, 1, 1), dsdepth=2),
    ),
    "SwinUNETR": Backbone(
        lambda d, k: SwinUNETR(1, k, feature_size=48, spatial_dims=d),
        lambda d, k: SwinUNETR(1, k, feature_size=12, depths=(1,) * 4, num_heads=(1,) * 4, spatial_dims=d),
        window=(32, 64, 32),
    ),
    "VNet": Backbone(lambda d, k: VNet(d, 1, k), lambda d, k: VNet(d, 1, k), window=(16, 32, 16)),
    "FlexibleUNet": Backbone(
        lambda d, k: FlexibleUNet(1, k, "resnet18", spatial_dims=d),
        lambda d, k: FlexibleUNet(1, k, "resnet10", decoder_channels=(16, 8, 8, 4, 4), spatial_dims=d),
        window=(32, 64, 32),
    ),
    "MedNeXt": Backbone(_mednext(32, 2, 2), _mednext(2, 1, 1)),
    "MedNeXt, deep supervision": Backbone(_mednext(32, 2, 2, deep_supervision=True), _mednext(2, 1, 1, deep_supervision=True)),
}


@dataclass(frozen=True)
class System:
    """One cell on one backbone: parameters of the backbone and those added, and what went wrong in its run, if anything."""

    backbone: str
    spatial_dims: int
    experts: str
    renderer: str
    backbone_parameters: int
    added_parameters: int
    error: str = ""


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def run_tiny(backbone: Backbone, dims: int, experts: str, renderer: str) -> str:
    """Train a tiny system one step, then segment with it; returns what went wrong."""
    torch.manual_seed(0)
    size = backbone.window[:dims]
    try:
        network = Morse(backbone.tiny(dims, 3), experts, renderer, backbone.num_experts, **TINY_OPTIONS)
        output = network.train()(torch.rand(2, 1, *size), return_points=True)
        loss = MorseLoss(weight=0.1)(output, torch.randint(0, 3, (2, 1, *size)))
        loss.backward()
        with torch.no_grad():
            logits = network.eval()(torch.rand(1, 1, *size))
        if not (loss.isfinite() and logits.isfinite().all()):
            return "not finite"
        return "" if logits.shape == (1, 3, *size) else f"logits of shape {tuple(logits.shape)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def systems(names: Sequence[str] | None = None) -> Iterator[System]:
    """Run every cell on every backbone named (default: all), 2D and 3D.

    Raises:
        InputError: for an unknown backbone.
    """
    for name in names or BACKBONES:
        check_choice("backbone", name, BACKBONES)
    for name in names or BACKBONES:
        backbone = BACKBONES[name]
        for dims in backbone.dims:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bare = backbone.usual(dims, 9).to("meta")  # to be counted, not run
            before = _parameters(bare)
            for experts, renderer in CELLS:
                with torch.device("meta"):
                    added = _parameters(Morse(bare, experts, renderer, backbone.num_experts)) - before
                yield System(name, dims, experts, renderer, before, added, run_tiny(backbone, dims, experts, renderer))


def systems_table(names: Sequence[str] | None = None) -> tuple[str, bool]:
    """The Markdown table, and whether every system ran."""
    total = sum(len(BACKBONES[n].dims) for n in names or BACKBONES if n in BACKBONES) * len(CELLS)
    done = list(tqdm(systems(names), total=total, desc="systems", disable=None))
    lines = ["| backbone | | parameters | " + " | ".join(f"{e} {r}" for e, r in CELLS) + " |"]
    lines.append("| --- " * (3 + len(CELLS)) + "|")
    for (name, dims), row in itertools.groupby(done, key=lambda s: (s.backbone, s.spatial_dims)):
        cells = list(row)
        marks = [("✗" if c.error else "✓") + f" +{c.added_parameters / 1e6:.2f}" for c in cells]
        lines.append(f"| {name} | {dims}D | {cells[0].backbone_parameters / 1e6:.2f} | " + " | ".join(marks) + " |")
    failed = [s for s in done if s.error]
    lines += ["", f"{len(done) - len(failed)} of {len(done)} systems ran. Parameters in millions, with N as in the paper."]
    lines += [f"✗ {s.backbone} {s.spatial_dims}D {s.experts} {s.renderer}: {s.error}" for s in failed]
    return "\n".join(lines), not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.systems", description=__doc__)
    parser.add_argument("backbones", nargs="*", help="names of the table's rows; default: all")
    short_errors()
    text, all_ran = systems_table(parser.parse_args(arguments).backbones)
    print(text)
    return 0 if all_ran else 1


if __name__ == "__main__":
    sys.exit(main())
