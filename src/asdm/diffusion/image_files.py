"""Images from prompts as files: saved as they are finished, under names made from their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import generate
from asdm.errors import AsdmError
from asdm.images import cropped, open_image, to_images

IMAGES_PER_SAVE = 8  # an interrupted run loses fewer than this
LONGEST_NAME = 60  # characters of the prompt


@dataclass(frozen=True)
class Inputs:
    """The image to start from and the mask of what is replaced in it; None where there is none."""

    image: Image.Image | None = None
    mask: Image.Image | None = None

    def cropped(self, side: int) -> Inputs:
        """Both as squares of `side` pixels."""
        return Inputs(*(None if each is None else cropped(each, side) for each in (self.image, self.mask)))


def open_inputs(image: Path | None, mask: Path | None) -> Inputs:
    """Read the files of an image and its mask.

    Raises:
        AsdmError: a file cannot be read, or the mask is not of the image's size.
    """
    start = None if image is None else open_image(image)
    hole = None if mask is None else open_image(mask).convert("L")
    if start is not None and hole is not None and start.size != hole.size:
        raise AsdmError(f"{mask}: {hole.size} pixels; it must be of the size of {image}, {start.size}")
    return Inputs(start, hole)


def generate_files(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    *,
    inputs: Inputs | None = None,
    size: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Generate an image for each prompt and save it in `folder` as PNG; existing files stay.

    Args:
        inputs: for image-to-image and inpainting; they are cropped to squares.
        size: side of the images in pixels; by default the pipeline's own.
        settings: further arguments of `generate`.
        progress: called with the images done and in all.

    Returns:
        The files, in the order of the prompts.
    """
    start = (inputs or Inputs()).cropped(image_size(pipeline) if size is None else size)
    paths: list[Path] = []
    for first in range(0, len(prompts), IMAGES_PER_SAVE):
        some = prompts[first : first + IMAGES_PER_SAVE]

        def advanced(done: int, _total: int, first: int = first) -> None:
            if progress is not None:
                progress(first + done, len(prompts))

        pixels = generate(
            pipeline,
            some,
            seed=seed + first,
            image=start.image,
            mask=start.mask,
            size=size if start.image is None else None,
            progress=advanced,
            **settings,
        )
        folder.mkdir(parents=True, exist_ok=True)
        for prompt, image in zip(some, to_images(pixels), strict=True):
            paths.append(_free_path(folder, prompt))
            image.save(paths[-1])
    return paths


def _free_path(folder: Path, prompt: str) -> Path:
    """Return a file name from the prompt that is not taken yet."""
    stem = "".join(c if c.isalnum() else "_" for c in prompt)[:LONGEST_NAME].strip("_") or "image"
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path
