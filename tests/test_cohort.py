"""Whatever one scan does while a cohort runs, the others are done and it is named; what is no scan's fault ends the run."""

import csv
import logging

import nibabel as nib
import numpy as np
import pytest

from monai_morse.data import ToScanGridd, scans
from monai_morse.errors import InputError
from tools.fuzz_geometry import Bright, evaluate, infer, write_listing, write_scan

NAMES = ("a", "b_bad", "c", "d_bad", "e")
BUNDLE = "hippocampus_mri_morse"


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        write_scan(tmp_path / "data" / "images" / f"{name}.nii.gz")
        write_scan(tmp_path / "data" / "labels" / f"{name}.nii.gz", label=True)
    write_listing(tmp_path / "data", 3, [f"{n}.nii.gz" for n in NAMES])
    return tmp_path


def in_reading(monkeypatch, folder, error):
    read = scans.ScanReader.get_data

    def broken(self, paths):
        if "bad" in str(paths):
            raise error
        return read(self, paths)

    monkeypatch.setattr(scans.ScanReader, "get_data", broken)


def in_the_network(monkeypatch, folder, error):
    calls = []

    def broken(self, x, *args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 4):
            raise error
        return forward(self, x)

    forward = Bright.forward
    monkeypatch.setattr(Bright, "forward", broken)


def in_postprocessing(monkeypatch, folder, error):
    call = ToScanGridd.__call__

    def broken(self, data):
        if "bad" in str(data["pred"].meta["filename_or_obj"]):
            raise error
        return call(self, data)

    monkeypatch.setattr(ToScanGridd, "__call__", broken)


def in_writing(monkeypatch, folder, error):
    for name in NAMES:
        if "bad" in name:  # where the file would be
            (folder / "out" / f"{name}_seg.nii.gz").mkdir(parents=True)


def by_vanishing(monkeypatch, folder, error):
    read = scans._read_nifti

    def once(path, limits):
        image = read(path, limits)
        if "bad" in path.name:
            path.unlink()
        return image

    monkeypatch.setattr(scans, "_read_nifti", once)


FAULTS = {
    "read": (in_reading, RuntimeError("no such tape"), "RuntimeError: no such tape"),
    "refused": (in_reading, InputError("x.nii.gz: moved"), "x.nii.gz: moved"),
    "memory": (in_the_network, MemoryError("2 TB"), "MemoryError: 2 TB"),
    "network": (in_the_network, ValueError("size 0"), "ValueError: size 0"),
    "postprocessing": (in_postprocessing, KeyError("pred"), "KeyError: 'pred'"),
    "writing": (in_writing, None, "IsADirectoryError"),
    "gone": (by_vanishing, None, "the file does not exist"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_scan_that_fails_at_run_time_is_named_and_the_others_are_done(name, folder, monkeypatch, caplog):
    fault, error, reason = FAULTS[name]
    fault(monkeypatch, folder, error)
    with pytest.raises(InputError, match="2 case.s. skipped, the others are done.*b_bad.nii.gz.*d_bad.nii.gz") as caught:
        infer(BUNDLE, folder / "data" / "images", folder / "out", patch_size=[32, 32, 32])
    assert "images/a.nii.gz" not in str(caught.value)
    done = sorted(p.name for p in (folder / "out").glob("*.nii.gz") if p.is_file())
    assert done == ["a_seg.nii.gz", "c_seg.nii.gz", "e_seg.nii.gz"]
    told = [r.getMessage() for r in caplog.records if r.name == "monai_morse.cohort"]
    assert len(told) == 2 and all(reason in line and "_bad.nii.gz" in line for line in told), told
    for path in done:
        assert np.asarray(nib.load(folder / "out" / path).dataobj).any()


def test_an_evaluation_scores_all_others_as_if_the_failing_case_was_not_there(folder, monkeypatch, caplog):
    in_postprocessing(monkeypatch, folder, RuntimeError("here"))
    with pytest.raises(InputError, match="2 case.s. skipped"):
        evaluate(BUNDLE, folder / "data", folder / "out")
    write_listing(folder / "data", 3, [f"{n}.nii.gz" for n in NAMES if "bad" not in n])
    evaluate(BUNDLE, folder / "data", folder / "clean")
    rows = []
    for out in ("out", "clean"):
        with open(folder / out / "metrics.csv") as file:
            rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and [r["case"] for r in rows[0]] == ["a", "a", "c", "c", "e", "e"]


def test_all_scans_may_fail(folder, monkeypatch):
    monkeypatch.setattr(Bright, "forward", lambda self, x: 1 / 0)
    with pytest.raises(InputError, match="5 case.s. skipped"):
        infer(BUNDLE, folder / "data" / "images", folder / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_a_stop(error, folder, monkeypatch):
    in_the_network(monkeypatch, folder, error())
    with pytest.raises(error):
        infer(BUNDLE, folder / "data" / "images", folder / "out", patch_size=[32, 32, 32])
    assert [p.name for p in (folder / "out").glob("*.nii.gz")] == ["a_seg.nii.gz"]


def test_weights_that_are_missing_end_the_run_with_their_name_alone(folder, caplog):
    with pytest.raises(InputError, match="nowhere.pt"):
        infer(BUNDLE, folder / "data" / "images", folder / "out", weights=str(folder / "nowhere.pt"))
    assert not [r for r in caplog.records if r.name == "monai_morse.cohort" and r.levelno >= logging.WARNING]
