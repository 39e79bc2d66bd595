"""The HTML report: one file that needs no network, with the headline, the edits, speed, quality and images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from asdm.compensation.fitting import CompensationReport
from asdm.data.examples import Example
from asdm.evaluation.image_folders import IMAGE_TO_IMAGE, folder_name, image_name
from asdm.evaluation.metrics import JUDGE_NAME
from asdm.evaluation.plots import loss_plot, redundancy_plot
from asdm.evaluation.results import Evaluation, ImageToImageMetrics, QualityMetrics, SpeedMetrics
from asdm.evaluation.sampling import EvaluationSet
from asdm.evaluation.starting_images import ImageToImageSet
from asdm.files import replacing_file, write_text
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan
from asdm.version import __version__

Column = tuple[str, str, str, str]
# Field of QualityMetrics, title in the report, title in a terminal, format.
QUALITY_COLUMNS = (
    ("exact_pair", "exact pair", "exact", "percent"),
    ("concept_top1", "concept, top-1", "top-1", "percent"),
    ("concept_top5", "concept, top-5", "top-5", "percent"),
    ("style", "style", "style", "percent"),
    ("kid", f"KID ({JUDGE_NAME})", "KID", "number"),
    ("retrieval_at_1", "R@1 (own CLIP)", "R@1", "percent"),
    ("teacher_distance", "distance to teacher's images", "dist.", "number"),
)
# The same for fields of ImageToImageMetrics.
IMAGE_TO_IMAGE_COLUMNS = (
    ("exact_pair", "exact pair", "exact", "percent"),
    ("style", "style", "style", "percent"),
    ("target_distance", "distance to target", "to target", "number"),
    ("teacher_distance", "distance to teacher's images", "to teacher", "number"),
    ("seed_part", "of the distance between seeds", "of seeds'", "percent"),
)


@dataclass(frozen=True)
class ImageRow:
    """A prompt and each model's image of it, as data URIs; the real images first where there are some."""

    caption: str
    images: list[str]


def write_report(
    path: Path,
    *,
    evaluation: Evaluation,
    redundancy: RedundancyMap,
    plan: PruningPlan,
    compensation: CompensationReport | None = None,
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    sets: Sequence[EvaluationSet],
    starts: Sequence[ImageToImageSet] = (),
    images_folder: Path,
    target_speedup: float | None = None,
    result_row: int = -1,
    rows_per_split: int = 10,
    skipped: Mapping[str, str] | None = None,
) -> str:
    """Write the report; return its headline, which is about the model of `result_row`."""
    names = [row.name for row in evaluation.speed]
    headline = headline_of(evaluation, target_speedup, result_row)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        headline=headline,
        evaluation=evaluation,
        redundancy=redundancy,
        plan=plan,
        compensation=compensation,
        names=names,
        columns=known_columns(evaluation.quality),
        image_to_image_columns=image_to_image_columns(evaluation),
        written=_written,
        splits=[s.split for s in sets],
        image_rows={s.split: _image_rows(s, names, images_folder, rows_per_split) for s in sets},
        has_real={s.split: bool(s.examples) for s in sets},
        starts=starts,
        starting_rows={s.split: _starting_rows(s, names, images_folder, rows_per_split) for s in starts},
        u_plot=_figure_uri(redundancy_plot(redundancy, plan)),
        loss_plot=_figure_uri(loss_plot(logs)) if any(logs.values()) else None,
        skipped=skipped or {},
        version=__version__,
    )
    write_text(path, html)
    return headline


