"""The hippocampus bundle by ``monai.bundle run``, as a user starts it: train, evaluate, infer, kill, resume, err."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, write_msd
from monai.bundle import ConfigParser, ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm import bundle_run, run_module

from monai_morse.data import msd_cases
from monai_morse.errors import find_input_error

BUNDLE = ROOT / "bundles" / "hippocampus_mri_morse"
CONFIGS = BUNDLE / "configs"
EVALUATE = f"['{CONFIGS}/train.yaml','{CONFIGS}/evaluate.yaml']"
OBLIQUE = np.array([[0.99, -0.14, 0, -30], [0.14, 0.99, 0, 12], [0, 0, 1.5, 7], [0, 0, 0, 1]])
TINY = {"patch_size": "[16,16,16]", "batch_size": 2, "num_folds": 3, "val_interval": 1}


def command(config, **options):
    config = config if str(config).startswith("[") else str(CONFIGS / config)
    return bundle_run(config, **{"bundle_root": BUNDLE, "logging_file": CONFIGS / "logging.conf", **options})


def run(config, **options):
    return run_module(*command(config, **options), cwd=ROOT)


def succeed(config, **options):
    done = run(config, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tiny oblique data and two epochs of training on it."""
    folder = tmp_path_factory.mktemp("bundle")
    data = write_msd(folder / "data", affine=OBLIQUE)
    out = folder / "run"
    done = succeed("train.yaml", dataset_dir=data, ckpt_dir=out, output_dir=out, max_epochs=2, **TINY)
    return data, out, done.stdout


def test_training_leaves_best_and_last_weights_and_tells_each_class(trained):
    _, out, log = trained
    best = torch.load(out / "model.pt", weights_only=True)
    last = torch.load(out / "model_last.pt", weights_only=True)
    assert best.keys() == last["model"].keys()
    assert last["epoch"] == 2 and last["settings"]["fold"] == 0
    assert "val_mean_dice_anterior" in log and "val_mean_dice_posterior" in log
    assert log.count("-- train_loss: ") == 2  # a line an epoch
    curves = EventAccumulator(str(out)).Reload()
    assert {"train_loss", "val_mean_dice_anterior"} <= set(curves.Tags()["scalars"])
    assert len(curves.Scalars("train_loss")) == 4


