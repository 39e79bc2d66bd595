"""A student UNet learns from its teacher: the tasks that the loop trains, and `distill`, which runs the stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, convert_to_fp32
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm import checks
from asdm.data.batches import ShuffledBatches
from asdm.data.preparation import prepare_data
from asdm.data.prepared import digest_of, is_prepared, open_prepared
from asdm.diffusion.conditioning import embed_prompts, noise_schedule, predicted_original
from asdm.diffusion.generation import default_guidance
from asdm.distillation.consistency import ConsistencyTask
from asdm.distillation.incubation import assembled, block_error, calls_of, incubated_blocks
from asdm.distillation.losses import (
    feature_losses,
    mean_by_area,
    min_snr_weights,
    output_loss,
    relative_error,
    semantic_loss,
    squared_error,
    task_loss,
)
from asdm.distillation.recipes import recipe_stages
from asdm.distillation.semantics import SemanticEncoder, make_encoder
from asdm.distillation.stages import Stage
from asdm.distillation.teaching import WHOLE, Batch, Noised, TeachingTask
from asdm.distillation.teaching import TrainingSet as TrainingSet
from asdm.errors import AsdmError
from asdm.families.unet_shorter import teacher_key
from asdm.families.unet_structure import blocks as unet_blocks
from asdm.families.unet_structure import require_known_inputs, unlike
from asdm.files import folder_lock, write_text
from asdm.measure.hooks import outputs_of, preserve_module_state, tensor_of
from asdm.measure.machine import prepare_for_training
from asdm.training.loop import BatchSlice, Progress, TrainingTask, make_accelerator, train
from asdm.training.optimizers import require_installed

# What may change between two sittings of a stage: it makes a run possible on another machine, or a lost one sound.
CHANGEABLE = {"learning_rate", "warmup_steps", "checkpoint_every", "accumulation", "checkpointing", "mixed_precision"}


class DistillationTask(TeachingTask):
    """Task, output, per-block feature and semantic losses of a student that sees what its teacher sees.

    The teacher runs without gradient, once for each batch, and both read the same embeddings.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: DDPMScheduler,
        examples: TrainingSet,
        stage: Stage,
        encoder: SemanticEncoder | None = None,
    ):
        super().__init__(teacher, student, schedule, examples, stage)
        self.blocks = unet_blocks(student)
        self.teacher_blocks = {block: teacher_key(block, student, teacher) for block in self.blocks}
        # Weights have a mean of 1 over the time steps that are drawn: of each batch, one sample's would cancel out.
        drawn = self.timesteps(schedule.config.num_train_timesteps, torch.Generator().manual_seed(0))
        alphas = schedule.alphas_cumprod.cpu()
        self.alphas = alphas / alphas[drawn].mean()
        self.snr_weights: Tensor | None = None
        if stage.min_snr_gamma is not None:
            weights = min_snr_weights(alphas, schedule.config.prediction_type, stage.min_snr_gamma)
            self.snr_weights = weights / weights[drawn].mean()
        self.encoder = encoder
        self.text_features: Tensor | None = None
        if encoder is not None and stage.losses.semantic_text:
            self.text_features = encoder.text_features(examples.prepared.captions)
            if self.text_features is None:
                raise AsdmError(
                    f"semantic_text={stage.losses.semantic_text:g}: the encoder {stage.semantics.encoder} has no text "
                    "tower; choose clip, or give it no weight"
                )

    def forward(self, batch: Batch, generator: torch.Generator, part: BatchSlice = WHOLE) -> dict[str, Tensor]:
        indices, step = batch
        noised = self.noised(indices, generator, part)
        indices = indices[part.of(len(indices))]
        stage = self.stage
        with torch.no_grad(), outputs_of(self.teacher, list(self.teacher_blocks.values())) as teacher_outputs:
            teacher_pred = self.teacher_pred(noised)
        with outputs_of(self.student, self.blocks) as student_outputs:
            noise_pred = self.student_pred(noised)
        features = {name: tensor_of(output) for name, output in student_outputs.items()}
        expected = {name: tensor_of(teacher_outputs[block]) for name, block in self.teacher_blocks.items()}
        by_block = feature_losses(features, expected, stage.relative)
        weights = None if self.snr_weights is None else _at(self.snr_weights, noised.timesteps)
        losses = {
            "task": task_loss(noise_pred, noised.target, weights, stage.relative),
            "output": self._output_loss(noised, noise_pred, teacher_pred, weights),
            "feature": mean_by_area(by_block, features)
            if stage.features_by == "area"
            else torch.stack(list(by_block.values())).mean(),
        }
        if self.encoder is not None and step % stage.semantics.every == 0:
            losses |= self._semantic_losses(self.encoder, noised, noise_pred, teacher_pred, indices)
        return {**self.weighted(losses), **{f"feature/{name}": value for name, value in by_block.items()}}

    def _output_loss(self, noised: Noised, noise_pred: Tensor, teacher_pred: Tensor, weights: Tensor | None) -> Tensor:
        """Of the predictions, or of the guided ones (arXiv 2207.12598, Eq. 6), whose other branch is run here."""
        scale = self.stage.guidance_scale
        if scale is not None and not self.embeds_guidance:
            empty = self.examples.empty_caption[[0] * len(noised.noisy)].to(noised.noisy.device, torch.float32)
            without = replace(noised, captions=replace(empty, masked=noised.captions.masked))
            with torch.no_grad():
                unconditional = self.teacher_pred(without)
            teacher_pred = unconditional + scale * (teacher_pred - unconditional)
            own = self.student_pred(without)
            noise_pred = own + scale * (noise_pred - own)
        return output_loss(noise_pred, teacher_pred, weights, self.stage.relative)

    def _semantic_losses(
        self,
        encoder: SemanticEncoder,
        noised: Noised,
        noise_pred: Tensor,
        teacher_pred: Tensor,
        indices: Tensor,
    ) -> dict[str, Tensor]:
        """By x0 estimates; those at high noise mean little, and weigh by the cumulative alpha."""
        alphas = _at(self.alphas, noised.timesteps)
        mine, theirs = (
            predicted_original(self.schedule, pred.float(), noised.noisy, noised.timesteps)
            for pred in (noise_pred, teacher_pred)
        )
        features = encoder(mine, noised.captions)
        with torch.no_grad():
            expected = encoder(theirs, noised.captions)
        losses = {"semantic": semantic_loss(features, expected, alphas)}
        if self.text_features is not None:
            losses["semantic_text"] = semantic_loss(features, self.text_features[indices].to(features), alphas)
        return losses


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    return table.to(timesteps.device)[timesteps]


