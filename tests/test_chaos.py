"""``prepare chaos``: folders like CHAOS's, made of known volumes, give these volumes back, voxel by voxel, or are refused."""

import csv
import itertools
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import real_data, write_dicom
from skimage.io import imread, imsave

from monai_morse.__main__ import main
from monai_morse.data import dicom_scans, msd_cases, read_scan, usable_cases
from monai_morse.data.dicom import reoriented, series_planes
from monai_morse.errors import InputError
from monai_morse.prepare import prepare_chaos

GREYS = np.array([0, 63, 126, 189, 252], np.uint8)
ORGANS = ["liver", "right_kidney", "left_kidney", "spleen"]
SIZE = (12, 9, 7)


def affine_of(*columns, origin=(-40.0, 25.0, 300.0)):
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns, float).T
    affine[:3, 3] = origin
    return affine


TURN = np.linalg.qr(np.array([[0.98, -0.15, 0.1], [0.15, 0.98, -0.05], [-0.1, 0.05, 0.99]]))[0]
ORIENTATIONS = {
    "axial, from the feet": affine_of((-1.2, 0, 0), (0, -1.5, 0), (0, 0, 7.7)),
    "axial, from the head": affine_of((-1.2, 0, 0), (0, -1.5, 0), (0, 0, -7.7)),
    "axial, mirrored": affine_of((1.2, 0, 0), (0, -1.5, 0), (0, 0, 7.7)),
    "coronal": affine_of((-1.2, 0, 0), (0, 0, -1.5), (0, 6, 0)),
    "coronal, from the back": affine_of((-1.2, 0, 0), (0, 0, -1.5), (0, -6, 0)),
    "sagittal": affine_of((0, -1.2, 0), (0, 0, -1.5), (5, 0, 0)),
    "oblique": affine_of(*(TURN * [1.2, 1.5, 7.7]).T),
    "oblique, from the other end": affine_of(*(TURN * [1.2, 1.5, -7.7]).T),
}
AXIAL = ORIENTATIONS["axial, from the feet"]


def organs(patient=1, affine=AXIAL):
    """Four organs of different size and place, none the mirror image of another."""
    label = np.zeros(SIZE, np.uint8)
    label[1:5, 1:5, 1 : 5 + patient % 2] = 1
    label[6:8, 1:3, 2:4] = 2
    label[9:11, 1:4, 1:3] = 3
    label[7:11, 5:8, 3:6] = 4
    return nib.Nifti1Image(label, affine)


def scan(patient=1, seed=0, affine=AXIAL):
    levels = np.array([100, 600, 800, 800, 400])[np.asarray(organs(patient).dataobj)]
    return nib.Nifti1Image((levels + np.random.default_rng([patient, seed]).integers(0, 99, SIZE)).astype(np.int16), affine)


T2, IN, OUT = 0, 2, 1  # seeds of scans


def write_slices(folder, image, name, backwards=False, **options):
    """A series whose files are named by number, in the order of its slices or against it; the names by slice."""
    import pydicom

    count = image.shape[2]
    names = [name.format(count - 1 - k if backwards else k) for k in range(count)]
    for file in write_dicom(folder, image, name="written{:04d}", **options):
        file.rename(folder / f"{names[int(pydicom.dcmread(file).InstanceNumber) - 1]}.dcm")
    return names


def write_masks(folder, greys, names):
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        imsave(folder / f"{name}.png", greys[..., k].T, check_contrast=False)


class Numbered:
    """A pattern of names whose numbers are these of k = 0, 1, .."""

    def __init__(self, pattern, first=1, step=1):
        self.pattern, self.first, self.step = pattern, first, step

    def format(self, k):
        return self.pattern.format(self.first + self.step * k)


def write_mr(root, patient, affine=AXIAL, backwards=False, label=None):
    label = organs(patient, affine) if label is None else label
    greys = GREYS[np.asarray(label.dataobj)]
    place = root / f"Train_Sets/MR/{patient}"
    names = write_slices(place / "T2SPIR/DICOM_anon", scan(patient, T2, affine), Numbered("IMG-0004-{:05d}"), backwards)
    write_masks(place / "T2SPIR/Ground", greys, names)
    for phase, seed in (("OutPhase", OUT), ("InPhase", IN)):  # numbered in turn, 1, 3, .. and 2, 4, ..
        numbered = Numbered("IMG-0003-{:05d}", seed, 2)
        names = write_slices(place / f"T1DUAL/DICOM_anon/{phase}", scan(patient, seed, affine), numbered, backwards)
    write_masks(place / "T1DUAL/Ground", greys, names)
    return root


