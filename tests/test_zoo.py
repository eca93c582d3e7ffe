"""What the model zoo's CI asks of a bundle, offline: its ci/verify_bundle.py and unit tests, with random scans; exports too."""

import copy
import csv
import json
import re
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, write_msd
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    create_workflow,
    load,
    onnx_export,
    verify_metadata,
    verify_net_in_out,
)
from monai.data import MetaTensor, load_net_with_metadata
from monai.transforms import Compose, SaveImaged
from test_exports import import_onnxruntime
from warm import TORCHRUN, bundle_run, run_module

from monai_morse import Morse
from monai_morse.data import msd_cases
from monai_morse.handlers import training

BUNDLE = ROOT / "bundles" / "hippocampus_mri_morse"
CONFIGS, WEIGHTS = BUNDLE / "configs", BUNDLE / "models" / "model.pt"
META = json.loads((CONFIGS / "metadata.json").read_text())
FILES = {"config_file": str(CONFIGS / "inference.yaml"), "meta_file": str(CONFIGS / "metadata.json")}
WINDOW = META["network_data_format"]["inputs"]["image"]["spatial_shape"]
TINY = {"patch_size": [16, 16, 16], "num_folds": 3, "val_interval": 1}

TEXT = dict.fromkeys(("version", "monai_version", "pytorch_version", "numpy_version"), str)
REQUIRED = {**TEXT, "changelog": dict, "required_packages_version": dict, "network_data_format": dict, "supported_apps": dict}
REQUIRED |= dict.fromkeys(("schema", "name", "task", "description", "authors", "copyright", "intended_use"), str)
TENSOR = {"num_channels": int, "spatial_shape": list, "value_range": list, "is_patch_data": bool, "channel_def": dict}
TENSOR |= dict.fromkeys(("type", "format", "modality", "dtype"), str)


@pytest.fixture(scope="module")
def random_scans(tmp_path_factory):
    """As the zoo's unit tests: noise of type int8, random labels."""
    folder = write_msd(tmp_path_factory.mktemp("zoo") / "data", cases=9)
    rng = np.random.default_rng(0)
    for case in msd_cases(folder, "all"):
        for path, high in ((case["image"], 127), (case["label"], 3)):
            nib.save(nib.Nifti1Image(rng.integers(0, high, (24, 20, 18), dtype=np.int8), np.eye(4)), path)
    return folder


def network():
    parser = ConfigParser()
    parser.read_config(FILES["config_file"])
    return parser.get_parsed_content("network_def")


@pytest.fixture
def shipped():
    net = network()
    net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return net.eval()


def test_the_files_that_a_bundle_must_have():
    for file in ("LICENSE", "configs/metadata.json", "configs/inference.yaml", "configs/logging.conf", "models/model.pt"):
        assert (BUNDLE / file).is_file(), file
    suffixes = {p.stem: p.suffix for p in CONFIGS.iterdir()}
    assert len(suffixes) == len(list(CONFIGS.iterdir()))  # no config as YAML and as JSON, of which one would be read


