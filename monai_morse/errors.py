"""Errors that a user can mend, and how they reach the terminal.

Everything that this package rejects raises :class:`InputError`, an ordinary ``ValueError``, whose message names what came,
what was expected and the remedy. ``monai.bundle run`` wraps such errors several times on their way out;
:func:`short_errors`, called by the bundles' ``initialize``, prints the message alone.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

__all__ = ["InputError", "find_input_error", "short_errors"]


class InputError(ValueError):
    """Input (data, configuration or checkpoint) that cannot be used; the message says which and what to do."""


def find_input_error(error: BaseException | None) -> InputError | None:
    """The :class:`InputError` that ``error`` is or was raised from, if any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def short_errors() -> None:
    """Let an uncaught :class:`InputError` end the process with its message instead of a traceback (exit code 1).

    Log records about one, which engines and handlers write on its way out, lose their tracebacks too. Any other error keeps
    its traceback, and so does an :class:`InputError` when the root logger is at ``DEBUG``.
    """
    previous, make_record = sys.excepthook, logging.getLogRecordFactory()
    if getattr(previous, "__module__", None) == __name__:
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        found = find_input_error(error)
        if found is None or logging.getLogger().isEnabledFor(logging.DEBUG):
            previous(kind, error, traceback)
        else:
            print(f"\nerror: {found}", file=sys.stderr)

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        if made.exc_info and find_input_error(made.exc_info[1]) and not logging.getLogger().isEnabledFor(logging.DEBUG):
            made.exc_info = None
        return made

    sys.excepthook = hook
    logging.setLogRecordFactory(record)
