"""Blocks learn alone inside the teacher, are put together, and mean what the teacher's images mean."""

import json
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPConfig, CLIPModel, ConvNextConfig, ConvNextModel, ViTConfig, ViTModel

from asdm import (
    AsdmError,
    AsdmUNet2DConditionModel,
    PruningPlan,
    Stage,
    build_student,
    distill,
    prepare_data,
    record_teacher,
)
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.estimate import estimate
from asdm.distillation.incubation import blocks_in_teacher, groups_of, incubated_blocks, set_trainable
from asdm.distillation.losses import _TERMS, loss_term, semantic_loss, squared_error
from asdm.distillation.recipes import RECIPES, as_yaml, recipe_stages
from asdm.distillation.semantics import _ENCODERS, DenoiserEncoder, VisionEncoder, register_encoder
from asdm.distillation.stages import LossWeights, Semantics, parse_stages
from asdm.distillation.tasks import DistillationTask, IncubationTask, make_task
from asdm.distillation.teaching import WHOLE
from asdm.distillation.training_set import prepare
from asdm.families import BlockIO, denoiser_call
from asdm.measure.hooks import outputs_of
from asdm.training.task import BatchSlice
from conftest import predict, tiny_pipeline, tiny_vae

REMOVED = ("down_blocks.1.resnets.1", "mid_block.resnets.1", "up_blocks.2.attentions.1")


def pruned(unet, *units):
    return build_student(
        unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit} for unit in units or REMOVED])
    )


def stage(**changes):
    return Stage(**{"name": "s", "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0, **changes})


@pytest.fixture
def examples(pipeline, data_folder, tmp_path):
    return prepare(pipeline, data_folder, tmp_path / "prepared")


def losses_of(pipeline, student, examples, chosen, step=0, seed=0):
    torch.manual_seed(0)
    task = make_task(pipeline, student, examples, chosen)
    indices = torch.arange(chosen.batch_size)
    losses = task((indices, step), torch.Generator().manual_seed(seed))
    losses["loss"].backward()
    return task, {name: float(value.detach()) for name, value in losses.items()}


def test_incubation_trains_each_edited_block_and_nothing_else(pipeline, examples):
    student = pruned(pipeline.unet)
    task, losses = losses_of(pipeline, student, examples, stage(scope="incubate"))
    assert isinstance(task, IncubationTask)
    assert set(losses) == {"loss", "block/down_blocks.1", "block/mid_block", "block/up_blocks.2"}
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in losses if name != "loss"))
    moved = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved and all(name.startswith(("down_blocks.1.", "mid_block.", "up_blocks.2.")) for name in moved)


def test_a_block_that_is_the_teachers_has_nothing_to_learn(pipeline, examples):
    _, losses = losses_of(pipeline, pruned(pipeline.unet), examples, stage(scope="incubate"))
    assert all(value > 1e-4 for value in losses.values())
    # An edit that changes nothing: attention of one region and no pooling.
    unit = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    edit = {"edit": "gri_attention", "unit": unit, "regions": 1, "pool": 0}
    same = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [edit]))
    _, losses = losses_of(pipeline, same, examples, stage(scope="incubate"))
    assert losses["block/down_blocks.0"] < 1e-10


def test_incubated_blocks_learn(pipeline, data_folder, tmp_path):
    student = pruned(pipeline.unet)
    rows = []
    chosen = stage(scope="incubate", steps=30, batch_size=4)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[chosen], progress=rows.append)
    assert sum(row["loss"] for row in rows[-5:]) < 0.8 * sum(row["loss"] for row in rows[:5])


def test_a_compensated_mid_block_is_incubated_as_others(pipeline, data_folder, tmp_path):
    edits = [{"edit": "remove", "unit": "mid_block", "compensate": "linear"}]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    before = {name: p.clone() for name, p in student.named_parameters()}
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[stage(scope="incubate")])
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("mid_block.compensation.") for name in moved)


def test_blocks_are_assembled_of_what_was_loaded_from_disk(pipeline, tmp_path):
    pruned(pipeline.unet).save_pretrained(tmp_path)
    student = AsdmUNet2DConditionModel.from_pretrained(tmp_path)
    assert isinstance(student.config.block_out_channels, list)  # and the teacher's is a tuple
    with blocks_in_teacher(student, pipeline.unet, []):
        assert torch.equal(predict(student), predict(pipeline.unet))
    short = build_student(
        pipeline.unet, PruningPlan.for_unet(pipeline.unet, [{"edit": "drop_layers", "layers_per_block": 1}])
    )
    with pytest.raises(AsdmError, match="blocks are not its teacher's"), blocks_in_teacher(short, pipeline.unet, []):
        pass


