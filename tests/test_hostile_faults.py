"""Files, words and runs as they should not be: a table each, a row a fault, what it is and what must come out.

What a row ends in is one line that names the file or the word, what was expected and the remedy.
"""

import inspect
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
import typing
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TINY
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.transforms import RandFlip as Flip
from zoo import write_bundle

import monai_morse
from monai_morse import InputError, Morse, MorseLoss, load_matching
from monai_morse.__main__ import main
from monai_morse.data import check_split, files, msd_cases, usable_cases
from monai_morse.errors import ending, say_how_to_go_on
from monai_morse.handlers import EpochSeed, RenderSchedule, TrainingState, Validation, WeightsLoader, checkpoints
from monai_morse.inferers import AutocastInferer, FineGridInferer, MorseInferer
from monai_morse.networks import PointSelection, check_window
from monai_morse.networks.experts import Mixture
from monai_morse.weights import read_checkpoint
from monai_morse.words import WORDS, check_words
from monai_morse.wrap import wrap_bundle

FINE = ""


def training(
    folder,
    resume=False,
    epochs=2,
    batch=2,
    net=None,
    settings=None,
    decay=0.01,
    rate=0.1,
    at=None,
    optimizer=None,
    transform=None,
    processes=1,
):
    """A tiny training as a bundle's: four cases, checkpoints after each epoch; ``at`` is called when an epoch starts."""
    torch.manual_seed(0)
    net = net or torch.nn.Linear(2, 2)
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=decay)

    def step(engine, x):
        optimizer.zero_grad()
        sum(p.pow(2).sum() for p in net.parameters() if p.requires_grad).backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.device = torch.device("cpu")
    if at:
        engine.add_event_handler(Events.EPOCH_STARTED, at)
    state = TrainingState(folder / "model_last.pt", net, optimizer, resume=resume, settings=settings)
    state.attach(engine)
    loader = torch.utils.data.DataLoader(Dataset(torch.rand(4, 2), transform), batch_size=batch)
    try:
        with mock.patch.object(checkpoints.idist, "get_world_size", return_value=processes):
            engine.run(loader, max_epochs=epochs)
    finally:
        if getattr(state, "lock", None):
            state.lock.release(force=True)  # as the end of the process does
    return net


@pytest.fixture(autouse=True)
def nothing_to_go_on_from():
    yield
    say_how_to_go_on()


# --- checkpoints: what the file is, and how reading it must end

STATE = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}


class Thing:
    """Of a library that is not there."""


def whole(path, **more):
    torch.save({"model": STATE, **more}, path)
    return path.read_bytes()


def cut(path, size):
    path.write_bytes(whole(path)[:size])


def flip(path):
    """One bit of one weight, which torch reads without a word."""
    content = bytearray(whole(path))
    content[bytes(content).index(np.ones(4, np.float32).tobytes()) + 2] ^= 0x40
    path.write_bytes(content)


def renamed(path):
    """A numpy scalar as the other generation of numpy names it."""
    names = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    own, other = names if np.__version__ >= "2" else names[::-1]
    torch.save({"model": STATE, "best_metric": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    assert own in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(own, other))


DAMAGED = "is truncated or damaged; copy it again, or take another checkpoint, .*model_last.previous.pt"
OBJECT = "which is not read, for it could run code; if you trust its source, .*state dict alone"
CHECKPOINTS = {
    "plain": (whole, FINE),
    "a state dict alone": (lambda p: torch.save(STATE, p), FINE),
    "before torch 1.6": (lambda p: torch.save({"model": STATE}, p, _use_new_zipfile_serialization=False), FINE),
    "a numpy number": (lambda p: whole(p, best_metric=np.float64(0.5)), FINE),
    "a numpy number of half precision": (lambda p: whole(p, best_metric=np.float16(0.5)), FINE),
    "a numpy integer": (lambda p: whole(p, epoch=np.int64(3)), FINE),
    "a numpy truth": (lambda p: whole(p, done=np.bool_(True)), FINE),
    "a numpy array": (lambda p: whole(p, history=np.arange(3.0)), FINE),
    "a numpy array of words": (lambda p: whole(p, names=np.array(["a", "b"])), FINE),
    "numpy's random state": (lambda p: whole(p, random=np.random.get_state()), FINE),  # noqa: NPY002
    "a number of the other numpy": (renamed, FINE),
    "no file": (lambda p: None, "no checkpoint at .*model.pt; train first, or give the path of one"),
    "a folder": (lambda p: p.mkdir(), "is a folder, not a checkpoint; give a file in it, e.g. .*model.pt/model.pt"),
    "empty": (lambda p: p.touch(), "is empty, 0 bytes; take another checkpoint"),
    "its first 3 bytes": (lambda p: cut(p, 3), DAMAGED),
    "its first half": (lambda p: cut(p, len(whole(p)) // 2), DAMAGED),
    "all but its last byte": (lambda p: cut(p, -1), DAMAGED),
    "one bit flipped": (flip, DAMAGED),
    "a zip archive of something else": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), DAMAGED),
    "a pickle cut off": (lambda p: p.write_bytes(b"\x80\x02}q\x00"), DAMAGED),
    "a text": (lambda p: p.write_text("weights: 1\n"), "is no checkpoint: torch.save did not write it; give the file"),
    "a page of a web server": (lambda p: p.write_text("<!DOCTYPE html>"), "is no checkpoint"),
    "git's pointer to a large file": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1"), "is no checkpoint"),
    "bytes": (lambda p: p.write_bytes(bytes(range(256))), "is no checkpoint"),
    "a compiled network": (
        lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(p)),
        r"is a compiled network \(TorchScript\), not a checkpoint; give the .pt file",
    ),
    "a whole network": (lambda p: torch.save(torch.nn.Linear(2, 2), p), f"holds a torch.nn.modules.linear.Linear, {OBJECT}"),
    "an object of its own": (lambda p: whole(p, thing=Thing()), f"holds a {__name__}.Thing, {OBJECT}"),
    "a path": (lambda p: whole(p, source=Path("a")), f"holds a pathlib.*Path, {OBJECT}"),
    "an array of objects": (lambda p: whole(p, things=np.array([{}], object)), f"holds a numpy.dtypes.ObjectDType, {OBJECT}"),
}


