"""The demo on a tiny data set, start to end, and its parts."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import write_msd

from monai_morse import InputError
from monai_morse.data import msd_cases
from monai_morse.demo import format_table, plan, run_demo


def test_demo_ends_with_a_table_and_a_picture_also_for_uncompressed_scans(msd, tmp_path, capsys):
    listing = json.loads((msd / "dataset.json").read_text())
    for case in listing["training"]:
        image = nib.load(msd / case["image"])
        case["image"] = case["image"].removesuffix(".gz")
        nib.save(image, msd / case["image"])
    (msd / "dataset.json").write_text(json.dumps(listing))
    run_demo(tmp_path / "out", msd, epochs=1)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith(("| baseline", "| MORSE"))]
    classes = ["anterior", "posterior", "all"]
    assert rows == [[f"| {system}", name] for system in ("baseline", "MORSE") for name in classes]
    assert (tmp_path / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_follows_the_axes_after_turning_to_ras(tmp_path):
    sagittal = np.array([[0, 0, 1, 0], [5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1.0]])  # axes A, S, R
    cases = msd_cases(write_msd(tmp_path / "data", shape=(20, 40, 30), affine=sagittal), "all")
    spacing, patch = plan(cases)
    assert spacing == [1.0, 5.0, 2.0] and patch == [32, 32, 48]


def test_plan_coarsens_large_scans_and_never_makes_a_patch_too_small_for_the_network(tmp_path):
    cases = msd_cases(write_msd(tmp_path / "data", cases=1, shape=(160, 120, 16)), "all")
    spacing, patch = plan(cases)
    assert 160 * 120 * 16 / np.prod(spacing) <= 250_000 and patch[2] == 32


def test_table_tells_how_many_cases_a_mean_is_of(tmp_path):
    (tmp_path / "m.csv").write_text(
        "case,class,dice,jaccard,hd95_mm,asd_mm,seconds\na,liver,0.5,0.4,2,1,3\nb,liver,0,0,,,5\na,spleen,1,1,0,0,3\nb,spleen,1,1,0,0,5\n"
    )
    lines = format_table({"MORSE": tmp_path / "m.csv"}).splitlines()[2:]
    assert lines[0] == "| MORSE | liver | 0.2500 | 0.2000 | 2.00 (1 of 2) | 1.00 (1 of 2) | 4.00 |"
    assert lines[2].startswith("| MORSE | all | 0.6250 | ")


def test_broken_data_is_an_error_before_anything_runs(msd, tmp_path):
    with pytest.raises(InputError, match="no dataset folder at .*nowhere.* with --dataset_dir .*: --data, or make demo DATA="):
        run_demo(tmp_path / "out", tmp_path / "nowhere")
    (msd / "imagesTr/case_1.nii.gz").unlink()
    with pytest.raises(InputError, match="case_1.nii.gz: the file does not exist"):
        run_demo(tmp_path / "out", msd)
    assert not (tmp_path / "out" / "runs").exists()
