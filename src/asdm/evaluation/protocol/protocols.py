"""The published protocols: in how many steps, at which guidance and size, how images are stored, and what is measured.

A protocol is data. `PROTOCOLS` has them by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image
from pydantic import Field

from asdm.choices import ProtocolName
from asdm.evaluation.protocol.metrics import Role
from asdm.evaluation.protocol.weights import DEMO_SOURCES, SOURCES, Source
from asdm.images import as_rgb, cropped
from asdm.records import Record


class Protocol(Record):
    """How images are generated, stored and compared with real ones."""

    name: ProtocolName
    title: str = Field(description="what reports call it, with its source")
    steps: int = Field(description="of sampling, except of few-step models")
    guidance_scale: float | None = Field(description="None for the first model's usual one")
    prompts: int = Field(description="of the whole protocol")
    side: int | None = Field(description="of the published figures' images in pixels; models sample at their own size")
    stored_side: int = Field(description="in pixels; larger images are shrunk to it")
    jpeg: int | None = Field(description="quality of JPEG files; None for PNG")
    squash: bool = Field(description="real images lose their aspect ratio; otherwise their middle square is used")
    metrics: tuple[str, ...] = Field(description="by default")

    @property
    def sources(self) -> Mapping[Role, Source]:
        """The network for each role."""
        return DEMO_SOURCES if self.name == "demo" else SOURCES

    @property
    def suffix(self) -> str:
        """The suffix of image files."""
        return ".png" if self.jpeg is None else ".jpg"

    def stored(self, image: Image.Image, side: int) -> Image.Image:
        """Return a generated image as it is stored: shrunk to `side` pixels where it is larger.

        BK-SDM stores the large image as JPEG, shrinks the decoded file, and stores that as JPEG. PIL's filter is
        bicubic.
        """
        if image.width <= side:
            return image
        return self.decoded(image).resize((side, side), Image.Resampling.BICUBIC)

    def real(self, image: Image.Image, side: int) -> Image.Image:
        """Return a real image as it is compared: `side` pixels square."""
        if not self.squash:
            return cropped(as_rgb(image), side)
        return self.decoded(as_rgb(image).resize((side, side), Image.Resampling.BICUBIC))

    def decoded(self, image: Image.Image) -> Image.Image:
        """Return the image as it is after a JPEG file, where the protocol stores JPEG."""
        if self.jpeg is None:
            return image
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.jpeg)
        return Image.open(file).convert("RGB")


PROTOCOLS: dict[ProtocolName, Protocol] = {
    # BK-SDM (arXiv 2305.15798, section 4.1, and its repository's generate.py, get_stat_mscoco_val2014.py and misc.py).
    "coco30k": Protocol(
        name="coco30k",
        title="30K prompts of COCO 2014's validation set, as BK-SDM (arXiv 2305.15798)",
        steps=25,
        guidance_scale=7.5,
        prompts=30_000,
        side=512,
        stored_side=256,
        jpeg=75,  # PIL's default
        squash=True,
        metrics=("fid", "is", "clip", "kid", "ssim"),
    ),
    "demo": Protocol(
        name="demo",
        title="the embedded images; the judge in the place of Inception",
        steps=25,
        guidance_scale=None,
        prompts=256,
        side=None,
        stored_side=256,
        jpeg=None,
        squash=False,
        metrics=("fd", "is", "clip", "kid", "cmmd", "ssim"),
    ),
}
