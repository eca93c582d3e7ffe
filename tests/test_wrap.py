"""Bundles of the zoo's structure as MORSE bundles: equal predictions, trained whole or frozen, evaluated; what cannot be."""

import json
import os
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from conftest import write_msd
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.networks.nets import UNet
from zoo import BUNDLES, first, original_network, write_bundle

from monai_morse import InputError, Morse
from monai_morse.__main__ import main
from monai_morse.weights import BACKBONE
from monai_morse.wrap import wrap_bundle
from monai_morse.wrap.weights import code_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("data") / "msd", shape=(30, 33, 18), affine=np.diag([1.0, 1.2, 2.0, 1.0]))


@pytest.fixture(scope="module", params=BUNDLES)
def wrapped(request, tmp_path_factory):
    """Name, original, MORSE bundle and report."""
    folder = tmp_path_factory.mktemp(request.param)
    original = write_bundle(request.param, folder / "original")
    return request.param, original, folder / "morse", wrap_bundle(original, folder / "morse")


def config(folder, name):
    return next(p.name for p in (folder / "configs").iterdir() if p.stem == name)


def run(name, folder, files, kind, data, out, **words):
    """One workflow of a bundle, as ``monai.bundle run`` does it."""
    files = first(name, config(folder, files[0])) + [config(folder, f) for f in files[1:]]
    files = [str(folder / "configs" / f) for f in files]
    meta = str(folder / "configs" / "metadata.json")
    words = {"bundle_root": str(folder), "dataset_dir": str(data), "output_dir": str(out), **words}
    with code_of(folder):
        workflow = ConfigWorkflow(files, meta, logging_file=False, workflow_type=kind, **words)
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.run()
    return workflow


def test_predictions_are_the_originals(wrapped, data, tmp_path):
    name, original, morse, report = wrapped
    assert "models/model.pt: " in str(report) and "bit for bit" in str(report)
    if name == "swin_unetr":  # as it stands it cannot be run: MONAI took img_size away
        parts = json.loads((original / "configs/inference.json").read_text())
        del parts["network_def"]["img_size"]
        (original / "configs/inference.json").write_text(json.dumps(parts))
    found = {}
    for folder in (original, morse):
        run(name, folder, ["inference"], "infer", data, tmp_path / folder.name)
        found[folder] = {p.name: nib.load(p) for p in sorted((tmp_path / folder.name).rglob("*.nii.gz"))}
    assert len(found[morse]) == 2 and found[original].keys() == found[morse].keys()
    for file, image in found[original].items():
        twin = found[morse][file]
        assert np.array_equal(image.dataobj, twin.dataobj) and np.array_equal(image.affine, twin.affine)
    assert len(np.unique(image.dataobj)) > 1


def test_trains_whole_or_the_morse_part_alone_and_is_evaluated(wrapped, data, tmp_path):
    name, _, morse, _ = wrapped
    before = torch.load(morse / "models/model.pt", weights_only=True)
    for frozen in (False, True):
        out = tmp_path / str(frozen)
        words = {"ckpt_dir": str(out), "freeze_backbone": str(frozen).lower()}  # as typed
        trainer = run(name, morse, ["train"], "train", data, out, **words).parser
        engine = trainer.get_parsed_content("train#trainer")
        assert engine.state.metrics and 0 <= next(iter(engine.state.metrics.values())) <= 1  # the original's training metric
        after = torch.load(out / "model.pt", weights_only=True)
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert before.keys() == after.keys()
        assert any(k.startswith("renderer.") for k in changed)
        assert any(k.startswith(BACKBONE) for k in changed) != frozen
    evaluation = run(name, morse, ["train", "evaluate"], "train", data, tmp_path / "scores", ckpt_dir=str(out))
    assert 0 <= evaluation.parser.get_parsed_content("validate#evaluator").state.metrics["val_mean_dice"] <= 1
    assert any((tmp_path / "scores").rglob("*.csv"))


def test_the_bundle_keeps_its_form(wrapped):
    name, original, morse, report = wrapped
    kept = {p.name for p in (original / "configs").iterdir()} - {"inference_trt.json"}
    assert {p.name for p in (morse / "configs").iterdir()} == kept
    for file in kept:  # JSON stays JSON, YAML stays YAML
        text = (morse / "configs" / file).read_text()
        json.loads(text) if file.endswith("json") else pytest.raises(ValueError, json.loads, text)
    old, new = (json.loads((f / "configs/metadata.json").read_text()) for f in (original, morse))
    assert new["version"] == "0.6.0" == next(iter(new["changelog"])) and old["changelog"].items() < new["changelog"].items()
    assert new["network_data_format"] == old["network_data_format"] and "monai_morse" in new["required_packages_version"]
    assert (morse / "LICENSE").read_text() == "Apache-2.0"
    readme = (morse / "docs/README.md").read_text()
    assert readme.startswith("# A bundle\n") and "`--freeze_backbone true`" in readme
    assert not (morse / "large_files.yml").exists()
    assert "large_files.yml: left out" in str(report)
    assert not any(p.name.startswith(".partial") for p in morse.parent.iterdir())
    for part in ("preprocessing", "inferer", "postprocessing"):
        before, after = (ConfigParser.load_config_file(f / "configs" / config(f, "inference")) for f in (original, morse))
        assert before[part] == after[part]


