"""Weights into a network when an engine starts, and out to files, written whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import get_state_dict
from torch import nn

from monai_morse.config import parse_bool
from monai_morse.data import atomic_write
from monai_morse.errors import InputError
from monai_morse.weights import load_matching, read_checkpoint

__all__ = ["BestModel", "LastModel", "TrainingState", "WeightsLoader"]

logger = logging.getLogger(__name__)


@idist.one_rank_only()
def _save(obj: Any, path: Path) -> None:
    with atomic_write(path) as partial:
        torch.save(obj, partial)


@idist.one_rank_only()
def _keep_earlier(path: Path) -> None:
    """A file of an earlier training is copied, under the time it was written, before a new training overwrites it."""
    if path.is_file():
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        kept = path.with_name(f"{path.stem}.{written}{path.suffix}")
        shutil.copy2(path, kept)
        logger.info("kept %s of an earlier training as %s", path.name, kept)


def unwrap(network: nn.Module) -> nn.Module:
    """A network out of ``DistributedDataParallel``."""
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
        freeze_backbone: with ``matching``, train all but what was loaded of the backbone; default False.

    Raises:
        InputError: when the file is missing, unreadable or of another architecture; with ``matching``, when nothing matches.
    """

    def __init__(self, load_path: str, network: nn.Module, matching: bool = False, freeze_backbone: bool | str = False) -> None:
        self.load_path = load_path
        self.network = unwrap(network)
        self.matching = matching
        self.freeze_backbone = parse_bool(freeze_backbone, "freeze_backbone")
        if self.freeze_backbone and not matching:
            raise InputError("freeze_backbone goes with matching=True: it freezes what is loaded by name")

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.matching:
            load_matching(self.network, self.load_path, self.freeze_backbone)
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
        self.resume = parse_bool(resume, "resume")
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
        _load_network(unwrap(self.network), state["model"], self.path)
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


class LastModel(BestModel):
    """Saves the network's weights, alone, when training has ended, where there is nothing to choose an epoch by; attach to the
    trainer. Arguments as for :class:`BestModel`.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        _keep_earlier(self.path)
        _save(get_state_dict(self.network), self.path)
        logger.info("saved the last epoch's weights as %s", self.path)