def test_the_teachers_blocks_stand_in_for_those_not_assembled_yet(pipeline):
    unet, student = pipeline.unet, pruned(pipeline.unet)
    alone, own = predict(student), student.mid_block
    with blocks_in_teacher(student, unet, []):
        assert torch.equal(predict(student), predict(unet))
    with blocks_in_teacher(student, unet, ["mid_block", "up_blocks.0"]):
        assert torch.equal(predict(student), predict(pruned(unet, "mid_block.resnets.1")))
    assert student.mid_block is own and torch.equal(predict(student), alone)
    with (
        pytest.raises(AsdmError, match=r"mid_blok: no such block; they are .*mid_block"),
        blocks_in_teacher(student, unet, ["mid_blok"]),
    ):
        pass


def test_what_goes_with_the_innermost_stage_is_one_group(pipeline):
    student = pruned(pipeline.unet, "down_blocks.3", "mid_block", "up_blocks.2.resnets.1")
    together = ["down_blocks.2", "down_blocks.3", "up_blocks.0"]
    assert groups_of(student) == [["mid_block"], ["up_blocks.2"], together]
    assert incubated_blocks(student) == ["mid_block", "up_blocks.2"]
    with (
        pytest.raises(AsdmError, match="go together in this student"),
        blocks_in_teacher(student, pipeline.unet, ["down_blocks.2"]),
    ):
        pass
    with blocks_in_teacher(student, pipeline.unet, together):
        predict(student)


def test_an_assembly_trains_its_own_blocks_and_leaves_the_teacher(pipeline, data_folder, tmp_path):
    student, teacher = pruned(pipeline.unet), pipeline.unet
    before = {name: p.clone() for name, p in student.named_parameters()}
    theirs = {name: p.clone() for name, p in teacher.named_parameters()}
    chosen = stage(student_blocks=["down_blocks.1"], steps=2)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[chosen])
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("down_blocks.1.") for name in moved)
    assert not any(name.startswith(("mid_block.", "up_blocks.", "down_blocks.0.")) for name in moved)
    assert all(torch.equal(p, theirs[name]) for name, p in teacher.named_parameters())


def test_routers_are_trained_alone(pipeline):
    bank = {"edit": "cond_conv", "unit": "up_blocks.3.resnets.0.conv2", "experts": ["up_blocks.3.resnets.1.conv2"]}
    edits = [{"edit": "remove", "unit": "down_blocks.1.resnets.1"}, bank]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    set_trainable(student, "routers")
    routers = [name for name, p in student.named_parameters() if p.requires_grad]
    assert routers == [f"up_blocks.3.resnets.0.conv2.router.{kind}" for kind in ("weight", "bias")]
    set_trainable(student, "all")
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(AsdmError, match="trained=routers: this student has none"):
        set_trainable(pruned(pipeline.unet), "routers")


def test_a_router_that_reads_the_prompt_is_incubated_on_the_prompts_that_its_block_gets(pipeline, examples):
    bank = {"edit": "cond_conv", "unit": "up_blocks.3.resnets.0.conv2", "experts": ["up_blocks.3.resnets.1.conv2"]}
    edits = [{"edit": "remove", "unit": "up_blocks.3.resnets.1"}, bank | {"router": "prompt"}]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    losses_of(pipeline, student, examples, stage(scope="incubate", caption_dropout=0))
    gradient = student.get_submodule("up_blocks.3.resnets.0.conv2.router").weight.grad
    assert gradient.abs().sum() > 0
    with blocks_in_teacher(student, pipeline.unet, ["up_blocks.3"]):
        predict(student)


def test_semantic_loss_is_the_weighted_distance_of_directions():
    mine, theirs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    assert semantic_loss(mine, theirs, torch.tensor([1.0, 1.0])) == pytest.approx(1.0)
    assert semantic_loss(mine, theirs, torch.tensor([1.0, 0.0])) == pytest.approx(0.0)
    assert semantic_loss(mine[1:], theirs[1:], torch.tensor([0.2])) == pytest.approx(0.4)


