"""The portability table: what passes, what a bare backbone already fails, and that every check can fail."""

import copy
import doctest
import pickle
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_exports import import_onnxruntime
from torch import nn

from monai_morse import InputError, Morse
from tools import portability
from tools.portability import CHECKS, portability_table
from tools.systems import BACKBONES

EVERY_CHECK = [("DynUNet", 3), ("TransUNet", 2)]
# slow ones; all but DDP are on every backbone in test_morse.py
ONCE = dict.fromkeys(("DDP", "copy", "pickle", "script", "trace", "export"), "DynUNet")
QUICK = ("autocast bf16", "autocast fp16", "checkpointing", "DataParallel")
CASES = [(name, dims, check) for name, dims in EVERY_CHECK for check in CHECKS if name in ONCE.get(check, name)]
CASES += [(name, 2, check) for name, b in BACKBONES.items() if 2 in b.dims for check in QUICK if (name, 2) not in EVERY_CHECK]
CASES += [("UNet3D", 3, "copy"), ("BasicUNet", 2, "one graph")]
NOT_OURS = {("BasicUNet", "one graph")}  # MONAI's UpCat calls torch.jit.isinstance


@pytest.mark.parametrize("backbone, dims, check", CASES)
def test_a_check_passes_or_the_bare_backbone_fails_it(backbone, dims, check):
    if check == "onnx":
        import_onnxruntime()
    (outcome,) = portability.portability([backbone], [check], [dims])
    assert outcome.mark == ("–" if (backbone, check) in NOT_OURS else "✓"), outcome.reason


class Small(nn.Module):
    """One convolution, and what is done to its output."""

    def __init__(self, change):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.change = change
        self.calls = 0

    def forward(self, x):
        return self.change(self, self.conv(x))


def keeps_its_output(net, y):
    net.kept = y
    return y


def stands_in_a_function():
    return lambda net, y: y


def has_an_untyped_argument(net, y):
    return y * net.calls


def keeps_a_value_of_the_traced_input(net, y):
    return y + y[0].max().item()


def branches_on_values(net, y):
    return y + 1 if y.max() > 0 else y


def knows_that_it_is_compiled(net, y):
    return y + torch.compiler.is_compiling()


def breaks_the_graph(net, y):
    torch._dynamo.graph_break()
    return y


def loses_digits(net, y):
    return (y + 1e5) - 1e5


def counts_its_calls(net, y):
    net.calls += net.training
    return y * net.calls if net.training else y


def lists_its_parameters(net, y):
    return y * sum(p.sum() for p in net.parameters())


def keeps_its_output_for_later(net, y):
    net.kept = y
    time.sleep(0.02)
    return net.kept


def mixes_samples(net, y):
    return (y - y.mean(0)) ** 2


BROKEN = {
    "copy": (keeps_its_output, "graph leaves"),
    "pickle": (stands_in_a_function(), "pickle"),
    "script": (has_an_untyped_argument, "failed to compile"),
    "trace": (keeps_a_value_of_the_traced_input, "768 of 768 voxels differ"),
    "export": (branches_on_values, "data-dependent|Dynamic control flow"),
    "compile": (knows_that_it_is_compiled, "768 of 768 voxels differ"),
    "one graph": (breaks_the_graph, "graph_break"),
    "onnx": (knows_that_it_is_compiled, "768 of 768 voxels differ"),
    "autocast bf16": (loses_digits, "from float32"),
    "autocast fp16": (loses_digits, "not finite"),
    "checkpointing": (counts_its_calls, "not close"),
    "DataParallel": (lists_its_parameters, "768 of 768 voxels differ"),
    "threads": (keeps_its_output_for_later, "not close"),
    "DDP": (mixes_samples, "not close"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes_a_convolution_and_fails_a_broken_network(check):
    x = torch.rand(2, 1, 16, 24)
    change, message = BROKEN[check]
    if check == "onnx":
        import_onnxruntime()
    if check != "DDP":  # DynUNet passes it above
        CHECKS[check](nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)).eval(), x)
    with warnings.catch_warnings(), pytest.raises(Exception, match=message):
        warnings.simplefilter("ignore")
        CHECKS[check](Small(change).eval(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_of_another_dtype_copies_and_pickles(dtype):
    net = portability.tiny_network("BasicUNet", 2)[0].to(dtype)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters()))


def test_the_page_runs_and_its_table_has_every_row_and_column(tmp_path, monkeypatch):
    page = Path(__file__).resolve().parents[1] / "docs" / "portability.md"
    lines = page.read_text().splitlines()
    (header,) = [line for line in lines if line.startswith("| backbone |")]
    assert header == "| backbone | | " + " | ".join(CHECKS) + " |"
    rows = [line.split(" | ")[0][2:] for line in lines if re.search(r"^\| .* \| [23]D \|", line)]
    assert rows == list(BACKBONES)
    import_onnxruntime()
    monkeypatch.chdir(tmp_path)
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def fails_under_morse(network, x):
    assert not isinstance(network, Morse), "no good"


def fails(network, x):
    raise ValueError


def test_marks_and_reasons(monkeypatch):
    monkeypatch.setattr(portability, "CHECKS", {"ours": fails_under_morse, "not ours": fails, "none": lambda network, x: None})
    text, passed = portability_table(["BasicUNet"], dims=[2])
    lines = text.splitlines()
    assert lines[0] == "| backbone | | ours | not ours | none |"
    assert lines[2] == "| BasicUNet | 2D | ✗ | – | ✓ |"
    assert lines[-1] == "✗ BasicUNet 2D ours: AssertionError: no good"
    assert not passed
    assert portability_table(["BasicUNet"], ["not ours", "none"], [2])[1]


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text, passed = portability_table(["BasicUNet"], ["onnx"], [2])
    assert "| not installed |" in text and "onnxruntime" in text.splitlines()[-1] and not passed


def test_a_backbone_without_the_asked_dimensions_has_no_row():
    assert [(o.backbone, o.spatial_dims) for o in portability.portability(["TransUNet", "UNet"], ["pickle"], [3])] == [
        ("UNet", 3)
    ]
    assert [o.spatial_dims for o in portability.portability(["TransUNet", "UNet"], ["pickle"])] == [2, 3]


@pytest.mark.parametrize("names, checks, message", [(["Unet"], None, "backbone.*'Unet'"), (None, ["jit"], "check.*'jit'")])
def test_unknown_names_are_errors(names, checks, message):
    with pytest.raises(InputError, match=message):
        portability_table(names, checks)
