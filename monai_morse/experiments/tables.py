"""The paper's tables of rows, to print in Markdown and LaTeX; and all their numbers as data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monai_morse.metrics import boundary_errors

from .runs import FIGURES, Run, finite_mean
from .statistics import Difference, Row, describe, key_of, system_name

__all__ = ["LONG_FORM", "Table", "long_form", "tables_of"]

ABLATIONS = {"alpha": "Table 3, stochastic rate", "num_experts": "Table 3, N", "schedule": "Table 4, lambda_t"}
LONG_FORM = tuple(
    "bundle backbone method figure runs cases mean deviation difference low high p lowest_run highest_run pairs".split()
)


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


def tables_of(title: str, rows: Sequence[Row], against: str) -> list[Table]:
    """All tables of the rows of one bundle and backbone, which are the title; differences are to ``against``."""
    tables = [_main_table(f"{title} (as the paper's tables 1 and 2; classes: DSC)", rows)]
    tables += _distances(title, rows, against)
    tables += _boundary_table(title, rows)
    return tables + [t for name, of in ABLATIONS.items() for t in _ablation(name, f"{title}: {of}", rows)]


def _number(mean: float, deviation: float = math.nan, digits: int = 2) -> str:
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if math.isfinite(deviation) else "")


def _signed(d: Difference | None) -> list[str]:
    if d is None:
        return ["-", "-", "-"]
    apart = f"{min(d.runs):+.2f} to {max(d.runs):+.2f}" if len(d.runs) > 1 else "-"
    return [f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]", apart, f"{d.p:.2g}"]


def _main_table(title: str, rows: Sequence[Row]) -> Table:
    classes = list(dict.fromkeys(c for row in rows for run in row.runs for c in run.by_class()))
    runs, cases = max(len(r.runs) for r in rows), max(r.cases for r in rows)
    arrows = [f"{figure} {'↑' if i < 2 else '↓'}" for i, figure in enumerate(FIGURES)]
    header = ["Method", *arrows, *classes, "ΔDSC [95 % CI]", "of single runs", "p", "runs", "cases"]
    cells = []
    for row in rows:
        average = row.mean_and_deviation(Run.average)
        dice = [finite_mean([run.by_class()[c][0] for run in row.runs if c in run.by_class()] or [math.nan]) for c in classes]
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
            rest = tuple((n, key_of(v)) for n, v in row.settings.items() if n != name)
            groups[row.system, rest].append(row)
    tables = []
    for (system, _), group in groups.items():
        if len(group) < 2:
            continue
        cells = []
        for row in sorted(group, key=lambda r: (isinstance(r.settings[name], str), r.settings[name])):
            average = list(zip(*row.mean_and_deviation(Run.average)))
            cells.append([str(row.settings[name]), _number(*average[0]), _number(*average[3]), str(len(row.runs))])
        others = [describe(n, group[0].settings[n]) for n in group[0].apart if n != name]
        of = ", ".join([system_name(system).removeprefix("+ "), *others])
        tables.append(Table(f"{title}: {of}", [name, "DSC ↑", "ASD ↓", "runs"], cells))
    return tables


def _boundary_table(title: str, rows: Sequence[Row]) -> list[Table]:
    """Error rates by distance to the true boundary, coarse against rendered, of the rows whose runs counted them."""
    found = {row.name: boundary_errors([count for run in row.runs for count in run.boundary]) for row in rows}
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


def long_form(bundle: str, backbone: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All numbers of the tables and those that they leave out, a row a figure; its columns are ``LONG_FORM``."""
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
