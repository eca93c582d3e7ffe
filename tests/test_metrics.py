"""The paper's figures against medpy, which its released evaluation calls, on real label maps and on masks hard to get right."""

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA

from monai_morse import InputError
from monai_morse.metrics import PaperFigures, paper_figures

medpy = pytest.importorskip("medpy.metric.binary", reason="pip install medpy")


def by_medpy(pred, truth, spacing=None):
    """On the whole scan, as the released evaluation does."""
    return PaperFigures(
        medpy.dc(pred, truth), medpy.jc(pred, truth), medpy.hd95(pred, truth, spacing), medpy.asd(pred, truth, spacing)
    )


def worsened(mask, rng):
    """A prediction: the mask moved, with a piece cut off and specks elsewhere."""
    pred = np.roll(mask, rng.integers(-2, 3, mask.ndim), tuple(range(mask.ndim)))
    pred[: int(np.nonzero(pred)[0].mean())] &= rng.random(pred[: int(np.nonzero(pred)[0].mean())].shape) < 0.9
    pred[tuple(rng.integers(0, n) for n in pred.shape)] = True
    return pred


def labels(pattern, count):
    found = sorted(SHARED_DATA.glob(pattern))[:count]
    if not found:
        pytest.skip(f"real data needed: nothing at {SHARED_DATA / pattern} (set MORSE_DATA to the folder that holds it)")
    for path in found:
        image = nib.load(path)
        yield np.asarray(image.dataobj), image.header.get_zooms()[:3]


@pytest.mark.parametrize(
    "pattern, count, classes",
    [("Task04_Hippocampus/labelsTr/*.nii.gz", 6, (1, 2)), ("abdomen_ct/*labels*.nii.gz", 1, (1, 4, 5, 52))],
)
def test_figures_are_medpys_on_real_label_maps(pattern, count, classes):
    rng = np.random.default_rng(0)
    compared = 0
    for label, _ in labels(pattern, count):
        for k in classes:
            truth = label == k
            pred = worsened(truth, rng)
            assert paper_figures(pred, truth) == pytest.approx(by_medpy(pred, truth), rel=1e-12)
            compared += 1
    assert compared == count * len(classes)


@pytest.mark.parametrize("shape", [(31, 17), (14, 23, 9)])
@pytest.mark.parametrize("spacing", [1.0, (0.8, 2.0, 5.0)])
def test_figures_are_medpys_on_any_masks_also_at_the_scans_border_and_on_anisotropic_grids(shape, spacing):
    spacing = spacing if isinstance(spacing, float) else spacing[: len(shape)]
    rng = np.random.default_rng(1)
    for density in (0.01, 0.3, 0.7, 0.99):
        pred, truth = (rng.random((2, *shape)) < density).astype(np.float32)
        pred[(0,) * len(shape)] = truth[(-1,) * len(shape)] = 1
        assert paper_figures(pred, truth, spacing) == pytest.approx(by_medpy(pred, truth, spacing), rel=1e-12)


def test_the_whole_scan_and_one_voxel():
    full, dot = np.ones((5, 6, 7)), np.zeros((5, 6, 7))
    dot[2, 3, 3] = 1
    for pred, truth in ((full, full), (full, dot), (dot, full), (dot, dot)):
        assert paper_figures(pred, truth) == pytest.approx(by_medpy(pred, truth))


def test_95hd_is_of_both_directions_together_and_asd_of_the_predictions_surface():
    pred, truth = np.zeros((2, 100))
    truth[[0, 10, 90]] = 1  # nearest distances: pred to truth 0, 5; truth to pred 0, 5, 75
    pred[[0, 15]] = 1
    both = [0, 0, 5, 5, 75]
    assert paper_figures(pred, truth)[2:] == pytest.approx((np.percentile(both, 95), 2.5))
    assert paper_figures(truth, pred)[2:] == pytest.approx((np.percentile(both, 95), 80 / 3))


def test_empty_masks_follow_the_released_evaluations_rule():
    none, some = np.zeros((4, 4, 4)), np.ones((4, 4, 4))
    assert paper_figures(some, none) == (1, 1, 0, 0)
    assert paper_figures(none, some) == paper_figures(none, none) == (0, 0, 0, 0)


def test_other_shapes_are_an_error():
    with pytest.raises(InputError, match=r"one shape, got \(3, 3\) and \(3, 4\)"):
        paper_figures(np.ones((3, 3)), np.ones((3, 4)))
