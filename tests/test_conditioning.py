"""What a UNet is told beside the noisy latents: everything that its config asks for, or a refusal by name."""

import json

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from diffusers.models.embeddings import TimestepEmbedding

from asdm import (
    AsdmError,
    PruningPlan,
    Remove,
    Stage,
    analyze,
    build_student,
    calibrate_cache,
    distill,
    export,
    fit_compensation,
    generate,
    load_pipeline,
    prepare_data,
    with_unet,
)
from asdm.data.calibration import calibration_calls
from asdm.diffusion.generation import default_guidance
from asdm.distillation.stages import Consistency, LossWeights
from asdm.families import denoiser_call
from asdm.families.unet_calls import guidance_embedding, random_inputs
from asdm.measure.macs import counting_macs
from conftest import load_ip_adapter, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet


@pytest.fixture
def embedding() -> StableDiffusionPipeline:
    """A pipeline whose UNet embeds the guidance scale."""
    pipeline = with_unet(tiny_pipeline(), tiny_unet(time_cond_proj_dim=16))
    pipeline.scheduler = LCMScheduler(original_inference_steps=50, steps_offset=1)
    return pipeline


@pytest.fixture
def told(monkeypatch) -> list[torch.Tensor | None]:
    """What UNets that embed the guidance scale were told of it, call by call."""
    seen = []
    forward = TimestepEmbedding.forward

    def watched(self, sample, condition=None):
        if self.cond_proj is not None:
            seen.append(condition)
        return forward(self, sample, condition)

    monkeypatch.setattr(TimestepEmbedding, "forward", watched)
    return seen


def pruned(unet, **changes):
    return build_student(unet, PruningPlan.for_unet(unet, [Remove(unit="mid_block.resnets.1", **changes)]))


def teaching(pipeline, data_folder, folder, **changes):
    settings = {"steps": 1, "batch_size": 2, "ema_decay": 0, **changes}
    distill(pipeline, pruned(pipeline.unet), data_folder, folder, stages=[Stage(name="s", **settings)])


CALLERS = {
    "ablation": lambda p, data, tmp: analyze(p, timesteps=1, samples=1),
    "prepared": lambda p, data, tmp: analyze(
        p, data=prepare_data(p, data, tmp / "kept").folder, timesteps=1, samples=1, sensitivity="taylor"
    ),
    "fit": lambda p, data, tmp: fit_compensation(p, pruned(p.unet, compensate="bias"), samples=1),
    "semantic": lambda p, data, tmp: teaching(p, data, tmp / "t", losses=LossWeights(semantic=1.0)),
    "incubate": lambda p, data, tmp: teaching(p, data, tmp / "t", scope="incubate"),
    "consistency": lambda p, data, tmp: teaching(
        p, data, tmp / "t", scope="consistency", consistency=Consistency(solver_steps=50)
    ),
    "latency": lambda p, data, tmp: denoiser_call(p.unet)(),
    "cache": lambda p, data, tmp: calibrate_cache(p, speedup=1.2, steps=4, samples=1),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_unet_that_embeds_the_guidance_scale_is_always_told_it(caller, embedding, told, data_folder, tmp_path):
    CALLERS[caller](embedding, data_folder, tmp_path)
    assert told and all(condition is not None for condition in told)


def test_the_embedding_is_the_pipelines_own(embedding):
    scale = default_guidance(embedding)
    expected = embedding.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=16)
    assert torch.equal(guidance_embedding(embedding.unet, torch.tensor([scale])), expected)
    assert guidance_embedding(tiny_unet(), torch.tensor([scale])) is None
    for call in calibration_calls(embedding, None, None, 2, 3, 0):
        assert torch.equal(call.arguments["timestep_cond"], expected.expand(3, -1))


@pytest.mark.parametrize(("scale", "expected"), [(None, (3, 15)), (4.0, (4, 4))])
def test_a_student_is_taught_at_scales_that_are_in_use(scale, expected, embedding, told, data_folder, tmp_path):
    teaching(embedding, data_folder, tmp_path / "t", guidance_scale=scale)
    assert all(condition is not None for condition in told)
    teacher, student = told[-2:]
    assert torch.equal(teacher, student.to(teacher))
    bounds = guidance_embedding(embedding.unet, torch.tensor([float(each) for each in expected]))
    slowest = bounds[:, 7].sort().values  # of the sines; so slow that it rises from bound to bound
    assert ((slowest[0] - 1e-6 <= student[:, 7]) & (student[:, 7] <= slowest[1] + 1e-6)).all()
    assert (len(student.unique(dim=0)) == 1) == (scale is not None)


