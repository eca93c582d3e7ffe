"""What MORSE costs, as ratios to the bare backbone (or to another row) measured in the same run.

    python -m tools.cost                     # 3D 96^3 and 2D 256^2; for a GPU or a patient machine
    python -m tools.cost --small             # 3D 48^3 (64^3 where 48 does not fit) and 2D 128^2
    python -m tools.cost --small --backbones UNETR --rows default pointrend --json cost.json
    python -m tools.cost --small --backbones UNETR --rows paper --base literal --repeats 10
    python -m tools.cost --backbones bundles/hippocampus_mri_morse --base "bare stride=2" --rows "default stride=2"
    python -m tools.cost --backbones bundles/hippocampus_mri_morse --over slices.yaml
    python -m tools.cost --operations --backbones bundles/hippocampus_mri_morse --base "bare stride=2" --rows "default stride=2"

A backbone may be a bundle's folder: its network, patch and batch size, a row's options being names of its ``train.yaml`` (or
of what lies over it).

A row and its base run in two processes of their own, in turn, repeat after repeat, so that neither heat nor other work nor the
other's memory counts against one of them; both draw the same dropout masks and points. Time is the median of the repeats'
ratios with the lowest and the highest, and of training steps, whose cost depends on the mask, the ratio of the sums ("mean").
Memory is what the process needed at its peak beyond what it needed before the network was built (on CUDA,
``max_memory_allocated``); multiply-adds are those of torch's FlopCounterMode, half its count. Operations are what PyTorch
dispatches, views left out: on a GPU each is a kernel to be launched, and of a small network that takes longer than to run it.
Those of a training step are without the optimizer's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNETR
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from monai_morse import Morse, MorseLoss
from monai_morse.experiments.sweep import parse_options
from monai_morse.networks.options import GROUPS as OPTION_GROUPS
from tools.literal import LiteralMorse
from tools.systems import BACKBONES

ROWS: dict[str, dict[str, Any]] = {
    "bare": {"experts": "none", "renderer": "none"},
    "literal": {"preset": "paper"},
    "paper": {"preset": "paper"},
    "default": {},
    "pointrend": {"experts": "none", "renderer": "pointrend"},
}
OPTIONS = ("small", "amp", "compiled", "channels_last", "over")
GROUPS = {key: name for name in ("points", "head", "mixture") for key in OPTION_GROUPS[name]}  # a bare width: the mixture's
SETTINGS = {  # backbone: (spatial dimensions, small window)
    "BasicUNet": (2, 128),
    "TransUNet": (2, 128),
    "UNet3D": (3, 48),
    "UNETR": (3, 48),
    "SwinUNETR": (3, 64),
    "MedNeXt": (3, 48),
    "DynUNet": (3, 64),
}
TIMES = ("inference", "sliding window", "training step")
FIGURES = (
    "training step",
    "inference",
    "sliding window",
    "memory, training",
    "memory, inference",
    "operations, training",
    "operations, inference",
    "multiply-adds",
    "parameters",
)
NO_KERNEL = ("detach", "empty", "_unsafe_view", "promote_types", "_local_scalar_dense")
CLASSES = 9


def parse(row: str) -> tuple[str, dict[str, Any]]:
    """``"default gate_stride=1 coarse=experts"`` -> its kind and the options of ``Morse``."""
    kind, *changes = row.split()
    if kind not in ROWS or not all("=" in c for c in changes):
        raise ValueError(f"row {row!r}: must be one of {', '.join(ROWS)}, then option=value pairs")
    options: dict[str, Any] = dict(ROWS[kind])
    for key, value in parse_options(" ".join(changes)).items():
        group = options.setdefault(GROUPS[key], {}) if key in GROUPS else options
        group[key] = value
    return kind, options


def build_bundle(folder: Path, row: str, over: Sequence[str] = ()) -> tuple[nn.Module, list[int], int]:
    """The network that a bundle trains, its options those of the row, its patch and batch size."""
    kind, _, changes = row.partition(" ")
    config = ConfigParser()
    config.read_config([folder / "configs" / name for name in ("train.yaml", *over)])
    config.update({"bundle_root": str(folder), **ROWS[kind], **parse_options(changes)})
    torch.manual_seed(0)
    network, size, batch = (config.get_parsed_content(name) for name in ("network_def", "patch_size", "batch_size"))
    return network, size, batch


def build(backbone: str, row: str, small: bool, over: Sequence[str] = ()) -> tuple[nn.Module, list[int], int]:
    """The network, the size of its window, and how many of them a training step has."""
    if backbone not in SETTINGS:
        return build_bundle(Path(backbone), row, over)
    dims, small_side = SETTINGS[backbone]
    size = [small_side if small else {2: 256, 3: 96}[dims]] * dims
    kind, options = parse(row)
    torch.manual_seed(0)
    net: nn.Module = UNETR(1, CLASSES, size) if backbone == "UNETR" else BACKBONES[backbone].usual(dims, CLASSES)
    if row != "bare":
        net = Morse(net, **{"num_experts": BACKBONES[backbone].num_experts, **options})
    return LiteralMorse(net) if kind == "literal" else net, size, 4 if dims == 2 else 2


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process, or on CUDA its tensors, has held so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from the parent's, even in a process of its own
        return 1024.0 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def reset_peak(device: torch.device) -> None:
    """Forget what was held before; where the system cannot, it stays in the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