def ct(affine=AXIAL):
    """A liver of about 100 HU, and fat."""
    liver = np.asarray(organs(2).dataobj) == 1
    hu = np.where(liver, 100, -100) + np.random.default_rng(0).integers(-20, 20, SIZE)
    return nib.Nifti1Image(hu.astype(np.int16), affine), nib.Nifti1Image(liver.astype(np.uint8), affine)


def write_ct(root, patient, affine=AXIAL, backwards=False, names="i{:04d},0000b", first=0):
    image, liver = ct(affine)
    place = root / f"Train_Sets/CT/{patient}"
    write_slices(place / "DICOM_anon", image, Numbered(names, first), backwards, modality="CT")
    masks = np.asarray(liver.dataobj) == 1
    masks = masks[..., ::-1] if backwards else masks
    write_masks(place / "Ground", masks, [f"liver_GT_{k:03d}" for k in range(SIZE[2])])
    return root


def check_same(path, expected):
    found = reoriented(nib.load(path), expected)
    assert np.allclose(found.affine, expected.affine, atol=1e-3)
    assert np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj)), path


def listing(out):
    return json.loads((out / "dataset.json").read_text())


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_label_map_is_the_one_that_the_masks_were_made_of(name, backwards, tmp_path):
    affine = ORIENTATIONS[name]
    write_mr(tmp_path / "s", 1, affine, backwards)
    write_ct(tmp_path / "s", 1, affine, backwards)
    out = tmp_path / "mr"
    said = prepare_chaos(tmp_path / "s", out, ["t2spir", "t1in", "t1out"])
    assert "| mr01 | yes | yes | yes |" in said and "3 cases of 1 patients" in said and "0 left out" in said, said
    for word, seed in (("t2spir", T2), ("t1in", IN), ("t1out", OUT)):
        check_same(out / f"imagesTr/mr01_{word}.nii.gz", scan(1, seed, affine))
        check_same(out / f"labelsTr/mr01_{word}.nii.gz", organs(1, affine))
    out = tmp_path / "ct"
    prepare_chaos(tmp_path / "s", out, "ct")
    for folder, expected in zip(("imagesTr", "labelsTr"), ct(affine)):
        check_same(out / folder / "ct01.nii.gz", expected)


def test_names_of_slices_that_count_from_one_meet_masks_that_count_from_zero(tmp_path):
    write_ct(tmp_path / "s", 2, names="IMG-0002-{:05d}", first=1, backwards=True)
    prepare_chaos(tmp_path / "s", tmp_path / "out", "ct")
    check_same(tmp_path / "out/labelsTr/ct02.nii.gz", ct()[1])


def test_patients_of_all_sequences_are_listed_for_folds_by_patient(tmp_path, capsys):
    for patient in (1, 2, 10):
        write_mr(tmp_path / "s/CHAOS_Train_Sets", patient)
    write_ct(tmp_path / "s/CHAOS_Train_Sets", 1)
    (tmp_path / "s/CHAOS_Test_Sets/Test_Sets/MR/3/T2SPIR/DICOM_anon").mkdir(parents=True)
    shutil.copytree(tmp_path / "s/CHAOS_Train_Sets/Train_Sets/MR/1", tmp_path / "s/__MACOSX/Train_Sets/MR/1")
    command = ["prepare", "chaos", "--source", str(tmp_path / "s"), "--out", str(tmp_path / "out")]
    assert main([*command, "--modality", "all"]) == 0
    said = capsys.readouterr().out
    assert "| mr10 | yes | yes | yes | - |" in said and "| ct01 | - | - | - | yes |" in said
    assert "10 cases of 4 patients" in said and "1 left out" in said and "1 series in Test_Sets" in said
    content = listing(tmp_path / "out")
    assert content["labels"] == {"0": "background", "1": "liver"} and content["licence"] == "CC BY-NC-SA 4.0"
    assert [e["phase"] for e in content["training"] if e["patient"] == "mr02"] == ["t2spir", "t1in", "t1out"]
    for fold in range(4):
        sides = [{c["label"] for c in msd_cases(tmp_path / "out", split, fold, 4)} for split in ("train", "val")]
        patients = [{re.search(r"(mr|ct)\d+", label)[0] for label in side} for side in sides]
        assert len(patients[1]) == 1 and not patients[0] & patients[1]
    assert main(command) == 0  # T2-SPIR alone, all four organs, in place of the former
    assert "3 cases of 3 patients" in capsys.readouterr().out
    assert list(listing(tmp_path / "out")["labels"].values()) == ["background", *ORGANS]
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 5)) == 3
    assert sorted(p.name for p in (tmp_path / "out/labelsTr").iterdir()) == [f"mr{i}_t2spir.nii.gz" for i in ("01", "02", "10")]


