"""The Synapse bundle: every row and setting of the paper's tables 1, 3 and 4, and what is 2D about it."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_transunet import public_arrays, saved
from warm import TORCHRUN, bundle_run, run_module

from monai_morse.data import msd_cases
from monai_morse.errors import InputError, find_input_error
from monai_morse.prepare import prepare_synapse, synapse_phantom
from monai_morse.prepare.synapse import ORGANS, WINDOW
from monai_morse.weights import load_vit

BUNDLE = ROOT / "bundles" / "synapse_ct_morse"
CONFIGS = BUNDLE / "configs"
SMALL_VIT = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "resnet_units": [1, 1, 1], "width_factor": 0.5}
TINY = {
    "patch_size": [32, 32],
    "batch_size": 2,
    "backbones#unet#features": [4, 4, 8, 16, 32, 4],
    "network_def#points": {"num_train": 64, "num_eval": 64},
}
TINY |= {f"backbones#transunet#{k}": v for k, v in SMALL_VIT.items()}
TINY |= {"backbones#transunet#decoder_channels": [16, 8, 8, 4]}

SYSTEMS = {  # the rows of table 1: experts, renderer
    "Baseline": ("none", "none"),
    "+ PointRend": ("none", "pointrend"),
    "+ Implicit PointRend": ("none", "implicit_pointrend"),
    "+ Ours (MoE)": ("dense", "none"),
    "+ Ours (SMoE)": ("stochastic", "none"),
    "+ Ours (IAR)": ("none", "anatomical"),
    "+ Ours (IAR+MoE)": ("dense", "anatomical"),
    "+ Ours (MORSE)": ("stochastic", "anatomical"),
}
HEADS = {"pointrend": "PointRendHead", "implicit_pointrend": "ImplicitPointRendHead", "anatomical": "AnatomicalHead"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared scans of made-up patients: 3 to train, 2 to test."""
    return synapse_phantom(tmp_path_factory.mktemp("synapse") / "data", spacing=(10.0, 10.0, 10.0))


def workflow(files, dataset_dir, out, kind="train", **words):
    words = {**TINY, "bundle_root": str(BUNDLE), "dataset_dir": str(dataset_dir), "output_dir": str(out), **words}
    if kind == "train":
        words = {"ckpt_dir": str(out), **words}
    else:
        words.pop("batch_size")
    paths = [str(CONFIGS / f"{f}.yaml") for f in files]
    made = ConfigWorkflow(
        paths, str(CONFIGS / "metadata.json"), workflow_type=kind, logging_file=False, properties_path=None, **words
    )
    made.initialize()
    return made


def train(data, out, **words):
    """Two iterations, or as said; the workflow after."""
    done = workflow(["train"], data, out, **{"iterations": 2, **words})
    done.run()
    return done


def losses(out):
    return [p.value for p in EventAccumulator(str(out)).Reload().Scalars("train_loss")]


@pytest.mark.parametrize("backbone, features", [("unet", 5), ("transunet", 3)])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_row_of_table_1_trains(system, backbone, features, data, tmp_path):
    experts, renderer = SYSTEMS[system]
    row = workflow(["train"], data, tmp_path, backbone=backbone, experts=experts, renderer=renderer, iterations=2)
    net = row.parser.get_parsed_content("network_def")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    row.run()
    assert type(net.decoder.backbone).__name__ == {"unet": "BasicUNet", "transunet": "TransUNet"}[backbone]
    assert (len(net.mixture.experts) if net.mixture else 0) == (0 if experts == "none" else features)
    assert (type(net.renderer).__name__ if net.renderer else None) == HEADS.get(renderer)
    if net.mixture:
        all_active = net.mixture.dropout.chance[-1] / net.mixture.dropout.chance.sum()
        assert all_active == pytest.approx(0.3**features / (1 - 0.7**features) if experts == "stochastic" else 1)
    assert len(losses(tmp_path)) == 2 and np.isfinite(losses(tmp_path)).all()
    after = torch.load(tmp_path / "model.pt", weights_only=True)
    assert after.keys() == before.keys()
    for part in ("decoder", *(["mixture"] if net.mixture else []), *(["renderer"] if net.renderer else [])):
        assert any(not torch.equal(before[k].cpu(), after[k]) for k in before if k.startswith(part)), part


