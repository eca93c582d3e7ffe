"""Any MONAI segmentation bundle as a MORSE bundle: its network becomes the backbone, all else stays as it is.

The bundle's config files are edited as data. An entry is known by its id, ``train::trainer::loss_function``, wherever it
stands: nested, or as a key ``train#trainer#loss_function`` of a file that lies over another. :class:`_Configs` finds entries
by id and nests them, references to them included; ``_wrap_network`` and ``_wrap_training`` say what is nested in what.

Building the network runs the bundle's code: wrap bundles of people you trust.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from torch import Tensor, nn

import monai_morse
from monai_morse.errors import InputError, find_input_error
from monai_morse.networks import Morse
from monai_morse.networks.backbones import decoder_names
from monai_morse.networks.decoders import fixed_sizes
from monai_morse.weights import load_matching, read_checkpoint

__all__ = ["WrapReport", "wrap_bundle"]

NETWORK = "network_def"
_SEP = r"(?:#|::)"
_FILE = r"\.(?:json|ya?ml)(?:#|::)"  # a macro's file: %configs/train.json#network_def
_TENSORRT = ("torch.jit.load", "trt_compile", "torch_tensorrt")
# arguments that MONAI took away without a change of what the network computes
_GONE = {"SwinUNETR": ("img_size",)}
_KEPT_OUT = shutil.ignore_patterns("__pycache__", ".git", ".cache")


@dataclass
class WrapReport:
    """What :func:`wrap_bundle` did, and what it could not convert."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = ["not converted:", *(f"  - {line}" for line in self.left)] if self.left else ["everything was converted"]
        return "\n".join([*self.done, *left])


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
    configs = _Configs(folder, report)
    _wrap_network(configs, decoder, report)
    _wrap_training(configs, report)
    configs.write()
    with _code_of(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same bundle gives the same weights
        networks = _build_networks(configs)
        _convert_weights(folder, networks, report)
        for name, twins in networks.items():
            _check_equal(name, twins, report)
    for name in configs.commented:
        if configs.files[name] != configs.unchanged[name]:
            report.left.append(f"configs/{name}: its comments are not kept")
    _write_metadata(folder, report)
    _write_readme(folder)
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


# --- configs as data


def _normal(key: Any) -> str:
    return str(key).lstrip("+").replace("#", "::")  # + merges a value into another file's


def _entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every entry below ``node``: its id, and the container and key that hold it."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield prefix + _normal(key), node, key
        yield from _entries(value, f"{prefix}{_normal(key)}::")


def _reference(entry_id: str) -> str:
    """A pattern of what refers to an entry by its id from inside a string."""
    return rf"(?:[@%]|{_FILE})" + _SEP.join(map(re.escape, entry_id.split("::")))


class _Configs:
    """The config files of a bundle, by name, and edits of all of them."""

    def __init__(self, folder: Path, report: WrapReport) -> None:
        self.folder = folder
        self.files: dict[str, dict] = {}
        self.commented: list[str] = []
        for path in sorted((folder / "configs").iterdir()):
            if path.suffix not in (".json", ".yaml", ".yml") or path.name == "metadata.json":
                continue
            text = path.read_text()
            if any(word in text for word in _TENSORRT):
                path.unlink()
                report.left.append(f"configs/{path.name}: left out, it runs a compiled file of the original network")
                continue
            try:
                config = ConfigParser.load_config_file(path)
            except Exception as error:
                raise InputError(f"{path.name} cannot be read: {error}") from error
            if isinstance(config, dict):  # else a list of data
                self.files[path.name] = config
            if path.suffix != ".json" and re.search(r"^\s*#|\s# ", text, re.MULTILINE):
                self.commented.append(path.name)
        self.unchanged = copy.deepcopy(self.files)
        # a sigmoid a class, in the loss or the postprocessing: classes do not exclude one another
        self.multilabel = any(i.endswith("::sigmoid") and c[k] is True for _, i, c, k in self.entries())

    def write(self) -> None:
        for name, config in self.files.items():
            path = self.folder / "configs" / name
            if config == self.unchanged[name]:
                continue
            if path.suffix == ".json":
                path.write_text(json.dumps(config, indent=4) + "\n")
                continue
            path.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120))

    def entries(self) -> Iterator[tuple[str, str, Any, Any]]:
        for name, config in self.files.items():
            for entry_id, container, key in _entries(config):
                yield name, entry_id, container, key

    def find(self, entry_id: str) -> list[tuple[str, Any, Any]]:
        """Where entries of this id stand: file, container, key."""
        return [(name, container, key) for name, i, container, key in self.entries() if i == entry_id]

    def objects(self, kind: str) -> list[tuple[str, str, dict]]:
        """File, id and definition of the objects whose class has a name of this pattern."""
        found = [(name, i, c[k]) for name, i, c, k in self.entries() if isinstance(c[k], dict)]
        return [f for f in found if re.fullmatch(kind, str(f[2].get("_target_", "")).split(".")[-1])]

    def nest(self, entry_id: str, under: str, outer: Callable[[Any], Any]) -> None:
        """Replace each value ``v`` of an entry by ``outer(v)``, which holds ``v`` as ``under``, and follow it everywhere."""
        for name, container, key in self.find(entry_id):
            _make_absolute(self.files[name], entry_id)
            container[key] = outer(container[key])
        self._move(entry_id, lambda child, sep: f"{under}{sep}{child}")

    def insert(self, entry_id: str, items: list) -> None:
        """Put items before those of a list, wherever it is given; references by position follow."""
        for _, container, key in self.find(entry_id):
            if isinstance(container[key], list) and not str(key).startswith("+"):
                container[key][:0] = copy.deepcopy(items)
        self._move(entry_id, lambda child, sep: str(int(child) + len(items)) if child.isdigit() else child)

    def _move(self, entry_id: str, new: Callable[[str, str], str]) -> None:
        """Follow the children of an entry that moved from ``child`` to ``new(child, separator)``."""
        inside = f"{entry_id}::"
        reference = re.compile(rf"({_reference(entry_id)})({_SEP})(\w+)")
        for _, i, container, key in list(self.entries()):
            if isinstance(container[key], str):
                container[key] = reference.sub(lambda m: m[1] + m[2] + new(m[3], m[2]), container[key])
            outside = i[: len(i) - len(_normal(key))]
            if i.startswith(inside) and not outside.startswith(inside):  # a key that reaches into the entry: "network_def#norm"
                sep = "#" if "#" in key else "::"
                child, *rest = i.removeprefix(inside).split("::")
                moved = sep.join([*entry_id.removeprefix(outside).split("::"), new(child, sep), *rest])
                _rename(container, key, ("+" if key.startswith("+") else "") + moved)


