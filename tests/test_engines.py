"""Calling the network from MONAI's engines: whole-volume coordinates, finer grids, and back to the scan's own."""

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALL, TINY
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from monai.transforms import (
    Compose,
    CropForegroundd,
    LoadImaged,
    Orientationd,
    RandAffined,
    RandFlipd,
    RandSpatialCropd,
    Spacingd,
    SpatialPadd,
)

from monai_morse import InputError, Morse, MorseLoss
from monai_morse.data import ToScanGridd
from monai_morse.engines import prepare_batch_with_points, window_to_scan
from monai_morse.inferers import AutocastInferer, CoordinatesInferer, FineGridInferer, MorseInferer
from monai_morse.networks import DecoderFeatures
from monai_morse.networks import points as geometry


@pytest.fixture
def own_coordinates(tmp_path):
    """A scan whose three channels are each voxel's own coordinates in the scan, to the right, to the front, up."""
    shape = (30, 40, 20)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])  # stored L, A, S
    affine[:3, 3] = [5, -7, 9]
    grid = np.stack(np.meshgrid(*[(2 * np.arange(n) + 1) / n - 1 for n in shape], indexing="ij"))
    values = np.stack([-grid[0], grid[1], grid[2]]).astype(np.float32)
    path = tmp_path / "coordinates.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(values, 0, -1), affine), path)
    return str(path), torch.from_numpy(values)


LOAD = [
    LoadImaged("image", ensure_channel_first=True),
    Orientationd("image", axcodes="RAS", labels=None),
    Spacingd("image", pixdim=(1.5, 2, 2)),
]


def batch(path, *transforms, size=1):
    return next(iter(DataLoader(Dataset([{"image": path}] * size, Compose([*LOAD, *transforms])), batch_size=size)))["image"]


def difference_to_own(windows, window_affine):
    """By how much the coordinates that a renderer would encode miss what the voxels themselves say, largest and median."""
    size = list(windows.shape[2:])
    index = torch.arange(int(np.prod(size))).repeat(len(windows), 1)
    said = torch.as_tensor(windows.as_tensor() if isinstance(windows, MetaTensor) else windows).flatten(2).transpose(1, 2)
    error = (geometry.apply_affine(geometry.point_coordinates(index, size), window_affine) - said).abs()
    error = error[said.abs().sum(-1) > 0]  # padding says nothing
    return error.max().item(), error.median().item()


def test_placement_follows_crops_flips_rotations_and_resampling(own_coordinates):
    flip = RandFlipd("image", spatial_axis=0, prob=1)
    turn = RandAffined("image", prob=1, rotate_range=[0.2] * 3, scale_range=[0.1] * 3, padding_mode="zeros")
    crop = RandSpatialCropd("image", roi_size=(12, 16, 10), random_size=False)
    windows = batch(own_coordinates[0], flip, turn, crop, size=2)
    largest, median = difference_to_own(windows, window_to_scan(windows))
    assert median < 1e-5 and largest < 0.05  # resampling holds edge values: half a voxel is 0.05


@pytest.mark.parametrize("roi", [(16, 16, 16), (16, 64, 64), (64, 64, 64)])
def test_sliding_windows_know_their_place(own_coordinates, roi):
    seen = []

    def network(windows, window_affine):
        seen.append(difference_to_own(windows, window_affine))
        return windows[:, :1]

    inferer = CoordinatesInferer(SlidingWindowInferer(roi, sw_batch_size=3, overlap=0.3), "volume")
    inferer(batch(own_coordinates[0]), network)
    assert max(largest for largest, _ in seen) < 0.05 and max(median for _, median in seen) < 1e-5


def test_window_coordinates_change_nothing():
    net, x = Morse(TINY["BasicUNet"](3, 3), **SMALL).eval(), torch.rand(1, 1, 40, 48, 32)
    inferer = SlidingWindowInferer((32, 48, 32))
    with torch.no_grad():
        assert torch.equal(CoordinatesInferer(inferer)(x, net), SlidingWindowInferer((32, 48, 32))(x, net))


def test_a_trained_network_reads_volume_coordinates(own_coordinates):
    net = Morse(TINY["BasicUNet"](3, 3), **SMALL).eval()
    x = batch(own_coordinates[0], SpatialPadd("image", (48, 48, 32)))[:, :1]
    inferer = SlidingWindowInferer((32, 32, 32))
    with torch.no_grad():
        window = CoordinatesInferer(inferer, "window")(x, net)
        volume = CoordinatesInferer(inferer, "volume")(x, net)
    assert window.shape == volume.shape and not torch.allclose(window, volume)


