"""A training that reads its teacher's answers from disk is the one beside the teacher, and holds less memory."""

import shutil
from collections import namedtuple

import pytest
import torch

from asdm import AsdmError, Stage, build_student, distill, prepare_data, record_teacher
from asdm.data import draws as draws_module
from asdm.distillation.estimate import estimate
from asdm.distillation.lora import low_rank
from asdm.distillation.recorded import FOLDER
from asdm.distillation.recording import recorded_stage, recording_size
from asdm.distillation.stages import LossWeights, parse_stages
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare
from asdm.measure.memory import peak_megabytes
from asdm.student.plan import PruningPlan
from conftest import tiny_pipeline, tiny_pixart_pipeline

REMOVED = ("down_blocks.1.resnets.1", "mid_block.resnets.1", "up_blocks.2.attentions.1")


def pruned(pipeline):
    edits = [{"edit": "remove", "unit": unit} for unit in REMOVED]
    return build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))


def stage(**changes):
    fields = {"name": "s", "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0, "caption_mixing": 0.5}
    return Stage(**{**fields, "mixed_precision": "no", **changes})


@pytest.fixture
def prepared(pipeline, data_folder, tmp_path):
    return prepare_data(pipeline, data_folder, tmp_path / "prepared").folder


def trained(pipeline, data, folder, chosen, student=None):
    """The losses of each step, and the student."""
    rows, student = [], student or pruned(pipeline)
    distill(pipeline, student, data, folder, stages=[chosen], progress=rows.append)
    return [row["loss"] for row in rows], student


@pytest.mark.parametrize("scope", ["joint", "incubate"])
def test_training_from_recorded_answers_is_the_live_one(pipeline, prepared, tmp_path, scope):
    """The whole student's bit for bit; of blocks, whose inputs lie otherwise in memory, but for rounding."""
    live = stage(scope=scope)
    recorded = live.model_copy(update={"teacher": "recorded"})
    losses, student = trained(pipeline, prepared, tmp_path / "live", live)
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-3), ("int8", 2e-2)):
        shutil.rmtree(prepared / FOLDER, ignore_errors=True)
        found = record_teacher(pipeline, prepared, stages=[recorded], draws=5, dtype=dtype)
        assert len(found) == 6  # whole batches
        again, other = trained(pipeline, prepared, tmp_path / dtype, recorded)
        if dtype == "float32" and scope == "joint":
            assert again == losses
            assert all(
                torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), student.parameters(), strict=True)
            )
        assert again == pytest.approx(losses, rel=tolerance, abs=0)


def test_blocks_of_a_transformer_are_recorded_too(data_folder, tmp_path):
    pipeline = tiny_pixart_pipeline()
    data = prepare_data(pipeline, data_folder, tmp_path / "prepared").folder
    unit = {"edit": "remove", "unit": "transformer_blocks.2.attn1"}
    plan = PruningPlan.for_unet(pipeline.transformer, [unit])
    for scope in ("joint", "incubate"):
        live = stage(scope=scope, steps=1)
        recorded = live.model_copy(update={"teacher": "recorded"})
        shutil.rmtree(data / FOLDER, ignore_errors=True)
        record_teacher(pipeline, data, stages=[recorded], draws=2, dtype="float32")
        losses = [
            trained(pipeline, data, tmp_path / f"{scope}-{each.teacher}", each,
                    build_student(pipeline.transformer, plan))[0]
            for each in (live, recorded)
        ]  # fmt: skip
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_is_trained_alone_is_on_the_device(pipeline, prepared):
    chosen = stage(scope="incubate", teacher="recorded", student_blocks=["mid_block"])
    record_teacher(pipeline, prepared, stages=[chosen], draws=2)
    examples = prepare(pipeline, prepared, prepared, recorded=True)
    student = pruned(pipeline)
    task = make_task(pipeline, student, examples, chosen)
    held = {name for name, _ in task.named_parameters()}
    assert held == {f"student.mid_block.{name}" for name, _ in student.mid_block.named_parameters()}
    assert set(task((torch.tensor([1, 0]), 0), torch.Generator())) == {"loss", "block/mid_block"}
    joint = make_task(pipeline, student, examples, stage(teacher="recorded"))
    assert {name for name, _ in joint.named_children()} == {"student"}
    with pytest.raises(AsdmError, match=r"student_blocks: up_blocks.0: cannot be incubated in this student; those are"):
        make_task(pipeline, student, examples, chosen.model_copy(update={"student_blocks": ["up_blocks.0"]}))


