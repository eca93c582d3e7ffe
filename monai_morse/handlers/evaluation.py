"""What an evaluator tells: figures a class and a case, errors by their distance to the boundary, and pictures."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.engines.utils import IterationEvents
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_iou
from monai.networks.utils import eval_mode

from monai_morse.config import typed_arguments
from monai_morse.data import ToScanGridd, atomic_write, case_name
from monai_morse.errors import InputError, OutputLost
from monai_morse.metrics import PaperFigures, boundary_distance, paper_figures
from monai_morse.networks import Morse
from monai_morse.visualize import boundary_picture

from .checkpoints import unwrap

__all__ = ["BoundaryErrors", "CasePictures", "CaseReport", "ClassMetrics", "mean_of"]

logger = logging.getLogger(__name__)


class ClassMetrics:
    """Adds each class's mean of a metric to ``engine.state.metrics`` as ``NAME_CLASS``, for logs and TensorBoard.

    A class that no case has, whose mean does not exist, is named in a warning.

    Args:
        metric: name of a metric that was computed with ``save_details=True`` (the default of MONAI's handlers).
        class_names: of the foreground classes, in label order.
    """

    def __init__(self, metric: str, class_names: Sequence[str]) -> None:
        self.metric = metric
        self.class_names = list(class_names)
        self.told = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        details = engine.state.metric_details[self.metric]
        unseen = [name for name, values in zip(self.class_names, details.T) if values.isnan().all()]
        if unseen and not self.told:
            self.told = True
            everything = ", so its mean is 0 whatever is learned and no weights are the best" if details.isnan().all() else ""
            logger.warning("no case that %s is taken of has %s%s", self.metric, ", ".join(unseen), everything)
        means = details.nanmean(dim=0)
        for name, mean in zip(self.class_names, means, strict=True):
            engine.state.metrics[f"{self.metric}_{name}"] = float(mean)


def mean_of(values: Sequence[float], digits: int) -> str:
    """Mean of the finite values, saying how many they are where that is not all.

    >>> mean_of([1.0, 2.0], 1), mean_of([1.0, math.nan], 1), mean_of([math.nan], 1)
    ('1.5', '1.0 (1 of 2)', '-')
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "-"
    mean = f"{sum(finite) / len(finite):.{digits}f}"
    return mean if len(finite) == len(values) else f"{mean} ({len(finite)} of {len(values)})"


def _case_name(output: Mapping[str, Any], label: Any) -> str:
    """The image's name: phases of one patient share a label."""
    return case_name(getattr(output.get("image", label), "meta", {}))


class CaseReport:
    """Writes one CSV row a case and class: Dice, Jaccard, 95HD and ASD on the label's own grid in two definitions, and seconds.

    MONAI's, in mm: 95HD is the larger of the two directions' 95th percentiles, ASD the symmetric average. Where only the
    prediction or only the label is empty, Dice and Jaccard are 0 and the distances, which do not exist, are left blank; where
    both are, all are. The paper's, in voxels, with its rule for empty masks: :func:`monai_morse.metrics.paper_figures`.

    Expects one-hot ``pred`` and ``label`` in the engine's output. Each case is written when it is done (those of other
    processes at the end); the means are logged at the end, with how many cases they are of where that is not all.

    Args:
        path: the CSV file.
        class_names: of the foreground classes, in label order.
        label_key: key of the label in the engine's output; default "label".

    Raises:
        OutputLost: when the file was removed while the evaluation ran.

    The CSV has the columns case, class, dice, jaccard, hd95_mm, asd_mm, paper_dice, paper_jaccard, paper_hd95, paper_asd and
    seconds (of inference, the same for each class).
    """

    FIGURES = ("dice", "jaccard", "hd95_mm", "asd_mm")
    PAPER_FIGURES = tuple(f"paper_{name}" for name in PaperFigures._fields)

    def __init__(self, path: str, class_names: Sequence[str], label_key: str = "label") -> None:
        self.path = Path(path)
        self.class_names = list(class_names)
        self.label_key = label_key
        self.rows: list[dict[str, Any]] = []
        self.written = False
        self.started = 0.0
        self.seconds = 0.0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda engine: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_clock)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop_clock)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._gather)
        engine.add_event_handler(Events.COMPLETED, self._log)

    def _start_clock(self, engine: Engine) -> None:
        self.started = time.perf_counter()

    def _stop_clock(self, engine: Engine) -> None:
        self.seconds = time.perf_counter() - self.started

    def _add(self, engine: Engine) -> None:
        outputs = engine.state.output
        outputs = outputs if isinstance(outputs, list) else decollate_batch(outputs)
        for output in outputs:
            label = output[self.label_key]
            spacing = label.pixdim.tolist() if hasattr(label, "pixdim") else 1.0
            name = _case_name(output, label)
            pred, truth = (torch.as_tensor(output[k]).as_subclass(torch.Tensor)[None] for k in ("pred", self.label_key))
            figures = (
                compute_dice(pred, truth, include_background=False, ignore_empty=False),
                compute_iou(pred, truth, include_background=False, ignore_empty=False),
                compute_hausdorff_distance(pred, truth, percentile=95, spacing=spacing),
                compute_average_surface_distance(pred, truth, symmetric=True, spacing=spacing),
            )
            exists = (pred + truth)[0, 1:].flatten(1).any(1)
            for c, class_name in enumerate(self.class_names):
                row: dict[str, Any] = {"case": name, "class": class_name}
                row.update({f: float(v[0, c]) if exists[c] else math.nan for f, v in zip(self.FIGURES, figures)})
                paper = paper_figures(pred[0, c + 1].cpu().numpy(), truth[0, c + 1].cpu().numpy())
                row.update(zip(self.PAPER_FIGURES, paper))
                row["seconds"] = self.seconds / len(outputs)
                self.rows.append(row)

        self._write()

    @idist.one_rank_only()
    def _write(self) -> None:
        if self.written and not self.path.is_file():
            raise OutputLost(f"{self.path} was removed while the evaluation ran, with predictions perhaps; start it again")
        self.written = True
        with atomic_write(self.path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "class", *self.FIGURES, *self.PAPER_FIGURES, "seconds"])
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: self._cell(v) for k, v in row.items()})

    def _gather(self, engine: Engine) -> None:
        """The other processes' rows too, in the order of the cases, which a ``DistributedSampler`` deals out in turn."""
        if idist.get_world_size() == 1:
            return
        parts: list[list[dict[str, Any]]] = [[] for _ in range(idist.get_world_size())]
        torch.distributed.all_gather_object(parts, self.rows)
        n = len(self.class_names)
        dealt = zip_longest(*([part[i : i + n] for i in range(0, len(part), n)] for part in parts), fillvalue=[])
        self.rows = [row for turn in dealt for case in turn for row in case]
        self._write()

    @idist.one_rank_only()
    def _log(self, engine: Engine) -> None:
        for class_name in self.class_names:
            rows = [r for r in self.rows if r["class"] == class_name]
            means = [f"{figure} {mean_of([r[figure] for r in rows], 4)}" for figure in self.FIGURES + self.PAPER_FIGURES]
            logger.info("%s: %s", class_name, ", ".join(means))
        logger.info("figures of %d cases in %s", len(self.rows) // len(self.class_names), self.path)

    @staticmethod
    def _cell(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.6f}" if math.isfinite(value) else ""
        return value


class _Inspects:
    """Asks the engine's inferer once a case for what :meth:`Morse.inspect` tells, and brings it to the scan's grid."""

    KEYS = ("coarse", "rendered")

    def __init__(self) -> None:
        self.to_scan = ToScanGridd(["image", *self.KEYS])

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._inspect)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _inspect(self, engine: Engine) -> None:
        network, output = unwrap(engine.network), engine.state.output  # what the engine decollates with the prediction
        if not isinstance(network, Morse):
            raise InputError(f"{type(self).__name__} needs a Morse network, this is a {type(network).__name__}; leave it out")
        if "coarse" in output:  # another handler has asked
            return
        with eval_mode(network):
            seen = engine.inferer(output["image"], network.inspect)
        for key, found in (("coarse", seen["coarse"].softmax(1)), ("rendered", (seen["rendered"] > 0).float())):
            # on the prediction's grid; of several maps MONAI's windows keep no meta data
            output[key] = MetaTensor(found).copy_meta_from(output["pred"])

    def _shown(self, output: Mapping[str, Any]) -> dict[Any, Any]:
        return self.to_scan({key: output[key] for key in ("image", *self.KEYS)})


