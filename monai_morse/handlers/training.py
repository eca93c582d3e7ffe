"""What a trainer does at each iteration and epoch: lambda_t, repeatable random numbers, its prediction, validation."""

from __future__ import annotations

import math
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.transforms import Randomizable
from monai.utils import set_determinism

from monai_morse.config import parse_number, typed_arguments
from monai_morse.errors import InputError
from monai_morse.losses import LAMBDA_REND, MorseLoss, check_weight, render_weight
from monai_morse.networks import MorseOutput

__all__ = ["CoarsePrediction", "EpochSeed", "FiniteLoss", "RenderSchedule", "Validation"]


class RenderSchedule:
    """Sets ``loss.weight`` to lambda_t before each iteration t; T is the trainer's ``max_epochs * epoch_length``.

    Needed for ``"ramp"`` and ``"half"``; without it :class:`MorseLoss` keeps its own weight from the start.

    It depends on the trainer's iteration alone, so it survives a resumed training.

    Args:
        loss: the trainer's loss.
        schedule: ``"scratch"`` (default), ``"half"`` or ``"ramp"`` (equation 4), see :func:`monai_morse.losses.render_weight`.
        lambda_rend: default 0.1.

    >>> from ignite.engine import Engine
    >>> loss, seen = MorseLoss(), []
    >>> trainer = Engine(lambda engine, batch: seen.append(loss.weight))
    >>> RenderSchedule(loss, "ramp").attach(trainer)
    >>> _ = trainer.run([0, 0], max_epochs=2)
    >>> seen
    [0.0, 0.0, 0.025, 0.05]
    """

    @typed_arguments
    def __init__(self, loss: MorseLoss, schedule: str = "scratch", lambda_rend: float = LAMBDA_REND) -> None:
        render_weight(0, 1, schedule)  # an unknown word is an error now, not at the first iteration
        check_weight("lambda_rend", lambda_rend)
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


class FiniteLoss:
    """Stops a training whose loss is no number, before its weights, which are none either, replace the last epoch's.

    Raises:
        InputError: in the iteration where the loss is NaN or infinite, naming it.
    """

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = float(engine.state.output["loss"])
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at iteration {engine.state.iteration}, epoch {engine.state.epoch}; what is saved is "
                "of epochs before; try amp: false, a lower learning_rate, or, if it happens at once, check_data: true"
            )


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
        InputError: when the seed is no whole number from 0 on.
    """

    def __init__(self, seed: int = 0, transform: Randomizable | None = None) -> None:
        self.seed = parse_number(seed, "seed", int, "[0, inf)")
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


class Validation(ValidationHandler):
    """MONAI's ``ValidationHandler``, which validates after the last epoch too, whatever the interval.

    Args:
        interval: validate every so many epochs, 1 at least.
        validator: the evaluator.

    Raises:
        InputError: when the interval is no whole number from 1 on.

    >>> from monai.engines import Evaluator
    >>> validator, seen = Evaluator("cpu", [0]), []
    >>> validator.run = seen.append
    >>> trainer = Engine(lambda engine, batch: None)
    >>> Validation(2, validator).attach(trainer)
    >>> _ = trainer.run([0], max_epochs=5)
    >>> seen
    [2, 4, 5]
    """

    def __init__(self, interval: int, validator: Any) -> None:
        super().__init__(parse_number(interval, "interval (val_interval)", int, "[1, inf)"), validator)

    def attach(self, engine: Engine) -> None:
        def due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)
