"""Bundles with the structure of the model zoo's, tiny and with random weights, to be wrapped.

Keys, transforms, handlers and files are laid out as in ``spleen_ct_segmentation``, ``swin_unetr_btcv_segmentation``,
``wholeBody_ct_segmentation`` and ``brats_mri_segmentation``; ``parts`` is a YAML bundle that uses what configs allow besides.
"""

import json

import torch
import yaml
from monai.bundle import ConfigParser
from monai.networks.nets import UNet

BOTH = ["image", "label"]
FROM_PRED = "$monai.handlers.from_engine(['pred', 'label'])"
FROM_LOSS = "$monai.handlers.from_engine(['loss'], first=True)"
SOFTMAX = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True, "squared_pred": True, "batch": True}


def loading(keys, spacing="@pixdim"):
    mode = ["bilinear", "nearest"] if keys == BOTH else "bilinear"
    return [
        {"_target_": "LoadImaged", "keys": keys},
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": keys, "pixdim": spacing, "mode": mode},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 200, "b_min": 0, "b_max": 1},
        {"_target_": "EnsureTyped", "keys": keys},
    ]


def labels_and_pred(classes):
    return [
        {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": classes},
    ]


def compose(transforms):
    return {"_target_": "Compose", "transforms": transforms}


def train_config(network, classes, roi, loss=SOFTMAX, **changes):
    cropping = {"_target_": "RandSpatialCropd", "keys": BOTH, "roi_size": roi, "random_size": False}
    stats = {"_target_": "StatsHandler", "tag_name": "train_loss", "output_transform": FROM_LOSS}
    mean_dice = {"_target_": "MeanDice", "include_background": False, "output_transform": FROM_PRED}
    saver = {"_target_": "CheckpointSaver", "save_dir": "@ckpt_dir", "save_dict": {"model": "@network"}}
    return {
        "imports": ["$import glob", "$import os", "$import ignite"],
        "bundle_root": ".",
        "ckpt_dir": "$@bundle_root + '/models'",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data",
        "images": "$list(sorted(glob.glob(@dataset_dir + '/imagesTr/*.nii.gz')))",
        "labels": "$list(sorted(glob.glob(@dataset_dir + '/labelsTr/*.nii.gz')))",
        "pixdim": [1.5, 1.5, 2.0],
        "val_interval": 1,
        "epochs": 1,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "loss": loss,
        "optimizer": {"_target_": "Novograd", "params": "$@network.parameters()", "lr": 0.002},
        "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "optimizer": "@optimizer", "step_size": 5},
        "train": {
            "deterministic_transforms": loading(BOTH),
            "random_transforms": [{"_target_": "SpatialPadd", "keys": BOTH, "spatial_size": roi}, cropping],
            "preprocessing": compose("$@train#deterministic_transforms + @train#random_transforms"),
            "dataset": {
                "_target_": "CacheDataset",
                "data": "$[{'image': i, 'label': l} for i, l in zip(@images[:-4], @labels[:-4])]",
                "transform": "@train#preprocessing",
            },
            "dataloader": {"_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 1, "shuffle": True},
            "inferer": {"_target_": "SimpleInferer"},
            "postprocessing": compose(labels_and_pred(classes)),
            "handlers": [
                {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": True},
                {"_target_": "ValidationHandler", "validator": "@validate#evaluator", "interval": "@val_interval"},
                stats,
                {"_target_": "StatsHandler", "iteration_log": False},
            ],
            "key_metric": {"train_accuracy": {"_target_": "ignite.metrics.Accuracy", "output_transform": FROM_PRED}},
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "loss_function": "@loss",
                "optimizer": "@optimizer",
                "inferer": "@train#inferer",
                "postprocessing": "@train#postprocessing",
                "key_train_metric": "@train#key_metric",
                "train_handlers": "@train#handlers",
            },
        },
        "validate": {
            "preprocessing": compose("%train#deterministic_transforms"),
            "dataset": {
                "_target_": "CacheDataset",
                "data": "$[{'image': i, 'label': l} for i, l in zip(@images[-1:], @labels[-1:])]",
                "transform": "@validate#preprocessing",
            },
            "dataloader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": 1},
            "inferer": {"_target_": "SlidingWindowInferer", "roi_size": roi, "sw_batch_size": 1, "overlap": 0.25},
            "postprocessing": "%train#postprocessing",
            "handlers": [
                {"_target_": "StatsHandler", "iteration_log": False},
                {**saver, "save_key_metric": True, "key_metric_filename": "model.pt"},
            ],
            "key_metric": {"val_mean_dice": mean_dice},
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@validate#dataloader",
                "network": "@network",
                "inferer": "@validate#inferer",
                "postprocessing": "@validate#postprocessing",
                "key_val_metric": "@validate#key_metric",
                "val_handlers": "@validate#handlers",
            },
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
        **changes,
    }


def inference_config(network, roi, **changes):
    back = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
    saving = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "trans"}
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTr/*.nii.gz')))[:2]",
        "pixdim": [1.5, 1.5, 2.0],
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": compose(loading("image")),
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": roi, "sw_batch_size": 4, "overlap": 0.5},
        "postprocessing": compose(
            [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {**back, "nearest_interp": False, "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                saving,
            ]
        ),
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "initialize": ["$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
        **changes,
    }


def evaluate_config(metrics=("val_mean_dice",), **changes):
    loader = {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"model": "@network"}}
    saver = {"_target_": "MetricsSaver", "save_dir": "@output_dir", "metrics": list(metrics), "summary_ops": "*"}
    return {
        "validate#handlers": [loader, {"_target_": "StatsHandler", "iteration_log": False}, saver],
        "run": ["$@validate#evaluator.run()"],
        **changes,
    }


MULTI_GPU = {
    "device": "$torch.device('cuda:' + os.environ['LOCAL_RANK'])",
    "network": {
        "_target_": "torch.nn.parallel.DistributedDataParallel",
        "module": "$@network_def.to(@device)",
        "device_ids": ["@device"],
    },
    "train#trainer#train_handlers": "$@train#handlers[: -2 if dist.get_rank() > 0 else None]",
    "train#handlers#3#_disabled_": "$dist.get_rank() > 0",
    "initialize": ["$import torch.distributed as dist"],
}
TENSORRT = {"network_def": "$torch.jit.load(@bundle_root + '/models/model_trt.ts')", "evaluator#amp": False}


def metadata(channels, classes, roi):
    image = {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": channels, "spatial_shape": roi}
    pred = {"type": "image", "format": "segmentation", "num_channels": classes, "spatial_shape": roi}
    common = {"dtype": "float32", "value_range": [0, 1], "is_patch_data": True}
    return {
        "version": "0.5.9",
        "changelog": {"0.5.9": "update to use monai 1.4", "0.0.1": "initialize"},
        "monai_version": "1.4.0",
        "pytorch_version": "2.4.0",
        "numpy_version": "1.24.4",
        "optional_packages_version": {"nibabel": "5.2.1", "pytorch-ignite": "0.4.11"},
        "task": "segmentation",
        "description": "tiny",
        "authors": "test",
        "copyright": "test",
        "network_data_format": {
            "inputs": {"image": {**image, **common, "channel_def": {str(i): "image" for i in range(channels)}}},
            "outputs": {"pred": {**pred, **common, "channel_def": {str(i): f"class {i}" for i in range(classes)}}},
        },
    }


def spleen():
    unet = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 8, 8]}
    unet |= {"strides": [2, 2, 2], "num_res_units": 2, "norm": "batch"}
    return {
        "train.json": train_config(unet, 3, [16, 16, 16]),
        "inference.json": inference_config(unet, [16, 16, 16]),
        "inference_trt.json": TENSORRT,
        "inference_small.json": inference_config({**unet, "channels": [4, 8], "strides": [2]}, [16, 16, 16]),
        "evaluate.json": evaluate_config(),
        "multi_gpu_train.json": MULTI_GPU,
        "metadata.json": metadata(1, 3, [16, 16, 16]),
    }


def swin_unetr():
    swin = {"_target_": "SwinUNETR", "spatial_dims": 3, "img_size": 64, "in_channels": 1, "out_channels": 3}
    swin |= {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    roi = [64, 64, 64]
    adam = {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 2e-4}
    return {
        "train.json": train_config({**swin, "use_checkpoint": True}, 3, roi, optimizer=adam),
        "inference.json": inference_config(
            {**swin, "use_checkpoint": False}, roi, checkpoint="$@bundle_root + '/models/model.pt'"
        ),
        "evaluate.json": evaluate_config(),
        "metadata.json": metadata(1, 3, roi),
    }


def whole_body():
    segresnet = {"_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "init_filters": 8}
    segresnet |= {"blocks_down": [1, 1, 1], "blocks_up": [1, 1], "dropout_prob": 0.2}
    highres = {
        "displayable_configs": {"highres": True},
        "pixdim": "$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        "modelname": "$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
    }
    inference = inference_config(segresnet, [16, 16, 16], **highres)
    inference["checkpointloader"]["load_path"] = "$@bundle_root + '/models/' + @modelname"
    loss = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}
    return {
        "train.json": train_config(segresnet, 3, [16, 16, 16], loss, **highres),
        "inference.json": inference,
        "evaluate.json": evaluate_config(),
        "metadata.json": metadata(1, 3, [16, 16, 16]),
    }


def brats():
    """Four channels in, three nested regions out, a sigmoid each; the scans come from a list."""
    segresnet = {"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8}
    segresnet |= {"in_channels": 4, "out_channels": 3, "dropout_prob": 0.2}
    image = {"_target_": "LoadImaged", "keys": "image", "image_only": False}
    copies = {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x[None].repeat(4, 1, 1, 1)"}
    norm = {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True}
    regions = {"_target_": "ConvertToMultiChannelBasedOnBratsClassesd", "keys": "label"}
    sigmoid = [
        {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
        {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
    ]
    split = {"_target_": "SplitDimd", "keys": ["pred", "label"], "output_postfixes": ["tc", "wt", "et"]}
    loss = {"_target_": "DiceLoss", "smooth_nr": 0, "squared_pred": True, "to_onehot_y": False, "sigmoid": True}
    train = train_config(segresnet, 3, [16, 16, 16], loss, amp=False)
    train["train"]["deterministic_transforms"] = [{**image, "keys": BOTH}, copies, regions, norm]
    train["train"]["postprocessing"] = compose(sigmoid)
    train["validate"]["postprocessing"] = compose([*sigmoid, split])
    dice = {"_target_": "MeanDice", "include_background": True}
    train["train"]["key_metric"] = {"train_mean_dice": {**dice, "output_transform": FROM_PRED}}
    train["validate"]["additional_metrics"] = {
        "val_mean_dice_tc": {**dice, "output_transform": "$monai.handlers.from_engine(['pred_tc', 'label_tc'])"}
    }
    train["validate"]["evaluator"]["additional_metrics"] = "@validate#additional_metrics"
    train["data_list_file_path"] = "$@bundle_root + '/configs/datalist.json'"
    listed = "$monai.data.load_decathlon_datalist(@data_list_file_path, data_list_key='{}', base_dir=@dataset_dir)"
    train["train"]["dataset"]["data"] = listed.format("training")
    train["validate"]["dataset"]["data"] = listed.format("validation")
    inference = inference_config("%configs/train.json#network_def", [16, 16, 16])
    inference["preprocessing"] = compose([image, copies, norm])
    classes = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"
    saving = inference["postprocessing"]["transforms"][-1]
    inference["postprocessing"] = compose([*sigmoid, {"_target_": "Lambdad", "keys": "pred", "func": classes}, saving])
    cases = [{"image": f"imagesTr/case_{i}.nii.gz", "label": f"labelsTr/case_{i}.nii.gz"} for i in range(3)]
    return {
        "train.json": train,
        "inference.json": inference,
        "evaluate.json": evaluate_config(["val_mean_dice", "val_mean_dice_tc"]),
        "datalist.json": {"training": cases[:2], "validation": cases[2:]},
        "metadata.json": metadata(4, 3, [16, 16, 16]),
    }


PREPARE = """
def prepare_batch(batchdata, device, non_blocking, **kwargs):
    return batchdata["image"].to(device), batchdata["label"].to(device)
"""


def parts():
    """YAML in parts: names of its own, relative references, references into what gets nested, code in ``scripts``."""
    network = {"_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@num_classes"}
    network |= {"filters": [4, 8, 8], "kernel_size": [3, 3, 3], "strides": [1, 2, 2]}
    network |= {"upsample_kernel_size": "$@#strides[1:]"}
    network |= {"norm_name": "@##norm", "deep_supervision": True, "deep_supr_num": 1}
    common = {"num_classes": 3, "norm": "INSTANCE", "network_def": network}
    train = train_config(None, 3, [16, 16, 16])
    del train["network_def"], train["loss"]
    train["lossfn"] = {"_target_": "DeepSupervisionLoss", "loss": SOFTMAX}
    train["squared"] = "$@lossfn#loss#squared_pred and len(@network_def#filters) == 3"
    train["train#trainer"] = train["train"].pop("trainer")
    train["train#trainer"]["loss_function"] = "@lossfn"
    train["train#trainer"]["prepare_batch"] = "$prepare_batch"
    train["imports"] = [*train["imports"], "$from scripts.prepare import prepare_batch"]
    train["train#trainer"]["train_handlers"] = "$@train#handlers[:3]"
    inference = inference_config(None, [16, 16, 16])
    del inference["network_def"]
    return {
        "common.yaml": common,
        "train.yaml": train,
        "wide.yaml": {"network_def#filters": [8, 8, 8], "lossfn#loss#batch": False},
        "inference.yaml": inference,
        "evaluate.yaml": evaluate_config(),
        "metadata.json": metadata(1, 3, [16, 16, 16]),
    }


BUNDLES = {"spleen": spleen, "swin_unetr": swin_unetr, "whole_body": whole_body, "brats": brats, "parts": parts}


def first(name, config):
    """The config files of a run: what lies under ``config``, if anything, and itself."""
    return (["common.yaml"] if name == "parts" else []) + [config]


def write_bundle(name, folder):
    """A bundle with random weights, as it would come from the zoo."""
    for part in ("configs", "models", "docs", "scripts"):
        (folder / part).mkdir(parents=True)
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "docs" / "README.md").write_text("# A bundle\n")
    (folder / "large_files.yml").write_text("large_files: []\n")
    (folder / "scripts" / "__init__.py").write_text("")
    (folder / "scripts" / "prepare.py").write_text(PREPARE)
    for file, config in BUNDLES[name]().items():
        text = json.dumps(config, indent=4) if file.endswith("json") else "# a comment\n" + yaml.safe_dump(config)
        (folder / "configs" / file).write_text(text)
    torch.manual_seed(7)
    torch.save(original_network(name, folder).state_dict(), folder / "models" / "model.pt")
    if name == "whole_body":
        torch.save(original_network(name, folder).state_dict(), folder / "models" / "model_lowres.pt")
    if name == "spleen":  # of a second network
        state = original_network(name, folder, "inference_small.json").state_dict()
        torch.save({"state_dict": state, "epoch": 3}, folder / "models" / "small.pt")
        torch.jit.save(torch.jit.script(UNet(2, 1, 1, [4, 4], [2])), folder / "models" / "model.ts")
    return folder


def original_network(name, folder, config=None):
    """The original's network, with batch statistics that are not those of a new one."""
    parser = ConfigParser()
    config = config or ("train.yaml" if name == "parts" else "train.json")
    parser.read_config([str(folder / "configs" / f) for f in first(name, config)])
    if name == "swin_unetr":
        del parser["network_def"]["img_size"]
    network = parser.get_parsed_content("network_def")
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.uniform_(-1, 1)
    return network
