"""All bundles: what must be the same in their configs is, what differs is listed here, and ``--preset paper`` is the paper."""

import itertools
import re

import pytest
import torch
import yaml
from conftest import ROOT
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from monai_morse.losses import render_weight

BUNDLES = ("hippocampus_mri_morse", "liver_mpmri_morse", "synapse_ct_morse")
FILES = sorted(p for b in BUNDLES for p in (ROOT / "bundles" / b / "configs").glob("*.yaml"))

# What the bundles' configs do not have in common: a task's data, backbones and schedule, and what the shipped weights have.
OWN = {
    "train.yaml": {
        *("imports", "dataset_dir", "class_names", "spacing", "window", "patch_size", "flip_prob", "rot_flip_prob"),
        *("fold", "num_folds", "num_val", "cases", "train_cases", "val_cases", "cache_rate"),
        *("backbone", "backbones", "num_experts", "paper_experts", "pretrained_vit"),
        *("width", "stride", "patch_norm", "eval_points", "coordinates"),
        *("iterations", "epoch_length", "max_epochs", "batch_size", "learning_rate", "val_interval"),
        *("overlap", "sw_batch_size", "validate#inferer#inferer", "validate#inferer#coordinates"),
        *("train#deterministic_transforms", "train#random_transforms", "train#dataset", "train#sampler", "train#dataloader"),
        *("validate#preprocessing", "validate#dataset#cache_rate", "train#trainer#prepare_batch#coordinates"),
        *("train#handlers#7#_disabled_", "train#handlers#8#settings", "train#handlers#9"),  # without cases to validate on
        *("limits", *(f"initialize#{i}" for i in (5, 6, 7))),
    },
    "inference.yaml": {
        *("imports", "dataset_dir", "class_names", "spacing", "window", "patch_size"),
        *("backbone", "backbones", "num_experts", "paper_experts"),
        *("width", "stride", "patch_norm", "eval_points", "coordinates"),
        *("overlap", "sw_batch_size", "inferer#inferer", "inferer#coordinates", "preprocessing#transforms", "limits"),
    },
    "evaluate.yaml": {"split", "eval_cases", "validate#preprocessing#transforms"},
    "multi_gpu_train.yaml": {"train#sampler", *(f"train#dataloader#{n}" for n in ("sampler", "shuffle", "drop_last"))},
    "multi_gpu_evaluate.yaml": set(),
}
# Words that both train.yaml and inference.yaml have, and not for the same.
OWN_OF_INFERENCE = {"imports", "dataset_dir", "output_dir", "alpha", "initialize", "run"}


def load(bundle, *names, **words):
    """The configs of a bundle, the later ones over the first."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "bundles" / bundle / "configs" / f"{n}.yaml") for n in names])
    parser.update(words)
    return parser


def leaves(config, path=""):
    """Everything that a config says: value by path."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    if not items:
        return {path: config}
    return {k: v for name, value in items for k, v in leaves(value, f"{path}#{name}" if path else str(name)).items()}


