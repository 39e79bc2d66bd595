"""What the tab Compare does: one prompt drawn by two models, and the files of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm.app.files import new_folder
from asdm.app.settings import Limits
from asdm.app.work import CancelledError, Ticket
from asdm.errors import AsdmError
from asdm.generation.comparison import Comparison, compare_images
from asdm.generation.files import stem_of
from asdm.generation.generate import GenerationProgress, sides_of, steps_of
from asdm.generation.image import save_png
from asdm.generation.lora import LoraFile
from asdm.generation.request import GenerationRequest
from asdm.generation.sheets import SMALLEST_TILE, difference_map
from asdm.images import open_image

Progress = Callable[[float, str], Any]  # called with the finished part, and a line
FIELDS = (
    "prompt", "negative", "seed", "steps", "guidance_scale", "scheduler", "width", "height", "cache_speedup", "image",
    "strength", "lora",
)  # fmt: skip
OWN_SCHEDULER = "the model's own"
LONGEST_PROMPT = 2000  # characters
HISTORY = 24  # comparisons of a session
FIRST_AND_SECOND = ("first model", "second model")


@dataclass(frozen=True)
class SavedComparison:
    """A comparison's files, with what the page shows of it."""

    teacher: Path
    student: Path
    difference: Path
    both: Path
    prompt: str
    seed: int
    names: tuple[str, str]  # what the page calls the two models
    seconds: tuple[float, float]
    mean_difference: float

    @property
    def caption(self) -> str:
        """The prompt and the times, for the history."""
        first, second = self.seconds
        return f"{self.prompt} (seed {self.seed}): {first:.2f} s, {second:.2f} s"

    @property
    def summary(self) -> str:
        """The times, the speed-up and the difference, as Markdown without what a user wrote."""
        first, second = self.seconds
        return (
            f"| | {self.names[0]} | {self.names[1]} |\n|---|---|---|\n| seconds | {first:.2f} | {second:.2f} |\n"
            f"| times faster | 1 | {first / second:.2f} |\n\n"
            f"Mean difference {self.mean_difference:.1f} of 255. Each image was timed once; `asdm evaluate` measures "
            "with intervals."
        )


def request_of(fields: Mapping[str, Any], limits: Limits) -> GenerationRequest:
    """Return the request of the page's fields. Empty ones, and numbers of 0 but for the seed, are the model's usual.

    Args:
        fields: of `FIELDS`, as in `GenerationRequest`, but for `prompt`, one text, `image`, a file's path, and `lora`,
            a LoRA's path with `:SCALE` behind it where that is not 1.

    Raises:
        AsdmError: a field is out of range, or exceeds a limit.
    """
    given = {name: value for name, value in fields.items() if value not in (None, "") and (value or name == "seed")}
    for name in ("prompt", "negative"):
        if len(given.get(name, "")) > LONGEST_PROMPT:
            raise AsdmError(f"{name}: {len(given[name])} characters; write at most {LONGEST_PROMPT}")
    prompt = str(given.pop("prompt", "")).strip()
    if not prompt:
        raise AsdmError("prompt: is empty; write what the image shows")
    for name in ("seed", "steps", "width", "height"):
        if name in given:
            given[name] = _whole(name, given[name])
    if given.get("scheduler") == OWN_SCHEDULER:
        del given["scheduler"]
    if "image" in given:
        given["image"] = open_image(Path(given["image"]))
    else:
        given.pop("strength", None)
    if "lora" in given:
        given["loras"] = [LoraFile.parse(str(given.pop("lora")).strip())]
    request = GenerationRequest(prompts=[prompt], **given)
    limits.require(request)
    return request


def _whole(name: str, value: Any) -> int:
    """Return a widget's number as a whole one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
        raise AsdmError(f"{name}={value}: must be a whole number")
    return int(value)


def require_within(
    limits: Limits, request: GenerationRequest, first: DiffusionPipeline, second: DiffusionPipeline
) -> None:
    """Check a request's values and, where it leaves them open, the two models' usual ones.

    Raises:
        AsdmError: a size or steps exceed a limit.
    """
    width, height = sides_of(second, request)
    for pipeline in (first, second):
        limits.require(request.changed(width=width, height=height, steps=steps_of(pipeline, request)))


def draw_comparison(
    first: DiffusionPipeline,
    second: DiffusionPipeline,
    request: GenerationRequest,
    limits: Limits,
    ticket: Ticket,
    progress: Progress,
    names: tuple[str, str] = FIRST_AND_SECOND,
) -> Comparison:
    """Draw the request's image by both models from the same noise.

    Args:
        names: what the page calls the two models.

    Raises:
        AsdmError: a model does not take what the request has, or its usual size or steps exceed a limit.
        CancelledError: the ticket was cancelled.
    """
    require_within(limits, request, first, second)

    def after_step(now: GenerationProgress) -> None:
        done, total = now.image_steps
        name = names[0] if now.images * 2 < now.total_images else names[1]
        progress(done / total, f"{name}, step {now.step} of {now.total_steps}")

    drawn = list(compare_images(second, first, request, progress=after_step, cancelled=ticket.is_cancelled))
    if not drawn:
        raise CancelledError
    return drawn[0]


def save_comparison(comparison: Comparison, folder: Path, names: tuple[str, str] = FIRST_AND_SECOND) -> SavedComparison:
    """Write a comparison's images, with metadata, and the map of their difference into a new folder inside `folder`."""
    place = new_folder(folder)
    stem = stem_of(comparison.student.prompt)
    difference, mean = difference_map(comparison.teacher.image, comparison.student.image)
    enlarged = max(1, -(-SMALLEST_TILE // max(difference.size)))
    difference = difference.resize((difference.width * enlarged, difference.height * enlarged), resample=0)
    return SavedComparison(
        teacher=comparison.teacher.save(place / f"{stem}_first.png"),
        student=comparison.student.save(place / f"{stem}_second.png"),
        difference=save_png(difference, place / f"{stem}_difference.png"),
        both=save_png(comparison.picture(), place / f"{stem}_comparison.png"),
        prompt=comparison.student.prompt,
        seed=comparison.student.seed,
        names=names,
        seconds=(comparison.teacher.seconds, comparison.student.seconds),
        mean_difference=mean,
    )


def with_newest(history: tuple[SavedComparison, ...], newest: SavedComparison) -> tuple[SavedComparison, ...]:
    """Return a session's history, the newest comparison first, without those beyond `HISTORY`."""
    return (newest, *history)[:HISTORY]