class CasePictures(_Inspects):
    """A PNG a case: slices with the truth, the coarse map, the rendered prediction and the re-rendered voxels.

    It asks the engine's inferer once more, for the coarse map and the voxels, so an evaluation takes twice as long (no longer
    with :class:`BoundaryErrors` beside it): attach it after :class:`CaseReport`, whose seconds are then the prediction's alone.
    Expects one-hot ``pred`` and ``label`` of 3D scans, on the scan's own grid, in the engine's output. Drawn by
    :func:`monai_morse.visualize.boundary_picture`.

    Args:
        folder: where to write ``CASE.png``.
        slices: of a case; default 3.
        label_key: key of the label in the engine's output; default "label".

    Raises:
        InputError: when the engine's network is not :class:`monai_morse.Morse`.
    """

    @typed_arguments
    def __init__(self, folder: str, slices: int = 3, label_key: str = "label") -> None:
        super().__init__()
        self.folder = Path(folder)
        self.slices = slices
        self.label_key = label_key

    def __call__(self, engine: Engine) -> None:
        for output in engine.state.output:
            shown, label = self._shown(output), output[self.label_key]
            maps = {"coarse": shown["coarse"], "refined": output["pred"]}
            boundary_picture(
                self.folder / f"{_case_name(output, label)}.png",
                _array(shown["image"][0]),
                _array(label.argmax(0)),
                {name: _array(logits.argmax(0)) for name, logits in maps.items()},
                _array(shown["rendered"][0]) > 0.1,  # of a grid twice as fine, one voxel is an eighth
                _case_name(output, label),
                self.slices,
                getattr(label, "pixdim", torch.ones(3)).tolist(),
            )


