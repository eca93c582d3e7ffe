"""Sweeps of a bundle that learns nothing: its configs write files."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from monai_morse import InputError
from monai_morse.__main__ import main
from monai_morse.experiments.sweep import DIE_WITH_PARENT, parse_options, plan_sweep, run_cell, run_sweep

TRAIN = """
imports: [$from pathlib import Path]
bundle_root: .
ckpt_dir: models
output_dir: eval
dataset_dir: $@bundle_root + '/data'
experts: stochastic
network_def: {points: 2048}
fold: 0
seed: 0
resume: false
initialize: []
run:
  - $Path(@ckpt_dir + '/model_last.pt').write_text(str([@fold, @seed, @resume]))
"""
EVALUATE = """
weights: $@ckpt_dir + '/model_last.pt'
run:
  - $Path(@output_dir + '/metrics.csv').write_text(Path(@weights).read_text())
"""


@pytest.fixture
def bundle(tmp_path):
    configs = tmp_path / "toy" / "configs"
    configs.mkdir(parents=True)
    (configs / "train.yaml").write_text(TRAIN)
    (configs / "evaluate.yaml").write_text(EVALUATE)
    (configs / "logging.conf").write_bytes((ROOT / "bundles/hippocampus_mri_morse/configs/logging.conf").read_bytes())
    return tmp_path / "toy"


def status(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def test_a_value_inside_a_name_is_recorded_too(bundle, tmp_path):
    cells = plan_sweep(bundle, {"network_def#points": [1, 2]}, tmp_path / "runs", {})
    assert [cell.record["settings"]["network_def#points"] for cell in cells] == [1, 2]
    assert [cell.folder.name for cell in cells] == ["network_def.points-1", "network_def.points-2"]


def test_what_the_preset_decides_is_recorded(tmp_path):
    toy = ROOT / "bundles" / "hippocampus_mri_morse"
    cells = plan_sweep(toy, {"preset": ["light", "paper"], "stride": [1, 2]}, tmp_path, {"eval_points": 9})
    words = ("width", "patch_norm", "learning_rate", "schedule", "eval_points")
    found = [tuple(cell.record["settings"].get(word) for word in words) for cell in cells]
    light = [(16, norm, 0.002, "scratch", 9) for norm in (False, True)]
    assert found == [*light, *[(None, None, 0.0005, "ramp", 9)] * 2]
    (cell,) = plan_sweep(toy, {"fold": [0]}, tmp_path, {}, ["slices.yaml"])
    assert [cell.record["settings"][word] for word in ("image_patch", "patch_norm", "batch_size")] == [7, True, 8]


def test_a_file_that_lies_over_the_training_has_names_and_is_told_and_recorded(bundle, tmp_path, capsys):
    (bundle / "configs" / "slices.yaml").write_text("fold: 2\nnetwork_def#points: 64\nplanes: 3\n")
    runs = tmp_path / "runs"
    (cell,) = plan_sweep(bundle, {"planes": [3]}, runs, {}, ["slices.yaml"])
    assert cell.record["settings"]["fold"] == 2 and cell.record["settings"]["over"] == ["slices.yaml"]
    assert run_cell(cell.folder, cell.record, cell.commands(), 1, ".") == "", (cell.folder / "log.txt").read_text()
    assert (cell.folder / "metrics.csv").read_text() == "[2, 0, False]"
    with pytest.raises(InputError, match="planes is no name in train.yaml of toy"):
        plan_sweep(bundle, {"planes": [3]}, runs, {})
    with pytest.raises(InputError, match="with train.yaml and fine.yaml and evaluate.yaml in configs"):
        plan_sweep(bundle, {"fold": [0]}, runs, {}, ["fine.yaml"])
    (bundle / "configs" / "other.yaml").write_text("planes: 3\n")
    with pytest.raises(InputError, match=r"holds a run with over \['slices.yaml'\], not \['other.yaml'\]"):
        plan_sweep(bundle, {"planes": [3]}, runs, {}, ["other.yaml"])
    words = ["sweep", "--bundle", str(bundle), "--out", str(tmp_path / "more"), "--over", "slices.yaml", "--grid", "fold=[1]"]
    assert main([*words, "--dry_run"]) == 0 and capsys.readouterr().out.count("slices.yaml") == 2


PYTHON = """#!/bin/sh
case "$*" in
    *"--fold 1"*) touch {runs}/fold-1/model_last.pt; echo "error: no such fold"; exit 1;;
    *evaluate*) echo figures > {runs}/fold-0/metrics.csv;;