def test_a_finished_training_goes_on_with_more_epochs(trained, tmp_path):
    data, run_dir, _ = trained
    for name in ("model_last.pt", "model.pt"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    succeed("train.yaml", dataset_dir=data, ckpt_dir=tmp_path, output_dir=tmp_path, max_epochs=3, resume="true", **TINY)
    before, after = (torch.load(d / "model_last.pt", weights_only=True) for d in (run_dir, tmp_path))
    assert after["epoch"] == 3
    assert any(not torch.equal(before["model"][k], v) for k, v in after["model"].items())  # a learning rate above 0


def test_evaluation_writes_a_row_a_case_and_class_and_label_maps_in_the_labels_geometry(trained, tmp_path):
    data, run_dir, _ = trained
    succeed(EVALUATE, dataset_dir=data, ckpt_dir=run_dir, output_dir=tmp_path, save_pictures="true", **TINY)
    held_back = msd_cases(data, "val", num_folds=3)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = [os.path.basename(c["image"]) for c in held_back]
    assert [r["case"] for r in rows] == [n.removesuffix(".nii.gz") for n in names for _ in range(2)]
    assert sorted(os.listdir(tmp_path / "pictures")) == sorted(n.replace(".nii.gz", ".png") for n in names)
    for case, name in zip(held_back, names):
        label, pred = nib.load(case["label"]), nib.load(tmp_path / "predictions" / name)
        assert pred.shape == label.shape and np.allclose(pred.affine, label.affine, atol=1e-5)
        truth, found = (np.asarray(i.dataobj) for i in (label, pred))
        row = next(r for r in rows if r["case"] == name.removesuffix(".nii.gz") and r["class"] == "anterior")
        overlap = 2 * ((truth == 1) & (found == 1)).sum() / max(1, (truth == 1).sum() + (found == 1).sum())
        assert float(row["dice"] or 0) == pytest.approx(overlap, abs=1e-5)


def test_a_network_on_slices_trains_and_is_scored_on_volumes(trained, tmp_path):
    data, _, _ = trained
    options = {**TINY, "patch_size": "[32,32]", "stride": 2, "dataset_dir": data, "ckpt_dir": tmp_path, "output_dir": tmp_path}
    slices = EVALUATE.replace("','", f"','{CONFIGS}/slices.yaml','")
    succeed(f"['{CONFIGS}/train.yaml','{CONFIGS}/slices.yaml']", max_epochs=1, **options)
    kernels = [w for w in torch.load(tmp_path / "model.pt", weights_only=True).values() if w.ndim > 3]
    assert kernels and all(w.ndim == 4 for w in kernels)
    succeed(slices, save_boundary_errors="true", render_scale=2, **options)
    for case in msd_cases(data, "val", num_folds=3):
        label, pred = nib.load(case["label"]), nib.load(tmp_path / "predictions" / os.path.basename(case["image"]))
        assert pred.shape == label.shape and np.allclose(pred.affine, label.affine, atol=1e-5)
    assert (tmp_path / "boundary.csv").is_file()
    wrong = run(f"['{CONFIGS}/train.yaml','{CONFIGS}/slices.yaml']", **{**options, "coordinates": "volume"})
    assert wrong.returncode == 1 and "use coordinates='window'" in wrong.stderr + wrong.stdout


def test_another_system_in_volume_coordinates_renders_on_a_finer_grid_and_shows_its_uncertainty(trained, tmp_path):
    data, _, _ = trained
    system = {"renderer": "implicit_pointrend", "schedule": "scratch", "coordinates": "volume", "spacing": "[1.5,1.5,2]"}
    options = {**TINY, **system, "dataset_dir": data, "ckpt_dir": tmp_path, "output_dir": tmp_path}
    succeed("train.yaml", max_epochs=1, **options)
    del system["schedule"]
    options = {"weights": tmp_path / "model.pt", "patch_size": "[16,16,16]", "save_uncertainty": "true", **system}
    scan = data / "imagesTr/case_0.nii.gz"
    found = {}
    for scale in (1, 2):
        succeed("inference.yaml", dataset_dir=scan, output_dir=tmp_path / str(scale), render_scale=scale, **options)
        found[scale] = [nib.load(tmp_path / str(scale) / f"case_0_{kind}.nii.gz") for kind in ("seg", "uncertainty")]
        for image in found[scale]:
            assert image.shape == nib.load(scan).shape and np.allclose(image.affine, nib.load(scan).affine, atol=1e-5)
    uncertainty = [np.asarray(images[1].dataobj) for images in found.values()]
    assert uncertainty[0].max() <= 0 and uncertainty[0].min() < -1e-3
    assert not np.allclose(*uncertainty)


def test_inference_keeps_the_scans_geometry_and_one_broken_scan_takes_nobody_down(trained, tmp_path):
    data, run_dir, _ = trained
    scans = tmp_path / "scans"
    scans.mkdir()
    for i in range(2):
        (scans / f"case_{i}.nii.gz").write_bytes((data / f"imagesTr/case_{i}.nii.gz").read_bytes())
    (scans / "case_1_broken.nii.gz").write_bytes(b"not a scan")
    options = {"weights": run_dir / "model.pt", "patch_size": "[16,16,16]"}
    done = run("inference.yaml", dataset_dir=scans, output_dir=tmp_path / "out", **options)
    assert done.returncode == 1
    assert "1 case(s) refused or failed, the others are done" in done.stderr and "case_1_broken" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("[!.]*")) == ["case_0_seg.nii.gz", "case_1_seg.nii.gz", "cohort.csv"]
    pred = nib.load(tmp_path / "out/case_1_seg.nii.gz")
    assert pred.shape == (20, 24, 18) and np.allclose(pred.affine, OBLIQUE, atol=1e-5)
    assert pred.get_data_dtype() == np.uint8 and set(np.unique(pred.dataobj)) <= {0, 1, 2}


