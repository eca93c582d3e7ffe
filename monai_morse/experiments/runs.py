"""Runs of a sweep as data: read from their folders or from one table of an experiment, and written as such a table.

A run's folder has ``run.json``, ``metrics.csv`` and, where there are any, ``curve.csv`` and ``boundary.csv``. A table has the
same: ``NAME.csv.gz`` has a row a run, case and class, with the run's settings and figures; ``NAME.curves.csv.gz`` and
``NAME.boundary.csv.gz`` lie beside it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monai_morse.config import check_choice
from monai_morse.data import atomic_write
from monai_morse.errors import InputError

__all__ = ["Run", "read_run", "read_runs", "save_runs", "write_curve", "write_run"]

FIGURES = ("DSC", "Jaccard", "95HD", "ASD")
METRICS = {
    "paper": ("paper_dice", "paper_jaccard", "paper_hd95", "paper_asd"),
    "monai": ("dice", "jaccard", "hd95_mm", "asd_mm"),
}
SCALE = (100, 100, 1, 1)
REPEATS = ("fold", "seed")

FILES = {"metrics.csv": ".csv.gz", "curve.csv": ".curves.csv.gz", "boundary.csv": ".boundary.csv.gz"}  # of a run, of a table
# options of the network's groups that bundles name at the left margin, or that older networks took by themselves
UNGROUPED = {"mixture": ("width", "coarse"), "head": ("image_patch", "patch_norm", "read_features")}
WORDS = {"train_points": "points#num_train", "eval_points": "points#num_eval"}  # what bundles call them

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Args:
        name: its folder, below the one that was read.
        bundle: the folder's name of the bundle that was trained.
        settings: what it was trained with, by name.
        values: the four ``FIGURES`` by (case, class), in the units of the tables.
        curve: (iteration, validation Dice).
        boundary: wrong voxels by distance to the true boundary, see :func:`monai_morse.metrics.boundary_errors`.
    """

    name: str
    bundle: str
    settings: dict[str, Any]
    values: dict[tuple[str, str], tuple[float, ...]]
    curve: list[tuple[int, float]] = field(default_factory=list)
    boundary: list[tuple[float, float, int, int, int]] = field(default_factory=list)

    @property
    def system(self) -> tuple[str, str]:
        """Its experts and its renderer."""
        return str(self.settings.get("experts")), str(self.settings.get("renderer"))

    @property
    def repeat(self) -> tuple[Any, ...]:
        """Its fold and its seed."""
        return tuple(self.settings.get(name) for name in REPEATS)

    def by_class(self) -> dict[str, np.ndarray]:
        """The figures of each class, means over the cases where they exist."""
        found = defaultdict(list)
        for (_, name), values in self.values.items():
            found[name].append(values)
        return {name: finite_mean(values) for name, values in found.items()}

    def by_case(self) -> dict[str, np.ndarray]:
        """The figures of each case, means over its classes."""
        found = defaultdict(list)
        for (case, _), values in self.values.items():
            found[case].append(values)
        return {case: finite_mean(values) for case, values in found.items()}

    def average(self) -> np.ndarray:
        """Means over the classes of means over the cases, as in the released evaluation."""
        return finite_mean(list(self.by_class().values()))