def _rename(container: dict, old: str, new: str) -> None:
    items = [(new if k == old else k, v) for k, v in container.items()]
    container.clear()
    container.update(items)


def _make_absolute(config: dict, entry_id: str) -> None:
    """Relative references (``@#a``, ``@##a``) below an entry that is about to move one level down, spelled out."""
    for i, container, key in _entries(config):
        if (i == entry_id or i.startswith(f"{entry_id}::")) and isinstance(container[key], str):
            if re.search(rf"[@%]{_SEP}", container[key]):
                container[key] = ConfigParser.resolve_relative_ids(i, container[key])


# --- what is nested in what


def _wrap_network(configs: _Configs, decoder: list[str] | None, report: WrapReport) -> None:
    if not configs.find(NETWORK):
        raise InputError(f"no `{NETWORK}` in {', '.join(configs.files) or 'the folder'} of configs: nothing to wrap")
    for name, container, key in configs.find(NETWORK):
        for argument in _gone(container[key]):
            del container[key][argument]
            report.done.append(f"configs/{name}: took out {argument}, which this MONAI's network no longer takes")
    options: dict[str, Any] = {"decoder": decoder} if decoder else {}
    if configs.multilabel:
        options["points"] = {"multilabel": True}

    def morse(backbone: Any) -> Any:
        if isinstance(backbone, str) and re.fullmatch(rf"%.*{_FILE}{NETWORK}", backbone):
            return backbone  # another file's, which is one already
        return {"_target_": "monai_morse.networks.Morse", "backbone": backbone, "freeze_backbone": False, **options}

    configs.nest(NETWORK, "backbone", morse)
    for name, i, container, key in configs.entries():
        for attribute in re.findall(rf"@(?:{NETWORK}|network)\.(\w+)", str(container[key])):
            if isinstance(container[key], str) and not hasattr(nn.Module(), attribute):
                report.left.append(f"configs/{name}: {i} uses the network's .{attribute}, which is that of a Morse now")
    for _, _, parallel in configs.objects("DistributedDataParallel"):
        if NETWORK in str(parallel):
            parallel["find_unused_parameters"] = True


