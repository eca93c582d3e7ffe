"""DICOM as it should not be: a table, a row a folder, what is in it and what must come out.

All rows are one cohort, segmented once with a network that marks what is bright. A row that is ``DONE`` must have a map on the
grid that the slices' tags tell, with the bright part marked; one that is not is refused by a line that names it.
"""

import re

import nibabel as nib
import numpy as np
import pytest
from conftest import write_dicom
from monai.data import ITKReader, MetaTensor
from monai.transforms import LoadImaged
from test_hostile_scans import affine, file_name, heard

from monai_morse.data import SaveDicomSegd, ScanReader, dicom_scans, read_scan
from monai_morse.data.dicom import reoriented
from monai_morse.errors import InputError
from tools.fuzz_geometry import bright, infer

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid  # noqa: E402

DONE = ""
SHAPE = (20, 24, 9)
AXIAL = affine(1, 1, 2, offset=(9, 12, -30), flip=(0, 1))
OBLIQUE = affine(1, 1.2, 2, offset=(9, 12, -30), turn=(8, -5, 20), flip=(0, 1))
SAGITTAL = np.array([[0, 0, -2.0, 20], [1, 0, 0, 4], [0, -1, 0, 9], [0, 0, 0, 1]])
CORONAL = np.array([[1.0, 0, 0, -20], [0, 0, 2, 4], [0, -1, 0, 9], [0, 0, 0, 1]])
STORAGE = "1.2.840.10008.5.1.4.1.1."
CT, MR, PET, ULTRASOUND, CAPTURE = (STORAGE + n for n in ("2", "4", "128", "6.1", "7"))


def scan(where=AXIAL, shape=SHAPE):
    voxels = -100 + 200 * bright(shape) + np.random.default_rng(0).normal(0, 5, shape)
    return nib.Nifti1Image(voxels.round().astype(np.int16), where)


def place(file):
    return tuple(map(float, pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient))


def series(folder, where=AXIAL, shape=SHAPE, **options):
    """A series' files in the order of their slices."""
    files = write_dicom(folder, scan(where, shape), **options)
    return sorted(files, key=lambda f: int(pydicom.dcmread(f, stop_before_pixels=True).InstanceNumber))


def edit(file, copy=None, **tags):
    """A file with other tags, None for none; under another name as another instance."""
    data = pydicom.dcmread(file)
    for tag, value in tags.items():
        if value is None:
            delattr(data, tag)
        else:
            setattr(data, tag, value)
    if copy:
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    if "SOPClassUID" in tags:
        data.file_meta.MediaStorageSOPClassUID = tags["SOPClassUID"]
    data.save_as(file.with_name(copy) if copy else file, enforce_file_format=True)


def edits(which=slice(None), where=AXIAL, **tags):
    """A folder's series in which some slices have other tags."""

    def write(folder):
        for file in series(folder, where)[which]:
            edit(file, **tags)

    return write


def moved(shift, which=slice(None)):
    """A series whose slice k lies elsewhere by ``shift(k)`` mm."""

    def write(folder):
        for k, file in list(enumerate(series(folder)))[which]:
            edit(file, ImagePositionPatient=[f"{c:.6g}" for c in np.array(place(file)) + shift(k)])

    return write


def twice(shift=0.0, **tags):
    """A series and its slices once more, with other tags."""

    def write(folder):
        for k, file in enumerate(series(folder)):
            edit(file, f"again{k}", InstanceNumber=100 + k, **tags)

    return write


def gone(which):
    def write(folder):
        for file in series(folder)[which]:
            file.unlink()

    return write


def cut(length, which=4):
    def write(folder):
        file = series(folder)[which]
        file.write_bytes(file.read_bytes()[:length])

    return write


def without_preamble(folder):
    series(folder)
    (folder / "old").write_bytes((folder / "IM0000").read_bytes()[132:])