def metrics_section(evaluation: Evaluation) -> str:
    """Return the metrics as Markdown tables, for a model card."""
    environment = jinja2.Environment(loader=jinja2.FunctionLoader(_template), trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("metrics.md.j2").render(
        evaluation=evaluation,
        columns=known_columns(evaluation.quality),
        image_to_image_columns=image_to_image_columns(evaluation),
        written=_written,
    )


def known_columns(
    rows: Sequence[QualityMetrics] | Sequence[ImageToImageMetrics], columns: Sequence[Column] = QUALITY_COLUMNS
) -> list[Column]:
    """Return those of the columns that have values."""
    return [column for column in columns if any(getattr(row, column[0]) is not None for row in rows)]


def image_to_image_columns(evaluation: Evaluation) -> list[Column]:
    """Return those of `IMAGE_TO_IMAGE_COLUMNS` that have values; none where there are no results."""
    found = evaluation.image_to_image
    return [] if found is None else known_columns(found.rows, IMAGE_TO_IMAGE_COLUMNS)


def _written(value: float | None, form: str) -> str:
    """Return a value in a format of Python's, or as "percent" or "number" of a column; a dash where it is not known."""
    return "–" if value is None else format(value, {"percent": ".1%", "number": ".3f"}.get(form, form))


def headline_of(evaluation: Evaluation, target_speedup: float | None = None, result_row: int = -1) -> str:
    """Say in one sentence how much faster and smaller the model of that row is than the first, and what quality
    it keeps."""
    teacher, student = evaluation.speed[0], evaluation.speed[result_row]
    sentence = _faster(student, evaluation.denoiser)
    if student.unet_parameters is not None and teacher.unet_parameters is not None:
        size = student.unet_parameters / teacher.unet_parameters
        sentence += f", with {size:.0%} of the {evaluation.denoiser}'s parameters"
    unet_speedup = student.unet_ratio
    if target_speedup is not None and unet_speedup.high < target_speedup:
        sentence += f" (short of the {target_speedup:g}x requested)"
    for split, words in (
        ("held_out", "held-out prompts"),
        ("seen", "seen prompts"),
        ("prompts", "the prompts"),
    ):
        before, after = evaluation.quality_of(teacher.name, split), evaluation.quality_of(student.name, split)
        if before is None or after is None:
            continue
        if before.concept_top5 and after.concept_top5 is not None:
            kept = 100 * after.concept_top5 / before.concept_top5
            return (
                f"{sentence}; on {words} it keeps {kept:.0f}% of the original's concept accuracy "
                f"(top-5: {100 * after.concept_top5:.1f}% against {100 * before.concept_top5:.1f}%)."
            )
        return f"{sentence}; its images of {words} lie {after.teacher_distance:.3f} from the original's (1 - cosine)."
    return f"{sentence}."


def _faster(student: SpeedMetrics, denoiser: str) -> str:
    """Say how much faster the last model is, as far as it was measurable."""
    own, pipeline = student.unet_ratio, student.pipeline_ratio
    if own.is_measurable and pipeline.is_measurable:
        return f"The {denoiser} is {own} faster and the pipeline {pipeline}"
    if own.is_measurable:
        return f"The {denoiser} is {own} faster; the pipeline's speed-up is {pipeline}"
    gmacs = "" if student.gmacs is None else f"; the {denoiser} computes {student.gmacs:.3g} GMACs"
    return f"The {denoiser}'s speed-up is {own} and the pipeline's {pipeline}{gmacs}"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def _template(name: str) -> str:
    return resources.files("asdm.evaluation").joinpath(name).read_text("utf-8")


def _image_rows(evaluation_set: EvaluationSet, names: list[str], folder: Path, count: int) -> list[ImageRow]:
    real = [evaluation_set.examples] if evaluation_set.examples else []
    return _rows(evaluation_set.prompts, real, names, folder / evaluation_set.split, count)


def _starting_rows(of: ImageToImageSet, names: list[str], folder: Path, count: int) -> list[ImageRow]:
    real = [each for each in (of.sources, of.targets) if each]
    captions = of.prompts
    if of.targets:
        captions = [f"{prompt}, from {source.caption}" for prompt, source in zip(of.prompts, of.sources, strict=True)]
    return _rows(captions, real, names, folder / IMAGE_TO_IMAGE / of.split, count)


def _rows(
    captions: Sequence[str], real: Sequence[Sequence[Example]], names: Sequence[str], folder: Path, count: int
) -> list[ImageRow]:
    """Return at most `count` rows, spread over all prompts: the real images, then each model's."""
    rows = []
    step = max(1, len(captions) // count)
    for index in list(range(0, len(captions), step))[:count]:
        images: list[Image.Image] = [each[index].image() for each in real]
        images += [Image.open(folder / folder_name(name) / image_name(index)) for name in names]
        rows.append(ImageRow(captions[index], [_image_uri(image) for image in images]))
    return rows


def _image_uri(file: Image.Image, longest: int = 192) -> str:
    with file:
        image = file.convert("RGB")
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _uri(buffer)


def _figure_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return _uri(buffer)


def _uri(buffer: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