class IncubationTask(TeachingTask):
    """Each edited block of the student alone: on what enters the teacher's block, to what leaves it.

    One teacher forward feeds all of them, and no block sees another's gradient (Deep Incubation, arXiv 2212.04129).
    Of a launch of several processes, each has its share of the blocks.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: DDPMScheduler,
        examples: TrainingSet,
        stage: Stage,
        share: BatchSlice = WHOLE,
    ):
        super().__init__(teacher, student, schedule, examples, stage)
        if not incubated_blocks(student):
            raise AsdmError(f"stage {stage.name}: nothing to incubate in this student; leave the stage out")
        self.blocks = incubated_blocks(student)[share.index :: share.count]
        incubated = {id(p) for name in self.blocks for p in student.get_submodule(name).parameters()}
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in incubated)
        # A removed block has nothing that could learn.
        self.blocks = [
            name for name in self.blocks if any(p.requires_grad for p in student.get_submodule(name).parameters())
        ]
        self.error = relative_error if stage.relative else squared_error

    def forward(self, batch: Batch, generator: torch.Generator, part: BatchSlice = WHOLE) -> dict[str, Tensor]:
        noised = self.noised(batch[0], generator, part)
        with torch.no_grad(), calls_of(self.teacher, self.blocks) as calls:
            self.teacher_pred(noised)
        losses = {}
        for name in self.blocks:
            args, kwargs, expected = convert_to_fp32(calls.pop(name))
            output = self.student.get_submodule(name)(*args, **kwargs)
            losses[f"block/{name}"] = block_error(output, expected, self.error)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


@checks.arguments(
    teacher=checks.PIPELINE,
    student=checks.UNET,
    data=checks.path,
    folder=checks.path,
    recipe=checks.path,
    steps=checks.TRAINING_STEPS,
    stages=checks.each(checks.a(Stage), least=1),
    seed=checks.SEED,
    progress=checks.function,
)
def distill(
    teacher: DiffusionPipeline,
    student: UNet2DConditionModel,
    data: str | Path,
    folder: str | Path,
    *,
    recipe: str | Path = "joint",
    steps: int | None = None,
    stages: Sequence[Stage] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingSet:
    """Train `student` in place to do as the teacher's UNet does; resumes from what is in `folder`.

    Under `accelerate launch` the processes share each step's batch, and the blocks that are incubated alone.

    Args:
        data: images with captions, as for `open_source`, or what `prepare_data` made of them.
        folder: gets the prepared latents and, for each stage, `log.jsonl`, TensorBoard events and the
            newest checkpoint; a run killed at any moment loses the steps since that checkpoint at most.
        recipe: by name (`asdm.distillation.recipes`), of `steps` steps (1000 by default), or a YAML file, whose stages
            have their own. A few-step student samples by `lcm_scheduler`.
        stages: the recipe in detail, instead of `recipe` and `steps`.
        progress: called after each step, in the first process, with `done` and `total` of all stages' steps, the
            losses and the `seconds` it took.

    Returns:
        What was trained on.

    Raises:
        AsdmError: the data cannot be used, a loss is not finite, `folder` is of another run or one is at work there,
            teacher and student do not fit, the UNet has inputs that no prompt brings, or the student's weights are not
            in float32.
    """
    require_known_inputs(teacher.unet)
    _require_fit(teacher.unet, student)
    if student is teacher.unet:
        raise AsdmError("the student is the teacher's own UNet, which stays as it is; give a copy of it")
    if student.dtype != torch.float32:
        raise AsdmError(
            f"a student in {student.dtype} cannot be trained; give it as student.float(), and choose the precision "
            "of the computation with a stage's mixed_precision"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prepare_for_training()
    stages = recipe_stages(recipe, student, 1000 if steps is None else steps) if stages is None else list(stages)
    schedule = noise_schedule(teacher)
    total, before = sum(stage.steps for stage in stages), 0
    ends_at_zero = bool(schedule.config.rescale_betas_zero_snr)
    networks = {"teacher": digest_of(teacher.unet), "student": digest_of(student)}
    networks["predicts"] = f"{schedule.config.prediction_type}{', to zero SNR' if ends_at_zero else ''}"
    with folder_lock(folder), preserve_module_state(teacher.unet, teacher.vae):
        _require_possible(teacher, student, schedule, stages)
        examples = prepare(teacher, data, folder / "prepared")
        for index, stage in enumerate(stages):
            report = None if progress is None else partial(_reported, progress, before, total)
            is_newest = not any(folder.glob(f"{index + 1:02d}-*"))
            run = _Run(folder / f"{index:02d}-{stage.name}", stage, seed, networks, is_newest)
            _train_stage(teacher, student, schedule, examples, run, report)
            before += stage.steps
    student.eval().requires_grad_(False)
    student.disable_gradient_checkpointing()
    return examples


def _require_possible(
    teacher: DiffusionPipeline, student: UNet2DConditionModel, schedule: DDPMScheduler, stages: Sequence[Stage]
) -> None:
    """Raise an AsdmError for what a stage asks for and this student, this teacher or this machine has not: before the
    data is prepared and the stages before it are trained."""
    nothing = TrainingSet(SimpleNamespace(captions=[""]), None)  # type: ignore[arg-type]
    for stage in stages:
        require_installed(stage.optimizer)
        with assembled(student, teacher.unet, stage.assembled):
            make_task(teacher, student, schedule, nothing, stage)


@dataclass(frozen=True)
class _Run:
    """A stage as it is trained in a folder; `networks` are digests of the teacher and the student that it began with,
    and what they predict; no later stage has begun where it is the newest."""

    folder: Path
    stage: Stage
    seed: int
    networks: dict[str, str]
    is_newest: bool


def _train_stage(
    teacher: DiffusionPipeline,
    student: UNet2DConditionModel,
    schedule: DDPMScheduler,
    examples: TrainingSet,
    run: _Run,
    report: Progress | None,
) -> None:
    stage = run.stage
    order = ShuffledBatches(len(examples), stage.batch_size, run.seed)
    only_features = stage.scope == "joint" and not _asks_for_output(stage)
    accelerator = make_accelerator(teacher.device, stage.mixed_precision, some_unused=only_features)
    spread = stage.scope == "incubate" and accelerator.num_processes > 1
    share = BatchSlice(accelerator.process_index, accelerator.num_processes) if spread else WHOLE
    if accelerator.is_main_process:
        _claim(run, student, examples)
    accelerator.wait_for_everyone()
    if stage.assembled is not None and teacher.unet.dtype != student.dtype and accelerator.mixed_precision == "no":
        raise AsdmError(
            f"stage {stage.name}: the teacher is in {teacher.unet.dtype}, and its blocks are assembled with the "
            "student's in float32; load it in float32, or give the stage a mixed_precision"
        )
    with assembled(student, teacher.unet, stage.assembled):
        task = make_task(teacher, student, schedule, examples, stage, share)
        if task.trained():  # there may be more processes than blocks
            train(
                task,
                partial(_batch_of, order),
                stage.loop(run.seed),
                run.folder / f"process-{share.index}-of-{share.count}" if spread else run.folder,
                accelerator=accelerator,
                alone=spread,
                progress=report if accelerator.is_main_process else None,
            )
        if spread:
            _gather(student, accelerator)


def make_task(
    teacher: DiffusionPipeline,
    student: UNet2DConditionModel,
    schedule: DDPMScheduler,
    examples: TrainingSet,
    stage: Stage,
    share: BatchSlice = WHOLE,
) -> TrainingTask:
    """What the loop trains in a stage; of the incubated blocks, this share."""
    if stage.scope == "incubate":
        return IncubationTask(teacher.unet, student, schedule, examples, stage, share)
    if stage.scope == "consistency":
        scale = default_guidance(teacher) if stage.guidance_scale is None else stage.guidance_scale
        return ConsistencyTask(teacher.unet, student, schedule, examples, stage, scale)
    encoder = None
    if stage.losses.semantic or stage.losses.semantic_text:
        encoder = make_encoder(stage.semantics.encoder, teacher, schedule, stage.semantics.decoder)
    return DistillationTask(teacher.unet, student, schedule, examples, stage, encoder)


def _asks_for_output(stage: Stage) -> bool:
    losses = stage.losses
    return bool(losses.task or losses.output or losses.semantic or losses.semantic_text)


def _require_fit(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    name = unlike(teacher, student)
    if name is not None:
        raise AsdmError(
            f"the student's {name} is {student.config[name]}, the teacher's {teacher.config[name]}: it was not pruned "
            "from such a model; name the teacher that it was pruned from"
        )


def _claim(run: _Run, student: UNet2DConditionModel, examples: TrainingSet) -> None:
    """Write down beside a stage's checkpoints whose they are, or find that they are this run's; the newest stage may
    be lengthened.

    Raises:
        AsdmError: they are another's.
    """
    captions = hashlib.sha256("\n".join(examples.prepared.captions).encode()).hexdigest()[:16]
    settings = {
        "seed": run.seed,
        "edits": student.config.get("edits") or [],
        "data": [examples.prepared.made_by, captions],
        **run.networks,
        **run.stage.model_dump(exclude=CHANGEABLE),
    }
    path = run.folder / "run.json"
    if path.is_file():
        known = {"predicts": settings["predicts"]} | json.loads(path.read_text("utf-8"))
        now = json.loads(json.dumps(settings))
        changed = [name for name in now if known.get(name) != now[name]]
        if changed and not (changed == ["steps"] and run.is_newest and run.stage.steps > known["steps"]):
            raise AsdmError(
                f"{run.folder}: begun with other settings ({', '.join(changed)}); repeat those, or use another output "
                "folder"
            )
    write_text(path, json.dumps(settings, indent=1) + "\n")


def _gather(student: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Give all processes the blocks that each of them has incubated."""
    for number, name in enumerate(incubated_blocks(student)):
        for tensor in student.get_submodule(name).state_dict().values():
            broadcast(tensor, from_process=number % accelerator.num_processes)


def _batch_of(order: ShuffledBatches, step: int) -> Batch:
    return order(step), step


def _reported(progress: Progress, before: int, total: int, row: dict[str, float]) -> None:
    progress(row | {"done": before + row["step"], "total": total})


def prepare(pipeline: DiffusionPipeline, data: str | Path, folder: Path) -> TrainingSet:
    """What to train on: `data` as it is where it was prepared, else prepared into `folder`.

    Raises:
        AsdmError: the source cannot be used, or was prepared by another model.
    """
    prepared = open_prepared(pipeline, data) if is_prepared(data) else prepare_data(pipeline, data, folder)
    with torch.no_grad():
        empty_caption = embed_prompts(pipeline, [""]).to("cpu")
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        empty_caption = empty_caption.without_text()
    return TrainingSet(prepared, empty_caption)