def test_each_bundles_own_matters(wrapped):
    name, original, morse, report = wrapped
    configs = {p.name: ConfigParser.load_config_file(p) for p in (morse / "configs").iterdir()}
    text = str(report)
    if name == "spleen":
        small = torch.load(morse / "models/small.pt", weights_only=True)["state_dict"]
        parser = ConfigParser(configs["inference_small.json"])
        parser.get_parsed_content("network_def").load_state_dict(small)
        assert "inference_trt.json: left out" in text and "models/model.ts: left out" in text
        multi_gpu = configs["multi_gpu_train.json"]
        assert multi_gpu["network"]["find_unused_parameters"] is True
        assert "train#handlers#5#_disabled_" in multi_gpu  # two come before what was #3
    if name == "swin_unetr":
        assert "took out img_size" in text
    if name == "whole_body":
        lowres = torch.load(morse / "models/model_lowres.pt", weights_only=True)
        own = torch.load(original / "models/model_lowres.pt", weights_only=True)
        assert all(torch.equal(lowres[BACKBONE + k], v) for k, v in own.items()) and len(lowres) > len(own)
    if name == "brats":
        assert configs["inference.json"]["network_def"] == "%configs/train.json#network_def"  # it is a Morse already
        assert configs["train.json"]["network_def"]["points"] == {"multilabel": True}
        assert configs["train.json"]["network_def"]["num_experts"] == 2  # it has no more decoder features
        assert configs["train.json"]["loss"]["multilabel"] is True
    else:
        assert "multilabel" not in json.dumps(configs)
    if name == "parts":
        assert "common.yaml: its comments are not kept" in text and "heads of deep supervision are not trained" in text
        assert set(configs["wide.yaml"]) == {"network_def#backbone#filters", "lossfn#loss#loss#batch"}
        assert configs["train.yaml"]["train#trainer"]["prepare_batch"]["prepare"] == "$prepare_batch"
        parser = ConfigParser()
        parser.read_config([str(morse / "configs" / f) for f in ("common.yaml", "train.yaml", "wide.yaml")])
        assert parser.get_parsed_content("squared") is True
        assert parser.get_parsed_content("network_def").decoder.backbone.filters == [8, 8, 8]
    else:
        assert text.count("\n  - ") == {"spleen": 3}.get(name, 1)


def test_an_archive_is_wrapped_by_command_and_the_same_bundle_gives_the_same_bytes(tmp_path, capsys):
    bundle = write_bundle("spleen", tmp_path / "zoo" / "spleen")
    shutil.make_archive(str(tmp_path / "spleen"), "zip", tmp_path / "zoo")
    for out, source in (("a", tmp_path / "spleen.zip"), ("b", bundle)):
        assert main(["wrap", "--bundle", str(source), "--out", str(tmp_path / out)]) == 0
    assert "not converted:\n  - configs/inference_trt.json" in capsys.readouterr().out
    states = [torch.load(tmp_path / out / "models/model.pt", weights_only=True) for out in "ab"]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert main(["wrap", "--bundle", str(bundle), "--out", str(tmp_path / "a")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path):
    for i, entry in enumerate(("../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "..\\evil.txt")):
        with zipfile.ZipFile(tmp_path / f"{i}.zip", "w") as archive:
            archive.writestr("bundle/configs/train.json", "{}")
            archive.writestr(entry, "evil")
        with pytest.raises(InputError, match="evil.txt.*not unpacked"):
            wrap_bundle(tmp_path / f"{i}.zip", tmp_path / "out")
    link = zipfile.ZipInfo("bundle/models")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(InputError, match="models.*not unpacked"):
        wrap_bundle(tmp_path / "link.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil.txt").exists()


def change(file, **values):
    def edit(bundle):
        path = bundle / "configs" / file
        parts = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in parts.items() if v is not None}))

    return edit


def no_networks(bundle):
    for file in ("train.json", "inference.json", "inference_small.json", "inference_trt.json"):
        change(file, network_def=None)(bundle)


def other_weights(bundle):
    state = torch.load(bundle / "models/model.pt", weights_only=True)
    torch.save({k: v for i, (k, v) in enumerate(state.items()) if i}, bundle / "models/model.pt")


