"""Ignite handlers for MONAI's engines: lambda_t, repeatable epochs, checkpoints that survive a kill, per-case figures.

Each is attached by its place in ``train_handlers`` or ``val_handlers``; handlers of one event run in that order. In a
distributed run each process has its own, files are written by the first alone, and ``network`` may be wrapped for it.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from monai.engines.utils import IterationEvents
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_iou
from monai.networks.utils import eval_mode, get_state_dict
from monai.transforms import Randomizable
from monai.utils import set_determinism
from torch import nn

from monai_morse.data import ToScanGridd, scan_name, written_whole
from monai_morse.errors import InputError, flag
from monai_morse.losses import MorseLoss, render_weight
from monai_morse.metrics import PaperFigures, paper_figures
from monai_morse.networks import Morse, MorseOutput
from monai_morse.pictures import boundary_picture
from monai_morse.weights import load_matching, read_checkpoint

__all__ = [
    "BestModel",
    "CasePictures",
    "CaseReport",
    "ClassMetrics",
    "CoarsePrediction",
    "EpochSeed",
    "LastModel",
    "RenderSchedule",
    "TrainingState",
    "WeightsLoader",
]

logger = logging.getLogger(__name__)


class RenderSchedule:
    """Sets ``loss.weight`` to lambda_t before each iteration t; T is the trainer's ``max_epochs * epoch_length``.

    It depends on the trainer's iteration alone, so it survives a resumed training.

    Args:
        loss: the trainer's loss.
        schedule: ``"ramp"`` (equation 4, default), ``"half"`` or ``"scratch"``.
        lambda_rend: default 0.1.

    >>> from ignite.engine import Engine
    >>> loss, seen = MorseLoss(), []
    >>> trainer = Engine(lambda engine, batch: seen.append(loss.weight))
    >>> RenderSchedule(loss).attach(trainer)
    >>> _ = trainer.run([0, 0], max_epochs=2)
    >>> seen
    [0.0, 0.0, 0.025, 0.05]
    """

    def __init__(self, loss: MorseLoss, schedule: str = "ramp", lambda_rend: float = 0.1) -> None:
        render_weight(0, 1, schedule)  # an unknown word is an error now, not at the first iteration
        self.loss = loss
        self.schedule = schedule
        self.lambda_rend = lambda_rend

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        self.loss.weight = render_weight(engine.state.iteration, total, self.schedule, self.lambda_rend)


class CoarsePrediction:
    """Leaves the coarse logits as the trainer's ``pred`` once the loss has had the points, so that what follows an iteration
    (decollation, postprocessing, training metrics) gets what it would get from the bare backbone.

    >>> from monai_morse.networks import MorseOutput
    >>> engine = Engine(lambda engine, batch: None)
    >>> engine.state.output = {"pred": MorseOutput(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 3), torch.zeros(1, 3))}
    >>> CoarsePrediction()(engine)
    >>> engine.state.output["pred"].shape
    torch.Size([1, 2, 4, 4])
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        pred = engine.state.output["pred"]
        engine.state.output["pred"] = pred.coarse if isinstance(pred, MorseOutput) else pred


class EpochSeed:
    """Seeds every source of randomness from the pair (seed, epoch) when an epoch starts.

    In a distributed run, all processes but the first from (seed, epoch, rank): processes that augment, and drop experts, alike
    would waste the average of their gradients. An epoch then depends on the weights and optimizer it starts from and on
    nothing else, so that a killed training, resumed from the last epoch's checkpoint, ends with the weights of one that was not
    killed (on the same machine, CPU).

    Args:
        seed: default 0.
        transform: the training data's random transform.

    Raises:
        InputError: when the seed is no integer from 0 on.
    """

    def __init__(self, seed: int = 0, transform: Randomizable | None = None) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be an integer from 0 on, got {seed!r}")
        self.seed = seed
        self.transform = transform

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        # a hash, not a sum: epochs of seeds 0, 1, 2, .. would share their numbers
        numbers = [self.seed, engine.state.epoch, idist.get_rank()]
        seed = int(np.random.SeedSequence(numbers if numbers[2] else numbers[:2]).generate_state(1)[0])
        # the algorithms stay as the user chose them: only the seeds are set
        flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        set_determinism(seed)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
        if self.transform is not None:
            self.transform.set_random_state(seed)


@idist.one_rank_only()
def _save(obj: Any, path: Path) -> None:
    with written_whole(path) as partial:
        torch.save(obj, partial)


@idist.one_rank_only()
def _keep_earlier(path: Path) -> None:
    """A file of an earlier training is copied, under the time it was written, before a new training overwrites it."""
    if path.is_file():
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        kept = path.with_name(f"{path.stem}.{written}{path.suffix}")
        shutil.copy2(path, kept)
        logger.info("kept %s of an earlier training as %s", path.name, kept)


