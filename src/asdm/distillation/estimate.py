"""The cost of a recipe, before it is begun: a step of each stage runs on tensors that have shapes and no memory.

So operations are counted as they are, with the backward pass and checkpointing, and the memory that is needed at once
is known, for any device and any number of them, on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.distill import require_fit
from asdm.distillation.incubation import blocks_in_teacher
from asdm.distillation.lora import low_rank
from asdm.distillation.recorded import FeatureIndex
from asdm.distillation.recording import weightless_index
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import DistillationTask, make_task
from asdm.distillation.teaching import Batch
from asdm.distillation.weightless import WeightlessEncoder, weightless, weightless_examples
from asdm.families import Denoiser, denoiser_call, denoiser_of, family_of
from asdm.measure.latency import measure_interleaved
from asdm.measure.machine import fastest_precision
from asdm.measure.memory import peak_megabytes
from asdm.pipelines.derived import with_unet
from asdm.training.optimizers import OptimizerName, is_matrix
from asdm.training.sharding import gathered_layers
from asdm.training.task import BatchSlice, TrainingTask

FLOAT32 = 4  # bytes
QUICK = 0.5  # seconds
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class StageEstimate:
    """A stage's cost.

    `step_teraflops` are the floating-point operations of one step in all processes together, on average (two for each
    multiply-accumulate, in 10^12), `seconds` those of all its steps. `memory` is what each process holds at most, in
    bytes by part: the frozen `teacher`, the pipeline's other networks (`encoders`), none of which a stage holds that
    reads recorded answers; the `student`, or the blocks that are incubated from recorded calls; its `gradients` (and
    their buckets, where processes exchange them), the optimiser's `moments`, the weights' `average`; `activations`,
    with copies of the weights in half precision; and, when sharded, the layers `gathered` to compute.
    """

    stage: Stage
    trained_parameters: int
    step_teraflops: float
    seconds: float
    memory: dict[str, int]

    @property
    def gigabytes(self) -> float:
        return sum(self.memory.values()) / 1e9


def estimate(
    teacher: DiffusionPipeline,
    student: Denoiser,
    stages: Sequence[Stage],
    *,
    teraflops: float | None = None,
    processes: int = 1,
    sharded: bool = False,
    quick: bool = False,
) -> list[StageEstimate]:
    """Return estimates of each stage, without a semantic encoder other than the teacher and what devices exchange.

    Args:
        teraflops: what one device sustains, in 10^12 floating-point operations a second; by default what this one does
            in a call of the teacher's UNet, of as many samples as a round of a step has where one alone is quick.
        processes: how many share a step's batch.
        sharded: whether they share what is trained, too (FSDP).
        quick: measure what this device sustains in one call of each kind, as busy as it is now.

    Raises:
        AsdmError: teacher and student do not fit, or a stage is not possible with them.
    """
    require_fit(denoiser_of(teacher), student)
    rates: dict[tuple[torch.dtype | None, int], float] = {}
    rows = []
    for stage in stages:
        is_alone = stage.scope == "incubate"  # each process has blocks of its own, and the whole batch
        sharing = 1 if is_alone else processes
        part = BatchSlice(0, sharing * stage.accumulation)
        precision = _precision(stage, teacher.device if teraflops is None else None)
        samples = max(1, stage.batch_size // part.count)
        if (precision, samples) not in rates:
            rates[precision, samples] = (
                _measured_rate(denoiser_of(teacher), precision, samples, quick)
                if teraflops is None
                else 1e12 * teraflops
            )
        share = BatchSlice(0, processes) if is_alone else BatchSlice()
        cost = _stage_cost(teacher, student, stage, part, share, precision)
        others = (p for name, p in _parameters(teacher) if name != family_of(teacher).component)
        is_live = stage.teacher == "live"
        rows.append(
            StageEstimate(
                stage=stage,
                trained_parameters=sum(p.numel() for p in cost.trained),
                step_teraflops=cost.flops * stage.accumulation * processes / 1e12,
                seconds=stage.steps * cost.flops * stage.accumulation / rates[precision, samples],
                memory={
                    "teacher": _size(denoiser_of(teacher).parameters()) if is_live else 0,
                    "encoders": _size(others) if is_live else 0,
                    **_trained_memory(student, cost, stage, sharing, sharded and sharing > 1),
                    "activations": cost.activations,
                },
            )
        )
    return rows


@dataclass(frozen=True)
class _Cost:
    """The cost of a round of a step in one process: floating-point operations, bytes of activations and of the student
    as it is held, and the weights that are trained."""

    flops: float
    activations: int
    student: int
    trained: list[nn.Parameter]


def _stage_cost(
    teacher: DiffusionPipeline,
    student: Denoiser,
    stage: Stage,
    part: BatchSlice,
    share: BatchSlice,
    precision: torch.dtype | None,
) -> _Cost:
    """Run a round of the stage's step without memory; semantic losses count by how often they are computed."""
    index = None
    if stage.teacher == "recorded":
        index = weightless_index(denoiser_of(teacher), parameterization_of(teacher.scheduler), stage)
    whole = _size(student.parameters())
    # peft, which moves the weights that it makes, does so on the device meta.
    with (
        low_rank(weightless(student, "meta"), stage, precision) as changes,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        pipeline = with_unet(teacher, weightless(denoiser_of(teacher)))
        learning = weightless(student if changes is None else changes.student)
        with blocks_in_teacher(learning, denoiser_of(pipeline), stage.blocks_in_teacher):
            task = _weightless_task(pipeline, learning, stage, share, index)
            is_part = stage.trained == "lora" or stage.teacher == "recorded"
            held = _size(task.student.parameters()) if is_part else whole
            flops, activations = _round_cost(task, (torch.arange(stage.batch_size), 0), part, precision)
            if stage.semantics.every > 1:  # the first step has semantic losses, the second has none
                usual, _ = _round_cost(task, (torch.arange(stage.batch_size), 1), part, precision)
                flops = usual + (flops - usual) / stage.semantics.every
            return _Cost(flops, activations, held, list(task.trained().values()))


def _weightless_task(
    teacher: DiffusionPipeline, student: Denoiser, stage: Stage, share: BatchSlice, index: FeatureIndex | None
) -> Any:
    """Return the stage's task with shapes for its tensors, without a semantic encoder that would have to be loaded."""
    encoder = None if stage.semantics.encoder == "unet" else WeightlessEncoder()
    examples = weightless_examples(student, index)
    task = make_task(teacher, student, examples, stage, share, encoder)
    if isinstance(task, DistillationTask) and task.caption_sampler is not None:
        task.caption_sampler = replace(
            task.caption_sampler,
            texts=lambda count, _: [""] * count,
            embed=lambda texts: examples.prepared.batch(range(len(texts)))[1],
        )
    if stage.checkpointing:
        # There is no random state to keep; a backward pass leaves modes, so that of the norms is entered again.
        student.enable_gradient_checkpointing(
            partial(
                checkpoint,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), _NormsAsOnCuda()),
            )
        )
    return task


