"""Small data and networks that several tests share."""

import copy
import io
import json
import os
import pickle
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: as many processes as cores run side by side

import nibabel as nib
import numpy as np
import pytest
import torch

from tools.systems import BACKBONES

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("MORSE_DATA", ROOT.parent / "shared" / "data"))


TINY = {name: backbone.tiny for name, backbone in BACKBONES.items()}
ROWS = [(name, dims) for name, backbone in BACKBONES.items() for dims in backbone.dims]
SMALL = {
    "mixture": {"width": 8, "gate_stride": 2},
    "head": {"width": 8, "residual": False},
    "points": {"num_train": 64, "num_eval": 100},
}


OF_GROUP = {"coarse": "mixture", "read_features": "head", "image_patch": "head", "patch_norm": "head"}


def grouped(options):
    """Options of Morse with those of ``OF_GROUP`` moved into their group."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items() if name not in OF_GROUP}
    for name in OF_GROUP.keys() & options.keys():
        found.setdefault(OF_GROUP[name], {})[name] = options[name]
    return found


def window(name, dims, batch=2):
    """An input that a tiny backbone takes."""
    return torch.rand(batch, 1, *BACKBONES[name].window[:dims])


def check_twins(net, inputs, exported):
    """Logits of copied, pickled, scripted and traced twins, and of one exported for an input, are the network's own."""

    def logits(function, x):
        out = function(x)
        return out if isinstance(out, torch.Tensor) else out[0]

    with torch.no_grad():
        stored = io.BytesIO()
        torch.jit.save(torch.jit.script(net), stored)
        stored.seek(0)
        twins = {
            "copy": copy.deepcopy(net),
            "pickle": pickle.loads(pickle.dumps(net)),
            "script": torch.jit.load(stored),
            "trace": torch.jit.trace(net, inputs[0], check_trace=False),
        }
        for name, twin in twins.items():
            for x in inputs:
                assert torch.allclose(logits(twin, x), logits(net, x), atol=1e-5), name
        twin = torch.export.export(net, (exported,)).module()
        assert torch.allclose(logits(twin, exported), logits(net, exported), atol=1e-5)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


def real_data(name):
    """A folder of real scans, where it is."""
    path = SHARED_DATA / name
    if not path.is_dir():
        pytest.skip(f"real data needed: no {path} (set MORSE_DATA to the folder that holds it)")
    return path


@pytest.fixture(scope="session")
def task04():
    """The real MSD Task04 cases, where they are."""
    path = SHARED_DATA / "Task04_Hippocampus"
    if not (path / "dataset.json").is_file():
        pytest.skip(f"real data needed: no MSD Task04 at {path} (set MORSE_DATA to the folder that holds it)")
    return path


@pytest.fixture(scope="session")
def real_btcv(tmp_path_factory):
    """A real CT under BTCV's names, twice, to train and to test on; labels of a model, renumbered as BTCV's."""
    path = SHARED_DATA / "abdomen_ct"
    if not (path / "image.nii.gz").is_file():
        pytest.skip(f"real data needed: no abdomen_ct at {path} (set MORSE_DATA to the folder that holds it)")
    image, found = (nib.load(path / f"{name}.nii.gz") for name in ("image", "totalseg_labels"))
    label = np.zeros(found.shape, np.uint8)
    for theirs, btcv in {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 7, 7: 11, 52: 8}.items():
        label[np.asarray(found.dataobj) == theirs] = btcv
    folder = tmp_path_factory.mktemp("real") / "RawData"
    for kind, scan in (("img", image), ("label", nib.Nifti1Image(label, found.affine))):
        (folder / "Training" / kind).mkdir(parents=True)
        for number in (1, 5):
            nib.save(scan, folder / "Training" / kind / f"{kind}{number:04d}.nii.gz")
    return folder


def write_msd(folder, cases=6, shape=(20, 24, 18), classes=("anterior", "posterior"), affine=None):
    """A tiny data set in the MSD layout: bright boxes on noise."""
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    training = []
    for i in range(cases):
        label = np.zeros(shape, np.uint8)
        start = rng.integers(3, 6, 3)
        for k in range(len(classes)):
            low = start + [0, 6 * k, 0]
            label[low[0] : low[0] + 9, low[1] : low[1] + 6, low[2] : low[2] + 8] = k + 1
        image = (rng.normal(0, 0.2, shape) + label) * 100
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / f"imagesTr/case_{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"labelsTr/case_{i}.nii.gz")
        training.append({"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"})
    labels = {str(i): n for i, n in enumerate(("background", *classes))}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "MRI"}, "training": training}))
    return folder


@pytest.fixture
def msd(tmp_path):
    return write_msd(tmp_path / "data")


def write_dicom(folder, image, description="t1_vibe", number=1, name="IM{:04d}", modality="MR", slopes=None):
    """A NIfTI image as a DICOM series, a file a slice, without extensions and in no order; returns the files."""
    pydicom = pytest.importorskip("pydicom", reason="to write DICOM files: pip install monai_morse[dicom]")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    voxels, lps = np.asarray(image.dataobj), np.diag([-1.0, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    along = lps[:3, :3] / spacing
    study, series, frame = (generate_uid(entropy_srcs=[str(folder), description, str(number), w]) for w in "abc")
    files = []
    for k in np.random.default_rng(0).permutation(voxels.shape[2]):
        slope = 1.0 if slopes is None else slopes[k]
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(k)])
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.SeriesDescription, data.SeriesNumber, data.InstanceNumber, data.Modality = description, number, k + 1, modality
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "p", "p", "", ""
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20260101", "120000", "1", ""
        data.ReferringPhysicianName, data.PositionReferenceIndicator = "", ""
        data.SeriesDate = data.ContentDate = "20260101"
        data.ImagePositionPatient = [f"{c:.8g}" for c in lps[:3, 3] + k * lps[:3, 2]]
        data.ImageOrientationPatient = [f"{c:.8g}" for c in (*along[:, 0], *along[:, 1])]
        data.PixelSpacing, data.SliceThickness = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"], f"{spacing[2]:.8g}"
        data.Columns, data.Rows = voxels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit = 15
        data.RescaleSlope, data.RescaleIntercept = f"{slope:g}", "0"
        data.PixelData = np.round(voxels[:, :, k].T / slope).astype(np.int16).tobytes()
        path = folder / name.format(len(files))
        data.save_as(path, enforce_file_format=True)
        files.append(path)
    return files