def pickled_network(bundle):
    torch.save(original_network("spleen", bundle), bundle / "models/model.pt")


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Noisy(UNet):
    """Random in eval mode, so that no two predictions are equal."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noise = Noise()

    def forward(self, x):
        return self.noise(super().forward(x))


def wrap_in_place(bundle):
    wrap_bundle(bundle, bundle.parent / "twice")
    shutil.rmtree(bundle)
    (bundle.parent / "twice").rename(bundle)


def noisy(bundle):
    unet = json.loads((bundle / "configs/train.json").read_text())["network_def"]
    change("train.json", network_def={**unet, "_target_": "test_wrap.Noisy"})(bundle)


ERRORS = {
    "no configs": (lambda b: shutil.rmtree(b / "configs"), "is no bundle: it has no folder `configs`"),
    "no network_def": (no_networks, "no `network_def` in .*train.json.*nothing to wrap"),
    "unreadable config": (lambda b: (b / "configs/train.json").write_text("{"), "train.json cannot be read"),
    "unknown class": (change("train.json", network_def={"_target_": "UNetX"}), "configs/train.json cannot .*UNetX"),
    "unknown features": (
        change("inference.json", network_def={"_target_": "DenseNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2}),
        "configs/inference.json cannot be wrapped: the decoder features of DenseNet are not known.*--decoder NAME",
    ),
    "weights of another network": (other_weights, "models/model.pt is no checkpoint of `network_def`.*1 new"),
    "a MORSE bundle": (wrap_in_place, "configs/inference.json cannot be wrapped: it is a Morse already"),
    "random in eval mode": (noisy, "configs/train.json does not predict what the original does.*random in eval mode"),
    "weights that could run code": (pickled_network, "model.pt holds a .*UNet, which is not read, for it could run code"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_wrapped_is_an_error_and_nothing_is_written(name, tmp_path):
    spoil, message = ERRORS[name]
    bundle = write_bundle("spleen", tmp_path / "original")
    spoil(bundle)
    with pytest.raises(InputError, match=message):
        wrap_bundle(bundle, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_other_networks_and_trainers_are_wrapped_as_far_as_they_go(tmp_path):
    """Features named by the caller, a trainer of another kind, handlers by an expression, no weights, no metadata."""
    bundle = write_bundle("spleen", tmp_path / "original")
    (bundle / "configs/metadata.json").unlink()
    (bundle / "models/model.pt").unlink()
    (bundle / "configs/inference_small.json").unlink()
    train = json.loads((bundle / "configs/train.json").read_text())
    train["train"]["trainer"]["train_handlers"] = "$@train#handlers[:2]"
    train["other"] = {"_target_": "scripts.OtherTrainer", "network": "@network"}
    train["stem"] = "$@network.model"
    (bundle / "configs/train.json").write_text(json.dumps(train))
    names = ["model.1.submodule.2", "model.2"]
    report = str(wrap_bundle(bundle, tmp_path / "out", decoder=names))
    for line in (
        "other, a scripts.OtherTrainer, stays as it is",
        "no models/model.pt",
        "metadata.json: there is none",
        ".model",
    ):
        assert line in report, report
    written = json.loads((tmp_path / "out/configs/train.json").read_text())
    outer, inner = written["network_def"], written["network_def"]["backbone"]
    assert outer["_target_"].endswith(".Morse") and inner["_target_"].endswith(".DecoderFeatures") and inner["names"] == names
    assert written["train"]["trainer"]["train_handlers"] == "$@morse_handlers + list(@train#handlers[:2])"
    kinds = [h["_target_"].split(".")[-1] for h in written["morse_handlers"]]
    assert kinds == ["CoarsePrediction"] and "freeze_backbone" not in written  # nothing to load
    parser = ConfigParser(written)
    assert isinstance(parser.get_parsed_content("network_def"), Morse)
    assert len(parser.get_parsed_content("morse_handlers")) == 1


def test_a_word_of_the_bundle_keeps_its_meaning(tmp_path):
    bundle = write_bundle("spleen", tmp_path / "original")
    change("train.json", freeze_backbone="theirs")(bundle)
    wrap_bundle(bundle, tmp_path / "out")
    written = json.loads((tmp_path / "out/configs/train.json").read_text())
    assert written["freeze_backbone"] == "theirs" and written["morse_freeze_backbone"] is False
    assert written["train"]["handlers"][0]["freeze_backbone"] == "@morse_freeze_backbone"
    assert "`--morse_freeze_backbone true`" in (tmp_path / "out/docs/README.md").read_text()


def test_out_must_be_elsewhere_and_an_empty_folder_will_do(tmp_path):
    bundle = write_bundle("spleen", tmp_path / "original")
    with pytest.raises(InputError, match="lies inside the bundle"):
        wrap_bundle(bundle, bundle / "morse")
    with pytest.raises(InputError, match="no bundle at .*nowhere"):
        wrap_bundle(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "out").mkdir()
    wrap_bundle(bundle, tmp_path / "out")
    assert (tmp_path / "out/models/model.pt").is_file() and os.listdir(bundle / "configs")
    yaml.safe_load((tmp_path / "out/configs/train.json").read_text())
