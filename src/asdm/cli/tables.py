"""Results as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from asdm.benchmark.results import BenchmarkRow
    from asdm.distillation.estimate import StageEstimate
    from asdm.evaluation.decoders import DecoderComparison
    from asdm.evaluation.protocol.results import ProtocolResults
    from asdm.evaluation.report import Column
    from asdm.evaluation.results import Evaluation, ImageToImageMetrics, QualityMetrics
    from asdm.measure.installation import Installation
    from asdm.sensitivity.expert_usage import ExpertUsage
    from asdm.sensitivity.profile import RedundancyMap

NARROWEST_TEXT = 10  # characters of a column of texts, and of a name above a column of numbers


def _table(title: str | None, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """Return an empty table with columns of text, then columns of numbers; narrow, without frames."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, overflow="fold", justify="right")
    return table


def _legible(table: Table) -> Table:
    """Return the filled table with its numbers kept whole: in a narrow terminal texts and names take more lines."""
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        if column.justify != "right":
            column.min_width = min(NARROWEST_TEXT, max(map(len, [str(column.header), *cells])))
            continue
        numbers = [cell for cell in cells if not cell[:1].isalpha()]
        words = " ".join([str(column.header), *(cell for cell in cells if cell[:1].isalpha())]).split()
        width = max(map(len, [*numbers, *(word[:NARROWEST_TEXT] for word in words)]), default=1)
        if len(numbers) == len(cells) and max(map(len, words), default=0) <= NARROWEST_TEXT:
            column.width = width
        else:
            column.min_width = width
    return table


def narrowest(table: Table) -> int:
    """Return the width of the table at which its numbers are whole, with padding and dividers."""
    return sum((column.width or column.min_width or 1) + 2 for column in table.columns) + 1


def extras_table(found: Installation) -> Table:
    """Return which extras are installed, and what each gives."""
    table = _table(None, ["extra", "state", "gives"], [])
    for name, extra in found.extras.items():
        table.add_row(name, "; ".join(extra.problems) or "installed", extra.gives)
    if any(extra.problems for extra in found.extras.values()):
        table.caption = "To add one: pip install 'asdm-diffusion[NAME]'"
        table.caption_justify = "left"
    return table


def decoder_table(found: DecoderComparison) -> Table:
    """Return what a tiny decoder is beside the VAE that taught it."""
    table = _table(f"{found.images} images", ["decoder"], ["params M", "ms", "PSNR to real", "to the VAE's"])
    for name, parameters, ms, real, own in (
        ("VAE", found.vae_parameters, found.vae_ms, found.vae_real_psnr, None),
        ("tiny", found.parameters, found.ms, found.real_psnr, found.psnr),
    ):
        shown = ["" if value is None else f"{value:.2f} dB" for value in (real, own)]
        table.add_row(name, f"{parameters / 1e6:.2f}", f"{ms:.2f}", *shown)
    apart = "" if found.told_apart is None else f"; the judge tells {found.told_apart:.1%} of the images apart"
    table.caption = f"speed-up of decoding: {found.ratio}{apart}"
    table.caption_justify = "left"
    return table


def profile_table(redundancy: RedundancyMap) -> Table:
    """Return what each removable unit costs and how sensitive the prediction is to it."""
    table = _table(
        f"{redundancy.model}: {len(redundancy.units)} removable units",
        ["unit"],
        ["params M", "GMACs", "latency", "sensitivity"],
    )
    for unit in redundancy.units:
        table.add_row(
            unit.name.replace("transformer_blocks", "tb"),
            f"{unit.parameters / 1e6:.2f}",
            f"{unit.gmacs:.3f}",
            f"{100 * unit.latency_share:.1f}%",
            f"{unit.sensitivity:.5f}",
        )
    if redundancy.latency_ms > 0 and not redundancy.has_reliable_latencies:
        table.caption = "The machine was too busy to measure each unit's latency. Plans go by MACs."
        table.caption_justify = "left"
    return _legible(table)


