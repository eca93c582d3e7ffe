"""Data lists, folds by patient, and every kind of broken file."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from monai_morse import InputError
from monai_morse.data import check_writable, msd_cases, msd_class_names, raise_if_left_out, scans_in, usable_cases
from monai_morse.data.checks import find_problem


def listing(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folds_cover_every_case_once_and_never_share_one(msd):
    held_back = []
    for fold in range(3):
        train, val = (msd_cases(msd, s, fold, num_folds=3) for s in ("train", "val"))
        assert len(train) == 4 and len(val) == 2
        assert not {c["image"] for c in train} & {c["image"] for c in val}
        held_back += [c["image"] for c in val]
    assert sorted(held_back) == sorted(c["image"] for c in msd_cases(msd, "all"))
    assert msd_cases(msd, "val", num_folds=3) == msd_cases(msd, "val", num_folds=3)


@pytest.mark.parametrize("key", ["patient", "label"])
def test_no_patient_is_on_both_sides(msd, key):
    entries = []
    for p in range(6):
        for phase in ("pre", "arterial", "venous"):
            entry = {"image": f"./imagesTr/p{p}_{phase}.nii.gz", "label": f"./labelsTr/p{p}.nii.gz"}
            entries.append(entry if key == "label" else {**entry, "label": f"./{phase}{p}", "patient": f"p{p}"})
    listing(msd, training=entries)
    for fold in range(3):
        train, val = ({c["image"].split("/")[-1].split("_")[0] for c in msd_cases(msd, s, fold, 3)} for s in ("train", "val"))
        assert len(train) == 4 and len(val) == 2 and not train & val


def test_class_names_come_from_the_listing(msd):
    assert msd_class_names(msd) == ["anterior", "posterior"]
    for labels in ({"0": "background", "2": "x"}, {"a": "b", "c": "d"}, ["background", "x"]):
        listing(msd, labels=labels)
        with pytest.raises(InputError, match="numbered 0"):
            msd_class_names(msd)


def test_class_names_must_be_as_many_as_the_listing_has_and_other_ones_are_logged(msd, caplog):
    msd_cases(msd, class_names=["Anterior", "posterior"])
    assert not caplog.records
    msd_cases(msd, class_names=["posterior", "anterior"])
    assert "they are named ['posterior', 'anterior'] here" in caplog.text
    for names in (["one"], ["a", "b", "c"], "ab"):
        with pytest.raises(InputError, match="class_names must be a list of 2 names.*anterior"):
            msd_cases(msd, class_names=names)


def test_missing_folder_and_broken_listings(msd, tmp_path):
    with pytest.raises(InputError, match="no dataset folder at .*nowhere.*--dataset_dir"):
        msd_cases(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="dataset.json does not exist.*MSD layout"):
        msd_cases(tmp_path / "empty")
    listing(msd, training=[{"image": "a"}])
    with pytest.raises(InputError, match="needs an image and a label"):
        msd_cases(msd)
    listing(msd, training=[])
    with pytest.raises(InputError, match="no training cases"):
        msd_cases(msd)
    for content, message in (
        ("{broken", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"training": 3}', "must be an object"),
    ):
        (msd / "dataset.json").write_text(content)
        with pytest.raises(InputError, match=message):
            msd_cases(msd)


@pytest.mark.parametrize("options", [{"fold": 5}, {"fold": -1}, {"num_folds": 7}, {"split": "tset"}])
def test_bad_folds(msd, options):
    with pytest.raises(InputError):
        msd_cases(msd, **options)


def save(path, array, affine=None, dtype=np.float32):
    nib.save(nib.Nifti1Image(array.astype(dtype), np.eye(4) if affine is None else affine), path)


def break_missing(image, label):
    image.unlink()


def break_truncated(image, label):
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])


def break_not_nifti(image, label):
    image.write_bytes(gzip.compress(b"hello"))


def break_nan(image, label):
    save(image, np.full((20, 24, 18), np.nan))


def break_4d(image, label):
    save(image, np.zeros((20, 24, 18, 2)))


def break_colour(image, label):
    colour = np.zeros((20, 24, 18), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), image)


def break_shape(image, label):
    save(label, np.zeros((20, 24, 17)))


def break_affine(image, label):
    save(label, np.zeros((20, 24, 18)), np.diag([-1, 1, 1, 1]))


def break_label_value(image, label):
    save(label, np.full((20, 24, 18), 3))


def break_label_fraction(image, label):
    save(label, np.full((20, 24, 18), 0.5))


def break_label_missing(image, label):
    label.unlink()


BREAKAGES = {
    break_missing: "imagesTr/case_2.nii.gz: the file does not exist; restore",
    break_truncated: "imagesTr/case_2.nii.gz: cannot be read, truncated",
    break_not_nifti: "imagesTr/case_2.nii.gz: cannot be read",
    break_nan: "imagesTr/case_2.nii.gz: 8640 voxels are NaN",
    break_4d: "imagesTr/case_2.nii.gz: expected a 3D image.*\\(20, 24, 18, 2\\)",
    break_colour: "imagesTr/case_2.nii.gz: voxels of type .* are no intensities",
    break_shape: "labelsTr/case_2.nii.gz: shape .*17.* differs.*resample",
    break_affine: "labelsTr/case_2.nii.gz: its affine .* mm away",
    break_label_value: "labelsTr/case_2.nii.gz: labels \\[3.0\\] are outside 0 to 2.*--class_names",
    break_label_fraction: "labelsTr/case_2.nii.gz: labels \\[0.5\\]",
    break_label_missing: "labelsTr/case_2.nii.gz: the file does not exist",
}


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda b: b.__name__)
def test_one_broken_file_is_named_with_its_remedy(msd, breakage, caplog):
    breakage(msd / "imagesTr/case_2.nii.gz", msd / "labelsTr/case_2.nii.gz")
    cases = msd_cases(msd, "all")
    with pytest.raises(InputError, match="1 of 6 cases cannot be used:\n.*" + BREAKAGES[breakage]):
        usable_cases(cases, num_classes=3)
    used = [case for case in cases if find_problem(case, 3) is None]
    assert len(used) == 5
    with pytest.raises(InputError, match="1 case.* refused or failed.*case_2"):
        raise_if_left_out(cases, used)


def test_no_case_is_an_error():
    with pytest.raises(InputError, match="the list of cases is empty"):
        usable_cases([], 3)


def test_cases_of_another_kind_are_named_too(msd):
    case = msd_cases(msd, "all")[0]
    for odd in ({"label": case["label"]}, {"image": [case["image"]] * 2, "label": case["label"]}):
        with pytest.raises(InputError, match="(?s)1 of 2 cases.*case_0.*one readable file a case"):
            usable_cases([case, odd], 3)


def test_good_cases_pass_and_float_labels_are_fine(msd):
    save(msd / "labelsTr/case_0.nii.gz", np.ones((20, 24, 18)))
    cases = msd_cases(msd, "all")
    assert usable_cases(cases, 3) == cases
    raise_if_left_out(cases, cases)


def test_channels_are_the_fourth_axis(msd):
    save(msd / "imagesTr/case_0.nii.gz", np.random.default_rng(0).normal(size=(20, 24, 18, 2)))
    case = [c for c in msd_cases(msd, "all") if "case_0" in c["image"]]
    assert usable_cases(case, 3, in_channels=2) == case


def test_scans_in_a_file_a_folder_or_its_images_ts(msd):
    assert len(scans_in(msd / "imagesTr")) == 6
    assert len(scans_in(msd / "imagesTr/case_0.nii.gz")) == 1
    (msd / "imagesTr").rename(msd / "imagesTs")
    assert len(scans_in(msd)) == 6
    shutil.copy(msd / "imagesTs/case_0.nii.gz", msd / "own.nii.gz")
    assert [c["image"] for c in scans_in(msd)] == [str(msd / "own.nii.gz")]
    (msd / "own.nii").write_bytes(b"")
    with pytest.raises(InputError, match="two scans named own"):
        scans_in(msd)
    with pytest.raises(InputError, match="no NIfTI files"):
        scans_in(msd / "nowhere")


def test_folders_are_made_and_tried_before_work_starts(tmp_path):
    check_writable(tmp_path / "a" / "b", tmp_path)
    assert list((tmp_path / "a" / "b").iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="cannot write to .*file.*--output_dir"):
        check_writable(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


def test_real_cases_are_all_usable(task04):
    cases = msd_cases(task04, "all")
    assert len(cases) == 200 and usable_cases(cases, 3) == cases
