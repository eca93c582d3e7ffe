"""MONAI Label's server with bundles of ours: started on 127.0.0.1, driven over HTTP, stopped; see docs/monailabel.md.

    python tests/monailabel_server.py --data DATA/Task04_Hippocampus --python LABEL_ENV/bin/python

does with real scans what that page describes and prints each response. ``LABEL_ENV`` is an environment with MONAI Label and
this package; the script itself needs only this package's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "hippocampus_mri_morse"
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy


def make_app(folder: Path, bundle: Path, python: str = sys.executable) -> Path:
    """MONAI Label's own app `monaibundle`, copied from where it is installed, with a bundle in its folder `model`."""
    command = [python, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.copytree(bundle, folder / "monaibundle" / "model" / bundle.name)
    return folder / "monaibundle"


def make_studies(folder: Path, cases: list[dict[str, str]], labelled: int) -> list[str]:
    """A folder of studies as MONAI Label keeps them: scans, and the labels of the first few. Returns the studies' ids."""
    (folder / "labels" / "final").mkdir(parents=True)
    for i, case in enumerate(cases):
        name = Path(case["image"]).name
        shutil.copyfile(case["image"], folder / name)
        if i < labelled:
            shutil.copyfile(case["label"], folder / "labels" / "final" / name)
    return [Path(case["image"]).name.removesuffix(".nii.gz") for case in cases]


class Server:
    """A running server, to use in a `with`; what it prints goes to ``log``.

    Args:
        app, studies: folders, see :func:`make_app` and :func:`make_studies`.
        model: name of the bundle in ``app/model``.
        log: file to write.
        python: interpreter of the environment with MONAI Label.
    """

    def __init__(self, app: Path, studies: Path, model: str, log: Path, python: str = sys.executable) -> None:
        self.model = model
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [python, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
        self.command += ["--conf", "models", model, "--conf", "zoo_source", "local"]
        self.command += ["--conf", "epistemic_model", model, "--conf", "epistemic_dropout", "0.7"]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]

    def __enter__(self) -> Server:
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        with open(self.log, "w") as log:
            # a group of its own: trainings and scorings are processes that it starts
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.time() + 120
        while time.time() < deadline and self.process.poll() is None:
            try:
                self.info()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"no server at {self.url}:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def request(self, path: str, method: str = "GET", body: Any = None, **query: str) -> bytes:
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with LOCAL.open(request, timeout=600) as response:
            return response.read()

    def info(self) -> dict[str, Any]:
        return json.loads(self.request("/info/"))

    def infer(self, study: str) -> dict[str, Any]:
        """The response's words: names of the labels, and seconds."""
        return json.loads(self.request(f"/infer/{self.model}", "POST", image=study, output="json"))

    def label_map(self, study: str, path: Path) -> Path:
        """The response's label map, written to ``path``."""
        path.write_bytes(self.request(f"/infer/{self.model}", "POST", image=study, output="image"))
        return path

    def train(self, **options: Any) -> dict[str, Any]:
        """Train to the end; returns the task as the server describes it."""
        body = {"device": "cpu", "multi_gpu": False, **options}
        task = json.loads(self.request(f"/train/{self.model}", "POST", body))
        return self.finished("train", task["id"])

    def scoring(self) -> dict[str, Any]:
        """The epistemic scoring, which the server starts by itself, when it starts and after each training."""
        return self.finished("scoring")

    def finished(self, kind: str, task: str | None = None, timeout: float = 1200) -> dict[str, Any]:
        deadline = time.time() + timeout
        while time.time() < deadline:
            state = json.loads(self.request(f"/{kind}/"))
            if state["status"] in ("DONE", "ERROR") and task in (None, state["id"]):
                return state
            time.sleep(0.5)
        raise TimeoutError(f"{kind} has not ended after {timeout:.0f} s")

    def scores(self) -> dict[str, float]:
        """Epistemic entropy of each study that has one."""
        objects = json.loads(self.request("/datastore/", output="all"))["objects"]
        found = {study: o["image"]["info"].get("epistemic_entropy") for study, o in objects.items()}
        return {study: score for study, score in found.items() if score is not None}


def main() -> None:
    """What docs/monailabel.md shows."""
    from monai_morse.data import msd_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MSD Task04_Hippocampus")
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment with MONAI Label")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        app = make_app(work / "apps", BUNDLE, args.python)
        studies = make_studies(work / "studies", msd_cases(args.data, "val")[:6], labelled=3)
        with Server(app, work / "studies", BUNDLE.name, work / "server.log", args.python) as server:
            print("GET /info/\n", json.dumps(server.info(), indent=1))
            print("GET /scoring/\n", server.scoring()["details"][-2:], server.scores())
            print(f"POST /infer/{server.model}?image={studies[3]}&output=json\n", server.infer(studies[3]))
            task = server.train(max_epochs=2, val_split=0.34)
            print(f"POST /train/{server.model}, then GET /train/\n", task["status"], *task["details"], sep="\n")
            print(f"POST /infer/{server.model}?image={studies[3]}&output=json\n", server.infer(studies[3]))
            print("GET /scoring/\n", server.scoring()["details"][-2:], server.scores())


if __name__ == "__main__":
    main()
