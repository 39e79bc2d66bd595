"""Images as tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asdm.errors import AsdmError


def load_images(paths: Sequence[Path], size: int) -> Tensor:
    """Images (count, 3, size, size) in [-1, 1], centre-cropped to a square and resized."""
    return torch.stack([to_tensor(Image.open(path), size) for path in paths])


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """One image as (3, size, size) in [-1, 1], as `as_rgb` has it."""
    pixels = torch.from_numpy(np.array(cropped(as_rgb(image), size))).permute(2, 0, 1)
    return pixels.float() / 127.5 - 1


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in 8 bits a channel, turned as its EXIF says, transparent parts on white.

    Raises:
        OSError: its pixels are floating-point numbers, of which nothing tells the range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


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
        with Image.open(path) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise AsdmError(f"{path}: no such image file") from None
    except Exception as error:  # PIL's readers raise many kinds
        raise AsdmError(f"{path}: not an image that can be read ({error})") from None
