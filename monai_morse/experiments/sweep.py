"""``python -m monai_morse sweep``: every cell of a grid of options as a training and an evaluation of its own, run by Ray.

A cell's folder holds ``run.json`` (what was run and how far it got), ``log.txt``, ``model.pt``, ``model_last.pt``,
``curve.csv`` and ``metrics.csv``; :mod:`monai_morse.experiments.report` makes tables of them. All paths are absolute: on a
cluster, the nodes share them.
"""

from __future__ import annotations

import copy
import itertools
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.bundle import ConfigParser
from tqdm import tqdm

from monai_morse.config import check_choice
from monai_morse.errors import InputError
from monai_morse.losses import SCHEDULES
from monai_morse.networks.morse import EXPERTS, PRESETS, RENDERERS

from .runs import read_run, write_curve, write_run

__all__ = ["Cell", "parse_options", "plan_sweep", "run_sweep"]

WORDS = {"experts": EXPERTS, "renderer": RENDERERS, "schedule": SCHEDULES, "preset": PRESETS}
RETRIES = 5  # of a cell whose node is lost, or whose process is killed for its memory
DIE_WITH_PARENT = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
OWN = ("bundle_root", "ckpt_dir", "output_dir", "resume")  # names that the sweep gives each cell


def parse_options(text: str) -> dict[str, Any]:
    """``name=value`` pairs separated by blanks; values are YAML.

    >>> parse_options("experts=[none, dense] fold=[0,1] dataset_dir=/data/Task04")
    {'experts': ['none', 'dense'], 'fold': [0, 1], 'dataset_dir': '/data/Task04'}

    Raises:
        InputError: for anything else, or a name given twice.
    """
    found: dict[str, Any] = {}
    pairs = re.findall(r"([\w#]+)=(.*?)(?=\s+[\w#]+=|$)", text.strip(), re.DOTALL)
    if " ".join(f"{n}={v}".strip() for n, v in pairs).split() != text.split():
        raise InputError(f"expected name=value pairs like 'experts=[none,dense] fold=[0,1]', got {text!r}")
    for name, value in pairs:
        if name in found:
            raise InputError(f"{name} is given twice in {text!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value.strip()  # e.g. a $ expression
    return found


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its values of the grid's names, its folder and what is started there."""

    values: dict[str, Any]
    folder: Path
    record: dict[str, Any]
    train: list[str]
    evaluate: list[str]

    @property
    def trained(self) -> bool:
        return read_run(self.folder).get("status") in ("trained", "done")

    @property
    def done(self) -> bool:
        return read_run(self.folder).get("status") == "done" and (self.folder / "metrics.csv").is_file()

    def commands(self) -> list[list[str]]:
        """What is left to run."""
        if self.trained:
            return [self.evaluate]
        return [self.train + (["--resume", "true"] if (self.folder / "model_last.pt").is_file() else []), self.evaluate]


def plan_sweep(
    bundle: Path, grid: Mapping[str, Any], out: Path, options: Mapping[str, Any], over: Sequence[str] = ()
) -> list[Cell]:
    """The cells of a grid, checked.

    Args:
        bundle: folder with ``configs/train.yaml`` and ``configs/evaluate.yaml``.
        grid: lists of values by the name in ``train.yaml``.
        out: folder for the cells' folders.
        options: values that all cells share, by the name in either file.
        over: further files in ``configs`` that lie over ``train.yaml``, such as ``slices.yaml``; ``evaluate.yaml`` comes last.

    Raises:
        InputError: for a bundle without the files, a name that they do not have, an unknown word, or a folder that holds a run
            with other options.
    """
    bundle, out = bundle.resolve(), out.resolve()
    files = [bundle / "configs" / name for name in ("train.yaml", *over, "evaluate.yaml")]
    for file in files:
        if not file.is_file():
            needed = " and ".join(f.name for f in files)
            raise InputError(f"no {file}; give --bundle the folder of a bundle with {needed} in configs")
    train_config = ConfigParser.load_config_files(files[:-1])
    both = ConfigParser.load_config_files(files)
    names = [f.name for f in files]
    for given, known, where in ((grid, train_config, " or ".join(names[:-1])), (options, both, " or ".join(names))):
        for name, value in given.items():
            if name in OWN or name.split("#")[0] not in known:
                why = "is set by the sweep" if name in OWN else f"is no name in {where} of {bundle.name}"
                raise InputError(f"{name} {why}; take one at the left margin of {files[0]}")
            for word in value if given is grid and isinstance(value, list) else [value]:
                words = train_config.get("backbones") if name == "backbone" else WORDS.get(name)
                if words is not None:
                    check_choice(name, word, words)
    for name, value in grid.items():
        if not isinstance(value, list) or not value:
            raise InputError(f"the grid's {name} must be a list of values like {name}=[{value}], got {value!r}")
        if name in options:
            raise InputError(f"{name} is in the grid and among the options that all cells share; give it once")

    plain = {n: v for n, v in train_config.items() if isinstance(v, (str, int, float)) and not str(v).startswith(("$", "@"))}
    versions = {name: version(name) for name in ("monai_morse", "monai", "torch")} | {"python": platform.python_version()}
    cells = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination))
        chosen = {**options, **values}
        folder = out / ("_".join(f"{n}-{v}" for n, v in values.items()).translate(_FOLDER) or "run")
        known_here = {**plain, **_by_preset(train_config, chosen), **chosen}
        settings = {n: v for n, v in known_here.items() if n.split("#")[0] in train_config and n not in OWN}
        record = {
            "bundle": bundle.name,
            "cell": values,
            "options": chosen,
            "settings": {**settings, "over": list(over)} if over else settings,
            "versions": versions,
        }
        run = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
        places = {"bundle_root": bundle, "logging_file": bundle / "configs" / "logging.conf"}
        places |= {"ckpt_dir": folder, "output_dir": folder}
        shared = [str(w) for n, v in places.items() for w in (f"--{n}", v)]
        commands = [
            [*run, "--config_file", config, *shared]
            + [str(w) for n, v in chosen.items() if n.split("#")[0] in known for w in (f"--{n}", v)]
            for config, known in ((str([str(f) for f in files[:-1]]), train_config), (str([str(f) for f in files]), both))
        ]
        cells.append(Cell(values, folder, record, *commands))
        _check_same(cells[-1])
    folders = [c.folder.name for c in cells]
    twice = sorted({f for f in folders if folders.count(f) > 1})
    if twice:
        raise InputError(f"two cells of the grid would have the folder {twice[0]}; give each value once")
    return cells