def _gone(definition: Any) -> list[str]:
    """Arguments of a definition that were taken away from MONAI's network of that name."""
    kind = str(definition.get("_target_", "")).split(".")[-1] if isinstance(definition, dict) else ""
    arguments = [a for a in _GONE.get(kind, ()) if a in definition]
    return [a for a in arguments if a not in inspect.signature(getattr(monai.networks.nets, kind)).parameters]


def _wrap_training(configs: _Configs, report: WrapReport) -> None:
    trainers = configs.objects(r"SupervisedTrainer\w*")
    for name, i, trainer in configs.objects(r"\w*Trainer\w*"):
        if not any(trainer is t for _, _, t in trainers):
            report.left.append(f"configs/{name}: {i}, a {trainer['_target_']}, stays as it is and does not train the renderer")
    if not trainers:
        report.left.append("training: no config has a SupervisedTrainer")
    start = (configs.folder / "models" / "model.pt").is_file()
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
        loss_id = _normal(loss[1:]) if re.fullmatch(r"@[\w#:]+", loss) else f"{i}::loss_function"
        if loss_id not in losses:
            target = {"_target_": "monai_morse.losses.MorseLoss"}
            configs.nest(loss_id, "loss", lambda theirs: {**target, "loss": theirs, **multilabel})  # noqa: B023
            losses.add(loss_id)
        configs.nest(f"{i}::prepare_batch", "prepare", lambda theirs: {**prepare, "prepare": theirs})
        for trainer in same.values():
            trainer.setdefault("prepare_batch", dict(prepare))
        network = trainer.get("network", "@network")
        path = "$@bundle_root + '/models/model.pt'" if configs.find("bundle_root") else "models/model.pt"
        loader = {"_target_": "monai_morse.handlers.WeightsLoader", "load_path": path, "network": network, "matching": True}
        loss = f"@{loss_id.replace('::', '#')}"
        handlers = [
            *([loader] if start else []),
            {"_target_": "monai_morse.handlers.RenderSchedule", "loss": loss, "schedule": "scratch"},
            {"_target_": "monai_morse.handlers.CoarsePrediction"},
        ]
        _insert_handlers(configs, f"{i}::train_handlers", list(same), handlers)


def _insert_handlers(configs: _Configs, entry_id: str, names: list[str], items: list[dict]) -> None:
    """Put handlers before a trainer's own, which are a list, the name of one, or an expression."""
    given = next(c[k] for name, c, k in configs.find(entry_id) if name == names[0])
    if isinstance(given, str):
        listed = _normal(given[1:])
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


# --- the networks and their weights


@dataclass
class _Twins:
    """The network of one config file as it was, and as it is now."""

    original: nn.Module
    morse: Morse
    checkpoint: Any = None


@contextmanager
def _code_of(folder: Path) -> Iterator[None]:
    """In the bundle's folder, as its workflows run; its own modules can be imported, and are forgotten afterwards."""
    before = os.getcwd()
    os.chdir(folder)
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def _build_networks(configs: _Configs) -> dict[str, _Twins]:
    """The networks of all config files that define one. What a file alone lacks is looked for in the others."""
    networks = {}
    # a macro's last: the file that it names must be complete
    for name, _, _ in sorted(configs.find(NETWORK), key=lambda found: isinstance(found[1][found[2]], str)):
        others = [n for n in configs.files if n != name]
        try:
            try:
                networks[name] = _build(configs, [name])
            except Exception as error:
                if find_input_error(error):
                    raise
                try:
                    networks[name] = _build(configs, [*others, name])
                except Exception as second:
                    raise (second if find_input_error(second) else error) from None
        except Exception as error:
            reason = str(find_input_error(error) or _reason(error))
            hint = "; of `wrap` this is --decoder NAME NAME .." if "decoder=" in reason else ""
            raise InputError(f"`{NETWORK}` of configs/{name} cannot be wrapped: {reason}{hint}") from error
    return networks


def _build(configs: _Configs, names: list[str]) -> _Twins:
    """The network that the last of some config files, read together, defines."""

    def parsed(entry_id: str) -> Any:
        parser = ConfigParser()
        parser.read_config([str(configs.folder / "configs" / n) for n in names])
        parser["bundle_root"] = str(configs.folder)
        return parser.get_parsed_content(entry_id).eval()

    original = parsed(f"{NETWORK}::backbone")
    if isinstance(original, Morse):
        raise InputError("it is a Morse already")
    (definition,) = (c[k] for name, c, k in configs.find(NETWORK) if name == names[-1])
    if isinstance(definition, dict):  # else another file's
        features = len(definition.get("decoder") or decoder_names(original))
        if features < 3:  # N of a Morse that is not told another
            definition["num_experts"] = features
            configs.write()
    return _Twins(original, parsed(NETWORK))