def test_recording_goes_on_where_it_stopped_and_more_draws_are_added(pipeline, prepared):
    chosen = stage(teacher="recorded")

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_teacher(pipeline, prepared, stages=[chosen], draws=8, progress=stop)
    with pytest.raises(AsdmError, match=r"no teacher features, or not all; run asdm prepare-data"):
        prepare(pipeline, prepared, prepared, recorded=True)
    files = sorted((prepared / FOLDER).rglob("*.safetensors"))
    assert len(files) == 4
    written = files[2].stat().st_mtime_ns
    assert len(record_teacher(pipeline, prepared, stages=[chosen], draws=8)) == 8
    assert files[2].stat().st_mtime_ns == written
    assert len(record_teacher(pipeline, prepared, stages=[chosen], draws=10)) == 10
    assert len(record_teacher(pipeline, prepared, stages=[chosen], draws=4)) == 10


def test_features_of_another_teacher_or_other_data_or_sampling_are_refused(pipeline, prepared, data_folder, tmp_path):
    chosen = stage(teacher="recorded")
    record_teacher(pipeline, prepared, stages=[chosen], draws=2)
    other = tiny_pipeline()
    with torch.no_grad():
        other.unet.conv_in.weight.neg_()
    with pytest.raises(AsdmError, match=r"recorded of another teacher; remove this folder"):
        distill(other, pruned(other), prepared, tmp_path / "run", stages=[chosen])
    with pytest.raises(AsdmError, match=r"features with other settings \(teacher\)"):
        record_teacher(other, prepared, stages=[chosen], draws=2)
    for changes, told in (
        ({"caption_mixing": 0.0}, "caption_mixing=0.0, and the teacher's features were recorded with 0.5"),
        ({"scope": "incubate"}, "the inputs of the teacher's blocks are not recorded"),
    ):
        with pytest.raises(AsdmError, match=told):
            distill(
                pipeline, pruned(pipeline), prepared, tmp_path / "run", stages=[stage(teacher="recorded", **changes)]
            )
    with pytest.raises(AsdmError, match=r"was not prepared; run asdm prepare-data MODEL .*--teacher-features"):
        distill(pipeline, pruned(pipeline), data_folder, tmp_path / "run", stages=[chosen])
    again = prepare_data(pipeline, data_folder, tmp_path / "again").folder
    piece = again / "00000.json"
    piece.write_text(piece.read_text().replace("image 0", "image 9"))
    shutil.copytree(prepared / FOLDER, again / FOLDER)
    with pytest.raises(AsdmError, match=r"recorded of another data; remove this folder"):
        distill(pipeline, pruned(pipeline), again, tmp_path / "run", stages=[chosen])


