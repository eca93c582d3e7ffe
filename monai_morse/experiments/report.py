"""``python -m monai_morse report``: the paper's tables from the runs of a sweep, each ``run.json`` + ``metrics.csv``.

Runs that differ in fold and seed alone are one row, named by the settings in which it differs from most runs. A row's figures
are means over its runs; its difference to the baseline, or to another of the systems, is paired: the same fold, seed and case,
and the same of all settings that matter to the baseline. Other baselines, e.g. a wider one, are compared with the most usual.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import multimode
from textwrap import fill
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from monai_morse.config import check_choice
from monai_morse.data import atomic_write
from monai_morse.errors import InputError
from monai_morse.experiments.diagnostics import boundary_errors, draw_curves
from monai_morse.experiments.sweep import read_run

__all__ = ["Difference", "Row", "Run", "paired_difference", "read_runs", "report", "rows_of"]

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
REPEATS = ("fold", "seed")
# settings that only some systems depend on; all others matter to the bare backbone too
OF_EXPERTS = ("width", "mixture")
OF_RENDERERS = ("schedule", "lambda_rend", "coordinates", "image_patch", "patch_norm", "head", "points")
OF_BOTH = ("num_experts", "coarse", "preset", "read_features")
ABLATIONS = {"alpha": "Table 3, stochastic rate", "num_experts": "Table 3, N", "schedule": "Table 4, lambda_t"}

FIGURES = ("DSC", "Jaccard", "95HD", "ASD")
METRICS = {
    "paper": ("paper_dice", "paper_jaccard", "paper_hd95", "paper_asd"),
    "monai": ("dice", "jaccard", "hd95_mm", "asd_mm"),
}
SCALE = (100, 100, 1, 1)
DEFINITION = {
    "paper": "the paper's (its released code's, by medpy): DSC and Jaccard in %, 95HD and ASD in voxels, 95HD of both "
    "directions together, ASD from prediction to truth; absent structures that are predicted count as 1, 1, 0, 0, empty "
    "predictions as 0",
    "monai": "MONAI's: DSC and Jaccard in %, 95HD and ASD in mm, 95HD the larger of two directions, ASD symmetric; distances "
    "of structures that are missed or made up do not exist and are left out",
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation: values by (case, class), the four figures in the units of the tables."""

    folder: Path
    bundle: str
    settings: dict[str, Any]
    values: dict[tuple[str, str], tuple[float, ...]]

    @property
    def system(self) -> tuple[str, str]:
        return str(self.settings.get("experts")), str(self.settings.get("renderer"))

    @property
    def repeat(self) -> tuple[Any, ...]:
        return tuple(self.settings.get(name) for name in REPEATS)

    def by_class(self) -> dict[str, np.ndarray]:
        """The figures of each class, means over the cases where they exist."""
        found = defaultdict(list)
        for (_, name), values in self.values.items():
            found[name].append(values)
        return {name: _mean(values) for name, values in found.items()}

    def by_case(self) -> dict[str, np.ndarray]:
        """The figures of each case, means over its classes."""
        found = defaultdict(list)
        for (case, _), values in self.values.items():
            found[case].append(values)
        return {case: _mean(values) for case, values in found.items()}

    def average(self) -> np.ndarray:
        """Means over the classes of means over the cases, as in the released evaluation."""
        return _mean(list(self.by_class().values()))


def _mean(values: Any) -> np.ndarray:
    """Mean over the first axis of what exists."""
    table = np.asarray(values, dtype=float)
    count = np.isfinite(table).sum(0)
    total = np.where(np.isfinite(table), table, 0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


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
        return _mean(values), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)

    @cached_property
    def _differences(self) -> list[Difference | None]:
        if self.runs is self.baseline:
            return [None] * len(FIGURES)
        return [paired_difference(self.runs, self.baseline, figure) for figure in range(len(FIGURES))]

    def difference(self, figure: int) -> Difference | None:
        return self._differences[figure]