def test_an_lcm_pipeline_is_loaded_as_what_its_unet_is(tmp_path):
    parts = {name: part for name, part in tiny_pipeline().components.items() if name != "image_encoder"}
    parts["scheduler"] = LCMScheduler(original_inference_steps=50)
    for name, unet, kind in (
        ("embeds", tiny_unet(time_cond_proj_dim=16), LatentConsistencyModelPipeline),
        ("plain", tiny_unet(), StableDiffusionPipeline),
    ):
        made = LatentConsistencyModelPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)
        made.save_pretrained(tmp_path / name)
        loaded = load_pipeline(tmp_path / name)
        assert type(loaded) is kind
        assert torch.isfinite(generate(loaded, ["a house"], steps=2)).all()


REFUSED = [
    ({"class_embed_type": "timestep"}, "class_embed_type timestep, and reads class_labels"),
    ({"class_embed_type": "identity"}, "class_embed_type identity, and reads class_labels"),
    (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "class_embed_type projection, and reads class_labels",
    ),
    ({"num_class_embeds": 7}, "num_class_embeds 7, and reads class_labels"),
    ({"addition_embed_type": "image", "encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"}, "image embeddings"),
    ({"addition_embed_type": "image_hint", "encoder_hid_dim": 8}, "addition_embed_type image_hint, and reads image"),
    ({"addition_embed_type": "text_image"}, "addition_embed_type text_image, and reads image embeddings"),
    ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type text_image_proj"),
    ({"dual_cross_attention": True}, "dual_cross_attention True, and reads two prompts"),
    ({"attention_type": "gated"}, "attention_type gated, and reads boxes"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_inputs_that_no_prompt_brings_are_refused_by_name(config, message, data_folder, tmp_path):
    pipeline = with_unet(tiny_pipeline(), tiny_unet(**config))
    for use in (
        lambda: analyze(pipeline),
        lambda: denoiser_call(pipeline.unet),
        lambda: distill(pipeline, tiny_unet(**config), data_folder, tmp_path / "t"),
    ):
        with pytest.raises(AsdmError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


def test_a_loaded_ip_adapter_is_refused_by_what_has_no_image_for_it(tmp_path):
    pipeline = tiny_pipeline()
    load_ip_adapter(pipeline)
    for use in (
        lambda: analyze(pipeline),
        lambda: generate(pipeline, ["octopus"], steps=2),
        lambda: export(pipeline, tmp_path / "graphs"),
    ):
        with pytest.raises(AsdmError, match="an IP-Adapter is loaded"):
            use()
    pipeline.unload_ip_adapter()
    assert torch.isfinite(generate(pipeline, ["octopus"], steps=2)).all()


@pytest.mark.parametrize(("config", "message"), [REFUSED[0], REFUSED[-1]])
def test_a_checkpoint_with_inputs_that_no_prompt_brings_is_refused(config, message, tmp_path):
    with_unet(tiny_pipeline(), tiny_unet(**config)).save_pretrained(tmp_path)
    with pytest.raises(AsdmError, match=message):
        load_pipeline(tmp_path)


def test_a_folder_whose_unet_has_an_input_that_its_config_does_not_name_is_refused(tmp_path):
    with_unet(tiny_pipeline(), tiny_unet(time_cond_proj_dim=16)).save_pretrained(tmp_path)
    tiny_unet().save_config(tmp_path / "unet")
    with pytest.raises(AsdmError, match=r"its unet has time_embedding.cond_proj.weight, for an input"):
        load_pipeline(tmp_path)


def test_pipelines_and_unets_that_do_not_go_together_are_refused(tmp_path):
    tiny_sdxl_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    parts = {name: part for name, part in index.items() if name not in ("text_encoder_2", "tokenizer_2", "force")}
    (tmp_path / "model_index.json").write_text(json.dumps({**parts, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(AsdmError, match="addition_embed_type text_time; SDXL has text_time"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
        {"encoder_hid_dim": 24},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"cross_attention_dim": (32, 32, 32, 32)},
        {"time_cond_proj_dim": 16},
    ],
)
def test_what_prompts_bring_is_given_in_timed_and_counted_calls(config):
    unet = tiny_unet(**config)
    with counting_macs(unet) as count:
        assert denoiser_call(unet)().shape == (2, 4, 8, 8)
    assert count.below("time_embedding") > 0
    assert ("time_embedding.cond_proj" in count.plain) == ("time_cond_proj_dim" in config)
    assert random_inputs(unet, 2)["encoder_hidden_states"].shape[-1] == config.get("encoder_hid_dim", 32)
