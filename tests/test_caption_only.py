"""Supervision on captions without an image: which captions, the latents they are compared at, the losses."""

import json
import random

import pytest
import torch

from asdm import AsdmError, PruningPlan, Stage, build_student, distill
from asdm.data.examples import Example
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.caption_only import make_caption_sampler, read_captions, spliced, trajectory
from asdm.distillation.estimate import estimate
from asdm.distillation.recipes import recipe_stages, with_captions
from asdm.distillation.run import require_launchable
from asdm.distillation.semantics import VisionEncoder
from asdm.distillation.stages import CaptionOnly, LossWeights, Semantics
from asdm.distillation.tasks import DistillationTask, make_task
from asdm.distillation.teaching import WHOLE
from asdm.distillation.training_set import prepare
from asdm.training.task import BatchSlice
from conftest import tiny_vae

EVERY_CAPTION = LossWeights(caption_output=1.0, caption_semantic=0.5)


def pruned(unet, *units):
    units = units or ("down_blocks.1.resnets.1",)
    return build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit} for unit in units]))


def stage(**changes):
    fields = {"name": "s", "steps": 1, "batch_size": 4, "ema_decay": 0, "losses": EVERY_CAPTION}
    return Stage(**{**fields, "caption_only": CaptionOnly(share=0.5, sampling_steps=2), **changes})


@pytest.fixture
def examples(pipeline, data_folder, tmp_path):
    return prepare(pipeline, data_folder, tmp_path / "prepared")


def losses_of(task, step=0, part=WHOLE):
    losses = task((torch.arange(task.stage.batch_size), step), torch.Generator().manual_seed(0), part)
    return {name: float(value.detach()) for name, value in losses.items()}


def test_a_splice_has_the_beginning_of_one_caption_and_the_end_of_another():
    assert spliced("rabbit, flat", "truck, line", random.Random(0)) == "rabbit, line"
    found = {spliced("a red cat", "the blue dog runs", random.Random(seed)) for seed in range(30)}
    assert {"a red runs", "a blue dog runs"} <= found and not any("the" in text for text in found)
    assert spliced("cat", "dog", random.Random(0)) == "cat dog"


def test_a_file_of_captions_is_read_line_by_line(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a fish\n\n  two   birds \n")
    assert read_captions(path) == ["a fish", "two birds"]
    path.write_text("\n")
    with pytest.raises(AsdmError, match=r"captions.txt: has no caption; write one a line"):
        read_captions(path)
    with pytest.raises(AsdmError, match=r"captions without images are a .txt file"):
        read_captions(tmp_path)
    with pytest.raises(AsdmError, match=r"gone.txt"):
        read_captions(tmp_path / "gone.txt")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_solver_follows_the_teachers_estimate(pipeline, steps):
    parameterization = parameterization_of(pipeline.scheduler)
    original, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    timesteps, visited = torch.tensor([10, 700]), []

    def predict(noisy, here):
        visited.append(here.tolist())
        power = parameterization.signal_power(here).view(-1, 1, 1, 1)
        return (noisy - power.sqrt() * original) / (1 - power).sqrt()

    noisy = trajectory(parameterization, predict, noise, timesteps, steps)
    estimate_there = parameterization.to_x0(predict(noisy, timesteps), noisy, timesteps)
    assert torch.allclose(estimate_there, original, atol=1e-3)
    assert visited[0] == [999, 999] and len(visited) == steps + 1
    # The end of the schedule is not quite noise, hence the noise that the estimate implies is not quite it.
    end = parameterization.signal_power(torch.tensor([999]))
    implied = (noise - end.sqrt() * original) / (1 - end).sqrt()
    assert torch.allclose(noisy, parameterization.add_noise(original, implied, timesteps), atol=1e-4)


def test_no_step_leaves_the_noise_of_the_end(pipeline, examples):
    task = make_task(pipeline, pruned(pipeline.unet), examples, stage(caption_only=CaptionOnly(sampling_steps=0)))
    noised = task._noised_captions(task.caption_sampler, ["x"], [0], 4, torch.Generator().manual_seed(0))
    assert noised.timesteps.tolist() == [999]
    assert noised.noisy.std() == pytest.approx(1, abs=0.15)


def test_terms_are_logged_and_weighed_at_every_kth_step(pipeline, examples):
    chosen = stage(losses=LossWeights(caption_output=1.0, caption_semantic=0.5), semantics=Semantics(every=2))
    task = make_task(pipeline, pruned(pipeline.unet), examples, chosen)
    with_it, without = losses_of(task), losses_of(task, step=1)
    assert not any("caption" in name or "semantic" in name for name in without)
    assert "semantic" not in with_it  # which has no weight and would cost another call of the teacher
    extra = with_it["caption_output"] + 0.5 * with_it["caption_semantic"]
    assert with_it["caption_output"] > 0 and with_it["caption_semantic"] > 0
    assert with_it["loss"] - without["loss"] == pytest.approx(extra, rel=1e-3, abs=1e-6)
    assert with_it["weighted/caption_semantic"] == pytest.approx(0.5 * with_it["caption_semantic"])


def test_gradients_flow_and_the_teacher_has_no_loss(pipeline, examples):
    alone = LossWeights(task=0, output=0, feature=0, caption_semantic=1.0)
    student = pruned(pipeline.unet)
    task = make_task(pipeline, student, examples, stage(losses=alone))
    task((torch.arange(4), 0), torch.Generator().manual_seed(0))["loss"].backward()
    assert student.conv_in.weight.grad.abs().sum() > 0
    assert pipeline.unet.conv_in.weight.grad is None
    same = make_task(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet)), examples, stage())
    found = losses_of(same)
    assert found["caption_output"] == pytest.approx(0, abs=1e-6)
    assert found["caption_semantic"] == pytest.approx(0, abs=1e-5)


