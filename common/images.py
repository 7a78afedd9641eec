"""Bytes to pixels: decoding, resizing, cropping of uint8 tensors (3, H, W), RGB, in channels-last memory as the JPEG
decoder leaves it: torch's antialiased resize, within 50 dB of PIL's, is several times faster on it than on planes. EXIF
orientation is not applied (the papers' numbers were measured without it); of animations the first frame counts."""

import contextlib
import functools
import importlib
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, to_pil_image

to_pil, from_pil = to_pil_image, pil_to_tensor  # uint8 (3, H, W) -> PIL RGB image, and back
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of its pixels in 0..1, RGB
PIXELS: dict[str, tuple] = {}  # what this process' network takes instead of those, see use_pixels


def pixels_of(content: dict) -> dict[str, tuple]:
    """The mean and deviation that a checkpoint of ours was trained with, where they are not ImageNet's."""
    held = content.get("data") if "method" in content else None
    return {k: tuple(held[k]) for k in IMAGENET if isinstance(held, dict) and k in held}


def use_pixels(args, content: dict) -> None:
    """normalize() takes from now on --mean and --std; where they are not given, those of the checkpoint."""
    given = {k: tuple(v) for k, v in (("mean", args.mean), ("std", args.std)) if v}
    PIXELS.clear()
    PIXELS.update({k: v for k, v in (pixels_of(content) | given).items() if v != IMAGENET[k]})


def pixels_note() -> str:
    return "".join(f", {name} {value}" for name, value in PIXELS.items())


@functools.cache
def jpeg_decoder() -> functools.partial | None:
    """What makes RGB of whole JPEGs: torchcodec if it is there, else torchvision's deprecated decoder, as fast; None:
    Pillow, whose pixels are the same and take a quarter longer."""
    for name in ("torchcodec.decoders", "torchvision.io"):
        with contextlib.suppress(Exception):  # not there, not made for this torch, or a version without decoder
            module = importlib.import_module(name)
            return functools.partial(module.decode_jpeg, mode=module.ImageReadMode.RGB)


def decode(data: bytes) -> torch.Tensor:
    """Encoded image (any format Pillow reads) -> uint8 (3, H, W), RGB. OSError or ValueError, with a reason, for what
    is not a whole image of 8 bits per channel or 16-bit grey, or has more pixels than Pillow's limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF, unusual palettes: the pixels are what counts
        try:
            image = Image.open(io.BytesIO(data))  # reads the header alone
            # CMYK goes to Pillow, whose conversion to RGB is the reference; files cut short, for its message.
            whole = image.format in ("JPEG", "MPO") and data.rstrip(b"\0").endswith(b"\xff\xd9")
            if whole and image.mode in ("RGB", "L") and (decode_jpeg := jpeg_decoder()):
                exif = image.info.get("exif", b"")[:14]  # its head: torchcodec would apply the orientation
                with contextlib.suppress(RuntimeError):  # Pillow decides
                    return decode_jpeg(torch.frombuffer(data.replace(exif, bytes(len(exif))), dtype=torch.uint8))
            if image.mode.startswith("I;16"):  # convert("RGB") would clip 16-bit values to white, not scale them
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"image of mode {image.mode} (32 bits per channel): no defined conversion to 8 bits")
            return from_pil(image.convert("RGB"))
        except UnidentifiedImageError:  # its own words name an object in memory
            raise ValueError("not an image of a known format") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # a bomb, and whatever else a format's decoder raises on what is damaged
            raise ValueError(f"cannot read image: {type(error).__name__}: {error}") from None


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> the (3, H, W) view of the same memory."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size), bicubic with antialiasing (PIL's kernel)."""
    if image.shape[1:] == tuple(size):
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)[0]


def resize_to_cover(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Smallest resize that keeps the aspect ratio and covers `size`; for a square, torchvision's Resize(int)."""
    height, width = image.shape[1:]
    return resize(image, (max(size[0], int(size[1] * height / width)), max(size[1], int(size[0] * width / height))))


def eval_transform(image: torch.Tensor, size: tuple[int, int], crop_ratio: float) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size): resize to cover size / crop_ratio (truncated), then the central crop."""
    return center_crop(resize_to_cover(image, (int(size[0] / crop_ratio), int(size[1] / crop_ratio))), size)
