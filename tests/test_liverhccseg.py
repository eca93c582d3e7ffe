"""``prepare liverhccseg``: folders laid out as the archive is, masks on the arterial grid; what is not on it is said."""

import csv
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from monai_morse.__main__ import main
from monai_morse.data import msd_cases, usable_cases
from monai_morse.data.dicom import reoriented
from monai_morse.errors import InputError
from monai_morse.prepare import prepare_liverhccseg

AFFINE = np.diag([1.5, 1.2, 3.0, 1.0]) + np.array([[0, 0, 0, -20], [0, 0, 0, 5], [0, 0, 0, 40], [0, 0, 0, 0]])
SIZE = (9, 8, 6)
FILES = {"pre": "art_pre", "arterial": "art", "venous": "art_pv", "delayed": "art_del"}
PATIENTS = ("TCGA-BC-4073", "TCGA-DD-A4NB")


def volume(seed, size=SIZE, affine=AFFINE):
    return nib.Nifti1Image(np.random.default_rng(seed).integers(0, 900, size).astype(np.int16), affine)


def box(*slices, affine=AFFINE):
    voxels = np.zeros(SIZE, np.uint8)
    voxels[slices] = 1
    return nib.Nifti1Image(voxels, affine)


LIVER = [box(slice(1, 6), slice(1, 5), slice(1, 4 + rater)) for rater in (1, 2)]
TUMORS = [
    box(slice(2, 3), slice(2, 4), slice(2, 3)),
    box(slice(7, 8), slice(5, 7), slice(1, 2)),
]  # the second outside the liver


def write(root):
    for i, patient in enumerate(PATIENTS):
        exam = root / "nifti_and_segms" / patient / f"02-2{i}-2000"
        exam.mkdir(parents=True)
        for k, file in enumerate(FILES.values()):
            nib.save(volume([i, k]), exam / f"{file}.nii.gz")
        for name in ("pre", "pv", "del"):  # before registration, on grids of their own
            nib.save(volume([i, 9], (7, 8, 5)), exam / f"{name}.nii.gz")
        for rater in (1, 2):
            nib.save(LIVER[rater - 1], exam / f"rater{rater}_liver.nii.gz")
        for number, tumor in enumerate(TUMORS if i == 0 else [], start=1):
            nib.save(tumor, exam / f"rater1_tumor{number}.nii.gz")
    return root


def first(root):
    return root / "nifti_and_segms" / PATIENTS[0] / "02-20-2000"


def label(out, case):
    return np.asarray(nib.load(out / f"labelsTr/{case}.nii.gz").dataobj)


def test_registered_phases_and_masks_become_cases_by_patient(tmp_path, capsys):
    command = ["prepare", "liverhccseg", "--source", str(write(tmp_path / "s")), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "| TCGA-BC-4073 | yes | yes | yes | yes |" in said and "8 cases of 2 patients" in said and "0 left out" in said
    entries = json.loads((tmp_path / "out/dataset.json").read_text())["training"]
    assert [(e["patient"], e["phase"]) for e in entries] == [(p, phase) for p in PATIENTS for phase in FILES]
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 2)) == 8
    for k, phase in enumerate(FILES):
        found = nib.load(tmp_path / f"out/imagesTr/TCGA-DD-A4NB_{phase}.nii.gz")
        assert np.array_equal(found.dataobj, volume([1, k]).dataobj) and np.allclose(found.affine, AFFINE)
    liver, tumors = (np.asarray(i.dataobj) > 0 for i in (LIVER[0], nib.Nifti1Image(sum(t.dataobj for t in TUMORS), AFFINE)))
    assert np.array_equal(label(tmp_path / "out", "TCGA-BC-4073_venous"), liver | tumors)
    assert main([*command, "--tumor", "--phases", "channels"]) == 0
    assert np.array_equal(label(tmp_path / "out", "TCGA-BC-4073"), np.where(tumors, 2, liver))
    assert nib.load(tmp_path / "out/imagesTr/TCGA-BC-4073.nii.gz").shape == (*SIZE, 4)
    assert main([*command, "--rater", "2"]) == 0
    assert np.array_equal(label(tmp_path / "out", "TCGA-BC-4073_pre"), LIVER[1].dataobj)


def test_a_phase_stored_in_another_orientation_meets_the_masks(tmp_path):
    file = first(write(tmp_path / "s")) / "art_pv.nii.gz"
    nib.save(nib.load(file).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]])), tmp_path / "turned.nii.gz")
    shutil.move(tmp_path / "turned.nii.gz", file)
    prepare_liverhccseg(tmp_path / "s", tmp_path / "out")
    for folder, expected in (("imagesTr", volume([0, 2])), ("labelsTr", LIVER[0])):
        found = reoriented(nib.load(tmp_path / f"out/{folder}/TCGA-BC-4073_venous.nii.gz"), expected)
        liver = np.asarray(expected.dataobj)
        liver = liver if folder == "imagesTr" else np.maximum(liver, sum(np.asarray(t.dataobj) for t in TUMORS))
        assert np.array_equal(found.dataobj, liver)


def moved(source):
    affine = AFFINE.copy()
    affine[0, 3] += 3
    nib.save(volume([0, 2], affine=affine), first(source) / "art_pv.nii.gz")


def fewer_slices(source):
    nib.save(volume([0, 2], (9, 8, 5)), first(source) / "art_pv.nii.gz")


def empty(source):
    nib.save(box(slice(0, 0)), first(source) / "rater1_liver.nii.gz")


FAULTS = {
    "a phase missing": (lambda s: (first(s) / "art_pv.nii.gz").unlink(), 7, "art_pv.nii.gz: the file does not exist"),
    "a phase on another grid": (moved, 7, "rater1_liver.nii.gz: its affine puts it up to 3 mm away from its image"),
    "a phase of fewer slices": (
        fewer_slices,
        7,
        r"liver.nii.gz: shape \(9, 8, 6\) differs from its image's \(9, 8, 5\)",
    ),
    "no mask": (lambda s: (first(s) / "rater1_liver.nii.gz").unlink(), 4, "rater1_liver.nii.gz: the file does not exist"),
    "an empty mask": (empty, 4, "02-20-2000: no voxel of liver in the mask of rater 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_left_out_by_name_and_the_rest_is_done(name, tmp_path):
    fault, left, message = FAULTS[name]
    fault(write(tmp_path / "s"))
    assert f"{left} cases of" in prepare_liverhccseg(tmp_path / "s", tmp_path / "out")
    with open(tmp_path / "out/skipped.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 - left and all(r["patient"] == PATIENTS[0] and re.search(message, r["reason"]) for r in rows), rows


def test_words_and_folders_that_cannot_be_are_refused(tmp_path):
    write(tmp_path / "s")
    for options, message in (({"rater": 3}, "rater must be 1 or 2, got 3"), ({"phases": "all"}, "phases must be one of")):
        with pytest.raises(InputError, match=message):
            prepare_liverhccseg(tmp_path / "s", tmp_path / "out", **options)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no art.nii.gz .* give the folder of nifti_and_segms.zip"):
        prepare_liverhccseg(tmp_path / "nothing", tmp_path / "out")
