"""Images as tensors and back; which image files can be read, also those whose metadata is damaged."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asdm.errors import AsdmError, one_line

# What Pillow opens, and is no image, or only with another program's help (Ghostscript's, Windows').
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# What people call images, and Pillow reads not at all, or only newer versions or plugins of it.
_OF_IMAGES = (
    "ai arw avif bpg cdr cr2 cr3 djvu dng emf eps exr hdr heic heics heif heifs hif jls jp2 jxl jxr kra ktx ktx2 nef "
    "orf pef psb psd qoi raf raw rw2 srw svg svgz tif tiff wdp webp wmf xcf"
)
UNREAD_SUFFIXES = frozenset(f".{suffix}" for suffix in _OF_IMAGES.split())
_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def readable_formats() -> list[str]:
    """The formats that the installed Pillow, with its plugins, reads as images by itself."""
    Image.init()
    return [name for name in Image.OPEN if name not in _NO_IMAGES]


def readable_suffixes() -> frozenset[str]:
    """The endings of the names of such files, in lower case, each with its dot."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def open_pixels(file: Path | bytes) -> Image.Image:
    """The image in a file, or in a file's content: the first frame of several. Metadata that is damaged is left out.

    Raises:
        OSError: not an image that can be read; or what else Pillow's readers raise.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF; and of many pixels, of which twice as many are refused
            return Image.open(_stream(file), formats=readable_formats())
    except (Image.DecompressionBombError, FileNotFoundError):
        raise
    except Exception:
        content = _without_metadata(file)
        if content is None:
            raise
        return Image.open(io.BytesIO(content), formats=readable_formats())


def verify_pixels(file: Path | bytes) -> None:
    """Raise what Pillow raises for a file that is no image, as far as it tells without decoding the pixels."""
    try:
        with open_pixels(file) as image:
            image.verify()
    except (Image.DecompressionBombError, FileNotFoundError):
        raise
    except Exception:
        content = _without_metadata(file)
        if content is None:
            raise
        with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
            image.verify()


def image_fault(error: Exception, name: str = "") -> str:
    """Why an image cannot be used, from what Pillow raised and the file's name."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREAD_SUFFIXES - readable_suffixes():
        return f"this Pillow does not read {suffix}; convert it to PNG or JPEG"
    if isinstance(error, Image.UnidentifiedImageError):  # whose words name an object in memory
        return "not an image that Pillow knows"
    return one_line(error)


def _stream(file: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _without_metadata(file: Path | bytes) -> bytes | None:
    """The content of a PNG or WebP file with what makes its pixels alone; None of any other file."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content[:8] + b"".join(_png_chunks(content))
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        body = b"WEBP" + b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The chunks that PNG calls critical, and transparency; where the length of another is damaged, from the next of
    these on."""
    start, kept = 8, (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    while len(content) >= start + 12:
        (length,) = struct.unpack(">I", content[start : start + 4])
        chunk = content[start : start + 12 + length]
        if chunk[4:8] in kept:
            yield chunk
        elif chunk[-4:] != struct.pack(">I", zlib.crc32(chunk[4:-4])):
            found = [place for name in kept if (place := content.find(name, start + 8)) >= 0]
            if not found:
                return
            start = min(found) - 4
            continue
        start += len(chunk)


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    """The chunks up to EXIF and XMP, which come last, without the colour profile; the header says that they are not
    there."""
    start = 12
    while len(content) >= start + 8 and content[start : start + 4] not in (b"EXIF", b"XMP "):
        (length,) = struct.unpack("<I", content[start + 4 : start + 8])
        chunk = content[start : start + 8 + length + length % 2]
        start += len(chunk)
        if chunk[:4] == b"VP8X":
            yield chunk[:8] + bytes([chunk[8] & 0b00010010]) + chunk[9:]  # flags of transparency and animation
        elif chunk[:4] != b"ICCP":
            yield chunk


def load_images(paths: Sequence[Path], size: int) -> Tensor:
    """Images (count, 3, size, size) in [-1, 1], centre-cropped to a square and resized."""
    return torch.stack([to_tensor(open_pixels(path), size) for path in paths])


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """One image as (3, size, size) in [-1, 1], as `as_rgb` has it."""
    pixels = torch.from_numpy(np.array(cropped(as_rgb(image), size))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in 8 bits a channel, turned as its EXIF says, transparent parts on white.

    Raises:
        OSError: its pixels are floating-point numbers, of which nothing tells the range.
    """
    image = _upright(image)
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, where that can be read."""
    image.load()  # some formats have their metadata behind the pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is damaged in it
            turned = _TURNED.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of Pillow's reader of TIFF, many kinds
        return image
    return image if turned is None else image.transpose(turned)


def cropped(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, `size` pixels wide."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(count, 3, height, width) in [-1, 1] as PIL images."""
    as_bytes = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in as_bytes]


def open_image(path: Path) -> Image.Image:
    """A user's image file, as `as_rgb` has it.

    Raises:
        AsdmError: no such file, or not an image.
    """
    try:
        with open_pixels(path) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise AsdmError(f"{path}: no such image file") from None
    except Exception as error:  # PIL's readers raise many kinds
        raise AsdmError(f"{path}: not an image that can be read ({image_fault(error, path.name)})") from None
