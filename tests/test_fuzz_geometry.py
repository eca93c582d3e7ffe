"""A minute of chance; an hour of it is ``python -m tools.fuzz_geometry --minutes 60``."""

import json

import nibabel as nib
import numpy as np
import pytest

from tools import fuzz_geometry
from tools.fuzz_geometry import fuzz


def test_no_random_header_gives_a_wrong_geometry_or_ends_a_command(capfd):
    outcomes, finds = fuzz(minutes=3, seed=20_000, rounds=20)
    assert not finds, json.dumps(finds, indent=1)
    assert outcomes["rounds"] == 20 and sum(n for name, n in outcomes.items() if "done" in name or "written" in name) > 20


@pytest.mark.parametrize("fault", ["affine", "shape", "place"])
def test_a_wrong_geometry_would_be_found(fault, monkeypatch):
    save = nib.save

    def wrong(image, path):
        if ".partial-" in str(path) and "_seg" in str(path):
            voxels, affine = np.asarray(image.dataobj), image.affine.copy()
            affine[0, 3] += fault == "affine"
            voxels = voxels[1:] if fault == "shape" else voxels[::-1] if fault == "place" else voxels
            image = nib.Nifti1Image(voxels, affine)
        save(image, path)

    monkeypatch.setattr("monai_morse.data.files.nib.save", wrong)
    monkeypatch.setattr(fuzz_geometry, "ROUNDS", (fuzz_geometry.try_inference,))
    monkeypatch.setattr(fuzz_geometry, "CLASSES", {"hippocampus_mri_morse": 3})
    assert fuzz(minutes=2, seed=20_000, rounds=3)[1]
