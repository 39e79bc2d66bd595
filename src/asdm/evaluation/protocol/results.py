"""The results of a protocol, as a record that is saved as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from asdm.evaluation.protocol.metrics import JUDGE
from asdm.files import write_text
from asdm.old_names import OLD_JUDGED_FIELDS, OLD_JUDGED_NETWORKS, renamed
from asdm.records import Record, read_record


class ProtocolMetrics(Record):
    """The metrics of one model's images, and how they were sampled. A metric that was not requested is None."""

    name: str
    images: int
    side: int = Field(description="of the sampled images in pixels")
    steps: int
    guidance_scale: float
    scheduler: str
    fid: float | None = None
    frechet_distance: float | None = Field(None, description="of the judge's features; of Inception's it is the FID")
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    clip_score: float | None = Field(None, description="mean cosine of an image and its prompt, not times 100")
    kid: float | None = None
    kid_deviation: float | None = None
    cmmd: float | None = None
    fd_dinov2: float | None = None
    lpips: float | None = Field(None, description="mean distance to the first model's image of the same seed")
    ssim: float | None = Field(None, description="mean likeness to the first model's image of the same seed")
    pickscore: float | None = None
    hpsv2: float | None = None
    teacher_distance: float | None = Field(
        None, description="1 - cosine of the features of FID or FD to the first model's image of the same seed"
    )
    wins: dict[str, float] = Field(
        {}, description="by score: the part of the prompts at which it beats the first model, ties counted half"
    )


class ProtocolResults(Record):
    """All that was measured by a protocol, and what must be said beside the numbers."""

    protocol: str
    title: str
    date: str
    machine: str
    dtype: str
    seed: int
    prompts: int = Field(description="how many")
    stored_side: int = Field(description="of the compared images in pixels")
    real_images: int | None = Field(description="that the images are compared with; None if no metric needs them")
    networks: dict[str, str] = Field(description="by metric: what extracts its features")
    notes: list[str] = Field(description="where this run differs from the published protocol")
    rows: list[ProtocolMetrics] = Field(description="one for each pipeline, the teacher first")

    @model_validator(mode="before")
    @classmethod
    def _fid_is_of_inception(cls, content: Any) -> Any:
        """Earlier files call the Fréchet distance of the judge's features FID, too."""
        if not isinstance(content, dict):
            return content
        networks, rows = content.get("networks"), content.get("rows")
        if isinstance(networks, dict) and isinstance(rows, list) and networks.get("FID") == JUDGE:
            rows = [renamed(row, OLD_JUDGED_FIELDS) if isinstance(row, dict) else row for row in rows]
            content = {**content, "networks": renamed(networks, OLD_JUDGED_NETWORKS), "rows": rows}
        return content

    def save(self, path: str | Path) -> None:
        """Write the results as JSON."""
        write_text(Path(path), json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ProtocolResults:
        """Read the results.

        Raises:
            AsdmError: no such file, or not results of a protocol.
        """
        return read_record(cls, path, "a protocol's results", "`asdm evaluate --protocol` writes them")
