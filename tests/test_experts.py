"""SMoE, equations 1 and 2, against loops over voxels in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from monai_morse import InputError
from monai_morse.networks.experts import ExpertDropout, Mixture, PointwiseMLP
from monai_morse.networks.points import gather_points, point_coordinates
from monai_morse.networks.resampling import resize, shrink


def slow_linear_up(x, size):
    """Linear upsampling, align_corners=False, one voxel and one corner at a time."""
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for place in itertools.product(*[range(n) for n in size]):
        corners = [((), 1.0)]
        for p, n, m in zip(place, size, x.shape[2:]):
            source = min(max((p + 0.5) * m / n - 0.5, 0.0), m - 1)
            low = int(source)
            high = min(low + 1, m - 1)
            f = source - low
            corners = [(c + (i,), w * v) for c, w in corners for i, v in ((low, 1 - f), (high, f))]
        for c, w in corners:
            out[(slice(None), slice(None), *place)] += w * x[(slice(None), slice(None), *c)]
    return out


def slow_mlp(mlp, v):
    """A PointwiseMLP on one vector, with plain matrix products."""
    for layer in mlp.layers:
        v = layer.weight[:, :, 0] @ v + layer.bias if isinstance(layer, torch.nn.Conv1d) else v.clamp(min=0)
    return v


def slow_mixture(m, features, size):
    """Equations 1 and 2 as written, full-resolution gate."""
    experts = []
    for mlp, d in zip(m.experts, features):
        e = torch.zeros(d.shape[0], m.out_channels, *d.shape[2:], dtype=d.dtype)
        for b in range(d.shape[0]):
            for place in itertools.product(*[range(n) for n in d.shape[2:]]):
                e[(b, slice(None), *place)] = slow_mlp(mlp, d[(b, slice(None), *place)])
        experts.append(slow_linear_up(e, size))
    if len(experts) == 1:
        weights = torch.ones(features[0].shape[0], 1, *size, dtype=features[0].dtype)
    else:
        conv = F.conv2d if len(size) == 2 else F.conv3d
        g = torch.cat(experts, 1)
        convs = [layer for layer in m.gate if not isinstance(layer, torch.nn.ReLU)]
        for i, layer in enumerate(convs):
            g = conv(g, layer.weight, layer.bias, padding=1)
            g = g.clamp(min=0) if i + 1 < len(convs) else g
        weights = torch.exp(g) / torch.exp(g).sum(1, keepdim=True)
    mixed = sum(weights[:, i : i + 1] * e for i, e in enumerate(experts))
    out = torch.zeros_like(mixed)
    for b in range(out.shape[0]):
        for place in itertools.product(*[range(n) for n in size]):
            out[(b, slice(None), *place)] = slow_mlp(m.fuse, mixed[(b, slice(None), *place)])
    return out, weights


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


@pytest.mark.parametrize("batch, channels, sizes, size", CASES)
def test_mixture_equals_the_equations(batch, channels, sizes, size):
    m = Mixture(channels, len(size), width=4).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.5)
    features = [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]
    with torch.no_grad():
        expected, weights = slow_mixture(m, features, size)
        assert torch.allclose(m(features, size), expected, atol=1e-6)
        gate = resize(m.gate_logits(features, ones(features), size), size).softmax(1)
    assert torch.allclose(gate, weights, atol=1e-6)
    assert torch.allclose(gate.sum(1), torch.ones_like(gate[:, 0]))
    assert (gate >= 0).all()


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
    got = m.at_points(features, keep, m.gate_logits(features, keep, size), point_coordinates(index, size))
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("old, new", [([16, 2], [4, 8]), ([4, 16], [8, 4]), ([4, 16], [4, 4]), ([2, 9, 4], [4, 3, 4])])
def test_resizing_averages_axes_that_shrink_and_is_linear_along_axes_that_grow(old, new):
    x = torch.rand(2, 3, *old, dtype=torch.float64)
    expected = x
    for axis, (a, b) in enumerate(zip(old, new), 2):
        y = expected.movedim(axis, -1)
        if b < a:
            y = y.unflatten(-1, (b, a // b)).mean(-1)
        rest = list(y.shape[1:-1])
        y = slow_linear_up(y.flatten(1, -2)[..., None, :], [1, b])[:, :, 0].unflatten(1, rest)
        expected = y.movedim(-1, axis)
    assert torch.allclose(resize(x, new), expected, atol=1e-9)


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