esac
"""


def test_one_cell_fails_the_other_is_done_and_a_second_call_runs_only_what_is_left(bundle, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="pip install monai_morse[cluster]")
    runs, python = tmp_path / "runs", tmp_path / "python"
    python.write_text(PYTHON.format(runs=runs))
    python.chmod(0o755)
    words = {"grid": {"fold": [0, 1]}, "out": runs, "options": {"seed": 3}}
    monkeypatch.setattr("sys.executable", str(python))
    cells = plan_sweep(bundle, **words)
    monkeypatch.undo()
    monkeypatch.setattr("monai_morse.experiments.sweep.plan_sweep", lambda *args: cells)
    # all CPUs: one after the other, in one worker
    assert (
        main(["sweep", "--bundle", str(bundle), "--out", str(runs), "--grid", "fold=[0,1]", "--cpus", str(os.cpu_count())]) == 1
    )
    told = capsys.readouterr().out
    assert "2 runs in" in told and "1 done (0 of them before), 1 failed" in told
    assert "failed: fold-1: training ended with exit code 1: error: no such fold" in told
    assert str(runs / "fold-1" / "log.txt") in told
    assert (status(runs / "fold-0"), status(runs / "fold-1")) == ("done", "failed")

    before = (runs / "fold-0" / "log.txt").read_text()
    monkeypatch.undo()
    cells = plan_sweep(bundle, **words)
    assert [c.done for c in cells] == [True, False]
    assert cells[1].commands()[0][-2:] == ["--resume", "true"]  # it left a checkpoint
    assert run_sweep(cells[:1]) == [] and (runs / "fold-0" / "log.txt").read_text() == before
    with pytest.raises(InputError, match="holds a run with seed 3, not 4; give another --out"):
        plan_sweep(bundle, **{**words, "options": {"seed": 4}})


def test_a_cell_is_two_bundle_runs_with_its_options_and_its_record(bundle, tmp_path):
    (cell,) = plan_sweep(bundle, {"fold": [0]}, tmp_path / "runs", {"seed": 3})
    assert run_cell(cell.folder, cell.record, cell.commands(), 1, ".") == "", (cell.folder / "log.txt").read_text()
    run = json.loads((cell.folder / "run.json").read_text())
    assert run["status"] == "done" and run["cell"] == {"fold": 0} and run["options"] == {"fold": 0, "seed": 3}
    assert run["settings"] == {"experts": "stochastic", "fold": 0, "seed": 3}
    assert (cell.folder / "metrics.csv").read_text() == "[0, 3, False]"


@pytest.mark.parametrize("gpu, device", [(True, "NVIDIA X1"), (False, platform.machine())])
def test_a_run_tells_the_gpu_that_it_could_use(bundle, tmp_path, monkeypatch, gpu, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X1")
    (cell,) = plan_sweep(bundle, {"fold": [0]}, tmp_path / "runs", {})
    assert run_cell(cell.folder, cell.record, [["true"], ["true"]], 1, ".") == ""
    assert json.loads((cell.folder / "run.json").read_text())["device"] == device


def test_a_run_whose_evaluation_failed_or_was_stopped_does_not_train_again(bundle, tmp_path):
    (cell,) = plan_sweep(bundle, {"fold": [2]}, tmp_path / "runs", {})
    stop = ["sh", "-c", "exit 3"]
    train = ["sh", "-c", f"echo trained; touch {cell.folder}/model_last.pt"]
    assert run_cell(cell.folder, cell.record, [train, stop], 1, ".") == "evaluation ended with exit code 3"
    assert cell.trained and not cell.done
    assert cell.commands() == [cell.evaluate]


def test_a_stopped_cell_takes_its_training_along(bundle, tmp_path, monkeypatch):
    (cell,) = plan_sweep(bundle, {"fold": [2]}, tmp_path / "runs", {})
    started = []
    original = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(original(*a, **k)) or started[-1])

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell.folder, cell.record, [["sleep", "60"]] * 2, 1, ".")
    assert started[0].returncode == -9 and len(started) == 1
    assert status(cell.folder) == "training"


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own means are Linux's")
def test_a_cell_whose_process_is_killed_takes_its_training_along():
    code = f"""
