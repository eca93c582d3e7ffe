"""MORSE wherever PyTorch takes a network, run just now: ``python -m tools.portability``.

A row is a backbone of :mod:`tools.systems`, tiny, under MORSE; a column a check: a function ``(network, x)`` that raises.
A cell is ✓ if the check passed, – if it did not but the bare backbone fails it too, ✗ if it is MORSE that fails.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from monai_morse.config import check_choice
from monai_morse.errors import short_errors
from monai_morse.losses import MorseLoss
from monai_morse.networks import Morse
from tools.systems import BACKBONES, TINY_OPTIONS

__all__ = ["CHECKS", "Check", "Outcome", "portability", "portability_table", "tiny_network"]

Check = Callable[[nn.Module, Tensor], None]
"""Takes a network in eval mode and an input, two samples of one channel; raises when something is wrong."""
ANY_BATCH: Any = getattr(torch.export.Dim, "DYNAMIC", None) or torch.export.Dim("batch")  # torch 2.4 has no DYNAMIC


def _near(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def _close_in_half(got: Tensor, expected: Tensor, share: float) -> None:
    """Finite, and its difference from what is expected is small on the whole, not at each value: half precision."""
    if not got.isfinite().all():
        raise AssertionError("not finite")
    difference = (got.float() - expected).norm() / expected.norm()
    if difference > share:
        raise AssertionError(f"differs by {difference:.1%} from float32, more than {share:.0%}")


def _render_all(network: nn.Module, x: Tensor) -> None:
    """Every voxel becomes a point, so that none is chosen at random, or by a rounding error."""
    if isinstance(network, Morse):
        network.num_train = network.num_eval = x[0, 0].numel()


def _segment(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


def _segments_alike(call: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor) -> None:
    """The same to 1e-4 but for two voxels: which is the last uncertain enough to be rendered may hang on a rounding error."""
    got, expected = _segment(call, x), _segment(network, x)
    differences = (got - expected).abs().amax(1)
    other = int(((differences > 1e-4) | (got.argmax(1) != expected.argmax(1))).sum())
    if other > 2 or not got.isfinite().all():
        raise AssertionError(f"{other} of {differences.numel()} voxels differ, by up to {differences.max():.2g}")


def _step(network: nn.Module, x: Tensor, call: Callable[..., Any] | None = None, scale: float = 1.0) -> Tensor:
    """Loss and every gradient of a training step at one seed, as a vector; ``call`` stands for the network where given."""
    torch.manual_seed(1)
    network.zero_grad()
    call = network if call is None else call
    output = call(x, True) if isinstance(network, Morse) else call(x)
    samples = DeepSupervisionLoss(DiceCELoss(softmax=True, to_onehot_y=True))  # their mean: processes may share them out
    loss = MorseLoss(weight=1.0, loss=samples)(output, (3 * x).long())
    (scale * loss).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad / scale for p in network.parameters()]
    return torch.cat([g.flatten() for g in (loss.detach(), *gradients)])


def _works_alike(call: Callable[..., Any], network: nn.Module, x: Tensor) -> None:
    """``call`` segments and trains as the network does."""
    _segments_alike(call, network, x)
    _segments_alike(call, network, x.flip(0))  # no value of the first input was kept
    network.train()
    _near(_step(network, x, call), _step(network, x))


def _copy(network: nn.Module, x: Tensor) -> None:
    _step(network.train(), x)  # some networks keep tensors of their last forward, which cannot be copied
    twin = copy.deepcopy(network.eval())
    _near(_segment(twin, x), _segment(network, x), 0)
    assert list(twin.state_dict()) == list(network.state_dict())


def _pickle(network: nn.Module, x: Tensor) -> None:
    _near(_segment(pickle.loads(pickle.dumps(network)), x), _segment(network, x), 0)


def _script(network: nn.Module, x: Tensor) -> None:
    stored = io.BytesIO()
    torch.jit.save(torch.jit.script(network), stored)
    stored.seek(0)
    _segments_alike(torch.jit.load(stored), network, x)


def _trace(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(network, x, check_trace=False)
    _segments_alike(traced, network, x.flip(0))


def _export(network: nn.Module, x: Tensor) -> None:
    """For any batch size."""
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: ANY_BATCH},)).module()
    for batch in (x.flip(0), x[:1], torch.cat([x, x])):
        _segments_alike(exported, network, batch)


def _compile(network: nn.Module, x: Tensor, backend: str = "aot_eager", fullgraph: bool = False) -> None:
    torch._dynamo.reset()
    _works_alike(torch.compile(network, backend=backend, fullgraph=fullgraph), network, x)


def _onnx(network: nn.Module, x: Tensor) -> None:
    import onnxruntime
    import onnxscript  # noqa: F401 (the exporter needs it)

    program: Any = torch.onnx.export(network, (x,), dynamo=True, opset_version=20, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    _segments_alike(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), network, x.flip(0))


def _autocast(network: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    def half(*args: Any) -> Any:
        with torch.autocast(x.device.type, dtype):
            return network(*args)

    assert _segment(half, x).isfinite().all(), "not finite"  # not near: a rounding error may choose other voxels to render
    _render_all(network, x)
    _close_in_half(_segment(half, x), _segment(network, x), 0.05)
    if isinstance(network, Morse):
        network.decoder.requires_grad_(False)  # how well conditioned the backbone's own gradients are is not asked here
    network.train()
    got, expected = _step(network, x, half, scale=2.0**10), _step(network, x)
    _close_in_half(got[:1], expected[:1], 0.02)
    _close_in_half(got[1:], expected[1:], 0.1)


def _checkpointing(network: nn.Module, x: Tensor) -> None:
    _works_alike(lambda *args: checkpoint(network, *args, use_reentrant=False), network, x)


def _data_parallel(network: nn.Module, x: Tensor) -> None:
    """torch's own replicas, but for the copying of tensors to several GPUs."""

    def clones(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    def call(*args: Any) -> Any:
        with mock.patch.object(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", clones):
            return replicate(network, [0, 1])[1](*args)

    replicate = torch.nn.parallel.replicate
    _works_alike(call, network, x)


def _threads(network: nn.Module, x: Tensor) -> None:
    windows = [x * (i + 1) / 8 for i in range(8)]
    expected = [_segment(network, w) for w in windows]
    with ThreadPoolExecutor(4) as pool:
        for got, e in zip(pool.map(lambda w: _segment(network, w), windows * 2), expected * 2):
            _near(got, e, 1e-6)


def _ddp(network: nn.Module, x: Tensor) -> None:
    """Two processes, a sample each, have the gradients of one process with both.

    That is defined where nothing is random or shared by the batch: in eval mode, which leaves out dropout, that of experts too,
    and batch norm, with all voxels as points; in float64, where 1e-5 is no rounding error. A step in train mode must have the
    same, finite gradients in both processes.
    """
    network, x = network.double(), x.double()
    _render_all(network, x)
    multiprocessing.set_forkserver_preload([__name__])  # one import for all processes
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        torch.save((network, x), Path(folder, "task.pt"))
        torch.multiprocessing.start_processes(_ddp_process, (folder,), nprocs=2, start_method=method)
        (first, trained), (second, trained_too) = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]
    _near((first + second) / 2, _step(network, x), 1e-5)
    _near(first[1:], second[1:], 0)
    _near(trained[1:], trained_too[1:], 0)
    assert trained.isfinite().all(), "not finite"


def _ddp_process(rank: int, folder: str) -> None:
    network, x = torch.load(Path(folder, "task.pt"), weights_only=False)  # written by _ddp
    store = torch.distributed.FileStore(str(Path(folder, "store")), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    steps = [_step(network.train(mode), x[rank : rank + 1], parallel) for mode in (False, True)]
    torch.save(steps, Path(folder, f"{rank}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo's destructors have been seen to wait for ever


CHECKS: dict[str, Check] = {
    "copy": _copy,
    "pickle": _pickle,
    "script": _script,
    "trace": _trace,
    "export": _export,
    "compile": _compile,
    "one graph": partial(_compile, backend="eager", fullgraph=True),
    "onnx": _onnx,
    "autocast bf16": partial(_autocast, dtype=torch.bfloat16),
    "autocast fp16": partial(_autocast, dtype=torch.float16),
    "checkpointing": _checkpointing,
    "DataParallel": _data_parallel,
    "threads": _threads,
    "DDP": _ddp,
}


@dataclass(frozen=True)
class Outcome:
    """One check on one backbone: the cell's mark, and what went wrong, if anything."""

    backbone: str
    spatial_dims: int
    check: str
    mark: str
    reason: str = ""


def tiny_network(name: str, dims: int, bare: bool = False) -> tuple[nn.Module, Tensor]:
    """A backbone's tiny twin under MORSE, or bare, in eval mode with an input that it takes; always the same."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]
    network = backbone.tiny(dims, 3)
    if not bare:
        options = {**TINY_OPTIONS, "head": {**TINY_OPTIONS["head"], "residual": False}}  # a renderer whose work is seen
        network = Morse(network, num_experts=backbone.num_experts, **options)
    return network.eval(), torch.rand(2, 1, *backbone.window[:dims])


def _failure(check: Check, name: str, dims: int, bare: bool = False) -> str:
    """Run a check on a tiny network; returns what went wrong."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(*tiny_network(name, dims, bare))
        return ""
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters say what is missing in the first of a chain
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [""]
        return f"{type(cause).__name__}: {lines[-1 if isinstance(cause, ProcessRaisedException) else 0]}"
    finally:
        logging.disable(disabled)


def portability(
    names: Sequence[str] | None = None, checks: Sequence[str] | None = None, dims: Sequence[int] | None = None
) -> Iterator[Outcome]:
    """Run checks on backbones under MORSE; all of them by default, in 3D, or in 2D where a backbone has no 3D.

    Raises:
        InputError: for an unknown backbone or check.
    """
    for kind, given, known in (("backbone", names, BACKBONES), ("check", checks, CHECKS)):
        for name in given or ():
            check_choice(kind, name, known)
    for name, check in itertools.product(names or BACKBONES, checks or CHECKS):
        own = BACKBONES[name].dims
        for d in [max(own)] if dims is None else [d for d in own if d in dims]:
            reason = _failure(CHECKS[check], name, d)
            mark = "✓"
            if reason.startswith("ModuleNotFoundError"):
                mark = "not installed"
            elif reason:
                mark = "–" if _failure(CHECKS[check], name, d, bare=True) else "✗"
            yield Outcome(name, d, check, mark, reason)


def portability_table(
    names: Sequence[str] | None = None, checks: Sequence[str] | None = None, dims: Sequence[int] | None = None
) -> tuple[str, bool]:
    """The Markdown table, and whether nothing but bare backbones failed."""
    columns = list(checks or CHECKS)
    done = list(tqdm(portability(names, checks, dims), desc="checks", disable=None))
    lines = ["| backbone | | " + " | ".join(columns) + " |", "| --- " * (2 + len(columns)) + "|"]
    for name, d in dict.fromkeys((o.backbone, o.spatial_dims) for o in done):
        marks = [o.mark for o in done if (o.backbone, o.spatial_dims) == (name, d)]
        lines.append(f"| {name} | {d}D | " + " | ".join(marks) + " |")
    failed = [o for o in done if o.mark not in "✓–"]
    lines += ["", f"torch {torch.__version__}. –: the bare backbone fails too."]
    lines += [f"{o.mark} {o.backbone} {o.spatial_dims}D {o.check}: {o.reason}" for o in failed]
    return "\n".join(lines), not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.portability", description=__doc__)
    parser.add_argument("backbones", nargs="*", help="names of the table's rows; default: all")
    parser.add_argument("--checks", nargs="*", help="names of the table's columns; default: all")
    parser.add_argument("--dims", type=int, nargs="*", choices=[2, 3], help="default: 3D, or 2D where there is no 3D")
    args = parser.parse_args(arguments)
    short_errors()
    text, nothing_failed = portability_table(args.backbones, args.checks, args.dims)
    print(text)
    return 0 if nothing_failed else 1


if __name__ == "__main__":
    sys.exit(main())