class Operations(TorchDispatchMode):
    """Counts what is dispatched and not a view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in NO_KERNEL)
        return func(*args, **(kwargs or {}))


class Bench:
    """One network in a process of its own, measured piece by piece when told to."""

    def __init__(
        self, backbone: str, row: str, small: bool, amp: bool, compiled: bool, channels_last: bool, over: Sequence[str]
    ) -> None:
        warnings.simplefilter("ignore")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.before = peak_memory(self.device)
        network, size, batch = build(backbone, row, small, over)
        self.network = network.to(self.device)
        self.amp = amp
        self.size = size
        self.x = torch.rand(batch, 1, *size, device=self.device)
        if channels_last:
            layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
            self.network, self.x = self.network.to(memory_format=layout), self.x.contiguous(memory_format=layout)
        with torch.no_grad():
            classes = CLASSES if backbone in SETTINGS else self.network.eval()(self.x[:1]).shape[1]
        self.labels = torch.randint(0, classes, (batch, 1, *size), device=self.device)
        side = size[0] * 5 // 3
        volume = [side, side, side * 2 // 5] if len(size) == 3 else [2 * size[0], 2 * size[1]]
        self.volume = torch.rand(1, 1, *volume, device=self.device)
        self.inferer = SlidingWindowInferer(size, sw_batch_size=1, overlap=0.25)
        self.loss = MorseLoss(weight=0.1)
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
        self.call: Callable[..., Any] = torch.compile(self.network) if compiled else self.network
        self.morse = isinstance(network, (Morse, LiteralMorse))
        self.runs = 0

    def see(self, scan: Sequence[int]) -> None:
        """Infer a scan of this size from now on, as bundles do: windows of the training's patch, overlapping by a half."""
        self.volume = torch.rand(1, 1, *scan, device=self.device)
        self.inferer = SlidingWindowInferer(self.size, sw_batch_size=4, overlap=0.5, mode="gaussian")

    def count(self) -> dict[str, float]:
        self.network.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.network(self.x[:1])
        parameters = sum(p.numel() for p in self.network.parameters())
        return {"multiply-adds": counter.get_total_flops() / 2, "parameters": parameters}

    def memory(self) -> float:
        return peak_memory(self.device) - self.before

    def _infer(self) -> Tensor:
        return self.call(self.x[:1])

    def _slide(self) -> Tensor:
        return self.inferer(self.volume, self.call)

    def _backward(self, call: Callable[..., Any]) -> None:
        self.loss(call(self.x, return_points=True) if self.morse else call(self.x), self.labels).backward()

    def operations(self, figure: str) -> int:
        training = figure == "training step"
        self.network.train(training)
        torch.manual_seed(0)
        with self._setting(training), Operations() as counter:
            self._backward(self.network) if training else self.network(self.x[:1])
        self.optimizer.zero_grad()
        return counter.count

    @contextlib.contextmanager
    def _setting(self, training: bool) -> Iterator[None]:
        with torch.set_grad_enabled(training), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            yield

    def _train(self) -> None:
        self._backward(self.call)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, figure: str) -> float:
        """Seconds of one repeat."""
        training = figure == "training step"
        self.network.train(training)
        torch.manual_seed(self.runs)
        self.runs += 1
        job = {"training step": self._train, "inference": self._infer, "sliding window": self._slide}[figure]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with self._setting(training):
            job()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _serve(pipe: Any, *arguments: Any) -> None:
    try:
        bench = Bench(*arguments)
        for name, *rest in iter(pipe.recv, None):
            pipe.send(getattr(bench, name)(*rest))
    except Exception as error:
        pipe.send(error)


