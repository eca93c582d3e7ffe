"""Point geometry against loops over voxels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from monai_morse import InputError
from monai_morse.networks import points as geometry

SIZES = [[5, 7], [4, 5, 7]]


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_uncertainty_is_second_largest_minus_largest(classes):
    logits = torch.randn(3, classes, 4, 5, 7, dtype=torch.float64)
    got = geometry.uncertainty(logits)
    for b in range(3):
        for i, v in enumerate(logits[b].reshape(classes, -1).T.tolist()):
            ordered = sorted(v)
            assert got[b, i].item() == pytest.approx(ordered[-2] - ordered[-1], abs=1e-12)


def test_uncertainty_of_one_channel_is_that_of_the_class_against_a_zero_logit():
    logits = torch.randn(2, 1, 4, 5)
    assert torch.allclose(geometry.uncertainty(logits), geometry.uncertainty(torch.cat([torch.zeros_like(logits), logits], 1)))


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_are_voxel_centres_in_axis_order(size):
    index = torch.arange(math.prod(size)).reshape(1, -1)
    got = geometry.point_coordinates(index, size)[0]
    for i, place in enumerate(torch.cartesian_prod(*[torch.arange(n) for n in size]).tolist()):
        expected = [2 * (x + 0.5) / n - 1 for x, n in zip(place, size)]
        assert got[i].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_sampling_at_voxel_centres_is_indexing(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    index = torch.stack([torch.randperm(math.prod(size))[:11] for _ in range(2)])
    assert torch.allclose(
        geometry.sample_linear(x, geometry.point_coordinates(index, size)), geometry.gather_points(x, index), atol=1e-6
    )


@pytest.mark.parametrize("size", SIZES)
def test_sampling_equals_grid_sample_which_wants_reversed_axes(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    coordinates = torch.rand(2, 50, len(size), dtype=torch.float64) * 2.2 - 1.1  # some beyond the edge
    grid = coordinates.flip(-1).reshape(2, 50, *[1] * (len(size) - 1), len(size))
    expected = F.grid_sample(x, grid, align_corners=False, padding_mode="border").flatten(2)
    assert torch.allclose(geometry.sample_linear(x, coordinates), expected, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_sampling_a_coarse_map_equals_upsampling_it(size):
    fine = [2 * n + 1 for n in size]
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    up = F.interpolate(x, fine, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)
    index = torch.arange(math.prod(fine)).reshape(1, -1)
    assert torch.allclose(geometry.sample_linear(x, geometry.point_coordinates(index, fine)), up.flatten(2), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_writing_back_is_the_inverse_of_gathering(size):
    x = torch.randn(2, 3, *size)
    index = torch.stack([torch.randperm(math.prod(size))[:9] for _ in range(2)])
    assert torch.equal(geometry.write_points(x, index, geometry.gather_points(x, index)), x)
    values = torch.randn(2, 3, 9)
    written = geometry.write_points(x, index, values)
    assert torch.equal(geometry.gather_points(written, index), values)
    assert int((written != x).any(1).sum()) == 18


def test_inference_takes_exactly_the_most_uncertain_voxels():
    score = -torch.rand(3, 200)
    index = geometry.select_uncertain_points(score, 17)
    for b in range(3):
        assert set(index[b].tolist()) == set(sorted(range(200), key=lambda i: -score[b, i].item())[:17])
    assert geometry.select_uncertain_points(score, 500).shape == (3, 200)


def test_training_points_counts_and_uniqueness():
    index = geometry.select_oversampled_points(-torch.rand(4, 1000), 100, 3, 0.75)
    assert index.shape == (4, 100)
    assert all(len(set(row.tolist())) == 100 for row in index)
    assert geometry.select_oversampled_points(-torch.rand(2, 30), 100, 3, 0.75).sort(1).values.tolist() == [list(range(30))] * 2


def test_uncertain_part_is_the_candidates_top_and_the_rest_is_uniform():
    # every voxel a candidate: the uncertain part must be the top of all voxels, the rest uniform over the others
    score = -torch.rand(1, 90).repeat(4000, 1)
    index = geometry.select_oversampled_points(score, 40, 3, 0.5)
    top = set(score[0].topk(20).indices.tolist())
    assert all(set(row[:20].tolist()) == top for row in index[:50])
    counts = torch.bincount(index[:, 20:].flatten(), minlength=90)
    assert counts[list(top)].sum() == 0
    others = counts[[i for i in range(90) if i not in top]].double()
    expected = 4000 * 20 / 70
    # without replacement the counts of one draw are negatively correlated: the statistic is (70 - 20) / 69 of a chi-square's
    statistic = ((others - expected) ** 2 / expected).sum().item() * 69 / 50
    assert statistic < 116  # 99.97 % of a chi-square with 69 degrees of freedom


def test_candidates_are_a_uniform_draw():
    # one candidate a point, all "uncertain": the points are the candidates
    index = geometry.select_oversampled_points(torch.zeros(20000, 50), 5, 1, 1.0)
    counts = torch.bincount(index.flatten(), minlength=50).double()
    statistic = ((counts - 2000) ** 2 / 2000).sum().item() * 49 / 45
    assert statistic < 88  # 99.9 % at 49 degrees of freedom is 85.4


def test_oversampling_prefers_uncertain_voxels():
    score = torch.linspace(-1, 0, 3000).repeat(50, 1)
    mean = [geometry.select_oversampled_points(score, 100, k, 1.0).double().mean().item() for k in (1, 3, 10)]
    assert mean[0] == pytest.approx(1500, rel=0.05) and mean[0] < mean[1] < mean[2]
    assert mean[1] == pytest.approx(3000 * (1 - 1 / 6), rel=0.05)  # the top third of a uniform draw


@pytest.mark.parametrize("options", [{"num_train": 0}, {"oversample": 0.5}, {"importance_ratio": 1.5}])
def test_bad_options_are_errors(options):
    with pytest.raises(InputError, match="points"):
        geometry.PointSelection(**options)


def test_without_exclusion_a_voxel_is_as_uncertain_as_its_least_certain_class():
    logits = torch.randn(2, 3, 4, 5)
    found = geometry.uncertainty(logits, multilabel=True)
    for b in range(2):
        for v in range(20):
            assert found[b, v] == -min(abs(float(logits[b, k].flatten()[v])) for k in range(3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sides", [(1, 1, 1), (3, 3, 3), (5, 3, 1)])
def test_a_patch_holds_the_voxels_around_a_point_and_the_edge_repeated_beyond_it(size, sides):
    sides = list(sides[: len(size)])
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    index = torch.stack([torch.randperm(math.prod(size))[:9] for _ in range(2)])
    found = geometry.gather_patch(x, index, sides)
    assert found.shape == (2, 3 * math.prod(sides), 9)
    assert torch.allclose(geometry.sample_patch(x, geometry.point_coordinates(index, size).double(), sides), found, atol=1e-5)
    steps = list(itertools.product(*(range(-(side // 2), side // 2 + 1) for side in sides)))
    places = torch.cartesian_prod(*[torch.arange(n) for n in size]).tolist()
    for b in range(2):
        for p in range(9):
            for m, step in enumerate(steps):
                voxel = [min(max(i + s, 0), n - 1) for i, s, n in zip(places[index[b, p]], step, size)]
                for c in range(3):
                    assert found[b, c * len(steps) + m, p].item() == pytest.approx(x[b, c][tuple(voxel)].item())


@pytest.mark.parametrize("side", [1, 9, 27])
def test_a_standardised_patch_is_its_differences_their_mean_and_their_spread(side):
    patch = torch.randn(2, 3 * side, 5, dtype=torch.float64) * 4 + 7
    found = geometry.standardize_patch(patch, channels=3)
    assert found.shape == (2, 3 * (side + 2), 5)
    for b, c, p in itertools.product(range(2), range(3), range(5)):
        voxels = [patch[b, c * side + m, p].item() for m in range(side)]
        mean = sum(voxels) / side
        deviation = math.sqrt(sum((v - mean) ** 2 for v in voxels) / side + 0.01)
        expected = [(v - mean) / deviation for v in voxels] + [mean, deviation]
        assert found[b, c * (side + 2) : (c + 1) * (side + 2), p].tolist() == pytest.approx(expected, abs=1e-9)


def test_air_without_any_contrast_stays_finite_and_so_does_its_gradient():
    patch = torch.zeros(1, 27, 4, requires_grad=True)
    found = geometry.standardize_patch(patch, channels=1)
    assert torch.equal(found[:, :28], torch.zeros(1, 28, 4)) and torch.allclose(found[:, 28], torch.tensor(0.1))
    found.sum().backward()
    assert patch.grad is not None and patch.grad.isfinite().all()
