"""``prepare mpmri``: patients, phases and masks as groups lay them out, to one MSD folder; what is left out is said."""

import csv
import itertools
import json
import re
import shutil
from functools import partial

import nibabel as nib
import numpy as np
import pytest
from conftest import real_data, write_dicom
from monai.transforms import LoadImaged

from monai_morse.__main__ import main
from monai_morse.data import dicom_scans, msd_cases, read_scan, usable_cases
from monai_morse.data.dicom import reoriented
from monai_morse.errors import InputError
from monai_morse.prepare import msd, phantom_mpmri, prepare_mpmri, stand_ins, write_phantom

PHASES = ("pre", "arterial", "venous")
OBLIQUE = np.array([[0.99, -0.14, 0, -30], [0.14, 0.99, 0, 12], [0, 0, 3, 7], [0, 0, 0, 1]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * [-1.2, -1.2, 3.0]


def scan(patient, phase, affine=OBLIQUE):
    rng = np.random.default_rng([patient, PHASES.index(phase)])
    return nib.Nifti1Image(rng.integers(0, 900, (8, 9, 5)).astype(np.int16), affine)


def mask(patient, affine=OBLIQUE, value=1):
    liver = np.zeros((8, 9, 5), np.uint8)
    liver[1:4, 2 : 4 + patient, 1:4] = value
    return nib.Nifti1Image(liver, affine)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def write(source, scans, masks, patients=("p1", "p2"), words=PHASES):
    """Files named by patterns; one without an extension is a DICOM folder."""
    for i, patient in enumerate(patients, start=1):
        for phase, word in zip(PHASES, words):
            path = source / scans.format(patient=patient, phase=word)
            if ".nii" in path.name:
                save(scan(i, phase), path)
            else:
                write_dicom(path, scan(i, phase), description=word, number=PHASES.index(phase) + 1, name=f"{word}{{:03d}}")
            save(mask(i), source / masks.format(patient=patient, phase=word))
    return source


def listing(out):
    return json.loads((out / "dataset.json").read_text())


LAYOUTS = {
    "a folder a patient": ("{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz", PHASES),
    "other words, other cases": ("{patient}/{phase}.nii.gz", "{patient}/Liver.nii.gz", ("Native", "ART", "PV")),
    "flat": ("{patient}_{phase}.nii", "{patient}_label.nii.gz", PHASES),
    "patients with underscores": ("case_{patient}_{phase}.nii", "case_{patient}_seg.nii", ("nc", "art", "portal")),
    "MSD folders": ("imagesTr/{patient}_{phase}.nii.gz", "labelsTr/{patient}.nii.gz", PHASES),
    "MSD folders, a mask a scan": ("imagesTr/{patient}_{phase}.nii.gz", "labelsTr/{patient}_{phase}.nii.gz", PHASES),
    "a folder a phase": ("{phase}/{patient}.nii.gz", "masks/{patient}.nii.gz", ("pre-contrast", "arterial", "portal venous")),
    "a folder a phase, a mask a scan": ("{phase}/{patient}.nii.gz", "masks/{phase}/{patient}.nii.gz", PHASES),
    "names of sequences": ("{patient}/t1_vibe_{phase}_tra.nii.gz", "{patient}/liver_mask.nii.gz", ("nativ", "art", "ven")),
    "sequences of the liver": ("{patient}/liver_{phase}_tra.nii.gz", "{patient}/liver.nii.gz", ("pre", "art", "pvp")),
    "patient twice": ("{patient}/{patient}_{phase}.nii.gz", "{patient}/{patient}_seg.nii.gz", PHASES),
    "a mask a scan": ("{patient}/{phase}.nii.gz", "{patient}/{phase}_mask.nii.gz", PHASES),
    "masks in a folder": ("{patient}/{phase}.nii.gz", "{patient}/labels/liver.nii.gz", PHASES),
    "DICOM": ("{patient}/{phase}", "{patient}/mask.nii.gz", ("PRE", "ART", "VEN")),
    "DICOM, a folder more": ("{patient}/study 1/t1_{phase}_5", "{patient}/mask.nii.gz", PHASES),
    "DICOM, series in one folder": ("{patient}/", "{patient}/mask.nii.gz", ("t1 pre", "t1 art", "t1 ven")),
    "DICOM, a folder below": ("{patient}/{phase}/DICOM", "{patient}/{phase}/mask.nii.gz", PHASES),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_usual_layouts_are_found(name, tmp_path):
    scans, masks, words = LAYOUTS[name]
    source = write(tmp_path / "source", scans, masks, words=words)
    said = prepare_mpmri(source, tmp_path / "out")
    assert "6 cases of 2 patients" in said and "0 left out" in said, said
    entries = listing(tmp_path / "out")["training"]
    assert sorted({e["patient"] for e in entries}) == (["case_p1", "case_p2"] if "case_" in scans else ["p1", "p2"])
    assert [e["phase"] for e in entries] == [*PHASES, *PHASES]
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 2)) == 6
    for entry, (patient, phase) in zip(entries, itertools.product((1, 2), PHASES)):
        for key, expected in (("image", scan(patient, phase)), ("label", mask(patient))):
            found = reoriented(nib.load(tmp_path / "out" / entry[key]), expected)
            assert np.allclose(found.affine, expected.affine, atol=1e-3)
            assert np.array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj)), entry[key]