def _bare(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def _load_network(network: nn.Module, state: Any, path: str | Path) -> None:
    # compared first: load_state_dict copies what fits before it complains of what does not
    wanted = network.state_dict()
    given = state if isinstance(state, Mapping) else {}
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    shapes = [k for k in wanted.keys() & given.keys() if getattr(given[k], "shape", None) != wanted[k].shape]
    if missing or extra or shapes:
        examples = ", ".join([*sorted(missing)[:2], *sorted(extra)[:2], *sorted(shapes)[:2]])
        raise InputError(
            f"{path} is a checkpoint of another architecture: {len(missing)} entries missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape (e.g. {examples}); give the --experts, --renderer and network options that it "
            "was trained with, or another checkpoint"
        )
    network.load_state_dict(given)


class WeightsLoader:
    """Loads a network's weights when the engine starts, with ``weights_only=True``; without ``matching``, all or none.

    Args:
        load_path: a state dict, or a checkpoint that holds one as ``"model"``.
        network: where to load it; may be one in ``DistributedDataParallel``.
        matching: load what matches (:func:`monai_morse.load_matching`), e.g. into another cell; default False.

    Raises:
        InputError: when the file is missing, unreadable or of another architecture; with ``matching``, when nothing matches.
    """

    def __init__(self, load_path: str, network: nn.Module, matching: bool = False) -> None:
        self.load_path = load_path
        self.network = _bare(network)
        self.matching = matching

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.matching:
            load_matching(self.network, self.load_path)
            return
        state = read_checkpoint(self.load_path, engine.state.device)
        if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
            state = state["model"]
        _load_network(self.network, state, self.load_path)
        logger.info("loaded weights from %s", self.load_path)


class TrainingState:
    """Saves everything a training goes on from after each epoch; with ``resume`` starts from what is saved.

    Written whole or not at all. Place it after the validation handler, so that the best metric so far is part of it.

    Args:
        path: file to write, e.g. ``models/model_last.pt``.
        network, optimizer: their states are kept, as is the trainer's epoch.
        lr_scheduler: a scheduler stepped once an epoch. It is replayed, not kept, so that a resumed training may have more
            epochs or another learning rate.
        evaluator: its best metric is kept, so that a resumed training does not replace the best model by a worse one.
        resume: go on from ``path`` if it exists; default False, a fresh start, which first renames an existing file
            ``model_last.pt`` to ``model_last.previous.pt``.
        settings: what must be the same in a resumed training, by name, e.g. ``{"fold": 0, "seed": 0}``; plain values.

    Raises:
        InputError: when the file cannot be read, holds another architecture or a training with other settings.
    """

    def __init__(
        self,
        path: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        evaluator: Engine | None = None,
        resume: bool | str = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.resume = flag(resume, "resume")
        self.settings = {k: list(v) if isinstance(v, tuple) else v for k, v in (settings or {}).items()}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        if not self.resume:
            # moved: killed before its first epoch ends, this training has nothing to resume
            if idist.get_rank() == 0 and self.path.is_file():
                previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
                os.replace(self.path, previous)
                logger.info("an earlier training's %s is now %s", self.path.name, previous)
            return
        if not self.path.is_file():
            logger.info("nothing to resume at %s: starting from the beginning", self.path)
            return
        state = read_checkpoint(self.path, engine.state.device)
        if not isinstance(state, Mapping) or not {"model", "optimizer", "epoch", "settings"} <= state.keys():
            raise InputError(f"{self.path} holds weights alone, no training to resume; start without --resume")
        for name in self.settings:
            if state["settings"].get(name) != self.settings[name]:
                raise InputError(
                    f"{self.path} is a training with {name} {state['settings'].get(name)!r}, not {self.settings[name]!r}; "
                    "resume it with that, or start without --resume"
                )
        if state["epoch"] >= engine.state.max_epochs:
            raise InputError(f"{self.path} has already {state['epoch']} epochs; resume with a larger --max_epochs to train on")
        _load_network(_bare(self.network), state["model"], self.path)
        self._load_optimizer(state["optimizer"], state["epoch"])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["epoch"] * engine.state.epoch_length
        if self.evaluator is not None:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
        logger.info("resumed from %s after epoch %d", self.path, state["epoch"])

    def _load_optimizer(self, state: dict, epochs: int) -> None:
        """Moments from the file, learning rates from the configuration: the schedule's after ``epochs`` epochs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a scheduler that steps before its optimizer
            for _ in range(epochs if self.lr_scheduler is not None else 0):
                self.lr_scheduler.step()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def save(self, engine: Engine) -> None:
        state = {
            "model": get_state_dict(self.network),
            "optimizer": self.optimizer.state_dict(),
            "epoch": engine.state.epoch,
            "settings": self.settings,
        }
        if self.evaluator is not None:
            state["best_metric"] = float(self.evaluator.state.best_metric)
            state["best_metric_epoch"] = int(self.evaluator.state.best_metric_epoch)
        _save(state, self.path)


class BestModel:
    """Saves the network's weights, alone, whenever the evaluator's key metric is its best so far; attach to the evaluator.

    Args:
        path: file to write, e.g. ``models/model.pt``; one of an earlier training is kept, under the time it was written.
        network: the network.
    """

    def __init__(self, path: str, network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        if engine.state.best_metric_epoch == -1:  # else the file is of this training
            _keep_earlier(self.path)

    def __call__(self, engine: Engine) -> None:
        if engine.state.best_metric_epoch != engine.state.epoch:
            return
        _save(get_state_dict(self.network), self.path)
        logger.info("new best %s %.4f: saved %s", engine.state.key_metric_name, engine.state.best_metric, self.path)


class LastModel:
    """Saves the network's weights, alone, when training has ended, where there is nothing to choose an epoch by; attach to the
    trainer.

    Args:
        path: file to write, e.g. ``models/model.pt``; one of an earlier training is kept, under the time it was written.
        network: the network.
    """

    def __init__(self, path: str, network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        _keep_earlier(self.path)
        _save(get_state_dict(self.network), self.path)
        logger.info("saved the last epoch's weights as %s", self.path)


class ClassMetrics:
    """Adds each class's mean of a metric to ``engine.state.metrics`` as ``NAME_CLASS``, for logs and TensorBoard.

    Args:
        metric: name of a metric that was computed with ``save_details=True`` (the default of MONAI's handlers).
        class_names: of the foreground classes, in label order.
    """

    def __init__(self, metric: str, class_names: Sequence[str]) -> None:
        self.metric = metric
        self.class_names = list(class_names)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        means = engine.state.metric_details[self.metric].nanmean(dim=0)
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
    return scan_name(str(getattr(output.get("image", label), "meta", {}).get("filename_or_obj", "")))


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
        with written_whole(self.path) as partial, open(partial, "w", newline="") as file:
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


class CasePictures:
    """A PNG a case: slices with the truth, the coarse map, the rendered prediction and the re-rendered voxels.

    It asks the engine's inferer for the coarse map and the voxels as well, so an evaluation takes three times as long: attach
    it after :class:`CaseReport`, whose seconds are then the prediction's alone. Expects one-hot ``pred`` and ``label`` of 3D
    scans, on the scan's own grid, in the engine's output. Drawn by :func:`monai_morse.pictures.boundary_picture`.

    Args:
        folder: where to write ``CASE.png``.
        slices: of a case; default 3.
        label_key: key of the label in the engine's output; default "label".

    Raises:
        InputError: when the engine's network is not :class:`monai_morse.Morse`.
    """

    def __init__(self, folder: str, slices: int = 3, label_key: str = "label") -> None:
        self.folder = Path(folder)
        self.slices = slices
        self.label_key = label_key
        self.to_scan = ToScanGridd(["image", "coarse", "points"])

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._look_inside)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _look_inside(self, engine: Engine) -> None:
        network = _bare(engine.network)
        if not isinstance(network, Morse):
            raise InputError(f"pictures need a Morse network, this is a {type(network).__name__}; leave them out")
        image = engine.state.output["image"]
        with eval_mode(network):  # what the engine decollates with the prediction
            engine.state.output["coarse"] = engine.inferer(image, network.coarse).softmax(1)
            engine.state.output["points"] = engine.inferer(image, network.rendered_voxels)

    def __call__(self, engine: Engine) -> None:
        for output in engine.state.output:
            seen: dict[Any, Any] = {key: output[key] for key in ("image", "coarse")}
            shown = self.to_scan(seen | {"points": (output["points"] > 0).float()})
            label = output[self.label_key]
            maps = {"coarse": shown["coarse"], "refined": output["pred"]}
            boundary_picture(
                self.folder / f"{_case_name(output, label)}.png",
                _array(shown["image"][0]),
                _array(label.argmax(0)),
                {name: _array(logits.argmax(0)) for name, logits in maps.items()},
                _array(shown["points"][0]) > 0.1,  # of a grid twice as fine, one voxel is an eighth
                _case_name(output, label),
                self.slices,
                getattr(label, "pixdim", torch.ones(3)).tolist(),
            )


def _array(x: torch.Tensor) -> np.ndarray:
    return torch.as_tensor(x).as_subclass(torch.Tensor).cpu().numpy()
