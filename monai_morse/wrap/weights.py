"""The networks that configs define, as they were and as they are now, and their weights.

Building a network runs the bundle's code.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from monai_morse.errors import InputError, find_input_error
from monai_morse.networks import DecoderFeatures, Morse
from monai_morse.networks.backbones import decoder_names
from monai_morse.networks.decoders import fixed_sizes
from monai_morse.weights import load_matching, read_checkpoint

from .configs import Configs
from .report import WrapReport

__all__ = ["NETWORK", "Twins", "build_networks", "check_equal", "code_of", "convert_weights"]

NETWORK = "network_def"


@dataclass
class Twins:
    """The network of one config file as it was, and as it is now."""

    original: nn.Module
    morse: Morse
    checkpoint: Any = None


@contextmanager
def code_of(folder: Path) -> Iterator[None]:
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


def build_networks(configs: Configs) -> dict[str, Twins]:
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
            hint = "; of `wrap` this is --decoder NAME NAME .." if "DecoderFeatures(" in reason else ""
            raise InputError(f"`{NETWORK}` of configs/{name} cannot be wrapped: {reason}{hint}") from error
    return networks


def _build(configs: Configs, names: list[str]) -> Twins:
    """The network that the last of some config files, read together, defines."""

    def parsed(entry_id: str) -> Any:
        parser = ConfigParser()
        parser.read_config([str(configs.folder / "configs" / n) for n in names])
        parser["bundle_root"] = str(configs.folder)
        return parser.get_parsed_content(entry_id).eval()

    original = parsed(f"{NETWORK}::backbone")
    if isinstance(original, Morse):
        raise InputError("it is a Morse already")
    if isinstance(original, DecoderFeatures):  # named by the caller, all are taken
        return Twins(original.backbone, parsed(NETWORK))
    features = len(decoder_names(original))
    (definition,) = (c[k] for name, c, k in configs.find(NETWORK) if name == names[-1])
    if features < 3 and isinstance(definition, dict):  # N of a Morse that is not told another; else another file's
        definition["num_experts"] = features
        configs.write()
    return Twins(original, parsed(NETWORK))


def _reason(error: BaseException) -> str:
    """What went wrong first, of an error that was raised again and again."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def convert_weights(folder: Path, networks: dict[str, Twins], report: WrapReport) -> None:
    """Each checkpoint of the original network becomes one of the Morse around it."""
    for path in sorted((folder / "models").rglob("*.pt")):
        name = path.relative_to(folder)
        required = str(name) == "models/model.pt"
        try:
            checkpoint = read_checkpoint(path, name=name)
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


def check_equal(name: str, twins: Twins, report: WrapReport) -> None:
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