def usage_table(usage: ExpertUsage) -> Table:
    """Return the mean weight of the expert kernels by group of prompts, and how far the groups divide them."""
    table = _table(
        f"weights of expert kernels ({', '.join(f'{count} {name}' for name, count in usage.groups.items())})",
        ["convolution", "expert"],
        [*usage.groups, "bits", "by chance", "explained"],
    )
    for conv in usage.convolutions:
        shared = [f"{conv.information:.4f}", f"{conv.chance:.4f}", f"{100 * conv.explained:.0f}%"]
        for kernel, expert in enumerate(conv.experts, start=1):
            means = [sum(row[kernel] for row in rows) / len(rows) for rows in conv.weights.values()]
            table.add_row(
                conv.name if kernel == 1 else "",
                expert,
                *(f"{mean:+.3f}" for mean in means),
                *(shared if kernel == 1 else [""] * len(shared)),
            )
    return _legible(table)


def speed_table(evaluation: Evaluation) -> Table:
    """Latencies, speed-ups and sizes of an evaluation's models."""
    table = _table(
        f"Speed ({evaluation.dtype}, {evaluation.threads} threads; interleaved rounds, the fastest count)",
        ["model"],
        [f"{evaluation.denoiser} ms", "speed-up", "steps", "pipeline ms", "speed-up", "params M", "GMACs"],
    )
    for row in evaluation.speed:
        table.add_row(
            row.name,
            f"{row.unet.ms:.1f}",
            row.unet_ratio.brief(),
            str(row.steps),
            f"{row.pipeline.ms:.0f}",
            row.pipeline_ratio.brief(),
            _or_dash(row.million_parameters, "{:.2f}"),
            _or_dash(row.gmacs, "{:.3f}"),
        )
    return _legible(table)


def quality_table(evaluation: Evaluation) -> Table:
    """Return the quality of an evaluation's images, by model and split; columns without a value are left out."""
    from asdm.evaluation.report import known_columns

    title = f"Quality ({evaluation.steps} steps, guidance {evaluation.guidance_scale:g}, seed {evaluation.seed})"
    return _judged_table(title, evaluation.quality, known_columns(evaluation.quality))


def protocol_table(results: ProtocolResults) -> Table:
    """Return the metrics of a protocol, a row for each metric that was measured, a column for each model."""
    from asdm.evaluation.protocol.metrics import METRICS

    table = _table(None, ["metric"], [row.name for row in results.rows])
    for name, metric in METRICS.items():
        values = [getattr(row, metric.field) for row in results.rows]
        if any(value is not None for value in values):
            arrow = "higher is better" if metric.higher_is_better else "lower is better"
            cells = ["–" if value is None else f"{value:.{metric.digits}f}" for value in values]
            judged = " by the judge" if "judge" in results.networks.get(metric.title, "") else ""
            table.add_row(f"{metric.title}{judged} ({arrow})", *cells)
            wins = [row.wins.get(name) for row in results.rows]
            if any(value is not None for value in wins):
                cells = ["–" if value is None else f"{100 * value:.1f}%" for value in wins]
                table.add_row(f"  better {metric.title} than the first model's", *cells)
    return _legible(table)


def image_to_image_table(evaluation: Evaluation) -> Table:
    """Return the quality of an evaluation's image-to-image, by model and split, with what it is to be compared with."""
    from asdm.evaluation.report import image_to_image_columns

    found = evaluation.image_to_image
    assert found is not None
    title = f"Image-to-image (strength {found.strength:g}, otherwise as above)"
    return _judged_table(title, [*found.rows, *found.references], image_to_image_columns(evaluation))


def _judged_table(
    title: str, rows: Sequence[QualityMetrics] | Sequence[ImageToImageMetrics], columns: Sequence[Column]
) -> Table:
    table = _table(title, ["model", "prompts"], ["images", *(short for _, _, short, _ in columns)])
    for judged in rows:
        cells = [
            _or_dash(getattr(judged, key), "{:.1%}" if kind == "percent" else "{:.3f}") for key, _, _, kind in columns
        ]
        table.add_row(judged.name, judged.split.replace("_", "-"), str(judged.images), *cells)
    return _legible(table)