def test_a_pattern_and_words_of_ones_own(tmp_path, capsys):
    source = write(tmp_path / "s", "{patient}-x/d/{phase}-b.nii.gz", "truth/{patient}.nii.gz", words=("ph1", "ph2", "ph3"))
    save(scan(1, "pre"), source / "p9-x/d/ph4-b.nii.gz")
    command = ["prepare", "mpmri", "--source", str(source), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "p1-x/d/ph1-b" in said and "--pattern" in said and "--phase_words ph1=pre" in said
    own = ["--pattern", "{patient}-x/*/{phase}-b.nii.gz", "--label_pattern", "truth/{patient}/"]
    assert main([*command, *own, "--phase_words", "ph1=pre", "ph2=arterial", "ph3=venous"]) == 0
    said = capsys.readouterr().out
    assert "| p2 | yes | yes | yes |" in said and "6 cases of 2 patients" in said
    assert "p9-x/d/ph4-b: neither a scan nor a mask by the patterns" in said
    for word in ("ph1", "ph1=", "=pre", "ph1=a/b"):
        assert main([*command, *own, "--phase_words", word]) == 1
        assert "a word of the files' names and the phase it means, del=delayed" in capsys.readouterr().err


@pytest.mark.parametrize("phases, cases, held", [("separate", 60, 12), ("channels", 20, 4)])
def test_folds_of_twenty_patients_hold_back_four_and_none_is_on_both_sides(phases, cases, held, tmp_path):
    names = [f"p{i:02d}" for i in range(20)]
    out = tmp_path / "out"
    prepare_mpmri(write(tmp_path / "s", "{patient}/{phase}.nii", "{patient}/mask.nii", names), out, phases=phases)
    patient_of = {str((out / e["image"]).resolve()): e["patient"] for e in listing(out)["training"]}
    seen = []
    for fold in range(5):
        train, val = (msd_cases(out, split, fold) for split in ("train", "val"))
        assert (len(train), len(val)) == (cases - held, held)
        sides = [{patient_of[c["image"]] for c in side} for side in (train, val)]
        assert not sides[0] & sides[1] and len(sides[1]) == 4
        seen += sides[1]
    assert sorted(seen) == names


def test_phases_as_channels_are_one_case_that_the_pipeline_reads(tmp_path):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz", ("p1", "p2", "p3"))
    (source / "p2/venous.nii.gz").unlink()
    shifted = OBLIQUE + np.eye(4)[:, 3:] @ np.eye(4)[3:]  # another corner
    shifted[0, 3] += 3
    save(scan(3, "arterial", shifted), source / "p3/arterial.nii.gz")
    said = prepare_mpmri(source, tmp_path / "out", phases="channels")
    assert "p2 pre arterial venous: no venous scan found" in said
    assert "its affine puts it up to" in said and "register the phases" in said
    content = listing(tmp_path / "out")
    assert len(content["training"]) == 1 and list(content["modality"]) == ["0", "1", "2"]
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 2, in_channels=3)) == 1
    image = LoadImaged("image", ensure_channel_first=True)({"image": tmp_path / "out/imagesTr/p1.nii.gz"})["image"]
    expected = np.stack([np.asarray(scan(1, p).dataobj) for p in PHASES])
    assert np.array_equal(image.numpy(), expected)


