"""DICOM series as scans: found, named, read in the geometry that NIfTI has, and label maps back as DICOM-SEG."""

import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, real_data, write_dicom, write_msd
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from monai_morse.data import (
    SaveDicomSegd,
    ScanReader,
    dicom_scans,
    raise_if_left_out,
    read_scan,
    scan_name,
    scans_in,
    usable_cases,
)
from monai_morse.data.checks import find_problem
from monai_morse.data.dicom import reoriented
from monai_morse.errors import InputError

OBLIQUE = np.array([[1.19, -0.17, 0.3, -30], [0.17, 1.19, -0.1, 12], [-0.22, 0.11, 2.9, 7], [0, 0, 0, 1]])
# axes at right angles, as scanners have them
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * [-1.2, -1.2, 3.0]


def volume(shape=(10, 12, 7), affine=OBLIQUE, seed=0):
    voxels = np.random.default_rng(seed).integers(-200, 900, shape).astype(np.int16)
    return nib.Nifti1Image(voxels, affine)


def assert_same(image, expected):
    """The same voxels at the same places in the world, whatever the order of the axes."""
    turned = reoriented(image, expected)
    assert np.allclose(turned.affine, expected.affine, atol=1e-3)
    assert np.allclose(np.asarray(turned.dataobj), np.asarray(expected.dataobj), atol=1e-3)


