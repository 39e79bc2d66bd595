"""The evaluation by a protocol: generate or resume, measure, write the results and the win sheets."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from asdm import checks
from asdm.choices import ProtocolName
from asdm.diffusion.conditioning import image_size
from asdm.errors import AsdmError
from asdm.evaluation.image_folders import folder_names
from asdm.evaluation.protocol.extractors import LPIPS_SIDE, Lpips, TextExtractor, open_extractor
from asdm.evaluation.protocol.features import FeatureCache, ImageFiles
from asdm.evaluation.protocol.image_job import KIND, ImageJob, ImageSettings
from asdm.evaluation.protocol.inputs import Inputs, read_inputs
from asdm.evaluation.protocol.measurement import Measurement, needs_several_images
from asdm.evaluation.protocol.metrics import METRICS, SCORES, Role
from asdm.evaluation.protocol.pictures import numbered
from asdm.evaluation.protocol.protocols import PROTOCOLS
from asdm.evaluation.protocol.results import ProtocolMetrics, ProtocolResults
from asdm.evaluation.protocol.settings import Changes, launch_state, settings_of
from asdm.evaluation.protocol.wins import WIN_SHEET, write_win_sheet
from asdm.families import denoiser_of
from asdm.files import folder_lock, require_ours
from asdm.generation.schedulers import scheduler_label
from asdm.pipelines.clip import clip_folder, load_clip_tokenizer

RESULTS, FEATURES, IMAGES = "evaluation.json", "features", "images"  # in the job's folder
Progress = Callable[[str, int, int], None]


@checks.arguments(
    pipelines=checks.named(checks.PIPELINE),
    protocol=checks.literal(ProtocolName),
    folder=checks.path,
    images=checks.path,
    captions=checks.path,
    limit=checks.whole(1, 10**6),
    metrics=checks.text,
    weights=checks.path,
    steps=checks.STEPS,
    guidance_scale=checks.GUIDANCE,
    size=checks.whole(8, 8192),
    seed=checks.SEED,
    batch_size=checks.whole(1, 10**4),
    progress=checks.function,
)
def evaluate_by_protocol(
    pipelines: dict[str, DiffusionPipeline],
    protocol: ProtocolName,
    folder: str | Path,
    *,
    images: str | Path | None = None,
    captions: str | Path | None = None,
    limit: int | None = None,
    metrics: str | None = None,
    weights: str | Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ProtocolResults:
    """Measure the quality of several pipelines by a published protocol; the first is the teacher.

    The processes of a launch (`accelerate launch`) share the work. A second call resumes: finished images are not
    generated again, features of the same files are not computed again. The n-th prompt's noise is that of seed + n for
    every pipeline.

    Writes into `folder`: `images/NAME/000000.jpg` and so on, `features`, `evaluation.json`, and a win sheet for each
    student (`wins.html`, of several students `wins-NAME.html`).

    Args:
        protocol: "coco30k", as BK-SDM measured, or "demo", the same on the embedded images.
        images: the folder of real images; the embedded ones by default for the protocol "demo".
        captions: the file of prompts, as `read_captions` reads it; the embedded ones by default for "demo".
        limit: the first prompts alone.
        metrics: names separated by commas, or "all"; each may name its network, as `pickscore=FOLDER`. The protocol's
            own by default.
        weights: a folder of networks' weights that is looked at before the caches of the libraries.
        steps: of all but few-step pipelines; the protocol's by default.
        guidance_scale: of all but few-step pipelines; the protocol's by default.
        size: side of the sampled images in pixels; each pipeline's own by default. They are stored smaller where the
            protocol says so.
        batch_size: images at a time; by default 32 for latents of up to 32x32, else 1.

    Raises:
        AsdmError: before anything is generated: a file or folder is missing, a network's weights are not to be had, the
            folder holds images of other settings, or an argument is out of range.
    """
    place = Path(folder)
    require_ours(place, KIND)
    state = launch_state(next(iter(pipelines.values())))
    with state.main_process_first():  # rank 0 downloads weights for all
        inputs = read_inputs(protocol, images=images, captions=captions, metrics=metrics, weights=weights)
    changes = Changes(PROTOCOLS[protocol], steps, guidance_scale, size, seed)
    job = _Evaluation(changes, pipelines, place, state, inputs, limit, progress)
    job.require()
    place.mkdir(parents=True, exist_ok=True)
    with folder_lock(place):  # before the folder is marked, which tells a run at work of its settings
        job.run(job.claim(), batch_size)
        state.wait_for_everyone()
    return ProtocolResults.load(place / RESULTS)


class _Evaluation:
    """One call of `evaluate_by_protocol`."""

    def __init__(
        self,
        changes: Changes,
        pipelines: Mapping[str, DiffusionPipeline],
        folder: Path,
        state: PartialState,
        inputs: Inputs,
        limit: int | None,
        progress: Progress | None,
    ):
        self.changes, self.protocol, self.pipelines = changes, changes.protocol, pipelines
        self.folder, self.state, self.inputs, self.progress = folder, state, inputs, progress
        self.all_pictures = numbered(inputs.prompts, self.protocol.suffix)
        self.pictures = self.all_pictures.first(limit)
        self.limit = limit
        self.names = {name: f"{IMAGES}/{each}" for name, each in folder_names(list(pipelines)).items()}
        self.notes: list[str] = []
        self.networks: dict[str, str] = {}

    @property
    def first(self) -> DiffusionPipeline:
        return next(iter(self.pipelines.values()))

    @cached_property
    def stored_side(self) -> int:
        """The side of the compared images: the protocol's, or the smallest model's where that is smaller."""
        sides = [self.changes.size or image_size(pipeline) for pipeline in self.pipelines.values()]
        return min(self.protocol.stored_side, *sides)

    @cached_property
    def image_settings(self) -> dict[str, ImageSettings]:
        """How each model's images are generated."""
        stored = {"stored_side": self.stored_side, "jpeg": self.protocol.jpeg}
        return {
            name: settings_of(
                pipeline,
                self.changes.sampling(pipeline, self.pipelines.values()),
                self.changes.size,
                self.changes.seed,
                **stored,
            )
            for name, pipeline in self.pipelines.items()
        }

    def require(self) -> None:
        """
        Raises:
            AsdmError: a pipeline cannot sample as requested, or images are too few or too small for a metric.
        """
        count, names = len(self.pictures.all), [name for name in self.inputs.metrics if needs_several_images(name)]
        if count < 2 and names:
            raise AsdmError(f"limit={count}: {names[0]} needs two images or more; raise it or leave {names[0]} out")
        _ = self.image_settings
        folder = clip_folder(self.first)
        if folder is not None and any(network.source.kind == "own-clip" for network in self.inputs.networks.values()):
            load_clip_tokenizer(folder, self.first)
        if "lpips" in self.inputs.metrics and self.stored_side < LPIPS_SIDE:
            raise AsdmError(
                f"metrics=lpips: AlexNet reads images of {LPIPS_SIDE} px or more, and these have {self.stored_side}; "
                "leave lpips out"
            )

    def claim(self) -> ImageJob:
        """Return the job of all models' images, for which the folder is marked.

        Raises:
            AsdmError: the folder holds images of other settings.
        """
        job = ImageJob(self.folder, self.all_pictures, self.state)
        job.claim({self.names[name]: (each, self.image_settings[name]) for name, each in self.pipelines.items()})
        return job

    def run(self, job: ImageJob, batch_size: int | None) -> None:
        """Generate, measure and write."""
        store = partial(self.protocol.stored, side=self.stored_side)
        images = {
            name: job.generate(
                self.names[name],
                pipeline,
                self.image_settings[name],
                limit=self.limit,
                batch_size=batch_size,
                store=store,
                progress=None if self.progress is None else partial(self.progress, f"images: {name}"),
            )
            for name, pipeline in self.pipelines.items()
        }
        measurement = self._measure(images)
        if self.state.is_main_process:
            self._results(measurement).save(self.folder / RESULTS)
            self._write_win_sheets(images, measurement)

    def _measure(self, images: Mapping[str, Sequence[Path]]) -> Measurement:
        real = ImageFiles(
            self.inputs.real,
            partial(self.protocol.real, side=self.stored_side),
            f"{self.protocol.name} {self.stored_side}",
            may_skip=True,
        )
        cache = FeatureCache(self.folder / FEATURES, self.state, self.progress)
        found = Measurement(images, self._prompts(), real, cache, self.changes.seed)
        for role in self.inputs.networks:
            self._measure_role(role, found)
        if "ssim" in self.inputs.metrics:
            found.by_pairs("ssim", None)
        return found

    def _measure_role(self, role: Role, found: Measurement) -> None:
        """Measure all requested metrics of one network."""
        device, network = self.first.device, self.inputs.networks[role]
        metrics = [name for name in self.inputs.metrics if METRICS[name].role == role]
        if role == "lpips":
            assert network.path is not None
            found.by_pairs(role, Lpips(network.path, device, network.source.name))
        else:
            extractor = open_extractor(role, network.source, network.path, self.first, device)
            if extractor is None:
                titles = ", ".join(METRICS[name].title for name in metrics)
                self.notes.append(f"no {titles}: there is no folder clip beside the first model")
                return
            if role in SCORES.values():
                found.by_score(metrics[0], cast(TextExtractor, extractor))
            else:
                found.by_features(role, metrics, extractor)
        self.networks |= {METRICS[name].title: network.title for name in metrics}

    def _prompts(self) -> list[str]:
        return [each.prompt for each in self.pictures.all]

    def _results(self, measurement: Measurement) -> ProtocolResults:
        return ProtocolResults(
            protocol=self.protocol.name,
            title=self.protocol.title,
            date=date.today().isoformat(),
            machine=f"{platform.machine()}, {self.first.device}, torch {torch.__version__}",
            dtype=str(denoiser_of(self.first).dtype).removeprefix("torch."),
            seed=self.changes.seed,
            prompts=len(self._prompts()),
            stored_side=self.stored_side,
            real_images=measurement.real_images,
            networks=self.networks,
            notes=[*self._notes(measurement), *self.notes],
            rows=[self._row(name, measurement) for name in self.pipelines],
        )

    def _row(self, name: str, measurement: Measurement) -> ProtocolMetrics:
        settings = self.image_settings[name]
        return ProtocolMetrics(
            name=name,
            images=len(self._prompts()),
            side=settings.side,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            scheduler=scheduler_label(self.pipelines[name].scheduler),
            wins=measurement.wins[name],
            **measurement.fields[name],
        )

    def _notes(self, measurement: Measurement) -> list[str]:
        count, notes = len(self._prompts()), []
        if count < self.protocol.prompts:
            notes.append(
                f"{count:,} of the protocol's {self.protocol.prompts:,} prompts: compare Fréchet distances, IS and KID "
                "within this table alone"
            )
        for name, pipeline in self.pipelines.items():
            notes += self.changes.notes(name, pipeline, self.image_settings[name])
        if measurement.real_images is not None and measurement.real_images < len(self.inputs.real):
            left_out = len(self.inputs.real) - measurement.real_images
            notes.append(f"{left_out} of {len(self.inputs.real)} real images cannot be decoded and are left out")
        return notes

    def _write_win_sheets(self, images: Mapping[str, Sequence[Path]], measurement: Measurement) -> None:
        teacher, *students = self.pipelines
        for name in students:
            distance = measurement.distance(name)
            if distance is not None:
                write_win_sheet(
                    self.folder / win_sheet_name(name, students),
                    prompts=self._prompts(),
                    names=(teacher, name),
                    files=list(zip(images[teacher], images[name], strict=True)),
                    measure=distance[0],
                    distances=distance[1].tolist(),
                    scores={
                        metric: (own.tolist(), other.tolist())
                        for metric, (own, other) in measurement.scores_of(name).items()
                    },
                )


def win_sheet_name(name: str, students: Sequence[str]) -> str:
    """Return the name of a student's win sheet in the job's folder."""
    return WIN_SHEET if len(students) == 1 else f"wins-{folder_names(students)[name]}.html"
