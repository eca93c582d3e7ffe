"""The experiments of ``results/``: what ``results/experiments.yaml`` says of each, its commands and its page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from monai_morse.experiments.figures import curves_figure, differences_figure, save_figure
from monai_morse.experiments.report import compare
from monai_morse.experiments.sweep import Cell, parse_options, plan_sweep

__all__ = ["ROOT", "Experiment", "read_experiments", "write_page"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


@dataclass(frozen=True)
class Experiment:
    """An entry of ``results/experiments.yaml``.

    Args:
        name: of its table, ``results/NAME.csv.gz``.
        title: of its page.
        question: what it asks, one sentence.
        setting: how, two or three sentences.
        set: the options that all cells share, as ``sweep --set`` takes them.
        grids: the cells, as ``sweep --grid`` takes them, a command each.
        note: what it says, Markdown.
        bundle: folder in ``bundles/``; default: the hippocampus bundle.
        over: files that lie over ``train.yaml``; default: none.
        against: rows to which differences are told; default: the baseline.
    """

    name: str
    title: str
    question: str
    setting: str
    set: str
    grids: tuple[str, ...]
    note: str
    bundle: str = "hippocampus_mri_morse"
    over: tuple[str, ...] = ()
    against: tuple[str, ...] = ("Baseline",)

    @property
    def table(self) -> Path:
        """The committed runs."""
        return RESULTS / f"{self.name}.csv.gz"

    def cells(self) -> list[Cell]:
        """The trainings of its commands, checked by the sweep."""
        bundle, shared = ROOT / "bundles" / self.bundle, parse_options(self.set)
        return [c for g in self.grids for c in plan_sweep(bundle, parse_options(g), Path("RUNS"), shared, self.over)]

    def commands(self) -> str:
        """A shell's lines that train, evaluate and report the experiment."""
        shared = self.set.replace("$", r"\$")
        over = f" --over {' '.join(self.over)}" if self.over else ""
        return "\n".join(
            [
                "for grid in " + " \\\n            ".join(f"'{grid}'" for grid in self.grids) + "; do",
                f'  monai-morse sweep --bundle bundles/{self.bundle}{over} --out RUNS --grid "$grid" \\',
                f'    --set "{shared}"',
                "done",
                f"monai-morse report RUNS --save results/{self.name}.csv.gz",
            ]
        )


def read_experiments() -> dict[str, Experiment]:
    """All entries by name, in the order of the file."""
    file = yaml.safe_load((RESULTS / "experiments.yaml").read_text())
    found = {}
    for name, entry in file["experiments"].items():
        for word, options in file["words"].items():
            entry["set"] = entry["set"].replace(f"{{{word}}}", options)
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        found[name] = Experiment(name, **{**entry, **lists})
    return found


def write_page(experiment: Experiment, folder: Path) -> str:
    """Write an experiment's figures to a folder as ``NAME.png`` and ``NAME_curves.png`` and return its page.

    Every table is made of the committed runs. Tables of wrong voxels and of ablations do not depend on what differences are to,
    so they stand once.
    """
    e = experiment
    lines = [f"# {e.title}", f"**{e.question}**", e.setting.strip(), e.note.strip()]
    for against in e.against:
        made = compare(e.table, against=against)
        lines.append(f"## Difference to {against}")
        if against == e.against[0]:
            save_figure(differences_figure(made.parts, against), folder / f"{e.name}.png")
            save_figure(curves_figure(made.parts), folder / f"{e.name}_curves.png")
            lines += [table.markdown() for table in made.tables]
            if (folder / f"{e.name}.png").is_file():
                lines.append(f"![differences with their intervals]({e.name}.png)")
            lines += [f"![validation Dice by iteration]({e.name}_curves.png)", made.caption, *made.notes]
        else:
            lines += [t.markdown() for t in made.tables if t.header[0] == "Method" and t.header[1] != "map"]
    lines += ["## Command" + "s" * (len(e.grids) > 1), f"```shell\n{e.commands()}\n```"]
    return "\n\n".join(lines) + "\n"