def test_weights_of_samples_scale_their_errors():
    error = squared_error(torch.ones(2, 3), torch.tensor([[0.0] * 3, [3.0] * 3]), torch.tensor([1.5, 0.5]))
    assert error == pytest.approx((1.5 * 1 + 0.5 * 4) / 2)


def test_weights_by_time_step_count_in_batches_of_one(pipeline, examples):
    def output_loss(seed, **changes):
        chosen = stage(batch_size=1, **changes)
        return losses_of(pipeline, pruned(pipeline.unet), examples, chosen, seed=seed)[1]["output"]

    by_snr = [output_loss(seed, min_snr_gamma=1.0) / output_loss(seed) for seed in range(4)]
    assert max(by_snr) > 1.1 * min(by_snr)
    chosen = stage(min_snr_gamma=1.0)
    task = make_task(pipeline, pruned(pipeline.unet), examples, chosen)
    assert task.snr_weights(torch.arange(1000)).mean() == pytest.approx(1, abs=0.01)


def encoders(pipeline):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(pipeline.tokenizer), "max_position_embeddings": pipeline.tokenizer.model_max_length}
    text |= {"eos_token_id": pipeline.tokenizer.eos_token_id}
    vision = {"image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8))
    vit = ViTModel(ViTConfig(**size, **vision))
    convolutional = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]))
    return {
        "unet": DenoiserEncoder(pipeline.unet, parameterization_of(pipeline.scheduler)),
        "clip": VisionEncoder(clip, tiny_vae().requires_grad_(False), pipeline.tokenizer),
        "vit": VisionEncoder(vit, tiny_vae().requires_grad_(False)),
        "convnext": VisionEncoder(convolutional, tiny_vae().requires_grad_(False), size=32),
    }


@pytest.mark.parametrize("name", ["unet", "clip", "vit", "convnext"])
def test_encoders_tell_latents_apart_and_pass_gradients(pipeline, examples, name):
    encoder = encoders(pipeline)[name]
    pipeline.unet.requires_grad_(False)
    latents, captions = examples.prepared.batch([0, 1])
    latents.requires_grad_(True)
    features = encoder(latents, captions)
    assert features.shape[0] == 2 and features.ndim == 2 and torch.equal(features, encoder(latents, captions))
    assert not torch.allclose(features[0], features[1])
    features.square().sum().backward()
    assert latents.grad.abs().sum() > 0
    texts = encoder.text_features(["a fish", "a fish", "a dog"])
    if name == "clip":
        assert texts.shape == (3, features.shape[1])
        assert torch.equal(texts[0], texts[1]) and not torch.allclose(texts[0], texts[2])
    else:
        assert texts is None