class BoundaryErrors(_Inspects):
    """Writes how many voxels the coarse and the rendered map get wrong, by distance to the true boundary.

    One CSV row a case and bin of distances: case, from_mm, to_mm, voxels, coarse_wrong, rendered_wrong. A voxel's distance is
    that to the nearest voxel of another label, centre to centre: at least one voxel's length. It asks the engine's inferer
    once more, as :class:`CasePictures` does: attach it after :class:`CaseReport`. Expects one-hot ``pred``
    and ``label`` on the scan's own grid in the engine's output. Each process of a distributed run writes for itself, the first
    alone to ``path``.

    Args:
        path: the CSV file.
        edges: of the bins, in mm, ``(from, to]``; default 0 to 1, to 2, to 3, to 5, to 8, to 12 and farther.
        label_key: key of the label in the engine's output; default "label".

    Raises:
        InputError: when the engine's network is not :class:`monai_morse.Morse`.
    """

    COLUMNS = ("case", "from_mm", "to_mm", "voxels", "coarse_wrong", "rendered_wrong")

    @typed_arguments
    def __init__(self, path: str, edges: Sequence[float] = (0, 1, 2, 3, 5, 8, 12, math.inf), label_key: str = "label") -> None:
        super().__init__()
        self.path = Path(path)
        self.edges = list(edges)
        self.label_key = label_key
        self.rows: list[list[Any]] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, lambda engine: self.rows.clear())
        super().attach(engine)

    def __call__(self, engine: Engine) -> None:
        for output in engine.state.output:
            label = output[self.label_key]
            truth = _array(label.argmax(0))
            distance = boundary_distance(truth, getattr(label, "pixdim", torch.ones(truth.ndim)).tolist())
            wrong = [_array(logits.argmax(0)) != truth for logits in (self._shown(output)["coarse"], output["pred"])]
            for low, high in zip(self.edges, self.edges[1:]):
                inside = (distance > low) & (distance <= high)
                counts = [int(inside.sum()), *(int((w & inside).sum()) for w in wrong)]
                self.rows.append([_case_name(output, label), f"{low:g}", f"{high:g}", *counts])
        self._write()

    @idist.one_rank_only()
    def _write(self) -> None:
        with atomic_write(self.path) as partial, open(partial, "w", newline="") as file:
            csv.writer(file).writerows([self.COLUMNS, *self.rows])


def _array(x: torch.Tensor) -> np.ndarray:
    return torch.as_tensor(x).as_subclass(torch.Tensor).cpu().numpy()
