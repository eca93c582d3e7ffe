"""The liver bundle: every row of the paper's table 2 by its documented words, DICOM and NIfTI in, phantom, two processes."""

import csv
import itertools
import json
import os
import re
import shutil
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, real_data, write_dicom, write_msd
from monai.bundle import ConfigParser, ConfigWorkflow
from warm import TORCHRUN, bundle_run, run_module

import monai_morse.prepare
from monai_morse.data import dicom_scans, msd_cases, read_scan
from monai_morse.errors import find_input_error
from monai_morse.losses import render_weight
from monai_morse.prepare import phantom_mpmri, prepare_mpmri, stand_ins, write_phantom

BUNDLE = ROOT / "bundles" / "liver_mpmri_morse"
CONFIGS = BUNDLE / "configs"
README = (BUNDLE / "docs" / "README.md").read_text()
# the words of each row of table 2, as the bundle's README documents them
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `(--experts \w+ --renderer \w+)` \|", README, re.MULTILINE))
OBLIQUE = np.array([[0.99, -0.14, 0, -30], [0.14, 0.99, 0, 12], [0, 0, 1, 7], [0, 0, 0, 1.0]])
SMALL = {
    "backbones#unetr": {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "feature_size": 4},
    "backbones#unet3d": {"features": 2},
}
TINY = {"patch_size": [32, 32, 32], "spacing": [1.0, 1.0, 1.0], "num_folds": 3, "iterations": 2, "val_interval": 1}
TINY |= {"network_def#points#num_train": 64, "network_def#points#num_eval": 100}
TINY |= {f"{backbone}#{name}": value for backbone, words in SMALL.items() for name, value in words.items()}


@pytest.fixture(scope="module")
def liver(tmp_path_factory):
    """Tiny oblique scans in the MSD layout."""
    return write_msd(tmp_path_factory.mktemp("liver") / "data", classes=("liver",), affine=OBLIQUE)


def run_here(kind, configs, **words):
    words = {"bundle_root": str(BUNDLE), **TINY, **words}
    files = [str(CONFIGS / f"{c}.yaml") for c in configs]
    meta = str(CONFIGS / "metadata.json")
    workflow = ConfigWorkflow(files, meta, logging_file=False, workflow_type=kind, **words)
    workflow.initialize()
    workflow.run()
    return workflow


def folders(data, out):
    return {"dataset_dir": str(data), "ckpt_dir": str(out), "output_dir": str(out)}


def words_of(row):
    return dict(zip(*[iter(ROWS[row].replace("--", "").split())] * 2))


def test_the_readme_has_the_eight_rows():
    cells = {tuple(words_of(row).values()) for row in ROWS}
    assert cells == {
        ("none", "none"),
        ("none", "pointrend"),
        ("none", "implicit_pointrend"),
        ("none", "anatomical"),
        ("dense", "none"),
        ("stochastic", "none"),
        ("dense", "anatomical"),
        ("stochastic", "anatomical"),
    }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("backbone", ["unet3d", "unetr"])
def test_every_row_of_table_2_trains(backbone, row, liver, tmp_path):
    run = run_here("train", ["train"], backbone=backbone, **words_of(row), **folders(liver, tmp_path))
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert last["epoch"] == 1  # of 4 cases, two iterations
    assert run.parser.get_parsed_content("train#trainer").state.iteration == 2
    own = {k.split(".")[0] for k in last["model"]}
    experts, renderer = words_of(row).values()
    assert ("mixture" in own) == (experts != "none") and ("renderer" in own) == (renderer != "none")
    assert any(".vit." in k for k in last["model"]) == (backbone == "unetr")
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize("backbone", ["swinunetr", "dynunet", "segresnet"])
def test_other_backbones_train_by_name(backbone, liver, tmp_path):
    small = {
        "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
        "dynunet": {"features": 2},
        "segresnet": {"init_filters": 8},
    }[backbone]
    words = {f"backbones#{backbone}#{name}": value for name, value in small.items()}
    if backbone == "swinunetr":
        words["patch_size"] = [64, 64, 64]
    run_here("train", ["train"], backbone=backbone, **{**folders(liver, tmp_path), **words})
    assert (tmp_path / "model.pt").is_file()


def test_prepared_phases_train_as_channels(liver, tmp_path):
    for i, phase in itertools.product(range(6), ("pre", "art", "ven")):
        patient = tmp_path / f"source/p{i}"
        patient.mkdir(parents=True, exist_ok=True)
        shutil.copy(liver / f"imagesTr/case_{i}.nii.gz", patient / f"{phase}.nii.gz")
        shutil.copy(liver / f"labelsTr/case_{i}.nii.gz", patient / "liver.nii.gz")
    prepare_mpmri(tmp_path / "source", tmp_path / "data", phases="channels")
    run_here("train", ["train"], backbone="unet3d", in_channels=3, **folders(tmp_path / "data", tmp_path))
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert next(w for w in weights.values() if w.ndim == 5).shape[1] == 3