AXIAL = np.diag([-1.2, -1.2, 3.0, 1.0])
CORONAL = np.array([[1.5, 0, 0, -20], [0, 0, 3.5, 4], [0, -1.5, 0, 9], [0, 0, 0, 1.0]])
SAGITTAL = np.array([[0, 0, -4, 20], [2, 0, 0, 4], [0, -2, 0, 9], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("affine", [AXIAL, CORONAL, SAGITTAL, OBLIQUE], ids=["axial", "coronal", "sagittal", "oblique"])
def test_a_series_has_the_voxels_and_the_geometry_of_the_same_image_as_nifti(affine, tmp_path):
    image = volume(affine=affine)
    write_dicom(tmp_path / "art", image)
    (address,) = dicom_scans(tmp_path).values()
    assert_same(read_scan(address), image)


def test_slices_scaled_differently_are_read_in_their_own_units(tmp_path):
    image = volume()
    voxels = np.asarray(image.dataobj).astype(np.float32) / 4
    slopes = np.linspace(0.25, 0.5, 7)
    write_dicom(tmp_path, nib.Nifti1Image(np.round(voxels / slopes) * slopes, OBLIQUE), slopes=slopes)
    assert_same(
        read_scan(next(iter(dicom_scans(tmp_path).values()))), nib.Nifti1Image(np.round(voxels / slopes) * slopes, OBLIQUE)
    )


def test_series_are_named_by_where_they_lie_and_other_objects_are_none(tmp_path):
    write_dicom(tmp_path / "p.1" / "art", volume())
    write_dicom(tmp_path / "p.2", volume(seed=1), "T1 VIBE art", 5, name="A{:03d}")
    write_dicom(tmp_path / "p.2", volume(seed=2), "T1 VIBE ven", 6, name="B{:03d}.dcm")
    write_dicom(tmp_path / "p.2", volume(), "liver", 7, name="C{:03d}", modality="SEG")
    write_dicom(tmp_path / ".trash", volume())
    (tmp_path / "p.1" / "art" / "notes.txt").write_text("no scan")
    (tmp_path / "p.1" / "art" / "empty").write_bytes(b"")
    found = dicom_scans(tmp_path)
    assert list(found) == ["p.1/art", "p.2/5_T1_VIBE_art", "p.2/6_T1_VIBE_ven"]
    assert [scan_name(a) for a in found.values()] == ["p.1_art", "p.2_5_T1_VIBE_art", "p.2_6_T1_VIBE_ven"]
    assert_same(read_scan(found["p.2/6_T1_VIBE_ven"]), volume(seed=2))
    assert scan_name(dicom_scans(tmp_path / "p.1" / "art")["art"]) == "art"  # the folder itself


def test_a_folder_may_mix_dicom_and_nifti(tmp_path):
    write_dicom(tmp_path / "p1", volume())
    nib.save(volume(seed=1), tmp_path / "p2.nii.gz")
    cases = scans_in(tmp_path)
    assert [scan_name(c["image"]) for c in cases] == ["p2", "p1"]
    assert usable_cases(cases, 3) == cases
    load = LoadImaged(keys="image", reader=ScanReader, ensure_channel_first=True)
    for case, seed in zip(cases, (1, 0)):
        image = load(case)["image"]
        assert_same(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()), volume(seed=seed))
        assert np.allclose(image.meta["original_affine"], image.affine) and list(image.meta["spatial_shape"]) == [10, 12, 7]
    shutil.copytree(tmp_path / "p1", tmp_path / "p2")
    with pytest.raises(InputError, match="two scans named p2"):
        scans_in(tmp_path)


def cut(files, length):
    file = sorted(files, key=slice_number)[3]
    file.write_bytes(file.read_bytes()[:length])


def twice(files):
    import pydicom

    data = pydicom.dcmread(files[3])
    data.SOPInstanceUID += ".9"
    data.save_as(files[3].with_name("again"))


def all_gone(files):
    for file in files:
        file.unlink()


def slice_number(file):
    import pydicom

    return int(pydicom.dcmread(file).InstanceNumber)


FAULTS = {
    "a slice missing": (lambda files: sorted(files, key=slice_number)[3].unlink(), "6 slices are not evenly spaced"),
    "a slice twice": (twice, "8 slices are not evenly spaced"),
    "a file cut short": (lambda files: cut(files, -100), "IM000. of its 7 files cannot be decoded, truncated"),
    "a file cut in its header": (lambda files: cut(files, 600), "6 slices are not evenly spaced"),
    "no file any more": (all_gone, "no DICOM series"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_series_is_named_and_the_others_are_used(name, tmp_path, caplog):
    break_it, message = FAULTS[name]
    files = write_dicom(tmp_path / "broken", volume())
    write_dicom(tmp_path / "good", volume(seed=1))
    cases = scans_in(tmp_path)
    break_it(files)
    if name != "no file any more":
        cases = scans_in(tmp_path)
    used = [case for case in cases if find_problem(case, 3) is None]
    assert [scan_name(c["image"]) for c in used] == ["good"]
    problem = find_problem(cases[0], 3)
    assert re.search(message, problem), problem
    with pytest.raises(InputError, match="1 case.s. refused or failed.*broken"):
        raise_if_left_out(cases, used)


def test_a_file_that_is_no_slice_of_any_series_is_told_of(tmp_path, caplog):
    files = write_dicom(tmp_path / "art", volume())
    last = max(files, key=slice_number)
    last.write_bytes(last.read_bytes()[:600])  # what is left is evenly spaced
    assert len(dicom_scans(tmp_path)) == 1
    assert f"1 DICOM file(s) without a readable image are left out, such as {last.name}" in caplog.text


def test_nothing_there_says_what_would_be_a_scan(tmp_path):
    (tmp_path / "notes.txt").write_text("no scan")
    with pytest.raises(InputError, match="no NIfTI files .* and no DICOM series in it"):
        scans_in(tmp_path)


def label_map(address):
    image = LoadImaged(keys="image", reader=ScanReader, ensure_channel_first=True)({"image": address})["image"]
    labels = (image > 500).float() + (image < -100).float() * 2
    return MetaTensor(labels, meta=image.meta)


def test_label_maps_become_dicom_segmentations_in_the_series_own_geometry(tmp_path):
    hd = pytest.importorskip("highdicom", reason="pip install monai_morse[dicom]")
    write_dicom(tmp_path / "art", volume())
    (address,) = dicom_scans(tmp_path).values()
    pred = label_map(address)
    SaveDicomSegd("pred", tmp_path / "out", ["liver", "lesion"])({"pred": pred})
    seg = hd.seg.segread(tmp_path / "out" / "art_seg.dcm")
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "lesion"]
    assert seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Liver"
    found = seg.get_volume(combine_segments=True)
    to_ras = np.diag([-1.0, -1, 1, 1])
    expected = nib.Nifti1Image(np.asarray(pred[0]), pred.affine.numpy())
    assert_same(nib.Nifti1Image(found.array.astype(np.float32), to_ras @ found.affine), expected)


def test_a_segmentation_of_a_real_anonymised_series_is_kept_with_its_map(tmp_path):
    pytest.importorskip("highdicom", reason="pip install monai_morse[dicom]")
    (address,) = dicom_scans(real_data("abdomen_ct_dicom") / "series").values()
    pred = label_map(address)
    found = SaveDicomSegd("pred", tmp_path, ["liver", "lesion"])({"pred": pred})["pred"]
    assert found.meta["dicom_seg"] == str(tmp_path / "series_seg.dcm") and (tmp_path / "series_seg.dcm").is_file()


def test_no_segmentation_of_nifti_nor_of_an_empty_label_map(tmp_path, caplog):
    pytest.importorskip("highdicom", reason="pip install monai_morse[dicom]")
    write_dicom(tmp_path / "art", volume())
    (address,) = dicom_scans(tmp_path).values()
    save = SaveDicomSegd("pred", tmp_path / "out", ["liver"])
    save({"pred": torch.zeros_like(label_map(address))})
    assert "label map is empty" in caplog.text
    nib.save(volume(), tmp_path / "scan.nii.gz")
    save({"pred": label_map(str(tmp_path / "scan.nii.gz"))})
    assert not (tmp_path / "out").exists()


def test_without_highdicom_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("monai_morse.data.dicom_seg.optional_import", lambda name: (None, False))
    with pytest.raises(InputError, match="pip install 'monai_morse.dicom.'"):
        SaveDicomSegd("pred", tmp_path, ["liver"])


def test_a_real_compressed_series_without_extensions_lies_on_its_labels():
    folder = real_data("abdomen_ct_dicom")
    (address,) = dicom_scans(folder / "series").values()
    image = read_scan(address)
    labels = reoriented(nib.load(folder / "totalseg_labels.nii.gz"), image)  # stored in LAS, the series in LPS
    assert image.shape == labels.shape == (512, 512, 20) and np.allclose(image.affine, labels.affine, atol=1e-4)
    voxels, classes = np.asarray(image.dataobj), np.asarray(labels.dataobj)
    liver = voxels[classes == 5]
    assert 60 < liver.mean() < 120 and liver.std() < 30  # Hounsfield units of a liver


def test_the_hippocampus_bundle_segments_a_series_as_the_same_scan_in_nifti(tmp_path):
    bundle = ROOT / "bundles" / "hippocampus_mri_morse"
    data = write_msd(tmp_path / "data", cases=1, shape=(30, 34, 28), affine=OBLIQUE)
    image = nib.load(data / "imagesTr/case_0.nii.gz")
    image = nib.Nifti1Image(np.asarray(image.dataobj).round().astype(np.int16), OBLIQUE)
    write_dicom(tmp_path / "scans" / "series", image)
    nib.save(image, tmp_path / "scans" / "nifti.nii.gz")
    config, meta = (str(bundle / "configs" / f) for f in ("inference.yaml", "metadata.json"))
    words = {"bundle_root": str(bundle), "dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "out")}
    words["spacing"] = [1.2, 1.2, 3.0]
    workflow = ConfigWorkflow(config, meta, logging_file=False, workflow_type="infer", **words)
    workflow.initialize()
    workflow.run()
    series, nifti = (nib.load(tmp_path / "out" / f"{n}_seg.nii.gz") for n in ("series", "nifti"))
    assert np.asarray(nifti.dataobj).any()
    assert_same(series, nifti)
