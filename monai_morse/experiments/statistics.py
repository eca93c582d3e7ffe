"""Rows of the paper's tables from runs, and their paired differences.

Runs that differ in fold and seed alone are one row, named by the settings in which it differs from most runs. A row's figures
are means over its runs; its difference to the baseline, or to another of the systems, is paired: the same fold, seed and case,
and the same of all settings that matter to the baseline. Other baselines, e.g. a wider one, are compared with the most usual.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import multimode
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from .runs import FIGURES, REPEATS, Run, finite_mean

__all__ = ["Difference", "Row", "paired_difference", "rows_of"]

SYSTEMS = {
    ("none", "none"): "Baseline",
    ("none", "pointrend"): "+ PointRend",
    ("none", "implicit_pointrend"): "+ Implicit PointRend",
    ("dense", "none"): "+ MoE",
    ("stochastic", "none"): "+ SMoE",
    ("none", "anatomical"): "+ IAR",
    ("dense", "anatomical"): "+ IAR+MoE",
    ("stochastic", "anatomical"): "+ MORSE",
}
NAMES = {name.removeprefix("+ "): system for system, name in SYSTEMS.items()}
# settings that only some systems depend on; all others matter to the bare backbone too
OF_RENDERERS = ("schedule", "lambda_rend", "coordinates", "image_patch", "patch_norm", "head", "points")
OF_BOTH = ("num_experts", "coarse", "preset", "read_features", "mixture")  # all of a mixture: it may hold coarse


@dataclass(frozen=True)
class Difference:
    """Of a row to its baseline, one figure: mean over cases, bounds of its 95 % confidence interval, Wilcoxon's p; the
    baseline's mean over the same pairs; and the mean over the cases of each run, which tells how far trainings are apart."""

    mean: float
    low: float
    high: float
    p: float
    cases: int
    baseline: float
    runs: tuple[float, ...]


def paired_difference(ours: Sequence[Run], baseline: Sequence[Run], figure: int) -> Difference | None:
    """The mean over cases of ours - baseline; a case's repeats (other seeds) are averaged first.

    Pairs have the same fold, seed and case. The interval is the percentile bootstrap's over cases, 10,000 draws of a fixed
    seed; p is of Wilcoxon's signed-rank test, two-sided. Cases of one patient are taken as independent, which they are not.

    Returns:
        ``None`` where there is no pair.
    """
    theirs = {run.repeat: run.by_case() for run in baseline}
    pairs, bases, by_run = defaultdict(list), defaultdict(list), defaultdict(list)
    for run in ours:
        for case, values in run.by_case().items():
            other = theirs.get(run.repeat, {}).get(case)
            if other is not None and np.isfinite(values[figure] - other[figure]):
                pairs[case].append(values[figure] - other[figure])
                bases[case].append(other[figure])
                by_run[run.repeat].append(values[figure] - other[figure])
    if not pairs:
        return None
    delta = np.array([np.mean(values) for _, values in sorted(pairs.items())])
    draws = np.random.default_rng(0).integers(0, len(delta), (10_000, len(delta)))
    low, high = np.percentile(delta[draws].mean(1), (2.5, 97.5))
    p = float(wilcoxon(delta).pvalue) if np.any(delta != 0) else 1.0
    base = float(np.mean([np.mean(values) for values in bases.values()]))
    means = tuple(float(np.mean(values)) for values in by_run.values())
    return Difference(float(delta.mean()), float(low), float(high), p, len(delta), base, means)


@dataclass(frozen=True)
class Row:
    """Runs that differ in fold and seed alone."""

    name: str
    settings: dict[str, Any]  # those that are not the same in all runs and matter to the row
    apart: list[str]  # those of them in which it differs from most runs
    runs: list[Run]
    baseline: list[Run]

    @property
    def system(self) -> tuple[str, str]:
        return self.runs[0].system

    @property
    def cases(self) -> int:
        return len({(run.repeat, case) for run in self.runs for case in run.by_case()})

    def mean_and_deviation(self, of: Callable[[Run], Any]) -> tuple[np.ndarray, np.ndarray]:
        values = np.array([of(run) for run in self.runs], dtype=float)
        return finite_mean(values), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)

    @cached_property
    def _differences(self) -> list[Difference | None]:
        if self.runs is self.baseline:
            return [None] * len(FIGURES)
        return [paired_difference(self.runs, self.baseline, figure) for figure in range(len(FIGURES))]

    def difference(self, figure: int) -> Difference | None:
        return self._differences[figure]


