"""The streamed mixture gives the plain one's numbers: values, gradients, no missing gradient, no map that need not exist."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from monai_morse.networks import streaming
from monai_morse.networks.experts import Mixture, PointwiseMLP
from tools.literal import literal_mixture

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


@pytest.mark.parametrize("slab, renormalize", [(1, True), (200, False), (10**6, True)])
@pytest.mark.parametrize("batch, sizes, size", CASES)
def test_streamed_values_and_gradients_for_every_mask(batch, sizes, size, slab, renormalize, monkeypatch):
    monkeypatch.setattr(streaming, "SLAB", slab)
    torch.manual_seed(0)
    n = len(sizes)
    options = {"drop_prob": 0.5, "min_active": 0, "renormalize": renormalize}
    m = Mixture([3 + i for i in range(n)], len(size), width=4, **options).double().train()
    classifier = PointwiseMLP(4, [3], last_activation=False).double()
    parameters = [*m.parameters(), *classifier.parameters()]
    features = [torch.randn(batch, 3 + i, *s, dtype=torch.float64, requires_grad=True) for i, s in enumerate(sizes)]
    for first in itertools.product([0.0, 1.0], repeat=n):
        counts = torch.tensor([first, *[[0.0, 1.0, 0.0, 1.0][:n]] * (batch - 1)]) * (1.0 if renormalize else 2.0)
        got = m.classify(classifier, features, counts, m.gate_logits(features, counts, size), size)
        expected = classifier(literal_mixture(m, features, counts, size)[1])
        assert torch.allclose(got, expected, atol=1e-9)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), [*features, *parameters]) for y in (got, expected))):
            assert torch.allclose(a, b, atol=1e-8)  # grad() raises where one is missing
