"""Levels planned for a grid, and axes by role."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_morse import InputError, Morse
from monai_morse.data import ThroughPlaneLastd
from monai_morse.data.orientation import axes_by_role
from monai_morse.networks import check_window, plan_unet, planned_dynunet, seen_by_backbone

PLANS = [  # spacing, patch, kernels and strides that nnU-Net publishes for them, or that its rule gives by hand
    # MSD Task05 prostate
    (
        [3.6, 0.62, 0.62],
        [20, 320, 256],
        [[1, 3, 3]] * 2 + [[3, 3, 3]] * 5,
        [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]],
    ),
    # LiTS
    ([1.0, 0.77, 0.77], [128, 128, 128], [[3, 3, 3]] * 6, [[1, 1, 1]] + [[2, 2, 2]] * 5),
    # MSD Task04 hippocampus
    ([1.0, 1.0, 1.0], [40, 56, 40], [[3, 3, 3]] * 4, [[1, 1, 1]] + [[2, 2, 2]] * 3),
    # a thick axis of so few voxels that it is never pooled
    ([1.25, 1.25, 7.7], [32, 64, 6], [[3, 3, 1]] * 2 + [[3, 3, 3]] * 2, [[1, 1, 1]] + [[2, 2, 1]] * 3),
    ([0.8, 0.8], [64, 48], [[3, 3]] * 4, [[1, 1]] + [[2, 2]] * 3),
]


@pytest.mark.parametrize("spacing, patch, kernels, strides", PLANS)
def test_levels_are_nnunets(spacing, patch, kernels, strides):
    plan = plan_unet(spacing, patch, max_levels=7)
    assert plan.strides == strides and plan.kernel_size == kernels
    assert len(plan.filters) == len(strides) and plan.filters == [min(320, 32 * 2**i) for i in range(len(strides))]
    assert all(p % m == 0 or p < m for p, m in zip(patch, plan.multiple)) or patch[0] == 20


@pytest.mark.parametrize("stride", [1, [2, 2, 1]])
def test_a_planned_network_takes_its_windows_alone_and_under_morse(stride):
    patch = [64, 32, 16]
    net = planned_dynunet(1, 3, [1.25, 1.25, 7.7], patch, stride, features=2)
    assert net.kernel_size[0] == [3, 3, 1] and net.filters[:2] == [2, 4]
    morse = Morse(net, stride=stride, mixture={"width": 4}, head={"width": 4}, points={"num_train": 9, "num_eval": 9})
    check_window(morse, patch)
    out = morse(torch.rand(2, 1, *patch), return_points=True)
    assert out.coarse.shape == (2, 3, *patch) and out.point_logits.shape == (2, 3, 9)
    assert [f.reduction[:2] for f in morse.decoder.info][-1] == (1, 1)


def test_numbers_that_are_no_grid_are_errors():
    for spacing, patch in (([1, 1], [8, 8, 8]), ([1, 0, 1], [8, 8, 8]), ([1, 1, 1], [8, 8, 0])):
        with pytest.raises(InputError, match="spacing above 0"):
            plan_unet(spacing, patch)
    assert seen_by_backbone([9, 8, 7], 2) == [5, 4, 4]


def scan(order, signs, spacing, shape=(4, 5, 6), tilt=0.0):
    """A scan with axes of the world in some order and direction, its third being thick, tilted by an angle."""
    rotation = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.eye(3)[:, list(order)] * np.array(signs) * np.array(spacing)
    affine[:3, 3] = [7, -3, 11]
    return MetaTensor(torch.rand(1, *shape, dtype=torch.float64), affine=torch.from_numpy(affine))


AXES = list(itertools.product(itertools.permutations(range(3)), [(1, 1, 1), (-1, 1, -1), (1, -1, 1)], [0.0, 0.3]))


@pytest.mark.parametrize("order, signs, tilt", AXES)
def test_the_thick_axis_goes_last_and_no_voxel_moves_in_the_world(order, signs, tilt):
    before = scan(order, signs, (1.0, 1.2, 6.0), tilt=tilt)
    item = ThroughPlaneLastd(["image", "label"])({"image": before, "label": before.clone()})
    after = item["image"]
    assert torch.equal(after, item["label"]) and sorted(after.shape) == sorted(before.shape)
    assert np.argmax(np.linalg.norm(after.affine[:3, :3], axis=0)) == 2
    codes = nib.aff2axcodes(after.affine.numpy())
    assert codes == tuple(axes_by_role(before.affine.numpy())) and set(codes) == set("RAS")
    assert codes[:2] in (("R", "A"), ("R", "S"), ("A", "S"))

    def by_place(image):
        voxels = np.argwhere(np.ones(image.shape[1:]))
        places = voxels @ image.affine[:3, :3].numpy().T + image.affine[:3, 3].numpy()
        return {tuple(p): float(image[(0, *v)]) for p, v in zip(np.round(places, 6) + 0.0, voxels)}

    assert by_place(before) == by_place(after)


@pytest.mark.parametrize("spacing, codes", [((1, 1, 1), "RAS"), ((1, 1, 1.4), "RAS"), ((5, 1, 1), "ASR"), ((1, 5, 1), "RSA")])
def test_a_scan_without_a_thick_axis_is_ras(spacing, codes):
    assert axes_by_role(np.diag([*spacing, 1.0])) == codes


def test_an_affine_that_does_not_say_where_axes_point_is_an_error():
    with pytest.raises(InputError, match="does not tell where the axes point"):
        axes_by_role(np.diag([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("spacing, by_role", [(None, True), ((1, 1, 6), True), ((1, 1, 1), False), ((1, 6, 1), False)])
def test_a_networks_grid_without_roles_keeps_every_scan_upright(spacing, by_role, caplog):
    coronal = scan((0, 2, 1), (1, 1, 1), (1.0, 1.0, 6.0))
    turned = ThroughPlaneLastd("image", spacing)({"image": coronal})["image"]
    assert nib.aff2axcodes(turned.affine.numpy()) == (tuple("RSA") if by_role else tuple("RAS"))
    assert ("its slices are coronal" in caplog.text) == by_role