def test_semantic_terms_are_in_the_loss_at_every_kth_step(pipeline, examples):
    weights = LossWeights(semantic=0.5)
    chosen = stage(losses=weights, semantics=Semantics(every=2))
    _, with_it = losses_of(pipeline, pruned(pipeline.unet), examples, chosen, step=0)
    _, without = losses_of(pipeline, pruned(pipeline.unet), examples, chosen, step=1)
    assert with_it["semantic"] > 0 and "semantic" not in without
    assert with_it["loss"] - without["loss"] == pytest.approx(0.5 * with_it["semantic"], rel=1e-4)
    assert with_it["weighted/semantic"] == pytest.approx(0.5 * with_it["semantic"])
    _, same = losses_of(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet)), examples, chosen)
    assert same["semantic"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(AsdmError, match="the encoder unet has no text tower"):
        losses_of(pipeline, pruned(pipeline.unet), examples, stage(losses=LossWeights(semantic_text=1)))
    task = DistillationTask(
        pipeline.unet, pruned(pipeline.unet), parameterization_of(pipeline.scheduler), examples,
        stage(losses=LossWeights(semantic_text=1)), encoders(pipeline)["clip"],
    )  # fmt: skip
    losses = task((torch.tensor([0, 1]), 0), torch.Generator().manual_seed(0))
    assert 0 < losses["semantic_text"] < 2 and losses["loss"] > losses["weighted/semantic_text"]


def test_an_encoder_of_another_package_is_named_in_a_stage(pipeline, examples, monkeypatch):
    monkeypatch.setattr("asdm.distillation.semantics._ENCODERS", dict(_ENCODERS))

    @register_encoder("mean_colour")
    class MeanColour:
        def __init__(self, pipeline):
            self.pipeline = pipeline

        def __call__(self, latents, captions):
            return latents.mean(dim=(2, 3))

        def text_features(self, prompts):
            return None

    chosen = stage(losses=LossWeights(semantic=0.5), semantics=Semantics(encoder="mean_colour"))
    task, losses = losses_of(pipeline, pruned(pipeline.unet), examples, chosen)
    assert losses["semantic"] > 0 and isinstance(task.encoder, MeanColour) and task.encoder.pipeline is pipeline


def test_plain_losses_are_mean_squared_errors(pipeline, examples):
    _, relative = losses_of(pipeline, pruned(pipeline.unet), examples, stage())
    _, plain = losses_of(pipeline, pruned(pipeline.unet), examples, stage(relative=False))
    ratios = [plain[name] / relative[name] for name in plain if name.startswith("feature/") and relative[name] > 0]
    assert max(ratios) / min(ratios) > 2  # the blocks' powers differ
    assert plain["loss"] == pytest.approx(plain["task"] + plain["output"] + plain["feature"], rel=1e-5)


def test_features_count_by_the_size_of_their_maps(pipeline, examples):
    alike, by_area = (
        losses_of(pipeline, pruned(pipeline.unet), examples, stage(feature_weighting=kind))[1]
        for kind in ("block", "spatial")
    )
    blocks = [name for name in alike if name.startswith("feature/")]
    assert alike["feature"] == pytest.approx(sum(alike[name] for name in blocks) / len(blocks), rel=1e-5)
    with outputs_of(pipeline.unet, [name.partition("/")[2] for name in blocks]) as outputs:
        denoiser_call(pipeline.unet)()
    io = BlockIO()
    areas = {f"feature/{name}": io.image_states(output).shape[2:].numel() for name, output in outputs.items()}
    assert len(set(areas.values())) > 1
    expected = sum(areas[name] * by_area[name] for name in blocks) / sum(areas.values())
    assert by_area["feature"] == pytest.approx(expected, rel=1e-5)
    assert by_area["feature"] != pytest.approx(alike["feature"], rel=1e-2)


def test_time_steps_by_angle_are_even_on_the_samplers_path(pipeline):
    parameterization = parameterization_of(pipeline.scheduler)
    drawn = parameterization.sample_timesteps(1000, torch.Generator().manual_seed(0), "uniform_angle")
    angles = parameterization.signal_power(torch.arange(1000)).sqrt().acos()
    found = angles[drawn].sort().values
    even = torch.linspace(0, float(angles[-1]), 1000)
    assert (found - even).abs().max() < 0.05  # the schedule's first angle is 0.03
    task = make_task(pipeline, pruned(pipeline.unet), None, stage(timestep_sampling="uniform_angle"))
    assert torch.equal(task.timesteps(1000, torch.Generator().manual_seed(0)), drawn)


@pytest.mark.parametrize("density", ["uniform", "uniform_angle"])
def test_a_student_that_draws_above_a_time_step_alone_is_not_trained_below_it(pipeline, density):
    def drawn(above):
        fields = {"timestep_sampling": density, "min_timestep_fraction": above}
        task = make_task(pipeline, pruned(pipeline.unet), None, stage(**fields))
        return task.timesteps(1000, torch.Generator().manual_seed(0)).sort().values

    whole, part = drawn(0.0), drawn(0.34)
    assert whole[0] < 5
    assert 340 <= part[0] < 345
    assert part[-1] >= 995
    assert drawn(0.9999).unique().tolist() == [999]  # the last time step is left, however little is
    above = whole[whole >= 340]
    same_share = above[torch.linspace(0, len(above) - 1, 1000).long()]
    assert (part - same_share).abs().max() < 10  # as dense there as before, relative to each other


def test_guided_output_distillation_compares_guided_predictions(pipeline, examples):
    student = pruned(pipeline.unet)
    _, plain = losses_of(pipeline, student, examples, stage(caption_dropout=0))
    _, one = losses_of(pipeline, student, examples, stage(caption_dropout=0, guidance_scale=1.0))
    _, strong = losses_of(pipeline, student, examples, stage(caption_dropout=0, guidance_scale=5.0))
    assert one["output"] == pytest.approx(plain["output"], rel=1e-4)  # scale 1 is no guidance
    assert not math.isclose(strong["output"], plain["output"], rel_tol=1e-2)


def test_a_spliced_caption_is_its_own_up_to_a_token_and_another_behind(pipeline, examples):
    task = make_task(
        pipeline,
        pruned(pipeline.unet),
        examples,
        stage(caption_dropout=0, caption_mixing=1),
    )
    indices = torch.arange(4)
    found = task.noised(indices, torch.Generator().manual_seed(0), WHOLE).captions.encoder_hidden_states
    captions = examples.prepared.batch(indices)[1].encoder_hidden_states
    assert not torch.equal(found, captions)
    for own, mixed in zip(captions, found, strict=True):
        place = int((own == mixed).all(1).int().cumprod(0).sum())  # the tokens that are its own
        assert place >= 1
        assert any(torch.equal(mixed[place:], other[place:]) for other in captions)
    halves = [task.noised(indices, torch.Generator().manual_seed(0), BatchSlice(i, 2)).captions for i in range(2)]
    assert torch.equal(torch.cat([half.encoder_hidden_states for half in halves]), found)  # however it is parted


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_data_that_run_and_survive_their_file(pipeline, data_folder, tmp_path, recipe):
    student = pruned(pipeline.unet)
    stages = recipe_stages(recipe, student, 2000)
    assert sum(stage.steps for stage in stages) == 2000
    (tmp_path / "recipe.yaml").write_text(as_yaml(stages))
    assert recipe_stages(tmp_path / "recipe.yaml", student, 1) == stages
    short = [s.model_copy(update={"steps": 1, "batch_size": 2}) for s in stages]
    data = data_folder
    if any(s.teacher == "recorded" for s in short):
        data = prepare_data(pipeline, data_folder, tmp_path / "prepared").folder
        record_teacher(pipeline, data, stages=short, draws=2)
    distill(pipeline, student, data, tmp_path / "run", stages=short)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    if recipe == "incubation":
        assert [s.name for s in stages] == ["incubate", "assemble-1", "assemble-2", "joint"]
        assert stages[1].student_blocks == [
            name for name in ("down_blocks.0", "down_blocks.2", "down_blocks.3", "up_blocks.0", "up_blocks.1",
                              "up_blocks.3", "down_blocks.1")
        ]  # fmt: skip
        assert stages[-1].losses.semantic > 0
        few = recipe_stages(recipe, student, 20)  # too few to assemble group by group
        assert [(s.name, s.steps) for s in few] == [("incubate", 1), ("joint", 19)]


def test_wrong_recipes_are_told_in_one_line(pipeline, tmp_path):
    student = pruned(pipeline.unet)
    (tmp_path / "bad.yaml").write_text("- name: [")
    (tmp_path / "odd.yaml").write_text("- {name: a, steps: 3, scope: consistency, student_blocks: [mid_block]}")
    for recipe, message in (
        ("incubate", "incubate: no such recipe; it is joint, bk-sdm, incubation, small-gpu, lcm or a YAML file"),
        (tmp_path / "bad.yaml", "not a list of stages in YAML"),
        (tmp_path / "odd.yaml", "student_blocks goes with scope joint"),
    ):
        with pytest.raises(AsdmError, match=message) as error:
            recipe_stages(recipe, student, 10)
        assert "\n" not in str(error.value)
    with pytest.raises(AsdmError, match="nothing to incubate"):
        plain = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
        losses_of(pipeline, plain, None, stage(scope="incubate"))


OLD_STAGE = {
    "name": "s",
    "steps": 1,
    "batch_size": 2,
    "ema_decay": 0,
    "features_by": "area",
    "timesteps": "angle",
    "assembled": ["mid_block"],
    "caption_splice": 0.5,
    "timesteps_above": 0.2,
}


def test_recipes_of_version_0_1_still_load(pipeline, tmp_path):
    (tmp_path / "old.yaml").write_text(json.dumps([OLD_STAGE, {"name": "t", "steps": 1, "features_by": "block"}]))
    first, second = recipe_stages(tmp_path / "old.yaml", pipeline.unet, 1)
    assert (first.feature_weighting, first.timestep_sampling) == ("spatial", "uniform_angle")
    assert (first.student_blocks, first.caption_mixing, first.min_timestep_fraction) == (["mid_block"], 0.5, 0.2)
    assert (second.feature_weighting, second.timestep_sampling) == ("block", "uniform")
    (tmp_path / "odd.yaml").write_text("[{name: a, steps: 1, trained: neighbours}]")
    with pytest.raises(AsdmError, match="trained='neighbours': input should be 'all', 'routers' or 'lora'"):
        recipe_stages(tmp_path / "odd.yaml", pipeline.unet, 1)


def test_a_run_of_version_0_1_goes_on(pipeline, data_folder, tmp_path):
    stages = parse_stages([OLD_STAGE])
    distill(pipeline, pruned(pipeline.unet), data_folder, tmp_path / "run", stages=stages)
    record = tmp_path / "run" / "00-s" / "run.json"
    known = json.loads(record.read_text())
    present = ("feature_weighting", "timestep_sampling", "student_blocks", "caption_mixing", "min_timestep_fraction")
    known = {name: value for name, value in known.items() if name not in present}
    record.write_text(json.dumps(known | {name: value for name, value in OLD_STAGE.items() if name not in known}))
    rows = []
    longer = parse_stages([{**OLD_STAGE, "steps": 2}])
    student = pruned(pipeline.unet)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=longer, progress=rows.append)
    assert [row["step"] for row in rows] == [2]
    with pytest.raises(AsdmError, match=r"begun with other settings \(feature_weighting\)"):
        other = parse_stages([{**OLD_STAGE, "steps": 2, "features_by": "block"}])
        distill(pipeline, pruned(pipeline.unet), data_folder, tmp_path / "run", stages=other)


