"""A case is its file, not its file's name: names of their own, used by all that write, and no case twice."""

import csv
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_morse.data import case_names, check_split, msd_cases, scans_in
from monai_morse.errors import InputError
from monai_morse.experiments.runs import read_runs, write_run
from tools.fuzz_geometry import TINY, evaluate, infer, write_listing, write_scan

BUNDLE = "hippocampus_mri_morse"
SERIES = "d/p1/art/1.2.3/p1_art.dicom"

# what it is: (paths, names)
NAMES = {
    "nothing": ([], []),
    "one": (["d/p0/t1.nii.gz"], ["t1"]),
    "names that differ stay as they are": (
        ["d/p0/t1.nii.gz", "e/p1/t2.nii", "a.b.NII.GZ", SERIES],
        ["t1", "t2", "a.b", "p1_art"],
    ),
    "a folder a patient": (["d/p0/t1.nii.gz", "d/p1/t1.nii.gz"], ["p0_t1", "p1_t1"]),
    "folders within": (["d/p0/anat/t1.nii.gz", "d/p1/anat/t1.nii.gz"], ["p0_t1", "p1_t1"]),
    "two that are alike": (["d/p0/t1.nii.gz", "d/p1/t1.nii.gz", "d/p1/t2.nii.gz"], ["p0_t1", "p1_t1", "p1_t2"]),
    "patient and visit": (["p0/v1/t1.nii", "p0/v2/t1.nii", "p1/v1/t1.nii"], ["p0_v1_t1", "p0_v2_t1", "p1_v1_t1"]),
    "one in the folder above": (["d/t1.nii.gz", "d/p0/t1.nii.gz"], ["t1", "p0_t1"]),
    "other letters, other suffixes": (["d/p0/t1.NII.gz", "d/p1/t1.nii"], ["p0_t1", "p1_t1"]),
    "dots and blanks": (["d/p.0/t 1.nii.gz", "d/p 1/t 1.nii.gz"], ["p.0_t 1", "p 1_t 1"]),
}
# names that folders alone do not tell apart: each gets its own
ODD = {
    "underscores": ["d/a_b/t1.nii", "d/a/b_t1.nii", "d/e/b_t1.nii", "d/e/t1.nii"],
    "folders swapped": ["a/b/t1.nii", "b/a/t1.nii"],
    "as if it were another's": ["d/p0/t1.nii", "d/p1/t1.nii", "d/p0_t1.nii"],
}
REFUSED = {
    "twice": (["d/t1.nii", "d/t1.nii"], "d/t1.nii is listed twice; list"),
    "spelled with a dot": (["d/t1.nii", "./d/t1.nii"], r"\./d/t1.nii is listed twice, once as d/t1.nii"),
    "spelled with two": (["d/t1.nii", "d/e/../t1.nii"], "listed twice"),
    "absolute": (["d/t1.nii", os.path.abspath("d/t1.nii")], "listed twice"),
    "two files of one": (["d/t1.nii", "d/t1.nii.gz"], "two scans named t1: d/t1.nii and d/t1.nii.gz"),
    "file and series": ([SERIES, "d/p1_art.nii.gz"], "two scans named p1_art"),
    "one series, two names": ([SERIES, "d/p1/art/1.2.3/art.dicom"], "art.dicom is listed twice"),
}


@pytest.mark.parametrize("row", NAMES)
def test_a_name_is_the_files_or_that_and_the_folders_that_differ(row):
    paths, names = NAMES[row]
    assert case_names(paths) == names
    assert case_names([os.path.abspath(p) for p in paths]) == names


@pytest.mark.parametrize("row", ODD)
def test_every_case_has_a_name_of_its_own_whatever_the_order(row):
    names = dict(zip(ODD[row], case_names(ODD[row])))
    assert len(set(names.values())) == len(names)
    backwards = ODD[row][::-1]
    assert dict(zip(backwards, case_names(backwards))) == names


@pytest.mark.parametrize("row", REFUSED)
def test_a_case_that_is_there_twice_is_refused_by_name(row):
    paths, message = REFUSED[row]
    with pytest.raises(InputError, match=message):
        case_names(paths)


