"""Synapse: the CT phantom, and preparation from BTCV's layout and from what TransUNet's authors made of it."""

import json
import re
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import SHARED_DATA

from monai_morse import InputError
from monai_morse.__main__ import main
from monai_morse.data import msd_cases
from monai_morse.prepare import prepare_synapse, synapse_phantom, write_ct_phantom
from monai_morse.prepare.phantom_ct import CTPatient
from monai_morse.prepare.synapse import ORGANS, TEST, TRAIN

h5py = pytest.importorskip("h5py", reason="pip install monai_morse[synapse]")

# written out by hand: BTCV's label of each of the 8 organs in TransUNet's order
BTCV_LABEL = {"aorta": 8, "gallbladder": 4, "left_kidney": 3, "right_kidney": 2}
BTCV_LABEL |= {"liver": 6, "pancreas": 11, "spleen": 1, "stomach": 7}
EIGHT = np.zeros(14, int)
EIGHT[list(BTCV_LABEL.values())] = range(1, 9)
SPACING = (8.0, 8.0, 8.0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """BTCV's layout: RawData/Training/{img,label}, 4 patients."""
    return write_ct_phantom(tmp_path_factory.mktemp("raw") / "RawData", patients=4, spacing=SPACING)


def load(path):
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def canonical(path):
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def raw_case(raw, number):
    return [load(raw / f"Training/{kind}/{kind}{number:04d}.nii.gz") for kind in ("img", "label")]


def numbers_in(raw):
    return [int(path.name[3:7]) for path in sorted(raw.glob("Training/img/*"))]


def test_the_split_is_the_published_one():
    path = SHARED_DATA / "synapse_split"
    if not path.is_dir():
        pytest.skip(f"lists needed: no synapse_split at {path} (set MORSE_DATA to the folder that holds it)")
    for name, numbers in (("train_vol.txt", TRAIN), ("test_vol.txt", TEST)):
        listed = [int(line.removeprefix("case")) for line in (path / name).read_text().split()]
        assert sorted(listed) == sorted(numbers)
    assert len(TRAIN) == 18 and len(TEST) == 12 and not {*TRAIN} & {*TEST}


def test_phantom_has_all_organs_on_their_sides_in_hu(raw):
    (hu, affine), (label, _) = raw_case(raw, 5)
    assert nib.aff2axcodes(affine) == ("L", "A", "S") and hu.dtype == np.int16 and hu.min() <= -1000
    where = {n: affine[:3, :3] @ np.argwhere(label == k).mean(0) + affine[:3, 3] for n, k in BTCV_LABEL.items()}
    assert where["liver"][0] > 20 > -20 > where["spleen"][0]  # +x is the patient's right
    assert where["right_kidney"][0] > 40 and where["left_kidney"][0] < -40
    assert where["aorta"][1] < where["stomach"][1] - 30 and where["liver"][2] > where["right_kidney"][2] + 20
    median = {n: np.median(hu[label == k]) for n, k in BTCV_LABEL.items()}
    assert median["gallbladder"] < 40 < median["pancreas"] < median["liver"] < median["right_kidney"]


def test_phantom_organs_have_plausible_sizes():
    for seed in (1, 5):
        label = CTPatient(seed).scan((5.0, 5.0, 5.0), samples=(1, 1, 1))[1]
        ml = {n: (label == k).sum() * 0.125 for n, k in BTCV_LABEL.items()}
        low = dict(zip(ORGANS, (40, 8, 80, 80, 900, 30, 50, 80)))
        assert all(low[n] < ml[n] < 8 * low[n] for n in ORGANS), ml


def test_the_same_arguments_give_the_same_scans(raw, tmp_path):
    write_ct_phantom(tmp_path / "again", patients=3, spacing=SPACING)
    for path in sorted((tmp_path / "again").rglob("*.nii.gz")):
        assert path.read_bytes() == (raw / path.relative_to(tmp_path / "again")).read_bytes()
    with pytest.raises(InputError, match="not empty"):
        write_ct_phantom(tmp_path / "again", patients=3, spacing=SPACING)


def test_btcv_becomes_msd_with_eight_organs_a_clipped_window_and_the_split(raw, tmp_path, capsys):
    assert main(["prepare", "synapse", "--source", str(raw), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "train: 3 of 18 cases; missing: case0009" in told and "test: 1 of 12" in told
    listing = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [listing["labels"][str(i + 1)] for i in range(8)] == list(BTCV_LABEL)
    assert [(e["patient"], e["split"]) for e in listing["training"]] == [
        ("case0001", "test"),
        ("case0005", "train"),
        ("case0006", "train"),
        ("case0007", "train"),
    ]
    for number in (1, 5, 6, 7):
        (hu, affine), (label, _) = raw_case(raw, number)
        for folder, expected in (("imagesTr", np.clip(hu, -125, 275)), ("labelsTr", EIGHT[label])):
            found, where = load(tmp_path / f"out/{folder}/case{number:04d}.nii.gz")
            assert np.array_equal(found, expected) and np.allclose(where, affine)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    prepare_synapse(raw / "Training", tmp_path / "out")  # again, from one folder further down
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_btcv_in_the_folders_of_monais_tutorials_is_the_same(raw, tmp_path):
    for kind, folder in (("img", "imagesTr"), ("label", "labelsTr")):
        (tmp_path / "BTCV" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "BTCV" / folder).symlink_to(raw / "Training" / kind)
    assert (
        prepare_synapse(tmp_path / "BTCV", tmp_path / "out").splitlines()[1:]
        == prepare_synapse(raw, tmp_path / "b").splitlines()[1:]
    )


def test_cases_follow_the_listings_split(raw, tmp_path):
    prepare_synapse(raw, tmp_path)
    names = {s: [c["image"][-15:-7] for c in msd_cases(tmp_path, s)] for s in ("train", "test", "all")}
    assert names["train"] == ["case0005", "case0006", "case0007"] and names["test"] == ["case0001"]
    assert sorted(names["all"]) == sorted(names["train"] + names["test"])
    with pytest.raises(InputError, match="split must be one of .*'test', 'train'.*'val'"):
        msd_cases(tmp_path, "val")


def spoil_truncated(folder):
    path = folder / "label/label0006.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    return "label0006.nii.gz: cannot be read"


def spoil_label(folder):
    (folder / "label/label0006.nii.gz").unlink()
    return "img0006.nii.gz has no label"


def spoil_grid(folder):
    voxels, affine = load(folder / "label/label0006.nii.gz")
    affine[:3, 3] += 30
    nib.save(nib.Nifti1Image(voxels, affine), folder / "label/label0006.nii.gz")
    return "label0006.nii.gz: its affine puts it"


def spoil_units(folder, units):
    voxels, affine = load(folder / "img/img0006.nii.gz")
    nib.save(nib.Nifti1Image(units(voxels.astype(np.float32)), affine), folder / "img/img0006.nii.gz")
    return "no CT in HU: "


NO_HU = {
    "moved by 1024": lambda hu: hu + 1024,
    "moved by -1024": lambda hu: hu - 1024,
    "0 to 1000": lambda hu: (hu.clip(-1000, 1000) + 1000) / 2,
    "the window in 8 bits": lambda hu: (hu.clip(-125, 275) + 125) / 400 * 255,
    "the window as 0 to 1": lambda hu: (hu.clip(-125, 275) + 125) / 400,
    "inverted": lambda hu: -hu,
    "ten times": lambda hu: hu * 10,
    "standardised": lambda hu: (hu - hu.mean()) / hu.std(),
}


@pytest.mark.parametrize("spoil", [spoil_truncated, spoil_label, spoil_grid, *NO_HU])
def test_one_broken_case_is_told_and_the_others_are_written(spoil, raw, tmp_path):
    for path in raw.glob("Training/*/*"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    reason = spoil_units(tmp_path, NO_HU[spoil]) if spoil in NO_HU else spoil(tmp_path)
    report = prepare_synapse(tmp_path, tmp_path / "out")
    assert "skipped 1:\n  case0006: " in report and reason in report
    assert len(msd_cases(tmp_path / "out", "all")) == 3
    if spoil in NO_HU:  # with the numbers
        assert re.search("medians aorta [-0-9.e+]+ .10 to 500 expected.*liver", report), report


def test_a_ct_without_contrast_or_already_clipped_is_one(raw, tmp_path):
    for path in raw.glob("Training/*/*"):
        voxels, affine = load(path)
        if path.parent.name == "img":
            voxels = np.where(voxels > 40, 40 + (voxels - 40) // 5, voxels).clip(-125, 275)
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / path.parent.name / path.name)
    assert "skipped" not in prepare_synapse(tmp_path, tmp_path / "out")


def test_what_cannot_be_prepared_is_said(raw, tmp_path, capsys):
    assert main(["prepare", "synapse", "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "found neither img/ and label/" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds no prepared Synapse data"):
        prepare_synapse(raw, tmp_path)
    for kind in ("img", "label"):  # the test case alone
        (tmp_path / kind).mkdir()
        name = f"{kind}0001.nii.gz"
        (tmp_path / kind / name).write_bytes((raw / "Training" / kind / name).read_bytes())
    with pytest.raises(InputError, match="no usable case to train on"):
        prepare_synapse(tmp_path, tmp_path / "out")


# a copy's label of each of BTCV's 14, and its axes (D, H, W): how an (X, Y, Z) = (L, A, S) array becomes one
KEPT_ORDER = np.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0])
COPIES = {
    "TransUNet's labels, slices (X, Y)": (EIGHT, lambda a: a.transpose(2, 0, 1)),
    "8 in BTCV's order, slices (Y, X)": (KEPT_ORDER, lambda a: a.transpose(2, 1, 0)),
    "BTCV's 13, turned and upside down": (np.arange(14), lambda a: a[::-1, :, ::-1].transpose(2, 1, 0)),
}


def write_copy(raw, folder, table, turn):
    for name in ("train_npz", "test_vol_h5"):
        (folder / name).mkdir(parents=True)
    for number in numbers_in(raw):
        (hu, _), (label, _) = raw_case(raw, number)
        image = turn((np.clip(hu, -125, 275) + 125).astype(np.float32) / 400)
        label = turn(table[label]).astype(np.float32)
        if number in TEST:
            with h5py.File(folder / f"test_vol_h5/case{number:04d}.npy.h5", "w") as file:
                file["image"], file["label"] = image, label
        else:
            for i, pair in enumerate(zip(image, label)):
                np.savez(folder / f"train_npz/case{number:04d}_slice{i:03d}.npz", image=pair[0], label=pair[1])


@pytest.mark.parametrize("copy", COPIES)
def test_any_copy_of_the_slices_gives_what_btcv_gives(copy, raw, tmp_path):
    write_copy(raw, tmp_path / "Synapse", *COPIES[copy])
    report = prepare_synapse(tmp_path, tmp_path / "out")
    assert "does not tell the spacing, 1 mm" in report and "train: 3 of 18" in report
    prepare_synapse(raw, tmp_path / "raw")
    for a, b in zip(msd_cases(tmp_path / "out", "all"), msd_cases(tmp_path / "raw", "all"), strict=True):
        assert np.array_equal(canonical(a["label"]), canonical(b["label"]))
        assert np.array_equal(canonical(a["image"]), canonical(b["image"]))
        assert np.allclose(nib.load(a["image"]).header.get_zooms(), 1)


def test_real_organs_tell_labels_and_axes(real_btcv, tmp_path):
    prepare_synapse(real_btcv, tmp_path / "raw")
    cases = msd_cases(tmp_path / "raw", "test")
    hu, label = (canonical(cases[0][k]) for k in ("image", "label"))
    assert hu.min() == -125 and hu.max() == 275 and set(np.unique(label)) == set(range(9))
    for i, (table, turn) in enumerate(COPIES.values()):
        write_copy(real_btcv, tmp_path / str(i), table, lambda a, turn=turn: turn(a[::-1]))  # it is stored R-A-S
        prepare_synapse(tmp_path / str(i), tmp_path / f"out{i}")
        for split in ("train", "test"):
            found = msd_cases(tmp_path / f"out{i}", split)[0]
            assert np.array_equal(canonical(found["label"]), label) and np.array_equal(canonical(found["image"]), hu)


def test_a_missing_slice_and_a_broken_volume_are_told(raw, tmp_path):
    write_copy(raw, tmp_path, *COPIES["TransUNet's labels, slices (X, Y)"])
    (tmp_path / "train_npz/case0006_slice003.npz").unlink()
    (tmp_path / "test_vol_h5/case0002.npy.h5").write_bytes(b"no")
    report = prepare_synapse(tmp_path, tmp_path / "out")
    assert "skipped 2:" in report and "slices [3] are missing" in report and "case0002: OSError" in report


def test_without_h5py_one_is_told_what_to_install(raw, tmp_path, monkeypatch):
    write_copy(raw, tmp_path, *COPIES["TransUNet's labels, slices (X, Y)"])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="needs h5py: pip install monai_morse.synapse."):
        prepare_synapse(tmp_path, tmp_path / "out")


def test_the_default_data_are_a_phantom_written_once_and_said_to_be_one(tmp_path, caplog):
    folder = synapse_phantom(tmp_path / "data/phantom", spacing=(12.0, 12.0, 12.0))
    assert "taking synthetic scans, a phantom" in caplog.text
    assert [len(msd_cases(folder, s)) for s in ("train", "test")] == [3, 2]
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data/phantom"]
    before = (tmp_path / "data/phantom/dataset.json").stat().st_mtime_ns
    synapse_phantom(folder)
    assert (tmp_path / "data/phantom/dataset.json").stat().st_mtime_ns == before
    for kind in ("img", "label"):
        (tmp_path / kind).mkdir()
    with pytest.raises(InputError, match="holds no prepared Synapse data"):  # never mixed up with patients' data
        prepare_synapse(tmp_path, folder)
