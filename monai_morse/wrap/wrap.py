"""Any MONAI segmentation bundle as a MORSE bundle: its network becomes the backbone, all else stays as it is.

What is done, in order: the configs are edited as data (``configs.py``), the networks are built and the weights converted
(``weights.py``), metadata and README say so.

Building the network runs the bundle's code: wrap bundles of people you trust.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from torch import nn

import monai_morse
from monai_morse.errors import InputError

from .configs import FILE, Configs, normal_id
from .report import WrapReport
from .weights import NETWORK, build_networks, check_equal, code_of, convert_weights

__all__ = ["wrap_bundle"]

# arguments that MONAI took away without a change of what the network computes
_GONE = {"SwinUNETR": ("img_size",)}
_KEPT_OUT = shutil.ignore_patterns("__pycache__", ".git", ".cache")


def wrap_bundle(bundle: str | Path, out: str | Path, decoder: list[str] | None = None) -> WrapReport:
    """Write a bundle whose network is :class:`monai_morse.Morse` around that of ``bundle``.

    Before any training it predicts what the original predicts; this is checked on a random window before anything is written.

    Args:
        bundle: folder or zip archive of a MONAI bundle: ``configs/*.json`` or ``.yaml`` with a ``network_def``, and weights in
            ``models/`` if it has any.
        out: folder to write, which must not exist yet. It is written whole or not at all.
        decoder: names of the submodules that make the decoder features, coarse to fine, for a network whose features
            ``Morse`` does not know.

    Raises:
        InputError: when there is nothing to wrap, the network cannot be built or is of a kind that ``Morse`` does not take, or
            the weights are not the network's.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; give another --out, or remove it")
    with _opened(Path(bundle)) as source:
        if source.resolve() in [out.resolve(), *out.resolve().parents]:
            raise InputError(f"--out {out} lies inside the bundle; give a folder elsewhere")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".partial-{out.name}-") as partial:
            folder = Path(partial) / out.name
            shutil.copytree(source, folder, ignore=_KEPT_OUT)
            report = _wrap(folder, decoder)
            if out.exists():
                out.rmdir()  # empty
            os.replace(folder, out)
    report.done.insert(0, f"wrote {out}")
    return report


def _wrap(folder: Path, decoder: list[str] | None) -> WrapReport:
    """Turn the bundle in ``folder``, a copy, into a MORSE bundle."""
    report = WrapReport()
    configs = Configs(folder, report)
    _wrap_network(configs, decoder, report)
    freezing = _wrap_training(configs, report)
    configs.write()
    with code_of(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same bundle gives the same weights
        networks = build_networks(configs)
        convert_weights(folder, networks, report)
        for name, twins in networks.items():
            check_equal(name, twins, report)
    for name in configs.commented:
        if configs.files[name] != configs.unchanged[name]:
            report.left.append(f"configs/{name}: its comments are not kept")
    _write_metadata(folder, report)
    _write_readme(folder, freezing)
    for path in sorted(folder.glob("large_files.y*ml")):
        path.unlink()
        report.left.append(f"{path.name}: left out, it would download the original's weights over the new ones")
    return report


# --- files in


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The bundle's folder: ``path`` itself, its only folder that has ``configs``, or that of an unpacked archive."""
    if path.is_dir():
        yield _bundle_folder(path, path)
        return
    if not zipfile.is_zipfile(path):
        raise InputError(f"no bundle at {path}: give its folder or a zip archive of it")
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(path) as archive:
        root = Path(unpacked).resolve()
        for info in archive.infolist():
            leaves = root not in (root / info.filename.replace("\\", "/")).resolve().parents
            if leaves or stat.S_ISLNK(info.external_attr >> 16):
                raise InputError(f"{path}: the archive's {info.filename!r} is a link or leads out of its folder; not unpacked")
        archive.extractall(root)
        yield _bundle_folder(root, path)


def _bundle_folder(folder: Path, named: Path) -> Path:
    found = [f for f in (folder, *sorted(folder.iterdir())) if (f / "configs").is_dir()]
    if not found or (len(found) > 1 and found[0] != folder):
        raise InputError(f"{named} is no bundle: it has no folder `configs` with the workflows' config files")
    return found[0]


# --- what is nested in what


def _wrap_network(configs: Configs, decoder: list[str] | None, report: WrapReport) -> None:
    if not configs.find(NETWORK):
        raise InputError(f"no `{NETWORK}` in {', '.join(configs.files) or 'the folder'} of configs: nothing to wrap")
    for name, container, key in configs.find(NETWORK):
        for argument in _gone(container[key]):
            del container[key][argument]
            report.done.append(f"configs/{name}: took out {argument}, which this MONAI's network no longer takes")
    if decoder:
        configs.nest(NETWORK, "backbone", _around("monai_morse.networks.DecoderFeatures", names=decoder))
    points = {"points": {"multilabel": True}} if configs.multilabel else {}
    configs.nest(NETWORK, "backbone", _around("monai_morse.networks.Morse", **points))
    for name, i, container, key in configs.entries():
        for attribute in re.findall(rf"@(?:{NETWORK}|network)\.(\w+)", str(container[key])):
            if isinstance(container[key], str) and not hasattr(nn.Module(), attribute):
                report.left.append(f"configs/{name}: {i} uses the network's .{attribute}, which is that of a Morse now")
    for _, _, parallel in configs.objects("DistributedDataParallel"):
        if NETWORK in str(parallel):
            parallel["find_unused_parameters"] = True


def _around(target: str, **options: Any) -> Callable[[Any], Any]:
    """Makes the definition of a network the backbone of another."""

    def outer(backbone: Any) -> Any:
        if isinstance(backbone, str) and re.fullmatch(rf"%.*{FILE}{NETWORK}", backbone):
            return backbone  # another file's, which is one already
        return {"_target_": target, "backbone": backbone, **options}

    return outer


def _gone(definition: Any) -> list[str]:
    """Arguments of a definition that were taken away from MONAI's network of that name."""
    kind = str(definition.get("_target_", "")).split(".")[-1] if isinstance(definition, dict) else ""
    arguments = [a for a in _GONE.get(kind, ()) if a in definition]
    return [a for a in arguments if a not in inspect.signature(getattr(monai.networks.nets, kind)).parameters]


def _wrap_training(configs: Configs, report: WrapReport) -> str:
    """Have the trainers train the renderer; returns the word at the left margin that freezes the backbone, "" for none."""
    trainers = configs.objects(r"SupervisedTrainer\w*")
    for name, i, trainer in configs.objects(r"\w*Trainer\w*"):
        if not any(trainer is t for _, _, t in trainers):
            report.left.append(f"configs/{name}: {i}, a {trainer['_target_']}, stays as it is and does not train the renderer")
    if not trainers:
        report.left.append("training: no config has a SupervisedTrainer")
    freezing = "morse_freeze_backbone" if configs.find("freeze_backbone") else "freeze_backbone"
    if not trainers or not (configs.folder / "models" / "model.pt").is_file():
        freezing = ""  # there are no weights to start from
    multilabel = {"multilabel": True} if configs.multilabel else {}
    prepare = {"_target_": "monai_morse.engines.prepare_batch_with_points", "_mode_": "callable"}
    losses = set()
    for i in dict.fromkeys(i for _, i, _ in trainers):
        same = {name: trainer for name, j, trainer in trainers if j == i}  # one a file
        for name, trainer in same.items():
            trainer["train_handlers"] = trainer.get("train_handlers") or []
            if "iteration_update" in trainer:
                report.left.append(f"configs/{name}: {i} has an iteration_update; see that it hands the points on")
        loss = str(trainer.get("loss_function"))
        loss_id = normal_id(loss[1:]) if re.fullmatch(r"@[\w#:]+", loss) else f"{i}::loss_function"
        if loss_id not in losses:
            target = {"_target_": "monai_morse.losses.MorseLoss"}
            configs.nest(loss_id, "loss", lambda theirs: {**target, "loss": theirs, **multilabel})  # noqa: B023
            losses.add(loss_id)
        configs.nest(f"{i}::prepare_batch", "prepare", lambda theirs: {**prepare, "prepare": theirs})
        for trainer in same.values():
            trainer.setdefault("prepare_batch", dict(prepare))
        network = trainer.get("network", "@network")
        path = "$@bundle_root + '/models/model.pt'" if configs.find("bundle_root") else "models/model.pt"
        handlers: list[dict] = [{"_target_": "monai_morse.handlers.CoarsePrediction"}]
        if freezing:
            loader = {"_target_": "monai_morse.handlers.WeightsLoader", "load_path": path, "network": network}
            handlers.insert(0, {**loader, "matching": True, "freeze_backbone": f"@{freezing}"})
            for name in same:
                configs.files[name][freezing] = False
        _insert_handlers(configs, f"{i}::train_handlers", list(same), handlers)
    return freezing


def _insert_handlers(configs: Configs, entry_id: str, names: list[str], items: list[dict]) -> None:
    """Put handlers before a trainer's own, which are a list, the name of one, or an expression."""
    given = next(c[k] for name, c, k in configs.find(entry_id) if name == names[0])
    if isinstance(given, str):
        listed = normal_id(given[1:])
        if any(isinstance(c[k], list) for _, c, k in configs.find(listed)):
            entry_id = listed
        else:
            for _, container, key in configs.find(entry_id):
                container[key] = f"$@morse_handlers + list({str(container[key]).removeprefix('$')})"
            for name in names:
                configs.files[name]["morse_handlers"] = []
            entry_id = "morse_handlers"
    if not any(items[-1] in c[k] for _, c, k in configs.find(entry_id) if isinstance(c[k], list)):
        configs.insert(entry_id, items)


# --- what comes with them


def _write_metadata(folder: Path, report: WrapReport) -> None:
    path = folder / "configs" / "metadata.json"
    if not path.is_file():
        report.left.append("configs/metadata.json: there is none, which a bundle must have")
        return
    meta = json.loads(path.read_text())
    numbers = re.match(r"(\d+)\.(\d+)", str(meta.get("version", "")))
    meta["version"] = f"{numbers[1]}.{int(numbers[2]) + 1}.0" if numbers else "0.1.0"
    change = f"the network is a MORSE around the former one (monai_morse {monai_morse.__version__}); predictions are the same"
    meta["changelog"] = {meta["version"]: change, **meta.get("changelog", {})}
    meta["monai_version"] = monai.__version__.split("+")[0]
    meta["pytorch_version"] = torch.__version__.split("+")[0]
    meta["numpy_version"] = np.__version__
    packages = meta.setdefault("required_packages_version", {})
    packages["monai_morse"] = monai_morse.__version__
    path.write_text(json.dumps(meta, indent=4) + "\n")


_README = """
## MORSE

`monai-morse wrap` made this bundle of another. Its network is the backbone of a MORSE now, with the same weights. Until it is
trained it predicts what it did. It needs `pip install monai_morse`.
"""
_README_TRAINING = """
Training starts from `models/model.pt`. All of the network is trained; with `--{word} true`, the mixture and the renderer alone.
"""


def _write_readme(folder: Path, freezing: str) -> None:
    path = folder / "docs" / "README.md"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text().rstrip() + "\n" if path.is_file() else ""
    path.write_text(before + _README + (_README_TRAINING.format(word=freezing) if freezing else ""))