def _reason(error: BaseException) -> str:
    """What went wrong first, of an error that was raised again and again."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _convert_weights(folder: Path, networks: dict[str, _Twins], report: WrapReport) -> None:
    """Each checkpoint of the original network becomes one of the Morse around it."""
    for path in sorted((folder / "models").rglob("*.pt")):
        name = path.relative_to(folder)
        required = str(name) == "models/model.pt"
        try:
            checkpoint = read_checkpoint(path, torch.device("cpu"))
            misfits = {config: _misfit(twins.original, checkpoint) for config, twins in networks.items()}
            fitting = [networks[config] for config, misfit in misfits.items() if not misfit]
            if not fitting:
                reasons = "; ".join(f"in configs/{config}, {misfit}" for config, misfit in misfits.items())
                raise InputError(f"{name} is no checkpoint of `{NETWORK}`: {reasons}")
        except InputError as error:
            if required:
                raise
            report.left.append(f"{name}: stays as it is ({error})")
            continue
        for twins in fitting:
            filled = load_matching(twins.morse, checkpoint)
            twins.checkpoint = checkpoint
        state: Any = fitting[0].morse.state_dict()
        for key in ("state_dict", "model"):  # as it was kept
            state = {key: state} if isinstance(checkpoint.get(key), Mapping) else state
        torch.save(state, path)
        report.done.append(f"{name}: {filled}")
    for path in sorted((folder / "models").rglob("*.ts")):
        path.unlink()
        report.left.append(f"{path.relative_to(folder)}: left out, a compiled file of the original network")
    if not (folder / "models" / "model.pt").is_file():
        report.left.append("weights: there is no models/model.pt; train before you infer")


def _misfit(network: nn.Module, checkpoint: Any) -> str:
    """Load a checkpoint; says what does not fit, nothing where all of it does and it fills all of the network."""
    try:
        loaded = load_matching(network, checkpoint)
    except InputError as error:
        return str(error)
    return str(loaded) if loaded.new or loaded.unused else ""


def _check_equal(name: str, twins: _Twins, report: WrapReport) -> None:
    """See that both networks predict the same for a random window, bit for bit."""
    if twins.checkpoint is None:
        twins.original.load_state_dict(twins.morse.decoder.backbone.state_dict())
    else:  # again: others have been tried since
        load_matching(twins.original, twins.checkpoint)
    x, logits = _some_window(twins.original)
    with torch.no_grad():
        wrapped = twins.morse(x)
    if not torch.equal(wrapped, logits):
        raise InputError(
            f"the wrapped network of configs/{name} does not predict what the original does: logits differ by up to "
            f"{float((wrapped - logits).abs().max()):.2g}; is its forward random in eval mode?"
        )
    size = " x ".join(map(str, x.shape[2:]))
    report.done.append(f"configs/{name}: predicts what it did, bit for bit, on a random window of {size}")
    if getattr(twins.original, "deep_supervision", False) or getattr(twins.original, "dsdepth", 1) > 1:
        report.left.append(f"configs/{name}: heads of deep supervision are not trained, the loss gets the logits alone")


def _some_window(network: nn.Module) -> tuple[Tensor, Tensor]:
    """A random window that a network takes, and its logits."""
    conv = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    error: Exception | None = None
    for size in [[length] * (conv.weight.ndim - 2) for length in (32, 64, 96, 128, 224)] + fixed_sizes(network):
        x = torch.rand(1, conv.in_channels, *size)
        try:
            with torch.no_grad():
                return x, network(x)
        except Exception as e:
            error = error or e
    raise InputError(f"{type(network).__name__} fails on a test input: {error}") from error


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

`python -m monai_morse wrap` made this bundle of another: its network is the backbone of a MORSE now, with the same weights
and, until it is trained, the same predictions. It needs `pip install monai_morse`. Training starts from `models/model.pt`; all
of it is trained, or the MORSE part alone with `--network_def#freeze_backbone true`.
"""


def _write_readme(folder: Path) -> None:
    path = folder / "docs" / "README.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text().rstrip() + "\n" if path.is_file() else "") + _README)