def test_killed_training_resumes_and_ends_with_the_same_weights(tmp_path):
    data = write_msd(tmp_path / "data")
    options = {**TINY, "dataset_dir": data, "max_epochs": 5, "batch_size": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed("train.yaml", ckpt_dir=whole, output_dir=whole, **options)

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [sys.executable, "-W", "ignore", "-m", *command("train.yaml", ckpt_dir=killed, output_dir=killed, **options)]
    process = subprocess.Popen(words, **quiet)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if (killed / "model_last.pt").is_file() and torch.load(killed / "model_last.pt", weights_only=True)["epoch"] >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert torch.load(killed / "model_last.pt", weights_only=True)["epoch"] < 5

    succeed("train.yaml", ckpt_dir=killed, output_dir=killed, resume="true", **options)
    for name in ("model_last.pt", "model.pt"):
        a, b = (torch.load(d / name, weights_only=True) for d in (whole, killed))
        a, b = (s.get("model", s) for s in (a, b))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def no_data(data):
    return {"dataset_dir": data / "nowhere"}


def label_out_of_range(data):
    path = data / "labelsTr/case_2.nii.gz"
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) + np.uint8(1), label.affine), path)
    return {}


def broken_file(data):
    (data / "labelsTr/case_3.nii.gz").write_bytes(b"")
    return {}


