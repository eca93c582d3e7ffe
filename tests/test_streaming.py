"""The streamed mixture gives the plain one's numbers: values, gradients, no missing gradient, no map that need not exist."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from monai_morse.networks import streaming
from monai_morse.networks.experts import Mixture, PointwiseMLP

CASES = [  # batch, sizes of the decoder features, size
    (2, [[4, 3], [8, 6]], [8, 6]),
    (1, [[2, 3], [3, 4], [7, 9]], [7, 9]),
    (2, [[1, 2, 1], [2, 3, 2], [4, 5, 3]], [4, 5, 3]),
    (1, [[3, 2, 4], [3, 4, 8], [6, 4, 8], [6, 4, 8]], [6, 4, 8]),
    (2, [[2, 2, 3], [3, 4, 5]], [6, 8, 10]),  # none of the input's size
    (2, [[4, 5, 3]], [4, 5, 3]),
]


@pytest.mark.parametrize("channels", [3, 16])  # either way: weights first, or upsampling first
@pytest.mark.parametrize("old, size", [([3, 4], [6, 8]), ([2, 5], [7, 5]), ([2, 3, 4], [4, 6, 8]), ([1, 3, 2], [5, 7, 2])])
def test_a_convolution_of_upsampled_maps(old, size, channels):
    x = torch.randn(2, channels, *old, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, channels, *[3] * len(size), dtype=torch.float64, requires_grad=True)
    conv, mode = (F.conv2d, "bilinear") if len(size) == 2 else (F.conv3d, "trilinear")
    expected = conv(F.interpolate(x, size, mode=mode), weight, padding=1)
    got = streaming.conv_upsampled(x, weight, size)
    assert torch.allclose(got, expected, atol=1e-10)
    direction = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), [x, weight]) for y in (got, expected))):
        assert torch.allclose(a, b, atol=1e-9)


def plain(m, features, keep, size, classifier):
    """The textbook's order: upsample all, concatenate, convolve, weigh, sum, fuse, classify."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    active = keep.to(features[0].dtype).reshape(*keep.shape, *[1] * len(size))
    whole = [F.interpolate(mlp(f), size, mode=mode) for mlp, f in zip(m.experts, features)]
    whole = [expert * kept for expert, kept in zip(whole, active.split(1, 1))]
    gate = m.gate(torch.cat(whole, 1)) if m.gate is not None else torch.zeros_like(whole[0][:, :1])
    weights = gate.exp() * active
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-300)
    return classifier(m.fuse(sum(w * e for w, e in zip(weights.split(1, 1), whole))))


@pytest.mark.parametrize("slab", [1, 200, 10**6])
@pytest.mark.parametrize("batch, sizes, size", CASES)
def test_streamed_values_and_gradients_for_every_mask(batch, sizes, size, slab, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", slab)
    torch.manual_seed(0)
    n = len(sizes)
    m = Mixture([3 + i for i in range(n)], len(size), width=4, drop_prob=0.5, min_active=0).double().train()
    classifier = PointwiseMLP(4, [3], last_activation=False).double()
    parameters = [*m.parameters(), *classifier.parameters()]
    features = [torch.randn(batch, 3 + i, *s, dtype=torch.float64, requires_grad=True) for i, s in enumerate(sizes)]
    for first in itertools.product([0.0, 1.0], repeat=n):
        keep = torch.tensor([first, *[[0.0, 1.0, 0.0, 1.0][:n]] * (batch - 1)])
        gate = m.gate_logits(features, keep, size)
        got = streaming.classify(m, classifier, features, keep, gate, size)
        expected = plain(m, features, keep, size, classifier)
        assert torch.allclose(got, expected, atol=1e-9)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [*features, *parameters]) for y in (got, expected))):
            assert torch.allclose(a, b, atol=1e-8)  # grad() raises where one is missing