def test_a_new_loss_is_one_registered_function(pipeline, examples, monkeypatch):
    monkeypatch.setattr("asdm.distillation.losses._TERMS", dict(_TERMS))

    @loss_term("bias")
    def bias(comparison):
        return (comparison.noise_pred - comparison.teacher_pred).mean().abs()

    assert LossWeights().bias == 0
    _, losses = losses_of(pipeline, pruned(pipeline.unet), examples, stage(losses={"bias": 2}))
    assert losses["weighted/bias"] == pytest.approx(2 * losses["bias"]) and losses["bias"] > 0
    assert losses["loss"] == pytest.approx(
        sum(value for name, value in losses.items() if name.startswith("weighted/")), rel=1e-5
    )
    with pytest.raises(AsdmError, match=r"not a stage: losses.byas: no such loss; they are task, .*bias"):
        parse_stages([{"name": "a", "steps": 1, "losses": {"byas": 1}}])


def test_a_student_learns_from_a_teacher_of_flow_matching(pipeline, data_folder, tmp_path):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    student = pruned(pipeline.unet)
    rows = []
    chosen = stage(steps=40, batch_size=4, learning_rate=3e-3, min_snr_gamma=5.0, timestep_sampling="uniform_angle")
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[chosen], progress=rows.append)
    assert sum(row["output"] for row in rows[-10:]) < 0.9 * sum(row["output"] for row in rows[:10])
    assert json.loads((tmp_path / "run" / "00-s" / "run.json").read_text())["predicts"] == "flow, shifted by 3"
    with pytest.raises(AsdmError, match="the teacher predicts flow, shifted by 3; use scope joint"):
        make_task(pipeline, student, None, stage(scope="consistency"))


@pytest.mark.slow
def test_an_estimate_counts_what_moves_and_changes_nothing():
    pipeline = tiny_pipeline()
    student = pruned(pipeline.unet)
    student.requires_grad_(False)
    stages = parse_stages(
        [
            {"name": "a", "steps": 10, "scope": "incubate"},
            {"name": "b", "steps": 10, "student_blocks": ["mid_block"]},
            {"name": "c", "steps": 20, "ema_decay": 0.0},
        ]
    )
    rows = estimate(pipeline, student, stages)
    size = {name: sum(p.numel() for p in block.parameters()) for name, block in student.named_children()}
    blocks = [student.get_submodule(name) for name in ("down_blocks.1", "mid_block", "up_blocks.2")]
    assert rows[0].trained_parameters == sum(p.numel() for block in blocks for p in block.parameters())
    outside = sum(size[name] for name in ("conv_in", "time_embedding", "conv_norm_out", "conv_out"))
    assert rows[1].trained_parameters == size["mid_block"] + outside
    assert rows[2].trained_parameters == sum(p.numel() for p in student.parameters())
    assert rows[2].seconds > 2 * rows[1].seconds > 0  # what is not trained needs no gradient
    assert not any(p.requires_grad for p in student.parameters())