# --- data sets


@pytest.fixture
def folder(tmp_path):
    """Four patients, each with a scan of the same name."""
    for p in range(4):
        write_scan(tmp_path / f"data/images/p{p}/t1.nii.gz", values=lambda v, p=p: v * (p + 1))
        write_scan(tmp_path / f"data/labels/p{p}/t1.nii.gz", label=True)
    write_listing(tmp_path / "data", 3, [f"p{p}/t1.nii.gz" for p in range(4)])
    return tmp_path


def test_a_case_has_one_name_in_every_split(folder):
    names = {c["image"]: c["name"] for c in msd_cases(folder / "data", "all")}
    assert list(names.values()) == ["p0_t1", "p1_t1", "p2_t1", "p3_t1"]
    for split in ("train", "val"):
        assert all(names[c["image"]] == c["name"] for c in msd_cases(folder / "data", split, num_folds=4))


SPELLINGS = {
    "the same": "p1/t1.nii.gz",
    "with a dot": "./p1/t1.nii.gz",
    "by another folder": "p2/../p1/t1.nii.gz",
    "by a link to the folder": "link/t1.nii.gz",
    "by a link to the file": "p1/link.nii.gz",
}


@pytest.mark.parametrize("row", SPELLINGS)
@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_an_image_that_a_data_set_lists_twice_is_refused(row, split, folder):
    for kind in ("images", "labels"):
        (folder / "data" / kind / "link").symlink_to("p1")
        (folder / "data" / kind / "p1" / "link.nii.gz").symlink_to("t1.nii.gz")
    write_listing(folder / "data", 3, [*(f"p{p}/t1.nii.gz" for p in range(4)), SPELLINGS[row]])
    with pytest.raises(InputError, match="dataset.json: .*listed twice"):
        msd_cases(folder / "data", split, num_folds=4)


def test_phases_of_one_label_stay_together_however_it_is_spelled(folder):
    cases = []
    for p in range(4):
        for phase, label in (("t1", f"labels/p{p}/t1.nii.gz"), ("t2", f"./labels/p{p}/../p{p}/t1.nii.gz")):
            cases.append({"image": f"images/p{p}/{phase}.nii.gz", "label": label})
    write_listing(folder / "data", 3, [])
    listing = (folder / "data/dataset.json").read_text().replace("[]", str(cases).replace("'", '"'))
    (folder / "data/dataset.json").write_text(listing)
    for fold in range(4):
        sides = [{c["name"][:2] for c in msd_cases(folder / "data", s, fold, 4)} for s in ("train", "val")]
        assert [len(s) for s in sides] == [3, 1] and not sides[0] & sides[1]


def test_lists_from_elsewhere_have_no_image_on_both_sides(tmp_path):
    with pytest.raises(InputError, match=r"1 image\(s\) to train and to validate on at once, such as \./a.nii"):
        check_split([{"image": "a.nii"}, {"image": "b.nii"}], [{"image": "./a.nii"}])


# --- what is written


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


CASES = [f"p{p}_t1" for p in range(4)]


def test_an_evaluation_writes_a_map_a_picture_and_rows_a_case(folder):
    network = {**TINY, "backbone": {**TINY["backbone"], "spatial_dims": 3}}  # pictures show what a Morse saw
    net = ConfigParser({"net": network}).get_parsed_content("net")
    torch.save(net.state_dict(), folder / "tiny.pt")
    words = {
        "network_def": network,
        "weights": str(folder / "tiny.pt"),
        "save_pictures": "true",
        "save_boundary_errors": "true",
    }
    evaluate(BUNDLE, folder / "data", folder / "out", patch_size=[16, 16, 16], **words)
    assert sorted(p.name for p in (folder / "out/predictions").iterdir()) == [f"{n}.nii.gz" for n in CASES]
    assert sorted(p.name for p in (folder / "out/pictures").iterdir()) == [f"{n}.png" for n in CASES]
    assert [r["case"] for r in rows_of(folder / "out/metrics.csv")] == [n for n in CASES for _ in range(2)]
    assert {r["case"] for r in rows_of(folder / "out/boundary.csv")} == set(CASES)


