"""Weights into a network when an engine starts, and out to files, written whole or not at all."""

from __future__ import annotations

import io
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.networks.utils import get_state_dict
from torch import nn

from monai_morse.config import typed_arguments
from monai_morse.data.files import atomic_write, lock_folder
from monai_morse.errors import InputError, OutputLost, say_how_to_go_on
from monai_morse.fingerprint import fingerprint
from monai_morse.networks import Morse
from monai_morse.weights import load_matching, read_checkpoint

__all__ = ["BestModel", "LastModel", "TrainingState", "WeightsLoader"]

logger = logging.getLogger(__name__)


@idist.one_rank_only()
def _save(obj: Any, path: Path) -> None:
    memory = io.BytesIO()  # to a file, torch hides what the disk says
    torch.save(obj, memory)
    with atomic_write(path) as partial:
        partial.write_bytes(memory.getbuffer())


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

    @typed_arguments
    def __init__(self, load_path: str, network: nn.Module, matching: bool = False, freeze_backbone: bool = False) -> None:
        self.load_path = load_path
        self.network = unwrap(network)
        self.matching = matching
        self.freeze_backbone = freeze_backbone
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

    Written whole or not at all. Place it after the validation handler, so that the best metric so far is part of it. While it
    trains, no other training may start in the folder: a lock that the system lets go of when the process ends, however it does.

    What changes what is learned must be the same in a resumed training: the network's options, its parameters that are trained,
    the optimizer and its options, the cases' number, the batch size, and ``settings``. ``max_epochs``, the learning rate, the
    number of processes, with it the batch size, and the data's transforms may change; a warning says so of all but the first.
    A checkpoint that does not know a setting takes any.

    Args:
        path: file to write, e.g. ``models/model_last.pt``.
        network: its state is kept, as is the trainer's epoch.
        optimizer: its state is kept.
        lr_scheduler: a scheduler stepped once an epoch. It is replayed, not kept, so that a resumed training may have more
            epochs or another learning rate.
        evaluator: its best metric is kept, so that a resumed training does not replace the best model by a worse one.
        resume: go on from ``path`` if it exists; default False, a fresh start, which first renames an existing file
            ``model_last.pt`` to ``model_last.previous.pt``.
        settings: what else must be the same, by name, e.g. ``{"fold": 0, "seed": 0}``; plain values.

    Raises:
        InputError: when the file cannot be read, holds another architecture or a training with other settings, or another
            training is writing to its folder.
    """

    @typed_arguments
    def __init__(
        self,
        path: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any = None,
        evaluator: Engine | None = None,
        resume: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.evaluator = evaluator
        self.resume = resume
        self.settings = _plain(settings or {})
        self.written = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.end)

    def start(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            self.lock = lock_folder(self.path.parent, "training", "--ckpt_dir")
        self.settings = {**self.settings, **self._learned_from(engine)}
        rates = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        loader = engine.state.dataloader
        transform = getattr(getattr(loader, "dataset", None), "transform", None)
        self.changeable = {
            "learning rate": _plain(rates),
            "processes": idist.get_world_size(),
            "batch of all processes": (getattr(loader, "batch_size", None) or 0) * idist.get_world_size(),
            "transforms of the training data, as a digest,": fingerprint(transform),
        }
        say_how_to_go_on("no epoch is finished: the same command starts again")
        if not self.resume:
            # moved: killed before its first epoch ends, this training has nothing to resume
            if idist.get_rank() == 0 and self.path.is_file():
                previous = self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")
                os.replace(self.path, previous)
                logger.info("an earlier training's %s is now %s", self.path.name, previous)
        elif self.path.exists():
            self._go_on(engine, read_checkpoint(self.path, engine.state.device))
        else:
            logger.info("nothing to resume at %s: starting from the beginning", self.path)

    def _learned_from(self, engine: Engine) -> dict[str, Any]:
        """What changes what is learned, of the objects at hand, as plain values by name."""
        network, loader = unwrap(self.network), engine.state.dataloader
        found: dict[str, Any] = {}
        if isinstance(network, Morse):
            found["network"] = asdict(network.options)
            del found["network"]["preset"]  # a name for the others
        found["trained parameters"] = sum(p.numel() for p in network.parameters() if p.requires_grad)
        found["optimizer"] = type(self.optimizer).__name__
        if getattr(loader, "batch_size", None):
            found["batch_size"] = loader.batch_size
            found["cases"] = len(loader.dataset)
        return _plain(found)

    def _go_on(self, engine: Engine, state: Any) -> None:
        if not isinstance(state, Mapping) or not {"model", "optimizer", "epoch", "settings"} <= state.keys():
            raise InputError(f"{self.path} holds weights alone, no training to resume; start without --resume")
        changed = _differences(state.get("changeable", {}), self.changeable)
        free = {"batch_size"} if "processes" in {name for name, _, _ in changed} else set()  # it is each process's
        self._check_same([d for d in _differences(state["settings"], self.settings) if d[0] not in free])
        if state["epoch"] >= engine.state.max_epochs:
            raise InputError(f"{self.path} has already {state['epoch']} epochs; resume with a larger --max_epochs to train on")
        _load_network(unwrap(self.network), state["model"], self.path)
        self._load_optimizer(state["optimizer"], state["epoch"])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["epoch"] * engine.state.epoch_length
        if self.evaluator is not None and "best_metric" in state:
            self.evaluator.state.best_metric = state["best_metric"]
            self.evaluator.state.best_metric_epoch = state["best_metric_epoch"]
        for name, then, now in changed:
            logger.warning("%s from here on: %s, before: %s", name, now, then)
        logger.info("resumed from %s after epoch %d", self.path, state["epoch"])
        self._can_resume(state["epoch"])

    def _check_same(self, differences: list[tuple[str, Any, Any]]) -> None:
        if differences:
            told = ", ".join(f"{name} {then!r}, not {now!r}" for name, then, now in differences)
            raise InputError(f"{self.path} is a training with {told}; resume it with that, or start without --resume")

    def _load_optimizer(self, state: dict, epochs: int) -> None:
        """Moments from the file, learning rates from the configuration: the schedule's after ``epochs`` epochs."""
        then, now = state["param_groups"], self.optimizer.state_dict()["param_groups"]
        self._check_same(_differences({"groups": _sizes(then)}, {"groups": _sizes(now)}, "the optimizer's "))
        for before, after in zip(then, now):
            self._check_same(_differences(_kept(before), _kept(after), "the optimizer's "))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a scheduler that steps before its optimizer
            for _ in range(epochs if self.lr_scheduler is not None else 0):
                self.lr_scheduler.step()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate

    def save(self, engine: Engine) -> None:
        if idist.get_rank() == 0 and self.written and not self.path.is_file():
            raise OutputLost(f"{self.path} was removed while the training ran, with what lay beside it perhaps; start it again")
        state = {
            "model": get_state_dict(self.network),
            "optimizer": self.optimizer.state_dict(),
            "epoch": engine.state.epoch,
            "settings": self.settings,
            "changeable": self.changeable,
        }
        if self.evaluator is not None:
            state["best_metric"] = float(self.evaluator.state.best_metric)
            state["best_metric_epoch"] = int(self.evaluator.state.best_metric_epoch)
        _save(state, self.path)
        self._can_resume(engine.state.epoch)

    def _can_resume(self, epoch: int) -> None:
        words = f"{self.path} holds {epoch} epoch(s); the same command with --resume true goes on from there"
        say_how_to_go_on(words, self.path)
        self.written = True

    def end(self, engine: Engine) -> None:
        say_how_to_go_on()
        if idist.get_rank() == 0 and self.lock is not None:
            self.lock.release(force=True)


def _sizes(groups: list[dict]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's options for a group of parameters, but for rates, which may change, and how it is computed."""
    free = ("lr", "initial_lr", "params", "foreach", "fused", "capturable", "differentiable")
    return {k: _plain(v) for k, v in group.items() if k not in free}


def _plain(value: Any) -> Any:
    """A value as a checkpoint keeps it, and gives it back equal."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> list[tuple[str, Any, Any]]:
    """Name and both values of what two mappings have both and differently, in mappings within them too.

    >>> _differences({"seed": 0, "network": {"stride": [1, 1]}}, {"seed": "0", "network": {"stride": [2, 2]}, "fold": 1})
    [('network: stride', [1, 1], [2, 2])]
    """
    found = []
    for name in [n for n in now if n in then]:
        if isinstance(then[name], Mapping) and isinstance(now[name], Mapping):
            found += _differences(then[name], now[name], f"{inside}{name}: ")
        elif then[name] != now[name] and str(then[name]) != str(now[name]):  # '1' of a command line is 1
            found.append((f"{inside}{name}", then[name], now[name]))
    return found


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