def test_a_mask_in_another_orientation_or_with_other_values_is_the_same_liver(tmp_path):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    turned = mask(1, value=255).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    save(turned, source / "p1/mask.nii.gz")
    organs = np.asarray(mask(2, value=5).dataobj).copy()
    organs[6, 6, 3] = 1  # a spleen
    save(nib.Nifti1Image(organs, OBLIQUE), source / "p2/mask.nii.gz")
    said = prepare_mpmri(source, tmp_path / "out")
    assert "p2/mask.nii.gz: labels [1, 5]; say which of them are liver, e.g. --label_values 1" in said
    label = nib.load(tmp_path / "out/labelsTr/p1_arterial.nii.gz")
    assert np.array_equal(label.dataobj, mask(1).dataobj) and np.allclose(label.affine, OBLIQUE, atol=1e-4)
    prepare_mpmri(source, tmp_path / "out", label_values=[5, 255])
    assert np.array_equal(nib.load(tmp_path / "out/labelsTr/p2_pre.nii.gz").dataobj, mask(2).dataobj)


@pytest.mark.parametrize("phases", ["separate", "channels"])
@pytest.mark.parametrize(
    "named",
    [
        {"in-phase": "in", "out of phase": "out"},
        {"T2": "t2", "native": "pre", "art": "arterial", "venous": "venous", "del": "delayed", "20 min": "hepatobiliary"},
        {f"ph{i}": f"dynamic{i}" for i in range(1, 12)},
        {"pre": "pre"},
    ],
    ids=["two", "six", "eleven", "one"],
)
def test_phases_of_any_names_and_number_are_prepared(named, phases, tmp_path):
    source = tmp_path / "s"
    images = {word: scan(1, "pre").get_fdata() + i for i, word in enumerate(named)}
    for patient, (word, image) in itertools.product(("p1", "p2"), images.items()):
        save(nib.Nifti1Image(image.astype(np.int16), OBLIQUE), source / patient / f"t1_{word.replace(' ', '_')}_tra.nii.gz")
        save(mask(1), source / patient / "mask.nii.gz")
    said = prepare_mpmri(source, tmp_path / "out", phases=phases, phase_words=named)
    assert "0 left out" in said and f"{2 * len(named) if phases == 'separate' else 2} cases of 2 patients" in said
    content = listing(tmp_path / "out")
    if phases == "separate":
        assert {e["phase"] for e in content["training"]} == set(named.values())
        for word, phase in named.items():
            assert np.array_equal(nib.load(tmp_path / f"out/imagesTr/p2_{phase}.nii.gz").dataobj, images[word])
        return
    order = [c.removeprefix("MRI, ") for c in content["modality"].values()]
    assert sorted(order) == sorted(named.values())
    stacked = nib.load(tmp_path / "out/imagesTr/p2.nii.gz").get_fdata().reshape(*images[word].shape, -1)
    for i, phase in enumerate(order):
        assert np.array_equal(stacked[..., i], next(images[w] for w, p in named.items() if p == phase))
    assert len(usable_cases(msd_cases(tmp_path / "out", "all"), 2, in_channels=len(named))) == 2


@pytest.mark.parametrize(
    "values", [["liver=5", "kidneys=2,3"], {"liver": 5, "kidneys": [2, 3]}, {"liver": "5", "kidneys": "2 3"}]
)
def test_several_organs_of_a_mask_are_classes_by_name(values, tmp_path):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    stored, expected = (np.asarray(mask(1, value=v).dataobj).copy() for v in (5, 1))
    for place, value, label in (((6, 6, 3), 2, 2), ((6, 7, 3), 3, 2), ((6, 8, 3), 1, 0)):
        stored[place], expected[place] = value, label
    save(nib.Nifti1Image(stored, OBLIQUE), source / "p1/mask.nii.gz")
    save(mask(2, value=3), source / "p2/mask.nii.gz")  # of whom the kidney alone was drawn
    said = prepare_mpmri(source, tmp_path / "out", label_values=values)
    assert "6 cases of 2 patients" in said
    assert listing(tmp_path / "out")["labels"] == {"0": "background", "1": "liver", "2": "kidneys"}
    assert np.array_equal(nib.load(tmp_path / "out/labelsTr/p1_pre.nii.gz").dataobj, expected)
    assert np.array_equal(nib.load(tmp_path / "out/labelsTr/p2_pre.nii.gz").dataobj, mask(2, value=2).dataobj)


