"""The paper's training in Python, by one call: what ``--preset paper`` does in a bundle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.networks.nets import UNETR, BasicUNet, UNet
from torch import nn

from monai_morse.config import typed_arguments
from monai_morse.handlers import RenderSchedule
from monai_morse.losses import MorseLoss
from monai_morse.networks import Morse, TransUNet, UNet3D

__all__ = ["PaperSetup", "paper_setup"]

NUM_EXPERTS = {UNet: 5, BasicUNet: 5, TransUNet: 3, UNet3D: 3, UNETR: 3}
ITERATIONS = 30_000


class PaperSetup(NamedTuple):
    """What a training loop needs; ``schedule`` is a handler to attach to a trainer, ``lr_scheduler`` steps each iteration."""

    network: Morse
    loss: MorseLoss
    schedule: RenderSchedule
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler


@typed_arguments
def paper_setup(
    backbone: nn.Module,
    experts: str = "stochastic",
    renderer: str = "anatomical",
    num_experts: int | None = None,
    iterations: int = ITERATIONS,
) -> PaperSetup:
    """Network, loss, eq. 4's schedule, optimizer and learning rates as the paper has them.

    Args:
        backbone, experts, renderer: as for :class:`Morse`.
        num_experts: N; default the paper's for its four backbones, 5 for a UNet, else 3.
        iterations: T; default 30,000.

    >>> from monai.networks.nets import BasicUNet
    >>> setup = paper_setup(BasicUNet(spatial_dims=2, out_channels=9))
    >>> setup.network.options.num_experts, setup.schedule.schedule, setup.optimizer.param_groups[0]["lr"]
    (5, 'ramp', 0.0005)
    """
    if num_experts is None:
        num_experts = next((n for kind, n in NUM_EXPERTS.items() if isinstance(backbone, kind)), None)
    network = Morse(backbone, experts, renderer, num_experts, dropout=0.7, preset="paper")
    loss = MorseLoss(weight=0.1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=iterations, power=0.9)
    return PaperSetup(network, loss, RenderSchedule(loss, "ramp", 0.1), optimizer, lr_scheduler)
