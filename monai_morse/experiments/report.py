"""``python -m monai_morse report``: the paper's tables and two figures from the runs of a sweep, or from a table of them."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from monai_morse.config import check_choice
from monai_morse.data import atomic_write

from .figures import curves_figure, differences_figure, save_figure
from .runs import Run, read_runs, save_runs
from .statistics import NAMES, Row, rows_of
from .tables import LONG_FORM, Table, long_form, tables_of

__all__ = ["Comparison", "compare", "report"]

DEFINITION = {
    "paper": "the paper's (its released code's, by medpy): DSC and Jaccard in %, 95HD and ASD in voxels, 95HD of both "
    "directions together, ASD from prediction to truth; absent structures that are predicted count as 1, 1, 0, 0, empty "
    "predictions as 0",
    "monai": "MONAI's: DSC and Jaccard in %, 95HD and ASD in mm, 95HD the larger of two directions, ASD symmetric; distances "
    "of structures that are missed or made up do not exist and are left out",
}


class Comparison(NamedTuple):
    """The rows of an experiment and their tables.

    Args:
        parts: rows by the title of their table.
        tables: all tables of all parts.
        lines: all numbers, a row a figure.
        notes: what the tables leave out, a line each.
        caption: what the figures are.
    """

    parts: dict[str, list[Row]]
    tables: list[Table]
    lines: list[dict[str, Any]]
    notes: list[str]
    caption: str


def compare(source: str | Path, metric: str = "paper", against: str = "Baseline") -> Comparison:
    """The tables of the runs of an experiment; arguments and errors are those of :func:`report`."""
    runs, notes = read_runs(source, metric)
    by_part: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_part[run.bundle, str(run.settings.get("backbone", ""))].append(run)
    tables, lines = [], []
    parts: dict[str, list[Row]] = {}
    for (bundle, backbone), members in sorted(by_part.items()):
        rows, more = rows_of(members, against)
        notes += more
        title = ", ".join(filter(None, (bundle, backbone)))
        parts[title] = rows
        tables += tables_of(title, rows, against)
        lines += long_form(bundle, backbone, rows)
    known = dict.fromkeys([*NAMES, *(row.name.removeprefix("+ ") for rows in parts.values() for row in rows)])
    check_choice("against", against.removeprefix("+ "), known)
    caption = (
        f"Figures are {DEFINITION[metric]}. Means ± standard deviations over runs (folds and seeds). Δ: mean difference to "
        f"{against} over the same fold, seed and case, with its bootstrap 95 % confidence interval over cases; p: Wilcoxon's "
        "signed-rank test, two-sided, not corrected for the number of rows. Cases are taken as independent. "
        "Neither knows how far trainings are apart: that is what the lowest and the highest difference of single runs are for."
    )
    return Comparison(parts, tables, lines, notes, caption)


def report(
    source: str | Path,
    out: str | Path | None = None,
    metric: str = "paper",
    against: str = "Baseline",
    save: str | Path | None = None,
) -> str:
    """Make the tables; write ``report.{md,csv,tex,png}``, ``report_curves.png`` and return the Markdown.

    Args:
        source: folder with runs at any depth, or a table of them, ``NAME.csv.gz``.
        out: folder to write to; default: the folder of runs, or ``NAME`` beside a table.
        metric: ``"paper"`` or ``"monai"``, whose definition of the figures is used.
        against: what differences are to, the baseline, another of the paper's systems, such as ``"IAR"``, or one row by its
            name in the table, such as ``"Baseline, max_epochs 200"``.
        save: a table of the runs to write, ``NAME.csv.gz``, see :func:`monai_morse.experiments.runs.save_runs`; default: none.

    Raises:
        InputError: see :func:`read_runs` and :func:`save_runs`; for a system or a row to compare with that there is not.
    """
    source = Path(source)
    parts, tables, lines, notes, caption = compare(source, metric, against)
    text = "\n\n".join([*(t.markdown() for t in tables), caption, *(["\n".join(f"- {n}" for n in notes)] if notes else [])])
    latex = "\n\n".join(["% needs \\usepackage{booktabs}", *(t.latex() for t in tables), f"% {caption}"])
    out = Path(out) if out else source.with_name(source.name.removesuffix(".csv.gz"))
    for name, content in (("report.md", text), ("report.tex", latex)):
        with atomic_write(out / name) as partial:
            partial.write_text(content + "\n")
    with atomic_write(out / "report.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, LONG_FORM)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    save_figure(differences_figure(parts, against), out / "report.png")
    save_figure(curves_figure(parts), out / "report_curves.png")
    if save:
        save_runs(source, save)
    return text