def test_a_list_without_names_gets_them(folder):
    cases = [{k: c[k] for k in ("image", "label")} for c in msd_cases(folder / "data", "all")]
    words = {"validate#dataset#data": cases, "patch_size": [16, 16, 16]}
    evaluate(BUNDLE, folder / "data", folder / "out", **words)
    assert sorted(p.name for p in (folder / "out/predictions").iterdir()) == [f"{n}.nii.gz" for n in CASES]
    assert [r["case"] for r in rows_of(folder / "out/metrics.csv")] == [n for n in CASES for _ in range(2)]
    with pytest.raises(InputError, match="images/p0/t1.nii.gz is listed twice"):
        evaluate(BUNDLE, folder / "data", folder / "out", **{**words, "validate#dataset#data": [*cases, cases[0]]})


def test_inference_names_maps_by_what_differs_in_a_folder_of_folders(folder):
    infer(BUNDLE, folder / "data/images", folder / "out", patch_size=[16, 16, 16], save_uncertainty="true")
    expected = {f"p{p}_t1_{kind}.nii.gz" for p in range(4) for kind in ("seg", "uncertainty")}
    assert {p.name for p in (folder / "out").glob("*.nii.gz")} == expected


def test_a_case_keeps_its_dots_and_letters(tmp_path):
    write_scan(tmp_path / "in" / "a.b.nii.gz")
    os.rename(write_scan(tmp_path / "in" / "C.d.nii.gz"), tmp_path / "in" / "C.d.NII.GZ")
    os.rename(write_scan(tmp_path / "in" / "e.nii"), tmp_path / "in" / "e.Nii")
    infer(BUNDLE, tmp_path / "in", tmp_path / "out", patch_size=[16, 16, 16])
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {f"{n}_seg.nii.gz" for n in ("a.b", "C.d", "e")}
    for name in ("a.b", "C.d", "e"):
        assert np.asarray(nib.load(tmp_path / "out" / f"{name}_seg.nii.gz").dataobj).any()


def test_what_a_folder_holds_and_is_not_read_is_named(folder, caplog):
    scans = folder / "data/images"
    shutil.copy(scans / "p0/t1.nii.gz", scans / "own.nii.gz")
    (scans / "scan.nrrd").write_bytes(b"NRRD")
    (scans / "p0/notes.txt").write_text("no scan")
    (scans / ".hidden.nii.gz").write_bytes(b"")
    assert [c["name"] for c in scans_in(scans)] == ["own"]
    lines = [r.getMessage() for r in caplog.records]
    assert any("not read: 4 NIfTI file(s) in subfolders: p0/t1.nii.gz, p1/t1.nii.gz" in line for line in lines), lines
    assert any("not read: 2 file(s) that are no NIfTI: p0/notes.txt, scan.nrrd" in line for line in lines), lines
    caplog.clear()
    scans_in(scans / "p1")
    assert not caplog.records


def test_a_data_sets_labels_are_no_scans(folder):
    assert len(scans_in(folder / "data/images")) == 4
    with pytest.raises(InputError, match="no NIfTI files"):
        scans_in(folder / "data")


# --- what is read


def test_a_report_refuses_rows_of_one_name(tmp_path):
    columns = ("case", "class", "paper_dice", "paper_jaccard", "paper_hd95", "paper_asd")
    for name, cases in (("good", ("p0_t1", "p1_t1")), ("bad", ("t1", "t1"))):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        write_run(run, {"bundle": "toy", "settings": {"experts": "none", "renderer": "none"}, "status": "done"})
        rows = [columns, *((c, k, 0.5, 0.5, 1, 1) for c in cases for k in ("liver", "spleen"))]
        (run / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    assert len(read_runs(tmp_path / "good")[0][0].values) == 4
    with pytest.raises(InputError, match="bad/run/metrics.csv: several rows of t1, liver"):
        read_runs(tmp_path / "bad")
