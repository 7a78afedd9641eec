"""Decoding and resizing: bytes of every kind, against Pillow and the official evaluation's numbers."""

import io
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, encoded, psnr, reference, triangle_image
from PIL import Image, ImageOps

from common.evaluate import normalize
from common.images import decode, eval_transform, from_numpy, jpeg_decoder

EVAL = reference("eval")
RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8)))


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("case", [c for c in EVAL["cases"] if c["interpolation"] == "bicubic"], ids=lambda c: c["name"])
def test_evaluation_transform_equals_the_official_one(case):
    image = from_numpy(triangle_image(EVAL["images"][case["image"]]))
    out = eval_transform(image, (case["input_size"],) * 2, case["crop_ratio"])
    expected = case["expected"]
    for y, x, c, value, _ in expected["samples_y_x_c_uint8_value"]:
        assert abs(out[c, y, x].item() - value) <= 1
    sums = out.long().sum(dim=(1, 2)).tolist()
    assert sums == pytest.approx(expected["uint8_sum_per_channel"], rel=2e-4)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 401)])
def test_evaluation_transform_is_torchvisions_to_60_db(size):
    from torchvision import transforms

    smooth = Image.fromarray(RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    expected = transforms.Compose(
        [transforms.Resize(73, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(64)]
    )(smooth)
    out = eval_transform(from_numpy(np.array(smooth)), (64, 64), 0.875)
    assert psnr(out.permute(1, 2, 0).numpy(), np.array(expected)) > 60


@pytest.fixture(params=["torchcodec", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """What jpeg_decoder has to choose from: torchcodec, torchvision's decoder, or neither. torchcodec is simulated: it
    applies EXIF's orientation, as the real one does."""
    calls = []

    def decode_jpeg(data, *, mode):
        assert mode == "RGB" and data.dtype == torch.uint8
        calls.append((request.param, data.data_ptr()))
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data.numpy().tobytes())))
        return from_numpy(np.array(turned.convert("RGB")))

    fake = SimpleNamespace(decode_jpeg=decode_jpeg, ImageReadMode=SimpleNamespace(RGB="RGB"))
    if request.param == "torchvision":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
        monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda data, mode, real=torchvision.io.decode_jpeg: (
            calls.append((request.param, data.data_ptr())) or real(data, mode)))
    else:
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake if request.param == "torchcodec" else None)
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    jpeg_decoder.cache_clear()
    yield request.param, calls
    jpeg_decoder.cache_clear()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_J5_every_decoder_gives_the_same_pixels_without_a_warning(decoder, mode):
    name, calls = decoder
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    COLOURS.convert(mode).save(out, "JPEG", quality=85, exif=exif)
    expected = np.array(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(out.getvalue())
    assert found.shape == expected.shape and psnr(found, expected) > 50
    assert [called for called, _ in calls] == ([] if name == "Pillow" else [name])


def test_a_jpeg_is_decoded_where_it_was_read(decoder):
    """Without EXIF there is nothing to change in it, hence nothing to copy."""
    data, (name, calls) = encoded(COLOURS), decoder
    decode(data)
    assert calls == ([] if name == "Pillow" else [(name, np.frombuffer(data, np.uint8).ctypes.data)])


def test_J5_scripts_start_without_torchvisions_decoders(fresh):
    code = (
        "import sys, torchvision.io as io, torchvision.transforms.v2;"  # which uses it itself
        "sys.modules['torchcodec'] = None; del io.decode_jpeg;"
        "import common.evaluate, common.images; print(common.images.jpeg_decoder())"
    )
    result = fresh("-c", code, cwd=ROOT)
    assert result.status == 0 and result.out.strip() == "None", result


@pytest.mark.parametrize("count", [1, 40])
def test_normalisation_piece_by_piece(count):
    """40 of these images are more than the 2^18 numbers of a piece; their memory is interleaved, as the loader's is."""
    images = torch.from_numpy(RNG.integers(0, 256, (count, 61, 83, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    out = normalize(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert out.dtype == torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out, (images / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_evaluation_of_non_square_sizes_keeps_the_aspect_ratio():
    image = from_numpy(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    out = eval_transform(image, (32, 64), 1.0)
    assert out.shape == (3, 32, 64) and out[0, 16, 32].item() == pytest.approx(100, abs=2)


@pytest.mark.parametrize("quality, subsampling", [(95, 0), (75, 2)])
def test_jpeg_equals_pillow(quality, subsampling):
    out = io.BytesIO()
    COLOURS.save(out, "JPEG", quality=quality, subsampling=subsampling)
    expected = np.array(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
    assert np.abs(pixels(out.getvalue()).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "1"), ("PNG", "P"), ("PNG", "L"),
    ("TIFF", "RGB"), ("BMP", "RGB"), ("WEBP", "RGB"), ("PPM", "RGB"), ("GIF", "P")
])
def test_B14_every_mode_becomes_pillows_rgb(kind, mode):
    image = COLOURS.convert(mode)
    if kind == "PNG" and mode == "P":
        image.info["transparency"] = 0
    data = encoded(image, kind)
    assert np.array_equal(pixels(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_B13_content_decides_not_the_name():
    assert np.array_equal(pixels(encoded(COLOURS, "PNG")), np.array(COLOURS))


def test_B15_16_bit_grey_is_scaled_and_float_is_refused():
    grey = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    assert np.array_equal(pixels(encoded(Image.fromarray(grey), "PNG"))[..., 0], (grey >> 8).astype(np.uint8))
    with pytest.raises(ValueError, match="mode F"):
        decode(encoded(Image.fromarray(RNG.random((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_B16_an_animation_is_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), c) for c in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(out.getvalue())[8, 8].tolist() == [200, 0, 0]


def test_B17_exif_orientation_is_not_applied_and_corrupt_exif_is_no_error():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    COLOURS.save(out, "JPEG", exif=exif)
    assert pixels(out.getvalue()).shape == (48, 40, 3)
    assert pixels(out.getvalue().replace(b"Exif\0\0", b"Exif\0\0\xff\xff", 1)[:-2] + b"\xff\xd9").shape[2] == 3


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[: len(d) // 2], lambda d: d[:-2], lambda d: b"", lambda d: b"<html>no</html>", lambda d: d[:20]],
    ids=["half", "last 2 bytes", "empty", "html", "20 bytes"]
)
def test_B11_B12_damaged_images_are_errors(damage):
    with pytest.raises((OSError, ValueError)):
        decode(damage(encoded(COLOURS)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_B18_a_decompression_bomb_is_refused_at_once(kind):
    data = bytearray(encoded(COLOURS, kind))
    if kind == "PNG":
        import zlib

        data[16:24] = (30000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = (30000).to_bytes(2, "big") * 2
    start = time.time()
    with pytest.raises(ValueError, match="pixels"):
        decode(bytes(data))
    assert time.time() - start < 1
