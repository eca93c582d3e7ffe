"""The phantom: repeatable, as large as life, different patients, contrast that changes by phase."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest

from monai_morse import InputError
from monai_morse.data import msd_cases
from monai_morse.prepare.phantom import CLASSES, PHASES, Patient, write_phantom

COARSE = (7.0, 7.0, 9.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "a", patients=3, spacing=COARSE)


def digest(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_byte_identical_on_rerun_and_different_with_another_seed(phantom, tmp_path):
    again = digest(write_phantom(tmp_path / "b", patients=3, spacing=COARSE))
    assert again == digest(phantom)
    write_phantom(phantom, patients=3, spacing=COARSE)  # over itself
    assert again == digest(phantom)
    other = digest(write_phantom(tmp_path / "c", patients=3, spacing=COARSE, seed=1))
    assert all(other[p] != h for p, h in again.items() if p.suffix == ".gz")


def test_a_smaller_phantom_replaces_a_larger_one_and_nothing_else(tmp_path):
    write_phantom(tmp_path, patients=2, spacing=(30.0, 30.0, 30.0))
    (tmp_path / "notes.txt").write_text("mine")
    write_phantom(tmp_path, patients=1, spacing=(30.0, 30.0, 30.0))
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_killed_phantom_lists_no_case_and_is_no_obstacle(tmp_path, monkeypatch):
    def kill(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Patient, "render", kill)
        write_phantom(tmp_path, patients=1, spacing=(30.0, 30.0, 30.0))
    with pytest.raises(InputError, match="lists no training cases"):
        msd_cases(tmp_path)
    write_phantom(tmp_path, patients=1, spacing=(30.0, 30.0, 30.0))
    assert len(msd_cases(tmp_path, "all")) == 3


def test_layout_is_msd_with_three_phases_on_one_oblique_anisotropic_grid(phantom):
    content = json.loads((phantom / "dataset.json").read_text())
    assert len(content["training"]) == 9
    assert [e["phase"] for e in content["training"][:3]] == list(PHASES)
    assert list(content["labels"].values()) == ["background", *CLASSES]
    for entry in content["training"]:
        image, label = (nib.load(phantom / entry[k]) for k in ("image", "label"))
        assert image.shape == label.shape and np.allclose(image.affine, label.affine)
        assert np.allclose(image.header.get_zooms(), COARSE, atol=1e-4)
        off_axis = np.abs(image.affine[:3, :3] / COARSE - np.eye(3))
        assert off_axis.max() > 0.01  # oblique
        assert image.get_fdata().min() >= 0


def test_patients_differ_and_have_every_organ_at_a_plausible_size(phantom):
    volumes = []
    for path in sorted((phantom / "labelsTr").iterdir()):
        label = nib.load(path)
        counts = np.bincount(np.asarray(label.dataobj).ravel(), minlength=6)[1:]
        volumes.append(counts * np.prod(COARSE) / 1000)  # ml
    volumes = np.array(volumes)
    low, high = np.array([700, 60, 120, 30, 100]), np.array([2600, 600, 800, 200, 600])
    assert ((volumes > low) & (volumes < high)).all(), volumes
    assert (volumes.std(0) / volumes.mean(0) > 0.01).all()


def test_contrast_follows_the_phases():
    patient = Patient(7)
    shape, affine = patient.grid(COARSE)
    images, label = patient.render(shape, affine)
    mean = {name: [np.median(images[k][label == i]) for k in range(3)] for i, name in enumerate(CLASSES, 1)}
    assert mean["aorta"][1] > 2 * mean["aorta"][0] and mean["aorta"][1] > mean["aorta"][2]  # arterial peak
    assert mean["liver"][2] > mean["liver"][1] > 0.9 * mean["liver"][0]  # the liver fills in the venous phase
    enhancement = {
        name: values[1] / values[0] for name, values in mean.items()
    }  # the bias field, the same in all phases, is out
    assert enhancement["spleen"] > 1.2 * enhancement["liver"]


def test_partial_volume_blurs_what_labels_keep_sharp():
    patient = Patient(3)
    shape, affine = patient.grid((8.0, 8.0, 8.0))
    one, label = patient.render(shape, affine, samples=(1, 1, 1))
    many, same = patient.render(shape, affine, samples=(3, 3, 3))
    assert np.array_equal(label, same)
    assert 0.05 < (np.abs(one - many) > 1e-6).mean() < 0.6  # only where tissues meet


def test_truth_below_the_voxel_agrees_with_the_grid():
    patient = Patient(4)
    shape, affine = patient.grid(COARSE)
    _, label = patient.render(shape, affine, samples=(1, 1, 1))
    index = np.argwhere(label > 0)[::97]
    assert np.array_equal(patient.labels(index @ affine[:3, :3].T + affine[:3, 3]), label[tuple(index.T)])


def test_nothing_else_is_overwritten(tmp_path):
    for name, content in (("thesis.tex", "x"), ("dataset.json", '{"name": "ACR phantom QA"}')):
        folder = tmp_path / name[:3]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="holds no phantom"):
            write_phantom(folder)
        assert (folder / name).read_text() == content
    with pytest.raises(InputError, match="is a file"):
        write_phantom(folder / name)
    with pytest.raises(InputError, match="patients >= 1"):
        write_phantom(tmp_path / "new", patients=0)


def test_the_liver_is_on_the_patients_right_and_the_spleen_on_the_left(phantom):
    for path in (phantom / "labelsTr").iterdir():
        label = nib.load(path)
        voxels = np.asarray(label.dataobj)
        places = [nib.affines.apply_affine(label.affine, np.argwhere(voxels == k)).mean(0) for k in (1, 2)]
        assert places[0][0] > 20 and places[1][0] < -20  # mm; x grows to the right in NIfTI's world