def within(path, names):
    return next((n for n in names if path == n or path.startswith(f"{n}#")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_a_config_is_read_without_scrolling_sideways_or_long(path):
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= 128
    assert len(lines) <= {"train": 170, "inference": 100}.get(path.stem, 60)


@pytest.mark.parametrize("file", OWN)
def test_bundles_differ_in_what_is_listed_and_in_nothing_else(file):
    said = [leaves(ConfigParser.load_config_file(ROOT / "bundles" / b / "configs" / file)) for b in BUNDLES]
    differing = {path for path in set().union(*said) if len({repr(s.get(path, "nothing")) for s in said}) > 1}
    assert {p for p in differing if not within(p, OWN[file])} == set()
    assert {n for n in OWN[file] if not any(within(p, [n]) for p in differing)} == set(), "listed, and the same in all"


def words_of(path):
    """The lines at a config's left margin, without their comments: with them."""
    lines = [line for line in path.read_text().splitlines() if re.match(r"[a-z_]+:", line)]
    return {re.split(r"\s+# ", line)[0]: line for line in lines}


def test_a_word_of_the_same_value_has_the_same_comment_in_every_bundle():
    for name in ("train", "inference", "evaluate"):
        files = [words_of(ROOT / "bundles" / b / "configs" / f"{name}.yaml") for b in BUNDLES]
        for one, other in itertools.combinations(files, 2):
            own = {"backbone", "patch_size", "ckpt_dir", "dataset_dir", "fold", "batch_size", "val_interval", "in_channels"}
            for word in {w for w in one.keys() & other.keys() if w.split(":")[0] not in own}:
                assert one[word] == other[word]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_evaluation_and_inference_see_the_same_network_and_images(bundle):
    train, evaluate, inference = (load(bundle, *n).get() for n in (["train"], ["train", "evaluate"], ["inference"]))
    for name in train.keys() & inference.keys() - OWN_OF_INFERENCE - {"network_def"}:
        assert train[name] == inference[name], name
    assert inference["alpha"] == 0  # no expert is dropped
    assert inference["network_def"] | {"points": train["network_def"]["points"]} == train["network_def"]
    assert inference["network_def"]["points"].items() <= train["network_def"]["points"].items()
    assert evaluate["validate"]["inferer"] == inference["inferer"]
    assert train["validate"]["inferer"] | {"scale": "@render_scale"} == inference["inferer"]
    # after loading; in training the label is resampled with the image, by the same words
    images = [[t for t in c["preprocessing"]["transforms"] if t["keys"] == "image"] for c in (evaluate["validate"], inference)]
    assert images[0] == images[1][1:]
    trained = {t["_target_"]: t for t in train["train"]["deterministic_transforms"]}
    for transform in inference["preprocessing"]["transforms"][1:]:
        name = transform["_target_"] if transform["_target_"] != "Lambdad" else transform["func"]["_target_"] + "d"
        given = transform if transform["_target_"] != "Lambdad" else transform["func"]
        same = given.keys() & trained[name].keys() - {"_target_", "keys", "mode"}
        assert same and all(given[k] == trained[name][k] for k in same), name


@pytest.mark.parametrize("file", ["multi_gpu_evaluate.yaml", "multi_gpu_inference.yaml", "logging.conf", "../LICENSE"])
def test_what_does_not_depend_on_the_task_is_the_same_file(file):
    assert len({(ROOT / "bundles" / b / "configs" / file).read_text() for b in BUNDLES}) == 1
    assert (ROOT / "bundles" / BUNDLES[0] / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


# Yes or no arrives from a command line as a string: what takes it must read that.
READS_BOOL = {"amp": "MorseInferer", "resume": "TrainingState", "freeze_backbone": "load_matching", "patch_norm": "Morse"}
READS_BOOL |= {"check_data": "usable_cases", "overwrite": "run_cohort"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_a_word_means_on_the_command_line_what_it_means_in_the_file(path):
    text, config = path.read_text(), ConfigParser.load_config_file(path)
    for name, value in config.items():
        if isinstance(value, bool) or name in ("label_maps", "sync_batch_norm"):
            plain = re.sub(rf"parse_bool\(@{name}\)", "", text)
            assert name in READS_BOOL or f"@{name}" not in re.sub(rf"@{name}\w", "", plain), name
        elif value is not None and not isinstance(value, dict) and "$" not in str(value) and "@" not in str(value):
            written = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            assert DefaultParseValue(written) == value, name


def test_null_and_yes_or_no_as_words_build_the_same_network():
    given = {"width": "null", "coarse": "null", "image_patch": "null", "patch_norm": "true"}
    words = load("liver_mpmri_morse", "train", backbone="unet3d", **given).get_parsed_content("network_def")
    values = load("liver_mpmri_morse", "train", backbone="unet3d", patch_norm=True).get_parsed_content("network_def")
    assert str(words.options) == str(values.options)


SYSTEMS = [  # bundle, what lies over train.yaml, backbone, N
    ("hippocampus_mri_morse", [], "dynunet", 3),
    ("hippocampus_mri_morse", ["slices"], "dynunet", 3),
    ("hippocampus_mri_morse", ["slices"], "segresnet", 3),
    ("liver_mpmri_morse", [], "unetr", 3),
    ("liver_mpmri_morse", [], "unet3d", 3),
    ("synapse_ct_morse", [], "unet", 5),
    ("synapse_ct_morse", [], "transunet", 3),
]


@pytest.mark.parametrize("bundle, over, backbone, num_experts", SYSTEMS)
def test_preset_paper_is_the_paper(bundle, over, backbone, num_experts):
    config = load(bundle, "train", *over, preset="paper", backbone=backbone)
    net = config.get_parsed_content("network_def")
    dims = len(config.get_parsed_content("patch_size"))

    # experts: dims [256, 256]; the gate: 3x3(x3) convolutions [256, 256, 256, N] at full resolution; x_out: MLP [256, 256]
    experts = [[layer.out_channels for layer in mlp.layers[::2]] for mlp in net.mixture.experts]
    assert experts == [[256, 256]] * num_experts
    gate = list(net.mixture.gate)
    assert [type(layer).__name__ for layer in gate] == [f"Conv{dims}d", "ReLU"] * 3 + [f"Conv{dims}d"]
    assert [conv.out_channels for conv in gate[::2]] == [256, 256, 256, num_experts]
    assert all(conv.kernel_size == (3,) * dims for conv in gate[::2])
    assert net.mixture.gate_stride == [1] * dims and net.stride == [1] * dims
    assert [layer.out_channels for layer in net.mixture.fuse.layers[::2]] == [256, 256]
    assert [layer.out_channels for layer in net.classifier.layers] == [net.decoder.num_classes]  # coarse logits: of x_out

    # expert dropout, alpha = 0.7: each by itself, survivors scaled
    alpha = 0.7
    counts = net.mixture.dropout.masks.unique().tolist()
    chance = sorted(net.mixture.dropout.chance.tolist())
    assert counts == pytest.approx([0, 1 / (1 - alpha)])
    assert chance == pytest.approx(sorted(alpha ** (num_experts - sum(m)) * (1 - alpha) ** sum(m) for m in masks(num_experts)))
    assert net.options.dropout == alpha and not net.options.mixture["renormalize"]

    # IAR: an MLP of 3 layers on the encoding, L = 128, and x_out, in place of the coarse logits
    head = net.renderer
    assert head.encoding.frequencies.shape == (128, dims) and not head.residual
    assert [layer.out_channels for layer in head.mlp.layers[::2]] == [256, 256, net.decoder.num_classes]
    assert head.mlp.layers[0].in_channels == 2 * 128 + 256  # nothing else is read, no image patch

    # points: N_p = 2048 and 8192, k_p = 3, rho = 0.75
    assert (net.num_train, net.num_eval, net.oversample, net.importance_ratio) == (2048, 8192, 3, 0.75)

    # training: equation 4 with lambda_rend = 0.1, AdamW at 0.0005
    schedule, lambda_rend = (config.get_parsed_content(n) for n in ("schedule", "lambda_rend"))
    assert schedule == "ramp" and lambda_rend == 0.1
    assert [render_weight(t, 100, schedule, lambda_rend) for t in (50, 75, 100)] == pytest.approx([0, 0.025, 0.05])
    optimizer = config.get_parsed_content("optimizer")
    assert type(optimizer) is torch.optim.AdamW and {g["lr"] for g in optimizer.param_groups} == {0.0005}
    assert config.get("lr_scheduler")["_target_"] == "torch.optim.lr_scheduler.PolynomialLR"
    assert config.get_parsed_content("batch_size") == {2: 4, 3: 2}[dims]
    if bundle != "hippocampus_mri_morse":  # whose crops are smaller, and which counts epochs: its comments and README say so
        assert config.get_parsed_content("iterations") == 30000
        assert config.get_parsed_content("patch_size") == {2: [256, 256], 3: [96, 96, 96]}[dims]

    inference = load(bundle, "inference", preset="paper", backbone=backbone)
    inference.update({"patch_size": config.get_parsed_content("patch_size")})
    assert inference.get_parsed_content("network_def").load_state_dict(net.state_dict()).missing_keys == []


def masks(n):
    return list(itertools.product((0, 1), repeat=n))


def test_a_word_given_beside_the_preset_counts():
    words = {"preset": "paper", "width": 8, "coarse": "backbone", "learning_rate": 0.1, "schedule": "half", "eval_points": 9}
    config = load("hippocampus_mri_morse", "train", **words)
    net = config.get_parsed_content("network_def")
    assert (net.mixture.out_channels, net.classifier, net.num_eval) == (8, None, 9)
    assert (config.get_parsed_content("learning_rate"), config.get_parsed_content("schedule")) == (0.1, "half")


@pytest.mark.parametrize("over, size", [([], [40, 56, 40]), (["slices"], [48, 64])])
def test_the_papers_network_takes_what_the_hippocampus_bundle_gives_it(over, size):
    """Slices have fewer pixels than the paper renders."""
    net = load("hippocampus_mri_morse", "train", *over, preset="paper", width=8).get_parsed_content("network_def")
    with torch.no_grad():
        assert net.eval()(torch.rand(1, 1, *size)).shape == (1, 3, *size)
        points = net.train()(torch.rand(1, 1, *size), return_points=True)
    assert points.point_index.shape == (1, 2048)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_backbone_takes_a_stride_of_its_own_for_each_axis(bundle):
    config = load(bundle, "train")
    dims = len(config.get("patch_size"))
    patch, stride = ([64, 96], [2, 1]) if dims == 2 else ([128, 64, 32], [2, 2, 1])
    small = {
        "swinunetr": {"feature_size": 12},
        "transunet": {"num_layers": 1, "hidden_size": 32, "mlp_dim": 32, "num_heads": 2},
    }
    for backbone, entry in config.get("backbones").items():
        words = {f"backbones#{backbone}": {**entry, **small.get(backbone, {})}}
        net = load(bundle, "train", backbone=backbone, patch_size=patch, stride=stride, num_experts=2, **words)
        net = net.get_parsed_content("network_def").eval()
        with torch.no_grad():
            assert net(torch.rand(1, 1, *patch)).shape == (1, net.decoder.num_classes, *patch), backbone
