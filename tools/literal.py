"""The head as the paper writes it, dense and at full resolution everywhere: what ``Morse`` is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_morse import Morse
from monai_morse.networks import MorseOutput
from monai_morse.networks import points as P


class LiteralMorse(nn.Module):
    """A ``Morse`` with ``coarse="experts"`` and ``gate_stride=1``, computed the textbook's way with the same parameters.

    Every expert is upsampled to the input's size, all are concatenated for the gate and stacked for the weighted sum; dropped
    experts are computed and multiplied by zero; x_out and the coarse logits are whole maps.
    """

    def __init__(self, morse: Morse) -> None:
        super().__init__()
        self.morse = morse

    def forward(self, x: Tensor, return_points: bool = False) -> Tensor | MorseOutput:
        net, size = self.morse, list(x.shape[2:])
        _, features = net.decoder(x)
        mixture = net.mixture
        mode = "bilinear" if len(size) == 2 else "trilinear"
        keep = mixture.dropout(len(x)).to(x.dtype)
        upsampled = []
        for i, (mlp, feature) in enumerate(zip(mixture.experts, features)):
            expert = mlp(feature) * keep[:, i].reshape([-1] + [1] * (1 + len(size)))
            upsampled.append(F.interpolate(expert, size, mode=mode, align_corners=False))
        weights = mixture.weights(mixture.gate(torch.cat(upsampled, dim=1)), keep)
        x_out = mixture.fuse((weights.unsqueeze(2) * torch.stack(upsampled, dim=1)).sum(1))
        coarse = net.classifier(x_out)

        score = P.uncertainty(coarse.detach())
        if return_points:
            index = P.select_training_points(score, net.num_train, net.oversample, net.importance_ratio)
        else:
            index = P.select_uncertain_points(score, net.num_eval)
        logits = net.renderer(
            P.gather_points(x_out, index),
            P.point_coordinates(index, size),
            P.gather_points(coarse, index),
            x.new_zeros(len(x), 0),
        )
        return MorseOutput(coarse, logits, index) if return_points else P.write_points(coarse, index, logits)