def test_an_unknown_backbone_is_named(liver, tmp_path):
    with pytest.raises(Exception) as caught:
        run_here("train", ["train"], backbone="unet", **folders(liver, tmp_path))
    assert "backbone must be one of ('dynunet', 'unetr'," in str(find_input_error(caught.value))


def test_the_papers_head_and_another_schedule_are_a_word_away(liver, tmp_path):
    words = {"preset": "paper", "schedule": "scratch", "alpha": 0.3, "num_experts": 2, "seed": 1, "fold": 2}
    words |= {"backbone": "unet3d", "patch_size": [16, 16, 16], "spacing": [2.0, 2.0, 2.0], "iterations": 1}
    run = run_here("train", ["train"], **{**folders(liver, tmp_path), **words})
    net = run.parser.get_parsed_content("network")
    assert net.mixture.out_channels == 256 and len(net.mixture.experts) == 2 and net.classifier is not None
    assert net.mixture.dropout.chance.tolist() == pytest.approx([0.09, 0.21, 0.21, 0.49])  # of none, one, the other, both
    assert run.parser.get_parsed_content("loss").weight == pytest.approx(render_weight(1, 2, "scratch"))


def test_thirty_thousand_iterations_are_the_epochs_that_make_them(tmp_path):
    for cases, folds, epochs in ((60, 5, 1250), (7, 7, 10000)):  # 48 cases: 24 batches; 6 cases: 3
        listed = [{"image": f"i{i}", "label": f"l{i}"} for i in range(cases)]
        content = {"labels": {"0": "background", "1": "liver"}, "training": listed}
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.yaml"))
        parser.update({"dataset_dir": str(tmp_path), "num_folds": folds, "preset": "paper"})
        assert parser.get_parsed_content("max_epochs") == epochs


def test_the_documented_command_trains_and_its_weights_are_evaluated(liver, tmp_path):
    words = {"backbone": "unetr", "experts": "stochastic", "renderer": "anatomical", **folders(liver, tmp_path)}
    done = run_module(*bundle_run("configs/train.yaml", **{**TINY, **words}), cwd=BUNDLE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run_here("train", ["train", "evaluate"], **words)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["class"] for r in rows] == ["liver"] * 2 and all(0 <= float(r["dice"]) <= 1 for r in rows)
    assert {r["case"] for r in rows} == {os.path.basename(c["image"])[:-7] for c in msd_cases(liver, "val", num_folds=3)}


def test_nifti_and_dicom_are_segmented_in_their_own_geometry(liver, tmp_path):
    hd = pytest.importorskip("highdicom", reason="pip install monai_morse[dicom]")
    ct, mr = real_data("abdomen_ct_dicom"), real_data("abdomen_mr")
    words = {"spacing": [15.0, 15.0, 8.0], "backbone": "unet3d"}
    run_here("train", ["train"], **words, **folders(liver, tmp_path))
    scans = tmp_path / "scans"
    shutil.copytree(ct / "series", scans / "patient.1" / "ven")  # JPEG 2000, no extensions
    shutil.copy(mr / "image.nii.gz", scans / "mr.nii.gz")
    image = nib.load(liver / "imagesTr/case_0.nii.gz")
    write_dicom(scans / "both", image, "t1 pre", 3, name="A{:03d}")
    broken = write_dicom(scans / "both", image, "t1 art", 4, name="B{:03d}")
    broken[5].unlink()
    options = {"weights": str(tmp_path / "model.pt"), "dataset_dir": str(scans), "output_dir": str(tmp_path / "out")}
    with pytest.raises(Exception) as caught:
        run_here("infer", ["inference"], dicom_seg=True, save_uncertainty=True, **options, **words)
    said = str(find_input_error(caught.value))
    assert "1 case(s) refused or failed, the others are done" in said and "both_4_t1_art" in said
    dicom = dicom_scans(scans)
    expected = {"mr": scans / "mr.nii.gz", "patient.1_ven": dicom["patient.1/ven"], "both_3_t1_pre": dicom["both/3_t1_pre"]}
    found = sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz"))
    assert found == sorted(f"{name}_{kind}.nii.gz" for name in expected for kind in ("seg", "uncertainty"))
    for name, path in expected.items():
        scan, seg = read_scan(path), nib.load(tmp_path / "out" / f"{name}_seg.nii.gz")
        assert seg.shape == scan.shape and np.allclose(seg.affine, scan.affine, atol=1e-4)
        assert seg.get_data_dtype() == np.uint8 and set(np.unique(seg.dataobj)) <= {0, 1}
    voxels = np.asarray(nib.load(tmp_path / "out/both_3_t1_pre_seg.nii.gz").dataobj)
    if voxels.any():
        seg = hd.seg.segread(tmp_path / "out" / "both_3_t1_pre_seg.dcm")
        assert seg.get_volume(combine_segments=True).array.sum() == voxels.sum()