def finite_mean(values: Any) -> np.ndarray:
    """Mean over the first axis of what exists; NaN where nothing does."""
    table = np.asarray(values, dtype=float)
    count = np.isfinite(table).sum(0)
    total = np.where(np.isfinite(table), table, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def read_run(folder: Path) -> dict[str, Any]:
    """The record of a run, its folder's ``run.json``, or nothing.

    Raises:
        InputError: when it cannot be read.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove the run's folder to run it anew") from error
    if not isinstance(run, dict):
        raise InputError(f"{path} is not the record of a run; remove the run's folder to run it anew")
    return run


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record to its folder's ``run.json``."""
    with atomic_write(folder / "run.json") as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")


def write_curve(folder: Path) -> Path | None:
    """Write a training's ``curve.csv`` from its TensorBoard events: iteration, train_loss, val_mean_dice; a row an epoch.

    The loss is the epoch's mean; Dice is blank where the epoch was not validated.

    Args:
        folder: with the events of one training, of all its parts where it was resumed.

    Returns:
        the file, or ``None`` where the events lack the loss or a validation.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if not {"train_loss", "val_mean_dice"} <= set(events.Tags()["scalars"]):
        return None
    losses = {e.step: e.value for e in events.Scalars("train_loss")}
    dice = {e.step: e.value for e in events.Scalars("val_mean_dice")}
    length = max(losses) // max(dice)  # the last epoch is always validated
    by_epoch = defaultdict(list)
    for iteration, loss in losses.items():
        by_epoch[-(-iteration // length)].append(loss)
    with atomic_write(folder / "curve.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "train_loss", "val_mean_dice"])
        for epoch, values in sorted(by_epoch.items()):
            value = dice.get(epoch)
            writer.writerow([epoch * length, f"{np.mean(values):.6f}", "" if value is None else f"{value:.6f}"])
    return folder / "curve.csv"


class _Raw(NamedTuple):
    """What a run's folder holds, or a table of it: cells are text."""

    place: str  # for errors
    name: str
    record: dict[str, Any]
    files: dict[str, Rows]


def read_runs(source: str | Path, metric: str = "paper") -> tuple[list[Run], list[str]]:
    """The finished runs of an experiment, and a line for each of the others.

    Args:
        source: folder with runs at any depth, or a table of :func:`save_runs`.
        metric: ``"paper"`` (default) or ``"monai"``, whose definition of the figures is read.

    Raises:
        InputError: where no run is, for another metric, figures that are missing or no numbers, or a table that cannot be read.
    """
    check_choice("metric", metric, METRICS)
    found = _read(Path(source))
    names = dict.fromkeys(name for raw in found for name in _settings(raw.record))  # in one order, whatever was read
    runs, others = [], []
    for raw in found:
        status, figures = raw.record.get("status", "done"), raw.files["metrics.csv"]
        if status != "done" or not figures:
            others.append(f"{raw.name}: {'failed' if status == 'failed' else f'unfinished ({status})'}")
            continue
        if not {"case", "class", *METRICS[metric]} <= figures[0].keys():
            needed = ", ".join(METRICS[metric])
            raise InputError(f"{raw.place} has no columns {needed}; evaluate again, or take another --metric")
        for name, columns in (("metrics.csv", ("case", "class")), ("boundary.csv", ("case", "from_mm", "to_mm"))):
            rows = Counter(tuple(row.get(column, "") for column in columns) for row in raw.files[name])
            twice = next((row for row, count in rows.items() if count > 1), None)
            if twice:
                raise InputError(f"{name} of {raw.place}: several rows of {', '.join(twice)}; cases need names: evaluate again")
        settings = _settings(raw.record)
        try:
            values = {
                (r["case"], r["class"]): tuple(float(r[n] or math.nan) * s for n, s in zip(METRICS[metric], SCALE))
                for r in figures
            }
            curve = [(int(r["iteration"]), float(r["val_mean_dice"])) for r in raw.files["curve.csv"] if r["val_mean_dice"]]
            boundary = [
                (float(r["from_mm"]), float(r["to_mm"]), int(r["voxels"]), int(r["coarse_wrong"]), int(r["rendered_wrong"]))
                for r in raw.files["boundary.csv"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{raw.place}, or a file beside it, holds no figures of a run ({error}); evaluate again"
            ) from error
        settings = {name: settings[name] for name in names if name in settings}
        runs.append(Run(raw.name, raw.record.get("bundle", "?"), settings, values, curve, boundary))
    return runs, others


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, each by one name, whether its bundle has a word for it or not and wherever the network takes it."""

    def short(name: str) -> str:
        name = WORDS.get(name, name.removeprefix("network_def#"))
        group, _, word = name.rpartition("#")
        return word if word in UNGROUPED.get(group, ()) else name

    settings = record.get("settings", {})
    found = {short(name): value for name, value in settings.items()}
    # what is said to the network itself counts, whatever a bundle's word says
    return found | {short(name): value for name, value in settings.items() if name.startswith("network_def#")}


def _read(source: Path) -> list[_Raw]:
    found = _read_table(source) if source.name.endswith(".csv.gz") else _read_folder(source)
    if not found:
        raise InputError(f"no run.json in {source} or below; give the --out folder of a sweep, or a table NAME.csv.gz")
    return found


def _read_folder(folder: Path) -> list[_Raw]:
    found = []
    for path in sorted(folder.rglob("run.json")):
        files: dict[str, Rows] = {}
        for name in FILES:
            files[name] = []
            if path.with_name(name).is_file():
                with open(path.with_name(name), newline="") as file:
                    files[name] = list(csv.DictReader(file))
        name = path.parent.relative_to(folder).as_posix()
        place = str(path.with_name("metrics.csv"))
        found.append(_Raw(place, path.parent.name if name == "." else name, read_run(path.parent), files))
    return found


def _read_table(path: Path) -> list[_Raw]:
    if not path.is_file():
        raise InputError(f"no table {path}; make it of a folder of runs: report RUNS --save {path}")
    by_run: dict[str, Rows] = defaultdict(list)
    for row in _read_csv_gz(path, {"run", "record", "case", "class"}):
        by_run[row["run"]].append(row)
    beside: dict[str, dict[str, Rows]] = {name: defaultdict(list) for name in FILES}
    for name in ("curve.csv", "boundary.csv"):
        other = _beside(path, name)
        for row in _read_csv_gz(other, {"run"}) if other.is_file() else []:
            beside[name][row.pop("run")].append(row)
    found = []
    for name, rows in by_run.items():
        record = _value(rows[0]["record"])
        if not isinstance(record, dict):
            raise InputError(f"{path} has no record of run {name}, got {record!r}; make it anew: report RUNS --save {path}")
        record["settings"] = {
            n.removeprefix("settings."): _value(v) for n, v in rows[0].items() if n.startswith("settings.") and v
        }
        figures = [
            {n: v for n, v in row.items() if n not in ("run", "record") and not n.startswith("settings.")} for row in rows
        ]
        files = {"metrics.csv": [row for row in figures if row["case"]]}
        files |= {n: beside[n].get(name, []) for n in ("curve.csv", "boundary.csv")}
        found.append(_Raw(f"{path}, run {name}", name, record, files))
    return found


def save_runs(source: str | Path, path: str | Path) -> None:
    """Make one table of the runs of an experiment, with curves and boundary errors beside it, for :func:`read_runs`.

    Columns are run, ``settings.NAME`` for each setting, record (what else ``run.json`` has), case, class and the figures of
    ``metrics.csv``. A string is as it is, any other setting in JSON; blank cells were not set. A run without figures is one
    row without a case. Equal runs give equal files, byte by byte.

    Args:
        source: folder with runs at any depth, or such a table.
        path: to write, named ``NAME.csv.gz``; ``NAME.curves.csv.gz`` and ``NAME.boundary.csv.gz`` are written, or removed.

    Raises:
        InputError: where no run is, for another name, or runs whose figures have other columns than the first's.
    """
    path = Path(path)
    if not path.name.endswith(".csv.gz"):
        raise InputError(f"a table of runs is named NAME.csv.gz, got {path}")
    found = _read(Path(source))
    names = dict.fromkeys(name for raw in found for name in raw.record.get("settings", {}))
    tables: dict[str, Rows] = {name: [] for name in FILES}
    for name, rows in tables.items():
        columns = next((list(raw.files[name][0]) for raw in found if raw.files[name]), ["case", "class"])
        for raw in found:
            own = raw.files[name]
            if own and list(own[0]) != columns:
                raise InputError(f"{name} of {raw.place} has not the columns of the first run's, {', '.join(columns)}")
            lead = {"run": raw.name}
            if name == "metrics.csv":
                settings = raw.record.get("settings", {})
                lead |= {f"settings.{n}": _cell(settings[n]) if n in settings else "" for n in names}
                lead["record"] = json.dumps({n: value for n, value in raw.record.items() if n != "settings"})
                own = own or [dict.fromkeys(columns, "")]
            rows += [lead | row for row in own]
    for name, rows in reversed(tables.items()):  # the table itself last
        _write_csv_gz(_beside(path, name), rows)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(path.name.removesuffix(".csv.gz") + FILES[name])


def _cell(value: Any) -> str:
    """A value as text that :func:`_value` reads back."""
    if isinstance(value, str) and value and _value(value) == value:
        return value
    return json.dumps(value)


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _read_csv_gz(path: Path, needed: Iterable[str]) -> Rows:
    try:
        with gzip.open(path, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); make it anew: report RUNS --save NAME.csv.gz") from error
    if not rows or not set(needed) <= rows[0].keys():
        raise InputError(f"{path} has no rows with {', '.join(sorted(needed))}; a table of runs is made by report RUNS --save")
    return rows


def _write_csv_gz(path: Path, rows: Rows) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    text, packed = io.StringIO(), io.BytesIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:  # no name and no time: the same bytes for the same rows
        file.write(text.getvalue().encode())
    with atomic_write(path) as partial:
        partial.write_bytes(packed.getvalue())