def _matters(name: str, system: tuple[str, str]) -> bool:
    """Whether a setting is of any effect on a system."""
    experts, renderer = (word != "none" for word in system)
    if name == "alpha":
        return system[0] == "stochastic"
    if name == "width" or name.startswith("mixture#"):
        return experts
    if name.split("#")[0] in OF_RENDERERS:
        return renderer
    return experts or renderer or name.split("#")[0] not in OF_BOTH


def key_of(value: Any) -> str:
    """What tells a setting's values apart: they may be lists."""
    return repr(value)


def _usual(values: Sequence[Any]) -> Any:
    """What most runs have, ``None`` if it is not one value alone."""
    most = multimode(map(key_of, values))
    return next(v for v in values if key_of(v) == most[0]) if len(most) == 1 else None


def describe(name: str, value: Any) -> str:
    """A setting in a row's name."""
    return f"{name.split('#')[-1]} {'not set' if value is None else value}"


def system_name(system: tuple[str, str]) -> str:
    """As in the paper's tables, or its two words."""
    return SYSTEMS.get(system, " + ".join(system))


def rows_of(runs: Sequence[Run], against: str = "Baseline") -> tuple[list[Row], list[str]]:
    """Rows of the runs of one bundle and backbone, the paper's systems first; and lines for what their names leave out and
    for each run left out as a repeat. Differences are to a system of ``NAMES`` with the same settings, or to one row by its
    whole name.
    """
    reference = NAMES.get(against, NAMES["Baseline"])
    names = dict.fromkeys(n for run in runs for n in run.settings)
    differ = [
        n
        for n in names
        if n not in (*REPEATS, "experts", "renderer", "backbone") and len({key_of(r.settings.get(n)) for r in runs}) > 1
    ]
    usual = {n: _usual([run.settings.get(n) for run in runs if _matters(n, run.system)]) for n in differ}
    shared_words = ", ".join(describe(n, value) for n, value in usual.items() if value is not None)
    notes = [f"rows have, unless their names say otherwise: {shared_words}"] if shared_words else []
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = tuple((n, key_of(run.settings.get(n))) for n in differ if _matters(n, run.system))
        group = groups.setdefault((run.system, key), [])
        same = next((r for r in group if r.repeat == run.repeat), None)
        if same is None:
            group.append(run)
        else:
            notes.append(f"{run.name}: left out, the same as {same.name}")

    def order(item: tuple) -> int:
        systems = list(SYSTEMS)
        return systems.index(item[0][0]) if item[0][0] in systems else len(systems)

    plain = next((g for (s, e), g in groups.items() if s == reference and all(v == key_of(usual[n]) for n, v in e)), None)
    rows = []
    for (system, key), group in sorted(groups.items(), key=order):
        settings = {n: group[0].settings.get(n) for n in differ if _matters(n, system)}
        apart = [n for n, value in settings.items() if value != usual[n]]
        name = ", ".join([system_name(system), *(describe(n, settings[n]) for n in apart)])
        # what a run does not set is as telling as what it sets
        shared = tuple((n, v) for n, v in key if _matters(n, reference))
        baseline = (plain or group) if system == reference else groups.get((reference, shared), [])
        rows.append(Row(name, settings, apart, group, baseline))
    if against not in NAMES:
        base = next((row.runs for row in rows if row.name.removeprefix("+ ") == against.removeprefix("+ ")), [])
        rows = [replace(row, baseline=base) for row in rows]
    if not any(row.runs is row.baseline for row in rows):
        notes.append(f"there is no run of {against}, to which differences would be")
    return rows, notes