def test_values_of_labels_that_cannot_be_are_refused(tmp_path, capsys):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    command = ["prepare", "mpmri", "--source", str(source), "--out", str(tmp_path / "out"), "--label_values"]
    for words, message in (
        (["5", "spleen=1"], "values of the liver, 5 6, or named ones, liver=5 spleen=1, got"),
        (["liver=five"], "values of labels are whole numbers, as in liver=5 kidneys=2,3; got"),
        (["liver=1.5"], "values of labels are whole numbers"),
        (["liver=5", "spleen=5"], "each class needs a name and values of its own, not 0"),
        (["liver=0"], "each class needs a name and values of its own, not 0"),
        (["=1"], "each class needs a name and values of its own, not 0"),
        (["liver="], "each class needs a name and values of its own, not 0"),
        (["liver=7", "spleen=8"], "no voxel of liver or spleen among its labels [1]"),
    ):
        assert main([*command, *words]) == 1, words
        assert message in capsys.readouterr().err, words


def nan(source):
    image = np.asarray(scan(1, "arterial").dataobj).astype(np.float32)
    image[2, 2, 2] = np.nan
    save(nib.Nifti1Image(image, OBLIQUE), source / "p1/arterial.nii.gz")


def moved_mask(source):
    moved = OBLIQUE.copy()
    moved[1, 3] += 2
    save(mask(1, moved), source / "p1/mask.nii.gz")


def small_mask(source):
    save(nib.Nifti1Image(np.ones((8, 9, 4), np.uint8), OBLIQUE), source / "p1/mask.nii.gz")


def empty_mask(source):
    save(mask(1, value=0), source / "p1/mask.nii.gz")


def cut(source):
    path = source / "p1/arterial.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def second_scan(source):
    shutil.copy(source / "p1/arterial.nii.gz", source / "p1/art.nii.gz")


