"""DICOM and NIfTI as they are meant to be seen: windows, inversion, palettes, frames, orientation, millimetres."""

import os
from pathlib import Path

import numpy as np
import pytest

from sansmax.data.images import read_image
from sansmax.data.slides.dicom_pixels import window_unit
from sansmax.data.slides.dicom_reader import DicomTiles, one_per_series, open_dicom
from sansmax.data.slides.opening import find_slides, open_slide
from sansmax.errors import InputError

pydicom = pytest.importorskip("pydicom", reason="comes with the extra slides")
nibabel = pytest.importorskip("nibabel", reason="comes with the extra slides")

DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real(name):
    """A file of the real data, or a skipped test with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    return DATA / name


def whole(path, frame=None):
    with open_slide(path, frame=frame) as slide:
        return slide.read((0, 0), 0, slide.size)


def write_dicom(path, stored, bits=12, photometric="MONOCHROME2", **tags):
    """A file without compression: (h, w), (h, w, 3) or (frames, h, w)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = tags.pop("SOPClassUID", SecondaryCaptureImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = stored.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    if stored.ndim - colour == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.Rows, dataset.Columns = stored.shape[-3:-1] if colour else stored.shape[-2:]
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in tags.items():
        setattr(dataset, name, value)
    data = stored.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if stored.dtype.itemsize == 2 else "OB"
    dataset.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) % 4096


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(40.0, 400.0), (1000.5, 333.0), (0.0, 2.0), (10.0, 1.0)])
def test_windows_are_those_of_the_standard(function, centre, width):
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_windowing

    values = np.arange(-2000, 2096)
    header = Dataset()
    header.PhotometricInterpretation, header.BitsStored, header.PixelRepresentation = "MONOCHROME2", 12, 0
    header.WindowCenter, header.WindowWidth, header.VOILUTFunction = centre, width, function
    with np.errstate(over="ignore"):
        reference = apply_windowing(values.astype(np.float64), header) / 4095
    np.testing.assert_allclose(window_unit(values, centre, width, function), reference, atol=1e-12)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_grey_is_rescaled_windowed_and_inverted(tmp_path, photometric):
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [1500, 3], "WindowWidth": [3000, 4]}
    path = write_dicom(tmp_path / "a.dcm", RAMP, photometric=photometric, **tags)
    unit = np.clip((RAMP * 2.0 - 1000 - 1499.5) / 2999 + 0.5, 0, 1)
    unit = 1 - unit if photometric == "MONOCHROME1" else unit
    read = read_image(path)
    assert read.dtype == np.uint16 and abs(read - 65535 * unit).max() <= 0.5 + 1e-6
    shown = whole(path)
    assert abs(shown[..., 0] - 255 * unit).max() <= 0.51 and (shown[..., 0] == shown[..., 2]).all()


def test_without_a_window_the_range_counts_and_padding_does_not(tmp_path):
    stored = RAMP.astype(np.int16) + 100
    stored[0] = -2000
    path = write_dicom(tmp_path / "a.dcm", stored, bits=16, PixelPaddingValue=-2000)
    read, stored = read_image(path), stored.astype(float)
    assert read[0].max() == 0 and read[1:].min() == 0 and read.max() == 65535
    np.testing.assert_allclose(
        read[1:], 65535 * (stored[1:] - stored[1:].min()) / (stored.max() - stored[1:].min()), atol=0.51
    )
    flat = write_dicom(tmp_path / "flat.dcm", np.full((5, 6), 7, np.uint8), bits=8)
    assert (read_image(flat) == 0).all()


def test_a_voi_lut_goes_before_a_window(tmp_path):
    from pydicom.dataset import Dataset

    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [256, 0, 16], [int(v) for v in np.linspace(65535, 0, 256).astype(int)]
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "US"
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write_dicom(tmp_path / "a.dcm", stored, bits=8, VOILUTSequence=[lut], WindowCenter=5, WindowWidth=9)
    assert abs(read_image(path).astype(float) - (255 - stored)).max() <= 0.51


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colour_is_given_as_rgb(tmp_path, photometric):
    from pydicom.pixels import convert_color_space

    rgb = np.random.default_rng(0).integers(20, 236, (9, 11, 3)).astype(np.uint8)
    stored = convert_color_space(rgb, "RGB", "YBR_FULL") if photometric == "YBR_FULL" else rgb
    path = write_dicom(tmp_path / "a.dcm", stored, bits=8, photometric=photometric)
    assert abs(read_image(path).astype(int) - rgb).max() <= (2 if photometric == "YBR_FULL" else 0)