def load_weights(path):
    engine = Engine(lambda engine, batch: None)
    engine.state.device = torch.device("cpu")
    WeightsLoader(str(path), torch.nn.Linear(2, 2)).attach(engine)
    engine.run([0])


READERS = {
    "read": read_checkpoint,
    "weights": load_weights,
    "fine-tuning": lambda path: load_matching(torch.nn.Linear(2, 2), path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_read_or_refused_by_name_wherever_it_is_read(name, reader, tmp_path):
    write, message = CHECKPOINTS[name]
    path = tmp_path / "model.pt"
    write(path)
    if message == FINE:
        READERS[reader](path)
        return
    before = list(torch.serialization.get_safe_globals())
    with pytest.raises(InputError, match=message) as caught:
        READERS[reader](path)
    told = str(caught.value)
    assert str(path) in told and "\x1b" not in told and len(told.splitlines()) == 1
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.mark.parametrize("name", [n for n, (_, message) in CHECKPOINTS.items() if message and n != "no file"])
def test_a_training_is_not_resumed_from_what_cannot_be_read(name, tmp_path):
    write, message = CHECKPOINTS[name]
    write(tmp_path / "model_last.pt")
    with pytest.raises(InputError, match=message.replace("model.pt/", "model_last.pt/")):
        training(tmp_path, resume=True)
    assert (tmp_path / "model_last.pt").exists()


def test_wrap_reads_checkpoints_as_all_do_and_tells_no_temporary_path(tmp_path):
    bundle = write_bundle("spleen", tmp_path / "bundle")
    path = bundle / "models/model.pt"
    state = torch.load(path, weights_only=True)
    torch.save({"state_dict": state.get("state_dict", state), "best_metric": np.float64(0.5)}, path)
    assert "models/model.pt: " in str(wrap_bundle(bundle, tmp_path / "out"))
    for name in ("empty", "its first half", "a text", "an object of its own"):
        write, message = CHECKPOINTS[name]
        path.unlink()
        write(path)
        with pytest.raises(InputError, match=f"models/model.pt {message}") as caught:
            wrap_bundle(bundle, tmp_path / "again")
        assert "partial" not in str(caught.value)


# --- resume: what differs from the training that stopped, and what is told


def morse(**options):
    return Morse(TINY["BasicUNet"](2, 2), **{**SMALL, **options})


def frozen():
    net = morse()
    net.freeze_backbone()
    return net


BEFORE = {"settings": {"fold": 0, "patch_size": [32, 32], "schedule": "scratch"}}
RESUMED = {  # (the training before, what is resumed, what must come out)
    "the same": (BEFORE, BEFORE, FINE),
    "words of a command line": (BEFORE, {"settings": {"fold": "0", "patch_size": (32, 32)}}, FINE),
    "more epochs": ({}, {"epochs": 9}, FINE),
    "another learning rate": ({}, {"rate": 0.5}, FINE),
    "other augmentations": ({"transform": Flip(prob=0.1)}, {"transform": Flip(prob=0.5)}, FINE),
    "a checkpoint that knows no settings": ({}, BEFORE, FINE),
    "another fold": (
        BEFORE,
        {"settings": {"fold": 1}},
        "is a training with fold 0, not 1; resume it with that, or start without",
    ),
    "another patch": (BEFORE, {"settings": {"patch_size": [16, 16]}}, r"patch_size \[32, 32\], not \[16, 16\]"),
    "two settings": (BEFORE, {"settings": {"fold": 1, "schedule": "ramp"}}, "fold 0, not 1, schedule 'scratch', not 'ramp'"),
    "another batch": ({}, {"batch": 4}, "batch_size 2, not 4"),
    "two processes": ({"processes": 2, "batch": 1}, {"batch": 2}, FINE),
    "another weight decay": ({}, {"decay": 0.5}, "the optimizer's weight_decay 0.01, not 0.5"),
    "another optimizer": (
        {"net": torch.nn.Linear(2, 2)},
        {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)},
        "optimizer 'AdamW', not 'SGD'",
    ),
    "other groups of parameters": (
        {},
        {"optimizer": torch.optim.AdamW([{"params": [p]} for p in torch.nn.Linear(2, 2).parameters()])},
        r"the optimizer's groups \[2\], not \[1, 1\]",
    ),
    "another expert dropout": ({"net": morse()}, {"net": morse(dropout=0.5)}, "network: dropout 0.7, not 0.5"),
    "other points": (
        {"net": morse()},
        {"net": morse(points={"num_train": 32, "num_eval": 100})},
        "network: points: num_train 64, not 32",
    ),
    "another system": ({"net": morse()}, {"net": morse(experts="dense")}, "network: experts 'stochastic', not 'dense'"),
    "a frozen backbone": ({"net": morse()}, {"net": frozen()}, "trained parameters [0-9]+, not [0-9]+"),
    "another architecture": ({"net": torch.nn.Linear(3, 2)}, {}, "trained parameters 8, not 6"),
    "no more epochs": ({}, {"epochs": 2}, "has already 2 epochs; resume with a larger --max_epochs"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_learns_what_it_learned_before_or_is_refused(name, tmp_path, caplog):
    before, after, message = RESUMED[name]
    training(tmp_path, **before)
    stored = (tmp_path / "model_last.pt").read_bytes()
    if name == "a checkpoint that knows no settings":
        old = torch.load(tmp_path / "model_last.pt", weights_only=True)
        torch.save({**old, "settings": {}}, tmp_path / "model_last.pt")
    if message == FINE:
        with caplog.at_level("INFO"):
            training(tmp_path, True, **{"epochs": 3, **after})
        assert "after epoch 2" in caplog.text
        assert ("learning rate from here on: [0.5], before: [0.1]" in caplog.text) == (name == "another learning rate")
        assert ("processes from here on: 1, before: 2" in caplog.text) == (name == "two processes")
        assert ("transforms of the training data" in caplog.text) == (name == "other augmentations")
        return
    with pytest.raises(InputError, match=message):
        training(tmp_path, True, **{"epochs": 3, **after})
    assert (tmp_path / "model_last.pt").read_bytes() == stored


# --- runs: what happens while a training runs


def test_a_second_training_in_a_folder_is_refused_until_the_first_ends_however_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    code = (
        "import sys, time\nfrom monai_morse.data.files import lock_folder\n"
        "lock = lock_folder(sys.argv[1], 'training', '--ckpt_dir')\nprint('locked', flush=True)\ntime.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert first.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match=f"another training is writing to {tmp_path}; wait for it or stop it, or give"):
            training(tmp_path)
        assert os.listdir(tmp_path) == [".training.lock"]
    finally:
        first.kill()
        first.communicate()
    training(tmp_path)
    training(tmp_path, resume=True, epochs=3)  # nor does one that has ended


def test_where_files_cannot_be_locked_a_training_says_so(tmp_path, monkeypatch, caplog):
    def none(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", none)
    training(tmp_path)
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_a_folder_that_is_removed_ends_the_training(tmp_path):
    def remove(engine):
        if engine.state.epoch == 2:
            (tmp_path / "model_last.pt").unlink()

    with pytest.raises(InputError, match="model_last.pt was removed while the training ran.*start it again"):
        training(tmp_path, at=remove)


def test_a_full_disk_keeps_the_last_epoch_and_says_how_to_go_on(tmp_path, monkeypatch):
    def full(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    def fill(engine):
        if engine.state.epoch == 2:
            monkeypatch.setattr("pathlib.Path.write_bytes", full)

    last = tmp_path / "model_last.pt"
    with pytest.raises(OSError) as caught:
        training(tmp_path, at=fill)
    on = f"{last} holds 1 epoch(s); the same command with --resume true goes on from there"
    assert ending(caught.value) == f"error: No space left on device; once that is mended, {on}"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    last.unlink()
    assert ending(KeyboardInterrupt()) == f"stopped; {last} is gone; the same command starts from the beginning"


BUNDLE = """
imports: [$import monai_morse, $import torch]
net: {_target_: torch.nn.Linear, in_features: 2, out_features: 2}
optimizer: {_target_: torch.optim.SGD, params: $@net.parameters(), lr: 0.1}
trainer:
  _target_: SupervisedTrainer
  device: cpu
  max_epochs: 100000
  train_data_loader: "$[{'image': torch.zeros(1, 2), 'label': torch.zeros(1, 2)}] * 3"
  network: '@net'
  optimizer: '@optimizer'
  loss_function: {_target_: torch.nn.MSELoss}
  decollate: false
  train_handlers:
    - {_target_: StatsHandler, name: train, output_transform: "$lambda x: x['loss']"}
    - {_target_: monai_morse.handlers.TrainingState, path: $@folder + '/last.pt', network: '@net', optimizer: '@optimizer'}
initialize: [$monai_morse.short_errors()]
run: [$@trainer.run()]
"""


def test_ctrl_c_ends_a_run_in_one_line_that_says_how_to_go_on(tmp_path):
    (tmp_path / "train.yaml").write_text(BUNDLE + f"folder: {tmp_path}\n")
    words = ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(tmp_path / "train.yaml")]
    words += ["--logging_file", str(ROOT / "bundles/hippocampus_mri_morse/configs/logging.conf")]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
        deadline = time.time() + 200
        while not (tmp_path / "last.pt").is_file() and process.poll() is None and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        code = process.wait(100)
    assert code in (-signal.SIGINT, 130)  # a shell tells the first as the second
    told = (tmp_path / "err").read_text().strip().splitlines()
    assert re.fullmatch(rf"stopped; {tmp_path}/last.pt holds \d+ epoch\(s\); .* --resume true goes on from there", told[-1])
    assert "Traceback" not in "\n".join(told) + (tmp_path / "out").read_text()
    assert "Exception: " not in (tmp_path / "out").read_text() and "terminating" not in (tmp_path / "out").read_text()


def wrapped(error, cause):
    error.__cause__ = cause
    return error


def in_worker(text):
    return RuntimeError(
        f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n{text}"
    )


AGAIN = "what is written is whole, and the same command starts again"
ENDS = {  # the error that reaches the top, and the line that it must end in; None keeps the traceback
    "rejected input": (InputError("no scan"), "error: no scan"),
    "wrapped by MONAI": (wrapped(RuntimeError("applying transform"), InputError("no scan")), "error: no scan"),
    "from a data loader's process": (
        in_worker(
            "  File a\nmonai_morse.errors.InputError: no scan\n\nThe above exception was the direct cause ..\nRuntimeError: x"
        ),
        "error: no scan",
    ),
    "in two lines, from a data loader's process": (
        in_worker("  File a\nmonai_morse.errors.InputError: two scans:\n  a\n  b\n"),
        "error: two scans:\n  a\n  b",
    ),
    "Ctrl-C": (KeyboardInterrupt(), f"stopped; {AGAIN}"),
    "full disk": (OSError(28, "No space left on device"), f"error: No space left on device; once that is mended, {AGAIN}"),
    "folder gone": (
        wrapped(RuntimeError("writing"), FileNotFoundError(2, "No such file or directory", "out/a.csv")),
        f"error: No such file or directory: out/a.csv; once that is mended, {AGAIN}",
    ),
    "no permission": (
        PermissionError(13, "Permission denied", b"a"),
        f"error: Permission denied: a; once that is mended, {AGAIN}",
    ),
    "a bug": (KeyError("x"), None),
    "a bug while one handles a missing file": (KeyError("x"), None),
    "a connection": (ConnectionResetError(104, "Connection reset by peer"), None),
    "another library's OSError": (OSError("cannot identify image file"), None),
    "a word of a config that its class lacks": (
        wrapped(
            RuntimeError("Failed to instantiate component 'torch.optim.AdamW' with keywords: lrr"),
            TypeError("AdamW.__init__() got an unexpected keyword argument 'lrr'"),
        ),
        "error: AdamW.__init__() got an unexpected keyword argument 'lrr'; give one that it has",
    ),
    "a bug in a call": (TypeError("f() got an unexpected keyword argument 'a'"), None),
}


@pytest.mark.parametrize("name", ENDS)
def test_errors_end_in_one_line_or_keep_their_traceback(name):
    error, line = ENDS[name]
    if name == "a bug while one handles a missing file":
        error.__context__ = FileNotFoundError(2, "No such file or directory", "a")
    assert ending(error) == line


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)])
def test_commands_end_in_one_line_too(error, code, tmp_path, monkeypatch, capsys):
    def fail(*words):
        raise error

    monkeypatch.setattr("monai_morse.prepare.write_phantom", fail)
    assert main(["phantom", "--out", str(tmp_path / "out")]) == code
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the same command starts again" in told


# --- data: labels and cases that a training cannot do with


def relabel(data, cases, change):
    for i in cases:
        path = data / f"labelsTr/case_{i}.nii.gz"
        label = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asarray(label.dataobj)).astype(np.uint8), label.affine), path)