def read_runs(folder: Path, metric: str = "paper") -> tuple[list[Run], list[str]]:
    """The finished runs in a folder, at any depth, and a line for each of the others.

    Raises:
        InputError: where no run is, for another metric, or a ``metrics.csv`` without its columns.
    """
    check_choice("metric", metric, METRICS)
    runs, others = [], []
    for path in sorted(folder.rglob("run.json")):
        record = read_run(path.parent)
        figures = path.with_name("metrics.csv")
        status = record.get("status", "done")
        if status != "done" or not figures.is_file():
            others.append(f"{path.parent.relative_to(folder)}: {'failed' if status == 'failed' else f'unfinished ({status})'}")
            continue
        with open(figures, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"case", "class", *METRICS[metric]} <= rows[0].keys():
            raise InputError(f"{figures} has no columns {', '.join(METRICS[metric])}; evaluate again, or take another --metric")
        values = {
            (r["case"], r["class"]): tuple(float(r[n] or math.nan) * s for n, s in zip(METRICS[metric], SCALE)) for r in rows
        }
        # network_def#patch_norm is patch_norm, whether a bundle has a word of its own for it or not
        settings = {name.removeprefix("network_def#"): value for name, value in record.get("settings", {}).items()}
        runs.append(Run(path.parent, record.get("bundle", "?"), settings, values))
    if not runs and not others:
        raise InputError(f"no run.json in {folder} or below; give the --out folder of a sweep")
    return runs, others


def _matters(name: str, system: tuple[str, str]) -> bool:
    """Whether a setting is of any effect on a system."""
    name = name.split("#")[0]
    experts, renderer = (word != "none" for word in system)
    if name == "alpha":
        return system[0] == "stochastic"
    if name in OF_EXPERTS:
        return experts
    if name in OF_RENDERERS:
        return renderer
    return experts or renderer or name not in OF_BOTH


def _key(value: Any) -> str:
    return repr(value)


def _usual(values: Sequence[Any]) -> Any:
    """What most runs have, ``None`` if it is not one value alone."""
    most = multimode(map(_key, values))
    return next(v for v in values if _key(v) == most[0]) if len(most) == 1 else None


def _words(name: str, value: Any) -> str:
    return f"{name.split('#')[-1]} {'not set' if value is None else value}"


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
        if n not in (*REPEATS, "experts", "renderer", "backbone") and len({_key(r.settings.get(n)) for r in runs}) > 1
    ]
    usual = {n: _usual([run.settings.get(n) for run in runs if _matters(n, run.system)]) for n in differ}
    shared_words = ", ".join(_words(n, value) for n, value in usual.items() if value is not None)
    notes = [f"rows have, unless their names say otherwise: {shared_words}"] if shared_words else []
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = tuple((n, _key(run.settings.get(n))) for n in differ if _matters(n, run.system))
        group = groups.setdefault((run.system, key), [])
        same = next((r for r in group if r.repeat == run.repeat), None)
        if same is None:
            group.append(run)
        else:
            notes.append(f"{run.folder.name}: left out, the same as {same.folder.name}")

    def order(item: tuple) -> int:
        systems = list(SYSTEMS)
        return systems.index(item[0][0]) if item[0][0] in systems else len(systems)

    plain = next((g for (s, e), g in groups.items() if s == reference and all(v == _key(usual[n]) for n, v in e)), None)
    rows = []
    for (system, key), group in sorted(groups.items(), key=order):
        settings = {n: group[0].settings.get(n) for n in differ if _matters(n, system)}
        apart = [n for n, value in settings.items() if value != usual[n]]
        name = ", ".join([SYSTEMS.get(system, " + ".join(system)), *(_words(n, settings[n]) for n in apart)])
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


def _number(mean: float, deviation: float = math.nan, digits: int = 2) -> str:
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if math.isfinite(deviation) else "")


def _signed(d: Difference | None) -> list[str]:
    if d is None:
        return ["-", "-", "-"]
    apart = f"{min(d.runs):+.2f} to {max(d.runs):+.2f}" if len(d.runs) > 1 else "-"
    return [f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]", apart, f"{d.p:.2g}"]