SETTINGS = {  # of tables 3 and 4
    **{f"alpha = {a}": {"alpha": a} for a in (0.1, 0.2, 0.5, 0.7, 0.9)},
    "N = 1 (No MoE)": {"num_experts": 1, "experts": "dense"},
    **{f"N = {n}": {"num_experts": n} for n in (2, 3, 4, 5)},
    "w/o AWA, from scratch": {"schedule": "scratch"},
    "w/o AWA, in T/2": {"schedule": "half"},
    "w/ AWA": {"schedule": "ramp"},
}
LAMBDA = {"scratch": [0.1] * 4, "half": [0, 0, 0.1, 0.1], "ramp": [0, 0, 0.1 * 1 / 4, 0.1 * 2 / 4]}  # T = 4


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_of_tables_3_and_4_trains(setting, data, tmp_path):
    words = SETTINGS[setting]
    done = workflow(["train"], data, tmp_path, iterations=4 if "schedule" in words else 2, batch_size=1, **words)
    net, loss = done.parser.get_parsed_content("network_def"), done.parser.get_parsed_content("loss")
    weights = []
    loss.register_forward_hook(lambda *args: weights.append(loss.weight))
    done.run()
    assert len(net.mixture.experts) == words.get("num_experts", 5)
    alpha = 0 if words.get("experts") == "dense" else words.get("alpha", 0.7)
    chance = net.mixture.dropout.chance[-1] / net.mixture.dropout.chance.sum()  # that all are active, given one stays
    assert chance == pytest.approx((1 - alpha) ** len(net.mixture.experts) / (1 - alpha ** len(net.mixture.experts)))
    if "schedule" in words:
        assert weights == pytest.approx(LAMBDA[words["schedule"]])
    assert np.isfinite(losses(tmp_path)).all()