def _by_preset(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Values at a config's left margin that follow from the preset."""
    parser = ConfigParser(copy.deepcopy(dict(config)))
    parser.update(dict(chosen))
    names = [n for n, v in config.items() if isinstance(v, str) and v.startswith("$") and "@preset" in v and n not in chosen]
    return {n: v for n in names if (v := parser.get_parsed_content(n)) is not None}


_FOLDER = str.maketrans({c: "." for c in " #/\\:,[]()'\"$@*?"})


def _check_same(cell: Cell) -> None:
    """A folder with results of other options is nobody's to overwrite."""
    run = read_run(cell.folder)
    if "options" not in run or not any((cell.folder / f).is_file() for f in ("metrics.csv", "model_last.pt")):
        return
    before, wanted = ({**r["options"], "over": r.get("settings", {}).get("over")} for r in (run, cell.record))
    for name in {**before, **wanted}:
        then, now = before.get(name), wanted.get(name)
        if then != now:
            raise InputError(f"{cell.folder} holds a run with {name} {then!r}, not {now!r}; give another --out or remove it")


def run_cell(folder: Path, record: dict[str, Any], commands: Sequence[list[str]], threads: int, cwd: str) -> str:
    """Train and evaluate one cell, its words in ``log.txt``; returns what went wrong.

    A cell that is stopped (a cancelled task is interrupted by Ray) stops its training too, and so does one whose process is
    killed, on Linux: Ray then starts the cell elsewhere, and its training must not be there twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.time()
    # trainings on unlike devices draw other points and masks
    record = {**record, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}
    (folder / "metrics.csv").unlink(missing_ok=True)
    with open(folder / "log.txt", "a") as log:
        for i, command in enumerate(commands):
            evaluates = i == len(commands) - 1
            write_run(folder, {**record, "status": "trained" if evaluates else "training"})
            if evaluates:
                write_curve(folder)
            print(f"\n$ {shlex.join(command)}", file=log, flush=True)
            words = [sys.executable, "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
            process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=cwd, env=environment, start_new_session=True
            )
            try:
                while process.poll() is None:  # not wait(): Ray's interrupt would not end it
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if process.returncode:
                # a failed evaluation does not train again: its weights are there
                write_run(folder, {**record, "status": "trained" if evaluates else "failed"})
                return f"{'evaluation' if evaluates else 'training'} ended with exit code {process.returncode}"
    write_run(folder, {**record, "status": "done", "seconds": round(time.time() - started, 1)})
    return ""


def run_left(cell: Cell, threads: int, cwd: str) -> str:
    """What is left to run of a cell, found out where it runs: Ray starts it again on another node when its own is lost."""
    return "" if cell.done else run_cell(cell.folder, cell.record, cell.commands(), threads, cwd)


def _last_words(folder: Path) -> str:
    log = folder / "log.txt"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["(nothing in its log)"])[-1][:300]


def run_sweep(cells: Sequence[Cell], cpus: int = 1, gpus: float = 0, address: str | None = None) -> list[str]:
    """Run what is not done, on Ray; returns a line for each cell that failed.

    A cell whose node is lost goes on from its checkpoint on another.

    Args:
        cells: of :func:`plan_sweep`.
        cpus: of a run, also its threads; default 1.
        gpus: of a run; default 0, which hides them from it. 0.5 lets two runs share one.
        address: of a Ray cluster, or ``"auto"``; default: this machine alone.

    Raises:
        InputError: without Ray, for an address where no cluster is, or a run larger than this machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    try:
        import ray
    except ImportError as error:
        raise InputError("a sweep runs on Ray, which is not installed: pip install ray") from error

    left = [c for c in cells if not c.done]
    if not left:
        return []
    try:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address=address or "local", include_dashboard=None if address else False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
    pending: dict[Any, Cell] = {}
    failed: list[str] = []
    try:
        nodes = [[n["Resources"].get(kind, 0) for kind in ("CPU", "GPU")] for n in ray.nodes() if n["Alive"]]
        if not any(cpus <= have[0] and gpus <= have[1] for have in nodes):
            lacking = f"a run asks for {cpus} CPUs and {gpus} GPUs, " + " or ".join(f"{c:g} and {g:g}" for c, g in nodes)
            if address is None:
                raise InputError(f"{lacking} is what this machine has")
            print(f"{lacking} is what the cluster's nodes have; waiting for a larger one", file=sys.stderr)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(run_left)
        for cell in left:
            pending[task.remote(cell, max(1, int(cpus)), os.getcwd())] = cell
        with tqdm(total=len(cells), initial=len(cells) - len(left), desc="sweep", unit="run") as bar:
            bar.set_postfix(failed=0)
            while pending:
                (ref,), _ = ray.wait(list(pending), num_returns=1)
                cell = pending.pop(ref)
                try:
                    problem = ray.get(ref)
                except ray.exceptions.RayError as lost:  # e.g. killed for its memory
                    problem = str(lost).splitlines()[0]
                if problem:
                    failed.append(f"{cell.folder.name}: {problem}: {_last_words(cell.folder)}\n    {cell.folder / 'log.txt'}")
                bar.update()
                bar.set_postfix(failed=len(failed))
    finally:
        for ref in pending:
            ray.cancel(ref, force=False)
        if pending:
            ray.wait(list(pending), num_returns=len(pending), timeout=10)
        ray.shutdown()
    return failed


def sweep(
    bundle: Path,
    grid: str,
    out: Path,
    options: str = "",
    cpus: int = 1,
    gpus: float = 0,
    address: str | None = None,
    dry_run: bool = False,
    over: Sequence[str] = (),
) -> int:
    """The command: plan, run, tell; returns the exit code."""
    cells = plan_sweep(bundle, parse_options(grid), out, parse_options(options), over)
    if dry_run:
        for cell in cells:
            print(f"# {cell.folder}" + (": done" if cell.done else ""))
            for command in [] if cell.done else cell.commands():
                print(shlex.join(command))
        return 0
    skipped = sum(c.done for c in cells)
    try:
        failed = run_sweep(cells, cpus, gpus, address)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{len(cells)} runs in {out}: {len(cells) - len(failed)} done ({skipped} of them before), {len(failed)} failed")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else 0