def test_organs_are_labels_in_one_order_and_phases_may_be_channels(tmp_path):
    write_mr(tmp_path / "s", 1, ORIENTATIONS["coronal"])
    prepare_chaos(tmp_path / "s", tmp_path / "out", ["t1out", "t1in"], ["spleen", "liver"], phases="channels")
    content = listing(tmp_path / "out")
    assert content["labels"] == {"0": "background", "1": "liver", "2": "spleen"}
    assert content["modality"] == {"0": "MRI, t1out", "1": "MRI, t1in"} and content["tensorImageSize"] == "4D"
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 3, in_channels=2)) == 1
    label = organs(1, ORIENTATIONS["coronal"])
    check_same(
        tmp_path / "out/labelsTr/mr01_t1.nii.gz",
        nib.Nifti1Image(np.array([0, 1, 0, 0, 2], np.uint8)[label.dataobj], label.affine),
    )
    image = nib.load(tmp_path / "out/imagesTr/mr01_t1.nii.gz")
    for c, seed in enumerate((OUT, IN)):
        channel = nib.Nifti1Image(np.asarray(image.dataobj)[..., c], image.affine)
        expected = scan(1, seed, ORIENTATIONS["coronal"])
        assert np.array_equal(reoriented(channel, expected).dataobj, expected.dataobj)


# --- what does not fit


def path(word, kind="Ground"):
    return {"t2spir": "Train_Sets/MR/1/T2SPIR", "t1": "Train_Sets/MR/1/T1DUAL", "ct": "Train_Sets/CT/1"}[word] + f"/{kind}"


def without(*files):
    def fault(source):
        for file in files:
            found = source / file
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    return fault


def renamed(old, new):
    return lambda source: (source / old).rename(source / new)


def redrawn(file, change):
    return lambda source: imsave(source / file, change(imread(source / file)), check_contrast=False)


def surplus(source):
    shutil.copy(source / path("t2spir") / "IMG-0004-00007.png", source / path("t2spir") / "IMG-0004-00008.png")


def other_grey(source):
    file = source / path("t2spir") / "IMG-0004-00002.png"
    grey = imread(file)
    grey[0:4, 0:6] = 90
    imsave(file, grey, check_contrast=False)


def torn(source):
    file = source / path("t2spir") / "IMG-0004-00002.png"
    file.write_bytes(file.read_bytes()[:40])


def empty(source):
    for file in (source / path("t2spir")).iterdir():
        imsave(file, np.zeros(SIZE[1::-1], np.uint8), check_contrast=False)


def reversed_masks(word):
    def fault(source):
        masks = sorted((source / path(word)).iterdir())
        for file, pixels in zip(masks, [imread(m) for m in reversed(masks)]):
            imsave(file, pixels, check_contrast=False)

    return fault


def gap_in_both(source):
    (source / path("ct") / "liver_GT_003.png").unlink()
    (source / path("ct", "DICOM_anon") / "i0006,0000b.dcm").unlink()


def second_series(source):
    write_dicom(source / path("t2spir", "DICOM_anon"), scan(), number=9, description="other", name="other{:03d}")


def moved_out_phase(source):
    folder = source / path("t1", "DICOM_anon/OutPhase")
    shutil.rmtree(folder)
    moved = AXIAL.copy()
    moved[2, 3] += 7.7
    write_slices(folder, scan(1, OUT, moved), Numbered("IMG-0003-{:05d}", 1, 2))


