"""Weights of a bare backbone in any cell, of one cell in another; what matched is said, nothing is an error."""

import pytest
import torch
from conftest import SMALL, TINY, grouped
from monai.networks.nets import UNet

from monai_morse import InputError, Morse, load_matching
from tools.systems import CELLS


def morse(experts="stochastic", renderer="anatomical", classes=3, **options):
    return Morse(
        TINY["BasicUNet"](2, classes),
        experts,
        renderer,
        **grouped({**SMALL, "coarse": "experts" if experts != "none" else None, **options}),
    )


@pytest.mark.parametrize("wrapped", ["module.", "_orig_mod.module."])
@pytest.mark.parametrize("experts, renderer", CELLS)
def test_a_bare_backbones_checkpoint_loads_into_every_cell(tmp_path, experts, renderer, wrapped):
    bare = TINY["BasicUNet"](2, 3).eval()
    torch.save({"model": {f"{wrapped}{k}": v for k, v in bare.state_dict().items()}}, tmp_path / "bare.pt")
    net = morse(experts, renderer).eval()
    own = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("decoder.")}
    loaded = load_matching(net, tmp_path / "bare.pt")
    assert set(loaded.matched) == {f"decoder.backbone.{k}" for k in bare.state_dict()}
    assert set(loaded.new) == set(own) and not loaded.reshaped and not loaded.unused
    x = torch.rand(1, 1, 32, 48)
    assert torch.equal(net.decoder.backbone(x), bare(x))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in own.items())


def test_one_cell_to_another_and_back_to_the_bare_backbone():
    source = morse("dense", "none")
    loaded = load_matching(morse("stochastic", "anatomical"), source.state_dict())
    assert {n.split(".")[0] for n in loaded.new} == {"renderer"}
    bare = TINY["BasicUNet"](2, 3)
    loaded = load_matching(bare, source.state_dict())
    assert not loaded.new and {n.split(".")[0] for n in loaded.unused} == {"mixture", "classifier"}
    assert torch.equal(bare.conv_0.conv_0.conv.weight, source.decoder.backbone.conv_0.conv_0.conv.weight)


def test_other_classes_are_reported_and_keep_their_start():
    net = morse(classes=5)
    loaded = load_matching(net, morse(classes=3).state_dict())
    assert set(loaded.reshaped) <= set(loaded.new)
    assert {n.rsplit(".", 1)[0] for n in loaded.reshaped} >= {"decoder.backbone.final_conv", "classifier.layers.0"}
    assert "of another shape" in str(loaded)


def test_nothing_that_matches_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing in the checkpoint matches.*1 entries, e.g. other.weight"):
        load_matching(morse(), {"other.weight": torch.zeros(3)})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="list.pt holds no state dict but a list"):
        load_matching(morse(), tmp_path / "list.pt")
    with pytest.raises(InputError, match="no checkpoint at .*absent.pt"):
        load_matching(morse(), tmp_path / "absent.pt")


def test_a_frozen_backbone_rests_but_for_what_a_checkpoint_lacks():
    net = morse(classes=5)
    loaded = load_matching(net, morse(classes=3).state_dict(), freeze_backbone="true")
    backbone = {n: p for n, p in net.named_parameters() if n.startswith("decoder.")}
    assert not net.train().decoder.backbone.training
    assert net.mixture.training and all(p.requires_grad for n, p in net.named_parameters() if n not in backbone)
    thawed = {n for n, p in backbone.items() if p.requires_grad}
    assert thawed == {n for n in loaded.new if n.startswith("decoder.")} != set()
    assert all(loaded.in_backbone((n, p)) == (n not in thawed) for n, p in backbone.items())
    assert not any(loaded.in_backbone((n, p)) for n, p in net.named_parameters() if n not in backbone)


def test_batch_statistics_of_a_frozen_backbone_rest_too():
    for frozen in (True, False):
        net = Morse(UNet(2, 1, 3, [4, 8, 8], [2, 2], norm="batch"), num_experts=2, **SMALL)
        net = net.freeze_backbone() if frozen else net
        before = {k: v.clone() for k, v in net.state_dict().items()}
        net.train()(torch.rand(2, 1, 32, 32), return_points=True)
        changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert bool(changed) != frozen
