"""Every formula against a slow, obvious reference: loops over samples, voxels and points in NumPy, float64.

No reference calls the package; each takes the weights of a module and does the arithmetic one vector at a time.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import (
    AT_VOXELS,
    CLOSE,
    COARSE,
    RENDERERS,
    WINDOWS,
    centre,
    head_by_hand,
    mixture_by_hand,
    morse_by_hand,
    most_uncertain,
    moved,
    pyramid_morse,
    randomised,
    value,
    value_at,
    voxels,
)

from monai_morse.networks import FourierEncoding
from monai_morse.networks import points as geometry
from monai_morse.networks.experts import Mixture
from monai_morse.networks.renderers import AnatomicalHead, ImplicitPointRendHead, PointRendHead

# --- SMoE -----------------------------------------------------------------------------------------------------------------

FEATURES = [  # batch, channels of D_1..D_N, their sizes, the input's size
    (1, [5], [[3, 2]], [4, 6]),
    (3, [4, 2], [[2, 3], [4, 6]], [4, 6]),
    (1, [3, 2, 4, 1, 3], [[1, 1], [2, 2], [2, 3], [4, 5], [5, 7]], [5, 7]),
    (3, [5, 3], [[2, 2, 1], [4, 5, 3]], [4, 5, 3]),
    (1, [3, 4, 2, 3], [[1, 1, 1], [1, 2, 2], [2, 3, 4], [2, 3, 4]], [2, 3, 4]),
]


@pytest.mark.parametrize("stride, norm", [(1, False), (2, False), (3, False), (1, True), (2, True), ((2, 1, 3), False)])
@pytest.mark.parametrize("batch, channels, sizes, size", FEATURES)
def test_mixture_is_equations_1_and_2(batch, channels, sizes, size, stride, norm):
    stride = list(stride[: len(size)]) if isinstance(stride, tuple) else stride
    m = randomised(Mixture(channels, len(size), width=3, gate_stride=stride, gate_norm=norm))
    features = [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]
    places = torch.rand(batch, 4, len(size), dtype=torch.float64) * 2.2 - 1.1
    with torch.no_grad():
        keep = torch.ones(batch, len(channels), dtype=torch.float64)
        got, got_at = m(features, size), m.at_points(features, keep, places, size)[0]
    for b in range(batch):
        mixture = mixture_by_hand(m, [d[b].numpy() for d in features], size)
        for voxel in voxels(size):
            x_out, w = mixture(centre(voxel, size))
            assert w.sum() == pytest.approx(1, abs=1e-12) and len(w) == len(channels)
            np.testing.assert_allclose(value(got[b], voxel), x_out, **CLOSE)
        for p in range(4):
            np.testing.assert_allclose(got_at[b, :, p], mixture(places[b, p].tolist())[0], **CLOSE)


@pytest.mark.parametrize("renormalize, scale", [(True, 1), (False, 2.5)])  # the paper's: standard dropout with alpha = 0.6
@pytest.mark.parametrize("batch, channels, sizes, size", FEATURES[1:])
def test_dropped_experts_are_zero_to_the_gate_and_to_the_sum(batch, channels, sizes, size, renormalize, scale):
    n = len(channels)
    m = randomised(Mixture(channels, len(size), width=3, drop_prob=0.6, renormalize=renormalize)).train()
    assert m.dropout.masks.unique().tolist() == [0, pytest.approx(scale)]
    features = [torch.randn(batch, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes)]
    codes = torch.randint(0, 2**n, (batch,))  # bit i of a sample's code: expert i is kept
    kept = [[scale * ((int(code) >> i) % 2) for i in range(n)] for code in codes]
    m.dropout.forward = lambda batch: torch.tensor(kept, dtype=torch.float64)
    got = m(features, size).detach()
    for b in range(batch):
        mixture = mixture_by_hand(m, [d[b].numpy() for d in features], size, kept[b])
        for voxel in voxels(size):
            x_out, w = mixture(centre(voxel, size))
            assert w.sum() == pytest.approx(float(any(kept[b]) or not renormalize), abs=1e-12)
            np.testing.assert_allclose(value(got[b], voxel), x_out, **CLOSE)


# --- points ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [[1, 1], [5, 7], [1, 4], [4, 5, 7], [2, 1, 3]])
@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_is_linear_interpolation_by_hand(batch, size):
    x = torch.randn(batch, 3, *size, dtype=torch.float64)
    inside = torch.rand(batch, 20, len(size), dtype=torch.float64) * 2.6 - 1.3
    faces = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=len(size))), dtype=torch.float64)
    edges = torch.tensor([centre(v, size) for v in voxels(size)], dtype=torch.float64)
    places = torch.cat([inside, faces.expand(batch, -1, -1), edges.expand(batch, -1, -1)], 1)
    got = geometry.sample_linear(x, places)
    for b in range(batch):
        for p in range(places.shape[1]):
            np.testing.assert_allclose(got[b, :, p], value_at(x[b].numpy(), places[b, p].tolist()), **CLOSE)


@pytest.mark.parametrize("size, fine", [([5, 7], [10, 21]), ([3, 4], [7, 9]), ([4, 5, 3], [8, 6, 3]), ([2, 1, 3], [5, 4, 7])])
def test_sampling_at_finer_grids_centres_is_interpolate(size, fine):
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    places = torch.tensor([[centre(v, fine) for v in voxels(fine)]] * 3, dtype=torch.float64)
    mode = "bilinear" if len(size) == 2 else "trilinear"
    expected = F.interpolate(x, fine, mode=mode, align_corners=False).flatten(2)
    np.testing.assert_allclose(geometry.sample_linear(x, places), expected, **CLOSE)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_coordinates_are_mapped_by_an_affine_map_of_each_sample(batch, dims):
    places = torch.rand(batch, 6, dims, dtype=torch.float64) * 2 - 1
    window_affine = torch.randn(batch, dims, dims + 1, dtype=torch.float64)
    got = geometry.apply_affine(places, window_affine)
    for b in range(batch):
        for p in range(6):
            np.testing.assert_allclose(got[b, p], moved(window_affine[b], places[b, p].tolist()), **CLOSE)


@pytest.mark.parametrize(
    "size, voxel, place, frequencies, sines, cosines",
    [
        # y = 2 * 3.5 / 4 - 1, x = 2 * 1.5 / 5 - 1; turns: 0.75 - 0.2 = 0.55 (198 degrees) and -0.5 (-180 degrees)
        ([4, 5], (3, 1), [0.75, -0.4], [[1, 0.5], [0, 1.25]], [-0.309016994, 0.0], [-0.951056516, -1.0]),
        # turns: 0.5 - 0.5 - 0.4 = -0.4 (-144 degrees) and 0.125 + 0.25 = 0.375 (135 degrees)
        (
            [2, 4, 5], (1, 2, 0), [0.5, 0.25, -0.8], [[1, -2, 0.5], [0.25, 1, 0]],
            [-0.587785252, 0.707106781], [-0.809016994, -0.707106781],
        ),
        # the last axis alone: 2 * 6.5 / 7 - 1 = 6/7; a quarter of 6/7 turns is 77.142857 degrees
        ([3, 2, 7], (0, 1, 6), [-2 / 3, 0.5, 6 / 7], [[0, 0, 0.25]], [0.974927912], [0.222520934]),
    ],
)  # fmt: skip
def test_encoding_worked_by_hand(size, voxel, place, frequencies, sines, cosines):
    index = torch.tensor([[int(np.ravel_multi_index(voxel, size))]])
    coordinates = geometry.point_coordinates(index, size)
    np.testing.assert_allclose(coordinates[0, 0], place, **AT_VOXELS)
    encoding = FourierEncoding(len(size), len(frequencies)).double()
    encoding.frequencies.data = torch.tensor(frequencies, dtype=torch.float64)
    np.testing.assert_allclose(encoding(coordinates)[0, :, 0].detach(), sines + cosines, **AT_VOXELS)


# --- rendering heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AnatomicalHead, PointRendHead, ImplicitPointRendHead])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("batch, classes, dims", [(1, 2, 2), (3, 9, 2), (3, 2, 3), (1, 9, 3), (3, 1, 3)])
def test_head_is_its_matrices_one_by_one(kind, residual, batch, classes, dims):
    head = randomised(kind(5, classes, dims, context_channels=4, width=6, num_frequencies=3, residual=residual))
    draw = [torch.randn(batch, *shape, dtype=torch.float64) for shape in ((5, 7), (7, dims), (classes, 7), (4,))]
    with torch.no_grad():
        got = head(*draw)
    features, places, coarse, context = (t.numpy() for t in draw)
    assert got.shape == (batch, classes, 7)
    for b in range(batch):
        for p in range(7):
            expected = head_by_hand(head, features[b, :, p], places[b, p], coarse[b, :, p], context[b])
            np.testing.assert_allclose(got[b, :, p], expected, **CLOSE)


# --- Morse ----------------------------------------------------------------------------------------------------------------

SYSTEMS = [(*w, *c, r) for w in WINDOWS for c in COARSE for r in RENDERERS if c[0] != "stochastic" or r == "anatomical"]
each_system = pytest.mark.parametrize("batch, classes, size, channels, strides, experts, coarse, renderer", SYSTEMS)


def affine_maps(batch, dims):
    return torch.eye(dims, dims + 1, dtype=torch.float64) * 0.5 + 0.1 * torch.randn(batch, dims, dims + 1, dtype=torch.float64)


@each_system
def test_prediction_is_the_coarse_map_with_its_most_uncertain_voxels_rendered(
    batch, classes, size, channels, strides, experts, coarse, renderer
):
    words = {"experts": experts, "coarse": coarse, "renderer": renderer, "read_features": batch > 1, "patch_norm": classes > 2}
    net = pyramid_morse(len(size), classes, channels, strides, gate_stride=1 + batch % 2, **words)
    x = torch.randn(batch, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        got = net(x).numpy()
    for b in range(batch):
        expected, render = morse_by_hand(net, x, b)
        chosen = most_uncertain(expected, 7)
        for voxel in voxels(size):
            if voxel in chosen:
                np.testing.assert_allclose(value(got[b], voxel), render(centre(voxel, size)), **AT_VOXELS)
                assert (value(got[b], voxel) != value(expected, voxel)).any()
            else:
                np.testing.assert_allclose(value(got[b], voxel), value(expected, voxel), **CLOSE)


@pytest.mark.parametrize("batch, classes, size, channels, strides", WINDOWS)
def test_expert_weights_are_equation_1_on_any_grid(batch, classes, size, channels, strides):
    net = pyramid_morse(len(size), classes, channels, strides, gate_stride=2)
    x, grid = torch.randn(batch, 1, *size, dtype=torch.float64), [2 * n + 1 for n in size]
    with torch.no_grad():
        got, finer = (net.inspect(x, g)["expert_weights"] for g in (None, grid))
    for b in range(batch):
        features = [f(x[b : b + 1])[0].detach().numpy() for f in net.decoder.backbone.features]
        mixture = mixture_by_hand(net.mixture, features, size)
        for maps, shape in ((got, size), (finer, grid)):
            for voxel in voxels(shape):
                np.testing.assert_allclose(value(maps[b], voxel), mixture(centre(voxel, shape))[1], **CLOSE)
    assert "expert_weights" not in pyramid_morse(len(size), classes, channels, strides, experts="none").inspect(x)


@each_system
def test_rendering_at_any_place_in_a_window_that_lies_anywhere(
    batch, classes, size, channels, strides, experts, coarse, renderer
):
    dims = len(size)
    net = pyramid_morse(dims, classes, channels, strides, experts=experts, coarse=coarse, renderer=renderer)
    x, window_affine = torch.randn(batch, 1, *size, dtype=torch.float64), affine_maps(batch, dims)
    places = torch.rand(batch, 5, dims, dtype=torch.float64) * 2 - 1
    identity = torch.eye(dims, dims + 1, dtype=torch.float64).expand(batch, -1, -1)
    with torch.no_grad():
        got, got_placed, got_same = (
            net.render_at(x, places),
            net.render_at(x, places, window_affine),
            net.render_at(x, places, identity),
        )
    np.testing.assert_allclose(got_same, got, **CLOSE)
    assert renderer == "pointrend" or not torch.allclose(got_placed, got)
    for b in range(batch):
        render, render_placed = morse_by_hand(net, x, b)[1], morse_by_hand(net, x, b, window_affine)[1]
        for p in range(5):
            np.testing.assert_allclose(got[b, :, p], render(places[b, p].tolist()), **CLOSE)
            np.testing.assert_allclose(got_placed[b, :, p], render_placed(places[b, p].tolist()), **CLOSE)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("experts, coarse", COARSE[:3])
@pytest.mark.parametrize("window, grid", [(WINDOWS[1], [8, 10]), (WINDOWS[2], [6, 5, 4])])
def test_prediction_on_a_finer_grid(window, grid, experts, coarse, renderer, placed):
    batch, classes, size, channels, strides = window
    net = pyramid_morse(len(size), classes, channels, strides, experts=experts, coarse=coarse, renderer=renderer)
    x, window_affine = torch.randn(batch, 1, *size, dtype=torch.float64), affine_maps(batch, len(size)) if placed else None
    with torch.no_grad():
        got = net(x, grid=grid, window_affine=window_affine).numpy()
    number = math.ceil(7 * math.prod(grid) / math.prod(size))  # as much space as 7 voxels of the window fill
    for b in range(batch):
        coarse_map, render = morse_by_hand(net, x, b, window_affine)
        finer = np.stack([value_at(coarse_map, centre(v, grid)) for v in voxels(grid)], 1).reshape(classes, *grid)
        chosen = most_uncertain(finer, number)
        assert len(chosen) == number
        for voxel in voxels(grid):
            if voxel in chosen:
                np.testing.assert_allclose(value(got[b], voxel), render(centre(voxel, grid)), **AT_VOXELS)
            else:
                np.testing.assert_allclose(value(got[b], voxel), value(finer, voxel), **CLOSE)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("experts, coarse", COARSE[:3])
@pytest.mark.parametrize("window, grid", [(WINDOWS[1], None), (WINDOWS[2], [6, 8, 4])])
def test_training_points_are_rendered_at_their_voxels_centres(window, grid, experts, coarse, renderer):
    batch, classes, size, channels, strides = window
    net = pyramid_morse(len(size), classes, channels, strides, experts=experts, coarse=coarse, renderer=renderer).train()
    x, window_affine = torch.randn(batch, 1, *size, dtype=torch.float64), affine_maps(batch, len(size))
    with torch.no_grad():
        out = net(x, return_points=True, grid=grid, window_affine=window_affine)
    assert out.point_index.shape == (batch, 9)
    for b in range(batch):
        coarse_map, render = morse_by_hand(net, x, b, window_affine)
        np.testing.assert_allclose(out.coarse[b], coarse_map, **CLOSE)
        for p, index in enumerate(out.point_index[b].tolist()):
            place = centre(np.unravel_index(index, grid or size), grid or size)
            np.testing.assert_allclose(out.point_logits[b, :, p], render(place), **AT_VOXELS)