FILE = "IMG-0004-0000"
FAULTS = {
    "a mask missing": (without(f"{path('t2spir')}/{FILE}3.png"), "t2spir", f"7 slices and 6 masks, no mask for {FILE}3$"),
    "a mask too many": (surplus, "t2spir", f"7 slices and 8 masks, no slice for {FILE}8$"),
    "a mask of another name": (
        renamed(f"{path('t2spir')}/{FILE}1.png", f"{path('t2spir')}/{FILE}9.png"),
        "t2spir",
        f"7 slices and 7 masks, no mask for {FILE}1, no slice for {FILE}9$",
    ),
    "a slice missing": (without(f"{path('t2spir', 'DICOM_anon')}/{FILE}4.dcm"), "t2spir", "6 slices are not evenly spaced"),
    "a slice missing at the end": (
        without(f"{path('t2spir', 'DICOM_anon')}/{FILE}7.dcm"),
        "t2spir",
        f"6 slices and 7 masks, no slice for {FILE}7$",
    ),
    "no masks": (without(path("t2spir")), "t2spir", "no PNG masks in .*T2SPIR/Ground"),
    "masks turned": (
        redrawn(f"{path('t2spir')}/{FILE}2.png", np.transpose),
        "t2spir",
        f"{FILE}2.png: 9 x 12 pixels, .* 12 x 9",
    ),
    "a mask larger": (
        redrawn(f"{path('t2spir')}/{FILE}2.png", lambda grey: np.pad(grey, 1)),
        "t2spir",
        f"{FILE}2.png: 14 x 11 pixels, its slice has 12 x 9",
    ),
    "a mask in colour": (
        redrawn(f"{path('t2spir')}/{FILE}2.png", lambda grey: np.stack([grey] * 3, -1)),
        "t2spir",
        f"{FILE}2.png: uint8 of shape .9, 12, 3. is no grey picture",
    ),
    "a mask of 16 bits": (
        redrawn(f"{path('t2spir')}/{FILE}2.png", lambda grey: grey.astype(np.uint16) * 200),
        "t2spir",
        f"{FILE}2.png: uint16 .* is no grey picture",
    ),
    "a mask cut short": (torn, "t2spir", f"{FILE}2.png: cannot be read as PNG"),
    "an unknown grey": (other_grey, "t2spir", "grey values 90 .24 voxels. are of no organ: liver 55 to 70, right_kidney 110"),
    "masks without an organ": (empty, "t2spir", "no voxel of liver or right_kidney or left_kidney or spleen in its masks"),
    "two series in a folder": (second_series, "t2spir", "T2SPIR/DICOM_anon: 2 DICOM series, 1 expected"),
    "no T2-SPIR": (without("Train_Sets/MR/1/T2SPIR"), "t2spir", "no folder T2SPIR/DICOM_anon"),
    "no in-phase": (without(path("t1", "DICOM_anon/InPhase")), "t1in", "no folder .*T1DUAL/DICOM_anon/InPhase"),
    "no out-phase": (without(path("t1", "DICOM_anon/OutPhase")), "t1out", "no folder .*T1DUAL/DICOM_anon/OutPhase"),
    "an out-phase elsewhere": (moved_out_phase, "t1out", "InPhase, whose masks these are: .* up to 7.7 mm away .*OutPhase"),
    "CT, a mask missing": (without(f"{path('ct')}/liver_GT_002.png"), "ct", "7 slices and 6 masks$"),
    "CT, a mask and another slice missing": (gap_in_both, "ct", "6 masks .*: liver_GT_004 follows liver_GT_002; restore"),
    "masks in reverse": (reversed_masks("t2spir"), "t2spir", "T2SPIR/Ground: the masks fit their slices better in reverse"),
    "CT, masks in reverse": (reversed_masks("ct"), "ct", "CT/1/Ground: the masks fit their slices better in reverse"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_left_out_by_name_and_the_rest_is_done(name, tmp_path):
    fault, word, message = FAULTS[name]
    source = tmp_path / "s"
    for patient in (1, 2):
        write_ct(source, patient) if word == "ct" else write_mr(source, patient)
    fault(source)
    out = tmp_path / "out"
    said = prepare_chaos(source, out, word)
    kind = word if word == "ct" else "mr"
    assert f"| {kind}01 | - |" in said and f"| {kind}02 | yes |" in said and "1 cases of 1 patients" in said, said
    with open(out / "skipped.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["patient"], row["phase"]) == (f"{kind}01", word) and re.search(message, row["reason"]), row
    assert len(listing(out)["training"]) == len(list((out / "labelsTr").iterdir())) == 1


def test_masks_of_a_missing_in_phase_hold_for_the_out_phase_in_the_order_of_names(tmp_path):
    write_mr(tmp_path / "s", 1, backwards=True)
    without(path("t1", "DICOM_anon/InPhase"))(tmp_path / "s")
    said = prepare_chaos(tmp_path / "s", tmp_path / "out", ["t1in", "t1out"])
    assert "| mr01 | - | yes |" in said
    check_same(tmp_path / "out/labelsTr/mr01_t1out.nii.gz", organs(1))


def test_greys_within_an_organs_range_are_that_organ_and_a_few_strays_are_background(tmp_path, caplog):
    write_mr(tmp_path / "s", 1)
    ground = tmp_path / "s" / path("t2spir")
    for file, (low, high) in zip(sorted(ground.iterdir()), itertools.cycle([(55, 240), (70, 255)])):
        grey = imread(file)
        grey[grey == 63], grey[grey == 252] = low, high
        imsave(file, grey, check_contrast=False)
    grey = imread(ground / f"{FILE}1.png")
    grey[0, :5] = 20
    imsave(ground / f"{FILE}1.png", grey, check_contrast=False)
    prepare_chaos(tmp_path / "s", tmp_path / "out")
    check_same(tmp_path / "out/labelsTr/mr01_t2spir.nii.gz", organs(1))
    assert "5 voxel(s) of grey values that are no organ's become background" in caplog.text


def test_words_and_folders_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    source, out = write_mr(tmp_path / "s", 1), tmp_path / "out"
    for options, message in (
        ({"modality": "t1"}, "modality must be one of .'t2spir', 't1in', 't1out', 'ct', 'all'., got 't1'"),
        ({"organs": ["kidney"]}, "an organ must be one of .*'right_kidney'.*, got 'kidney'"),
        ({"modality": ["t2spir", "ct"], "organs": ["spleen"]}, "an organ of CT must be one of .'liver',., got 'spleen'"),
        ({"phases": "both"}, "phases must be one of"),
        ({"phases": "channels"}, "--modality t1in t1out; got t2spir"),
        ({"modality": "ct"}, "holds 3 series of other modalities"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_chaos(source, out, **options)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing holds no folder DICOM_anon of a patient; give the folder that CHAOS_Train"):
        prepare_chaos(tmp_path / "nothing", out)
    with pytest.raises(InputError, match="lie in one another"):
        prepare_chaos(source, source / "out")
    shutil.copytree(source, tmp_path / "both/first")
    shutil.copytree(source, tmp_path / "both/second")
    with pytest.raises(InputError, match="are both of mr01 t1in; give one copy"):
        prepare_chaos(tmp_path / "both", out)
    assert not (out / "imagesTr").exists()


def test_patients_of_the_real_data_set_come_back_voxel_by_voxel(tmp_path):
    data = real_data("CHAOS_T2")
    for number, backwards in (("01", False), ("13", True)):
        image, label = (nib.load(data / f"{folder}/chaos_{number}.nii.gz") for folder in ("imagesTr", "labelsTr"))
        image = nib.Nifti1Image(np.round(image.get_fdata()).astype(np.int16), image.affine)
        place = tmp_path / f"s/Train_Sets/MR/{int(number)}/T2SPIR"
        names = write_slices(place / "DICOM_anon", image, Numbered("IMG-0004-{:05d}"), backwards)
        write_masks(place / "Ground", GREYS[np.asarray(label.dataobj).astype(int)], names)
    said = prepare_chaos(tmp_path / "s", tmp_path / "out")
    assert "2 cases of 2 patients" in said and "0 left out" in said
    for number in ("01", "13"):
        for folder in ("imagesTr", "labelsTr"):
            expected = nib.load(data / f"{folder}/chaos_{number}.nii.gz")
            expected = nib.Nifti1Image(np.round(expected.get_fdata()).astype(np.int16), expected.affine)
            check_same(tmp_path / f"out/{folder}/mr{number}_t2spir.nii.gz", expected)


def test_masks_of_a_real_ct_are_its_livers_and_in_reverse_are_refused(tmp_path):
    data = real_data("abdomen_ct_dicom")
    (address,) = dicom_scans(data).values()
    files, image = [plane.file for plane in series_planes(address)], read_scan(address)
    label = reoriented(nib.load(data / "totalseg_labels.nii.gz"), image)
    liver = np.asarray(label.dataobj) == 5
    for patient, masks in ((1, liver), (2, liver[..., ::-1])):
        place = tmp_path / f"s/CT/{patient}"
        (place / "DICOM_anon").mkdir(parents=True)
        for k, file in enumerate(files):
            shutil.copy(file, place / f"DICOM_anon/i{k:04d},0000b.dcm")
        write_masks(place / "Ground", masks, [f"liver_GT_{k:03d}" for k in range(len(files))])
    said = prepare_chaos(tmp_path / "s/CT", tmp_path / "out", "ct")
    assert "| ct01 | yes |" in said and "| ct02 | - |" in said, said
    check_same(tmp_path / "out/labelsTr/ct01.nii.gz", nib.Nifti1Image(liver.astype(np.uint8), image.affine))