class Worker:
    """A :class:`Bench` in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *arguments), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, *call: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already, and left word of why
            self.pipe.send(call)
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise MemoryError("the process ended, most likely for want of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


def measure(
    backbone: str, row: str, repeats: int, base: str = "bare", times: Sequence[str] = TIMES, **options: Any
) -> dict[str, Any]:
    """Every figure of one row as [ratio to its base, lowest, highest repeat, mean]; ``error`` where it could not be had."""
    arguments = tuple(options[name] for name in OPTIONS)
    workers = [Worker(backbone, name, *arguments) for name in (base, row)]
    result: dict[str, Any] = {"backbone": backbone, "row": row, "base": base}
    try:
        bare, own = (w("count") for w in workers)
        for figure in own:
            result[figure] = [own[figure] / bare[figure]] * 4
        result["absolute multiply-adds of base"] = bare["multiply-adds"]
        for figure in times:
            n = repeats if figure != "sliding window" else max(1, repeats // 2)
            for worker in workers:
                worker("run", figure)  # warms up
            pairs = [[w("run", figure) for w in workers] for _ in range(n)]
            ratios = sorted(b / a for a, b in pairs)
            mean = sum(b for _, b in pairs) / sum(a for a, _ in pairs)
            result[figure] = [statistics.median(ratios), ratios[0], ratios[-1], mean]
            if figure != "sliding window":
                kind = "training" if figure == "training step" else "inference"
                bare_memory, own_memory = (w("memory") for w in workers)
                result[f"memory, {kind}"] = [own_memory / bare_memory] * 4
                bare_count, own_count = (w("operations", figure) for w in workers)
                result[f"operations, {kind}"] = [own_count / bare_count] * 4
                result[f"absolute operations of base, {kind}"] = bare_count
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for worker in workers:
            worker.stop()
    return result


def operations(backbone: str, rows: Sequence[str], **options: Any) -> str:
    """Markdown: what each row dispatches, and as a ratio to the first."""
    lines = ["| backbone | row | inference | training step |", "| --- | --- | --- | --- |"]
    counts = [[Bench(backbone, r, *(options[n] for n in OPTIONS)).operations(f) for f in ("inference", TIMES[2])] for r in rows]
    for row, own in zip(rows, counts):
        cells = " | ".join(f"{n} ({n / bare:.2f})" for n, bare in zip(own, counts[0]))
        lines.append(f"| {backbone} | {row} | {cells} |")
    return "\n".join(lines)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""

    def cell(figure: str, value: list[float] | None) -> str:
        if value is None:
            return ""
        middle, low, high, mean = value
        spread = "" if low == high else f" ({low:.3g} to {high:.3g})"
        return f"{middle:.3g}{spread}" + (f", mean {mean:.3g}" if figure == "training step" else "")

    lines = ["| backbone | row | " + " | ".join(FIGURES) + " |", "| --- " * (2 + len(FIGURES)) + "|"]
    for r in results:
        note = f" ({r['error']})" if "error" in r else ""
        lines.append(f"| {r['backbone']} | {r['row']}{note} | " + " | ".join(cell(f, r.get(f)) for f in FIGURES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small windows, for a CPU")
    parser.add_argument("--backbones", nargs="*", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}, or bundles' folders")
    parser.add_argument(
        "--over", nargs="*", default=[], help="files in bundles' configs that lie over train.yaml, e.g. slices.yaml"
    )
    rows = f"of {', '.join(ROWS)}, with options where wanted: 'default gate_stride=1 coarse=experts'"
    parser.add_argument("--rows", nargs="*", default=[r for r in ROWS if r != "bare"], help=rows)
    parser.add_argument("--base", default="bare", help="the row that ratios are to")
    parser.add_argument("--operations", action="store_true", help="count operations alone, in seconds")
    parser.add_argument("--times", nargs="*", default=list(TIMES), choices=list(TIMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compiled", action="store_true", help="torch.compile")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", help="file for the figures, added to row by row")
    args = parser.parse_args()
    for row in [args.base, *args.rows]:
        try:
            parse(row)
        except ValueError as error:
            parser.error(str(error))
    for backbone in args.backbones:
        missing = [n for n in ("train.yaml", *args.over) if not (Path(backbone) / "configs" / n).is_file()]
        if backbone not in SETTINGS and missing:
            where = f"the folder of a bundle; it has no configs/{missing[0]}"
            parser.error(f"backbone {backbone!r}: must be one of {', '.join(SETTINGS)}, or {where}")
    options = {n: getattr(args, n) for n in OPTIONS}
    if args.operations:
        print("\n\n".join(operations(b, [args.base, *args.rows], **options) for b in args.backbones))
        return
    results = []
    for backbone, row in tqdm([(b, r) for b in args.backbones for r in args.rows], desc="cost", disable=None):
        results.append(measure(backbone, row, args.repeats, args.base, args.times, **options))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
