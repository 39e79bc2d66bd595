"""What is generated, as one record: prompts, seeds, size, inputs, sampler and additions. Combinations without a meaning
are refused here, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from asdm import checks
from asdm.caching.schedule import CacheSchedule
from asdm.choices import IMAGE_STRENGTH
from asdm.diffusion.conditioning import LARGEST_IMAGE, PIPELINES_MULTIPLE
from asdm.diffusion.generation import require_image, require_seeds, require_strength
from asdm.generation.controlnet import require_controlnet_folder
from asdm.generation.lora import LoraFile
from asdm.generation.schedulers import require_scheduler
from asdm.images import as_mask, in_rgb
from asdm.records import Record

MOST_IMAGES = 100_000


def _text(value: str) -> str:
    checks.text("", value)
    return value


Text = Annotated[str, AfterValidator(_text)]
InRGB = Annotated[Image.Image, AfterValidator(in_rgb)]
Mask = Annotated[Image.Image, AfterValidator(as_mask)]
Seed = Annotated[int, Field(ge=0, le=checks.LARGEST_SEED)]


class GenerationRequest(Record):
    """What is generated.

    Each prompt gets `num_images` images. The k-th image of the n-th prompt has the noise of
    `seed + n * num_images + k`. With `seeds`, each prompt gets one image for each of them. Images are oriented by their
    EXIF, and held in RGB.

    Raises:
        AsdmError: a field is out of range, a file of a LoRA or a folder of a ControlNet is not usable, or fields
            contradict each other.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    prompts: list[Text] = Field(min_length=1, description="one image or more for each")
    negative: Text = Field("", description="what guidance leads away from, for all prompts")
    num_images: int = Field(1, ge=1, le=MOST_IMAGES, description="of each prompt")
    seed: Seed = Field(0, description="of the first image")
    seeds: list[Seed] | None = Field(None, min_length=1, description="of each prompt's images, instead of `seed`")
    width: int | None = Field(None, description="pixels, a multiple of 8, with `height`; the pipeline's own by default")
    height: int | None = Field(None, description="pixels, a multiple of 8, with `width`; the pipeline's own by default")
    image: InRGB | None = Field(None, description="to start from; it is cropped to the size")
    mask: Mask | None = Field(None, description="of the size of `image`, white where it is replaced")
    strength: float | None = Field(
        None, gt=0, le=1, description=f"how far the result may go from `image`; {IMAGE_STRENGTH:g} by default"
    )
    steps: int | None = Field(None, ge=1, le=10_000, description="of sampling; as for `generate` by default")
    guidance_scale: float | None = Field(None, ge=0, description="as for `generate` by default")
    cfg_cutoff: float = Field(1.0, gt=0, le=1, description="fraction of the steps that are guided")
    scheduler: str | None = Field(None, description="a short name or a class of diffusers; the pipeline's by default")
    loras: list[LoraFile] = Field([], description="files that are added to the weights")
    controlnet: Path | None = Field(None, description="folder or Hub id of a ControlNet")
    control_image: InRGB | None = Field(None, description="what the ControlNet reads; resized to the size")
    control_scale: float | None = Field(None, ge=0, le=10, description="of the ControlNet's residuals; 1 by default")
    clip_skip: int | None = Field(None, ge=1, le=100, description="last layers of the CLIP text encoder to leave out")
    weighted: bool = Field(False, description="read weights in the prompts' parentheses")
    cache_speedup: float | None = Field(None, gt=1, description="of the denoiser, by feature caching")
    cache_schedule: Path | None = Field(None, description="file of a schedule of feature caching")

    @model_validator(mode="after")
    def _makes_sense(self) -> GenerationRequest:
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                checks.multiple_of(PIPELINES_MULTIPLE, LARGEST_IMAGE)(name, getattr(self, name))
        self._require_together()
        if self.image is not None:
            require_image(self.image, self.mask)
            if self.steps is not None:
                require_strength(self.image_strength, self.steps)
        if self.scheduler is not None:
            require_scheduler(self.scheduler)
        if self.controlnet is not None:
            require_controlnet_folder(self.controlnet)
        if self.cache_schedule is not None:
            CacheSchedule.load(self.cache_schedule)
        return self

    def _require_together(self) -> None:
        """Refuse fields that have no effect without another, or against it."""
        needs: list[tuple[str, str]] = [
            ("mask", "image"),
            ("strength", "image"),
            ("control_image", "controlnet"),
            ("control_scale", "controlnet"),
            ("controlnet", "control_image"),
        ]
        for name, other in needs:
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"{self._said(name)}: has no effect without {other}; give both, or neither")
        if (self.width is None) != (self.height is None):
            name, other = ("width", "height") if self.height is None else ("height", "width")
            raise ValueError(f"{self._said(name)}: give {other} too")
        if self.seeds is not None and (self.seed or self.num_images > 1):
            name = "seed" if self.seed else "num_images"
            raise ValueError(f"{self._said(name)}: seeds={self.seeds} says it already; leave one of them out")
        if self.cache_speedup is not None and self.cache_schedule is not None:
            raise ValueError(f"{self._said('cache_speedup')}: a schedule is given too; leave one of them out")
        if self.seeds is None:
            require_seeds(self.seed, self.total)
        if self.total > MOST_IMAGES:
            raise ValueError(f"{self.total} images in all: at most {MOST_IMAGES}; give fewer prompts or seeds")
        is_unguided = self.guidance_scale is not None and self.guidance_scale <= 1
        if is_unguided and (self.negative or self.cfg_cutoff != 1):
            name = "negative" if self.negative else "cfg_cutoff"
            raise ValueError(
                f"{self._said(name)}: has no effect at guidance_scale={self.guidance_scale:g}, which is no guidance; "
                "raise it above 1"
            )

    def _said(self, name: str) -> str:
        value = getattr(self, name)
        shown = f"({value.width}x{value.height} pixels)" if isinstance(value, Image.Image) else f"={value}"
        return f"{name}{shown}"

    @property
    def image_strength(self) -> float:
        """How far a result may go from `image`."""
        return IMAGE_STRENGTH if self.strength is None else self.strength

    @property
    def total(self) -> int:
        """The number of images."""
        return len(self.prompts) * (self.num_images if self.seeds is None else len(self.seeds))

    def items(self) -> list[tuple[str, int]]:
        """Return the prompt and the seed of each image, in order."""
        if self.seeds is not None:
            return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        first = [self.seed + index * self.num_images for index in range(len(self.prompts))]
        return [
            (prompt, start + k)
            for prompt, start in zip(self.prompts, first, strict=True)
            for k in range(self.num_images)
        ]

    def changed(self, **fields: Any) -> GenerationRequest:
        """Return a request with other values in some fields."""
        return GenerationRequest(**{name: getattr(self, name) for name in type(self).model_fields} | fields)