def test_what_has_no_place_is_an_error(own_coordinates):
    with pytest.raises(InputError, match="coordinates='volume' needs images that LoadImage read"):
        window_to_scan(torch.rand(1, 1, 8, 8))
    with pytest.raises(InputError, match="coordinates must be one of .*'scan'"):
        CoordinatesInferer(SlidingWindowInferer(8), "scan")
    with pytest.raises(InputError, match="wraps a SlidingWindowInferer, got a SimpleInferer"):
        CoordinatesInferer(SimpleInferer())
    image = batch(own_coordinates[0])
    with pytest.raises(InputError, match="coordinates must be one of"):
        prepare_batch_with_points({"image": image, "label": image}, "cpu", coordinates="scan")


def test_batches_carry_the_labels_grid_and_the_place(own_coordinates):
    image = batch(own_coordinates[0], size=2)
    _, _, _, asked = prepare_batch_with_points({"image": image, "label": image[:, :1]}, "cpu", coordinates="volume")
    assert asked["return_points"] and asked["grid"] == list(image.shape[2:])
    assert torch.equal(asked["window_affine"], window_to_scan(image))


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("scale", [1, 2, (3, 1, 2)])
def test_any_grid_comes_back_to_the_scans(own_coordinates, scale, crop):
    path, values = own_coordinates
    extra = [CropForegroundd("image", source_key="image", select_fn=lambda x: x > -0.5, margin=2)] if crop else []
    image = batch(path, *extra)

    def network(windows, grid=None):
        size = grid or list(windows.shape[2:])
        return torch.nn.functional.interpolate(windows, size, mode="trilinear", align_corners=False)

    found = FineGridInferer(SlidingWindowInferer((16, 16, 16), overlap=0.5, mode="gaussian"), scale)(image, network)
    back = ToScanGridd("pred")({"pred": decollate_batch(found)[0]})["pred"]
    assert back.shape == values.shape
    assert np.allclose(back.affine, nib.load(path).affine)
    inner = (values.abs() < 0.7).all(0) & (values > -0.3).all(0)  # clear of the edges, which are held
    assert (back.as_tensor() - values).abs()[:, inner].max() < 0.01


def test_bad_scales_are_errors():
    for scale in (0, 1.5, (2, 2)):
        with pytest.raises(InputError, match="scale must be a whole number"):
            FineGridInferer(SlidingWindowInferer((8, 8, 8)), scale)(torch.rand(1, 1, 8, 8, 8), None)
    with pytest.raises(InputError, match="'pred' does not know its scan's grid"):
        ToScanGridd("pred")({"pred": torch.rand(1, 8, 8)})


def ball(radius, size, center):
    """Which cell centres of a ``size`` grid over [-1, 1]^3 lie in a ball."""
    axes = [(2 * torch.arange(n) + 1) / n - 1 for n in size]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return ((z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2 < radius**2).float()


def test_rendering_on_a_finer_grid_beats_upsampling_the_coarse_logits():
    """Balls seen at 12^3 and labelled at 36^3: rendered at 36^3 against nearest and linear upsampling of the same network."""
    torch.manual_seed(0)
    fine = [36, 36, 36]

    def pairs(n):
        balls = [ball(0.4 + 0.4 * torch.rand(1).item(), fine, 0.3 * torch.rand(3) - 0.15)[None] for _ in range(n)]
        labels = torch.stack(balls)
        return torch.nn.functional.avg_pool3d(labels, 3), labels

    backbone = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 2, 1))
    options = {"mixture": {"width": 8, "gate_stride": 2, "coarse": "backbone"}, "head": {"width": 32, "num_frequencies": 8}}
    points = {"num_train": 1024, "num_eval": 1728}
    net = Morse(DecoderFeatures(backbone, ["1"]), "dense", "anatomical", points=points, **options)
    optimizer, loss = torch.optim.Adam(net.parameters(), 0.01), MorseLoss(1.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, 200)  # without, the last step's noise decides
    for _ in range(200):
        images, labels = pairs(4)
        optimizer.zero_grad()
        loss(net(images, return_points=True, grid=fine), labels).backward()
        optimizer.step()
        decay.step()

    net.eval()
    images, labels = pairs(20)
    with torch.no_grad():
        logits = net._maps(images).coarse
        found = {
            "nearest": torch.nn.functional.interpolate(logits, fine),
            "linear": torch.nn.functional.interpolate(logits, fine, mode="trilinear", align_corners=False),
            "rendered": net(images, grid=fine),
        }
    truth = labels[:, 0].bool()
    errors = {k: (v.argmax(1).bool() != truth).float().mean().item() for k, v in found.items()}
    assert errors["rendered"] < 0.9 * errors["linear"] < 0.9 * errors["nearest"], errors


