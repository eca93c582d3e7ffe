"""Programs as ``python -m`` runs them, in processes forked from one that has imported torch and MONAI: seconds less a run."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

WARM = multiprocessing.get_context("forkserver")
MONAI = ["ignite.engine", "monai.bundle", "monai.engines", "monai.handlers"]
WARM.set_forkserver_preload(["fire", "torch._dynamo", *MONAI, "monai_morse", "monai_morse.data", "monai_morse.inferers"])
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")  # before a module's words: two processes


def _program(words, cwd, env, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = ["", *words[1:]]
    sys.path.insert(0, str(cwd))
    warnings.simplefilter("ignore")
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # which a process of multiprocessing would not ask
        sys.exit(1)


def bundle_run(config, **options):
    """The words behind ``python -m`` of a bundle's run with these options."""
    words = ["monai.bundle", "run", "--config_file", str(config)]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def run_module(*words, cwd, timeout=600, **env):
    """``python -W ignore -m WORDS`` in a folder, with variables added to the environment; as ``subprocess.run`` does it."""
    words = list(map(str, words))
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        out.touch(), err.touch()
        process = WARM.Process(target=_program, args=(words, cwd, env, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())