FAULTS = {
    "a scan with NaN": (nan, 5, "p1 arterial: .*arterial.nii.gz: 1 voxels are NaN"),
    "a scan cut short": (cut, 5, "p1 arterial: .*arterial.nii.gz: cannot be read, truncated"),
    "a scan missing": (lambda s: (s / "p1/arterial.nii.gz").unlink(), 5, "p1 arterial: no arterial scan found"),
    "two scans of a phase": (second_scan, 5, "p1 arterial: 2 files for its arterial scan: p1/art, p1/arterial; give a pattern"),
    "a mask missing": (lambda s: (s / "p1/mask.nii.gz").unlink(), 3, "p1 venous: no mask found"),
    "a mask of another size": (small_mask, 3, "p1 pre: .*shape .8, 9, 4. differs from its image's .8, 9, 5.; resample"),
    "a mask elsewhere": (moved_mask, 3, "p1 pre: .*its affine puts it up to 2 mm away"),
    "a mask without liver": (empty_mask, 3, "p1 pre: .*no voxel of liver"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_used_is_said_and_the_rest_is_done(name, tmp_path):
    fault, left, message = FAULTS[name]
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    fault(source)
    said = prepare_mpmri(source, tmp_path / "out")
    assert f"{left} cases of 2 patients" in said or f"{left} cases of 1 patients" in said
    with open(tmp_path / "out" / "skipped.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 - left
    lines = [f"{r['patient']} {r['phase']}: {r['reason']}" for r in rows]
    assert any(re.match(message, line) for line in lines), lines
    files = {p.name for p in (tmp_path / "out/imagesTr").iterdir()}
    assert files == {p.name for p in (tmp_path / "out/labelsTr").iterdir()} and len(files) == left


def test_run_again_it_gives_the_same_bytes_and_forgets_what_is_gone(tmp_path):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    out = tmp_path / "out"

    def files():
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    prepare_mpmri(source, out)
    first = files()
    prepare_mpmri(source, out)
    assert files() == first
    shutil.rmtree(source / "p2")
    prepare_mpmri(source, out)
    assert len(listing(out)["training"]) == 3 and not list(out.glob("*/p2*"))


def test_killed_it_lists_nothing_and_the_next_run_is_whole(tmp_path, monkeypatch):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    calls = []

    def killed(image, path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save(image, path)

    save = msd.save
    monkeypatch.setattr(msd, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_mpmri(source, tmp_path / "out")
    with pytest.raises(InputError, match="lists no training cases"):
        msd_cases(tmp_path / "out")
    monkeypatch.undo()
    assert "6 cases" in prepare_mpmri(source, tmp_path / "out")


def test_folders_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    source = write(tmp_path / "s", "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("")
    for out, message in (
        (source, "lie in one another"),
        (source / "out", "lie in one another"),
        (tmp_path, "lie in one another"),
        (tmp_path / "other", "holds no prepared scans"),
    ):
        with pytest.raises(InputError, match=message):
            prepare_mpmri(source, out)
    with pytest.raises(InputError, match="no folder at"):
        prepare_mpmri(tmp_path / "nowhere", tmp_path / "out")
    for pattern, message in (
        ("{phase}.nii.gz", "a pattern needs .patient."),
        ("{patient}/{phase}_{stage}", "a pattern needs .patient. and may have"),
        ("{patient}/mri", "the pattern of scans needs .phase."),
    ):
        with pytest.raises(InputError, match=message):
            prepare_mpmri(source, tmp_path / "out", pattern)
    with pytest.raises(InputError, match="phases must be one of"):
        prepare_mpmri(source, tmp_path / "out", phases="all")
    assert not (tmp_path / "out" / "imagesTr").exists() and not (source / "out").exists()
    for file in source.glob("*/mask.nii.gz"):
        file.unlink()
    with pytest.raises(InputError, match="no case can be used: p1: pre: no mask found"):
        prepare_mpmri(source, tmp_path / "out")


def test_real_scans_nifti_and_dicom_with_masks_of_many_organs(tmp_path):
    mr, ct = real_data("abdomen_mr"), real_data("abdomen_ct_dicom")
    for phase in PHASES:  # one scan stands for three: what counts is that real files go through
        (tmp_path / "s/mr").mkdir(parents=True, exist_ok=True)
        shutil.copy(mr / "image.nii.gz", tmp_path / f"s/mr/{phase}.nii.gz")
    shutil.copytree(ct / "series", tmp_path / "s/ct/venous")
    shutil.copy(mr / "totalseg_labels.nii.gz", tmp_path / "s/mr/labels.nii.gz")
    shutil.copy(ct / "totalseg_labels.nii.gz", tmp_path / "s/ct/labels.nii.gz")
    said = prepare_mpmri(tmp_path / "s", tmp_path / "out", label_values=[5])
    assert "4 cases of 2 patients" in said and "ct pre: no pre scan found" in said
    cases = msd_cases(tmp_path / "out", "all")
    assert len(usable_cases(cases, 2)) == 4
    for case, source in ((cases[0], ct), (cases[1], mr)):
        liver = np.asarray(nib.load(case["label"]).dataobj)
        expected = np.asarray(nib.load(source / "totalseg_labels.nii.gz").dataobj) == 5
        assert liver.sum() == expected.sum()
    image, label = (nib.load(cases[0][k]) for k in ("image", "label"))
    assert np.array_equal(image.dataobj, read_scan(next(iter(dicom_scans(ct).values()))).dataobj)
    inside = np.asarray(image.dataobj)[np.asarray(label.dataobj) == 1]
    assert 60 < inside.mean() < 120  # Hounsfield units of a liver: the mask, stored in LAS, lies on it


def test_the_phantom_has_its_liver_alone_and_is_written_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(stand_ins, "write_phantom", partial(write_phantom, spacing=(10.0, 10.0, 10.0)))
    folder = phantom_mpmri(tmp_path / "data" / "phantom", patients=2)
    assert "synthetic" in caplog.text
    assert len(usable_cases(msd_cases(folder, "all", class_names=["liver"]), 2)) == 6
    monkeypatch.setattr(stand_ins, "write_phantom", None)
    assert phantom_mpmri(folder, patients=2) == folder
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["phantom"]


def test_of_two_processes_that_write_the_phantom_the_first_ones_stays(tmp_path, monkeypatch):
    out = tmp_path / "phantom"

    def slower(folder, patients):
        write(folder, "{patient}/{phase}.nii.gz", "{patient}/mask.nii.gz")
        out.mkdir()
        (out / "dataset.json").write_text("the other one's")
        return folder

    monkeypatch.setattr(stand_ins, "write_phantom", slower)
    assert phantom_mpmri(out) == str(out)
    assert (out / "dataset.json").read_text() == "the other one's" and list(tmp_path.iterdir()) == [out]