def test_another_prepare_batch_keeps_what_it_hands_to_the_network():
    def theirs(batch, device, non_blocking, **kwargs):
        return batch["scan"], batch["truth"], ("guidance",), {"strength": 2}

    batch = {"scan": torch.rand(1, 1, 4, 4), "truth": torch.rand(1, 1, 8, 8)}
    image, label, args, kwargs = prepare_batch_with_points(batch, "cpu", prepare=theirs)
    assert image is batch["scan"] and label is batch["truth"] and args == ("guidance",)
    assert kwargs == {"strength": 2, "return_points": True, "grid": [8, 8], "window_affine": None}


@pytest.mark.parametrize("depth, kernel", [(1, 3), (2, 3), (3, 3), (4, 5)])
def test_bfloat16_gradients_are_those_of_float32_however_shallow_the_maps(depth, kernel):
    """oneDNN's bfloat16 gradient of a Conv3d's weights is garbage, at times NaN, for maps less deep than the kernel."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(32, 16, kernel, padding=kernel // 2)
    x, direction = torch.randn(2, 32, depth, 4, 6), torch.randn(2, 16, depth, 4, 6)
    gradients = {}
    for amp in (False, True):
        output = AutocastInferer(SimpleInferer(), enabled=amp)(x, conv)
        assert output.dtype == torch.float32
        (gradients[amp],) = torch.autograd.grad((output * direction).sum(), conv.weight)
    assert torch.linalg.norm(gradients[True] - gradients[False]) < 0.02 * torch.linalg.norm(gradients[False])


def test_one_inferer_is_the_three_around_one_another(own_coordinates):
    net = Morse(TINY["BasicUNet"](3, 3), **SMALL).eval()
    x = batch(own_coordinates[0], SpatialPadd("image", (48, 48, 32)))[:, :1]
    windows = {"roi_size": (32, 32, 32), "overlap": 0.25}
    by_hand = CoordinatesInferer(SlidingWindowInferer(**windows), "volume")
    by_hand = AutocastInferer(FineGridInferer(by_hand, 2), enabled=True)
    with torch.no_grad():
        found = MorseInferer(SlidingWindowInferer(**windows), "volume", scale=2, amp="true")(x, net)
        expected = by_hand(x, net)
        assert torch.equal(found, expected) and torch.equal(found.affine, expected.affine)
        assert torch.equal(MorseInferer()(x, net), net(x))
    with pytest.raises(InputError, match="coordinates must be one of .*'scan'"):
        MorseInferer(coordinates="scan")
    with pytest.raises(InputError, match="a slice does not know its place"):
        MorseInferer(SliceInferer(2, roi_size=(8, 8)), "volume")


@pytest.mark.parametrize("spatial_dim, scale", [(0, 2), (1, 2), (2, 2), (2, (3, 2, 1))])
def test_slices_on_a_finer_grid_are_as_many_and_come_back_to_the_scans(own_coordinates, spatial_dim, scale):
    path, values = own_coordinates
    image = batch(path)

    def network(windows, grid=None):
        return torch.nn.functional.interpolate(windows, grid, mode="bilinear", align_corners=False)

    inferer = SliceInferer(spatial_dim, roi_size=(16, 16), overlap=0.5, mode="gaussian")
    found = MorseInferer(inferer, scale=scale)(image, network)
    factors = [1 if axis == spatial_dim else 2 for axis in range(3)] if scale == 2 else scale
    assert list(found.shape[2:]) == [n * f for n, f in zip(image.shape[2:], factors)]
    back = ToScanGridd("pred")({"pred": decollate_batch(found)[0]})["pred"]
    assert back.shape == values.shape and np.allclose(back.affine, nib.load(path).affine)
    inner = (values.abs() < 0.7).all(0)
    assert (back.as_tensor() - values).abs()[:, inner].max() < 0.01