def anonymised(folder):
    for file in series(folder):
        edit(file, SeriesInstanceUID="", SOPInstanceUID="", StudyInstanceUID="", SOPClassUID=MR)


def with_capture(folder):
    file = series(folder)[0]
    edit(file, "capture", SOPClassUID=CAPTURE, ImagePositionPatient=None, ImageType=["DERIVED", "SECONDARY"])


def localiser(folder):
    files = write_dicom(folder, scan(AXIAL, (20, 24, 3)))
    for file, where in zip(files, (AXIAL, SAGITTAL, CORONAL)):
        lps = np.diag([-1.0, -1, 1, 1]) @ where
        edit(file, ImageOrientationPatient=[*(lps[:3, 0] / np.linalg.norm(lps[:3, 0])), *lps[:3, 1]])


def enhanced(order=range(9), where=AXIAL, sop=MR + ".1", slopes=1, shared=True, **tags):
    """One multi-frame file with functional groups; None for a tag or a group leaves it out."""

    def write(folder):
        image = scan(where)
        lps = np.diag([-1.0, -1, 1, 1]) @ where
        size = np.linalg.norm(lps[:3, :3], axis=0)
        along = lps[:3, :3] / size
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = UID(sop)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = (generate_uid() for _ in range(3))
        data.Modality, data.SeriesNumber, data.ImageType = "MR", 1, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "p", "p", "", ""
        data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber = "20260101", "120000", "1", ""
        data.ReferringPhysicianName, data.PositionReferenceIndicator = "", ""
        data.Columns, data.Rows, data.NumberOfFrames = *image.shape[:2], len(order)
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit = 15

        def group(**content):
            item = Dataset()
            for tag, value in content.items():
                if value is not None:
                    setattr(item, tag, [f"{c:.8g}" for c in value] if np.ndim(value) else value)
            return [item]

        def common(item):
            item.PixelMeasuresSequence = group(PixelSpacing=tags.get("PixelSpacing", size[1::-1]), SliceThickness="2")
            item.PlaneOrientationSequence = group(ImageOrientationPatient=(*along[:, 0], *along[:, 1]))
            return item

        frames, pixels = [], []
        for i, k in enumerate(order):
            frame = Dataset() if shared else common(Dataset())
            if tags.get("position", True):
                frame.PlanePositionSequence = group(ImagePositionPatient=lps[:3, 3] + k * lps[:3, 2])
            slope = slopes if np.ndim(slopes) == 0 else slopes[i]
            frame.PixelValueTransformationSequence = group(RescaleSlope=str(slope), RescaleIntercept="0")
            frame.MRImageFrameTypeSequence = group(FrameType=None)
            frame.MRImageFrameTypeSequence[0].FrameType = tags.get("types", {}).get(i, ["ORIGINAL", "PRIMARY", "VOLUME"])
            frames.append(frame)
            pixels.append(np.round(np.asarray(image.dataobj)[:, :, k].T / slope).astype(np.int16))
        if shared:
            data.SharedFunctionalGroupsSequence = [common(Dataset())]
        if tags.get("frames", True):
            data.PerFrameFunctionalGroupsSequence = frames[: tags.get("told", len(frames))]
        data.PixelData = np.stack(pixels).tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        data.save_as(folder / tags.get("name", "IM"), enforce_file_format=True)

    return write


def two_enhanced(folder):
    enhanced()(folder)
    edit(folder / "IM", "again")


def multiframe(sop):
    """A stack in one file that tells a slice's place at most, as ITK writes it."""

    def write(folder):
        enhanced(sop=sop, frames=False, shared=False)(folder)

    return write


