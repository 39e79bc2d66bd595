"""Record what a teacher answers on fixed draws, so that trainings read it and need no teacher.

The draws are those that a live training of the same seed and batch size would see in its first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, treespec_dumps

from asdm import checks
from asdm.choices import FeatureDtype
from asdm.data.batches import ShuffledBatches
from asdm.data.draws import Draws, require_space, stored_bytes
from asdm.data.prepared import digest_of, is_prepared, require_own_images
from asdm.devices import LONGEST_WAIT
from asdm.diffusion.kinds import is_random
from asdm.diffusion.parameterization import Parameterization, parameterization_of
from asdm.distillation.incubation import calls_of
from asdm.distillation.recipes import recipe_stages
from asdm.distillation.recorded import (
    CAPTIONS,
    FOLDER,
    INDEX,
    KEY,
    PREDICTION,
    SAMPLING,
    BlockRecord,
    FeatureIndex,
    FeatureKey,
    Recorded,
    data_digest,
    read_index,
)
from asdm.distillation.stages import Stage
from asdm.distillation.teaching import Noised, TeachingTask
from asdm.distillation.training_set import TrainingSet, prepare
from asdm.distillation.weightless import weightless, weightless_examples
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of
from asdm.files import folder_lock, write_text
from asdm.measure.hooks import preserve_module_state
from asdm.records import read_record
from asdm.training.loop import LoopSettings
from asdm.training.task import BatchSlice

Progress = Callable[[int, int], None]
DRAWS = 1024


@checks.arguments(
    pipeline=checks.PIPELINE,
    data=checks.path,
    recipe=checks.path,
    stages=checks.each(checks.a(Stage), least=1),
    draws=checks.whole(1, 10**8),
    dtype=checks.literal(FeatureDtype),
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def record_teacher(
    pipeline: DiffusionPipeline,
    data: str | Path,
    *,
    recipe: str | Path = "small-gpu",
    stages: Sequence[Stage] | None = None,
    draws: int = DRAWS,
    dtype: FeatureDtype = "float16",
    seed: int = 0,
    progress: Progress | None = None,
) -> Recorded:
    """Write the predictions and block features of the pipeline's denoiser on fixed draws into a folder of prepared
    data, for stages with `teacher: recorded`; called again, compute what is missing.

    The processes of a launch share the draws.

    Args:
        data: what `prepare_data` wrote.
        recipe: whose stages will read them, by name or as a YAML file. They say how captions and time steps are
            drawn, how many images a call of the teacher has, and whether the blocks' inputs are needed.
        stages: the recipe in detail, instead of `recipe`.
        draws: how many, rounded up to whole batches.
        dtype: what features are stored in; predictions, latents and captions are stored in float32.
        progress: called with draws done and in all.

    Raises:
        AsdmError: `data` was not prepared, or by another model; it holds features of another teacher, data, recipe or
            dtype; they do not fit onto the disk or into float16.
    """
    if not is_prepared(data):
        raise AsdmError(f"{data}: not prepared; run prepare-data first")
    require_own_images(pipeline, data)
    stage = recorded_stage(pipeline, recipe, stages)
    denoiser, parameterization = denoiser_of(pipeline), parameterization_of(pipeline.scheduler)
    examples = prepare(pipeline, data, Path(data))
    state = PartialState(cpu=pipeline.device.type == "cpu", timeout=LONGEST_WAIT)
    key = _key(
        stage, parameterization, dtype, teacher=digest_of(denoiser), data=data_digest(examples.prepared), seed=seed
    )
    folder = Path(data) / FOLDER
    folder.mkdir(exist_ok=True)
    with folder_lock(folder), preserve_module_state(denoiser):
        planned = recording_size(pipeline, stage, dtype, draws)
        if state.is_main_process:
            require_space(folder, planned.missing(folder) * planned.each, planned.each)
            _claim(folder, key)
        state.wait_for_everyone()
        recorder = Recorder(denoiser, parameterization, examples, stage, key, folder, is_random(pipeline))
        batches = range(state.process_index, planned.draws // stage.batch_size, state.num_processes)
        for done, batch in enumerate(batches, start=1):
            recorder.record(batch)
            if progress is not None:
                progress(done * stage.batch_size, len(batches) * stage.batch_size)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(folder, recorder.index(planned.draws))
        state.wait_for_everyone()
        index = read_index(folder)
        return Recorded(index, Draws(folder, dtype, index.reduced))


def _key(
    stage: Stage,
    parameterization: Parameterization,
    dtype: FeatureDtype,
    *,
    teacher: str = "",
    data: str = "",
    seed: int = 0,
) -> FeatureKey:
    """Return what tells the features of a stage from others; `teacher` and `data` are digests."""
    return FeatureKey(
        teacher=teacher,
        predicts=parameterization.description,
        data=data,
        dtype=dtype,
        inputs=stage.scope == "incubate",
        sampling={name: getattr(stage, name) for name in SAMPLING},
        batch_size=stage.batch_size,
        seed=seed,
    )


def recorded_stage(pipeline: DiffusionPipeline, recipe: str | Path, stages: Sequence[Stage] | None = None) -> Stage:
    """Return the stage of a recipe that says what is recorded: the first that reads recorded answers, with the scope
    incubate if any of them has it.

    Raises:
        AsdmError: no stage does, or they draw differently.
    """
    stages = recipe_stages(recipe, denoiser_of(pipeline), 1000) if stages is None else list(stages)
    reading = [stage for stage in stages if stage.teacher == "recorded"]
    if not reading:
        raise AsdmError(
            f"recipe={recipe}: none of its stages reads the teacher's features; choose small-gpu, or give a stage "
            "teacher: recorded"
        )
    for name in SAMPLING:
        found = {getattr(stage, name) for stage in reading}
        if len(found) > 1:
            raise AsdmError(f"recipe={recipe}: its stages with teacher: recorded differ in {name}; make them equal")
    incubating = [stage for stage in reading if stage.scope == "incubate"]
    return (incubating or reading)[0].model_copy(update={"batch_size": reading[0].batch_size})


@dataclass(frozen=True)
class RecordingSize:
    """How many draws are recorded, and the bytes of each at most."""

    draws: int
    each: int

    def missing(self, folder: Path) -> int:
        """Return how many of the draws are not in `folder`."""
        files = Draws(folder, "float32", ())
        return sum(not files.path(number).is_file() for number in range(self.draws))


def recording_size(pipeline: DiffusionPipeline, stage: Stage, dtype: FeatureDtype, draws: int) -> RecordingSize:
    """Return how many draws are recorded for a stage, and the bytes of each; computed without memory."""
    index = weightless_index(denoiser_of(pipeline), parameterization_of(pipeline.scheduler), stage, dtype)
    shapes = {name: (shape, getattr(torch, kind)) for name, (shape, kind) in index.shapes.items()}
    whole = -(-draws // stage.batch_size) * stage.batch_size
    return RecordingSize(whole, stored_bytes(shapes, Draws(Path(), dtype, index.reduced)))


def weightless_index(
    denoiser: Denoiser, parameterization: Parameterization, stage: Stage, dtype: FeatureDtype = "float16"
) -> FeatureIndex:
    """Return the index of what would be recorded for a stage, from a call on shapes without memory."""
    key = _key(stage, parameterization, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = weightless(denoiser)
        recorder = Recorder(teacher, parameterization, weightless_examples(teacher), stage, key, Path(), True)
        recorder.answers(torch.arange(stage.batch_size), torch.Generator(), BatchSlice(0, stage.batch_size))
    return recorder.index(0)


class Recorder(TeachingTask):
    """Makes the batches of a training and records the teacher's answers to them; there is no student."""

    def __init__(
        self,
        teacher: Denoiser,
        parameterization: Parameterization,
        examples: TrainingSet,
        stage: Stage,
        key: FeatureKey,
        folder: Path,
        may_be_nan: bool,
    ):
        live = {"teacher": "live", "trained": "all", "checkpointing": False}
        super().__init__(teacher, teacher, parameterization, examples, stage.model_copy(update=live))
        self.key, self.files, self.may_be_nan = key, Draws(folder, key.dtype, ()), may_be_nan
        self.blocks: dict[str, BlockRecord] = {}
        self.shapes: dict[str, tuple[list[int], str]] = {}

    def record(self, batch: int) -> None:
        """Write the draws of a batch that are missing; of the first batch in any case, for the index.

        Raises:
            AsdmError: the teacher's prediction is no number, or a feature is too large for float16.
        """
        size, rounds = self.stage.batch_size, self.stage.accumulation
        numbers = range(batch * size, (batch + 1) * size)
        if self.blocks and all(self.files.path(number).is_file() for number in numbers):
            return
        indices = ShuffledBatches(len(self.examples), size, self.key.seed)(batch)
        for part in (BatchSlice(number, rounds) for number in range(rounds)):
            # As in the training loop: the noise of a step depends on the seed and the step.
            generator = LoopSettings(steps=0, seed=self.key.seed).generator_at(batch)
            tensors = self.answers(indices, generator, part)
            if not (self.may_be_nan or tensors[PREDICTION].isfinite().all()):
                raise AsdmError(
                    "the teacher's prediction is no number (NaN): its weights are damaged, or its precision overflows; "
                    "load it in float32"
                )
            for row, number in enumerate(numbers[part.of(size)]):
                self.files.write(number, {name: tensor[row] for name, tensor in tensors.items()})

    def answers(self, indices: Tensor, generator: torch.Generator, part: BatchSlice) -> dict[str, Tensor]:
        """Return all tensors (batch, ...) of a part of a batch by name: what both networks read, what the teacher
        predicts, and its blocks' features or calls. A tensor that several blocks share is one."""
        noised = self.noised(indices, generator, part)
        family = family_of(self.teacher)
        paths = family.blocks(self.teacher)
        with calls_of(self.teacher, paths) as calls:
            prediction = self.teacher_pred(noised)
        named = _Named(_given(noised) | {PREDICTION: prediction.float()})
        for path in paths:
            features = named.name(family.block_io(self.teacher, path).image_states(calls[path][2]))
            about: dict[str, Any] = {}
            if self.key.inputs:
                leaves, structure = tree_flatten(calls[path])
                written = [{"tensor": named.name(leaf)} if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                about = {"structure": treespec_dumps(structure), "leaves": written}
            self.blocks[path] = BlockRecord(features=features, **about)
        self.shapes = {
            name: (list(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in named.tensors.items()
        }
        self.files = Draws(self.files.folder, self.key.dtype, self._reduced())
        return named.tensors

    def index(self, draws: int) -> FeatureIndex:
        """Return the index of so many draws."""
        return FeatureIndex(
            key=self.key, draws=draws, shapes=self.shapes, reduced=self._reduced(), blocks=dict(self.blocks)
        )

    def _reduced(self) -> list[str]:
        """Names of the features: what blocks read and put out, but for vectors such as the time embedding."""
        return [
            name
            for name, (shape, dtype) in self.shapes.items()
            if name.startswith(_Named.PREFIX) and len(shape) > 1 and getattr(torch, dtype).is_floating_point
        ]


class _Named:
    """Tensors of one batch by name; the same tensor has one name."""

    PREFIX = "feature-"

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.batch = len(tensors["noisy"])
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def name(self, tensor: Tensor) -> str:
        """Return a tensor's name; a new one where it has none."""
        if id(tensor) not in self._names:
            if tensor.shape[:1] != (self.batch,):
                raise AsdmError(
                    f"the teacher's blocks share a tensor {tuple(tensor.shape)} between images, which cannot be "
                    "recorded by image; choose teacher live"
                )
            name = f"{self.PREFIX}{len(self._names):03d}"
            self._names[id(tensor)] = name
            self.tensors[name] = tensor
        return self._names[id(tensor)]


def _given(noised: Noised) -> dict[str, Tensor]:
    """Return what both networks read."""
    captions: dict[str, Any] = {name: value for name, value in vars(noised.captions).items() if value is not None}
    return {
        "noisy": noised.noisy,
        "timesteps": noised.timesteps,
        "target": noised.target,
        **{CAPTIONS + name: value for name, value in captions.items()},
    }


def _claim(folder: Path, key: FeatureKey) -> None:
    """Write whose features are in a folder.

    Raises:
        AsdmError: they are others'.
    """
    path = folder / KEY
    if path.is_file():
        remedy = f"remove the folder {folder} and record again"
        found = read_record(FeatureKey, path, "the key of teacher features", remedy)
        changed = [name for name in FeatureKey.model_fields if getattr(found, name) != getattr(key, name)]
        if changed and any(folder.rglob("*.safetensors")):
            raise AsdmError(
                f"{folder}: features with other settings ({', '.join(changed)}); remove this folder, or prepare another"
            )
    write_text(path, key.model_dump_json(indent=1) + "\n")


def _finish(folder: Path, index: FeatureIndex) -> None:
    """Write the index; one that has more draws stays."""
    if not ((folder / INDEX).is_file() and read_index(folder).draws >= index.draws):
        write_text(folder / INDEX, index.model_dump_json() + "\n")