import os, subprocess, sys, time
words = [sys.executable, "-S", "-c", {DIE_WITH_PARENT!r}, str(os.getpid()), "sleep", "60"]
print(subprocess.Popen(words).pid, flush=True)
time.sleep(60)
"""
    cell = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
    command = Path(f"/proc/{int(cell.stdout.readline())}/cmdline")

    def soon(true):
        deadline = time.time() + 20
        while not true() and time.time() < deadline:
            time.sleep(0.05)
        return true()

    assert soon(lambda: command.read_bytes().startswith(b"sleep"))
    cell.kill()
    cell.wait()
    cell.stdout.close()
    assert soon(lambda: not command.is_file() or not command.read_bytes())  # gone, or waiting to be reaped


def test_a_dry_run_prints_what_would_be_started(bundle, tmp_path, capsys):
    words = ["sweep", "--bundle", str(bundle), "--out", str(tmp_path / "runs"), "--dry_run"]
    assert main([*words, "--grid", "experts=[none,dense]", "--set", "weights=/w.pt dataset_dir=/data/x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not (tmp_path / "runs").exists()
    assert "--experts none" in lines[1] and "--dataset_dir /data/x" in lines[1] and "--weights" not in lines[1]
    assert "--weights /w.pt" in lines[2] and "evaluate.yaml" in lines[2]


@pytest.mark.parametrize(
    "grid, options, message",
    [
        ("expert=[none]", "", "expert is no name in train.yaml of toy"),
        ("experts=[none,sparse]", "", "experts must be one of .*'sparse'"),
        ("fold=0", "", r"must be a list of values like fold=\[0\]"),
        ("fold=[]", "", "must be a list of values"),
        ("weights=[a]", "", "weights is no name in train.yaml"),
        ("ckpt_dir=[a]", "", "ckpt_dir is set by the sweep"),
        ("fold=[0,1]", "fold=1", "fold is in the grid and among"),
        ("fold=[0,0]", "", "two cells of the grid would have the folder fold-0"),
        ("fold [0]", "", "expected name=value pairs"),
        ("fold=[0] fold=[1]", "", "fold is given twice"),
    ],
)
def test_a_grid_that_cannot_be_run_is_an_error_before_anything_starts(grid, options, message, bundle, tmp_path):
    with pytest.raises(InputError, match=message):
        plan_sweep(bundle, parse_options(grid), tmp_path / "runs", parse_options(options))
    assert not (tmp_path / "runs").exists()


def test_no_bundle_and_no_ray_are_told(bundle, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no .*nowhere/configs/train.yaml"):
        plan_sweep(tmp_path / "nowhere", {"fold": [0]}, tmp_path / "runs", {})
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="pip install ray"):
        run_sweep(plan_sweep(bundle, {"fold": [0]}, tmp_path / "runs", {}))


# a training of ten short epochs that resumes as the bundles' do; it tells where it runs
STUB = """#!{python} -S
import os, sys, time
words = sys.argv[1:]
config, folder = (words[words.index(name) + 1] for name in ("--config_file", "--ckpt_dir"))
node, state = os.environ["RAY_RAYLET_PID"], folder + "/model_last.pt"
with open(folder + "/started.txt", "a+") as file:
    file.seek(0)
    alive = [line for line in file.read().splitlines() if os.path.exists("/proc/" + line.split()[3])]
    print("evaluate" if "evaluate" in config else "train", "--resume" in words, node, os.getpid(), len(alive), file=file)
if "evaluate" in config:
    open(folder + "/metrics.csv", "w").write("case,class,dice\\n")
    sys.exit()
epochs = open(state).read().split() if "--resume" in words else []
for epoch in range(len(epochs), 10):
    time.sleep(0.4)
    epochs.append(str(epoch) + "@" + node)
    open(state + ".partial", "w").write(" ".join(epochs))
    os.replace(state + ".partial", state)
"""


@pytest.mark.timeout(300)
def test_a_cell_whose_node_is_killed_goes_on_from_its_checkpoint_on_another(bundle, tmp_path, capsys, monkeypatch):
    pytest.importorskip("ray", reason="pip install monai_morse[cluster]")
    from ray.cluster_utils import Cluster

    runs, python = tmp_path / "runs", tmp_path / "python"
    python.write_text(STUB.format(python=sys.executable))
    python.chmod(0o755)
    words = {"grid": {"fold": [0, 1]}, "out": runs, "options": {}}
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", str(python))
        cells = plan_sweep(bundle, **words)
    monkeypatch.setattr("monai_morse.experiments.sweep.plan_sweep", lambda *args: cells)
    quick = {f"health_check_{name}": n for name, n in {"initial_delay_ms": 0, "period_ms": 300, "failure_threshold": 3}.items()}
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": quick})
    lost = []

    def kill():
        """The second node, as soon as both cells have epochs behind them."""
        states = [cell.folder / "model_last.pt" for cell in cells]
        while not all(s.is_file() and len(s.read_text().split()) >= 3 for s in states):
            time.sleep(0.05)
        process = second.all_processes["raylet"][0].process
        cluster.remove_node(second, allow_graceful=False)
        lost.append(process.pid)

    try:
        second = cluster.add_node(**node, resources={"second": 1})
        cluster.wait_for_nodes()
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        asked = ["sweep", "--bundle", str(bundle), "--out", str(runs), "--grid", "fold=[0,1]", "--address", cluster.address]
        assert main(asked) == 0
        killer.join(60)
    finally:
        cluster.shutdown()
    assert "2 done (0 of them before), 0 failed" in capsys.readouterr().out

    moved = 0
    for cell in cells:
        epochs, places = zip(*(epoch.split("@") for epoch in (cell.folder / "model_last.pt").read_text().split()))
        assert list(epochs) == [str(n) for n in range(10)]  # none lost, none twice
        starts = [line.split() for line in (cell.folder / "started.txt").read_text().splitlines()]
        assert [s[0] for s in starts].count("evaluate") == 1 and status(cell.folder) == "done"
        first = {s[2] for s in starts[:1]}
        if str(lost[0]) in first:
            moved += 1
            assert [s[:2] for s in starts] == [["train", "False"], ["train", "True"], ["evaluate", "False"]]
            assert len(set(places)) == 2 and places[0] == str(lost[0]) != places[-1]
        else:
            assert [s[:2] for s in starts] == [["train", "False"], ["evaluate", "False"]] and set(places) == first
        assert {s[4] for s in starts} == {"0"}  # no training outlived its node
    assert moved == 1