def test_a_coronal_scan_is_seen_by_its_own_slices(tmp_path, caplog):
    affine = np.array([[-1, 0, 0, 30], [0, 0, 4, 12], [0, 1, 0, 7], [0, 0, 0, 1.0]])  # slices of 4 mm, from back to front
    data = write_msd(tmp_path / "data", classes=("liver",), affine=affine)
    words = {"spacing": [1.0, 1.0, 4.0], "patch_size": [32, 32, 16], "backbones#dynunet#features": 2}
    run = run_here("train", ["train"], **words, **folders(data, tmp_path))
    net, cached = run.parser.get_parsed_content("network"), run.parser.get_parsed_content("train#dataset")
    assert net.stride == [2, 2, 1] and net.decoder.backbone.kernel_size[0] == [3, 3, 1]
    assert nib.aff2axcodes(cached[0][0]["image"].affine.numpy()) == ("R", "S", "A")
    out = {"dataset_dir": str(data / "imagesTr"), "output_dir": str(tmp_path / "out"), "weights": str(tmp_path / "model.pt")}
    run_here("infer", ["inference"], **words, **out)
    assert "its slices are coronal" in caplog.text
    for path in (data / "imagesTr").glob("*.nii.gz"):
        seg = nib.load(tmp_path / "out" / path.name.replace(".nii", "_seg.nii"))
        assert seg.shape == (20, 24, 18) and np.allclose(seg.affine, affine, atol=1e-6)


def test_without_weights_inference_says_what_to_do(liver, tmp_path):
    with pytest.raises(Exception) as caught:
        words = {"weights": str(tmp_path / "model.pt"), "output_dir": str(tmp_path)}
        run_here("infer", ["inference"], dataset_dir=str(liver / "imagesTr"), **words)
    assert "no checkpoint at" in str(find_input_error(caught.value))


def test_the_shipped_weights_find_the_liver_of_the_patient_they_were_not_trained_on(tmp_path):
    case = msd_cases(real_data("CHAOS_T2"), "val", fold=0, num_folds=16)[0]
    words = {"bundle_root": str(BUNDLE), "dataset_dir": case["image"], "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(str(CONFIGS / "inference.yaml"), logging_file=False, workflow_type="infer", **words)
    workflow.initialize()
    workflow.run()
    seg, truth = nib.load(next(tmp_path.glob("*_seg.nii.gz"))), nib.load(case["label"])
    found, liver = np.asarray(seg.dataobj) == 1, np.asarray(truth.dataobj) == 1
    assert seg.shape == truth.shape and np.allclose(seg.affine, truth.affine, atol=1e-6)
    assert 2 * (found & liver).sum() / (found.sum() + liver.sum()) > 0.9


def test_without_data_it_runs_on_a_phantom_of_its_own(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stand_ins, "write_phantom", partial(write_phantom, spacing=(10.0, 10.0, 10.0)))
    monkeypatch.setattr(monai_morse.prepare, "phantom_mpmri", lambda out: phantom_mpmri(out, patients=2))
    words = {"bundle_root": str(tmp_path), "backbone": "unet3d", "spacing": [8.0, 8.0, 8.0], "num_folds": 2}
    run_here("train", ["train"], **words)
    assert "taking synthetic scans, a phantom" in caplog.text
    assert (tmp_path / "data/phantom/dataset.json").is_file() and (tmp_path / "models/model.pt").is_file()


@pytest.mark.parametrize("config, kind", [("train", "train"), ("inference", "infer")])
def test_required_properties_are_there(config, kind, liver):
    words = {"bundle_root": str(BUNDLE), "dataset_dir": str(liver / "imagesTr" if kind == "infer" else liver), **TINY}
    meta = str(CONFIGS / "metadata.json")
    workflow = ConfigWorkflow(str(CONFIGS / f"{config}.yaml"), meta, logging_file=False, workflow_type=kind, **words)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_metadata_has_its_version_in_the_changelog_and_the_declared_network():
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] == next(iter(meta["changelog"]))
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.yaml"))
    train = {name: parser.get_parsed_content(name) for name in ("class_names", "patch_size")}
    output = meta["network_data_format"]["outputs"]["pred"]
    assert list(output["channel_def"].values()) == ["background", *train["class_names"]]
    assert output["num_channels"] == len(train["class_names"]) + 1
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == train["patch_size"] == output["spatial_shape"]


def processes(configs, folder, **words):
    """Run in two processes on CPUs, with the configs read into one file as ``monai.bundle`` reads several."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{c}.yaml") for c in configs])
    parser.update({"bundle_root": str(BUNDLE), **TINY, **words})
    ConfigParser.export_config_file(parser.config, str(folder / "run.json"), indent=4)
    command = bundle_run(folder / "run.json", logging_file=CONFIGS / "logging.conf")
    done = run_module(*TORCHRUN, *command, cwd=ROOT, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_processes_train_as_one_network(liver, tmp_path):
    words = {"backbone": "unet3d", "schedule": "scratch", **folders(liver, tmp_path)}
    log = processes(["train", "multi_gpu_train"], tmp_path, batch_size=1, **words)
    assert log.count("-- train_loss: ") == 1  # an epoch, told by one process
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    run_here("train", ["train"], resume=True, max_epochs=2, **words)  # one process goes on with it
    assert torch.load(tmp_path / "model_last.pt", weights_only=True)["model"].keys() == last["model"].keys()
