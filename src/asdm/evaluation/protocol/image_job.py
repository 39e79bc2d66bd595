"""The job of generating many images: shared by the processes of a launch, and resumed where it was interrupted.

A file of an image is whole or absent, and a finished one is not generated again. All processes divide the batches that
have missing files. A killed process loses at most its batch. The folder's marker says with which settings its images
were generated, and other settings are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import Field

from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import generate, is_small
from asdm.digests import short_digest
from asdm.errors import AsdmError
from asdm.evaluation.protocol.pictures import Picture, Pictures
from asdm.families import denoiser_of, family_of
from asdm.files import MARKER, read_marker, replacing_file, require_ours, write_text
from asdm.images import to_images
from asdm.pipelines.derived import without_safety_checker
from asdm.records import Record
from asdm.tensor_files import weights_digest

KIND = "evaluation images"
SMALL_BATCH = 32  # of latents of up to 32x32
Progress = Callable[[int, int], None]


class ImageSettings(Record):
    """How all images of one model are generated and stored."""

    steps: int
    guidance_scale: float
    seed: int
    side: int = Field(description="of the sampled images in pixels")
    stored_side: int | None = Field(None, description="None to store them as they are")
    jpeg: int | None = Field(None, description="quality of JPEG files; None for PNG")


def identity_of(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Return what tells a pipeline's images from another's: all its weights, its denoiser's edits, its scheduler, its
    precision."""
    denoiser, scheduler = denoiser_of(pipeline), pipeline.scheduler
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    edits = json.dumps(denoiser.config.get("edits"), default=str, sort_keys=True)
    parts = (denoiser, *(getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")))
    weights = [weights_digest(part) for part in parts if part is not None]
    about = [image_size(pipeline), *weights, family_of(denoiser).fingerprint(denoiser), edits]
    return {
        "model": short_digest(json.dumps(about)),
        "scheduler": f"{type(scheduler).__name__} {_digest(config)}",
        "dtype": str(denoiser.dtype).removeprefix("torch."),
    }


def _digest(content: Any) -> str:
    return short_digest(json.dumps(content, default=str, sort_keys=True))


class ImageJob:
    """A folder of images of the same prompts by several models, each in a folder of its own.

    Args:
        folder: made if it does not exist.
        pictures: of the whole job; fewer can be generated.

    Raises:
        AsdmError: the folder is not this tool's.
    """

    def __init__(self, folder: Path, pictures: Pictures, state: PartialState):
        self.folder, self.pictures, self.state = folder, pictures, state
        if state.is_main_process:  # another process would see the marker half-written
            require_ours(folder, KIND)
        self._prompts = _digest([(each.file, each.prompt, each.images) for each in pictures.all])

    def claim(self, models: Mapping[str, tuple[DiffusionPipeline, ImageSettings]]) -> None:
        """Write down with which settings each model's images are generated, by the name of its folder.

        Raises:
            AsdmError: the folder holds images of other prompts, or a model's images of other settings.
        """
        marker = read_marker(self.folder)
        if marker.get("prompts", self._prompts) != self._prompts:
            raise AsdmError(f"{self.folder}: holds images of other prompts; name another folder")
        found = marker.get("models")
        known = dict(found) if isinstance(found, dict) else {}
        for name, (pipeline, settings) in models.items():
            wanted = {**settings.model_dump(), **identity_of(pipeline)}
            if (self.folder / name).exists():  # otherwise its images were removed
                self._require_same(name, known.get(name), wanted)
            known[name] = wanted
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"kind": KIND, "prompts": self._prompts, "models": known}
            write_text(self.folder / MARKER, json.dumps(about, indent=1) + "\n")
        self.state.wait_for_everyone()

    def _require_same(self, name: str, found: Any, wanted: Mapping[str, Any]) -> None:
        known = found if isinstance(found, dict) else {}
        for key, value in wanted.items():
            if known.get(key) != value:
                told = f"{key}={known.get(key)}, not {value}"
                told = "another model's weights" if key == "model" else told
                raise AsdmError(
                    f"{self.folder / name}: holds images of {told}; name another folder, or remove this one"
                )

    def generate(
        self,
        name: str,
        pipeline: DiffusionPipeline,
        settings: ImageSettings,
        *,
        limit: int | None = None,
        batch_size: int | None = None,
        store: Callable[[Image.Image], Image.Image] = lambda image: image,
        progress: Progress | None = None,
    ) -> list[Path]:
        """Generate the images of one model that are missing; return the files of all.

        Args:
            limit: the first prompts alone.
            batch_size: images at a time; by default 32 for latents of up to 32x32, else 1.
            store: what is written of a generated image.
            progress: called with finished files of all processes (counted from this one's share) and in all.
        """
        pictures = self.pictures.first(limit)
        folder, batch_size = self.folder / name, batch_size or (SMALL_BATCH if is_small(pipeline) else 1)
        self._write_texts(folder, pictures)
        batches = self._missing(folder, pictures.all, batch_size)
        done = len(pictures.all) - sum(len(batch) for batch in batches)
        for batch in batches[self.state.process_index :: self.state.num_processes]:
            if progress is not None:
                progress(min(done, len(pictures.all)), len(pictures.all))
            self._generate_batch(folder, pipeline, settings, batch, batch_size, store)
            done += len(batch) * self.state.num_processes
        self.state.wait_for_everyone()
        if progress is not None:
            progress(len(pictures.all), len(pictures.all))
        return [folder / each.file for each in pictures.all]

    def _write_texts(self, folder: Path, pictures: Pictures) -> None:
        if self.state.is_main_process:
            for path, text in pictures.texts.items():
                write_text(folder / path, text)

    def _missing(self, folder: Path, pictures: Sequence[Picture], batch_size: int) -> list[range]:
        """Return the batches, as places in the job's pictures, of which files are missing; for all processes as rank 0
        finds them, as files appear while others look.

        The batches are fixed, so that a resumed job gets the same batches, whatever is missing.
        """
        found: list[list[range]] = [[]]
        if self.state.is_main_process:
            each = max(1, batch_size // pictures[0].images)
            batches = [range(start, min(start + each, len(pictures))) for start in range(0, len(pictures), each)]
            found = [[batch for batch in batches if not all(_is_written(folder / pictures[at].file) for at in batch)]]
        return list(broadcast_object_list(found)[0])

    def _generate_batch(
        self,
        folder: Path,
        pipeline: DiffusionPipeline,
        settings: ImageSettings,
        batch: range,
        batch_size: int,
        store: Callable[[Image.Image], Image.Image],
    ) -> None:
        pictures = [self.pictures.all[at] for at in batch]
        per_picture = pictures[0].images
        images = to_images(
            generate(
                without_safety_checker(pipeline),
                [each.prompt for each in pictures for _ in range(per_picture)],
                seed=settings.seed + batch.start * per_picture,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                size=None if settings.side == image_size(pipeline) else settings.side,
                batch_size=batch_size,
            )
        )
        for number, picture in enumerate(pictures):
            path = folder / picture.file
            if not _is_written(path):  # a file of a batch that was interrupted stays as it is
                own = images[number * per_picture : (number + 1) * per_picture]
                _save(store(own[0] if per_picture == 1 else grid(own)), path, settings.jpeg)


def grid(images: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Return images of one size beside each other, row by row, without gaps."""
    width, height = images[0].size
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        page.paste(image, (index % columns * width, index // columns * height))
    return page


def _is_written(path: Path) -> bool:
    try:
        return os.stat(path).st_size > 0  # a machine that lost power may leave an empty file
    except OSError:
        return False


def _save(image: Image.Image, path: Path, jpeg: int | None) -> None:
    with replacing_file(path) as partial:
        if jpeg is None:
            image.save(partial, "PNG")
        else:
            image.save(partial, "JPEG", quality=jpeg)
