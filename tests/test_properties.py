"""What holds for any input: the chances of every draw, independence of how work is split, the same result from one seed."""

import functools
import itertools
import math
from collections import Counter

import monai.data
import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, grouped, window
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pyramid_morse, randomised
from scipy.stats import chisquare

from monai_morse import Morse, MorseLoss
from monai_morse.networks import points as geometry
from monai_morse.networks.experts import ExpertDropout, Mixture

# --- chances: the frequency of every outcome against its exact probability --------------------------------------------------


def fits(seen, chance):
    """Whether draws look like their distribution: nothing impossible, and a chi-square test that fails once in 10,000 times."""
    possible = {k: c / math.fsum(chance.values()) for k, c in chance.items() if c > 0}
    assert set(seen) <= set(possible), "an outcome that cannot be"
    if len(possible) == 1:
        return True
    draws = sum(seen.values())
    assert min(possible.values()) * draws > 5, "too few draws for the test"
    return chisquare([seen[k] for k in possible], [c * draws for c in possible.values()]).pvalue > 1e-4


def mask_chances(n, alpha, min_active):
    """Independent drops, given that at least ``min_active`` experts stay."""
    masks = [m for m in itertools.product((0, 1), repeat=n) if sum(m) >= min_active]
    return {m: math.prod(1 - alpha if kept else alpha for kept in m) for m in masks}


@pytest.mark.parametrize(
    "n, alpha, min_active",
    [(1, 0.5, 0), (1, 0.9, 1), (2, 0.7, 0), (3, 0.7, 0), (3, 0.7, 1), (3, 0.7, 2), (4, 0.3, 2), (5, 0.5, 1), (3, 0.0, 0)],
)
def test_masks_of_expert_dropout_have_their_conditional_distribution(n, alpha, min_active):
    masks = ExpertDropout(n, alpha, min_active)(30000)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    assert fits(Counter(map(tuple, masks.int().tolist())), mask_chances(n, alpha, min_active))


def test_samples_of_a_batch_are_dropped_independently():
    dropout = ExpertDropout(2, 0.6, min_active=1)
    pairs = Counter(tuple((dropout(2) != 0).int().flatten().tolist()) for _ in range(8000))
    one = mask_chances(2, 0.6, 1)
    assert fits(pairs, {a + b: one[a] * one[b] for a in one for b in one})


def test_each_sample_of_a_mixture_has_its_own_mask_and_eval_has_none():
    mixture = randomised(Mixture([3, 2, 2], 2, width=4, drop_prob=0.5)).train()
    features = [torch.randn(1, c, 4, 5, dtype=torch.float64).expand(64, -1, -1, -1) for c in (3, 2, 2)]
    assert len({round(v, 9) for v in mixture(features, [4, 5]).flatten(1).sum(1).tolist()}) > 3  # of 7 masks
    mixture.eval()
    state = torch.get_rng_state()
    same = mixture(features, [4, 5])
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(mixture.dropout(5), torch.ones(5, 3))
    assert torch.allclose(same, same[:1].expand_as(same), atol=1e-12)
    dense = Mixture([3, 2, 2], 2, width=4).double().eval()
    dense.load_state_dict(mixture.state_dict())
    assert torch.equal(dense(features, [4, 5]), same)


def point_chances(score, number, oversample, ratio, pool=0):
    """(uncertain points, other points) -> chance: over every set of candidates, then every set of the voxels left over.

    Without candidates (oversample 0), over every choice from the ``pool`` most uncertain voxels.
    """
    every = range(len(score))
    number = min(number, len(score))
    taken = round(ratio * number)
    chances = Counter()
    best = sorted(every, key=lambda i: -score[i])[: max(pool, taken)]
    for candidates in (
        itertools.combinations(every, min(int(oversample * number), len(score)))
        if oversample
        else itertools.combinations(best, taken)
    ):
        uncertain = frozenset(sorted(candidates, key=lambda i: -score[i])[:taken])
        rests = list(itertools.combinations([i for i in every if i not in uncertain], number - taken))
        for rest in rests:
            chances[uncertain, frozenset(rest)] += 1 / len(rests)
    return chances


