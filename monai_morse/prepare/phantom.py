"""A synthetic multi-phasic abdominal MRI: seeded patients whose anatomy is a formula, known below the voxel.

Anatomy is a set of implicit surfaces over patient coordinates in mm (RAS, origin in the middle of the body), different for each
patient. Rendering averages tissues over sub-voxels (partial volume), assigns each phase its contrast, and adds texture, a bias
field and Rician noise. Grids are anisotropic and oblique, as scanners make them.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter
from tqdm import tqdm

from monai_morse.data.cases import claim_folder, write_listing
from monai_morse.data.files import check_writable
from monai_morse.errors import InputError

__all__ = ["CLASSES", "PHASES", "Patient", "write_phantom"]

logger = logging.getLogger(__name__)

NAME = "MORSE phantom"
PHASES = ("pre", "arterial", "venous")
CLASSES = ("liver", "spleen", "kidneys", "aorta", "spine")

# tissue: (class of the label map, intensity before contrast, arterial, venous); T1-weighted with fat suppression
TISSUES = {
    "air": (0, 0.00, 0.00, 0.00),
    "fat": (0, 0.22, 0.22, 0.23),
    "muscle": (0, 0.42, 0.46, 0.52),
    "bowel": (0, 0.40, 0.52, 0.62),
    "stomach": (0, 0.33, 0.38, 0.42),
    "heart": (0, 0.38, 0.85, 0.78),
    "liver": (1, 0.52, 0.58, 0.76),
    "vessel": (1, 0.34, 0.55, 0.95),
    "lesion": (1, 0.40, 0.80, 0.62),
    "spleen": (2, 0.41, 0.74, 0.78),
    "cortex": (3, 0.50, 0.92, 0.90),
    "medulla": (3, 0.36, 0.55, 0.82),
    "aorta": (4, 0.30, 1.00, 0.84),
    "spine": (5, 0.33, 0.40, 0.45),
}
_INDEX = {name: i for i, name in enumerate(TISSUES)}
_CLASS = np.array([t[0] for t in TISSUES.values()], np.uint8)
_CONTRAST = np.array([t[1:] for t in TISSUES.values()], np.float32)


def _ellipsoid(p: np.ndarray, center: np.ndarray, radii: np.ndarray, tilt: float = 0.0) -> np.ndarray:
    """Below 0 inside; about the distance to the surface in mm. Tilted about the anterior-posterior axis by ``tilt`` rad."""
    x, y, z = (p - center).T
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    u, w = c * x + s * z, c * z - s * x
    return (np.sqrt((u / radii[0]) ** 2 + (y / radii[1]) ** 2 + (w / radii[2]) ** 2) - 1) * np.float32(np.mean(radii))


def _tube(p: np.ndarray, a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    """Below 0 inside a capsule from ``a`` to ``b``."""
    axis = b - a
    t = np.clip((p - a) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(p - a - t[:, None] * axis, axis=1) - radius


def _smooth_union(f: np.ndarray, g: np.ndarray, k: float = 14.0) -> np.ndarray:
    """Union of two surfaces whose seam is rounded over about ``k`` mm."""
    h = np.clip(0.5 + 0.5 * (g - f) / k, 0, 1)
    return g + (f - g) * h - k * h * (1 - h)


def rasterised(
    tissue_at: Callable[[np.ndarray], np.ndarray],
    values: np.ndarray,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    samples: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Tissues at the voxel centres of a grid (*shape); their ``values`` (tissues, C) averaged over each voxel, (voxels, C)."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    center = tissue_at(grid @ affine[:3, :3].T + affine[:3, 3])
    # only voxels with another tissue next to them can be mixed
    tissue = center.reshape(shape)
    mixed = np.flatnonzero(maximum_filter(tissue, 3) != minimum_filter(tissue, 3))
    image = values[center]
    image[mixed] = 0
    for offset in np.ndindex(*samples):
        shifted = grid[mixed] + (np.array(offset) + 0.5) / samples - 0.5
        image[mixed] += values[tissue_at(shifted @ affine[:3, :3].T + affine[:3, 3])] / np.prod(samples)
    return tissue, image


@dataclass
class Patient:
    """One patient's anatomy; ``tissue`` evaluates it at any points.

    Args:
        seed: of everything that differs between patients.

    >>> patient = Patient(seed=1)
    >>> patient.labels(np.array([[70.0, 0.0, 20.0], [400.0, 0.0, 0.0]])).tolist()  # right lobe of the liver, outside
    [1, 0]
    """

    seed: int
    rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng(self.seed)

        def near(*values: float, spread: float = 0.1) -> np.ndarray:
            value = np.array(values, np.float32)
            return (value * rng.uniform(1 - spread, 1 + spread, value.shape)).astype(np.float32)

        def at(*values: float, spread: float = 7.0) -> np.ndarray:
            return (np.array(values) + rng.uniform(-spread, spread, len(values))).astype(np.float32)

        self.scale = np.float32(rng.uniform(0.9, 1.1))
        # slow sine waves that bend space, so that no organ is a perfect ellipsoid
        self.wave_vector = rng.normal(0, 1, (10, 3)).astype(np.float32) / rng.uniform(16, 45, (10, 1)).astype(np.float32)
        self.wave_phase = rng.uniform(0, 2 * np.pi, 10).astype(np.float32)
        self.wave_push = rng.normal(0, 1.3, (10, 3)).astype(np.float32)

        self.body = near(165, 115, spread=0.06), float(rng.uniform(12, 26))
        self.right_lobe = at(-75, 0, 15), near(72, 72, 72, spread=0.12), float(rng.uniform(-0.3, 0.3))
        self.left_lobe = at(0, 45, 42), near(72, 34, 30, spread=0.2), float(rng.uniform(-0.2, 0.35))
        self.fissure = at(-18, 62, 8), near(10, 22, 40)
        self.spleen = at(108, -42, 28), near(27, 42, 46, spread=0.18), float(rng.uniform(-0.4, 0.1))
        self.kidneys = [
            (at(side * 62, -58, low), near(27, 25, 50), side * float(rng.uniform(0.1, 0.3)))
            for side, low in ((-1, -52), (1, -38))
        ]
        self.aorta = at(10, -46, spread=4), float(rng.uniform(9, 13)), float(rng.uniform(0, 2 * np.pi))
        self.stomach = at(62, 32, 12), near(42, 36, 44, spread=0.2), float(rng.uniform(-0.4, 0.4))
        self.heart = at(28, 40, 105), near(52, 44, 36), 0.3
        self.bowel = [(at(0, 35, -62, spread=70), near(26, 22, 20, spread=0.35)) for _ in range(10)]
        self.vessels = self._vessel_tree()
        center, radii, _ = self.right_lobe
        self.lesions = [
            (center + (rng.uniform(-0.6, 0.6, 3) * radii).astype(np.float32), float(rng.uniform(5, 15)))
            for _ in range(int(rng.integers(0, 4)))
        ]

    def _vessel_tree(self) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Portal and hepatic veins: trunks from hilum and vena cava, each branching twice."""
        rng = self.rng
        tubes = []
        for root in (np.array([-28, 8, 0]), np.array([-20, -18, 62])):
            ends = [(root.astype(np.float32), 5.0)]
            for _ in range(3):
                grown = []
                for start, radius in ends:
                    for _ in range(2):
                        step = rng.normal([-20, 4, 2], [14, 16, 16]).astype(np.float32)
                        tubes.append((start, start + step, radius))
                        grown.append((start + step, radius * 0.7))
                ends = grown
        return tubes

    def bent(self, points: np.ndarray) -> np.ndarray:
        """Points (P, 3) in mm in the coordinates in which the organs are plain shapes, the patient's right at negative x."""
        p = np.asarray(points, np.float32) * np.array([-1, 1, 1], np.float32) / self.scale
        return p + np.sin(p @ self.wave_vector.T + self.wave_phase) @ self.wave_push

    def tissue(self, points: np.ndarray) -> np.ndarray:
        """Tissue index (order of ``TISSUES``) at points (P, 3) in mm; later structures lie over earlier ones."""
        p = self.bent(points)
        x, y, z = p.T
        out = np.zeros(len(p), np.uint8)

        (rx, ry), fat = self.body
        radius = ((np.abs(x) / rx) ** 2.5 + (np.abs(y) / ry) ** 2.5) ** 0.4
        rim = (radius - 1) * np.float32(ry)
        out[rim < 0] = _INDEX["fat"]
        out[rim < -fat] = _INDEX["muscle"]
        cavity = rim < -fat - 9
        out[cavity] = _INDEX["fat"]

        def paint(name: str, surface: np.ndarray) -> None:
            out[cavity & (surface < 0)] = _INDEX[name]

        for center, radii in self.bowel:
            paint("bowel", _ellipsoid(p, center, radii))
        paint("heart", _ellipsoid(p, *self.heart))
        paint("stomach", _ellipsoid(p, *self.stomach))

        liver = _smooth_union(_ellipsoid(p, *self.right_lobe), _ellipsoid(p, *self.left_lobe))
        liver = np.maximum(liver, -_ellipsoid(p, *self.fissure))  # the fissure between the lobes
        paint("liver", liver)
        inside = np.flatnonzero(cavity & (liver < -1))
        vessel = np.min([_tube(p[inside], a, b, r) for a, b, r in self.vessels], axis=0)
        out[inside[vessel < 0]] = _INDEX["vessel"]
        for center, r in self.lesions:
            paint("lesion", np.maximum(np.linalg.norm(p - center, axis=1) - r, liver))

        center, radii, _ = self.spleen
        paint("spleen", np.maximum(_ellipsoid(p, *self.spleen), -_ellipsoid(p, center - [26, -8, 0], radii * 0.7)))
        for center, radii, tilt in self.kidneys:
            hilum = center - np.float32(np.sign(center[0]) * radii[0]) * np.array([1, 0, 0], np.float32)
            kidney = np.maximum(_ellipsoid(p, center, radii, tilt), -_ellipsoid(p, hilum, radii * [0.5, 0.5, 0.35]))
            paint("cortex", kidney)
            paint("medulla", np.maximum(kidney + 7, _ellipsoid(p, center, radii * 0.75, tilt)))

        (ax, ay), r, phase = self.aorta
        paint("aorta", np.hypot(x - ax - 5 * np.sin(z / 45 + phase), y - ay) - r)
        disc = 1.5 * np.cos(2 * np.pi * z / 34)
        paint("spine", np.hypot(x, (y + 78) * 1.15) - 21 - disc)
        return out

    def labels(self, points: np.ndarray) -> np.ndarray:
        """Class at points (P, 3) in mm: 0 background, then ``CLASSES``. A liver's vessels and lesions are liver."""
        return _CLASS[self.tissue(points)]

    def render(
        self, shape: tuple[int, int, int], affine: np.ndarray, samples: tuple[int, int, int] = (2, 2, 3)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images of the three phases and the label map on a grid.

        Args:
            shape: voxels of the grid. affine: voxel to mm, (4, 4).
            samples: sub-voxels along each axis over which a voxel averages.

        Returns:
            intensities (3, *shape), float32, and classes at the voxel centres (*shape), uint8.
        """
        tissue, image = rasterised(self.tissue, _CONTRAST, shape, affine, samples)
        label = _CLASS[tissue]
        rng = np.random.default_rng([self.seed, 1])
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        texture = gaussian_filter(rng.standard_normal(shape), 5 / spacing)
        bias = gaussian_filter(rng.standard_normal(shape), 90 / spacing, mode="wrap")
        modulation = (1 + 0.05 * texture / texture.std()) * np.exp(0.18 * bias / bias.std())
        phases = []
        for k in range(len(PHASES)):
            signal = image[:, k].reshape(shape) * modulation * rng.uniform(0.93, 1.07)
            noise = rng.normal(0, 0.035, (2, *shape))
            phases.append(np.hypot(signal + noise[0], noise[1]).astype(np.float32))  # Rician
        return np.stack(phases), label

    def grid(self, spacing: tuple[float, float, float]) -> tuple[tuple[int, int, int], np.ndarray]:
        """A slightly oblique grid over the abdomen, with this patient's own angles: shape and affine."""
        rng = np.random.default_rng([self.seed, 2])
        a, b, c = np.deg2rad(rng.uniform(-8, 8, 3))
        rotation = (
            np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
            @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
            @ np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
        )
        extent = np.array([370, 270, 200]) * rng.uniform(0.97, 1.06, 3)
        shape = np.round(extent / spacing).astype(int)
        affine = np.eye(4)
        affine[:3, :3] = rotation * spacing
        affine[:3, 3] = -affine[:3, :3] @ ((shape - 1) / 2) + rng.uniform(-8, 8, 3)
        return (int(shape[0]), int(shape[1]), int(shape[2])), affine


def write_phantom(
    out: str | Path, patients: int = 20, seed: int = 0, spacing: tuple[float, float, float] = (2.5, 2.5, 5.0)
) -> Path:
    """Write a phantom data set in the MSD layout: three phases a patient on one grid, one label map, ``dataset.json``.

    Byte-identical when run again with the same arguments. ``dataset.json`` lists no case before all are written; its entries
    carry the patient, by which folds are drawn, and the phase.

    Args:
        out: folder to write, new or empty or an earlier phantom, whose scans it replaces. patients: default 20.
        seed: default 0.
        spacing: voxel size in mm, default (2.5, 2.5, 5).

    Returns:
        the folder.

    Raises:
        InputError: when ``out`` holds something else, or a number is out of range.
    """
    out = Path(out).resolve()
    if patients < 1 or seed < 0 or min(spacing) <= 0:
        raise InputError(f"phantom: need patients >= 1, seed >= 0, spacing > 0; got {patients}, {seed}, {spacing}")
    claim_folder(out, NAME, "phantom")
    training: list[dict] = []
    content = {
        "name": NAME,
        "description": "synthetic multi-phasic abdominal MRI phantom",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(i): name for i, name in enumerate(("background", *CLASSES))},
        "numTraining": len(PHASES) * patients,
        "training": training,
    }
    write_listing(out, content)
    for name in ("imagesTr", "labelsTr"):
        (out / name).mkdir(exist_ok=True)
        for scan in (out / name).glob("patient_*.nii.gz"):  # an earlier phantom's
            scan.unlink()
    for number in tqdm(range(1, patients + 1), desc="phantom", unit="patient"):
        name = f"patient_{number:03d}"
        patient = Patient(seed * 100_000 + number)
        shape, affine = patient.grid(spacing)
        phases, label = patient.render(shape, affine)
        nib.save(nib.Nifti1Image(label, affine), out / "labelsTr" / f"{name}.nii.gz")
        for phase, image in zip(PHASES, phases):
            path = f"imagesTr/{name}_{phase}.nii.gz"
            # scanners give integers of no fixed scale
            integers = np.round(image * (600 + 40 * (number % 7))).astype(np.int16)
            nib.save(nib.Nifti1Image(integers, affine), out / path)
            training.append({"image": f"./{path}", "label": f"./labelsTr/{name}.nii.gz", "patient": name, "phase": phase})
    write_listing(out, content)
    return out


def phantom_at(out: str | Path, make: Callable[[Path], Path]) -> str:
    """The folder ``out`` of a phantom to run a bundle on until there are real scans, made if it is not there.

    Args:
        out: folder. make: writes the phantom in the folder that it is given and returns where.
    """
    out = Path(out).resolve()
    logger.warning("no --dataset_dir was given: taking synthetic scans, a phantom, at %s", out)
    if not (out / "dataset.json").is_file():
        check_writable(out.parent)
        # renamed when it is whole: a kill leaves nothing, and of several processes the first one's stays
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".phantom-") as scratch:
            made = make(Path(scratch))
            try:
                os.rename(made, out)
            except OSError:
                if not (out / "dataset.json").is_file():
                    raise
    return str(out)
