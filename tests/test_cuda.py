"""The same numbers on a GPU, and training there in bfloat16; skipped where there is none."""

import pytest
import torch
from conftest import SMALL, TINY
from monai.inferers import SlidingWindowInferer

from monai_morse import Morse, MorseLoss
from tools.systems import CELLS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
SIZE = (32, 48, 16)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """TF32 keeps ten bits of a product's factors; with it, GPUs and CPUs differ in the third digit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("experts, renderer", CELLS)
def test_logits_are_those_of_the_cpu(dims, experts, renderer):
    net = Morse(TINY["BasicUNet"](dims, 3), experts, renderer, **SMALL).eval()
    x = torch.rand(2, 1, *SIZE[:dims])
    with torch.no_grad():
        expected, found = net(x), net.cuda()(x.cuda()).cpu()
    # a voxel as uncertain as its neighbour may be rendered in its place
    assert ((found - expected).abs() > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("experts, renderer", CELLS)
def test_trains_in_bfloat16(dims, experts, renderer):
    net = Morse(TINY["BasicUNet"](dims, 3), experts, renderer, **SMALL).cuda()
    loss, optimizer = MorseLoss(weight=0.1), torch.optim.AdamW(net.parameters(), 1e-3)
    x = torch.rand(2, 1, *SIZE[:dims], device="cuda")
    labels = (x > 0.5).long() + (x > 0.9).long()
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(net(x, return_points=True), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert all(p.isfinite().all() for p in net.parameters()) and losses[-1] < losses[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_sliding_window_that_gathers_on_the_cpu(dims):
    net = Morse(TINY["BasicUNet"](dims, 3), **SMALL).cuda().eval()
    x = torch.rand(1, 1, *(40, 56, 24)[:dims])
    with torch.no_grad():
        found = SlidingWindowInferer(SIZE[:dims], 2, sw_device="cuda", device="cpu")(x, net)
        expected = SlidingWindowInferer(SIZE[:dims], 2)(x.cuda(), net).cpu()
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected)
