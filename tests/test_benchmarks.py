"""The benchmark's literal head is the paper preset, value and gradient; its table shows what was measured."""

import csv
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, window

from monai_morse import Morse, MorseLoss
from tools import price
from tools.cost import Operations, build, measure, operations, parse, table
from tools.gate import main as gate
from tools.growth import slope
from tools.literal import LiteralMorse
from tools.overview import draw, markdown, percent, read_lines

OPTIONS = {"small": True, "amp": False, "compiled": False, "channels_last": False, "over": []}


@pytest.mark.parametrize("backbone, dims", [("BasicUNet", 2), ("DynUNet", 3)])
@pytest.mark.parametrize("experts", ["dense", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_paper_preset_equals_the_literal_head(backbone, dims, experts, dtype):
    narrow = {
        "mixture": {"width": 16},
        "head": {"width": 16, "num_frequencies": 8},
        "points": {"num_train": 64, "num_eval": 99},
    }
    net = Morse(TINY[backbone](dims, 3), experts, "anatomical", preset="paper", **narrow).to(dtype)
    literal = LiteralMorse(net)
    x = window(backbone, dims).to(dtype)
    labels = torch.randint(0, 3, x.shape)

    def close(a, b):
        return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())

    with torch.no_grad():
        assert close(net.eval()(x), literal.eval()(x))
    steps = []
    for network in (net, literal):
        torch.manual_seed(1)
        net.train().zero_grad()
        loss = MorseLoss(0.1)(network(x, return_points=True), labels)
        loss.backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        steps.append((loss, torch.cat(gradients)))  # in float32, a bias before a normalisation has no gradient but noise
    assert all(close(a, b) for a, b in zip(*steps))


def test_presets_differ_where_they_say():
    light, paper = (Morse(TINY["BasicUNet"](2, 3), preset=p) for p in ("light", "paper"))
    assert light.classifier is None and light.mixture.gate_stride == [4, 4] and light.renderer.residual
    assert paper.classifier is not None and paper.mixture.gate_stride == [1, 1] and not paper.renderer.residual
    assert paper.mixture.out_channels == 256 and paper.renderer.encoding.frequencies.shape == (128, 2)
    assert not paper.mixture.renormalize and light.mixture.renormalize
    assert paper.mixture.dropout.chance[0] > 0 and light.mixture.dropout.chance[0] == 0
    own = Morse(TINY["BasicUNet"](2, 3), preset="paper", mixture={"width": 8, "coarse": "backbone"})
    assert own.classifier is None and own.mixture.out_channels == 8 and own.mixture.gate_stride == [1, 1]


def test_a_measurement_is_a_ratio_to_the_bare_backbone_of_the_same_run():
    result = measure("BasicUNet", "default", 1, **OPTIONS)
    assert "error" not in result
    assert 1 < result["multiply-adds"][0] < 2 and result["training step"][0] > 0 and result["memory, training"][0] > 0.5
    assert table([result]).splitlines()[2].startswith("| BasicUNet | default | ")


def test_operations_are_what_is_computed_and_not_what_is_looked_at_in_another_way():
    x = torch.rand(3, 4)
    with Operations() as counter:
        (x.t()[1:].reshape(-1) * 2).unsqueeze(0).sum()  # a copy, a product, a sum
    assert counter.count == 3


def test_a_3d_renderer_launches_hardly_more_than_a_2d_one():
    added = []
    for dims in (2, 3):
        counts = []
        for renderer in ("none", "anatomical"):
            net = Morse(TINY["BasicUNet"](dims, 3), "none", renderer).eval()
            with torch.no_grad(), Operations() as counter:
                net(window("BasicUNet", dims))
            counts.append(counter.count)
        added.append(counts[1] - counts[0])
    assert added[1] < 1.5 * added[0]


def test_what_is_launched_beside_the_bare_network():
    """The marks of docs/cost.md: where launching costs more than computing, this is what a step costs."""
    options = " stride=2 patch_size=[48,64,48]"
    rows = [row + options for row in ("bare", "default experts=none", "default")]
    lines = operations(str(ROOT / "bundles" / "hippocampus_mri_morse"), rows, **OPTIONS).splitlines()[2:]
    ratios = [[float(r) for r in re.findall(r"\((\d\.\d+)\)", line)] for line in lines]
    assert ratios[0] == [1, 1]
    for (inference, training), most in zip(ratios[1:], [(1.8, 1.45), (2.3, 1.85)]):
        assert 1 < inference <= most[0] and 1 < training <= most[1]


def test_a_row_that_fails_says_why(monkeypatch):
    result = measure("BasicUNet", "default width=0", 1, **OPTIONS)
    assert "InputError" in result["error"] and "(InputError" in table([result])


def test_a_row_is_a_kind_and_options():
    changes = {"preset": "paper", "mixture": {"width": 8, "coarse": "backbone"}, "points": {"num_eval": 9}}
    assert parse("paper width=8 num_eval=9 coarse=backbone") == ("paper", changes)
    for row in ("papre", "default width 8"):
        with pytest.raises(ValueError, match="must be one of bare, literal, paper"):
            parse(row)


def test_slope_of_a_square_is_two_and_of_noise_unknown():
    assert slope([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    assert math.isnan(slope([1, 2, 4], [1.0, -0.1, 2.0]))


def test_the_bare_backbone_takes_a_stride_too():
    bare, (strided, _, _) = build("BasicUNet", "bare", True)[0], build("BasicUNet", "bare stride=2", True)
    x = torch.rand(1, 1, 64, 64)
    assert strided.mixture is None and strided.renderer is None
    with torch.no_grad():
        seen = F.avg_pool2d(x, 2)
        assert torch.allclose(strided.eval()(x), F.interpolate(bare.eval()(seen), (64, 64), mode="bilinear"), atol=1e-5)


def test_the_gates_table_has_every_expert_at_every_place(task04, capsys):
    gate(["--data", str(task04), "--cases", "1"])
    rows = [[c.strip() for c in line.strip("| ").split("|")] for line in capsys.readouterr().out.strip().splitlines()]
    assert [r[0] for r in rows[2:]] == ["all voxels", "the structures", "re-rendered voxels"]
    for row in rows[2:]:
        means, spreads = zip(*(map(float, cell.split(" ± ")) for cell in row[1:]))
        assert len(means) == 3 and sum(means) == pytest.approx(1, abs=0.02) and all(s > 0 for s in spreads)


def test_a_bundles_network_is_built_as_it_trains_with_a_rows_options():
    folder = str(ROOT / "bundles" / "hippocampus_mri_morse")
    net, size, batch = build(folder, "default stride=2 patch_size=[48,64,48] backbones#dynunet#filters=[8,16,32,64]", True)
    assert (
        size == [48, 64, 48]
        and batch == 2
        and net.stride == [2, 2, 2]
        and net.num_train == 2048
        and net.mixture.out_channels == 16
    )
    assert [f.channels for f in net.decoder.info] == [32, 16, 8]
    bare = build(folder, "bare stride=2", True)[0]
    assert bare.mixture is None and bare.renderer is None
    sliced, size, batch = build(folder, "default", True, ["slices.yaml"])
    assert size == [48, 64] and batch == 8 and sliced.num_train == 128 and sliced.image_patch == [7, 7] and sliced.patch_norm
    result = measure(folder, "default", 1, times=["inference"], **{**OPTIONS, "over": ["slices.yaml"]})
    assert "error" not in result and result["parameters"][0] > 1


def test_the_overviews_table_is_the_pages_and_its_picture_has_every_line():
    lines = read_lines()
    page = (ROOT / "docs" / "results.md").read_text()
    published = page[page.index("| seen at |") :].split("\n\n")[0].splitlines()
    made = markdown(lines).splitlines()
    assert len(published) == len(made)
    for ours, theirs in zip(made[:1] + made[2:], published[:1] + published[2:]):
        assert ours.split("|")[1:7] == theirs.split("|")[1:7]  # what a training step costs is not of these runs
    dice, asd = draw(lines).axes
    labels = [tick.get_text() for tick in dice.get_yticklabels()]
    assert labels == [f"{line.setting}: {line.label}" for line in lines]
    for y, line in enumerate(lines):
        d = line.differences[0]
        (interval,) = dice.containers[y].lines[2]
        assert interval.get_segments()[0].tolist() == pytest.approx(np.array([[d.low, y], [d.high, y]]))
        assert [percent(line.differences[3]), y] in [point for drawn in asd.lines for point in drawn.get_xydata().tolist()]


def test_the_price_tables_accuracy_is_that_of_the_committed_trainings():
    table = list(csv.DictReader(price.TABLE.open()))
    assert [row["set"] for row in table] == [name for name, of in price.SETS.items() for _ in of.points]
    expected = [price.accuracy(point, of.points[0]) for of in price.SETS.values() for point in of.points]
    for row, told in zip(table, expected, strict=True):
        assert {n: row[n] for n in told} == {n: str(value) for n, value in told.items()}
        assert all(0 < float(row[n]) < 10 for n in price.PRICES)
    assert all(float(table[0][n]) == 1 for n in price.PRICES)
    assert price.markdown(table) in (ROOT / "docs/results.md").read_text()
    morse = next(row for row in table if row["view"] == "2 mm" and row["network"] == "MORSE")
    assert f"within {-float(morse['dice_to_full']):.1f} points of full resolution" in (ROOT / "README.md").read_text()
    assert 0.17 < float(morse["training step"]) < 0.23, "README says a fifth"


def test_a_price_is_a_ratio_to_the_bare_network_at_full_resolution():
    bare = "bare stride=1 patch_size=[32,32,32]"
    found = price.measure(ROOT / "bundles/hippocampus_mri_morse", bare.replace("=1 ", "=2 "), bare, (36, 32, 40), 3)
    assert found.keys() == set(price.PRICES) and 0 < found["training step"] < 1