def benchmark_table(rows: Sequence[BenchmarkRow]) -> Table:
    """One model's rows: seconds and the speed-up with its interval; then the quality where images were judged, else
    throughput and memory. Of image-to-image, on the last split that has it: exact pairs, or the distance as a part of
    that between two seeds. The file that the benchmark writes has all results."""
    splits = list(dict.fromkeys(split for row in rows for split in row.teacher_distance))
    titles = [f"{title}, {split.replace('_', ' ')}" for split in splits for title in ("dist.", "top-5")]
    last = next((split for split in reversed(splits) if _image_to_image_metric(rows, split)), "")
    from_images = _image_to_image_metric(rows, last)
    titles += [f"from image, {last.replace('_', ' ')}"] if from_images else []
    measured = ["call ms", "GFLOP/s", "of limit", "weights MB", "peak MB"] if not splits else []
    table = _table(
        rows[0].place + (" (extrapolated from parts)" if rows[0].extrapolated else ""),
        [""],
        ["seconds", "faster", *measured, *titles],
    )
    for row in rows:
        if row.seconds is None or row.seconds_interval is None:
            table.add_row(f"{row.name}: {row.error}")
            continue
        cells = [f"{row.seconds:.2f}", "–" if row.ratio is None else row.ratio.brief()]
        if measured:
            cells += [
                f"{1000 * row.parts['UNet, whole']:.0f}",
                _or_dash(row.gflops, "{:.0f}"),
                _or_dash(row.limit_share, "{:.0%}"),
                _or_dash(row.unet_megabytes, "{:.0f}"),
                _or_dash(row.peak_megabytes, "{:.0f}"),
            ]
        for split in splits:
            distance = _or_dash(row.teacher_distance.get(split), "{:.4f}")
            cells += [distance, _or_dash(row.concept_top5.get(split), "{:.0%}")]
        if from_images:
            cells.append(_or_dash(row.image_to_image.get(from_images, {}).get(last), "{:.0%}"))
        table.add_row(row.name, *cells)
    return _legible(table)


def _image_to_image_metric(rows: Sequence[BenchmarkRow], split: str) -> str | None:
    """Return the metric of image-to-image to show: exact pairs, or else the distance to the original's results."""
    metrics = ("exact_pair", "seed_part")
    return next((each for each in metrics if any(split in row.image_to_image.get(each, {}) for row in rows)), None)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def estimate_tables(rows: Sequence[StageEstimate], processes: int) -> tuple[Table, Table]:
    """Return what each stage trains and how long it takes; and what its memory is used for."""
    titles = ("parameters", "steps", "batch", "TFLOP a step", "about", "memory")
    table = _table(None, ["stage", "trains"], titles)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.memory))
    parts = _table("GB in each process" if processes > 1 else "GB", ["stage"], kinds)
    for row in rows:
        stage = row.stage
        what: str = "edited blocks, each alone" if stage.scope == "incubate" else stage.trained
        if stage.trained == "lora":
            what += f" of rank {stage.lora_rank}"
        if stage.teacher == "recorded":
            what += ", from recorded features"
        if stage.blocks_in_teacher is not None:
            what += f" of {len(stage.blocks_in_teacher)} blocks in the teacher"
        table.add_row(
            stage.name,
            what,
            f"{row.trained_parameters / 1e6:.2f}M",
            str(stage.steps),
            str(stage.batch_size),
            f"{row.step_teraflops:.3g}",
            duration(row.seconds),
            f"{row.gigabytes:.1f} GB",
        )
        parts.add_row(stage.name, *(f"{row.memory.get(kind, 0) / 1e9:.2f}" for kind in kinds))
    return _legible(table), _legible(parts)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
