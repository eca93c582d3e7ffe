"""Scans as they should not be: a table, a row an input, what it is and what must come out of every bundle.

All rows are one cohort: each bundle segments it once, with a network that marks what is bright. A row that is ``DONE`` must
have a map on the scan's own grid in which the bright part is marked; one that is not is refused by a line that names it.
"""

import gzip
import logging
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_morse.data import ToScanGridd, usable_cases
from monai_morse.errors import InputError
from tools.fuzz_geometry import bright, evaluate, infer, random_affine, train, write_listing, write_scan

DONE = ""
BUNDLES = ("hippocampus_mri_morse", "liver_mpmri_morse", "synapse_ct_morse")


def affine(*spacing, offset=(0, 0, 0), turn=(0, 0, 0), shear=0.0, flip=()):
    """Spacing in mm, turns about x, y and z in degrees, a share of the second axis in the first."""
    matrix = np.diag(spacing).astype(float)
    for axis in flip:
        matrix[axis, axis] *= -1
    for axis, degrees in enumerate(turn):
        a, b = (k for k in range(3) if k != axis)
        rotation = np.eye(3)
        rotation[[a, a, b, b], [a, b, a, b]] = [f(np.deg2rad(degrees)) for f in (np.cos, lambda t: -np.sin(t), np.sin, np.cos)]
        matrix = rotation @ matrix
    matrix[:, 0] += shear * matrix[:, 1]
    full = np.eye(4)
    full[:3, :3], full[:3, 3] = matrix, offset
    return full


def put(matrix, place, value):
    matrix = matrix.copy()
    matrix[place] = value
    return matrix


CLEAN = affine(1, 1, 1, offset=(-10, 12, 7))
SCANNER = affine(0.9, 0.9, 2.5, offset=(-80, 90, -40.5), turn=(4, -7, 12), flip=(0, 1))
SAGITTAL = np.array([[0, 0, 3.0, -40], [-1.0, 0, 0, 80], [0, -1.0, 0, 90], [0, 0, 0, 1]])
FLIPPED = affine(0.78125, 0.78125, 2.5, offset=(50, 60, -20), flip=(0, 1))

