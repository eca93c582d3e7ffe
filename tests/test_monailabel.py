"""The bundles with weights in MONAI Label's real server, over HTTP, on real scans: hippocampi, and livers in large scans."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import real_data
from monailabel_server import BUNDLE, ROOT, Server, make_app, make_studies

from monai_morse.data import msd_cases

pytestmark = pytest.mark.monailabel
PYTHON = os.environ.get("MONAILABEL_PYTHON", sys.executable)


def dice(a, b):
    return np.mean([2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) for k in (1, 2)])


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def monailabel():
    if subprocess.run([PYTHON, "-c", "import monailabel, monai_morse"], capture_output=True).returncode:
        pytest.skip("MONAI Label needed: MONAILABEL_PYTHON names the Python of an environment made as docs/monailabel.md says")


@pytest.fixture(scope="module")
def label_folder(monailabel, task04, tmp_path_factory):
    """App and studies: three with labels, two without, and one of the latter again with its axes turned."""
    folder = tmp_path_factory.mktemp("monailabel")
    make_app(folder, BUNDLE, PYTHON)
    cases = msd_cases(task04, "val")[:5]
    studies = make_studies(folder / "studies", cases, labelled=3)
    scan = nib.load(cases[4]["image"])
    turned = scan.as_reoriented([[2, -1], [0, -1], [1, 1]])
    assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(scan.affine)
    nib.save(turned, folder / "studies" / "turned.nii.gz")
    return folder, cases, studies


@pytest.fixture(scope="module")
def server(label_folder):
    folder, _, _ = label_folder
    with Server(folder / "monaibundle", folder / "studies", BUNDLE.name, folder / "server.log", PYTHON) as server:
        yield server


def test_the_bundle_is_listed(server):
    info = server.info()
    meta = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    model = info["models"][BUNDLE.name]
    assert model["labels"] == {"anterior": 1, "posterior": 2} and model["version"] == meta["version"]
    assert BUNDLE.name in info["trainers"] and BUNDLE.name in info["scoring"]
    assert info["datastore"] == {"total": 6, "completed": 3, "label_tags": {"final": 3}}


def test_studies_without_label_are_scored_by_networks_with_dropped_experts(server, label_folder):
    studies = label_folder[2]
    task = server.scoring()
    assert task["status"] == "DONE", task["details"]
    scores = server.scores()
    assert set(scores) == {*studies[3:], "turned"}
    assert all(0 < s < np.log(3) for s in scores.values())  # an entropy of three classes, mean over the scan
    assert scores[studies[3]] != scores[studies[4]]
    assert scores["turned"] == pytest.approx(scores[studies[4]], rel=0.4)  # the same scan, five other samples


def test_inference_answers_in_the_scans_own_geometry_as_the_bundle_does(server, label_folder, tmp_path):
    folder, cases, studies = label_folder
    assert server.infer(studies[4])["label_names"] == {"anterior": 1, "posterior": 2}
    found = {}
    for study in (studies[4], "turned"):
        scan = nib.load(folder / "studies" / f"{study}.nii.gz")
        answer = nib.load(server.label_map(study, tmp_path / f"{study}.nii.gz"))
        assert answer.shape == scan.shape and np.allclose(answer.affine, scan.affine, atol=1e-4)
        found[study] = np.asarray(nib.as_closest_canonical(answer).dataobj)
    truth = np.asarray(nib.as_closest_canonical(nib.load(cases[4]["label"])).dataobj)
    assert dice(found[studies[4]], truth) > 0.8
    assert dice(found[studies[4]], found["turned"]) > 0.99

    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", BUNDLE / "configs" / "inference.yaml"]
    command += ["--bundle_root", BUNDLE, "--dataset_dir", cases[4]["image"], "--output_dir", tmp_path / "bundle"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    own = voxels(tmp_path / "bundle" / f"{studies[4]}_seg.nii.gz")
    assert (own == voxels(tmp_path / f"{studies[4]}.nii.gz")).all()


def test_training_on_the_labelled_studies_changes_what_inference_answers(server, label_folder, tmp_path):
    folder, cases, studies = label_folder
    models = folder / "monaibundle" / "model" / BUNDLE.name / "models"
    shipped = (models / "model.pt").read_bytes()
    before = voxels(server.label_map(studies[4], tmp_path / "before.nii.gz"))
    task = server.train(max_epochs=2, val_split=0.34)
    assert task["status"] == "DONE", task["details"]
    assert any("Restored all variables from" in line for line in task["details"])
    assert any("new best val_mean_dice" in line for line in task["details"])
    kept = [p for p in models.glob("model.2*.pt")]
    assert [p.read_bytes() for p in kept] == [shipped] and (models / "model.pt").read_bytes() != shipped
    after = voxels(server.label_map(studies[4], tmp_path / "after.nii.gz"))
    assert (before != after).any()
    assert dice(after, voxels(cases[4]["label"])) > 0.8
    assert server.scoring()["status"] == "DONE"

    task = server.train(max_epochs=1, val_split=0.0)
    assert task["status"] == "ERROR" and "no case to validate on" in task["details"][-1]


def test_a_server_started_after_a_training_still_takes_the_best_weights(server, label_folder, tmp_path):
    folder, _, _ = label_folder
    app = folder / "monaibundle"
    assert (app / "model" / BUNDLE.name / "models" / "model_last.pt").is_file(), "runs after the training above"
    with Server(app, folder / "studies", BUNDLE.name, tmp_path / "again.log", PYTHON) as again:
        assert again.info()["models"][BUNDLE.name]["config"]["model_filename"][0] == "model.pt"


def test_the_liver_bundle_serves_trains_and_scores_large_scans(monailabel, tmp_path):
    """Abdominal MRI of 256 x 256 voxels a slice; the server sees two studies with labels and two without."""
    data, bundle = real_data("CHAOS_T2"), ROOT / "bundles" / "liver_mpmri_morse"
    cases = msd_cases(data)[:4]
    for case in cases:
        image = nib.load(case["label"])
        case["label"] = str(tmp_path / os.path.basename(case["label"]))
        nib.save(nib.Nifti1Image((np.asarray(image.dataobj) == 1).astype(np.uint8), image.affine), case["label"])
    make_app(tmp_path, bundle, PYTHON)
    studies = make_studies(tmp_path / "studies", cases, labelled=2)
    models = tmp_path / "monaibundle" / "model" / bundle.name / "models"
    with Server(tmp_path / "monaibundle", tmp_path / "studies", bundle.name, tmp_path / "server.log", PYTHON) as server:
        assert server.info()["models"][bundle.name]["labels"] == {"liver": 1}
        answer, truth = nib.load(server.label_map(studies[3], tmp_path / "a.nii.gz")), nib.load(cases[3]["label"])
        assert answer.shape == truth.shape and np.allclose(answer.affine, truth.affine, atol=1e-4)
        found, liver = np.asarray(answer.dataobj) == 1, np.asarray(truth.dataobj) == 1
        assert 2 * (found & liver).sum() / (found.sum() + liver.sum()) > 0.85
        shipped = (models / "model.pt").read_bytes()
        task = server.train(max_epochs=1, val_split=0.5)
        assert task["status"] == "DONE", task["details"]
        assert any("new best val_mean_dice" in line for line in task["details"])
        assert (models / "model.pt").read_bytes() != shipped
        assert server.scoring()["status"] == "DONE"
        assert set(server.scores()) == set(studies[2:]) and all(0 < s < np.log(2) for s in server.scores().values())