@pytest.mark.parametrize(
    "voxels, number, oversample, ratio, pool",
    [
        (6, 2, 2, 0.5, 0),  # 4 candidates of 6, the most uncertain of them, one of the other 5
        (6, 3, 1.5, 0.67, 0),  # 4 candidates, 2 of them
        (5, 2, 3, 0.5, 0),  # more candidates than voxels: all are
        (6, 3, 1, 1.0, 0),  # no other points
        (7, 2, 2, 1.0, 0),
        (5, 3, 3, 0.0, 0),  # nothing but uniform points
        (4, 9, 3, 0.75, 0),  # fewer voxels than points: all of them
        (6, 3, 0, 0.67, 4),  # two of the 4 most uncertain, one of the other 4
        (6, 3, 0, 0.67, 1),  # a pool too small for two
        (4, 9, 0, 0.5, 9),  # a pool larger than the window
    ],
)
def test_training_points_have_their_distribution(voxels, number, oversample, ratio, pool):
    score = -torch.rand(voxels)
    scores = score.expand(30000, -1)
    if oversample:
        index = geometry.select_oversampled_points(scores, number, oversample, ratio)
    else:
        index = geometry.select_rendered_points(scores, number, pool, ratio)
    taken = round(ratio * min(number, voxels))
    seen = Counter((frozenset(row[:taken]), frozenset(row[taken:])) for row in index.tolist())
    assert all(len(a) == taken and len(a | b) == min(number, voxels) for a, b in seen)
    assert fits(seen, point_chances(score.tolist(), number, oversample, ratio, pool))


# --- how work is split ----------------------------------------------------------------------------------------------------

SYSTEMS = [
    ("none", "backbone", "anatomical"),
    ("stochastic", "experts", "anatomical"),
    ("stochastic", "backbone", "anatomical"),
    ("dense", "experts", "pointrend"),
    ("dense", "backbone", "pointrend"),
    ("dense", "experts", "implicit_pointrend"),
    ("dense", "backbone", "implicit_pointrend"),
]
each_system = pytest.mark.parametrize("experts, coarse, renderer", SYSTEMS)


