"""A synthetic abdominal CT in the layout of BTCV: the phantom's patients with a pancreas and a gallbladder, in HU.

Anatomy is that of :class:`monai_morse.prepare.phantom.Patient`, but the liver lies on the patient's right, +x.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from monai_morse.data.files import atomic_write, check_writable
from monai_morse.errors import InputError

from .phantom import TISSUES, Patient, _ellipsoid, _tube, rasterised
from .synapse import TEST, TRAIN

__all__ = ["CTPatient", "write_ct_phantom"]

# tissue: (label of BTCV, HU in the portal venous phase); the MRI's tissues first, in their order
CT_TISSUES = {
    "air": (0, -1000),
    "fat": (0, -100),
    "muscle": (0, 60),
    "bowel": (0, 30),
    "stomach": (7, 15),
    "heart": (0, 150),
    "liver": (6, 110),
    "vessel": (6, 165),
    "lesion": (6, 65),
    "spleen": (1, 125),
    "cortex": (2, 190),
    "medulla": (2, 150),
    "aorta": (8, 170),
    "spine": (0, 240),
    "left cortex": (3, 190),
    "left medulla": (3, 150),
    "gallbladder": (4, 8),
    "pancreas": (11, 90),
}
assert list(CT_TISSUES)[: len(TISSUES)] == list(TISSUES)
_INDEX = {name: i for i, name in enumerate(CT_TISSUES)}
_LABEL = np.array([t[0] for t in CT_TISSUES.values()], np.uint8)
_HU = np.array([t[1:] for t in CT_TISSUES.values()], np.float32)
# what gallbladder and pancreas may lie in
_ROOM = [_INDEX[n] for n in ("fat", "bowel", "stomach", "liver", "vessel", "lesion")]


class CTPatient(Patient):
    """One patient's anatomy with all 8 organs of the Synapse protocol.

    Args:
        seed: of everything that differs between patients.

    >>> points = np.array([[70.0, 0.0, 20.0], [400.0, 0.0, 0.0]])  # right lobe of the liver, outside
    >>> _LABEL[CTPatient(seed=1).tissue(points)].tolist()
    [6, 0]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        rng = np.random.default_rng([self.seed, 3])

        def at(*values: float) -> np.ndarray:
            return (np.array(values) + rng.uniform(-5, 5, 3)).astype(np.float32)

        self.gallbladder = at(-38, 38, -22), (np.array([13, 13, 24]) * rng.uniform(0.85, 1.2, 3)).astype(np.float32), 0.4
        self.pancreas = [at(-22, 2, -18), at(18, 6, 0), at(70, -18, 16)], float(rng.uniform(10, 13))  # head, neck, tail

    def tissue(self, points: np.ndarray) -> np.ndarray:
        """Tissue index (order of ``CT_TISSUES``) at points (P, 3) in mm."""
        out = super().tissue(points)
        p = self.bent(points)
        for name in ("cortex", "medulla"):
            out[(out == _INDEX[name]) & (p[:, 0] > 0)] = _INDEX[f"left {name}"]
        (head, neck, tail), radius = self.pancreas
        pancreas = np.minimum(_tube(p, head, neck, radius), _tube(p, neck, tail, radius))
        for name, surface in (("pancreas", pancreas), ("gallbladder", _ellipsoid(p, *self.gallbladder))):
            out[(surface < 0) & np.isin(out, _ROOM)] = _INDEX[name]
        return out

    def scan(
        self, spacing: tuple[float, float, float], samples: tuple[int, int, int] = (2, 2, 2)
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A scan of the abdomen: HU (X, Y, Z), int16; BTCV's labels, uint8; the affine, axes to the left, front and top."""
        rng = np.random.default_rng([self.seed, 4])
        shape = np.round(np.array([380, 290, 200]) * rng.uniform(0.97, 1.05, 3) / spacing).astype(int)
        affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])
        affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2) + rng.uniform(-8, 8, 3)
        size = (int(shape[0]), int(shape[1]), int(shape[2]))
        tissue, image = rasterised(self.tissue, _HU, size, affine, samples)
        texture, noise = (gaussian_filter(rng.standard_normal(size), mm / np.array(spacing)) for mm in (5, 1))
        hu = image[:, 0].reshape(size) + 6 * texture / texture.std() + 12 * noise / noise.std()
        return np.round(hu).clip(-1024, 3071).astype(np.int16), _LABEL[tissue], affine


def case_numbers(patients: int) -> list[int]:
    """Numbers of BTCV's cases such that of every five patients three are to be trained on, the first first.

    >>> case_numbers(6)
    [5, 6, 7, 1, 2, 9]
    """
    order = [n for i in range(6) for n in (*TRAIN[3 * i : 3 * i + 3], *TEST[2 * i : 2 * i + 2])]
    return order[:patients]


def write_ct_phantom(
    out: str | Path, patients: int = 20, seed: int = 0, spacing: tuple[float, float, float] = (2.5, 2.5, 5.0)
) -> Path:
    """Write a phantom in the layout of BTCV: ``Training/img/img0005.nii.gz`` and ``Training/label/label0005.nii.gz``.

    The same arguments give the same bytes.

    Args:
        out: folder to write, new or empty.
        patients: 2 to 30, which get case numbers of the Synapse protocol, two fifths of them to test on; default 20.
        seed: default 0.
        spacing: voxel size in mm, default (2.5, 2.5, 5).

    Returns:
        the folder.

    Raises:
        InputError: when ``out`` holds something, or a number is out of range.
    """
    out = Path(out).resolve()
    if not 2 <= patients <= len(TRAIN + TEST) or seed < 0 or min(spacing) <= 0:
        raise InputError(f"phantom: need 2 to 30 patients, seed >= 0, spacing > 0; got {patients}, {seed}, {spacing}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} is a file or not empty; give a new folder with --out")
    folders = {kind: out / "Training" / kind for kind in ("img", "label")}
    check_writable(*folders.values())
    for number in tqdm(case_numbers(patients), desc="CT phantom", unit="patient"):
        image, label, affine = CTPatient(seed * 100_000 + number).scan(spacing)
        for kind, voxels in (("img", image), ("label", label)):
            with atomic_write(folders[kind] / f"{kind}{number:04d}.nii.gz") as partial:
                nib.save(nib.Nifti1Image(voxels, affine), partial)
    return out
