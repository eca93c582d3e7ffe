"""The losses, value and gradient, against references worked by hand in float64."""

import math

import numpy as np
import pytest
import torch
from reference import WINDOWS, loss_by_hand, pyramid_morse, shares, total_by_hand, voxels

from monai_morse import MorseLoss
from monai_morse.losses import render_weight
from monai_morse.networks import MorseOutput

# --- the loss -------------------------------------------------------------------------------------------------------------

LOSSES = [  # batch, classes, size of the logits, size of the labels
    (1, 2, [3, 5], [3, 5]),
    (3, 9, [4, 3], [4, 3]),
    (3, 2, [2, 3, 4], [2, 3, 4]),
    (3, 9, [3, 4], [6, 12]),
    (1, 3, [2, 3, 4], [4, 3, 12]),
    (3, 1, [2, 3, 4], [2, 3, 4]),
    (1, 1, [3, 4], [9, 8]),
]


def draw_output(batch, classes, size, labelled):
    coarse, points = torch.randn(batch, classes, *size), torch.randn(batch, classes, 6)
    index = torch.stack([torch.randperm(math.prod(labelled))[:6] for _ in range(batch)])
    return MorseOutput(coarse, points, index), torch.randint(0, max(classes, 2), (batch, 1, *labelled))


@pytest.mark.parametrize("batch, classes, size, labelled", LOSSES)
def test_total_loss_and_its_gradient(batch, classes, size, labelled):
    output, labels = draw_output(batch, classes, size, labelled)
    logits = [t.requires_grad_() for t in output[:2]]
    got = MorseLoss(weight=0.3)(output, labels)
    got.backward()
    numbers = [t.detach().double().numpy() for t in logits]
    rest = output.point_index.numpy(), labels.numpy(), 0.3
    assert got.item() == pytest.approx(total_by_hand(*numbers, *rest), abs=1e-6)
    for x, t in zip(numbers, logits):
        slopes = np.zeros(x.size)
        for i in range(x.size):
            old, ends = x.flat[i], []
            for step in (1e-5, -1e-5):
                x.flat[i] = old + step
                ends.append(total_by_hand(*numbers, *rest))
            x.flat[i] = old
            slopes[i] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(t.grad.flatten(), slopes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_labels_may_be_of_any_type(dtype):
    for batch, classes, size, labelled in LOSSES:
        output, labels = draw_output(batch, classes, size, labelled)
        expected = total_by_hand(output[0].double().numpy(), output[1].double().numpy(), output[2].numpy(), labels.numpy(), 0.1)
        assert MorseLoss(weight=0.1)(output, labels.to(dtype)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    "sizes", [[[4, 6], [2, 3], [1, 1]], [[4, 6, 5], [2, 3, 3], [3, 2, 1], [1, 1, 1], [2, 2, 2], [1, 2, 1]]]
)
def test_deep_supervision_halves_the_weight_of_each_map_down_to_a_sixteenth(sizes, classes):
    maps = [torch.randn(2, classes, *s) for s in sizes]
    labels = torch.randint(0, max(classes, 2), (2, 1, *sizes[0]))
    expected = 0.0
    for i, (x, size) in enumerate(zip(maps, sizes)):
        nearest = np.zeros((2, 1, *size))  # the label at each coarse voxel's centre
        for voxel in voxels(size):
            source = [math.floor((j + 0.5) * m / n) for j, n, m in zip(voxel, size, sizes[0])]
            nearest[(slice(None), slice(None), *voxel)] = labels[(slice(None), slice(None), *source)]
        expected += max(0.5**i, 1 / 16) * loss_by_hand(x.double().flatten(2).numpy(), shares(nearest, classes, size))
    none = torch.zeros(2, classes, 0), torch.zeros(2, 0, dtype=torch.long)
    assert MorseLoss()(maps, labels).item() == pytest.approx(expected, abs=2e-6)
    assert MorseLoss(weight=0.1)(MorseOutput(maps, *none), labels).item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("size", [[4, 5], [2, 3, 4]])
def test_deep_supervision_as_a_stack(size, classes):
    stack, labels = torch.randn(2, 3, classes, *size), torch.randint(0, max(classes, 2), (2, 1, *size))
    truth = shares(labels.numpy(), classes, size)
    expected = sum(0.5**i * loss_by_hand(stack[:, i].double().flatten(2).numpy(), truth) for i in range(3))
    assert MorseLoss()(stack, labels).item() == pytest.approx(expected, abs=2e-6)


GRADIENTS = [
    (WINDOWS[1], None, "dense", "experts", "anatomical"),
    (WINDOWS[2], [6, 4, 4], "stochastic", "experts", "anatomical"),
    (WINDOWS[2], None, "stochastic", "backbone", "anatomical"),
    (WINDOWS[3], None, "dense", "backbone", "pointrend"),
    (WINDOWS[1], [8, 10], "none", "backbone", "implicit_pointrend"),
]


@pytest.mark.parametrize("window, grid, experts, coarse, renderer", GRADIENTS)
@pytest.mark.parametrize("residual", [True, False])
def test_gradient_of_every_parameter_of_morse(window, grid, experts, coarse, renderer, residual):
    batch, classes, size, channels, strides = window
    options = {"experts": experts, "coarse": coarse, "renderer": renderer, "head": {"residual": residual}}
    net = pyramid_morse(len(size), classes, channels, strides, dropout=0.4, **options).train()
    x = torch.randn(batch, 1, *size, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch, 1, *(grid or size)))

    def run():
        torch.manual_seed(5)  # the same experts and the same points each time
        return net(x, return_points=True, grid=grid)

    def total():
        with torch.no_grad():
            return total_by_hand(*(t.numpy() for t in run()), labels.numpy(), 0.5)

    MorseLoss(weight=0.5)(run(), labels).backward()
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(net.parameters())) - (renderer == "implicit_pointrend")  # its frequencies are fixed
    moving = 0
    for name, p in trained.items():
        direction = torch.randn_like(p)
        direction /= direction.norm()
        ends = []
        for step in (1e-5, -1e-5):
            p.data += step * direction
            ends.append(total())
            p.data -= step * direction
        slope = (ends[0] - ends[1]) / 2e-5
        got = 0.0 if p.grad is None else (p.grad * direction).sum().item()
        assert got == pytest.approx(slope, abs=1e-6), name
        moving += slope != 0
    assert moving > len(trained) / 2


@pytest.mark.parametrize("total", [1000, 7, 30000])
@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_schedules_at_start_half_one_later_and_end(total, weight):
    half = total // 2
    for t, ramp, step in [
        (0, 0.0, 0.0),
        (half, 0.0, 0.0),
        (half + 1, weight * (half + 1 - total / 2) / total, weight),
        (total, weight / 2, weight),
    ]:
        assert render_weight(t, total, "ramp", weight) == pytest.approx(ramp, abs=1e-12)
        assert render_weight(t, total, "half", weight) == step
        assert render_weight(t, total, "scratch", weight) == weight