@dataclass(frozen=True)
class Table:
    """What is printed."""

    title: str
    header: list[str]
    cells: list[list[str]]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.header)} |", "| --- " * len(self.header) + "|"]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.cells])

    def latex(self) -> str:
        def line(cells: Sequence[str]) -> str:
            text = " & ".join(cells)
            for plain, tex in (
                ("%", r"\%"),
                ("_", r"\_"),
                ("#", r"\#"),
                ("±", r"$\pm$"),
                ("Δ", r"$\Delta$"),
                ("↑", r"$\uparrow$"),
            ):
                text = text.replace(plain, tex)
            return text.replace("↓", r"$\downarrow$") + r" \\"

        columns = "l" + "r" * (len(self.header) - 1)
        body = [r"\begin{table}", rf"\caption{{{line([self.title])[:-3]}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        body += [line(self.header), r"\midrule", *map(line, self.cells), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        return "\n".join(body)


def _main_table(title: str, rows: Sequence[Row]) -> Table:
    classes = list(dict.fromkeys(c for row in rows for run in row.runs for c in run.by_class()))
    runs, cases = max(len(r.runs) for r in rows), max(r.cases for r in rows)
    arrows = [f"{figure} {'↑' if i < 2 else '↓'}" for i, figure in enumerate(FIGURES)]
    header = ["Method", *arrows, *classes, "ΔDSC [95 % CI]", "of single runs", "p", "runs", "cases"]
    cells = []
    for row in rows:
        average = row.mean_and_deviation(Run.average)
        dice = [_mean([run.by_class()[c][0] for run in row.runs if c in run.by_class()] or [math.nan]) for c in classes]
        counts = [f"{n} of {most}" if n < most else str(n) for n, most in ((len(row.runs), runs), (row.cases, cases))]
        figures = [_number(mean, deviation) for mean, deviation in zip(*average)]
        cells.append([row.name, *figures, *(_number(float(m)) for m in dice), *_signed(row.difference(0)), *counts])
    return Table(title, header, cells)


def _distances(title: str, rows: Sequence[Row], against: str) -> list[Table]:
    """Both distances' differences to the baseline, in % of its own too."""

    def cell(d: Difference | None) -> list[str]:
        if d is None:
            return ["-", "-"]
        share = f", {100 * d.mean / d.baseline:+.0f} %" if d.baseline else ""
        return [f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{share}", f"{d.p:.2g}"]

    cells = [[row.name, *cell(row.difference(2)), *cell(row.difference(3))] for row in rows if row.difference(3) is not None]
    header = ["Method", "Δ95HD [95 % CI]", "p", "ΔASD [95 % CI]", "p"]
    return [Table(f"{title}: distances, difference to {against}", header, cells)] if cells else []


def _ablation(name: str, title: str, rows: Sequence[Row]) -> list[Table]:
    """A table for each system whose rows differ in ``name`` alone."""
    groups = defaultdict(list)
    for row in rows:
        if row.settings.get(name) is not None:
            rest = tuple((n, _key(v)) for n, v in row.settings.items() if n != name)
            groups[row.system, rest].append(row)
    tables = []
    for (system, _), group in groups.items():
        if len(group) < 2:
            continue
        cells = []
        for row in sorted(group, key=lambda r: (isinstance(r.settings[name], str), r.settings[name])):
            average = list(zip(*row.mean_and_deviation(Run.average)))
            cells.append([str(row.settings[name]), _number(*average[0]), _number(*average[3]), str(len(row.runs))])
        others = [_words(n, group[0].settings[n]) for n in group[0].apart if n != name]
        of = ", ".join([SYSTEMS.get(system, " + ".join(system)).removeprefix("+ "), *others])
        tables.append(Table(f"{title}: {of}", [name, "DSC ↑", "ASD ↓", "runs"], cells))
    return tables


def _boundary_table(title: str, rows: Sequence[Row]) -> list[Table]:
    """Error rates by distance to the true boundary, coarse against rendered, of the rows whose runs counted them."""
    found = {row.name: boundary_errors([run.folder for run in row.runs]) for row in rows}
    found = {name: errors for name, errors in found.items() if errors}
    if not found:
        return []
    edges = sorted({e for errors in found.values() for e in errors})
    header = ["Method", "map"] + [f"{low:g} to {high:g} mm" if high < math.inf else f"> {low:g} mm" for low, high in edges]
    cells = []
    for name, errors in found.items():
        same = all(coarse == rendered for _, coarse, rendered in errors.values())
        for i, kind in ((2, "-"),) if same else ((1, "coarse"), (2, "rendered")):
            cells.append([name, kind, *(f"{errors[e][i]:.2f}" if e in errors else "-" for e in edges)])
    shares = next(iter(found.values()))
    cells.append(["share of all voxels", "", *(f"{shares[e][0]:.2f}" if e in shares else "-" for e in edges)])
    return [Table(f"{title}: wrong voxels in % by distance to the true boundary", header, cells)]


def _long_form(bundle: str, backbone: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All numbers of the tables and those that they leave out, a row a figure."""
    found = []
    for row in rows:
        average = row.mean_and_deviation(Run.average)
        for i, figure in enumerate(FIGURES):
            d = row.difference(i)
            line = {"bundle": bundle, "backbone": backbone, "method": row.name, "figure": figure, "runs": len(row.runs)}
            line |= {"cases": row.cases, "mean": average[0][i], "deviation": average[1][i]}
            line |= {n: getattr(d, n, "") for n in ("low", "high", "p")} | {"difference": d.mean if d else ""}
            line |= {"lowest_run": min(d.runs) if d else "", "highest_run": max(d.runs) if d else ""}
            found.append(line | {"pairs": d.cases if d else 0})
    return found


def _draw(path: Path, parts: dict[str, list[Row]], against: str) -> None:
    """Each row's difference to the baseline with its interval, and in dots those of its runs, DSC and 95HD."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {title: [r for r in rows if r.difference(0) is not None] for title, rows in parts.items()}
    shown = {title: rows for title, rows in shown.items() if rows}
    if not shown:
        path.unlink(missing_ok=True)
        return
    heights = [len(rows) + 2 for rows in shown.values()]
    figure = Figure(figsize=(10, 0.4 * sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row", height_ratios=heights)
    for axes, (title, rows) in zip(grid, shown.items()):
        for axis, i, better in zip(axes, (0, 2), ("right is better", "left is better")):
            for y, row in enumerate(reversed(rows)):
                d = row.difference(i)
                if d is not None:
                    axis.plot(d.runs, [y] * len(d.runs), ".", color="grey")
                    axis.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color="C0", capsize=3)
            axis.axvline(0, color="grey", linewidth=1)
            axis.set_yticks(range(len(rows)), [fill(row.name, 40) for row in reversed(rows)], fontsize=9)
            axis.set_ylim(-0.5, len(rows) - 0.5)
            axis.set_xlabel(f"{FIGURES[i]} - {against}'s ({better})", fontsize=9)
        axes[0].set_title(title, fontsize=9, loc="left")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def report(folder: Path, out: Path | None = None, metric: str = "paper", against: str = "Baseline") -> str:
    """Make the tables; write ``report.{md,csv,tex,png}``, ``report_curves.png`` and return the Markdown.

    Args:
        folder: with runs at any depth.
        out: where to write; default: ``folder``.
        metric: ``"paper"`` or ``"monai"``, whose definition of the figures is used.
        against: what differences are to, the baseline, another of the paper's systems, such as ``"IAR"``, or one row by its
            name in the table, such as ``"Baseline, max_epochs 200"``.

    Raises:
        InputError: see :func:`read_runs`; for a system or a row to compare with that there is not.
    """
    runs, notes = read_runs(folder, metric)
    out = out or folder
    by_part: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_part[run.bundle, str(run.settings.get("backbone", ""))].append(run)
    tables, lines, parts = [], [], {}
    for (bundle, backbone), members in sorted(by_part.items()):
        rows, more = rows_of(members, against)
        notes += more
        title = ", ".join(filter(None, (bundle, backbone)))
        parts[title] = rows
        tables.append(_main_table(f"{title} (as the paper's tables 1 and 2; classes: DSC)", rows))
        tables += _distances(title, rows, against)
        tables += _boundary_table(title, rows)
        tables += [t for name, words in ABLATIONS.items() for t in _ablation(name, f"{title}: {words}", rows)]
        lines += _long_form(bundle, backbone, rows)
    known = dict.fromkeys([*NAMES, *(row.name.removeprefix("+ ") for rows in parts.values() for row in rows)])
    check_choice("against", against.removeprefix("+ "), known)

    caption = (
        f"Figures are {DEFINITION[metric]}. Means ± standard deviations over runs (folds and seeds). Δ: mean difference to "
        f"{against} over the same fold, seed and case, with its bootstrap 95 % confidence interval over cases; p: Wilcoxon's "
        "signed-rank test, two-sided, not corrected for the number of rows. Cases are taken as independent. "
        "Neither knows how far trainings are apart: that is what the lowest and the highest difference of single runs are for."
    )
    text = "\n\n".join([*(t.markdown() for t in tables), caption, *(["\n".join(f"- {n}" for n in notes)] if notes else [])])
    latex = "\n\n".join(["% needs \\usepackage{booktabs}", *(t.latex() for t in tables), f"% {caption}"])
    for name, content in (("report.md", text), ("report.tex", latex)):
        with atomic_write(out / name) as partial:
            partial.write_text(content + "\n")
    columns = ["bundle", "backbone", "method", "figure", "runs", "cases", "mean", "deviation"]
    with atomic_write(out / "report.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "difference", "low", "high", "p", "lowest_run", "highest_run", "pairs"])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    _draw(out / "report.png", parts, against)
    folders = {title: {row.name: [run.folder for run in row.runs] for row in rows} for title, rows in parts.items()}
    draw_curves(out / "report_curves.png", folders)
    return text
