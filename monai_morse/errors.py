"""Ends that a user can understand, and how they reach the terminal.

Everything that this package rejects raises :class:`InputError`, an ordinary ``ValueError``, whose message names what came,
what was expected and the remedy. ``monai.bundle run`` wraps such errors several times on their way out;
:func:`short_errors`, called by the bundles' ``initialize``, prints the message alone. It does so too for Ctrl-C and for a disk
that is full or gone, with what is safe and how to go on.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["InputError", "OutputLost", "disk_is_full", "ending", "find_input_error", "say_how_to_go_on", "short_errors"]

IN_WORKER = re.compile(r"^monai_morse\.errors\.InputError: (.+?)(?=\n\n|\nTraceback |\Z)", re.DOTALL | re.MULTILINE)
FROM_THE_START = "what is written is whole, and the same command starts again"
_how_to_go_on: tuple[str, Any] = (FROM_THE_START, None)


class InputError(ValueError):
    """Input (data, configuration or checkpoint) that cannot be used; the message says which and what to do."""


class OutputLost(InputError):
    """What a run has written is gone while it goes on; no one scan's fault."""


def find_input_error(error: BaseException | None) -> InputError | None:
    """The :class:`InputError` that ``error`` is, was raised from, or tells of as a data loader's process hands it on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError) and not _from_worker(error):
            return error
        told = IN_WORKER.search(str(error)) if _from_worker(error) else None
        if told:
            return InputError(told[1].rstrip())
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error is of a disk that takes nothing more, full or read-only, or was raised from one.

    >>> disk_is_full(OSError(28, "No space left on device")), disk_is_full(OSError(2, "No such file or directory"))
    (True, False)
    """
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _from_worker(error: BaseException) -> bool:
    """Whether torch made this error of the text of another, in another process."""
    return str(error).startswith("Caught ") and " in DataLoader worker process" in str(error)


def say_how_to_go_on(words: str = FROM_THE_START, file: str | Path | None = None) -> None:
    """Set what :func:`ending` tells of a run that is stopped: what is safe, and how to go on, as long as ``file`` is there."""
    global _how_to_go_on
    _how_to_go_on = words, file


def _advice() -> str:
    words, file = _how_to_go_on
    return words if file is None or os.path.exists(file) else f"{file} is gone; the same command starts from the beginning"


def ending(error: BaseException | None) -> str | None:
    """One line for an error that needs no traceback: rejected input, Ctrl-C, or a file that cannot be written or read.

    >>> say_how_to_go_on()  # a training or a cohort of before may have left its own words
    >>> ending(KeyboardInterrupt())
    'stopped; what is written is whole, and the same command starts again'
    >>> ending(OSError(28, "No space left on device", "a.pt"))
    'error: No space left on device: a.pt; once that is mended, what is written is whole, and the same command starts again'
    >>> ending(KeyError("a bug"))
    """
    found = find_input_error(error)
    if found is not None:
        return f"error: {found}"
    config = False
    while error is not None and error.__cause__ is not None:
        config |= str(error).startswith("Failed to instantiate component")  # MONAI, of what a config names
        error = error.__cause__
    if config and isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return f"error: {error}; give one that it has"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {_advice()}"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        return f"error: {error.strerror}{where}; once that is mended, {_advice()}"
    return None


def short_errors() -> None:
    """Let what :func:`ending` knows end the process with its one line instead of a traceback.

    The exit code is 1, or 130 after Ctrl-C. Log records about such an error, which engines and handlers write on its way out,
    lose their tracebacks, and those that only repeat it are left out. Any other error keeps its traceback, and so does every
    one when the root logger is at ``DEBUG``.
    """
    previous, make_record = sys.excepthook, logging.getLogRecordFactory()
    if getattr(previous, "__module__", None) == __name__:
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        words = None if logging.getLogger().isEnabledFor(logging.DEBUG) else ending(error)
        if words is None:
            previous(kind, error, traceback)
        else:
            print(f"\n{words}", file=sys.stderr)

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make_record(*args, **kwargs)
        if made.levelno < logging.ERROR or logging.getLogger().isEnabledFor(logging.DEBUG):
            return made
        repeats = str(made.msg).startswith(("Current run is terminating", "Engine run is terminating", "Exception: "))
        if (made.exc_info or repeats) and ending(sys.exc_info()[1]):
            made.exc_info = None
            if repeats:  # ignite's and StatsHandler's words, ahead of the one line that the hook prints
                made.levelno = -1  # below what any handler lets through
        return made

    def thread_hook(failed: threading.ExceptHookArgs) -> None:  # of TensorBoard's writer, which raises it again in the main one
        if logging.getLogger().isEnabledFor(logging.DEBUG) or not ending(failed.exc_value):
            threading.__excepthook__(failed)

    sys.excepthook, threading.excepthook = hook, thread_hook
    logging.setLogRecordFactory(record)
