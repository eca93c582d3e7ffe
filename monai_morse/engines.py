"""Calling the network from MONAI's engines: ask for points in training, run in half precision."""

from __future__ import annotations

from typing import Any

import torch
from monai.engines import default_prepare_batch
from monai.inferers import Inferer
from torch import Tensor

from monai_morse.errors import flag

__all__ = ["AutocastInferer", "prepare_batch_with_points"]


def prepare_batch_with_points(batchdata: Any, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> tuple:
    """``prepare_batch`` of ``SupervisedTrainer``: calls the network with ``return_points=True``.

    >>> x = {"image": torch.rand(1, 1, 4, 4), "label": torch.rand(1, 1, 4, 4)}
    >>> image, label, args, kwargs = prepare_batch_with_points(x, "cpu")
    >>> args, kwargs
    ((), {'return_points': True})
    """
    image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
    return image, label, (), {"return_points": True}


class AutocastInferer(Inferer):
    """Another inferer under bfloat16 autocast, on CPU as on CUDA.

    The engines' own ``amp`` is float16 with a gradient scaler, on CUDA only. bfloat16 needs no scaler, so ``amp`` stays off.

    Args:
        inferer: the inferer to run, e.g. ``SimpleInferer``.
        enabled: whether to use autocast at all; default True.

    >>> from monai.inferers import SimpleInferer
    >>> AutocastInferer(SimpleInferer())(torch.rand(2, 3), torch.nn.Linear(3, 4)).dtype
    torch.float32
    """

    def __init__(self, inferer: Inferer, enabled: bool | str = True) -> None:
        super().__init__()
        self.inferer = inferer
        self.enabled = flag(enabled, "amp")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.enabled):
            output = self.inferer(inputs, network, *args, **kwargs)
        if isinstance(output, Tensor):
            return output.float()
        return type(output)(*(v.float() if v.is_floating_point() else v for v in output))