def test_no_image_and_no_caption_that_is_held_out_is_read(pipeline, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(Example, "image", lambda _: pytest.fail("an image is opened"))
    source = make_caption_sampler(pipeline, stage(), examples.prepared.captions)
    texts = source.texts(200, torch.Generator().manual_seed(0))
    assert "image 4" in texts and not any("5" in text for text in texts)  # image 5 is held out
    path = tmp_path / "captions.txt"
    path.write_text("a fish\na bird\n")
    task = make_task(pipeline, pruned(pipeline.unet), examples, stage(caption_only=CaptionOnly(file=str(path))))
    read, embedded = [], []
    batch, embed = examples.prepared.batch, task.caption_sampler.embed
    monkeypatch.setattr(examples.prepared, "batch", lambda rows: read.append(len(rows)) or batch(rows))
    object.__setattr__(task.caption_sampler, "embed", lambda texts: embedded.extend(texts) or embed(texts))
    losses_of(task)
    assert read == [4] and len(embedded) == 1 and embedded[0] in ("a fish", "a bird")


def test_estimates_weigh_by_the_power_of_their_signal(pipeline, examples):
    task = make_task(pipeline, pruned(pipeline.unet), examples, stage())
    found = task._compare_on_captions(task.caption_sampler, 4, WHOLE, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    texts = task.caption_sampler.texts(4, generator)
    noised = task._noised_captions(task.caption_sampler, [texts[0], texts[2]], [0, 2], 4, generator)
    power = task.parameterization.signal_power(noised.timesteps)
    assert torch.allclose(found.semantic_features().weights, power / task.mean_signal_power)
    assert torch.allclose(found.teacher_pred, task.teacher_pred(noised)) and found.share == 1


def test_parts_of_a_batch_are_the_whole(pipeline, examples):
    task = make_task(pipeline, pruned(pipeline.unet), examples, stage())

    def found(part):
        return task._compare_on_captions(task.caption_sampler, 4, part, torch.Generator().manual_seed(0))

    halves = torch.cat([found(BatchSlice(index, 2)).teacher_pred for index in range(2)])
    assert torch.allclose(halves, found(WHOLE).teacher_pred, atol=1e-5)
    quarters = [found(BatchSlice(index, 4)) for index in range(4)]
    assert [None if part is None else part.share for part in quarters] == [2, None, 2, None]
    assert losses_of(task, part=BatchSlice(1, 4))["caption_output"] == 0


@pytest.mark.parametrize("weight", ["caption_output", "caption_semantic", "caption_text"])
def test_all_parts_of_a_batch_have_the_same_terms(pipeline, examples, weight):
    chosen = stage(losses=LossWeights(**{weight: 0.3}))
    is_alone = weight != "caption_text"  # which needs a text tower
    task = make_task(pipeline, pruned(pipeline.unet), examples, chosen) if is_alone else None
    task = task or task_with_clip(pipeline, examples, chosen)
    with_captions_in_it, without = (losses_of(task, part=BatchSlice(index, 4)) for index in range(2))
    assert list(with_captions_in_it) == list(without)
    assert with_captions_in_it[weight] > 0 and without[weight] == 0


def test_under_fsdp_each_part_of_a_batch_needs_a_caption(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    require_launchable(stage(), 2)
    with pytest.raises(AsdmError, match=r"share=0.5: under FSDP each of 4 parts .* give at least 1"):
        require_launchable(stage(), 4)
    require_launchable(stage(losses=LossWeights()), 4)


def test_steps_without_meaning_may_leave_the_last_layers_without_a_gradient():
    features = LossWeights(task=0, output=0, caption_semantic=1.0)
    assert not stage(losses=features).leaves_weights_unused
    assert stage(losses=features, semantics=Semantics(every=2)).leaves_weights_unused
    assert not stage(semantics=Semantics(every=2)).leaves_weights_unused


def test_the_captions_own_meaning_needs_a_text_tower(pipeline, examples):
    with pytest.raises(AsdmError, match="caption_text=1: the encoder unet has no text tower"):
        make_task(pipeline, pruned(pipeline.unet), examples, stage(losses=LossWeights(caption_text=1)))
    task = task_with_clip(pipeline, examples, stage(losses=LossWeights(caption_text=1)))
    losses = losses_of(task)
    assert 0 < losses["caption_text"] < 10 and losses["weighted/caption_text"] == losses["caption_text"]


@pytest.mark.parametrize("changes", [{"caption_dropout": 1}, {"caption_dropout": 0, "caption_mixing": 1}])
def test_a_caption_that_the_networks_do_not_read_is_no_target(pipeline, examples, changes):
    task = task_with_clip(pipeline, examples, stage(losses=LossWeights(semantic_text=1), **changes))
    assert losses_of(task)["semantic_text"] == 0
    task = task_with_clip(pipeline, examples, stage(losses=LossWeights(semantic_text=1), caption_dropout=0))
    assert losses_of(task)["semantic_text"] > 0


def task_with_clip(pipeline, examples, chosen):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(pipeline.tokenizer), "max_position_embeddings": pipeline.tokenizer.model_max_length}
    text |= {"eos_token_id": pipeline.tokenizer.eos_token_id}
    vision = {"image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=8))
    encoder = VisionEncoder(clip, tiny_vae().requires_grad_(False), pipeline.tokenizer)
    captions = make_caption_sampler(pipeline, chosen, examples.prepared.captions)
    parameterization = parameterization_of(pipeline.scheduler)
    only = captions if chosen.losses.any_reads("captions", "caption_semantics") else None
    student = pruned(pipeline.unet)
    return DistillationTask(pipeline.unet, student, parameterization, examples, chosen, encoder, only)


def test_a_recipe_that_reads_the_teachers_answers_from_disk_gets_no_captions(unet):
    stages = recipe_stages("small-gpu", pruned(unet), 40)
    with pytest.raises(
        AsdmError, match="teacher=recorded: a semantic loss needs the teacher itself; choose teacher live"
    ):
        with_captions(stages, "spliced")


def test_a_recipe_that_has_losses_on_captions_keeps_what_it_says_of_them(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a fish\n")
    chosen = stage(
        losses=LossWeights(caption_semantic=1.0, caption_text=0.5),
        semantics=Semantics(encoder="clip", every=2),
        caption_only=CaptionOnly(share=1.0, sampling_steps=8),
    )
    only = chosen.caption_only.model_copy(update={"file": str(path)})
    assert with_captions([chosen], path) == [chosen.model_copy(update={"caption_only": only})]
    assert with_captions(with_captions([chosen], path), "spliced") == [chosen]
    (given,) = with_captions([stage(losses=LossWeights())], "spliced")
    assert (given.losses.caption_semantic, given.semantics.every) == (0.3, 4)
    assert given.caption_only == stage().caption_only


@pytest.mark.slow
def test_a_recipe_gets_captions_and_an_estimate_counts_them(pipeline, tmp_path):
    student = pruned(pipeline.unet)
    plain = recipe_stages("joint", student, 40)
    (chosen,) = with_captions(plain, "spliced")
    assert chosen.losses.caption_semantic > 0 and plain[0].losses.caption_semantic == 0
    short = {"batch_size": 2, "caption_only": CaptionOnly(sampling_steps=1)}
    stages = [stage.model_copy(update=short) for stage in (*plain, chosen)]
    before, after = estimate(pipeline, student, stages, teraflops=1.0)
    assert after.step_teraflops > 1.05 * before.step_teraflops
    with pytest.raises(AsdmError, match="use one of scope joint"):
        with_captions([stage(scope="incubate")], "spliced")
    with pytest.raises(AsdmError, match=r"are a \.txt file"):
        with_captions(plain, tmp_path)


def test_a_run_that_began_before_there_were_caption_losses_is_resumed(pipeline, data_folder, tmp_path):
    student, chosen = pruned(pipeline.unet), stage(losses=LossWeights(), batch_size=2)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[chosen])
    path = tmp_path / "run" / "00-s" / "run.json"
    saved = json.loads(path.read_text())
    del saved["caption_only"]
    saved["losses"] = {name: weight for name, weight in saved["losses"].items() if not name.startswith("caption")}
    chosen = chosen.model_copy(update={"caption_only": CaptionOnly()})
    path.write_text(json.dumps(saved))
    distill(pipeline, pruned(pipeline.unet), data_folder, tmp_path / "run", stages=[chosen])
    with pytest.raises(AsdmError, match=r"begun with other settings \(losses, semantics"):
        distill(pipeline, pruned(pipeline.unet), data_folder, tmp_path / "run", stages=[chosen], captions="spliced")
