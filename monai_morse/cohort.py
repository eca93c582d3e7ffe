"""A cohort of scans through an evaluator: whatever one scan does, the others are done.

The checks of :mod:`monai_morse.data.checks` refuse what can be foreseen before work starts. This is for the rest: a file that
vanishes, memory that runs out, a transform, a network or a writer that fails on one scan.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine, Events
from torch.utils.data import SequentialSampler

from monai_morse.data import case_names
from monai_morse.errors import find_input_error

__all__ = ["run_scans"]

logger = logging.getLogger(__name__)


class _Watch:
    """Counts the batches that an engine's run completes, and takes the error of the one that ends it."""

    def __init__(self) -> None:
        self.started = False
        self.completed = 0
        self.reason = ""

    def attach(self, engine: Engine) -> list[Any]:
        """The handlers' handles; they are the last of their events."""
        events = {Events.EPOCH_STARTED: self.start, Events.ITERATION_COMPLETED: self.count, Events.EXCEPTION_RAISED: self.take}
        return [engine.add_event_handler(event, handler) for event, handler in events.items()]

    def start(self, engine: Engine) -> None:
        self.started = True

    def count(self, engine: Engine) -> None:
        self.completed += 1

    def take(self, engine: Engine, error: BaseException) -> None:
        if not self.started or self.completed == engine.state.epoch_length or not isinstance(error, Exception):
            raise error  # no scan's: missing weights, a failing report, Ctrl-C
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        self.reason = str(find_input_error(error) or f"{type(cause).__name__}: {cause}")
        logger.debug(self.reason, exc_info=error)


def named(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases with names, those of :func:`monai_morse.data.case_names` where they have none."""
    if all("name" in case for case in cases):
        return list(cases)
    return [{**case, "name": name} for case, name in zip(cases, case_names([case["image"] for case in cases]))]


def run_scans(evaluator: Any, from_start: bool = False) -> list[dict[str, Any]]:
    """Run an evaluator on all cases of its dataset; one that fails is logged by name and left out.

    Args:
        evaluator: MONAI's ``SupervisedEvaluator`` on a ``Dataset`` that its loader takes in order; with another order, as in
            several processes, an error ends the run.
        from_start: when a case fails, run all others again instead of those after it alone, for metrics that are of all cases
            together; default False.

    Returns:
        the cases that were done.
    """
    loader, dataset = evaluator.data_loader, evaluator.data_loader.dataset
    dataset.data = named(dataset.data)
    if not isinstance(loader.sampler, SequentialSampler):
        evaluator.run()
        return list(dataset.data)
    done: list[dict[str, Any]] = []
    rest = list(dataset.data)
    while rest:
        dataset.data, evaluator.state.epoch_length = rest, -(-len(rest) // loader.batch_size)
        watch = _Watch()
        handles = watch.attach(evaluator)
        try:
            evaluator.run()
        finally:
            for handle in handles:
                handle.remove()
        if not watch.reason:
            return done + rest
        first, after = (loader.batch_size * n for n in (watch.completed, watch.completed + 1))
        for case in rest[first:after]:
            logger.error("failed: %s: %s", case.get("image", case), watch.reason)
        if from_start:
            rest = rest[:first] + rest[after:]
        else:
            done, rest = done + rest[:first], rest[after:]
    return done
