"""The shipped hippocampus network out of the framework: the same labels as eager, on real scans, by sliding window.

python tests/test_exports.py DATA/Task04_Hippocampus      # the table in docs/portability.md, on all scans held back
"""

import inspect
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer

from monai_morse.data import msd_cases

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "hippocampus_mri_morse"
WINDOW = [40, 56, 40]
ANY_BATCH = getattr(torch.export.Dim, "DYNAMIC", None) or torch.export.Dim("batch")  # torch 2.4 has no DYNAMIC


def import_onnxruntime():
    """ONNX Runtime, where torch exports to it."""
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip(f"torch {torch.__version__} lacks the exporter to ONNX that later ones have")
    pytest.importorskip("onnxscript", reason="pip install monai_morse[export]")
    return pytest.importorskip("onnxruntime", reason="pip install monai_morse[export]")


def script(net, x, folder):
    torch.jit.script(net).save(str(folder / "script.ts"))
    return torch.jit.load(str(folder / "script.ts"))


def trace(net, x, folder):
    torch.jit.trace(net, x, check_trace=False).save(str(folder / "trace.ts"))
    return torch.jit.load(str(folder / "trace.ts"))


def export(net, x, folder):
    program = torch.export.export(net, (x,), dynamic_shapes=({0: ANY_BATCH},))
    torch.export.save(program, str(folder / "model.pt2"))
    return torch.export.load(str(folder / "model.pt2")).module()


def onnx(net, x, folder):
    onnxruntime = import_onnxruntime()
    path, free = str(folder / "model.onnx"), ({0: "batch"},)
    torch.onnx.export(net, (x,), path, dynamo=True, opset_version=20, dynamic_shapes=free, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


FORMS = {"TorchScript, scripted": script, "TorchScript, traced": trace, "torch.export": export, "ONNX": onnx}


def shipped_network_and_scans(data, count):
    """The network in eval mode, and scans (1, 1, *S) held back from its training, as the bundle prepares them."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    net = parser.get_parsed_content("network_def")
    net.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    prepare = parser.get_parsed_content("preprocessing")
    return net.eval(), [prepare({"image": c["image"]})["image"].as_tensor()[None] for c in msd_cases(data, "val")[:count]]


def segment(call, scan):
    with torch.no_grad():
        return SlidingWindowInferer(WINDOW, sw_batch_size=4, overlap=0.5, mode="gaussian")(scan, call)


def compare(form, net, scans, folder):
    """Voxels whose label is another, and the largest difference of logits."""
    call = FORMS[form](net, torch.zeros(2, 1, *WINDOW), folder)
    other, difference = 0, 0.0
    for scan in scans:
        found, expected = segment(call, scan), segment(net, scan)
        other += int((found.argmax(1) != expected.argmax(1)).sum())
        difference = max(difference, float((found - expected).abs().max()))
    return other, difference


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_network_labels_real_scans_as_the_network_does(form, task04, tmp_path):
    net, scans = shipped_network_and_scans(task04, 3)
    labels = [segment(net, scan).argmax(1) for scan in scans]
    assert all(set(found.unique().tolist()) == {0, 1, 2} for found in labels)
    other, difference = compare(form, net, scans, tmp_path)
    assert other == 0 and difference < 1e-2


def main(data):
    net, scans = shipped_network_and_scans(data, None)
    print(f"{len(scans)} scans, {sum(scan.numel() for scan in scans)} voxels, torch {torch.__version__}\n")
    print("| form | voxels with another label | largest difference of logits |\n| --- | --- | --- |")
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            other, difference = compare(form, net, scans, Path(folder))
        print(f"| {form} | {other} | {difference:.1e} |")


if __name__ == "__main__":
    main(sys.argv[1])
