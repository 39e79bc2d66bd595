"""Images as tensors and back. Image files are read even where their metadata is damaged."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asdm.errors import AsdmError, one_line

R = TypeVar("R")

# Formats that Pillow opens and that are no images, or need another program (Ghostscript, Windows).
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Formats of images that Pillow does not read, or only newer versions or plugins of it.
_OF_IMAGES = (
    "ai arw avif bpg cdr cr2 cr3 djvu dng emf eps exr hdr heic heics heif heifs hif jls jp2 jxl jxr kra ktx ktx2 nef "
    "orf pef psb psd qoi raf raw rw2 srw svg svgz tif tiff wdp webp wmf xcf"
)
UNREAD_SUFFIXES = frozenset(f".{suffix}" for suffix in _OF_IMAGES.split())
MOST_PIXELS = 2**26  # that an image may have, 8192x8192; a JPEG of more is decoded at half its size
_MOST_BYTES = 2**28  # of a file whose metadata is damaged
_ROWS = 256  # of an image that are converted at a time
_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def readable_formats() -> list[str]:
    """Return the formats of images that the installed Pillow reads, with its plugins."""
    Image.init()
    return [name for name in Image.OPEN if name not in _NO_IMAGES]


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of such files, in lower case, with the dot."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def open_pixels(file: Path | bytes) -> Image.Image:
    """Open the image in a file, or in a file's content; of several frames the first. Damaged metadata is left out.

    Raises:
        OSError: the file is no image, or cannot be read. Pillow's readers raise other kinds too.
        DecompressionBombError: it has more than `MOST_PIXELS`.
    """
    return _read(file, lambda image: image)


def _is_file(path: Path) -> bool:
    """Return whether a path is a file; reading a device may never end, and opening a pipe may never begin.

    Raises:
        FileNotFoundError: there is nothing.
    """
    return stat.S_ISREG(path.stat().st_mode)


def _bounded(image: Image.Image) -> Image.Image:
    """Return the image; of a JPEG with more than `MOST_PIXELS` one that is decoded at half its size.

    Raises:
        DecompressionBombError: it has more.
    """
    sides = image.size
    if sides[0] * sides[1] > MOST_PIXELS:
        image.draft(None, (sides[0] // 2, sides[1] // 2))
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise Image.DecompressionBombError(
            f"{sides[0]}x{sides[1]} pixels, more than {MOST_PIXELS:,}; make the image smaller"
        )
    return image


def verify_pixels(file: Path | bytes) -> None:
    """Raise what Pillow raises for a file that is no image, as far as it can tell without decoding the pixels."""

    def verify(image: Image.Image) -> None:
        with image:
            image.verify()

    _read(file, verify)


def _read(file: Path | bytes, read: Callable[[Image.Image], R]) -> R:
    """Return what `read` makes of an image: at a second attempt of its pixels alone, where its metadata is damaged."""
    if isinstance(file, Path) and not _is_file(file):
        raise OSError("not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF, and about large images
            image = _bounded(Image.open(_stream(file), formats=readable_formats()))
        return read(image)
    except (Image.DecompressionBombError, FileNotFoundError):
        raise
    except Exception:
        content = _without_metadata(file)
        if content is None:
            raise
        return read(_bounded(Image.open(io.BytesIO(content), formats=readable_formats())))


def image_fault(error: Exception, name: str = "") -> str:
    """Say why an image cannot be used, from what Pillow raised and the file's name."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in UNREAD_SUFFIXES - readable_suffixes():
        return f"this Pillow does not read {suffix}; convert it to PNG or JPEG"
    if isinstance(error, Image.UnidentifiedImageError):  # its message names an object in memory
        return "not an image that Pillow knows"
    return one_line(error)


def _stream(file: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _without_metadata(file: Path | bytes) -> bytes | None:
    """Return the content of a PNG or WebP file reduced to its pixels; None for any other format."""
    content = file if isinstance(file, bytes) else _content_of(file)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content[:8] + b"".join(_png_chunks(content))
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        body = b"WEBP" + b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", len(body)) + body
    return None


def _content_of(path: Path) -> bytes:
    """Return the content of a file that may be an image; nothing of what is too large to be one, or no file."""
    if not _is_file(path):
        return b""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES)
        return b"" if file.read(1) else content


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """Yield the critical chunks of a PNG file, and transparency. A chunk whose length is damaged is skipped up to
    the next of these."""
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
    """Yield the chunks of a WebP file before EXIF and XMP, which come last, without the colour profile. The flags in
    the header are cleared."""
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
    """Load images (count, 3, size, size) in [-1, 1], centre-cropped to a square and resized."""
    return torch.stack([to_tensor(open_pixels(path), size) for path in paths])


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Convert one image to (3, size, size) in [-1, 1], after `as_rgb`."""
    pixels = torch.from_numpy(np.array(cropped(as_rgb(image), size))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def as_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert an image to RGB with 8 bits a channel, oriented by its EXIF, with transparent parts on `background`.

    Raises:
        AsdmError: its pixels are floating-point numbers, whose range is not known.
    """
    image = _upright(image)
    if image.mode == "F":
        raise AsdmError("its pixels are floating-point numbers; convert it to 8 bits")
    page = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):  # whole copies of a large image would take gigabytes
        rows = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        page.paste(_opaque(rows, background), (0, top))
    return page


def in_rgb(image: Image.Image) -> Image.Image:
    """Return an image as `as_rgb` converts it, without a copy where nothing changes."""
    is_so = image.mode == "RGB" and not image.has_transparency_data and _upright(image) is image
    return image if is_so else as_rgb(image)


def as_mask(image: Image.Image) -> Image.Image:
    """Convert a mask to one channel of 8 bits as `as_rgb` does, with transparent parts on black: white is replaced."""
    return as_rgb(image, "black").convert("L")


def _opaque(image: Image.Image, background: str) -> Image.Image:
    """Convert an image to RGB, with transparent parts on `background`."""
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, background)
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return the image oriented by its EXIF, where that can be read."""
    image.load()  # some formats store their metadata behind the pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF
            transposition = _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of Pillow's reader of TIFF, many kinds
        return image
    return image if transposition is None else image.transpose(transposition)


def cropped(image: Image.Image, size: int) -> Image.Image:
    """Crop the middle square of an image and resize it to `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def fitted(image: Image.Image, sides: tuple[int, int]) -> Image.Image:
    """Crop the middle of an image to the aspect ratio of `sides` (width, height) and resize it to them."""
    return image if image.size == sides else ImageOps.fit(image, sides, Image.Resampling.LANCZOS)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert (count, 3, height, width) in [-1, 1] to PIL images."""
    as_bytes = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in as_bytes]


def open_image(path: Path) -> Image.Image:
    """Open a user's image file as `as_rgb` converts it.

    Raises:
        AsdmError: no such file, or not an image.
    """
    return _opened(path, as_rgb)


def open_mask(path: Path) -> Image.Image:
    """Open the file of a user's mask as `as_mask` converts it.

    Raises:
        AsdmError: as `open_image`.
    """
    return _opened(path, as_mask)


def _opened(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with open_pixels(path) as image:
            return convert(image)
    except FileNotFoundError:
        raise AsdmError(f"{path}: no such image file") from None
    except Exception as error:  # PIL's readers raise many kinds
        raise AsdmError(f"{path}: not an image that can be read ({image_fault(error, path.name)})") from None