def few(data, cases):
    listing = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps({**listing, "training": listing["training"][:cases]}))


def empty(label):
    return 0 * label


def without_posterior(label):
    return np.where(label == 2, 0, label)


ALL = range(6)
DATA = {  # how six cases in three folds are changed: (change, options, error, warning)
    "as they are": (lambda d: None, {}, FINE, FINE),
    "all labels to validate on are empty": (
        lambda d: relabel(d, held_back(d), empty),
        {},
        "every label to validate on is empty; give cases with anterior or posterior, or another fold",
        FINE,
    ),
    "all labels are empty": (lambda d: relabel(d, ALL, empty), {}, "every label to train on is empty", FINE),
    "one label is empty": (lambda d: relabel(d, held_back(d)[:1], empty), {}, FINE, FINE),
    "a class that no label to train on has": (
        lambda d: relabel(d, [i for i in ALL if i not in held_back(d)], without_posterior),
        {},
        FINE,
        "no label to train on has posterior: it cannot be learned",
    ),
    "a class that no label to validate on has": (
        lambda d: relabel(d, held_back(d), without_posterior),
        {},
        FINE,
        "no label to validate on has posterior: its figures will be missing",
    ),
    "unchecked": (lambda d: relabel(d, ALL, empty), {"check": "false"}, FINE, FINE),
    "more folds than patients": (
        lambda d: None,
        {"num_folds": 7},
        r"has 6 patients: num_folds must be .* in \[2, 6\], got 7",
        FINE,
    ),
    "one fold": (
        lambda d: None,
        {"num_folds": 1},
        r"has 6 patients: num_folds must be a whole number in \[2, 6\], got 1",
        FINE,
    ),
    "one patient": (
        lambda d: few(d, 1),
        {},
        "has one patient.*to train and to validate, two at least are needed; add cases",
        FINE,
    ),
    "a fold too far": (lambda d: None, {"fold": 3}, r"fold, of 3, must be a whole number in \[0, 2\], got 3", FINE),
    "folds written out": (lambda d: None, {"fold": "1", "num_folds": "3"}, FINE, FINE),
    "a fold of no number": (lambda d: None, {"fold": "first"}, "fold must be a whole number, got 'first'", FINE),
    "fewer cases than processes": (
        lambda d: None,
        {"processes": 3},
        r"2 case\(s\) to validate on are too few for 3 processes; start 2 at most \(torchrun --nproc_per_node=2\)",
        FINE,
    ),
    "as many cases as processes": (lambda d: None, {"processes": 2}, FINE, FINE),
}


