"""What an image shows: every mode scaled, turned and taken apart as a person sees it, or refused by name."""

import io

import numpy as np
import open_clip
import pytest
import torch
from cases.files import random_pixels, refused
from PIL import Image

from lightning_vlmq.data.images import Preprocess
from lightning_vlmq.data.images.encoded import decode_images
from lightning_vlmq.data.images.files import FileImages
from lightning_vlmq.data.images.pixels import as_shown
from lightning_vlmq.data.images.sources import FileTree
from lightning_vlmq.data.overlap import find_overlap


@pytest.fixture
def rng():
    return np.random.default_rng()


def stored(image, kind="PNG", **options):
    """The image as a decoder sees it: written and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_open_clips_in_every_mode(rng, mode, interpolation, size):
    for height, width in ((30, 50), (50, 30), (64, 64), (9, 70)):
        for fill in (0, 127):
            image = Image.fromarray(random_pixels(rng, height, width))
            how = {"resize_mode": mode, "interpolation": interpolation}
            whole = open_clip.image_transform(size, False, (0, 0, 0), (1, 1, 1), fill_color=fill, **how)
            expected = (whole(image) * 255).round().to(torch.uint8)
            assert torch.equal(Preprocess(size, fill=fill, **how)(image), expected)


def test_what_is_no_preprocessing():
    refused(lambda: Preprocess(8, resize_mode="squish"), "squish", "squash")
    refused(lambda: Preprocess(8, interpolation="lanczos"), "interpolation", "lanczos")
    refused(lambda: Preprocess(8, orientation="turn"), "orientation", "turn")
    refused(lambda: Preprocess(8, decoder="turbo"), "decoder", "turbo")
    refused(lambda: Preprocess(8, fill=256), "fill")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(rng, kind):
    values = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
    values[0, :3] = 0, 65535, 257
    content = io.BytesIO(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    if kind != "PPM":
        content = io.BytesIO()
        Image.fromarray(values).save(content, kind)
    image = Image.open(content)
    expected = np.rint(values.astype(np.float64) * 255 / 65535).astype(np.uint8)
    shown = Preprocess(16)(image)
    assert torch.equal(shown, torch.from_numpy(expected).expand(3, -1, -1))
    assert shown[0, 0, :3].tolist() == [0, 255, 1]
    images, _ = decode_images([content.getvalue()], "x.parquet", "L", "error")  # data in memory goes the same way
    assert torch.equal(images[0], torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("values", "why"), [(np.float32, "floating-point"), (np.int32, "32-bit")], ids=["float", "32 bits"]
)
def test_values_of_no_known_range_are_refused(rng, tmp_path, values, why):
    Image.fromarray((rng.random((9, 9)) * 3).astype(values)).save(tmp_path / "odd.tif")
    images = FileImages(FileTree.scan(tmp_path), Preprocess(8), torch.arange(1))
    refused(lambda: images.decode(0), tmp_path / "odd.tif", why, "8 or 16 bits")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "PA", "CMYK", "1", "YCbCr", "HSV"])
def test_8_bit_modes_are_open_clips(rng, mode):
    image = Image.fromarray(random_pixels(rng, 24, 31)).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    whole = open_clip.image_transform(16, False, (0, 0, 0), (1, 1, 1))
    assert torch.equal(Preprocess(16)(image), (whole(image) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(rng, kind):
    frames = [Image.fromarray(random_pixels(rng)) for _ in range(3)]
    image = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="3 frames"):
        Preprocess(8)(image)
    assert Preprocess(8)(stored(frames[0], kind)).shape == (3, 8, 8)


def test_the_first_picture_of_several_in_a_jpeg_is_the_image(rng):
    frames = [Image.fromarray(random_pixels(rng, 16, 16)) for _ in range(2)]
    image = stored(frames[0], "MPO", save_all=True, append_images=frames[1:])
    alone = stored(frames[0], "JPEG")
    assert image.format == "MPO" and torch.equal(Preprocess(16)(image), Preprocess(16)(alone))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed_or_not(rng, kind, orientation):
    pixels = random_pixels(rng, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    if kind != "TIFF":  # which Pillow turns by itself
        as_stored = Preprocess(16, orientation="stored")(image)
        assert kind == "JPEG" or torch.equal(as_stored, torch.from_numpy(pixels).permute(2, 0, 1))
    else:
        as_stored = torch.from_numpy(pixels).permute(2, 0, 1)
    turn = {  # Exif 2.32, tag 0x0112: from the stored rows and columns to the seen ones
        1: lambda x: x,
        2: lambda x: x.flip(2),
        3: lambda x: x.flip(1, 2),
        4: lambda x: x.flip(1),
        5: lambda x: x.transpose(1, 2),
        6: lambda x: x.transpose(1, 2).flip(2),
        7: lambda x: x.flip(1, 2).transpose(1, 2),
        8: lambda x: x.transpose(1, 2).flip(1),
    }[orientation]
    assert torch.equal(Preprocess(16)(image), turn(as_stored))


def test_damaged_metadata_leave_the_pixels(rng):
    image = stored(Image.fromarray(random_pixels(rng, 16, 16)), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert as_shown(image).size == (16, 16)


def test_16_bit_images_are_told_apart(rng, tmp_path):
    for name in ("a", "b"):
        values = rng.integers(300, 65536, (2, 9, 9), dtype=np.uint16)  # all white where they are not scaled
        for k, one in enumerate(values):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(one).save(tmp_path / name / f"{k}.png")
    sets = [FileImages(FileTree.scan(tmp_path / name), Preprocess(9), torch.arange(2)) for name in ("a", "b")]
    assert not find_overlap(*sets) and len(find_overlap(sets[0], sets[0])) == 2


FAST = {"decoder": "torchvision"}


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("colour", ["RGB", "L"])
def test_torchvisions_decoder_is_within_two_grey_levels(rng, mode, colour):
    off = []
    for (width, height), options in (
        ((500, 375), {}),
        ((60, 90), {"progressive": True}),
        ((33, 71), {"subsampling": 0, "quality": 95}),
    ):
        smooth = Image.fromarray(random_pixels(rng, 9, 12)).resize((width, height), Image.Resampling.BICUBIC)
        for interpolation in ("bicubic", "bilinear"):
            how = {"resize_mode": mode, "interpolation": interpolation, "fill": 7}
            fast, exact = (
                Preprocess(48, **how, **d)(stored(smooth.convert(colour), "JPEG", **options)) for d in (FAST, {})
            )
            off.append((fast.int() - exact.int()).abs())
    assert max(int(o.max()) for o in off) <= 2 and all(o.float().mean() < 0.5 for o in off)


def test_torchvisions_decoder_leaves_other_images_to_pillow(rng):
    pixels = Image.fromarray(random_pixels(rng, 40, 50))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [pixels]}
    for image, kind, options in (
        (pixels, "PNG", {}),
        (pixels, "WEBP", {}),
        (pixels.convert("CMYK"), "JPEG", {}),
        (pixels, "JPEG", {"exif": turned}),
        (pixels, "MPO", frames),
    ):
        fast, exact = (Preprocess(24, border=2, **d)(stored(image, kind, **options)) for d in (FAST, {}))
        assert torch.equal(fast, exact)
    image = stored(pixels, "JPEG")
    image.load()  # no stream is left to decode from
    assert torch.equal(Preprocess(24, **FAST)(image), Preprocess(24)(image))


def test_torchvisions_decoder_refuses_what_pillow_refuses(rng):
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(rng, 64, 48)).save(buffer, "JPEG")
    outcomes = set()
    for k in range(150):
        data = bytearray(buffer.getvalue())
        if k % 3:
            for place in rng.integers(2, len(data), 3):
                data[place] = rng.integers(256)
        else:
            data = data[: rng.integers(4, len(data))]
        found = []
        for decoder in (FAST, {}):
            try:
                with Image.open(io.BytesIO(bytes(data))) as image:
                    found.append(Preprocess(48, "squash", **decoder)(image).int())
            except Exception:
                found.append(None)
        fast, exact = found
        assert (fast is None) == (exact is None)
        assert fast is None or (fast - exact).abs().max() <= 2
        outcomes.add(fast is None)
    assert outcomes == {True, False}
