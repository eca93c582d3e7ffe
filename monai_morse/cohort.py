"""A cohort of scans through an evaluator: whatever one scan does, the others are done, and a table tells of each.

:func:`run_scans` guards each scan: a file that vanishes, memory that runs out, a transform, a network or a writer that fails.
:func:`run_cohort` adds what thousands of scans need: each is checked when its turn comes, what is done is not done again,
processes share the work, and ``cohort.csv`` is written as it goes.
"""

from __future__ import annotations

import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from monai_morse.config import typed_arguments
from monai_morse.data import case_names, raise_if_left_out
from monai_morse.data.checks import find_problem, limits_of
from monai_morse.data.dicom import is_dicom_scan
from monai_morse.data.files import atomic_write, lock_folder
from monai_morse.errors import InputError, OutputLost, disk_is_full, find_input_error, say_how_to_go_on
from monai_morse.fingerprint import file_digest, fingerprint

__all__ = ["run_cohort", "run_scans"]

logger = logging.getLogger(__name__)


def named(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases with names, those of :func:`monai_morse.data.case_names` where they have none."""
    if all("name" in case for case in cases):
        return list(cases)
    return [{**case, "name": name} for case, name in zip(cases, case_names([case["image"] for case in cases]))]


class Listener:
    """What is asked before each scan of a run and told after it; this one takes all and logs those that fail."""

    def refuse(self, case: dict[str, Any]) -> bool:
        """Whether the scan whose turn it is shall not be done."""
        return False

    def done(self, cases: list[dict[str, Any]], output: Any) -> None:
        """A batch was done, with the engine's output."""

    def failed(self, case: dict[str, Any], reason: str) -> None:
        logger.error("failed: %s: %s", case.get("image", case), reason)


class _Watch:
    """Counts the batches that an engine's run completes, and takes the error of the one that ends it."""

    def __init__(self, cases: list[dict[str, Any]], batch_size: int, listener: Listener) -> None:
        self.batches = [cases[i : i + batch_size] for i in range(0, len(cases), batch_size)]
        self.listener = listener
        self.started = False
        self.completed = 0
        self.refused: list[dict[str, Any]] = []
        self.reason = ""

    def attach(self, engine: Engine) -> list[Any]:
        """The handlers' handles; they are the last of their events."""
        events = {
            Events.EPOCH_STARTED: self.start,
            Events.GET_BATCH_STARTED: self.ask,
            Events.ITERATION_COMPLETED: self.count,
            Events.EXCEPTION_RAISED: self.take,
        }
        return [engine.add_event_handler(event, handler) for event, handler in events.items()]

    def start(self, engine: Engine) -> None:
        self.started = True

    def ask(self, engine: Engine) -> None:
        self.refused = [case for case in self.batches[self.completed] if self.listener.refuse(case)]
        if self.refused:
            raise InputError("refused")

    def count(self, engine: Engine) -> None:
        self.listener.done(self.batches[self.completed], engine.state.output)
        self.completed += 1

    def take(self, engine: Engine, error: BaseException) -> None:
        if not self.started or self.completed == engine.state.epoch_length or not isinstance(error, Exception):
            raise error  # no scan's: missing weights, a failing report, Ctrl-C
        if disk_is_full(error) or isinstance(find_input_error(error), OutputLost):
            raise error  # nor this: all others would fail alike
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        self.reason = str(find_input_error(error) or f"{type(cause).__name__}: {cause}")
        logger.debug(self.reason, exc_info=error)


@typed_arguments
def run_scans(evaluator: Any, from_start: bool = False, listener: Listener | None = None) -> list[dict[str, Any]]:
    """Run an evaluator on all cases of its dataset; one that fails is logged by name and left out.

    Args:
        evaluator: MONAI's ``SupervisedEvaluator`` on a ``Dataset`` that its loader takes in order; with another order, as in
            several processes, an error ends the run.
        from_start: when a case fails, run all others again instead of those after it alone, for metrics that are of all cases
            together; default False.
        listener: asked and told of each case; default: those that fail are logged.

    Returns:
        the cases that were done.
    """
    loader, dataset = evaluator.data_loader, evaluator.data_loader.dataset
    listener = listener or Listener()
    dataset.data = named(dataset.data)
    if not isinstance(loader.sampler, SequentialSampler):
        evaluator.run()
        return list(dataset.data)
    done: list[dict[str, Any]] = []
    rest = list(dataset.data)
    while rest:
        dataset.data, evaluator.state.epoch_length = rest, -(-len(rest) // loader.batch_size)
        watch = _Watch(rest, loader.batch_size, listener)
        handles = watch.attach(evaluator)
        try:
            evaluator.run()
        finally:
            for handle in handles:
                handle.remove()
        if not watch.reason:
            return done + rest
        first, after = (loader.batch_size * n for n in (watch.completed, watch.completed + 1))
        for case in [] if watch.refused else rest[first:after]:
            listener.failed(case, watch.reason)
        others = [case for case in rest[first:after] if watch.refused and case not in watch.refused]
        if from_start:
            rest = rest[:first] + others + rest[after:]
        else:
            done, rest = done + rest[:first], others + rest[after:]
    return done


@typed_arguments
def run_cohort(
    evaluator: Any,
    postprocessing: Any,
    output_dir: str | Path,
    weights: str | Path,
    in_channels: int = 1,
    limits: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Segment the scans of an evaluator's dataset, each checked when its turn comes, and keep ``output_dir/cohort.csv``.

    Scans whose maps are there, whole and made by the same weights and settings, are skipped: started again after a kill, it
    goes on. Where ``torch.distributed`` runs, each process does its share; the first one tells of all.

    Args:
        evaluator: see :func:`run_scans`.
        postprocessing: the evaluator's, which saves by :class:`monai_morse.data.SaveMapd`.
        output_dir: where it does.
        weights: the file that the network's weights come from.
        in_channels, limits: see :func:`monai_morse.data.checks.find_problem`.
        overwrite: do all scans anew; default False.

    The table has the columns scan, name, status (done, skipped: it was done before, refused by the checks, failed), reason,
    seconds, voxels of the map, files, and what made them: weights, settings, and the scan's size and time. It keeps the rows of
    other scans that were done into the same folder.

    Raises:
        InputError: when the folder has maps of these names that are of other scans, weights or settings, or another inference
            is writing to it; when the table is removed meanwhile; at the end, naming the scans that were refused or failed.
    """
    dataset = evaluator.data_loader.dataset
    scans = named(dataset.data)
    settings = fingerprint(evaluator.network, evaluator.inferer, dataset.transform, postprocessing)
    made_by = {"weights": file_digest(weights), "settings": settings}
    check = {"num_classes": 1, "in_channels": in_channels, "limits": limits_of(limits)}
    lock = lock_folder(output_dir, "inference", "--output_dir") if idist.get_rank() == 0 else None
    try:
        table = _Table(Path(output_dir), made_by, check)
        rest = table.left_of(scans, overwrite)
        dataset.data = rest[idist.get_rank() :: idist.get_world_size()]
        say_how_to_go_on("scans that are done are kept; the same command goes on with the others")
        with tqdm(total=len(dataset.data), desc="scans", unit="scan", disable=True if idist.get_rank() else None) as table.bar:
            run_scans(evaluator, listener=table)
        table.finish(scans)
        say_how_to_go_on()
    finally:
        if lock is not None:
            lock.release(force=True)


class _Table(Listener):
    """``cohort.csv``: a row a scan, written whole after each. Processes after the first have ``cohort.RANK.csv`` meanwhile."""

    COLUMNS = ("scan", "name", "status", "reason", "seconds", "voxels", "files", "weights", "settings", "stamp")
    FILES = " / "  # between names of files, which cannot hold it
    SHOWN = 50  # rows in the log

    def __init__(self, folder: Path, made_by: dict[str, str], check: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "cohort.csv"
        self.own = folder / f"cohort.{idist.get_rank()}.csv" if idist.get_rank() else self.path
        self.made_by = made_by
        self.check = check
        self.bar: Any = None
        self.counts: Counter[str] = Counter()
        self.started = 0.0
        self.written = False
        self._merge()  # what a killed run's processes left
        self.rows = self._read(self.path)

    # --- files

    def _merge(self) -> None:
        idist.barrier()
        if idist.get_rank() == 0:
            parts = sorted(self.folder.glob("cohort.[0-9]*.csv"))
            if parts:
                self.rows = self._read(self.path)
                for part in parts:
                    self.rows.update(self._read(part))
                self._write()
                for part in parts:
                    part.unlink()
        idist.barrier()

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        if not path.is_file():
            return {}
        try:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it, and all scans are done anew") from error
        if rows and rows[0].keys() != set(self.COLUMNS):
            raise InputError(f"{path} is no table of a cohort; give another --output_dir, or move it away")
        return {row["name"]: row for row in rows}

    def _write(self) -> None:
        if self.written and not self.own.is_file():
            raise OutputLost(f"{self.own} was removed while it was written, with label maps perhaps; start it again")
        self.written = True
        with atomic_write(self.own) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())

    def _has_files(self, row: Mapping[str, Any] | None) -> bool:
        files = row["files"].split(self.FILES) if row and row["files"] else []
        return bool(files) and all((self.folder / f).is_file() for f in files)

    # --- before

    def left_of(self, scans: Sequence[dict[str, Any]], overwrite: bool) -> list[dict[str, Any]]:
        """The scans that are not done yet; rows of the others are marked as skipped."""
        rest, others, changed = [], [], 0
        for scan in scans:
            row = self.rows.get(scan["name"])
            if overwrite or row is None or not self._has_files(row) or row["status"] not in ("done", "skipped"):
                rest.append(scan)
                continue
            found = {"scan": os.path.realpath(row["scan"]), **{k: row[k] for k in self.made_by}}
            differs = [k for k, v in {"scan": os.path.realpath(scan["image"]), **self.made_by}.items() if found[k] != v]
            if differs:
                what = f"of {row['scan']}" if differs[0] == "scan" else f"made with other {' and '.join(differs)}"
                others.append(f"{self.folder / row['files'].split(self.FILES)[0]} is {what}")
            elif row["stamp"] != _stamp(scan["image"]):
                changed += 1
                rest.append(scan)
            else:
                row["status"] = "skipped"
        if others:
            raise InputError(
                f"{len(others)} of {len(scans)} scans have label maps of another run: {others[0]}; give another --output_dir, "
                "or --overwrite true"
            )
        if changed:
            logger.warning("%d scan(s) have changed since they were done, and are done again", changed)
        if len(rest) < len(scans):
            logger.info("%d of %d scans are done already, by %s, and skipped", len(scans) - len(rest), len(scans), self.path)
        return rest

    # --- meanwhile

    def refuse(self, case: dict[str, Any]) -> bool:
        self.started = time.perf_counter()
        try:
            problem = find_problem(case, **self.check)
        except Exception as error:  # whatever else one file does, the others are usable
            problem = f"{case['image']}: cannot be checked ({type(error).__name__}: {error}); one readable file is needed"
        if problem is not None:
            logger.error("refused: %s", problem)
            self._add(case, "refused", problem)
        return problem is not None

    def failed(self, case: dict[str, Any], reason: str) -> None:
        super().failed(case, reason)
        self._add(case, "failed", reason)

    def done(self, cases: list[dict[str, Any]], output: Any) -> None:
        outputs = output if isinstance(output, list) else [output] * len(cases)
        for case, found in zip(cases, outputs):
            metas = [getattr(value, "meta", {}) for value in found.values()]
            saved = [meta.get(key) for meta in metas for key in ("saved_to", "dicom_seg")]
            files = self.FILES.join(sorted({os.path.relpath(path, self.folder) for path in saved if path}))
            remark = "; ".join({meta["remark"] for meta in metas if meta.get("remark")})
            seconds = f"{(time.perf_counter() - self.started) / len(cases):.3f}"
            voxels = found["pred"][0].numel() if "pred" in found else ""
            self._add(case, "done", remark, seconds=seconds, voxels=voxels, files=files)

    def _add(self, case: dict[str, Any], status: str, reason: str, **figures: Any) -> None:
        row = {
            "scan": os.path.abspath(case["image"]),
            "name": case["name"],
            "status": status,
            "reason": " ".join(reason.split()),
        }
        row |= {"stamp": _stamp(case["image"]), **self.made_by}
        self.rows[case["name"]] = dict.fromkeys(self.COLUMNS, "") | row | figures
        self._write()
        self.counts[status] += 1
        self.bar.update()
        lost = self.counts["refused"] + self.counts["failed"]
        self.bar.set_postfix_str(f"{self.counts['done']} done, {lost} failed, {self.bar.total - self.bar.n} left")

    # --- after

    def finish(self, scans: Sequence[dict[str, Any]]) -> None:
        self._write()  # those that were skipped
        self._merge()
        if idist.get_rank():
            return
        found = self._read(self.path)
        rows = [found.pop(scan["name"]) for scan in scans]
        for row in rows:
            if row["status"] in ("done", "skipped") and not self._has_files(row):
                row.update(status="failed", reason="its files were removed while others were done")
        self.rows = found | {row["name"]: row for row in rows}  # in the scans' order, whoever did them
        self._write()
        counts = Counter(row["status"] for row in rows)
        told = ", ".join(f"{counts[s]} {s}" for s in ("done", "skipped", "refused", "failed") if counts[s])
        shown = rows if len(rows) <= self.SHOWN else [r for r in rows if r["status"] in ("refused", "failed")][: self.SHOWN]
        width = max([len(row["name"]) for row in shown], default=0)
        lines = [
            f"{row['name']:{width}}  {row['status']:7}  {row['seconds'] or '-':>8} s  {row['voxels'] or '-':>10} voxels  "
            f"{row['reason']}".rstrip()
            for row in shown
        ]
        logger.info("%d scans: %s; the table is %s\n%s", len(rows), told, self.path, "\n".join(lines))
        raise_if_left_out(scans, [scan for scan, row in zip(scans, rows) if row["status"] in ("done", "skipped")])


def _stamp(scan: str) -> str:
    """Size and time of a scan's file, or of all files beside a series'."""
    try:
        files = list(os.scandir(Path(scan).parents[1])) if is_dicom_scan(scan) else [Path(scan)]
        stats = [file.stat() for file in files if file.is_file()]
    except OSError:
        return ""
    return f"{sum(s.st_size for s in stats)} {max((s.st_mtime_ns for s in stats), default=0)}"
