"""The manual's notebook runs, in a tiny setting, and lies there executed."""

import copy
import json

import pytest
import torch

from tools.notebook import NOTEBOOK, page_of, run


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny = copy.deepcopy(notebook)
    names = run(tiny, {"PATIENTS": 5, "SPACING": (9.0, 9.0, 10.0), "EPOCHS": 1, "PATCH": (64, 64, 32)})
    assert torch.isfinite(names["seen"][0]["logits"]).all() and len(names["seen"]) == len(names["held_back"])
    printed = "".join(text for cell in tiny["cells"] for output in cell.get("outputs", ()) for text in output.get("text", ()))
    assert "epoch 1: loss" in printed and "the same as before: True" in printed
    assert len(page_of(tiny)[1]) == 1


def test_it_was_executed_and_its_page_has_its_outputs(notebook):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    text, pictures = page_of(notebook)
    assert "the same as before: True" in text and [p[:4] for p in pictures] == [b"\x89PNG"]
    assert "first_steps_0.png" in text
