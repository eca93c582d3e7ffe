"""SMoE: widths, dropout, grids and dtypes; tests/test_exact.py has the equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import CLOSE, average_or_interpolate

from monai_morse import InputError
from monai_morse.networks.experts import ExpertDropout, Mixture, PointwiseMLP
from monai_morse.networks.points import gather_points, point_coordinates
from monai_morse.networks.resampling import resize, shrink


def ones(features):
    return torch.ones(len(features[0]), len(features), dtype=features[0].dtype)


CASES = [  # batch, channels of the features, their sizes, size
    (1, [5], [[4, 6]], [4, 6]),
    (3, [6, 4], [[2, 3], [4, 6]], [4, 6]),
    (1, [6, 4, 3], [[2, 3], [3, 5], [6, 10]], [6, 10]),
    (1, [3] * 5, [[1, 1], [2, 2], [2, 3], [4, 5], [8, 9]], [8, 9]),
    (1, [4, 3], [[2, 3, 2], [4, 6, 5]], [4, 6, 5]),
    (3, [5, 4, 3], [[1, 2, 1], [2, 3, 2], [4, 5, 3]], [4, 5, 3]),
]


def test_gate_is_four_convolutions_of_the_papers_widths():
    m = Mixture([8, 8, 8], 3)
    convs = [layer for layer in m.gate if isinstance(layer, torch.nn.Conv3d)]
    assert [c.out_channels for c in convs] == [256, 256, 256, 3]
    assert all(c.kernel_size == (3, 3, 3) for c in convs) and convs[0].in_channels == 3 * 256
    assert not isinstance(m.gate[-1], torch.nn.ReLU)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, smaller", [((6, 4), (3, 4)), ((6, 4, 8), (3, 1, 2)), ((5, 4, 7), (3, 2, 7))], ids=str)
def test_shrinking_averages_at_any_precision(size, smaller, dtype):
    x = torch.randn(2, 3, *size).to(dtype)
    expected = torch.zeros(2, 3, *smaller, dtype=torch.float64)
    for place in itertools.product(*[range(n) for n in smaller]):
        # a coarse voxel's share: from its lower face, rounded down, to its upper, rounded up
        block = [slice(i * m // n, -(-(i + 1) * m // n)) for i, m, n in zip(place, size, smaller)]
        expected[(..., *place)] = x.double()[(..., *block)].flatten(2).mean(2)
    got = shrink(x, list(smaller))
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, atol=4 * torch.finfo(dtype).eps)


def test_coarse_gate_still_sums_to_one_and_keeps_the_size():
    m = Mixture([4, 4], 3, width=4, gate_stride=4)
    features = [torch.randn(2, 4, 3, 4, 5), torch.randn(2, 4, 6, 8, 10)]
    assert m.gate_logits(features, ones(features), [6, 8, 10]).shape == (2, 2, 2, 2, 3)
    assert m(features, [6, 8, 10]).shape == (2, 4, 6, 8, 10)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("batch, channels, sizes, size", CASES)
def test_mixture_at_points_equals_the_mixture_there(batch, channels, sizes, size, stride):
    m = Mixture(channels, len(size), width=4, gate_stride=stride).double().eval()
    features = [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]
    index = torch.randint(0, math.prod(size), (batch, 7))
    expected = gather_points(m(features, size), index)
    keep = ones(features)
    coordinates = point_coordinates(index, size)
    for gate_logits in (None, m.gate_logits(features, keep, size)):
        got, read = m.at_points(features, keep, coordinates, size, gate_logits)
        assert torch.allclose(got, expected, atol=1e-5)
        for feature, values in zip(features, read):
            assert torch.allclose(values, gather_points(resize(feature, size), index), atol=1e-5)


@pytest.mark.parametrize("old, new", [([16, 2], [4, 8]), ([4, 16], [8, 4]), ([4, 16], [4, 4]), ([2, 9, 4], [4, 3, 4])])
def test_resizing_averages_axes_that_shrink_and_is_linear_along_axes_that_grow(old, new):
    x = torch.rand(2, 3, *old, dtype=torch.float64)
    expected = np.stack([average_or_interpolate(sample.numpy(), new) for sample in x])
    np.testing.assert_allclose(resize(x, new), expected, **CLOSE)


def test_results_do_not_depend_on_memory_format():
    m = Mixture([4, 3], 3, width=4).eval()
    features = [torch.randn(2, 4, 2, 3, 4), torch.randn(2, 3, 4, 6, 8)]
    other = [f.contiguous(memory_format=torch.channels_last_3d) for f in features]
    assert torch.allclose(m(features, [4, 6, 8]), m(other, [4, 6, 8]), atol=1e-6)


@pytest.mark.parametrize("n, alpha, min_active", [(3, 0.7, 1), (3, 0.7, 0), (5, 0.5, 2), (1, 0.9, 1), (4, 0.0, 1)])
def test_dropout_frequencies_of_every_mask(n, alpha, min_active):
    dropout = ExpertDropout(n, alpha, min_active)
    draws = 40000
    kept = dropout(draws).int()
    assert kept.sum(1).min() >= min_active
    # the chance of each mask by the definition: independent Bernoulli, given at least min_active survivors
    chance = {}
    for mask in itertools.product((0, 1), repeat=n):
        if sum(mask) >= min_active:
            chance[mask] = (1 - alpha) ** sum(mask) * alpha ** (n - sum(mask))
    total = sum(chance.values())
    seen = {}
    for row in kept.tolist():
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    for mask, c in chance.items():
        p = c / total
        assert abs(seen.get(mask, 0) / draws - p) < 4.5 * (p * (1 - p) / draws) ** 0.5 + 1e-12


def test_dropout_is_per_sample_and_off_in_eval():
    dropout = ExpertDropout(3, 0.5)
    assert len({tuple(r) for r in dropout(64).tolist()}) > 1
    assert torch.equal(dropout.eval()(4), torch.ones(4, 3))


def test_dropped_experts_contribute_nothing():
    m = Mixture([3, 3], 2, width=4, drop_prob=0.5)
    m.dropout.chance = torch.tensor([0.0, 1.0, 0.0, 0.0])  # always keep the first alone
    coarse, fine = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    a, b = m([coarse, fine], [8, 8]), m([coarse, fine * 7], [8, 8])
    assert torch.equal(a, b)
    assert not torch.equal(a, m([coarse * 7, fine], [8, 8]))


def test_mlp_keeps_the_scale_of_its_input():
    y = PointwiseMLP(64, [256, 256])(torch.randn(1, 64, 4000))
    assert 0.5 < y.pow(2).mean() < 2


BAD = [{"drop_prob": 1.0}, {"drop_prob": -0.1}, {"min_active": 3}, {"width": 0}, {"gate_stride": 0}]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_errors(options):
    with pytest.raises(InputError):
        Mixture([4, 4], 2, **options)