def _precision(stage: Stage, device: torch.device | None) -> torch.dtype | None:
    """Return the dtype of the stage's products on this device, or on one that is not here; None for float32."""
    name = stage.mixed_precision
    if name == "auto":
        name = "bf16" if device is None else fastest_precision(device)
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def _trained_memory(student: Denoiser, cost: _Cost, stage: Stage, processes: int, sharded: bool) -> dict[str, int]:
    """Bytes in each process of what its share of `processes` is, or of all where nothing is sharded."""
    parts, trained = processes if sharded else 1, cost.trained
    gradients = FLOAT32 * sum(p.numel() for p in trained)
    sizes = {
        "student": cost.student // parts,
        "gradients": gradients // parts if sharded or processes == 1 else 2 * gradients,
        "moments": sum(_moments(p, stage.optimizer) for p in trained) // parts,
        "average": gradients // parts if stage.ema_decay else 0,
    }
    if sharded:
        layers = [_size(layer.parameters()) for layer in gathered_layers(student)]
        outside = _size(student.parameters()) - sum(layers)
        # Weights and gradients of what is in no layer, of a layer, and of the next one.
        sizes["gathered"] = 2 * (outside + 2 * max(layers, default=0))
    return sizes


def _moments(parameter: nn.Parameter, optimizer: OptimizerName) -> int:
    """Bytes of an optimiser's state: two moments in float32; in 8 bits, a scale for each 256, where there are 4096 at
    least; with Muon one for a matrix."""
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= 4096:
        return 2 * (count + FLOAT32 * -(-count // 256))
    return FLOAT32 * count * (1 if optimizer == "muon" and is_matrix(parameter) else 2)


def _round_cost(task: TrainingTask, batch: Batch, part: BatchSlice, dtype: torch.dtype | None) -> tuple[float, int]:
    """Floating-point operations of a round of a step in one process, forward and backward, and the bytes of what lives
    at its peak, without the gradients. In a FakeTensorMode."""
    trained = task.trained().values()
    if not trained:  # there may be more processes than blocks
        return 0, 0
    for parameter in trained:  # gradients are counted apart
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    generator = torch.Generator()

    def one_round() -> None:
        with torch.enable_grad(), counter, _NormsAsOnCuda():
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                losses = task(batch, generator) if part.count == 1 else task(batch, generator, part)
            losses["loss"].backward()

    task.train()
    peak = peak_megabytes(one_round)
    return counter.get_total_flops(), round(1e6 * peak)


class _NormsAsOnCuda(TorchFunctionMode):
    """Norms in float32, as autocast has them on CUDA; shapes without memory are those of a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _measured_rate(denoiser: Denoiser, precision: torch.dtype | None, samples: int, quick: bool) -> float:
    """Floating-point operations a second in a call of the denoiser here, its products in this precision; with so many
    samples where one alone is quick, and does not fill the device."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter,
        torch.no_grad(),
    ):
        denoiser_call(weightless(denoiser), batch_size=1)()

    def rate(batch_size: int) -> float:
        with torch.autocast(denoiser.device.type, precision, enabled=precision is not None):
            call = denoiser_call(denoiser, batch_size)
            effort: dict[str, Any] = {"rounds": 1, "patience": 0.0} if quick else {"rounds": 3}
            times = measure_interleaved({"denoiser": call}, warmup=1, device=denoiser.device, **effort)
        return batch_size * counter.get_total_flops() / (times["denoiser"].ms / 1000)

    alone = rate(1)
    if samples == 1 or counter.get_total_flops() / alone > QUICK:
        return alone
    try:
        return rate(samples)
    except torch.OutOfMemoryError:  # the training may run out of it, too: whether it fits is the question
        return alone


def _parameters(pipeline: DiffusionPipeline) -> Iterable[tuple[str, nn.Parameter]]:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            yield from ((name, parameter) for parameter in part.parameters())


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