# what it is: (how it is written, see tools.fuzz_geometry.GOOD; what must come out; what must be said of it all the same)
SCANS = {
    # --- one affine, the file's own
    "plain": ({}, DONE),
    "oblique, as scanners write it": ({"affine": SCANNER}, DONE),
    "sagittal, axes swapped": ({"affine": SAGITTAL}, DONE),
    "turned by 45 degrees": ({"affine": affine(1, 1, 2, turn=(0, 0, 45))}, DONE),
    "turned about all axes": ({"affine": affine(0.7, 1.3, 2.2, turn=(33, -51, 77), flip=(2,))}, DONE),
    "sheared": ({"affine": affine(1, 1, 2, shear=0.4)}, DONE, "its qform puts .* the sform counts"),
    "sheared, oblique, flipped": (
        {"affine": affine(1.2, 0.8, 2, shear=-0.3, turn=(9, 5, -14), flip=(1,)), "qform_code": 0},
        DONE,
    ),
    "flat voxels": ({"affine": affine(0.5, 0.5, 6)}, DONE),
    "long voxels": ({"affine": affine(6, 0.5, 0.5)}, DONE),
    "a hair off the bundle's spacing": ({"affine": affine(1.0004, 0.9996, 1.0004, offset=(1e-3, 0, 0))}, DONE),
    "as far off as MONAI takes for the same": ({"affine": affine(1.001005, 1.001005, 1.001005)}, DONE),
    "far from the origin": ({"affine": affine(1, 1, 1, offset=(3000, -2500, 1234.567))}, DONE),
    "sform flips, no qform, rounded pixdim": ({"affine": FLIPPED, "qform_code": 0, "pixdim": (0.7813, 0.7813, 2.5)}, DONE),
    "qform alone": ({"affine": SCANNER, "sform_code": 0}, DONE),
    "sform alone": ({"affine": SCANNER, "qform_code": 0}, DONE),
    "sform of Talairach space": ({"affine": SCANNER, "sform_code": 3}, DONE),
    "no orientation": (
        {"sform_code": 0, "qform_code": 0, "pixdim": (0.7, 3.3, 1.1)},
        DONE,
        "tells no orientation .*LAS is taken",
    ),
    "sform and qform disagree": ({"affine": SCANNER, "qform": FLIPPED}, DONE, "qform puts voxels up to .* the sform counts"),
    "sform and qform mirrored": ({"affine": affine(1, 1, 1, flip=(0,)), "qform": CLEAN}, DONE, "the sform counts"),
    "pixdim of another size": (
        {"qform_code": 0, "pixdim": (3, 3, 3)},
        DONE,
        r"says voxels of .3. 3. 3.. mm.*the affine counts",
    ),
    "pixdim 0": ({"qform_code": 0, "pixdim": (0, 0, 0)}, DONE),
    "pixdim NaN": ({"qform_code": 0, "pixdim": (np.nan,) * 3}, DONE, "the affine counts"),
    "pixdim negative": ({"qform_code": 0, "pixdim": (-1, -1, -1)}, DONE),
    "lengths of no unit": ({"unit": 0}, DONE),
    # --- no affine
    "a column of zeros": ({"affine": put(CLEAN, (0, 0), 0), "qform": CLEAN}, "not invertible .voxels of 0 x 1 x 1 mm"),
    "all zeros": ({"affine": np.zeros((4, 4)), "qform": CLEAN}, "not invertible"),
    "two axes the same": ({"affine": put(CLEAN, (slice(0, 3), 0), CLEAN[:3, 1]), "qform": CLEAN}, "not invertible"),
    "axes nearly in a plane": ({"affine": affine(1, 1, 1, shear=40), "qform": CLEAN}, "not invertible"),
    "NaN in the affine": ({"affine": put(CLEAN, (1, 1), np.nan), "qform": CLEAN}, "NaN or infinity"),
    "NaN for an offset": ({"affine": put(CLEAN, (1, 3), np.nan), "qform": CLEAN}, "NaN or infinity"),
    "infinity for an offset": ({"affine": put(CLEAN, (2, 3), -np.inf), "qform": CLEAN}, "NaN or infinity"),
    "1e30 for an offset": ({"affine": put(CLEAN, (0, 3), 1e30), "qform": CLEAN}, "1e.30 mm from the origin"),
    # --- sizes that are none of a scan's
    "micrometres": ({"affine": affine(781, 781, 2500)}, "voxels measure 781 x 781 x 2500 mm, plausible are 0.05 to 15"),
    "metres": ({"affine": affine(7e-4, 7e-4, 2e-3)}, "plausible are 0.05 to 15.*--limits#spacing"),
    "20 mm": ({"affine": affine(20, 20, 20)}, "voxels measure 20 x 20 x 20 mm"),
    "a header in micrometres": ({"unit": 3}, "lengths in micron; write it in mm"),
    "a header in metres": ({"unit": 1}, "lengths in meter; write it in mm"),
    # --- axes
    "one slice": ({"shape": (35, 51, 1)}, DONE),
    "one slice, sagittal": ({"shape": (1, 51, 35)}, DONE),
    "one slice, coronal": ({"shape": (35, 1, 51), "affine": SCANNER}, DONE),
    "one slice, oblique": ({"shape": (35, 51, 1), "affine": SCANNER}, DONE),
    "two slices": ({"shape": (35, 51, 2), "affine": affine(1, 1, 5)}, DONE),
    "one row": ({"shape": (1, 50, 1)}, DONE),
    "one voxel": ({"shape": (1, 1, 1)}, "every voxel is .*, so there is nothing to see"),
    "two voxels": ({"shape": (2, 1, 1)}, DONE),
    "one volume of four axes": ({"shape": (20, 24, 18, 1)}, DONE),
    "one volume of six axes": ({"shape": (20, 24, 18, 1, 1, 1), "affine": SCANNER}, DONE),
    "one slice of four axes": ({"shape": (35, 51, 1, 1)}, DONE),
    "two volumes": ({"shape": (20, 24, 18, 2)}, r"expected a 3D image .*got shape \(20, 24, 18, 2\); split"),
    "a picture of two axes": ({"shape": (35, 51)}, r"along three axes, got shape \(35, 51\); .*a third axis of length 1"),
    "a vector a voxel": ({"shape": (20, 24, 18, 1, 3)}, "expected a 3D image"),
    "no voxels": ({"shape": (20, 0, 18)}, "got shape|cannot be read"),
    # --- types
    "big endian": ({"byteorder": ">", "affine": SCANNER}, DONE),
    "NIfTI-2": ({"version": 2, "affine": SCANNER}, DONE),
    "NIfTI-2, big endian": ({"version": 2, "byteorder": ">", "dtype": "float32"}, DONE),
    **{
        f"{dtype} voxels": ({"dtype": dtype}, DONE)
        for dtype in ("uint8", "uint16", "int32", "int64", "uint64", "float32", "float64")
    },
    "scaled integers": ({"scaling": (0.25, -1024.0)}, DONE),
    "scaled by a negative slope": ({"scaling": (-0.5, 100.0)}, DONE),
    "slope 0, which is none": ({"scaling": (0.0, 0.0)}, DONE),
    "slope NaN, which is none": ({"scaling": (np.nan, np.nan)}, DONE),
    "slope infinite, which is none": ({"scaling": (np.inf, 0.0)}, DONE),
    "complex voxels": ({"dtype": "complex64"}, "voxels of type complex64 are no intensities"),
    # --- values
    "constant": ({"values": lambda v: 0 * v + 7}, "every voxel is 7, so there is nothing to see"),
    "1e200": ({"dtype": "float64", "values": lambda v: v * 1e200}, "beyond single precision"),
    "up to 1e20": ({"dtype": "float32", "values": lambda v: v * 1e18}, DONE),
    "up to 1e-20": ({"dtype": "float32", "values": lambda v: v * 1e-22}, DONE),
    "below what single precision has": ({"dtype": "float64", "values": lambda v: v * 1e-60}, "every voxel is"),
    "alike in single precision": ({"dtype": "float64", "values": lambda v: 1e12 + v}, "every voxel|cannot be normalised"),
    "one voxel of 1e12": ({"dtype": "float64", "values": lambda v: put(v, (3, 3, 3), 1e12)}, "nearly all are alike"),
    "a NaN": ({"dtype": "float32", "values": lambda v: put(v, (3, 3, 3), np.nan)}, "1 voxels are NaN or infinite"),
    "an infinity": ({"dtype": "float32", "values": lambda v: put(v, (3, 3, 3), -np.inf)}, "1 voxels are NaN or infinite"),
}
SCANS |= {
    f"random {seed}": ({"affine": random_affine(np.random.default_rng(seed)), "shape": shape, "qform_code": seed % 2}, DONE)
    for seed, shape in enumerate([(20, 24, 18), (9, 31, 14), (30, 12, 3), (17, 17, 1)] * 6)
}