def test_frames_are_slides_of_their_own_with_their_own_window(tmp_path):
    from pydicom.dataset import Dataset

    stack = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    groups = []
    for k in range(3):
        item, voi, measures = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = 1000 * (k + 1), 500
        measures.PixelSpacing = [0.001 * (k + 1), 0.001 * (k + 1)]
        item.FrameVOILUTSequence, item.PixelMeasuresSequence = [voi], [measures]
        groups.append(item)
    path = write_dicom(tmp_path / "a.dcm", stack, PerFrameFunctionalGroupsSequence=groups)
    for k in range(3):
        unit = np.clip((stack[k] - (1000 * (k + 1) - 0.5)) / 499 + 0.5, 0, 1)
        assert abs(whole(path, k)[..., 0] - 255 * unit).max() <= 0.51
        with open_slide(path, frame=k) as slide:
            assert slide.mpp == pytest.approx(k + 1)
    with pytest.raises(InputError, match=r"3 frames.*frame 0 to 2"):
        open_slide(path)
    with pytest.raises(InputError, match="frame 3"):
        open_slide(path, frame=3)
    with pytest.raises(InputError, match="3 frames, one is allowed"):
        read_image(path)


def test_spacing_in_millimetres_becomes_micrometres(tmp_path):
    for name, spacing, mpp in (("a", [0.25, 0.25], 250), ("b", [0, 0], None), ("c", [0.2, 0.4], None)):
        path = write_dicom(tmp_path / f"{name}.dcm", RAMP, PixelSpacing=spacing)
        with open_slide(path) as slide:
            assert slide.mpp == mpp