def test_a_damaged_draw_is_named(pipeline, prepared, tmp_path):
    chosen = stage(teacher="recorded")
    record_teacher(pipeline, prepared, stages=[chosen], draws=6)
    file = sorted((prepared / FOLDER).rglob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AsdmError, match=rf"{file.name}: damaged or missing .*run prepare-data again"):
        trained(pipeline, prepared, tmp_path / "run", chosen)
    file.unlink()
    record_teacher(pipeline, prepared, stages=[chosen], draws=6)
    assert len(trained(pipeline, prepared, tmp_path / "run", chosen)[0]) > 0
    (prepared / FOLDER / "index.json").write_text("{")
    with pytest.raises(AsdmError, match=r"index.json: not an index of teacher features"):
        prepare(pipeline, prepared, prepared, recorded=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_size_is_known_before_and_refused_where_the_disk_is_too_small(pipeline, prepared, monkeypatch, dtype):
    chosen = stage(teacher="recorded", scope="incubate")
    size = recording_size(pipeline, chosen, dtype, 3)
    assert size.draws == 4
    Usage = namedtuple("Usage", "total used free")
    free = draws_module.RESERVE + 3 * size.each
    monkeypatch.setattr(draws_module.shutil, "disk_usage", lambda _: Usage(0, 0, free))
    with pytest.raises(AsdmError, match=r"3 draws fit: give fewer --draws, or --teacher-features int8"):
        record_teacher(pipeline, prepared, stages=[chosen], draws=4, dtype=dtype)
    assert not list((prepared / FOLDER).rglob("*.safetensors"))
    record_teacher(pipeline, prepared, stages=[chosen], draws=2, dtype=dtype)
    written = max(file.stat().st_size for file in (prepared / FOLDER).rglob("*.safetensors"))
    assert 0.9 * size.each < written <= size.each


def test_features_too_large_for_float16_are_refused(pipeline, prepared):
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[1].conv2.bias.fill_(1e6)
    with pytest.raises(AsdmError, match=r"too large for float16; store them as int8"):
        record_teacher(pipeline, prepared, stages=[stage(teacher="recorded")], draws=2)
    assert len(record_teacher(pipeline, prepared, stages=[stage(teacher="recorded")], draws=2, dtype="int8")) == 2


def test_stages_that_need_the_teacher_itself_are_refused():
    for changes, told in (
        ({"scope": "consistency"}, "scope=consistency"),
        ({"guidance_scale": 3.0}, "guidance_scale=3.0"),
        ({"student_blocks": ["mid_block"]}, "student_blocks"),
        ({"losses": {"semantic": 1}}, "a semantic loss"),
    ):
        with pytest.raises(AsdmError, match=rf"{told}.* needs the teacher itself; choose teacher live"):
            parse_stages([{"name": "a", "steps": 1, "teacher": "recorded", **changes}])


def test_a_recipe_says_what_is_recorded(pipeline):
    assert recorded_stage(pipeline, "small-gpu").scope == "joint"
    both = [stage(teacher="recorded"), stage(name="b", teacher="recorded", scope="incubate")]
    assert recorded_stage(pipeline, "x", both).scope == "incubate"
    with pytest.raises(AsdmError, match="none of its stages reads the teacher's features"):
        recorded_stage(pipeline, "joint")
    with pytest.raises(AsdmError, match="differ in caption_dropout"):
        recorded_stage(pipeline, "x", [both[0], stage(name="b", teacher="recorded", caption_dropout=0.9)])


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 1.12),
        pytest.param({"trained": "lora", "checkpointing": True, "mixed_precision": "bf16"}, 2, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_step_is_estimated_as_it_is_or_higher(pipeline, prepared, changes, most):
    chosen = stage(teacher="recorded", **changes)
    student = pruned(pipeline)
    record_teacher(pipeline, prepared, stages=[chosen], draws=2)
    examples = prepare(pipeline, prepared, prepared, recorded=True)
    row = estimate(pipeline, student, [chosen], teraflops=1.0)[0]
    dtype = torch.bfloat16 if changes else None
    with low_rank(student, chosen, dtype):
        task = make_task(pipeline, student, examples, chosen)
        assert row.memory["teacher"] == row.memory["encoders"] == 0
        assert row.memory["student"] == sum(p.nbytes for p in task.parameters())
        for parameter in task.trained().values():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def step():
            with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                losses = task((torch.arange(2), 0), torch.Generator())
            losses["loss"].backward()

        task.train()
        measured = 1e6 * peak_megabytes(step)
        assert 0.88 * measured < row.memory["activations"] < most * measured


def test_weights_of_losses_still_count(pipeline, prepared, tmp_path):
    chosen = stage(teacher="recorded", steps=1, losses=LossWeights(task=0, output=0, feature=1))
    record_teacher(pipeline, prepared, stages=[chosen], draws=2)
    assert trained(pipeline, prepared, tmp_path / "run", chosen)[0][0] > 0
