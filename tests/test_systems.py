"""The table of systems says what was run."""

import pytest
from conftest import TINY
from monai.networks.nets import BasicUNet

from monai_morse import InputError
from tools import systems
from tools.systems import main


def test_the_table_shows_parameters_and_what_ran(capsys):
    assert main(["BasicUNet"]) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("| backbone") :].splitlines()  # MONAI 1.5's BasicUNet prints its features
    assert lines[0].startswith("| backbone | | parameters | none none | none pointrend | none implicit_pointrend |")
    bare = sum(p.numel() for p in BasicUNet(2, 1, 9, features=(16, 32, 64, 128, 256, 16)).parameters())
    assert lines[2].startswith(f"| BasicUNet | 2D | {bare / 1e6:.2f} | ✓ +0.00 | ✓ +0.04 |")
    assert lines[2].count("✓") == lines[3].count("✓") == 12
    assert "24 of 24 systems ran" in lines[5]


def test_a_system_that_fails_is_crossed_and_explained(monkeypatch, capsys):
    broken = systems.Backbone(systems.BACKBONES["BasicUNet"].usual, TINY["BasicUNet"], window=(30, 50, 18), dims=(2,))
    monkeypatch.setitem(systems.BACKBONES, "BasicUNet", broken)
    monkeypatch.setattr(systems, "run_tiny", lambda backbone, dims, e, r: "no such thing" if e == "dense" else "")
    assert main(["BasicUNet"]) == 1
    out = capsys.readouterr().out
    assert out.count("✗ +") == 4 and "8 of 12 systems ran" in out
    assert "✗ BasicUNet 2D dense pointrend: no such thing" in out


def test_a_tiny_run_finds_what_does_not_work():
    def refuses(dims, classes):
        raise ValueError("cannot be built")

    backbone = systems.Backbone(refuses, refuses)
    assert systems.run_tiny(backbone, 2, "dense", "none") == "ValueError: cannot be built"


def test_unknown_backbones_are_errors():
    with pytest.raises(InputError, match="backbone must be one of .*'UNETR'.*got 'VGG'"):
        list(systems.systems(["VGG"]))