def tiled_slide(path, size, tile, **tags):
    """The frames of a tiled slide, and the picture that they make."""
    whole = np.random.default_rng(size).integers(0, 256, (size, size, 3)).astype(np.uint8)
    count = -(-size // tile)
    padded = np.zeros((count * tile, count * tile, 3), np.uint8)
    padded[:size, :size] = whole
    frames = padded.reshape(count, tile, count, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    tags = {"TotalPixelMatrixColumns": size, "TotalPixelMatrixRows": size, **tags}
    sop = "1.2.840.10008.5.1.4.1.1.77.1.6"
    write_dicom(path, frames, bits=8, photometric="RGB", SOPClassUID=sop, **tags)
    return whole


def test_a_tiled_slide_is_put_together_from_its_frames(tmp_path):
    pixels = tiled_slide(tmp_path / "a.dcm", 75, 16, DimensionOrganizationType="TILED_FULL")
    with open_dicom(tmp_path / "a.dcm", "a") as slide:
        assert isinstance(slide, DicomTiles) and slide.size == (75, 75)
        np.testing.assert_array_equal(slide.read((0, 0), 0, (75, 75)), pixels)
        np.testing.assert_array_equal(slide.read((30, 17), 0, (20, 33)), pixels[17:50, 30:50])
        assert (slide.read((70, 70), 0, (20, 20))[5:] == 255).all()
    tiled_slide(tmp_path / "b.dcm", 75, 16, DimensionOrganizationType="TILED_SPARSE")
    with pytest.raises(InputError, match="TILED_FULL"):
        open_dicom(tmp_path / "b.dcm", "b")


def test_the_files_of_one_series_are_one_slide(tmp_path):
    for name, size, kind in (("fine", 75, "VOLUME"), ("coarse", 37, "VOLUME"), ("label", 90, "LABEL")):
        tags = {"SeriesInstanceUID": "1.2.3", "ImageType": ["ORIGINAL", "PRIMARY", kind, "NONE"]}
        tiled_slide(tmp_path / f"{name}.dcm", size, 16, **tags)
    tiled_slide(tmp_path / "other.dcm", 20, 16, SeriesInstanceUID="1.2.4")
    write_dicom(tmp_path / "scan.dcm", RAMP, SeriesInstanceUID="1.2.3")
    assert [p.stem for p in find_slides(tmp_path)] == ["fine", "other", "scan"]
    assert one_per_series([tmp_path / "gone.dcm"]) == [tmp_path / "gone.dcm"]


def test_dicom_cut_short_is_an_error(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"a\.dcm"):
        open_slide(path)


@pytest.mark.real_data
def test_a_chest_film_is_shown_with_black_air():
    path = real("dicom/RG1_J2KI.dcm")
    stored = pydicom.pixels.pixel_array(path).astype(np.float64)
    unit = 1 - np.clip((stored - 14999.5) / 29999 + 0.5, 0, 1)
    read = read_image(path)
    assert read.shape == (1955, 1841) and read.dtype == np.uint16 and abs(read - 65535 * unit).max() <= 0.5 + 1e-6
    with open_slide(path) as slide:
        assert slide.mpp is None and slide.size == (1841, 1955)
    # the lungs are darker than the spine between them
    assert read[700:900, 400:600].mean() < read[700:900, 880:960].mean()


@pytest.mark.real_data
def test_real_files_of_every_kind():
    palette = pydicom.dcmread(real("dicom/OBXXXX1A.dcm"))
    colours = pydicom.pixels.apply_color_lut(palette.pixel_array, palette)
    np.testing.assert_array_equal(whole(real("dicom/OBXXXX1A.dcm")), colours >> 8 if colours.max() > 255 else colours)
    rgb = pydicom.dcmread(real("dicom/US1_UNCR.dcm")).pixel_array
    np.testing.assert_array_equal(whole(real("dicom/US1_UNCR.dcm")), rgb)
    mr = pydicom.dcmread(real("dicom/emri_small.dcm")).pixel_array[3].astype(float)
    shown = whole(real("dicom/emri_small.dcm"), 3)[..., 0]
    assert abs(shown - 255 * (mr - mr.min()) / (mr.max() - mr.min())).max() <= 0.51
    # a file that begins like a TIFF
    with open_slide(real("dicom/CT_small.dcm")) as slide:
        assert slide.mpp == pytest.approx(661.468) and slide.size == (128, 128)
    assert read_image(real("dicom/CT_small.dcm")).shape == (128, 128)


@pytest.mark.real_data
def test_openslide_and_frames_agree_on_a_tiled_slide():
    path = real("dicom/highdicom_sm_image_numbers.dcm")
    with open_slide(path) as slide, open_dicom(path, "a") as plain:
        assert "OpenSlide" in slide.kind and isinstance(plain, DicomTiles)
        assert slide.mpp == plain.mpp == pytest.approx(0.499)
        np.testing.assert_array_equal(slide.read((-3, 5), 0, (60, 40)), plain.read((-3, 5), 0, (60, 40)))


def write_nifti(path, values, zooms, affine=None):
    affine = np.diag([*zooms[:3], 1.0]) if affine is None else affine
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


def test_a_slice_is_scaled_by_the_percentiles_of_its_volume(tmp_path):
    volume = np.random.default_rng(0).normal(100, 30, (12, 9, 5)).astype(np.float32)
    volume[3, 4, 2] = np.nan
    path = write_nifti(tmp_path / "a.nii.gz", volume, (0.5, 0.5, 2.0))
    low, high = np.nanpercentile(volume.astype(np.float64), (0.5, 99.5))
    for k in range(5):
        unit = np.clip((np.nan_to_num(volume[..., k].astype(np.float64), nan=low) - low) / (high - low), 0, 1)
        # front at the top: the second axis runs upwards
        assert abs(whole(path, k)[..., 0] - 255 * unit.T[::-1]).max() <= 0.51
    with open_slide(path, frame=0) as slide:
        assert slide.mpp == pytest.approx(500) and slide.size == (12, 9) and slide.name == "a"
    with pytest.raises(InputError, match=r"5 slices.*frame 0 to 4"):
        open_slide(path)
    with pytest.raises(InputError, match="5 slices, one is allowed"):
        read_image(path)


def test_volumes_are_turned_to_the_canonical_orientation(tmp_path):
    volume = np.random.default_rng(1).integers(0, 1000, (6, 7, 8)).astype(np.int16)
    plain = write_nifti(tmp_path / "a.nii", volume, (1.0, 1.0, 1.0))
    # the same volume stored with its axes (z, -x, y)
    turned = np.zeros((4, 4))
    turned[2, 0], turned[0, 1], turned[1, 2], turned[3, 3] = 1, -1, 1, 1
    turned[0, 3] = 5
    other = write_nifti(tmp_path / "b.nii", volume.transpose(2, 0, 1)[:, ::-1].copy(), (1, 1, 1), turned)
    for k in (0, 5):
        np.testing.assert_array_equal(whole(other, k), whole(plain, k))


def test_two_dimensional_nifti_is_an_image(tmp_path):
    values = np.random.default_rng(2).integers(0, 1000, (30, 20)).astype(np.int16)
    path = write_nifti(tmp_path / "a.nii", values, (1.0, 1.0, 1.0))
    read = read_image(path)
    assert read.shape == (20, 30) and read.dtype == np.uint16
    low, high = np.percentile(values, (0.5, 99.5))
    np.testing.assert_allclose(read, 65535 * np.clip((values.T[::-1] - low) / (high - low), 0, 1), atol=0.51)


@pytest.mark.real_data
def test_real_volumes_are_counted_over_their_last_axes():
    path = real("nifti/nibabel_example4d.nii.gz")
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    assert volume.shape == (128, 96, 24, 2)
    low, high = np.percentile(volume[..., 1], (0.5, 99.5))
    unit = np.clip((volume[:, :, 7, 1] - low) / (high - low), 0, 1)
    assert abs(whole(path, 24 + 7)[..., 0] - 255 * unit.T[::-1]).max() <= 0.6
    with open_slide(path, frame=0) as slide:
        assert slide.mpp == pytest.approx(2000)
    assert whole(real("nifti/nibabel_anatomical.nii"), 12).shape == (41, 33, 3)
