"""From the shipped hippocampus weights to another task, by ``configs/finetune.yaml``: what is loaded, what is trained."""

import logging
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, write_msd
from monai.bundle import ConfigWorkflow
from warm import bundle_run, run_module

from monai_morse.errors import find_input_error

BUNDLE = ROOT / "bundles" / "hippocampus_mri_morse"
CONFIGS = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "finetune")]
TINY = {"patch_size": [16, 16, 16], "num_folds": 3, "val_interval": 1, "max_epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One class, two channels or one."""
    folder = tmp_path_factory.mktemp("finetune")
    one = write_msd(folder / "one", classes=("lesion",))
    two = write_msd(folder / "two", classes=("lesion",))
    for path in (two / "imagesTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.stack([image.get_fdata(dtype=np.float32)] * 2, -1), image.affine), path)
    return {1: one, 2: two}


def finetune(data, out, **words):
    words = {"bundle_root": str(BUNDLE), "ckpt_dir": str(out), "class_names": ["lesion"], **TINY, **words}
    words["dataset_dir"] = str(data[words.get("in_channels", 1)])
    workflow = ConfigWorkflow(CONFIGS, workflow_type="train", logging_file=False, meta_file=None, **words)
    workflow.initialize()
    workflow.run()
    return workflow.parser


OTHERS = {  # what differs: (options, entries of the network that are new)
    "classes": ({}, {"decoder.backbone.output_block.conv.conv.weight", "decoder.backbone.output_block.conv.conv.bias"}),
    "channels": ({"in_channels": 2}, {"decoder.backbone.input_block.conv1.conv.weight"}),
    "experts": ({"num_experts": 2}, {"mixture.experts.0.layers.0.weight", "mixture.gate.9.weight"}),
    "width": ({"width": 8}, {"renderer.mlp.layers.0.weight"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_task_starts_from_what_matches_and_learns_the_rest(name, data, tmp_path, caplog):
    options, new = OTHERS[name]
    with caplog.at_level(logging.INFO, "monai_morse"):
        parser = finetune(data, tmp_path, **options)
    loaded = parser.get_parsed_content("loaded")
    assert str(loaded) in caplog.text and "of another shape" in caplog.text
    assert new <= set(loaded.new) and len(loaded.matched) > 50
    state = parser.get_parsed_content("network").state_dict()
    assert torch.load(tmp_path / "model.pt", weights_only=True).keys() == state.keys()


def test_a_frozen_backbone_keeps_its_weights_and_learns_what_it_lacks(data, tmp_path):
    parser = finetune(data, tmp_path, freeze_backbone="true")
    after, shipped = (torch.load(p, weights_only=True) for p in (tmp_path / "model.pt", BUNDLE / "models/model.pt"))
    matched = parser.get_parsed_content("loaded").matched
    changed = {k.split(".")[0] for k in matched if not torch.equal(after[k], shipped[k])}
    assert changed == {"mixture", "renderer"}
    head = {n for n in parser.get_parsed_content("loaded").new if n.startswith("decoder.")}
    assert head == {k for k in after if k.startswith("decoder.backbone.output_block")}
    trained = {id(p) for p in parser.get_parsed_content("optimizer").state}
    names = {n for n, p in parser.get_parsed_content("network").named_parameters() if id(p) in trained}
    assert head == {n for n in names if n.startswith("decoder.")}


def test_the_backbone_learns_slower_and_a_fine_tuning_resumes(data, tmp_path):
    for epochs, resume in ((1, False), (2, True)):
        parser = finetune(data, tmp_path, backbone_rate=0.1, max_epochs=epochs, resume=resume)
        slow, rest = parser.get_parsed_content("optimizer").param_groups
        assert slow["initial_lr"] == pytest.approx(0.1 * rest["initial_lr"])
    names = {id(p): n for n, p in parser.get_parsed_content("network").named_parameters()}
    assert {names[id(p)] for p in slow["params"]} <= set(parser.get_parsed_content("loaded").matched)
    assert all(names[id(p)].startswith("decoder.") for p in slow["params"])
    assert torch.load(tmp_path / "model_last.pt", weights_only=True)["epoch"] == 2


def test_what_does_not_match_at_all_is_an_error(data, tmp_path):
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for file, message in (("other.pt", "nothing in .*other.pt matches"), ("no.pt", "no checkpoint at .*no.pt")):
        with pytest.raises(Exception) as caught:
            finetune(data, tmp_path / "out", finetune_from=str(tmp_path / file))
        assert re.search(message, str(find_input_error(caught.value)))
    assert not (tmp_path / "out" / "model.pt").exists()


def test_the_command_of_the_docs_trains_and_its_weights_segment(data, tmp_path):
    def run(config, **options):
        done = run_module(*bundle_run(config, bundle_root=".", patch_size="[16,16,16]", **options), cwd=BUNDLE)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    both = "['configs/train.yaml','configs/finetune.yaml']"
    options = {"finetune_from": "models/model.pt", "class_names": "['lesion']", "num_folds": 3, "max_epochs": 1}
    log = run(both, dataset_dir=data[1], ckpt_dir=tmp_path, **options)
    assert "models/model.pt: 125 of 129 entries loaded; 4 new (output_block, renderer)" in log
    scan = data[1] / "imagesTr/case_0.nii.gz"
    words = {"weights": tmp_path / "model.pt", "class_names": options["class_names"]}
    run("configs/inference.yaml", dataset_dir=scan, output_dir=tmp_path / "out", **words)
    assert set(np.unique(nib.load(tmp_path / "out/case_0_seg.nii.gz").dataobj)) <= {0, 1}
