"""L_total = L_sup + lambda_t * L_rend, and the schedule of lambda_t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks.utils import one_hot
from torch import Tensor, nn

from monai_morse.config import check_choice, typed_arguments
from monai_morse.errors import InputError
from monai_morse.networks import MorseOutput
from monai_morse.networks.points import gather_points
from monai_morse.networks.resampling import resize

__all__ = ["SCHEDULES", "MorseLoss", "render_weight"]

SCHEDULES = ("ramp", "half", "scratch")
LAMBDA_REND = 0.1


def check_weight(name: str, weight: float) -> None:
    """See that a rendering loss's weight trains the renderer."""
    if not weight > 0:
        raise InputError(f"{name} of the rendering loss must be above 0, got {weight!r}: the renderer would never be trained")


def render_weight(iteration: int, total: int, schedule: str = "scratch", lambda_rend: float = LAMBDA_REND) -> float:
    """lambda_t at iteration t of T, the three rows of the paper's table 4.

    ``"ramp"`` is equation 4, ``lambda_rend * 1{t > T/2} * (t - T/2) / T``; ``"half"`` is ``lambda_rend`` from T/2 on;
    ``"scratch"``, the default, is ``lambda_rend`` from the start. The paper finds its ramp best, we do not (docs/results.md).

    Raises:
        InputError: for another schedule.

    >>> render_weight(75, 100, "ramp"), render_weight(50, 100, "ramp"), render_weight(75, 100, "half"), render_weight(1, 100)
    (0.025, 0.0, 0.1, 0.1)
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "scratch":
        return lambda_rend
    if iteration <= total / 2:
        return 0.0
    return lambda_rend if schedule == "half" else lambda_rend * (iteration - total / 2) / total


def _float(logits: Tensor) -> Tensor:
    """At least float32: a loss is not for half precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _channels(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B, 1, ..) or (B, K, ..) as a channel a class, (B, K, ..)."""
    return labels if labels.shape[1] == num_classes else one_hot(labels, num_classes)


class MorseLoss(nn.Module):
    """A loss on the coarse logits, plus ``weight`` times the cross-entropy at the points.

    Takes what ``Morse(x, return_points=True)`` returns; plain logits are supervised alone, so the same configuration trains
    the bare backbone. Where :class:`monai_morse.handlers.RenderSchedule` sets the weight to 0 the rendering term is left out,
    not multiplied by 0: gradients of exactly 0 would still count as steps of Adam and shrink the renderer's weights.
    (DistributedDataParallel then needs ``find_unused_parameters=True``.)

    Args:
        weight: lambda_rend > 0, default 0.1, from the first iteration; with another schedule of lambda_t
            :class:`monai_morse.handlers.RenderSchedule` sets it before each iteration.
        loss: the loss on the coarse logits, default ``0.5 * cross-entropy + 0.5 * Dice``, Dice of each class over all of the
            batch's voxels (in several processes: of each one's batch), for that of one slice says nothing about a class the
            slice is without. Another one is called with what it would get from the bare backbone, on the labels' grid.
        multilabel: classes do not exclude one another: a sigmoid each, and labels (B, K, *S); default False.

    Raises:
        InputError: for a weight that would never train the renderer.

    >>> import torch
    >>> coarse, target = torch.rand(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    >>> output = MorseOutput(coarse, torch.rand(2, 3, 5), torch.randint(0, 64, (2, 5)))
    >>> bool(MorseLoss()(output, target) > MorseLoss()(coarse, target))
    True
    """

    @typed_arguments
    def __init__(
        self, weight: float = LAMBDA_REND, loss: Callable[[Any, Tensor], Tensor] | None = None, multilabel: bool = False
    ) -> None:
        super().__init__()
        check_weight("weight", weight)
        self.weight = weight
        self.loss = loss
        self.multilabel = multilabel

    def forward(self, output: Tensor | MorseOutput | Sequence[Tensor], target: Tensor) -> Tensor:
        """Logits (B, K, *S), alone or in a :class:`MorseOutput`, and labels (B, 1, *S) or one-hot -> scalar; K = 1: sigmoid.

        The labels may lie on another, finer grid over the same window: the points are then labelled by it, and the coarse
        logits learn the share of each class in their voxels.

        A bare backbone's deep supervision, a list (SegResNetDS) or a stack (B, maps, K, *S) (DynUNet), is weighed as MONAI's
        ``DeepSupervisionLoss`` does.
        """
        if not isinstance(output, MorseOutput):
            return self._supervised(output, target)
        loss = self._supervised(output.coarse, target)
        if output.point_index.shape[1] == 0 or self.weight == 0:
            return loss
        logits = _float(output.point_logits)
        labels = gather_points(target, output.point_index)
        if self.multilabel or logits.shape[1] == 1:
            return loss + self.weight * F.binary_cross_entropy_with_logits(logits, _channels(labels, logits.shape[1]).float())
        if labels.shape[1] > 1:  # one-hot
            labels = labels.argmax(1, keepdim=True)
        return loss + self.weight * F.cross_entropy(logits, labels[:, 0].long())

    def _supervised(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """L_sup of the coarse logits."""
        if self.loss is not None:
            if isinstance(logits, Tensor) and logits.ndim == target.ndim and logits.shape[2:] != target.shape[2:]:
                logits = resize(logits, list(target.shape[2:]))
            return self.loss(logits, target.float() if target.dtype == torch.bool else target)  # MONAI's take no bool
        if isinstance(logits, Tensor) and logits.ndim == target.ndim + 1:
            logits = logits.unbind(1)
        if not isinstance(logits, Tensor):
            return DeepSupervisionLoss(self._supervised)(list(logits), target.float())  # type: ignore[arg-type]
        sigmoid = self.multilabel or logits.shape[1] == 1
        same_grid = logits.shape[2:] == target.shape[2:]
        if sigmoid or not same_grid:
            target = _channels(target, logits.shape[1]).float()
        if not same_grid:
            target = resize(target, list(logits.shape[2:]))
        to_onehot_y = target.shape[1] < logits.shape[1]
        loss = DiceCELoss(
            softmax=not sigmoid, sigmoid=sigmoid, to_onehot_y=to_onehot_y, batch=True, lambda_dice=0.5, lambda_ce=0.5
        )
        return loss(_float(logits), target)
