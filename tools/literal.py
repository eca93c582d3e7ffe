"""The head as the paper writes it, dense and at full resolution everywhere: what ``Morse`` is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_morse import Morse
from monai_morse.networks import Mixture, MorseOutput
from monai_morse.networks import points as geometry


def literal_mixture(mixture: Mixture, features: list[Tensor], counts: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    """The gate's logits (B, N, *S) and x_out (B, width, *S), in the textbook's order.

    Every expert is upsampled to the input's size, all are concatenated for the gate and stacked for the weighted sum; dropped
    experts are computed and multiplied by zero.
    """
    mode = "bilinear" if len(size) == 2 else "trilinear"
    counts = counts.to(features[0].dtype).reshape([*counts.shape, *[1] * len(size)])
    upsampled = [F.interpolate(mlp(f), size, mode=mode, align_corners=False) for mlp, f in zip(mixture.experts, features)]
    counted = [expert * count for expert, count in zip(upsampled, counts.split(1, dim=1))]
    logits = torch.zeros_like(counted[0][:, :1]) if mixture.gate is None else mixture.gate(torch.cat(counted, dim=1))
    weights = logits.exp()
    if mixture.renormalize:
        weights = weights * (counts > 0)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    return logits, mixture.fuse((weights.unsqueeze(2) * torch.stack(counted, dim=1)).sum(1))


class LiteralMorse(nn.Module):
    """A ``Morse`` with ``coarse="experts"`` and ``gate_stride=1``, computed the textbook's way with the same parameters:
    x_out and the coarse logits are whole maps.
    """

    def __init__(self, morse: Morse) -> None:
        super().__init__()
        self.morse = morse

    def forward(self, x: Tensor, return_points: bool = False) -> Tensor | MorseOutput:
        net, size = self.morse, list(x.shape[2:])
        _, features = net.decoder(x)
        _, x_out = literal_mixture(net.mixture, features, net.mixture.dropout(len(x)), size)
        coarse = net.classifier(x_out)

        score = geometry.uncertainty(coarse.detach())
        if return_points:
            index = geometry.select_oversampled_points(score, net.num_train, net.oversample, net.importance_ratio)
        else:
            index = geometry.select_uncertain_points(score, net.num_eval)
        logits = net.renderer(
            geometry.gather_points(x_out, index),
            geometry.point_coordinates(index, size),
            geometry.gather_points(coarse, index),
            x.new_zeros(len(x), 0),
        )
        return MorseOutput(coarse, logits, index) if return_points else geometry.write_points(coarse, index, logits)