def test_metadata_has_what_the_specification_requires():
    for name, kind in REQUIRED.items():
        assert isinstance(META[name], kind) and META[name], name
    for group in ("inputs", "outputs"):
        for tensor, description in META["network_data_format"][group].items():
            for name, kind in TENSOR.items():
                if name != "modality" or group == "inputs":
                    assert isinstance(description[name], kind), f"{tensor}: {name}"
            assert len(description["channel_def"]) == description["num_channels"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", META["version"]) and list(META["changelog"])[0] == META["version"]


def test_monais_verify_metadata_passes_with_a_schema_of_these_requirements(tmp_path):
    pytest.importorskip("jsonschema", reason="monai.bundle verify_metadata needs jsonschema: pip install jsonschema")
    words = {str: "string", dict: "object", list: "array", int: "integer", bool: "boolean"}

    def described(keys):
        return {"type": "object", "required": list(keys), "properties": {k: {"type": words[v]} for k, v in keys.items()}}

    tensors = {"additionalProperties": described({k: v for k, v in TENSOR.items() if k != "modality"})}
    schema = described(REQUIRED)
    schema["properties"]["network_data_format"]["properties"] = {"inputs": tensors, "outputs": tensors}
    (tmp_path / "schema.json").write_text(json.dumps(schema))  # found there, nothing is downloaded
    verify_metadata(meta_file=FILES["meta_file"], filepath=tmp_path / "schema.json")
    broken = copy.deepcopy(META)
    del broken["network_data_format"]["outputs"]["pred"]["channel_def"]
    (tmp_path / "metadata.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="channel_def"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=tmp_path / "schema.json")


def test_the_networks_output_is_as_declared():
    verify_net_in_out("network_def", device="cpu", **FILES)
    x = torch.rand(1, 1, *WINDOW)
    assert network().eval()(x).shape == (1, META["network_data_format"]["outputs"]["pred"]["num_channels"], *WINDOW)


@pytest.mark.parametrize("use_trace", [False, True])
def test_ckpt_export_scripts_and_traces(use_trace, shipped, tmp_path):
    ckpt_export("network_def", filepath=str(tmp_path / "model.ts"), ckpt_file=str(WEIGHTS), use_trace=use_trace, **FILES)
    exported, meta, _ = load_net_with_metadata(str(tmp_path / "model.ts"))
    assert meta["version"] == META["version"]
    for x in (torch.rand(1, 1, *WINDOW), torch.rand(2, 1, 32, 32, 32)):
        with torch.no_grad():
            assert (exported(x).argmax(1) == shipped(x).argmax(1)).all()


def test_onnx_export_is_the_same_network_in_onnxruntime(shipped, tmp_path):
    onnxruntime = import_onnxruntime()
    path = str(tmp_path / "model.onnx")
    check = {"verify": True, "use_ort": True, "rtol": 1e-3, "atol": 1e-4}  # MONAI's own; atol would be 0
    onnx_export("network_def", filepath=path, ckpt_file=str(WEIGHTS), converter_kwargs=check, **FILES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.rand(1, 1, *WINDOW)
    with torch.no_grad():
        expected = shipped(x)
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    # which voxel is the last to be rendered may hang on a rounding error, as in tools/portability.py
    assert (found.argmax(1) != expected.argmax(1)).sum() <= 2


def run_here(kind, files, **words):
    """A workflow in this process; its required properties are there."""
    workflow = ConfigWorkflow(
        workflow_type=kind,
        config_file=[str(CONFIGS / f"{f}.yaml") for f in files],
        logging_file=str(CONFIGS / "logging.conf"),
        meta_file=FILES["meta_file"],
        **words,
    )
    workflow.initialize()
    assert not workflow.check_properties(), files
    workflow.run()
    workflow.finalize()


def figures(path):
    """A table of figures but for the seconds."""
    with open(path) as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_train_evaluate_and_infer_run_on_random_scans_with_all_properties(random_scans, tmp_path):
    words = {"bundle_root": str(BUNDLE), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "patch_size": [16, 16, 16]}
    run_here("train", ["train"], **{**words, **TINY}, dataset_dir=str(random_scans), max_epochs=1)
    run_here("train", ["train", "evaluate"], **{**words, **TINY}, dataset_dir=str(random_scans))
    run_here("infer", ["inference"], **words, dataset_dir=str(random_scans / "imagesTr"), weights=str(tmp_path / "model.pt"))
    assert min((p.name for p in tmp_path.glob("*.pt")), key=len) == "model.pt"  # MONAI Label takes the shortest
    assert len(figures(tmp_path / "metrics.csv")) == 2 * 3
    assert len(list(tmp_path.glob("*_seg.nii.gz"))) == 9


@pytest.mark.parametrize("dropout", [None, 0.7])
def test_inference_takes_what_monai_label_does_to_it(dropout, random_scans):
    """A key beside the image; and for epistemic scoring a dropout, whereupon it wants probabilities, not label maps."""
    parser = ConfigParser()
    parser.read_config(FILES["config_file"])
    if dropout:
        parser["network_def"]["dropout"] = dropout
    path = str(random_scans / "imagesTr" / "case_0.nii.gz")
    data = parser.get_parsed_content("preprocessing")({"image": path, "image_path": path})
    assert data["image_path"] == path
    data["pred"] = MetaTensor(torch.randn(3, *data["image"].shape[1:]), meta=data["image"].meta)
    transforms = [t for t in parser.get_parsed_content("postprocessing").transforms if not isinstance(t, SaveImaged)]
    found = Compose(transforms)(data)["pred"]
    if dropout:
        assert torch.allclose(found.sum(0).as_tensor(), torch.ones(24, 20, 18), atol=1e-5)
    else:
        assert found.shape == (1, 24, 20, 18) and set(found.unique().tolist()) == {0, 1, 2}


def processes(files, folder, **words):
    """Two processes: as in the zoo, the configs and what is set in them become one JSON file, run by torchrun; on CPUs here."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{f}.yaml") for f in files])
    parser.update({"bundle_root": str(BUNDLE), **TINY, **words})
    path = folder / f"{files[-1]}.json"
    ConfigParser.export_config_file(parser.config, str(path), indent=4)
    command = bundle_run(path, meta_file=FILES["meta_file"], logging_file=CONFIGS / "logging.conf")
    done = run_module(*TORCHRUN, *command, cwd=ROOT, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_two_processes_train_and_evaluate_as_one_network(random_scans, tmp_path):
    words = {"dataset_dir": str(random_scans), "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), "batch_size": 1}
    run_here("train", ["train"], bundle_root=str(BUNDLE), max_epochs=2, **TINY, **words)
    log = processes(["train", "multi_gpu_train"], tmp_path, max_epochs=5, resume=True, **words)
    assert "resumed from" in log and log.count("-- train_loss: ") == 3  # one process tells
    assert "Iter: 3/3" in log  # 6 cases to train on, 3 for each
    last = torch.load(tmp_path / "model_last.pt", weights_only=True)
    assert last["epoch"] == 5 and last["model"].keys() == network().state_dict().keys()

    words["weights"] = str(tmp_path / "model_last.pt")
    one, two = ({**words, "output_dir": str(tmp_path / name)} for name in ("one", "two"))
    run_here("train", ["train", "evaluate"], bundle_root=str(BUNDLE), **TINY, **one)
    told = processes(["train", "evaluate", "multi_gpu_evaluate"], tmp_path, **two)
    assert "figures of 3 cases in" in told  # uneven: 2 and 1
    rows = figures(tmp_path / "one" / "metrics.csv")
    assert rows == figures(tmp_path / "two" / "metrics.csv") and len(rows) == 6
    mean = np.mean([float(r["dice"]) for r in rows])
    assert float(re.findall(r"val_mean_dice: (\S+)", log)[-1]) == pytest.approx(mean, abs=1e-3)


def test_processes_draw_other_random_numbers(monkeypatch):
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(training.idist, "get_rank", lambda rank=rank: rank)
        engine = training.Engine(lambda engine, batch: drawn.append(torch.rand(4)))
        training.EpochSeed(0).attach(engine)
        engine.run([0], max_epochs=1)
    assert not torch.isclose(*drawn).any()


def test_synced_batch_norm_takes_the_place_of_batch_norm_in_what_is_run():
    from monai.networks.nets import BasicUNet

    net = Morse(BasicUNet(3, 1, 3, features=(4, 4, 8, 16, 32, 4), norm="batch"), num_experts=2).eval()
    x = torch.rand(1, 1, 16, 16, 16)
    expected = net(x)
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert synced is net and not any(isinstance(m, torch.nn.BatchNorm3d) for m in net.modules())
    seen = []
    for module in net.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(net(x), expected) and seen


def test_create_workflow_and_load_give_the_network_with_its_weights(shipped, tmp_path):
    workflow = create_workflow(
        workflow_type="infer", bundle_root=str(BUNDLE), output_dir=str(tmp_path), logging_file=False, **FILES
    )
    net = load(BUNDLE.name, bundle_dir=BUNDLE.parent, model=workflow.network_def, device="cpu").eval()
    x = torch.rand(1, 1, 32, 32, 32)
    assert isinstance(net, Morse) and torch.equal(net(x), shipped(x))


def test_load_without_a_model_still_returns_weights_alone(tmp_path):
    """MONAI looks for configs/train.json. If this fails, MONAI has learned YAML: docs/bundles.md can say so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(BUNDLE.name, bundle_dir=BUNDLE.parent, device="cpu")
    assert not isinstance(found, torch.nn.Module) and found.keys() == network().state_dict().keys()
    assert any("train.json" in str(w.message) for w in caught)