ERRORS = {
    "missing folder": (no_data, "error: no dataset folder at .*nowhere"),
    "broken file": (broken_file, "case_3.nii.gz: cannot be read"),
    "unknown experts": (lambda d: {"experts": "sparse"}, "experts must be one of .*'sparse'"),
    "unknown renderer": (lambda d: {"renderer": "nerf"}, "renderer must be one of .*'nerf'"),
    "unknown schedule": (lambda d: {"schedule": "linear"}, "schedule must be one of .*'linear'"),
    "label out of range": (label_out_of_range, "case_2.nii.gz: labels \\[3.0\\] are outside 0 to 2"),
    "too few classes": (lambda d: {"class_names": "['all']"}, "class_names must be a list of 2 names"),
    "names of no list": (lambda d: {"class_names": "anterior"}, "class_names must be a list of names, such as"),
    "nothing to validate on": (lambda d: {"validate#dataset#data": "[]"}, "no case to validate on: of 4 case"),
    "patch of no size": (lambda d: {"patch_size": "[10,10,10]"}, "does not take windows.*--patch_size '.16, 16, 16.'"),
    "nowhere to write": (lambda d: {"output_dir": d / "dataset.json" / "out"}, "cannot write to .*dataset.json/out"),
    "other settings": (lambda d: {"resume": "true", "fold": 1}, "training with fold 0, not 1"),
    "other checkpoint": (
        lambda d: {"resume": "true", "experts": "none", "renderer": "none"},
        "is a training with .*experts .stochastic., not .none.*renderer .anatomical., not .none.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_ends_before_training_with_one_clear_message(name, trained, tmp_path):
    prepare, message = ERRORS[name]
    data = write_msd(tmp_path / "data")
    out = tmp_path / "run"
    out.mkdir()
    for file in ("model.pt", "model_last.pt"):
        (out / file).write_bytes((trained[1] / file).read_bytes())
    before = {f: (out / f).read_bytes() for f in ("model.pt", "model_last.pt")}
    options = {"dataset_dir": data, "ckpt_dir": out, "output_dir": out, "max_epochs": 3, **TINY}
    options.update(prepare(data))
    done = run("train.yaml", **options)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    last = done.stderr[done.stderr.index("error: ") :]
    assert len(last.splitlines()) < 15
    assert re.search(message, last, re.DOTALL), last
    assert "Epoch[" not in done.stdout
    assert {f: (out / f).read_bytes() for f in before} == before


@pytest.mark.parametrize("experts", ["none", "dense", "stochastic"])
@pytest.mark.parametrize("renderer", ["none", "anatomical"])
def test_every_cell_trains_from_the_command_lines_words(experts, renderer, msd, tmp_path):
    words = {"bundle_root": str(BUNDLE), "dataset_dir": str(msd), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    words |= {"experts": experts, "renderer": renderer, "max_epochs": 1, "num_folds": 3, "patch_size": [16, 16, 16]}
    workflow = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", logging_file=False, meta_file=None, **words)
    workflow.initialize()
    workflow.run()
    assert (tmp_path / "model.pt").is_file()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    own = {k.split(".")[0] for k in state}
    assert ("mixture" in own) == (experts != "none") and ("renderer" in own) == (renderer != "none")


def test_the_papers_preset_trains_by_equation_4(msd, tmp_path):
    words = {"bundle_root": str(BUNDLE), "dataset_dir": str(msd), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    words |= {"preset": "paper", "width": 8, "max_epochs": 2, "num_folds": 3, "patch_size": [16, 16, 16]}
    workflow = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", logging_file=False, meta_file=None, **words)
    workflow.initialize()
    workflow.run()
    assert workflow.parser.get_parsed_content("loss").weight == pytest.approx(0.1 * (4 - 2) / 4)  # at the last of 4 iterations
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {"classifier", "mixture", "renderer"} <= {k.split(".")[0] for k in state}


def test_datasets_from_elsewhere_train_without_a_listing_and_the_last_epoch_is_validated(msd, tmp_path):
    cases = msd_cases(msd, "all")  # as MONAI Label gives them, with a dataset_dir of its own
    words = {"bundle_root": str(BUNDLE), "dataset_dir": str(tmp_path), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    words |= {"train#dataset#data": cases[:4], "validate#dataset#data": cases[4:], "train#trainer#max_epochs": 3}
    words |= {"val_interval": 2, "patch_size": [16, 16, 16], "device": "$torch.device('cpu')"}
    workflow = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", logging_file=False, meta_file=None, **words)
    workflow.initialize()
    workflow.run()
    curves = EventAccumulator(str(tmp_path)).Reload().Scalars("val_mean_dice")
    assert [p.step for p in curves] == [2, 3]
    (msd / "labelsTr/case_5.nii.gz").unlink()
    broken = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", logging_file=False, meta_file=None, **words)
    with pytest.raises(Exception) as caught:
        broken.initialize()
    assert "case_5.nii.gz" in str(find_input_error(caught.value))


@pytest.mark.parametrize("config, kind", [("train.yaml", "train"), ("inference.yaml", "infer")])
def test_required_properties_are_there(config, kind, msd):
    words = {"bundle_root": str(BUNDLE), "dataset_dir": str(msd / "imagesTr" if kind == "infer" else msd)}
    workflow = ConfigWorkflow(
        str(CONFIGS / config), str(CONFIGS / "metadata.json"), logging_file=False, workflow_type=kind, **words
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("over, patch", [([], [16, 32, 48]), (["slices"], [32, 48])])
@pytest.mark.parametrize("backbone", ["dynunet", "segresnet", "unetr"])
@pytest.mark.parametrize("stride", [1, 2])
def test_each_backbone_is_a_word_away(backbone, over, patch, stride):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{n}.yaml") for n in ("train", *over)])
    patch = [stride * n for n in patch]
    parser.update({"backbone": backbone, "patch_size": patch, "stride": stride})
    net = parser.get_parsed_content("network_def")
    assert type(net.decoder.backbone).__name__.lower() == backbone
    assert net.eval()(torch.rand(1, 1, *patch)).shape == (1, 3, *patch)


def test_metadata_has_its_version_in_the_changelog_and_names_the_classes():
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
    channels = meta["network_data_format"]["outputs"]["pred"]["channel_def"]
    train = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    assert list(channels.values()) == ["background", *train["class_names"]]


def test_shipped_weights_are_small_plain_and_load():
    path = BUNDLE / "models" / "model.pt"
    assert path.stat().st_size <= 20e6
    parser = ConfigParser(ConfigParser.load_config_file(CONFIGS / "inference.yaml"))
    parser.get_parsed_content("network_def").load_state_dict(torch.load(path, weights_only=True))


def test_shipped_weights_segment_real_cases_not_trained_on(task04, tmp_path):
    cases = msd_cases(task04, "val")[:8]
    data = {"labels": {"0": "background", "1": "anterior", "2": "posterior"}, "training": cases}
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    succeed(EVALUATE, dataset_dir=tmp_path, split="all", output_dir=tmp_path, save_predictions="false")
    with open(tmp_path / "metrics.csv") as file:
        dice = [float(r["dice"]) for r in csv.DictReader(file)]
    assert len(dice) == 16
    assert np.mean(dice) >= 0.86  # of 8 of the 40 cases held back; their table is in the bundle's README
    assert not (tmp_path / "predictions").exists()