def remarked(content):
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"patient moved"))
    return gzip.compress(image.to_bytes())


def half(content):
    return content[: len(content) // 2]


def other_checksum(content):
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


# what was made of the plain scan's file, and what must be said of it
FILES = {
    "with a remark in its header": (remarked, DONE),
    "cut in half": (half, "cannot be read, truncated"),
    "cut in its header": (lambda c: gzip.compress(gzip.decompress(c)[:200]), "cannot be read"),
    "header alone": (lambda c: gzip.compress(gzip.decompress(c)[:352]), "cannot be read, truncated"),
    "of another checksum": (other_checksum, "cannot be read, truncated .*CRC"),
    "without its last bytes": (lambda c: c[:-4], "cannot be read, truncated"),
    "empty": (lambda c: b"", "cannot be read"),
    "text": (lambda c: b"patient 1", "cannot be read"),
    "gzip of text": (lambda c: gzip.compress(b"patient 1" * 99), "cannot be read"),
    "not compressed": (gzip.decompress, "cannot be read"),
}
ROWS = [*SCANS, *FILES]
UNCOMPRESSED = (
    "qform alone",
    "one slice, oblique",
    "big endian",
    "NIfTI-2",
    "scaled integers",
    "a NaN",
    "random 3",
    "random 5",
)


def file_name(row):
    return re.sub(r"\W+", "_", row)


def scan_file(row):
    return file_name(row) + (".nii" if row in UNCOMPRESSED else ".nii.gz")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """All rows in one folder, and what each bundle said and wrote: {bundle: (folder, lines, error)}."""
    folder = tmp_path_factory.mktemp("hostile")
    for row, (changes, *_) in SCANS.items():
        write_scan(folder / "scans" / scan_file(row), **changes)
    for row, (spoil, _) in FILES.items():
        (folder / "scans" / f"{file_name(row)}.nii.gz").write_bytes(spoil((folder / "scans/plain.nii.gz").read_bytes()))
    results = {}
    for bundle in BUNDLES:
        with heard() as lines, pytest.raises(InputError) as caught:
            infer(bundle, folder / "scans", folder / bundle, patch_size=[32, 32] if "synapse" in bundle else [24, 24, 24])
        results[bundle] = folder / bundle, lines, str(caught.value)
    return folder / "scans", results


class heard:
    """What the package logs meanwhile, from warnings on."""

    def __enter__(self):
        self.handler = logging.Handler(logging.WARNING)
        lines = []
        self.handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("monai_morse").addHandler(self.handler)
        return lines

    def __exit__(self, *args):
        logging.getLogger("monai_morse").removeHandler(self.handler)


@pytest.mark.parametrize("row", ROWS)
def test_a_scan_is_done_on_its_own_grid_or_refused_by_name(row, cohort):
    scans, results = cohort
    outcome = SCANS[row][1] if row in SCANS else FILES[row][1]
    scan = scans / scan_file(row)
    for bundle, (out, lines, error) in results.items():
        found = out / f"{file_name(row)}_seg.nii.gz"
        told = [line for line in lines if f"/{scan.name}" in line]
        if outcome:
            assert not found.exists() and scan.name in error
            assert any(re.search(outcome, line) for line in told), told
            continue
        assert found.exists() and scan.name not in error, told
        image, seg = nib.load(scan), nib.load(found)
        assert seg.shape == image.shape
        assert np.abs(seg.affine - image.affine).max() <= 1e-6
        told = [any(int(i.header[code]) for code in ("sform_code", "qform_code")) for i in (image, seg)]
        assert told[0] == told[1]
        marked = np.asarray(seg.dataobj) == 1
        if bundle == BUNDLES[0] and marked.size > 10:  # the others see too coarsely for scans this small
            truth = bright(image.shape)
            assert 2 * (marked & truth).sum() > 0.7 * (marked.sum() + truth.sum()), (bundle, row)


@pytest.mark.parametrize("row", [row for row, (_, _, *said) in SCANS.items() if said])
def test_a_header_that_contradicts_itself_is_told_of_once(row, cohort):
    scans, results = cohort
    lines = [line for _, lines, _ in results.values() for line in lines if f"/{file_name(row)}.nii.gz" in line]
    assert sum(bool(re.search(SCANS[row][2], line)) for line in lines) == 1, lines


def test_no_other_scan_is_told_of(cohort):
    quiet = [f"/{file_name(row)}.nii.gz" for row, (_, outcome, *said) in SCANS.items() if not outcome and not said]
    for _, lines, _ in list(cohort[1].values())[:2]:
        noise = [
            line
            for line in lines
            if any(name in line for name in quiet) and not re.search("its qform puts|its slices are", line)
        ]
        assert not noise


# --- images and their labels: (the image, the label, what must come out)

LABELS = {
    "the same grid": ({"affine": SCANNER}, {"affine": SCANNER}, DONE),
    "one slice more when it is resampled": (
        {"affine": affine(1.4, 1.4, 4.95), "shape": (20, 24, 12)},
        {"affine": affine(1.4, 1.4, 4.956)},
        DONE,
    ),
    "5.002 mm beside 5": ({"affine": affine(1, 1, 5), "shape": (20, 24, 12)}, {"affine": affine(1, 1, 5.002)}, DONE),
    "rounded to a hundredth": ({"affine": affine(0.7813, 0.7813, 2)}, {"affine": affine(0.78, 0.78, 2)}, DONE),
    "an offset rounded": (
        {"affine": affine(1, 1, 1, offset=(1.234, 0, 0))},
        {"affine": affine(1, 1, 1, offset=(1.23, 0, 0))},
        DONE,
    ),
    "image with rounded pixdim": (
        {"affine": FLIPPED, "qform_code": 0, "pixdim": (0.7813, 0.7813, 2.5)},
        {"affine": FLIPPED},
        DONE,
    ),
    "label with rounded pixdim": (
        {"affine": FLIPPED},
        {"affine": FLIPPED, "qform_code": 0, "pixdim": (0.7813, 0.7813, 2.5)},
        DONE,
    ),
    "label by its qform": ({"affine": SCANNER}, {"affine": SCANNER, "sform_code": 0}, DONE),
    "label of four axes": ({}, {"shape": (20, 24, 18, 1)}, DONE),
    "image of four axes": ({"shape": (20, 24, 18, 1)}, {}, DONE),
    "label in float64": ({}, {"dtype": "float64"}, DONE),
    "label in NIfTI-2, big endian": ({}, {"version": 2, "byteorder": ">"}, DONE),
    "one slice each": ({"shape": (35, 51, 1)}, {"shape": (35, 51, 1)}, DONE),
    "sheared": ({"affine": affine(1, 1, 2, shear=0.3)}, {"affine": affine(1, 1, 2, shear=0.3)}, DONE),
    "nothing labelled": ({}, {"values": lambda v: 0 * v}, DONE),
    "mirrored": ({"affine": FLIPPED}, {"affine": affine(0.78125, 0.78125, 2.5)}, "up to .* mm away from its image; resample"),
    "moved by a voxel": ({}, {"affine": affine(1, 1, 1, offset=(0, 1, 0))}, "up to 1 mm away"),
    "5.2 mm beside 5": ({"affine": affine(1, 1, 5)}, {"affine": affine(1, 1, 5.2)}, "up to 3.4 mm away"),
    "of another shape": ({}, {"shape": (20, 24, 17)}, "differs from its image's"),
    "label without orientation": (
        {"affine": SCANNER},
        {"affine": SCANNER, "sform_code": 0, "qform_code": 0},
        "away from its image",
    ),
    "label with NaN in its affine": ({}, {"affine": put(CLEAN, (0, 3), np.nan), "qform": CLEAN}, "NaN or infinity"),
    "label of another class": ({}, {"values": lambda v: v * 7}, r"labels \[7.0\] are outside 0 to 2"),
    "label between classes": ({}, {"dtype": "float32", "values": lambda v: v / 2}, r"labels \[0.5\]"),
    "label with NaN": ({}, {"dtype": "float32", "values": lambda v: put(v, (3, 3, 3), np.nan)}, r"labels \[nan\]"),
    "label of negative numbers": ({}, {"values": lambda v: -v}, r"labels \[-1.0\]"),
    "complex label": ({}, {"dtype": "complex64"}, "are no labels"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for row, (image, label, _) in LABELS.items():
        for kind, changes in (("images", image), ("labels", {**{k: image[k] for k in ("shape",) if k in image}, **label})):
            write_scan(folder / kind / f"{file_name(row)}.nii.gz", label=kind == "labels", **changes)
    return folder


@pytest.mark.parametrize("row", [row for row, (*_, outcome) in LABELS.items() if outcome])
def test_a_label_elsewhere_or_of_other_classes_is_refused_by_name(row, pairs):
    case = {kind: str(pairs / f"{kind}s" / f"{file_name(row)}.nii.gz") for kind in ("image", "label")}
    with pytest.raises(InputError, match=f"labels/{file_name(row)}.nii.gz: .*{LABELS[row][2]}"):
        usable_cases([case], 3)


def test_all_that_is_accepted_trains_and_is_scored_on_the_image(pairs, tmp_path):
    rows = [row for row, (*_, outcome) in LABELS.items() if not outcome]
    write_listing(pairs, 3, [f"{file_name(row)}.nii.gz" for row in rows])
    train(pairs, tmp_path / "train")
    assert (tmp_path / "train" / "model.pt").is_file()
    evaluate("hippocampus_mri_morse", pairs, tmp_path / "out")
    for row in rows:
        image, seg = (
            nib.load(pairs / f"images/{file_name(row)}.nii.gz"),
            nib.load(tmp_path / f"out/predictions/{file_name(row)}.nii.gz"),
        )
        assert seg.shape == image.shape and np.abs(seg.affine - image.affine).max() <= 1e-6
    text = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    dice = {line.split(",")[0]: line.split(",")[2] for line in text if ",class 1," in line}
    for row in rows:  # the bright part is where its label says
        assert float(dice[file_name(row)] or 0) > 0.8 or row == "nothing labelled", (row, dice)


def test_a_grid_that_monai_takes_for_the_same_becomes_the_scans_to_the_last_digit():
    meta = {
        "original_affine": SCANNER,
        "spatial_shape": (6, 5, 4),
        "affine": torch.from_numpy(SCANNER + 5e-4 * np.eye(4, 4, 1)),
    }
    found = ToScanGridd("pred")({"pred": MetaTensor(torch.rand(2, 6, 5, 4), meta=meta)})["pred"]
    assert np.array_equal(found.affine, SCANNER)


# --- limits and CT


def test_a_scan_that_would_be_too_large_is_refused_before_work(tmp_path):
    case = {"image": str(write_scan(tmp_path / "wide.nii.gz", shape=(60, 60, 40), affine=affine(10, 10, 10)))}
    assert usable_cases([case], 3) == [case]
    with pytest.raises(
        InputError, match="wide.nii.gz: resampled to 0.5 x 0.5 x 0.5 mm it has 1200 x 1200 x 800 voxels, more than"
    ):
        usable_cases([case], 3, limits={"resampled_to": (0.5, 0.5, 0.5)})
    assert usable_cases([case], 3, limits={"resampled_to": (0.5, 0.5, 0.5), "voxels": 2e9}) == [case]
    with pytest.raises(InputError, match="it has 60 x 60 x 40 voxels, more than 1e.05; crop it, or set --limits#voxels"):
        usable_cases([case], 3, limits={"voxels": 1e5})
    with pytest.raises(InputError, match="plausible are 1 to 5"):
        usable_cases([case], 3, limits={"spacing": (1, 5)})
    with pytest.raises(InputError, match="a word of limits must be one of .*'voxels'.*, got 'voxel'"):
        usable_cases([case], 3, limits={"voxel": 1e5})
    assert usable_cases([case], 3, limits={"voxels": 1e5}, check="false") == [case]


def test_a_header_that_promises_too_much_is_refused_before_it_takes_the_memory(tmp_path):
    path = write_scan(tmp_path / "vast.nii")
    content = bytearray(path.read_bytes())
    content[40:48] = np.array([3, 32000, 32000, 32000], "<i2").tobytes()
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="vast.nii: it has 32000 x 32000 x 32000 voxels"):
        usable_cases([{"image": str(path)}], 3)


CT = {  # how the values of a CT are changed, and what is said to be missing
    "HU": (lambda hu: hu, DONE),
    "HU clipped to the window": (lambda hu: hu.clip(-125, 275), DONE),
    "HU, air as -2000": (lambda hu: np.where(hu == -1000, -2000, hu), DONE),
    "moved by 1024": (lambda hu: hu + 1024, "0.0 % are fat"),
    "moved by -1024": (lambda hu: hu - 1024, "fat"),
    "moved by 200": (lambda hu: hu + 200, "fat"),
    "moved by -200": (lambda hu: hu - 200, "soft tissue"),
    "ten times": (lambda hu: 10 * hu, "of a body"),
    "ten times, moved": (lambda hu: 10 * hu + 1024, "of a body"),
    "a tenth": (lambda hu: hu / 10, "bone or contrast"),
    "a thousandth": (lambda hu: hu / 1000, "fat"),
    "0 to 1000": (lambda hu: (hu + 1000) / 2, "fat"),
    "0 to 4096": (lambda hu: (hu + 1000).clip(0), "fat"),
    "the window in 8 bits": (lambda hu: (hu.clip(-125, 275) + 125) / 400 * 255, "fat"),
    "0 to 1": (lambda hu: (hu.clip(-125, 275) + 125) / 400, "fat"),
    "standardised": (lambda hu: (hu - hu.mean()) / hu.std(), "fat"),
}


@pytest.mark.parametrize("row", CT)
def test_a_ct_that_is_not_in_hu_is_done_with_a_warning(row, tmp_path, caplog):
    change, lacking = CT[row]
    rng = np.random.default_rng(0)
    hu = rng.choice([-1000.0, -100, 40, 60, 110, 500], (20, 20, 20), p=[0.4, 0.2, 0.1, 0.2, 0.05, 0.05])
    hu += (hu > -1000) * rng.normal(0, 10, hu.shape)
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(change(hu).astype(np.float32), np.eye(4)), path)
    usable_cases([{"image": str(path)}], 9, limits={"hounsfield": "true"})
    assert ("ct.nii.gz: these look like no Hounsfield units: values from" in caplog.text) == bool(lacking)
    assert lacking in caplog.text
