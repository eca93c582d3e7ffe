"""``python -m tools.notebook``: run the manual's notebook and keep what its cells print and draw; and its page for the site.

A cell is Python, its output what it prints and the figures that pyplot has open at its end, as in Jupyter.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["NOTEBOOK", "page_of", "run"]

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "first_steps.ipynb"


def run(notebook: dict[str, Any], parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Execute all cells of a notebook, in order, and put their outputs in; returns the names that they leave behind.

    Args:
        notebook: as JSON has it; changed in place.
        parameters: values for names of the cell that is tagged ``parameters``; default: its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        printed = io.StringIO()
        outputs: list[dict[str, Any]] = []
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names.update(parameters or {})
        if printed.getvalue():
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
        for number in pyplot.get_fignums():
            png = io.BytesIO()
            pyplot.figure(number).savefig(png, format="png", dpi=80, metadata={"Software": None})
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close("all")
        cell |= {"execution_count": count, "outputs": outputs}
    return names


def page_of(notebook: Mapping[str, Any]) -> tuple[str, list[bytes]]:
    """A notebook as Markdown, and its pictures: ``first_steps_0.png`` and so on."""
    lines: list[str] = []
    pictures: list[bytes] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        lines.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                lines.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                lines.append(f"![what the cell draws](first_steps_{len(pictures)}.png)")
                pictures.append(base64.b64decode(output["data"]["image/png"]))
    return "\n\n".join(lines) + "\n", pictures


if __name__ == "__main__":
    found = json.loads(NOTEBOOK.read_text())
    run(found)
    NOTEBOOK.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