@pytest.mark.parametrize("dims", [2, 3])
@each_system
def test_points_may_be_rendered_in_chunks(dims, experts, coarse, renderer):
    net = pyramid_morse(dims, 3, [3, 2], [2, 1], experts=experts, coarse=coarse, renderer=renderer)
    x = torch.randn(2, 1, *(6, 9, 4)[:dims], dtype=torch.float64)
    places = torch.rand(2, 1000, dims, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        chunks = [net.render_at(x, part) for part in places.chunk(7, dim=1)]
        assert len(chunks) == 7
        assert torch.allclose(torch.cat(chunks, 2), net.render_at(x, places), rtol=0, atol=1e-12)


@each_system
def test_no_place_gives_no_logits(experts, coarse, renderer):
    net = pyramid_morse(2, 3, [3, 2], [2, 1], experts=experts, coarse=coarse, renderer=renderer)
    x = torch.randn(2, 1, 6, 9, dtype=torch.float64)
    assert net.render_at(x, torch.zeros(2, 0, 2)).shape == (2, 3, 0)


@pytest.mark.parametrize("backbone, dims", [("BasicUNet", 2), ("BasicUNet", 3), ("DynUNet", 2), ("DynUNet", 3)])
@each_system
def test_a_sample_alone_in_a_batch_or_in_another_memory_format(backbone, dims, experts, coarse, renderer):
    net = randomised(Morse(TINY[backbone](dims, 3), experts, renderer, **grouped({**SMALL, "coarse": coarse})))
    x = window(backbone, dims, batch=5 - dims).double()
    channels_last = torch.channels_last if dims == 2 else torch.channels_last_3d
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(net(x.contiguous(memory_format=channels_last)), expected, rtol=0, atol=1e-9)
        assert torch.allclose(net(x.flip(0)).flip(0), expected, rtol=0, atol=1e-9)
        assert torch.allclose(torch.cat([net(sample[None]) for sample in x]), expected, rtol=0, atol=1e-9)
        net = net.to(memory_format=channels_last)
        assert torch.allclose(net(x.contiguous(memory_format=channels_last)), expected, rtol=0, atol=1e-9)


# --- the same seed --------------------------------------------------------------------------------------------------------


def train_three_steps(loader_class, workers, seed=1):
    """The weights after 3 steps on batches that a loader shuffles with a generator of its own, and the batches' order."""
    torch.manual_seed(seed)
    net = Morse(TINY["BasicUNet"](2, 3), **SMALL)
    images = torch.rand(6, 1, 32, 48, generator=torch.Generator().manual_seed(2))
    cases = [{"image": x, "label": (3 * x).long(), "number": i} for i, x in enumerate(images)]
    generator = torch.Generator().manual_seed(3)
    loader = loader_class(monai.data.Dataset(cases), batch_size=2, shuffle=True, num_workers=workers, generator=generator)
    optimizer, loss = torch.optim.AdamW(net.parameters(), 1e-2), MorseLoss(weight=0.1)
    torch.manual_seed(seed + 1)
    order = []
    for batch in loader:
        optimizer.zero_grad()
        loss(net(batch["image"], return_points=True), batch["label"]).backward()
        optimizer.step()
        order += batch["number"].tolist()
    assert len(order) == 6
    return order, torch.cat([v.double().flatten() for v in net.state_dict().values()])


def test_same_seed_same_weights_with_and_without_workers():
    order, expected = train_three_steps(torch.utils.data.DataLoader, 0)
    for kind, workers in itertools.product([torch.utils.data.DataLoader, monai.data.DataLoader], [2, 2, 0]):
        got_order, got = train_three_steps(kind, workers)
        assert got_order == order and torch.equal(got, expected)
    assert not torch.equal(train_three_steps(torch.utils.data.DataLoader, 0, seed=7)[1], expected)


# --- properties of any input ----------------------------------------------------------------------------------------------

some = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.lists(st.integers(1, 7), min_size=2, max_size=3)
batches = st.integers(1, 3)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
seeds = st.integers(0, 2**31)


@some
@given(sizes, batches, st.integers(2, 9), dtypes, st.booleans(), seeds)
def test_uncertainty_is_what_sorting_says(size, batch, classes, dtype, ties, seed):
    torch.manual_seed(seed)
    logits = torch.randn(batch, classes, *size).to(dtype)
    logits = logits.round() if ties else logits
    got = geometry.uncertainty(logits)
    ordered = logits.sort(1).values.flatten(2)
    assert got.dtype == dtype and (got <= 0).all()
    assert torch.equal(got, ordered[:, -2] - ordered[:, -1])


@some
@given(st.integers(1, 200), batches, st.integers(1, 250), st.floats(1, 5), st.floats(0, 1), dtypes, st.booleans(), seeds)
def test_selected_points_are_voxels_and_differ(voxels, batch, number, oversample, ratio, dtype, ties, seed):
    torch.manual_seed(seed)
    score = -torch.rand(batch, voxels).to(dtype)
    score = score.round() if ties else score
    draws = [
        geometry.select_oversampled_points(score, number, oversample, ratio),
        geometry.select_rendered_points(score, number, voxels // 3, ratio),
    ]
    for index in (*draws, geometry.select_uncertain_points(score, number)):
        assert index.shape == (batch, min(number, voxels)) and index.dtype == torch.long
        assert index.min() >= 0 and index.max() < voxels
        assert all(len(set(row)) == len(row) for row in index.tolist())
    rest = torch.ones(batch, voxels, dtype=torch.bool).scatter(1, index, False)
    for b in range(batch):
        if rest[b].any():
            assert score[b, index[b]].min() >= score[b, rest[b]].max()


@some
@given(sizes, batches, st.integers(1, 9), dtypes, st.data(), seeds)
def test_what_is_written_is_gathered_and_nothing_else_changes(size, batch, channels, dtype, data, seed):
    torch.manual_seed(seed)
    number = data.draw(st.integers(0, math.prod(size)))
    x, values = torch.randn(batch, channels, *size).to(dtype), torch.randn(batch, channels, number).to(dtype)
    index = torch.stack([torch.randperm(math.prod(size))[:number] for _ in range(batch)])
    before = x.clone()
    written = geometry.write_points(x, index, values)
    assert written.dtype == dtype and torch.equal(x, before)
    assert torch.equal(geometry.gather_points(written, index), values)
    assert torch.equal(geometry.write_points(written, index, geometry.gather_points(x, index)), x)


@some
@given(st.lists(st.integers(1, 600), min_size=2, max_size=3), batches, seeds)
def test_index_to_coordinates_and_back(size, batch, seed):
    torch.manual_seed(seed)
    index = torch.randint(0, math.prod(size), (batch, 50))
    coordinates = geometry.point_coordinates(index, size)
    assert coordinates.shape == (batch, 50, len(size)) and coordinates.abs().max() < 1
    lengths = torch.tensor(size)
    voxel = ((coordinates + 1) * lengths - 1) / 2
    assert (voxel - voxel.round()).abs().max() < 1e-3
    found = np.ravel_multi_index(tuple(voxel.round().long().movedim(-1, 0).numpy()), size)
    assert np.array_equal(found, index.numpy())


@some
@given(sizes, batches, dtypes, seeds)
def test_a_linear_ramp_is_sampled_exactly_between_the_outermost_centres(size, batch, dtype, seed):
    torch.manual_seed(seed)
    slopes, lengths = torch.randn(len(size), dtype=torch.float64), torch.tensor(size, dtype=torch.float64)
    ramp = torch.full(size, 1.5, dtype=torch.float64)
    for axis, n in enumerate(size):
        ramp = ramp + slopes[axis] * torch.arange(n).reshape([-1 if a == axis else 1 for a in range(len(size))])
    places = (torch.rand(batch, 20, len(size), dtype=torch.float64) * 2 - 1) * (1 - 1 / lengths)
    expected = 1.5 + ((((places + 1) * lengths - 1) / 2) * slopes).sum(-1)
    x = ramp.to(dtype).expand(batch, 2, *size)
    got = geometry.sample_linear(x, places if dtype == torch.float64 else places.float())
    tolerance = 8 * torch.finfo(dtype).eps * (1 + ramp.abs().max().item())
    assert got.dtype == dtype and got.shape == (batch, 2, 20)
    assert torch.allclose(got.double(), expected[:, None].expand(-1, 2, -1), rtol=0, atol=tolerance)


@functools.cache
def network(dims, classes, system, dtype):
    experts, coarse, renderer = system
    options = {"experts": experts, "coarse": coarse, "renderer": renderer, "gate_stride": 2, "head": {"residual": True}}
    return pyramid_morse(dims, classes, [2, 3], [2, 1], **options).to(dtype)


@some
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    batches,
    st.sampled_from([1, 2, 9]),
    st.sampled_from(SYSTEMS),
    dtypes,
    seeds,
)
def test_morse_takes_any_window(size, batch, classes, system, dtype, seed):
    torch.manual_seed(seed)
    net, finer = network(len(size), classes, system, dtype), [2 * n + 1 for n in size]
    x = torch.randn(batch, 1, *size).to(dtype)
    # oneDNN's convolution of a 1 x 1 x 5 image in bfloat16 reads memory that is not its own, on CPUs with AMX
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=dtype != torch.bfloat16):
        for logits, shape in ((net.eval()(x), size), (net.eval()(x, grid=finer), finer), (net.train()(x), size)):
            assert logits.shape == (batch, classes, *shape) and logits.dtype == dtype and logits.isfinite().all()
        out = net(x, return_points=True, grid=finer)
    assert out.point_logits.shape == (batch, classes, 9) and out.point_logits.isfinite().all()
    assert out.coarse.shape == (batch, classes, *size) and out.point_index.max() < math.prod(finer)