def held_back(data):
    return [int(re.search(r"case_(\d)", c["image"])[1]) for c in msd_cases(data, "val", num_folds=3)]


@pytest.mark.parametrize("name", DATA)
def test_data_that_a_training_cannot_do_with_are_told_before_it_starts(name, msd, monkeypatch, caplog):
    change, options, error, warning = DATA[name]
    change(msd)
    options = dict(options)
    monkeypatch.setenv("WORLD_SIZE", str(options.pop("processes", 1)))
    check, folds = options.pop("check", True), {"num_folds": 3, **options}

    def checks():  # as the bundles' `initialize` has them
        train, val = (msd_cases(msd, side, class_names=["anterior", "posterior"], **folds) for side in ("train", "val"))
        check_split(train, val)
        usable_cases(train + val, 3, check=check, train=train, class_names=["anterior", "posterior"])

    with caplog.at_level("WARNING"):
        if error == FINE:
            checks()
        else:
            with pytest.raises(InputError, match=error):
                checks()
    assert warning in caplog.text and bool(warning) == bool(caplog.text)


# --- words: options of networks, losses and handlers out of their range

OPTIONS = {
    "alpha 1": (lambda: morse(dropout=1.0), r"dropout \(alpha\) must be a number in \[0, 1\), got 1.0"),
    "alpha 70": (lambda: morse(dropout="70"), r"dropout \(alpha\) must be a number in \[0, 1\), got 70"),
    "alpha of none": (lambda: morse(dropout="high"), "dropout must be a number, got 'high'"),
    "a mixture of width 1 with a normed gate": (
        lambda: morse(mixture={"width": 1, "gate_norm": True}),
        "a width of 1 leaves gate_norm nothing to normalise by; give width 2 or gate_norm false",
    ),
    "no experts": (lambda: morse(num_experts=0), "num_experts must be 1 to"),
    "too many experts": (lambda: morse(num_experts="40"), "num_experts must be 1 to .* got 40"),
    "half an expert": (lambda: morse(num_experts=1.5), "num_experts must be a whole number, got 1.5"),
    "no points": (lambda: morse(points={"num_eval": 0}), r"num_eval \(N_p\) must be a whole number in \[1, inf\), got 0"),
    "rho 2": (lambda: PointSelection(importance_ratio=2), r"importance_ratio \(rho\) must be a number in \[0, 1\], got 2"),
    "k_p 0.5": (lambda: PointSelection(oversample="0.5"), r"oversample \(k_p\) must be a number in \[1, inf\), got 0.5"),
    "an even patch": (lambda: morse(head={"image_patch": 4}), "image_patch must be 0 or odd numbers of voxels"),
    "stride 0": (lambda: morse(stride=0), "stride must be whole numbers from 1 on, got 0"),
    "a rendering loss of no weight": (lambda: MorseLoss(weight=0), "weight of the rendering loss must be above 0, got 0"),
    "a weight of no number": (lambda: MorseLoss(weight="nan"), "weight must be a number, got 'nan'"),
    "multilabel maybe": (lambda: MorseLoss(multilabel="maybe"), "MorseLoss: multilabel must be true or false, got 'maybe'"),
    "lambda below 0": (
        lambda: RenderSchedule(MorseLoss(), lambda_rend="-1"),
        "lambda_rend of the rendering loss must be above 0",
    ),
    "seed below 0": (lambda: EpochSeed(-1), r"seed must be a whole number in \[0, inf\), got -1"),
    "seed of no number": (lambda: EpochSeed("lucky"), "seed must be a whole number in .*'lucky'"),
    "never validated": (lambda: Validation(0, None), r"val_interval\) must be a whole number in \[1, inf\), got 0"),
    "a scale of a third": (lambda: FineGridInferer(None, 0.3), "FineGridInferer: scale must be a whole number, got 0.3"),
    "resume perhaps": (lambda: TrainingState("a", None, None, resume="perhaps"), "TrainingState: resume must be true or false"),
    "a window of words": (
        lambda: check_window(torch.nn.Conv3d(1, 1, 1), ["a", 1, 1]),
        "check_window: size must be a whole number",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_out_of_its_range_is_refused_with_the_range_and_what_was_given(name):
    make, message = OPTIONS[name]
    with pytest.raises(InputError, match=message):
        make()


MEANINGS = {  # a word of a command line, and what it must have come to
    "no bfloat16": (lambda: AutocastInferer(None, "False").enabled, False),
    "bfloat16": (lambda: MorseInferer(amp="TRUE").inferer.enabled, True),
    "scale": (lambda: FineGridInferer(None, "2").scale, 2),
    "scale by axis": (lambda: FineGridInferer(None, ["2", 2, 1]).scale, [2, 2, 1]),
    "resume": (lambda: TrainingState("a", None, None, resume="false").resume, False),
    "matching": (lambda: WeightsLoader("a", None, matching="False").matching, False),
    "multilabel": (lambda: MorseLoss(multilabel="false").multilabel, False),
    "weight": (lambda: MorseLoss("1e-2").weight, 0.01),
    "lambda": (lambda: RenderSchedule(MorseLoss(), lambda_rend="0.3").lambda_rend, 0.3),
    "seed": (lambda: EpochSeed("3").seed, 3),
    "interval": (lambda: Validation("3", None).interval, 3),
    "experts": (lambda: morse(num_experts="2").options.num_experts, 2),
    "experts, the preset's": (lambda: morse(num_experts="null").options.num_experts, 3),
    "points": (lambda: PointSelection(num_train="64", oversample="null", multilabel="false"), PointSelection(num_train=64)),
    "gate": (lambda: Mixture([4, 4], 2, width="8", gate_norm="false").gate_norm, False),
    "limits": (lambda: monai_morse.data.grids.Limits(voxels="1e6", hounsfield="false").voxels, 1e6),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_a_command_lines_word_means_what_it_means_in_yaml(name):
    make, expected = MEANINGS[name]
    assert make() == expected and type(make()) is type(expected)


# --- words at the left margin of the bundles' configs

LEFT_MARGIN = {  # words, and what must be said of them before any work
    "overlap beyond 1": ({"overlap": 1.5}, r"overlap must be a number in \[0, 1\), got 1.5"),
    "overlap of 1, which never ends": ({"overlap": 1}, r"overlap must be a number in \[0, 1\), got 1"),
    "no epoch": ({"max_epochs": 0}, r"max_epochs must be a whole number in \[1, inf\), got 0"),
    "half an epoch": ({"max_epochs": 1.5}, "max_epochs must be a whole number .* got 1.5"),
    "epochs of another type": ({"max_epochs": 2.0}, "max_epochs must be a whole number .* got 2.0"),
    "epochs in quotes": ({"max_epochs": "2"}, "max_epochs must be a whole number .* got '2'"),
    "endless epochs": ({"max_epochs": float("inf")}, "max_epochs must be a whole number .* got inf"),
    "true epochs": ({"max_epochs": True}, "max_epochs must be a whole number .* got True"),
    "no iteration": ({"iterations": 0}, "iterations must be a whole number"),
    "iterations of no number": ({"iterations": "many"}, "iterations must be a whole number .* got 'many'"),
    "epochs of no length": ({"epoch_length": 0}, "epoch_length must be a whole number"),
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number"),
    "no windows at a time": ({"sw_batch_size": 0}, "sw_batch_size must be a whole number"),
    "never validated": ({"val_interval": 0}, "val_interval must be a whole number"),
    "unlearning": ({"learning_rate": -1}, r"learning_rate must be a number in \(0, inf\), got -1"),
    "not learning": ({"learning_rate": 0}, "learning_rate must be a number"),
    "a rate of no number": ({"learning_rate": "fast"}, "learning_rate must be a number .* got 'fast'"),
    "NaN": ({"learning_rate": float("nan")}, "learning_rate must be a number .* got nan"),
    "lambda 0": ({"lambda_rend": 0}, r"lambda_rend must be a number in \(0, inf\), got 0"),
    "a schedule of its own": ({"schedule": "warm"}, r"schedule must be one of \('ramp', 'half', 'scratch'\), got 'warm'"),
    "other coordinates": ({"coordinates": "mm"}, "coordinates must be one of"),
    "fewer than no workers": ({"num_workers": -1}, "num_workers must be a whole number"),
    "a seed of letters": ({"seed": "x"}, "seed must be a whole number .* got 'x'"),
    "twice the cases": ({"cache_rate": 2}, r"cache_rate must be a number in \[0, 1\], got 2"),
    "a chance beyond 1": ({"flip_prob": 1.1}, "flip_prob must be a number"),
    "a chance below 0": ({"rot_flip_prob": -0.1}, "rot_flip_prob must be a number"),
    "fewer than no cases": ({"num_val": -1}, "num_val must be a whole number"),
    "no channel": ({"in_channels": 0}, "in_channels must be a whole number"),
    "a device of fancy": (
        {"device": "nonsense"},
        "device must be one that torch has here, such as cpu or cuda:0, got 'nonsense'",
    ),
    "a device that is not there": ({"device": "cuda:99"}, "device must be one that torch has here"),
    "two axes in mm": ({"spacing": [1, 1]}, r"spacing must be a list of 3 numbers, got \[1, 1\]"),
    "one number for all": ({"spacing": 1.0}, "spacing must be a list of 3 numbers, got 1.0"),
    "mirrored voxels": ({"spacing": [1, 1, -1]}, r"spacing, each of \[1, 1, -1\], must be a number in \(0, inf\), got -1"),
    "voxels of a micrometre": (
        {"limits": {"resampled_to": [0.001, 1, 1]}},
        r"resampled_to \(spacing\) must be a number in \[0.05, 15.0\], got 0.001",
    ),
    "no window": ({"patch_size": [0, 0, 0]}, r"patch_size, each of \[0, 0, 0\], must be a whole number"),
    "a window of one axis": ({"patch_size": [32]}, "patch_size must be a list of 2 or 3 numbers"),
    "a window as a number": ({"patch_size": 32}, "patch_size must be a list of 2 or 3 numbers, got 32"),
    "a stride of two axes": ({"patch_size": [32] * 3, "stride": [1, 2]}, "stride must be a whole number or 3 of them"),
    "a stride of letters": ({"stride": "x"}, "stride must be a whole number"),
    "a finer grid of two axes": ({"render_scale": [2, 2]}, "render_scale must be a list of 3 numbers"),
    "a coarser grid": ({"render_scale": 0.5}, "render_scale must be a whole number"),
    "an upside-down window of HU": ({"window": [275, -125]}, "window must be a list of two numbers, the smaller first"),
    "half a window of HU": ({"window": [275]}, "window must be a list of 2 numbers"),
    "one name": (
        {"class_names": "liver"},
        r"""class_names must be a list of names, such as "\['liver','spleen'\]", got 'liver' """[:-1],
    ),
    "no names": ({"class_names": []}, "class_names must be a list of names"),
    "numbers for names": ({"class_names": [1, 2]}, "class_names must be a list of names"),
    "a name twice": ({"class_names": ["liver", "liver"]}, "class_names must be a list of different names"),
    "another number of classes": ({"class_names": ["liver"], "num_classes": 5}, "num_classes must be 2, .* got 5"),
    "limits of a number": ({"limits": 3}, "limits must be a mapping of spacing, voxels, .* got 3"),
    "one limit of spacing": ({"limits": {"spacing": [5]}}, "limits: spacing must be the smallest and the largest"),
    "limits upside down": ({"limits": {"spacing": [5, 1]}}, "limits: spacing must be the smallest and the largest"),
    "no voxels": ({"limits": {"voxels": 0}}, r"limits: voxels must be a number in \[1, inf\), got 0"),
    "weights that are not there": ({"finetune_from": "nowhere.pt"}, "no checkpoint at nowhere.pt; train first"),
    "weights that are none": ({"finetune_from": __file__}, "test_hostile_faults.py is no checkpoint"),
    "a backbone that unlearns": ({"backbone_rate": -1}, "backbone_rate must be a number"),
    **{
        name: ({name: "maybe"}, f"{name} must be true or false, got 'maybe'")
        for name, check in WORDS.items()
        if check is WORDS["amp"]
    },
}


@pytest.mark.parametrize("row", LEFT_MARGIN)
def test_a_wrong_word_is_refused_by_name_before_any_work(row):
    words, message = LEFT_MARGIN[row]
    with pytest.raises(InputError, match=message):
        monai_morse.words.check_values(**words)


BY_OTHERS = {  # words that are asked early by whom they are for
    "paths": "bundle_root dataset_dir ckpt_dir output_dir",
    "Morse, before data are read": "backbone experts renderer preset num_experts alpha width coarse image_patch patch_norm",
    "Morse's points": "train_points eval_points",
    "msd_cases": "fold num_folds split",
    "load_vit": "pretrained_vit",
    "made of others": "num_classes max_epochs epoch_length",
    "of torchrun": "rank backend",
    "the engine, when it starts": "weights",
    "parts of training": "_meta_ imports backbones network_def synced network loss optimizer lr_scheduler train validate",
    "parts of inference": "scans preprocessing postprocessing dataset dataloader inferer handlers evaluator",
    "cases": "train_cases val_cases all_cases eval_cases cases paper_experts loaded",
    "runs": "initialize run finalize",
}


@pytest.mark.parametrize("file", sorted(ROOT.glob("bundles/*/configs/*.yaml")), ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_every_word_at_the_left_margin_is_checked(file):
    configs = file.parent
    under = {"inference": [], "train": []}.get(file.stem, ["inference" if "inference" in file.stem else "train"])
    parser = ConfigParser()
    parser.read_config([str(configs / f"{name}.yaml") for name in [*under, file.stem]])
    assert not parser.config.keys() - WORDS.keys() - set(" ".join(BY_OTHERS.values()).split())
    assert "$monai_morse.words.check_words()" in parser["initialize"][:2]


TYPED = {  # a command line of the hippocampus bundle's training, and what is said of it
    "as it should be": ("--batch_size 3 --learning_rate=1e-1 --train#trainer#max_epochs 2 --validate::inferer::scale 2", FINE),
    "hyphens, as Fire takes them": ("--batch-size 3", FINE),
    "words of MONAI": ("--run_id run --init_id initialize --meta_file a --logging_file b", FINE),
    "a letter less": ("--bach_size 3", "--bach_size: the bundle has no word 'bach_size'; did you mean --batch_size"),
    "an equal sign": ("--epochs=3", "--epochs: the bundle has no word 'epochs'; did you mean --max_epochs"),
    "of another bundle": ("--iterations 3", "no word 'iterations'; give one at the left margin of its configs"),
    "of evaluate.yaml": ("--save_pictures true", "no word 'save_pictures'"),
    "behind a #": ("--limit#voxels 3", "no word 'limit'; did you mean --limits"),
}


@pytest.fixture
def typed(monkeypatch):
    """Checks the words of a command line."""

    def check(line):
        monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", *line.split()])
        check_words()

    return check


HIPPOCAMPUS = ROOT / "bundles/hippocampus_mri_morse/configs"


@pytest.mark.parametrize("row", TYPED)
def test_a_word_that_no_config_has_is_refused(row, typed):
    words, message = TYPED[row]
    with pytest.raises(InputError, match=message) if message else nullcontext():
        typed(f"run --config_file {HIPPOCAMPUS}/train.yaml {words}")


WRONG = {  # words of a command line, or of a config file, and what is said of them
    "of the command line": ("--batch_size 0", "batch_size: 2", "batch_size must be a whole number in .1, inf., got 0"),
    "of the file": ("", "batch_size: 0", "batch_size must be a whole number in .1, inf., got 0"),
    "of the command line over the file": ("--batch_size 2", "batch_size: 0", FINE),
    "an expression": ("", "batch_size: $1 - 1", "batch_size must be a whole number in .1, inf., got 0"),
    "behind a #": ("--limits#voxels 0", "limits: {voxels: 9}", "limits: voxels must be a number"),
    "made of a wrong one": (
        "--class_names 5",
        "num_classes: $len(@class_names) + 1\nclass_names: [a]",
        "class_names must be a",
    ),
    "made of the data": ("", "max_epochs: $0 * len(@train#dataset)\ntrain: {dataset: [1]}", FINE),
    "of a file of arguments": ("--args_file ARGS", "batch_size: 2", "batch_size must be a whole number in .1, inf., got 0"),
}


@pytest.mark.parametrize("row", WRONG)
def test_a_wrong_word_is_refused_wherever_it_stands(row, typed, tmp_path):
    words, config, message = WRONG[row]
    (tmp_path / "a.yaml").write_text(config)
    (tmp_path / "args.json").write_text('{"batch_size": 0}')
    with pytest.raises(InputError, match=message) if message else nullcontext():
        typed(f"run --config_file {tmp_path}/a.yaml {words.replace('ARGS', str(tmp_path / 'args.json'))}")
    typed(f"start_server --config_file {tmp_path}/a.yaml {words}")  # another program's command line is its own


# called by Python alone, each iteration or by torch.jit, with values that no config gives
OF_PYTHON = ("networks.points", "networks.resampling", "networks.streaming", "networks.options", "networks.unet3d", "metrics")
OF_PYTHON += ("config", "visualize", "data.checks.voxel_fault", "data.checks.find_problem", "data.grids.grid_")
OF_PYTHON += ("data.orientation.axes_by_role", "losses.render_weight", "handlers.evaluation.mean_of")
OF_PYTHON += ("networks.decoders.FeatureInfo", "networks.plans.UNetPlan")
CHECKED_THERE = ("EpochSeed", "Validation")  # by parse_number


def callables():
    for found in pkgutil.walk_packages(monai_morse.__path__, "monai_morse."):
        if not found.name.startswith(("monai_morse.prepare", "monai_morse.experiments", "monai_morse.wrap", "monai_morse.__")):
            module = import_module(found.name)
            for name in getattr(module, "__all__", []):
                thing = getattr(module, name)
                if callable(thing) and getattr(thing, "__module__", "") == found.name:
                    yield f"{found.name.removeprefix('monai_morse.')}.{name}", thing


@pytest.mark.parametrize("name, thing", callables())
def test_whatever_a_config_can_name_takes_the_words_of_a_command_line(name, thing):
    function = thing.__init__ if inspect.isclass(thing) else thing
    try:
        hints = typing.get_type_hints(function)
    except (TypeError, NameError):
        return
    kinds = [kind for name, hint in hints.items() if name != "return" for kind in (typing.get_args(hint) or (hint,))]
    if (
        any(kind in kinds for kind in (bool, int, float))
        and not name.startswith(OF_PYTHON)
        and not name.endswith(CHECKED_THERE)
    ):
        assert hasattr(function, "__wrapped__"), f"{name}: @typed_arguments"