@pytest.mark.parametrize("backbone", ["attentionunet", "swinunetr"])
def test_other_backbones_train_too(backbone, data, tmp_path):
    small = {"backbones#attentionunet#channels": [4, 8, 8, 8, 8], "backbones#swinunetr#feature_size": 12}
    train(data, tmp_path, backbone=backbone, iterations=1, batch_size=1, patch_size=[64, 64], **small)
    assert (tmp_path / "model.pt").is_file()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A network that has learned something of the made-up patients."""
    out = tmp_path_factory.mktemp("trained")
    train(data, out, iterations=100, learning_rate=0.01, batch_size=4, rot_flip_prob=0.0, schedule="half")
    return out


def command(config, *launcher, **options):
    words = bundle_run(config, bundle_root=BUNDLE, meta_file=None, **options)
    return run_module(*launcher, *words, cwd=ROOT, CUDA_VISIBLE_DEVICES="")


def test_the_command_line_trains_and_evaluates_on_the_test_cases_in_3d(data, trained, tmp_path):
    words = {k: str(v) for k, v in TINY.items() if "#" not in k} | {"backbones#unet#features": "[4,4,8,16,32,4]"}
    done = command(CONFIGS / "train.yaml", dataset_dir=data, ckpt_dir=tmp_path, output_dir=tmp_path, iterations=2, **words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.pt").is_file() and (tmp_path / "model_last.pt").is_file()
    assert not (BUNDLE / "models").exists()

    workflow(["train", "evaluate"], data, tmp_path, weights=str(trained / "model.pt")).run()
    cases = msd_cases(data, "test")
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["class"]) for r in rows] == [(c, o) for c in ("case0001", "case0002") for o in ORGANS]
    dice = []
    for case, row in zip([c for c in cases for _ in ORGANS], rows):
        label = nib.load(case["label"])
        found = nib.load(tmp_path / "predictions" / case["image"].split("/")[-1])
        assert found.shape == label.shape and np.allclose(found.affine, label.affine)
        k = ORGANS.index(row["class"]) + 1
        truth, mask = np.asarray(label.dataobj) == k, np.asarray(found.dataobj) == k
        dice.append(2 * (truth & mask).sum() / (truth.sum() + mask.sum()))
        assert float(row["dice"]) == pytest.approx(dice[-1], abs=1e-5)
    assert np.mean([d for d, r in zip(dice, rows) if r["class"] == "liver"]) > 0.6  # it lies where it should


def test_a_volume_is_segmented_slice_by_slice(data, trained, tmp_path):
    """By hand: orientation by flips, the window, the network on each slice, the class of the nearest pixel."""
    case = msd_cases(data, "test")[0]["image"]
    size = nib.load(case).shape[:2]
    pad = [-(-n // 16) * 16 for n in size]
    words = {"weights": str(trained / "model.pt"), "patch_size": pad, "network_def#points": {"num_eval": 50}}
    workflow(["inference"], case, tmp_path, "infer", **words).run()
    net = workflow(["inference"], case, tmp_path, "infer", **words).network_def.eval()
    net.load_state_dict(torch.load(trained / "model.pt", weights_only=True))
    voxels = np.asarray(nib.load(case).dataobj).astype(np.float32)[::-1]  # L-A-S to R-A-S
    unit = torch.from_numpy(((voxels + 125) / 400).copy())
    expected = []
    for z in range(unit.shape[2]):
        with torch.no_grad():
            x = torch.nn.functional.interpolate(unit[None, None, :, :, z], pad, mode="area")
            probability = torch.softmax(net(x), 1)
            back = torch.nn.functional.interpolate(probability, size, mode="bilinear", align_corners=False)
        expected.append(back[0].argmax(0).numpy())
    expected = np.stack(expected, -1)[::-1]
    found = np.asarray(nib.load(tmp_path / "case0001_seg.nii.gz").dataobj)
    assert len(np.unique(expected)) > 2
    assert (found == expected).mean() > 0.999


def test_real_ct_as_downloaded_prepared_or_stored_another_way_is_segmented_alike(real_btcv, trained, tmp_path):
    prepare_synapse(real_btcv, tmp_path / "prepared")
    raw = nib.load(real_btcv / "Training/img/img0001.nii.gz")
    turned = raw.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    scans = tmp_path / "scans"
    scans.mkdir()
    nib.save(raw, scans / "raw.nii.gz")
    nib.save(turned, scans / "turned.nii.gz")
    (scans / "prepared.nii.gz").write_bytes((tmp_path / "prepared/imagesTr/case0001.nii.gz").read_bytes())
    words = {"weights": str(trained / "model.pt"), "save_uncertainty": True, "render_scale": 2, "patch_size": [64, 64]}
    workflow(["inference"], scans, tmp_path / "out", "infer", **words).run()
    maps = {n: nib.load(tmp_path / f"out/{n}_seg.nii.gz") for n in ("raw", "turned", "prepared")}
    assert maps["turned"].shape == turned.shape and np.allclose(maps["turned"].affine, turned.affine, atol=1e-4)
    plain = {n: np.asarray(nib.as_closest_canonical(m).dataobj) for n, m in maps.items()}
    assert set(np.unique(plain["raw"])) <= set(range(9)) and (plain["raw"] > 0).mean() > 0.01
    assert (plain["raw"] == plain["turned"]).mean() > 0.999
    assert (plain["raw"] == plain["prepared"]).mean() > 0.999
    uncertainty = np.asarray(nib.load(tmp_path / "out/raw_uncertainty.nii.gz").dataobj)
    assert uncertainty.shape == raw.shape and uncertainty.max() <= 0 and uncertainty.min() < -1e-3


def test_slices_for_training_keep_image_and_label_together_and_leave_the_cache_alone(data, tmp_path):
    coded = tmp_path / "coded"
    case = msd_cases(data, "train")[0]
    label = nib.load(case["label"])
    classes = np.asarray(label.dataobj).astype(np.int16)
    coded.mkdir()
    nib.save(nib.Nifti1Image(classes * np.int16(40) - np.int16(100), label.affine), coded / "image.nii.gz")
    items = [{"image": str(coded / "image.nii.gz"), "label": case["label"]}]
    words = {"train#dataset#data": items, "patch_size": list(classes.shape[:2]), "rot_flip_prob": 1.0}
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml")])
    parser.update({"dataset_dir": str(data), **words})
    dataset = parser.get_parsed_content("train#dataset")
    dataset.transform.set_random_state(0)
    cached = [dataset._cache[0][k].clone() for k in ("image", "label")]
    seen, turned = set(), 0
    for _ in range(60):
        item = dataset[0]
        image, found = (item[k].as_tensor() for k in ("image", "label"))
        assert sorted(image.shape[1:]) == sorted(classes.shape[:2]) and image.ndim == 3
        assert torch.allclose(image * 400 - 125, found * 40 - 100, atol=1e-3)
        turned += image.shape[1] != classes.shape[0]
        seen.add(tuple(np.bincount(found.numpy().astype(int).ravel(), minlength=9)))
    assert 10 < turned < 50
    slices = {tuple(np.bincount(classes[:, :, z].ravel(), minlength=9)) for z in range(classes.shape[2])}
    assert seen <= slices and len(seen) > 0.7 * len(slices)
    assert all(torch.equal(dataset._cache[0][k], c) for k, c in zip(("image", "label"), cached))


def test_an_epoch_is_as_many_slices_as_said_of_cases_drawn_anew(data, tmp_path):
    done = workflow(["train"], data, tmp_path, iterations=7, epoch_length=3)
    trainer = done.parser.get_parsed_content("train#trainer")
    assert trainer.state.max_epochs == 3 and trainer.state.epoch_length == 3
    cases = []
    for batch in done.parser.get_parsed_content("train#dataloader"):
        cases += batch["image"].meta["filename_or_obj"]
        assert batch["image"].shape == (2, 1, 32, 32)
    assert len(cases) == 6


def test_held_back_cases_choose_the_epoch_and_without_them_the_last_is_kept(data, tmp_path):
    train(data, tmp_path, iterations=3, epoch_length=1, num_val=1, val_interval=2)
    cases = msd_cases(data, "train")
    done = workflow(["train"], data, tmp_path, num_val=1)
    assert done.train_dataset_data == cases[:2] and done.val_dataset_data == cases[2:]
    curves = EventAccumulator(str(tmp_path)).Reload().Scalars("val_mean_dice")
    assert [p.step for p in curves] == [2, 3]
    best, last = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("model", "model_last"))
    assert best.keys() == last["model"].keys() and last["best_metric"] == max(p.value for p in curves) > -1
    train(data, tmp_path, iterations=1)
    assert len(list(tmp_path.glob("model.2*.pt"))) == 1  # the earlier one is kept
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)["model"]
    assert all(torch.equal(v, last[k]) for k, v in torch.load(tmp_path / "model.pt", weights_only=True).items())


def test_a_training_that_goes_on_ends_as_one_that_was_not_stopped(data, tmp_path):
    words = {"epoch_length": 2, "iterations": 6}
    train(data, tmp_path / "whole", **words)
    stopped = workflow(["train"], data, tmp_path / "stopped", **words)
    stopped.parser.get_parsed_content("train#trainer").add_event_handler(
        "EPOCH_COMPLETED", lambda engine: engine.state.epoch < 2 or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert not (tmp_path / "stopped/model.pt").exists()
    train(data, tmp_path / "stopped", resume=True, **words)
    one, two = (torch.load(tmp_path / n / "model.pt", weights_only=True) for n in ("whole", "stopped"))
    assert all(torch.equal(one[k], two[k]) for k in one)


ERRORS = {
    "backbone": ({"backbone": "vgg"}, "backbone must be one of .*'unet', 'transunet'.*'vgg'"),
    "preset": ({"preset": "large"}, "preset must be one of .*'large'"),
    "experts": ({"num_experts": 6}, "num_experts must be 1 to 5"),
    "size": (
        {"patch_size": [40, 36], "backbone": "transunet"},
        "img_size must be .* multiples of 16, got .40, 36.",
    ),
    "weights": ({"pretrained_vit": "R50.npz"}, "R50.npz is for a TransUNet and the backbone is a BasicUNet"),
    "no weights": ({"pretrained_vit": "nowhere/R50.npz", "backbone": "transunet"}, "cannot read nowhere/R50.npz"),
    "no case left": ({"num_val": 3}, "no case to train on"),
    "split": ({"split": "val"}, "split must be one of .*'test', 'train', 'all'.*got 'val'"),
    "no data": ({"dataset_dir": "nowhere"}, "no dataset folder at nowhere"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_said_before_training(name, data, tmp_path):
    words, message = ERRORS[name]
    files = ["train", "evaluate"] if name == "split" else ["train"]
    with pytest.raises(Exception) as caught:
        workflow(files, **{"dataset_dir": data, "out": tmp_path, **words})
    error = find_input_error(caught.value)
    assert error is not None, caught.value
    with pytest.raises(InputError, match=message):
        raise error


def test_imagenets_weights_start_a_transunet(data, tmp_path):
    arrays = public_arrays(**{k: v for k, v in SMALL_VIT.items()})
    path = saved(tmp_path / "vit.npz", arrays)
    net = workflow(["train"], data, tmp_path, backbone="transunet", pretrained_vit=str(path)).network_def
    kernel = torch.from_numpy(arrays["conv_root/kernel"]).permute(3, 2, 0, 1)
    assert torch.equal(net.decoder.backbone.encoder.root.conv.weight.cpu(), kernel)
    again = workflow(["train"], data, tmp_path, backbone="transunet").network_def
    assert not torch.equal(again.decoder.backbone.encoder.root.conv.weight.cpu(), kernel)
    load_vit(again, path)
    assert torch.equal(again.decoder.backbone.encoder.root.conv.weight.cpu(), kernel)


def test_required_properties_are_there(data, tmp_path):
    assert workflow(["train"], data, tmp_path).check_properties() == []
    assert workflow(["train", "evaluate"], data, tmp_path).check_properties() == []
    assert workflow(["inference"], f"{data}/imagesTr", tmp_path, "infer").check_properties() == []


def test_metadata_has_its_version_in_the_changelog_names_the_classes_and_holds():
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert list(meta["changelog"])[0] == meta["version"]
    channels = meta["network_data_format"]["outputs"]["pred"]["channel_def"]
    train = ConfigParser.load_config_file(CONFIGS / "train.yaml")
    assert list(channels.values()) == ["background", *ORGANS] and train["class_names"] == list(ORGANS)
    assert train["window"] == list(WINDOW)
    files = {"config_file": str(CONFIGS / "inference.yaml"), "meta_file": str(CONFIGS / "metadata.json")}
    verify_net_in_out("network_def", device="cpu", **files)


def test_two_processes_train_one_network(data, tmp_path):
    """Its evaluation in several processes is the hippocampus bundle's (test_drift.py), and tested there."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{f}.yaml") for f in ("train", "multi_gpu_train")])
    words = {**TINY, "bundle_root": str(BUNDLE), "dataset_dir": data, "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path)}
    parser.update({**words, "iterations": 4, "epoch_length": 2})
    path = tmp_path / "train.json"
    ConfigParser.export_config_file(parser.config, str(path))
    done = command(path, *TORCHRUN, logging_file=CONFIGS / "logging.conf")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("-- train_loss: ") == 2  # one process tells
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert last["epoch"] == 2 and last["model"].keys() == torch.load(tmp_path / "model.pt", weights_only=True).keys()
