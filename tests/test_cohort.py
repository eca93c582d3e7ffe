"""Whatever one scan does while a cohort runs, the others are done and it is named; what is no scan's fault ends the run."""

import csv
import errno
import logging
import os
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from monai.bundle import ConfigParser
from warm import TORCHRUN, WARM, bundle_run, run_module

import monai_morse.cohort
from monai_morse.data import ToScanGridd, files, scans, scans_in
from monai_morse.errors import InputError, ending
from monai_morse.fingerprint import fingerprint
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
    with pytest.raises(
        InputError, match="2 case.s. refused or failed, the others are done.*b_bad.nii.gz.*d_bad.nii.gz"
    ) as caught:
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
    with pytest.raises(InputError, match="2 case.s. refused or failed"):
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
    with pytest.raises(InputError, match="5 case.s. refused or failed"):
        infer(BUNDLE, folder / "data" / "images", folder / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_a_stop(error, folder, monkeypatch):
    in_the_network(monkeypatch, folder, error())
    with pytest.raises(error):
        infer(BUNDLE, folder / "data" / "images", folder / "out", patch_size=[32, 32, 32])
    assert [p.name for p in (folder / "out").glob("*.nii.gz")] == ["a_seg.nii.gz"]


def at_the_third_map(monkeypatch, do):
    save, calls = nib.save, []

    def third(image, path):
        calls.append(path)
        if len(calls) == 3:
            do()
        save(image, path)

    monkeypatch.setattr(nib, "save", third)
    return calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more_ends_the_run_and_what_is_done_is_kept(number, cohort, monkeypatch):
    def full():
        raise OSError(number, os.strerror(number))

    calls = at_the_third_map(monkeypatch, full)
    with pytest.raises(Exception) as caught:
        infer(BUNDLE, cohort.folder, cohort.out, patch_size=[16, 16, 16])
    assert ending(caught.value).startswith(f"error: {os.strerror(number)}") and "scans that are done are kept" in ending(
        caught.value
    )
    assert len(calls) == 3 and states(cohort.out) == {"a": "done", "b": "done", "c": "refused"}
    cohort()
    assert list(states(cohort.out).values()) == ["skipped", "skipped", "refused", "done", "done"]


def test_a_table_that_is_removed_ends_the_run(cohort, monkeypatch):
    calls = at_the_third_map(monkeypatch, lambda: shutil.rmtree(cohort.out))
    with pytest.raises(
        InputError, match="cohort.csv was removed while it was written, with label maps perhaps; start it again"
    ):
        infer(BUNDLE, cohort.folder, cohort.out, patch_size=[16, 16, 16])
    assert len(calls) == 3


def test_a_map_that_is_removed_while_others_are_done_is_not_told_as_done(cohort, monkeypatch):
    at_the_third_map(monkeypatch, (cohort.out / "a_seg.nii.gz").unlink)
    with pytest.raises(InputError, match=r"2 case\(s\) refused or failed.*/a.nii.gz, .*/c.nii.gz"):
        infer(BUNDLE, cohort.folder, cohort.out, patch_size=[16, 16, 16])
    assert "its files were removed" in table(cohort.out)["a"]["reason"]


def test_an_evaluation_whose_table_is_removed_ends(folder, monkeypatch):
    at_the_third_map(monkeypatch, (folder / "out" / "metrics.csv").unlink)
    with pytest.raises(
        InputError, match="metrics.csv was removed while the evaluation ran, with predictions perhaps; start it"
    ):
        evaluate(BUNDLE, folder / "data", folder / "out")


def test_a_second_inference_into_a_folder_is_refused_until_the_first_ends(cohort, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    cohort.out.mkdir()
    with FileLock(cohort.out / ".inference.lock"):
        with pytest.raises(
            InputError, match="another inference is writing to .*out; wait for it or stop it, or give .* --output_dir"
        ):
            infer(BUNDLE, cohort.folder, cohort.out, patch_size=[16, 16, 16])
        assert not times(cohort.out)
    cohort()


def test_weights_that_are_missing_end_the_run_with_their_name_alone(folder, caplog):
    with pytest.raises(InputError, match="nowhere.pt"):
        infer(BUNDLE, folder / "data" / "images", folder / "out", weights=str(folder / "nowhere.pt"))
    assert not [r for r in caplog.records if r.name == "monai_morse.cohort" and r.levelno >= logging.WARNING]


# --- the table, and starting again


def table(folder):
    with open(folder / "cohort.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def states(folder):
    return {name: row["status"] for name, row in table(folder).items()}


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.nii.gz")}


@pytest.fixture
def cohort(tmp_path):
    """Five scans, one of them unusable; segment() does them into ``out``, by the words given."""
    for name in "abde":
        write_scan(tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"no scan")

    def segment(**words):
        with pytest.raises(InputError, match=r"1 case\(s\) refused or failed.*c.nii.gz"):
            infer(BUNDLE, tmp_path / "in", tmp_path / "out", **{"patch_size": [16, 16, 16], **words})

    segment.folder, segment.out = tmp_path / "in", tmp_path / "out"
    return segment


def test_the_table_tells_of_each_scan(cohort, caplog):
    caplog.set_level(logging.INFO, "monai_morse.cohort")
    cohort(save_uncertainty=True)
    rows = table(cohort.out)
    assert list(rows) == list("abcde") and list(states(cohort.out).values()) == ["done", "done", "refused", "done", "done"]
    assert [row["scan"] for row in rows.values()] == [str(cohort.folder / f"{n}.nii.gz") for n in rows]
    assert "cannot be read" in rows["c"]["reason"] and not rows["c"]["files"]
    assert all(float(rows[n]["seconds"]) > 0 and int(rows[n]["voxels"]) == 20 * 24 * 18 for n in "abde")
    assert rows["a"]["files"].split(" / ") == ["a_seg.nii.gz", "a_uncertainty.nii.gz"]
    told = caplog.records[-1].getMessage()
    assert "5 scans: 4 done, 1 refused; the table is" in told and "c  refused" in told and "e  done" in told


def test_a_scan_is_checked_when_its_turn_comes(cohort, monkeypatch):
    check, found = monai_morse.cohort.find_problem, []

    def seen(case, **words):
        found.append((case["name"], sorted(times(cohort.out)), len(table(cohort.out)) if found else 0))
        return check(case, **words)

    monkeypatch.setattr(monai_morse.cohort, "find_problem", seen)
    cohort()
    assert [name for name, *_ in found] == list("abcde")
    assert found[2][1:] == (["a_seg.nii.gz", "b_seg.nii.gz"], 2) and len(found[4][1]) == 3 and found[4][2] == 4


def killed(folder, out):
    """In a process of its own: segment scans, and be killed at the third."""
    forward, calls = Bright.forward, []

    def deadly(self, x, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, x)

    Bright.forward = deadly
    infer(BUNDLE, folder, out, patch_size=[32, 32, 32])


def test_a_killed_cohort_goes_on_where_it_was(cohort, caplog):
    caplog.set_level(logging.INFO, "monai_morse.cohort")
    process = WARM.Process(target=killed, args=(cohort.folder, cohort.out))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    before = times(cohort.out)
    assert sorted(before) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    assert states(cohort.out) == {"a": "done", "b": "done", "c": "refused"}
    cohort(patch_size=[32, 32, 32])
    assert "2 of 5 scans are done already" in caplog.text
    after = times(cohort.out)
    assert {n: after[n] for n in before} == before and len(after) == 4
    assert states(cohort.out) == {"a": "skipped", "b": "skipped", "c": "refused", "d": "done", "e": "done"}
    assert float(table(cohort.out)["a"]["seconds"]) > 0


# what changed since a scan was done: (how, the names that are done again)
AGAIN = {
    "nothing": (lambda c: {}, ""),
    "windows at a time": (lambda c: {"sw_batch_size": 2}, ""),
    "yes as a word": (lambda c: {"overwrite": "True"}, "abde"),
    "a map is gone": (lambda c: (c.out / "b_seg.nii.gz").unlink(), "b"),
    "a scan is another": (lambda c: write_scan(c.folder / "d.nii.gz", values=lambda v: 2 * v), "d"),
    "the table is gone": (lambda c: (c.out / "cohort.csv").unlink(), "abde"),
}


@pytest.mark.parametrize("row", AGAIN)
def test_what_is_whole_and_made_alike_is_not_done_again(row, cohort):
    cohort()
    before = times(cohort.out)
    change, again = AGAIN[row]
    found = change(cohort)
    cohort(**(found if isinstance(found, dict) else {}))
    assert "".join(n[0] for n, at in sorted(times(cohort.out).items()) if at != before[n]) == again
    assert len(times(cohort.out)) == 4


def other_weights(cohort):
    torch.save(Bright(3, 0.5).state_dict(), cohort.out / "other.pt")
    return {"weights": str(cohort.out / "other.pt")}


# what must not be taken for done: (words, what is said)
OTHERS = {
    "weights": (other_weights, "a_seg.nii.gz is made with other weights"),
    "a word": (lambda c: {"render_scale": 2}, "is made with other settings"),
    "windows": (lambda c: {"patch_size": [24, 24, 24]}, "is made with other settings"),
    "spacing": (lambda c: {"spacing": [1.0, 1.0, 2.0]}, "is made with other settings"),
    "another output": (lambda c: {"save_uncertainty": "true"}, "is made with other settings"),
    "a transform": (lambda c: {"preprocessing#transforms#3#nonzero": True}, "is made with other settings"),
    "weights and a word": (lambda c: other_weights(c) | {"overlap": 0.25}, "made with other weights and settings"),
}


@pytest.mark.parametrize("row", OTHERS)
def test_maps_of_other_weights_or_settings_are_neither_taken_nor_lost_without_a_word(row, cohort):
    cohort()
    before = times(cohort.out)
    words, message = OTHERS[row]
    words = {"patch_size": [16, 16, 16], **words(cohort)}
    with pytest.raises(InputError, match=f"4 of 5 scans have label maps of another run: .*{message}.*--overwrite true"):
        infer(BUNDLE, cohort.folder, cohort.out, **words)
    assert times(cohort.out) == before
    cohort(**words, overwrite=True)
    assert not set(times(cohort.out).values()) & set(before.values())


def test_a_scan_of_the_same_name_elsewhere_is_another(cohort):
    cohort()
    write_scan(cohort.folder.parent / "other" / "a.nii.gz")
    with pytest.raises(InputError, match="a_seg.nii.gz is of .*in/a.nii.gz"):
        infer(BUNDLE, cohort.folder.parent / "other", cohort.out, patch_size=[16, 16, 16])
    os.rename(cohort.folder.parent / "other" / "a.nii.gz", cohort.folder.parent / "other" / "f.nii.gz")
    infer(BUNDLE, cohort.folder.parent / "other", cohort.out, patch_size=[16, 16, 16])
    assert list(states(cohort.out)) == [*"abcdef"]  # the folder's table keeps the others


def test_a_table_that_is_none_is_named(cohort):
    for content in (b"name,age\na,7\n", b"\xff\xfe\x00"):
        cohort.out.mkdir(exist_ok=True)
        (cohort.out / "cohort.csv").write_bytes(content)
        with pytest.raises(InputError, match="cohort.csv (is no table of a cohort|cannot be read)"):
            infer(BUNDLE, cohort.folder, cohort.out)


def test_label_maps_are_no_scans_of_the_next_run(cohort):
    with pytest.raises(InputError, match="holds the scans; give another --output_dir"):
        infer(BUNDLE, cohort.folder, cohort.folder)
    write_scan(cohort.folder / "p0" / "out" / "a_seg.nii.gz")
    (cohort.folder / "p0" / "t1.nii.gz").write_bytes((cohort.folder / "a.nii.gz").read_bytes())
    for scan in cohort.folder.glob("*.nii.gz"):
        scan.unlink()
    assert [c["name"] for c in scans_in(cohort.folder, cohort.folder / "p0" / "out")] == ["t1"]
    assert [c["name"] for c in scans_in(cohort.folder)] == ["a_seg", "t1"]


def test_two_processes_share_a_cohort_and_one_goes_on_with_it(cohort):
    cohort.out.mkdir()
    torch.save(Bright(3).state_dict(), cohort.out / "weights.pt")
    parser = ConfigParser()
    folder = ROOT / "bundles" / BUNDLE
    parser.read_config([str(folder / "configs" / f"{n}.yaml") for n in ("inference", "multi_gpu_inference")])
    network = {"_target_": "tools.fuzz_geometry.Bright", "num_classes": 3, "level": 0.0}
    words = {
        "bundle_root": str(folder),
        "dataset_dir": str(cohort.folder),
        "output_dir": str(cohort.out),
        "amp": False,
        "label_maps": True,
    }
    parser.update({**words, "network_def": network, "weights": str(cohort.out / "weights.pt"), "patch_size": [16, 16, 16]})
    parser["initialize"] = [step for step in parser["initialize"] if "check_window" not in step]
    path = cohort.out / "both.json"
    ConfigParser.export_config_file(parser.config, str(path))
    words = bundle_run(path, meta_file=folder / "configs/metadata.json", logging_file=folder / "configs/logging.conf")
    done = run_module(*TORCHRUN, *words, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "1 case(s) refused or failed, the others are done" in told, told[-4000:]
    assert "5 scans: 4 done, 1 refused" in told
    assert list(states(cohort.out).values()) == ["done", "done", "refused", "done", "done"]  # in the scans' order
    assert sorted(p.name for p in cohort.out.glob("cohort*")) == ["cohort.csv"]

    before = times(cohort.out)
    rows = (cohort.out / "cohort.csv").read_text().splitlines(keepends=True)
    (cohort.out / "cohort.csv").write_text("".join(rows[:3]))  # as if killed: each has its own rows
    (cohort.out / "cohort.1.csv").write_text("".join([rows[0], *rows[4:]]))
    cohort()
    assert times(cohort.out) == before
    assert [*states(cohort.out).values()].count("skipped") == 4
    assert sorted(p.name for p in cohort.out.glob("cohort*")) == ["cohort.csv"]


def resident():
    """Megabytes that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="/proc tells the memory")
def test_memory_stays_flat_over_500_scans(tmp_path, monkeypatch):
    one = write_scan(tmp_path / "one.nii.gz", shape=(28, 28, 28))  # 0.3 MB of logits: kept, they would be 100 MB
    (tmp_path / "in").mkdir()
    for i in range(500):
        os.link(one, tmp_path / "in" / f"s{i:03d}.nii.gz")
    sizes, refuse = [], monai_morse.cohort._Table.refuse

    def measured(self, case):
        sizes.append(resident())
        return refuse(self, case)

    monkeypatch.setattr(monai_morse.cohort._Table, "refuse", measured)
    infer(BUNDLE, tmp_path / "in", tmp_path / "out", patch_size=[28, 28, 28])
    assert len(sizes) == 500 == len(table(tmp_path / "out"))
    assert max(sizes[400:]) - max(sizes[100:200]) < 30, sizes[::50]


def test_a_fingerprint_is_of_what_is_set_not_of_weights_or_places():
    def made(width=4, out="a", func=np.mean):
        return [torch.nn.Conv3d(1, width, 1), {"output_dir": out, "x": np.array([1.0])}, func]

    assert fingerprint(*made()) == fingerprint(*made(out="b"))
    assert len({fingerprint(*made(**w)) for w in ({}, {"width": 5}, {"func": np.sum})}) == 3