# what is in the folder: (how it is written, what must come out, where its voxels lie)
FOLDERS = {
    # --- read
    "axial": (series, DONE),
    "oblique": (lambda f: series(f, OBLIQUE), DONE, OBLIQUE),
    "sagittal": (lambda f: series(f, SAGITTAL), DONE, SAGITTAL),
    "coronal": (lambda f: series(f, CORONAL), DONE, CORONAL),
    "from the last slice to the first": (lambda f: [edit(p, InstanceNumber=99 - i) for i, p in enumerate(series(f))], DONE),
    "with a DICOMDIR": (lambda f: [series(f), (f / "DICOMDIR").write_bytes(bytes(128) + b"DICM")], DONE),
    "with notes": (lambda f: [series(f), (f / "notes.txt").write_text("no scan")], DONE),
    "slices rescaled differently": (lambda f: series(f, slopes=np.linspace(0.25, 0.5, 9)), DONE),
    "CT": (edits(SOPClassUID=CT, Modality="CT"), DONE),
    "PET": (edits(SOPClassUID=PET, Modality="PT"), DONE),
    "overlapping slices, thicker than their distance": (edits(SliceThickness="5"), DONE),
    "no SliceThickness": (edits(SliceThickness=None), DONE),
    "SpacingBetweenSlices of another kind": (edits(SpacingBetweenSlices="7"), DONE),
    "positions to a hundredth": (moved(lambda k: (0.004 * (-1) ** k, 0, 0.004)), DONE),
    "one slice": (lambda f: series(f, shape=(20, 24, 1)), DONE),
    "anonymised to the last identifier": (anonymised, DONE),
    "a secondary capture among the slices": (with_capture, DONE),
    "enhanced MR": (enhanced(), DONE),
    "enhanced MR, oblique": (enhanced(where=OBLIQUE), DONE, OBLIQUE),
    "enhanced MR, frames in another order": (enhanced(order=[3, 1, 0, 2, 8, 5, 4, 7, 6]), DONE),
    "enhanced MR, frames from the last": (enhanced(order=range(8, -1, -1), where=SAGITTAL), DONE, SAGITTAL),
    "enhanced MR, all groups with each frame": (enhanced(shared=False), DONE),
    "enhanced MR, rescaled": (enhanced(slopes=0.5), DONE),
    "enhanced CT": (enhanced(sop=CT + ".1"), DONE),
    "MR converted to enhanced": (enhanced(sop=MR + ".4"), DONE),
    # --- tags that do not tell where the slices lie
    **{
        f"{tag} missing {where}": (edits(which, **{tag: None}), f"IM.* has no usable {tag}; geometry is never guessed")
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        for where, which in (("in one slice", slice(4, 5)), ("everywhere", slice(None)))
    },
    "an empty position": (edits(slice(2, 3), ImagePositionPatient=""), "has no usable ImagePositionPatient"),
    "a position of two numbers": (edits(slice(2, 3), ImagePositionPatient=["1", "2"]), "has no usable ImagePositionPatient"),
    "one slice that tells no thickness": (
        lambda f: edit(series(f, shape=(20, 24, 1))[0], SliceThickness=None),
        "one slice alone that tells no SliceThickness",
    ),
    "directions not at right angles": (
        edits(ImageOrientationPatient=["1", "0", "0", "0.6", "0.8", "0"]),
        "no directions at right",
    ),
    "directions of no length": (edits(ImageOrientationPatient=["0"] * 6), "no directions at right angles"),
    "spacing 0": (edits(PixelSpacing=["0", "0"]), "not invertible"),
    "spacing in micrometres": (edits(PixelSpacing=["700", "700"]), "voxels measure 700 x 700 x 2 mm, plausible are"),
    # --- slices that are no stack
    "a slice missing": (gone(slice(4, 5)), "8 slices are not evenly spaced .off by up to .* mm.: one is missing"),
    "a slice twice": (lambda f: edit(series(f)[3], "again"), "10 slices are not evenly spaced"),
    "two phases": (twice(AcquisitionNumber=2), "18 slices are not evenly spaced"),
    "two echoes": (twice(EchoTime="4"), "18 slices are not evenly spaced"),
    "spacing that grows": (moved(lambda k: (0, 0, 0.2 * k**2)), "not evenly spaced"),
    "a slice out of its place": (moved(lambda k: (0, 0, 0.7), slice(4, 5)), "not evenly spaced"),
    "all at one place": (moved(lambda k: (0, 0, -2.0 * k)), "not evenly spaced"),
    "a tilted gantry": (moved(lambda k: (0, 0.5 * k, 0)), "not lie on one line along their normal .*tilted gantry"),
    "a slice aside": (moved(lambda k: (3, 0, 0), slice(4, 5)), "not lie on one line along their normal"),
    "a localiser": (localiser, "differ in ImageOrientationPatient"),
    "a slice turned": (
        edits(slice(4, 5), ImageOrientationPatient=["1", "0", "0", "0", "0.8", "0.6"]),
        "differ in ImageOrientation",
    ),
    "a slice of another spacing": (edits(slice(4, 5), PixelSpacing=["1.1", "1.1"]), "differ in PixelSpacing"),
    # --- slices of several kinds, or of one that is not read
    "an MR among CT": (
        lambda f: [edit(p, SOPClassUID=CT) for p in series(f)[1:]],
        "not all .* one kind: IM.* is MR Image Storage",
    ),
    "an image derived from the others": (
        lambda f: edit(series(f)[0], "derived", ImageType=["DERIVED", "SECONDARY", "MPR"]),
        r"not all slices are of one kind: derived is .*DERIVED.SECONDARY",
    ),
    "a slice of other rows": (
        lambda f: edit(series(f)[0], "wide", Rows=12, PixelData=bytes(2 * 12 * 20)),
        "one kind: wide is .* 12 rows",
    ),
    "a slice of another frame of reference": (
        edits(slice(4, 5), FrameOfReferenceUID="1.2.3"),
        "one kind: IM.* is .*frame of reference 1.2.3",
    ),
    "in colour": (edits(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "is in colour"),
    "ultrasound": (edits(SOPClassUID=ULTRASOUND), "Ultrasound Image Storage, which is not read; CT, MR and PET"),
    "a stack of frames without functional groups": (multiframe(MR), "9 frames and 0 functional groups .* never guessed"),
    "a multi-frame secondary capture": (multiframe(CAPTURE + ".3"), "Secondary Capture .* not read"),
    "enhanced MR without functional groups": (multiframe(MR + ".1"), "9 frames and 0 functional groups"),
    "enhanced MR without positions": (enhanced(position=False), "IM has no usable ImagePositionPatient"),
    "enhanced MR without spacing": (enhanced(PixelSpacing=None), "IM has no usable PixelSpacing"),
    "enhanced MR with groups for some frames": (enhanced(told=7), "9 frames and 7 functional groups"),
    "enhanced MR with a frame twice": (enhanced(order=[0, 1, 2, 3, 4, 4, 5, 6, 7]), "not evenly spaced"),
    "enhanced MR, frames rescaled differently": (enhanced(slopes=[0.5, *[1] * 8]), "not all .* one kind: .*RescaleSlope 0.5"),
    "enhanced MR, magnitude and phase": (
        enhanced(types={3: ["ORIGINAL", "PRIMARY", "P"]}),
        "one kind: IM, frame 4, is .*PRIMARY.P",
    ),
    "two enhanced MR in one series": (two_enhanced, "2 files, some with several frames, are no one stack"),
    # --- files
    "a file cut short": (cut(-100), "IM.* of its 9 files cannot be decoded, truncated"),
    "a file cut in its header": (cut(600), "8 slices are not evenly spaced"),
    "a file without its preamble": (without_preamble, DONE),
    "tags alone": (cut(-2 * 20 * 24 - 12), "IM.* of its 9 files cannot be decoded"),
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicom")
    for row, (write, *_) in FOLDERS.items():
        write(folder / "scans" / file_name(row))
    with heard() as lines, pytest.raises(InputError) as caught:
        infer("hippocampus_mri_morse", folder / "scans", folder / "out", patch_size=[24, 24, 24])
    return folder / "out", lines, str(caught.value)


@pytest.mark.parametrize("row", FOLDERS)
def test_a_folder_is_done_where_its_slices_lie_or_refused_by_name(row, cohort):
    out, lines, error = cohort
    _, outcome, *where = FOLDERS[row]
    found = out / f"{file_name(row)}_seg.nii.gz"
    told = [line for line in lines if f"/{file_name(row)}/" in line or f"/{file_name(row)}:" in line]
    if outcome:
        assert not found.exists() and f"/{file_name(row)}.dicom" in error
        assert any(re.search(outcome, line) for line in told), told
        return
    assert found.exists(), told
    shape = (20, 24, 1) if row == "one slice" else SHAPE
    expected = scan(where[0] if where else AXIAL, shape)
    seg = reoriented(nib.load(found), expected)
    assert seg.shape == shape and np.allclose(seg.affine, expected.affine, atol=0.005)
    marked, truth = np.asarray(seg.dataobj) == 1, bright(shape)
    assert 2 * (marked & truth).sum() > 0.85 * (marked.sum() + truth.sum())


def test_what_is_left_out_is_named(cohort):
    _, lines, _ = cohort
    assert any(re.search("a_secondary_capture.*1 DICOM file.s. that are secondary captures.*such as capture", x) for x in lines)
    assert any(
        re.search("a_file_without_its_preamble.*1 DICOM file.s. without a readable image.*such as old", x) for x in lines
    )
    assert any(re.search("a_file_cut_in_its_header.*1 DICOM file.s. without a readable image.*such as IM", x) for x in lines)


def test_where_itk_places_a_series_elsewhere_than_its_tags_it_is_refused(tmp_path, monkeypatch):
    series(tmp_path / "art")
    (address,) = dicom_scans(tmp_path).values()
    read = ITKReader.get_data

    def moved_by_itk(self, image):
        voxels, meta = read(self, image)
        meta["affine"][0, 3] += 1
        return voxels, meta

    monkeypatch.setattr(ITKReader, "get_data", moved_by_itk)
    with pytest.raises(InputError, match="art.dicom: its voxels as ITK places them .* up to 1 mm away"):
        read_scan(address)


@pytest.mark.parametrize("order", [range(9), [3, 1, 0, 2, 8, 5, 4, 7, 6]])
def test_the_segmentation_of_a_multi_frame_file_lies_on_it(order, tmp_path):
    hd = pytest.importorskip("highdicom", reason="pip install monai_morse[dicom]")
    enhanced(order=order)(tmp_path / "art")
    (address,) = dicom_scans(tmp_path).values()
    image = LoadImaged("image", reader=ScanReader, ensure_channel_first=True)({"image": address})["image"]
    SaveDicomSegd("pred", tmp_path / "out", ["liver"])({"pred": MetaTensor((image > 0).float(), meta=image.meta)})
    found = hd.seg.segread(tmp_path / "out" / "art_seg.dcm").get_volume(combine_segments=True)
    seg = nib.Nifti1Image(found.array.astype(np.uint8), np.diag([-1.0, -1, 1, 1]) @ found.affine)
    seg = reoriented(seg, scan())
    assert np.allclose(seg.affine, AXIAL) and np.array_equal(np.asarray(seg.dataobj), bright(SHAPE))


def test_parts_of_a_series_in_two_folders_are_told_of_copies_are_not(tmp_path, caplog):
    files = series(tmp_path / "whole" / "a")
    (tmp_path / "whole" / "b").mkdir()
    for file in files[:4]:
        file.rename(tmp_path / "whole" / "b" / file.name)
    assert len(dicom_scans(tmp_path / "whole")) == 2
    assert "hold parts of one series" in caplog.text
    caplog.clear()
    for name in "ab":
        series(tmp_path / "copies" / name)
    assert len(dicom_scans(tmp_path / "copies")) == 2 and not caplog.records
