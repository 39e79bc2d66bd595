"""Checkpoints in one file, in the layouts of the original Stable Diffusion code: what they say, and what they lack."""

import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from asdm import (
    AsdmError,
    AsdmWarning,
    PruningPlan,
    Remove,
    build_student,
    cli,
    compress,
    generate,
    lcm_scheduler,
    load_pipeline,
    save_pipeline,
    with_unet,
)
from asdm.diffusion.parameterization import parameterization_of
from asdm.families.tensors import fingerprint
from asdm.pipelines.shapes import denoiser_without_weights
from conftest import _text_encoder, tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_key(name: str, last_upsampled: int = 1) -> str:
    for ours, theirs in UNET.items():
        if name.startswith(ours + "."):
            name = theirs + name[len(ours) :]
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, block, kind, layer, rest = found.groups()
        place = 3 * int(block) + int(layer)
        part = 0 if kind == "resnets" else 1
        name = f"input_blocks.{place + 1}.{part}.{rest}" if side == "down" else f"output_blocks.{place}.{part}.{rest}"
    elif found := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        name = f"input_blocks.{3 * int(found[1]) + 3}.0.op.{found[2]}"
    elif found := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name):
        name = f"output_blocks.{3 * int(found[1]) + 2}.{last_upsampled if found[1] == '0' else 2}.{found[2]}"
    for ours, theirs in RESNET.items():
        name = re.sub(rf"(blocks\.\d+\.0|middle_block\.[02])\.{ours}\.", rf"\1.{theirs}.", name)
    return f"model.diffusion_model.{name}"


def vae_key(name: str) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for ours, theirs in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return f"first_stage_model.{name}"


def vae_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    linear = tensor.ndim == 2 and "attentions" in name
    return tensor[:, :, None, None] if linear else tensor


def open_clip(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, torch.Tensor]:
    """A text encoder's tensors by OpenCLIP's names: queries, keys and values in one."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    made = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if found := re.match(r"(.*)self_attn\.q_proj\.(.*)", name):
            tensor = torch.cat([tensors[f"{found[1]}self_attn.{each}_proj.{found[2]}"] for each in "qkv"])
            name = f"{found[1]}attn.in_proj_{found[2]}"
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        made[name] = tensor
    return made


def original_layout(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline | StableDiffusionXLInpaintPipeline)
    upsampled = 2 if is_xl else 1
    tensors = {unet_key(name, upsampled): tensor for name, tensor in pipeline.unet.state_dict().items()}
    tensors |= {vae_key(n): vae_tensor(n, tensor) for n, tensor in pipeline.vae.state_dict().items()}
    if pipeline.unet.config.cross_attention_dim == 1024:
        texts = open_clip(pipeline.text_encoder)
        tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in texts.items()}
    else:
        prefix = "conditioner.embedders.0" if is_xl else "cond_stage_model"
        texts = pipeline.text_encoder.state_dict()
        tensors |= {
            f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in texts.items()
        }
    if is_xl:
        texts = open_clip(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in texts.items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def ten_layers(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """With a second text encoder that is as deep, and as other from the first, as diffusers knows SDXL by."""
    encoder = _text_encoder(CLIPTextModelWithProjection, 48, pipeline.tokenizer, layers=10)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 32 + 48}).eval()
    pipeline.register_modules(text_encoder_2=encoder, unet=unet)
    return pipeline


def of_sd2(scheduler) -> StableDiffusionPipeline:
    pipeline = tiny_pipeline()
    encoder = _text_encoder(CLIPTextModel, 1024, pipeline.tokenizer, layers=1)
    pipeline.register_modules(unet=tiny_unet(cross_attention_dim=1024), text_encoder=encoder, scheduler=scheduler)
    return pipeline


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Where the Hub's files are kept: the configurations that a single file does not hold come from there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    return lambda repository, pipeline: keep(tmp_path / "hub", repository, pipeline)


def keep(hub: Path, repository: str, pipeline: StableDiffusionPipeline) -> None:
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    pipeline.save_pretrained(folder / "snapshots" / ("0" * 40))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()


@pytest.mark.slow
def test_a_checkpoint_in_one_file_draws_what_its_pipeline_draws(tmp_path, hub_cache):
    pipeline = tiny_pipeline()
    hub_cache("stable-diffusion-v1-5/stable-diffusion-v1-5", pipeline)
    save_file(original_layout(pipeline), tmp_path / "model.safetensors")
    loaded = load_pipeline(tmp_path / "model.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert found.keys() == expected.keys(), part
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), part
    drawn = generate(loaded, ["a house"], steps=2)
    torch.testing.assert_close(drawn, generate(pipeline, ["a house"], steps=2), atol=1e-4, rtol=0)
    made = compress(str(tmp_path / "model.safetensors"), tmp_path / "out", params=0.8, refine=0, steps=0, samples=0)
    assert type(load_pipeline(made.folder)) is StableDiffusionPipeline


def test_a_checkpoint_for_inpainting_in_one_file(tmp_path, hub_cache):
    pipeline = tiny_inpainting_pipeline()
    hub_cache("stable-diffusion-v1-5/stable-diffusion-inpainting", pipeline)
    save_file(original_layout(pipeline), tmp_path / "model.safetensors")
    loaded = load_pipeline(tmp_path / "model.safetensors")
    assert type(loaded) is StableDiffusionInpaintPipeline
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Where configurations of SD 1.x, SDXL and others are kept, and the tensors of checkpoints of the first two."""
    hub, sd, xl = tmp_path_factory.mktemp("hub"), tiny_pipeline(), ten_layers(tiny_sdxl_pipeline())
    sd.register_modules(scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True))
    xl.register_modules(scheduler=EulerDiscreteScheduler(**BETAS))
    keep(hub, SD15, sd)
    keep(hub, "stabilityai/stable-diffusion-xl-base-1.0", xl)
    for name, scheduler in (
        ("playgroundai/playground-v2.5-1024px-aesthetic", EDMDPMSolverMultistepScheduler()),
        ("someone/theirs", DDIMScheduler(**BETAS, **V, **ZERO)),
    ):
        other = StableDiffusionXLPipeline(**{**xl.components, "scheduler": scheduler})
        keep(hub, name, other if name.startswith("playground") else of_scheduler(sd, scheduler))
    return SimpleNamespace(hub=hub, sd=sd, sd_tensors=original_layout(sd), xl=xl, xl_tensors=original_layout(xl))


def of_scheduler(pipeline, scheduler):
    return StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)


@pytest.fixture
def sdxl(tmp_path, known, monkeypatch):
    """Writes a checkpoint of SDXL's shape, with further tensors, and returns its path."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(known.hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def write(without=(), **more):
        kept = {name: tensor for name, tensor in known.xl_tensors.items() if not name.startswith(tuple(without))}
        save_file(kept | more, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@pytest.fixture
def sd15(tmp_path, known, monkeypatch):
    """Writes a checkpoint of SD 1.x's shape, with further tensors and metadata, and returns its path."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(known.hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tensors = known.sd_tensors

    def write(without=(), metadata=None, **more):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(without))}
        save_file(kept | more, tmp_path / "model.safetensors", metadata)
        return tmp_path / "model.safetensors"

    return write


def loaded(path, **said):
    """The pipeline, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = load_pipeline(path, **said)
    return pipeline, [str(each.message) for each in caught if each.category is AsdmWarning]


def marker(*names):
    return {name: torch.tensor([]) for name in names}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "state_dict."])
def test_sdxl_with_marker_tensors_draws_as_they_say(prefix, known, sdxl):
    path = sdxl(**marker(f"{prefix}v_pred", f"{prefix}ztsnr"))
    found, said = loaded(path)
    assert not said
    expected = EulerDiscreteScheduler(**BETAS, **V, **ZERO)
    assert all(found.scheduler.config[name] == expected.config[name] for name in (*V, *ZERO))
    if prefix:
        return
    plain = generate(known.xl, ["a house"], steps=2)
    wanted = generate(StableDiffusionXLPipeline(**{**known.xl.components, "scheduler": expected}), ["a house"], steps=2)
    drawn = generate(found, ["a house"], steps=2)
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=0)
    assert (drawn - plain).abs().mean() > 0.01
    found, said = loaded(path, prediction_type="epsilon")
    torch.testing.assert_close(generate(found, ["a house"], steps=2), plain, atol=1e-4, rtol=0)
    assert "zero SNR is left out" in said[0]


def test_sdxl_for_inpainting_in_one_file(tmp_path, hub_cache):
    pipeline = ten_layers(tiny_sdxl_pipeline())
    wide = torch.nn.Conv2d(9, 32, 3, padding=1)
    pipeline.unet.conv_in = wide
    pipeline.unet.register_to_config(in_channels=9)
    pipeline = StableDiffusionXLInpaintPipeline(**pipeline.components)
    hub_cache("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", pipeline)
    save_file(original_layout(pipeline) | marker("v_pred"), tmp_path / "model.safetensors")
    found, said = loaded(tmp_path / "model.safetensors")
    assert type(found) is StableDiffusionXLInpaintPipeline and not said
    assert torch.equal(found.unet.conv_in.weight, wide.weight)
    assert found.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, EDMDPMSolverMultistepScheduler),
        ({"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}, EDMEulerScheduler),
    ],
)
def test_sdxl_of_edms_noise_levels_keeps_its_sampler(markers, expected, sdxl):
    found, said = loaded(sdxl(**markers))
    assert type(found.scheduler) is expected and not said
    assert expected is not EDMEulerScheduler or found.scheduler.config.sigma_max == 120


@pytest.mark.parametrize("most", [0.0, -1.0, 0.001, float("inf"), float("nan")])
def test_noise_levels_that_no_sampler_has_are_refused(most, sdxl):
    with pytest.raises(AsdmError, match=r"edm_vpred\.sigma_max=.*; the first must be positive and the second larger"):
        loaded(sdxl(**{"edm_vpred.sigma_max": torch.tensor(most)}))


YAML = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"
SDXL_YAML = (
    "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n"
    "          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n"
)
OURS = {"_class_name": "EulerDiscreteScheduler", **BETAS, **V}


@pytest.mark.parametrize(
    ("tensors", "metadata", "beside", "expected", "words"),
    [
        (["v_pred"], None, {}, V, None),
        (["v_pred", "ztsnr"], None, {}, V | ZERO, None),
        (["ztsnr"], None, {}, V | ZERO, "assumed v_prediction"),
        ([], {"modelspec.prediction_type": "v"}, {}, V, None),
        ([], {"modelspec.prediction_type": "epsilon"}, {}, {"prediction_type": "epsilon"}, None),
        ([], {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}, {}, V | ZERO, None),
        ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, V, None),
        ([], {"ss_v_parameterization": "True"}, {}, V, None),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, {}, V, r"v_pred says v_prediction.*epsilon; the former"),
        (["v_pred", "ztsnr"], {"ss_zero_terminal_snr": "False"}, {}, V | ZERO, r"zero terminal SNR True.*False"),
        ([], None, {"model.yaml": YAML + '    parameterization: "v"\n'}, V, None),
        ([], None, {"model.yaml": YAML}, {"prediction_type": "epsilon"}, None),
        ([], None, {"model.yaml": SDXL_YAML}, V, None),
        (["v_pred"], None, {"model.yaml": YAML}, {"prediction_type": "epsilon"}, "the former counts"),
        ([], None, {"model.json": json.dumps(OURS)}, OURS, None),
        ([], None, {"model.json": '{"description": "mine"}'}, {"prediction_type": "epsilon"}, "assumed epsilon"),
        ([], None, {"scheduler/scheduler_config.json": json.dumps(OURS | ZERO)}, OURS | ZERO, None),
        ([], None, {"scheduler_config.json": json.dumps(V)}, V, None),
        ([], None, {}, {"prediction_type": "epsilon"}, "does not say what its UNet predicts; assumed epsilon"),
    ],
)
def test_what_lives_in_a_checkpoint_and_beside_it_decides(
    tensors, metadata, beside, expected, words, tmp_path, monkeypatch, known, sd15
):
    path = sd15(metadata=metadata, **marker(*tensors))
    for name, text in beside.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    only_scheduler(monkeypatch, known)
    found, said = loaded(path)
    for name, value in expected.items():
        assert found.scheduler.config[name] == value, name
    if "rescale_betas_zero_snr" in expected:
        assert found.scheduler.alphas_cumprod[-1] < 1e-6
    assert not said if words is None else len(said) == 1 and re.search(words, said[0]) and str(path) in said[0]


def only_scheduler(monkeypatch, known):
    """For speed: the parts are loaded once, and shared."""
    parts = {name: part for name, part in known.sd.components.items() if name != "scheduler"}
    load = StableDiffusionPipeline.from_single_file.__func__

    def from_single_file(cls, path, **kwargs):
        return load(cls, path, **kwargs, **parts)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", classmethod(from_single_file))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("scheduler.json", OURS),
        ("v.yaml", V),
        ("folder", OURS),
        ("pipeline", {"_class_name": "DDIMScheduler", **V, **ZERO}),
        ("someone/theirs", {"_class_name": "DDIMScheduler", **V, **ZERO}),
    ],
)
def test_a_config_that_is_named_overrides(config, expected, tmp_path, known, sd15, monkeypatch):
    path = sd15()
    (tmp_path / "scheduler.json").write_text(json.dumps(OURS))
    (tmp_path / "v.yaml").write_text(YAML + "    parameterization: v\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "scheduler_config.json").write_text(json.dumps(OURS))
    of_scheduler(known.sd, DDIMScheduler(**BETAS, **V, **ZERO)).save_pretrained(tmp_path / "pipeline")
    named = config if config == "someone/theirs" else str(tmp_path / config)
    only_scheduler(monkeypatch, known)
    for place in (path, "demo"):
        found, said = loaded(place, config=named)
        assert {name: found.scheduler.config[name] for name in expected} == expected
        assert not said


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_type_that_is_given_overrides(prediction_type, known, sd15, monkeypatch):
    only_scheduler(monkeypatch, known)
    for place in ("demo", sd15(**marker("v_pred"))):
        found, said = loaded(place, prediction_type=prediction_type)
        assert found.scheduler.config.prediction_type == prediction_type and not said
    assert torch.isfinite(generate(found, ["a house"], steps=2)).all()


def test_an_architecture_without_weights_is_read_with_what_is_said(tmp_path, sd15):
    path = str(sd15())
    for model in (path, "demo"):
        with pytest.raises(AsdmError, match="config no/such: no such folder or file"):
            denoiser_without_weights(model, config="no/such")
    found = denoiser_without_weights(path, prediction_type="v_prediction", config=None)
    assert found.device.type == "meta" and fingerprint(found) == fingerprint(loaded(path)[0].unet)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"prediction_type": "flow"},
            "prediction_type: prediction type 'flow' is not known; it is epsilon, v_prediction",
        ),
        ({"config": "no/such"}, "config no/such: no such folder or file, and not found on the Hub"),
        ({"config": "empty"}, "config .*empty: says nothing of what a UNet predicts"),
        ({"config": "broken.yaml"}, "broken.yaml: not a config"),
    ],
)
def test_what_is_said_wrongly_is_refused(said, message, tmp_path, sd15):
    path = sd15()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yaml").write_text("model: [")
    said = {name: str(tmp_path / text) if text in ("empty", "broken.yaml") else text for name, text in said.items()}
    with pytest.raises(AsdmError, match=message) as error:
        load_pipeline(path, **said)
    assert "\n" not in str(error.value)


def test_metadata_of_an_unknown_prediction_is_refused(sd15):
    path = sd15(metadata={"modelspec.prediction_type": "flow"})
    with pytest.raises(AsdmError, match=r"modelspec.prediction_type\): prediction type 'flow' is not known") as error:
        load_pipeline(path)
    assert str(path) in str(error.value)
    assert load_pipeline(path, prediction_type="epsilon").scheduler.config.prediction_type == "epsilon"


def test_a_truncated_file_is_named(sd15):
    path = sd15()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AsdmError, match=r"model.safetensors: not a safetensors file: truncated or damaged"):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("steps", "expected", "words"),
    [(875_000, "epsilon", None), (110_000, "v_prediction", "512-base"), (None, "v_prediction", "512-base")],
)
def test_sd2_is_told_by_the_steps_of_its_base_alone(steps, expected, words, tmp_path, hub_cache):
    pipeline = of_sd2(DDIMScheduler(**BETAS, **V))
    hub_cache("stabilityai/stable-diffusion-2-1", pipeline)
    more = {} if steps is None else {"global_step": torch.tensor(steps)}
    save_file(original_layout(pipeline) | more, tmp_path / "model.safetensors")
    found, said = loaded(tmp_path / "model.safetensors")
    assert found.scheduler.config.prediction_type == expected
    assert not said if words is None else words in said[0]


def test_a_folders_schedule_is_not_passed_over_by_its_schedulers_class(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    config = {"_class_name": "PNDMScheduler", **BETAS, **V, **ZERO}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]}))
    found, said = loaded(tmp_path)
    assert type(found.scheduler) is DDIMScheduler and not said
    pipeline.scheduler = DDIMScheduler(**BETAS, **V, **ZERO, clip_sample=False, set_alpha_to_one=False)
    drawn = generate(found, ["a house"], steps=3)
    torch.testing.assert_close(drawn, generate(pipeline, ["a house"], steps=3), atol=1e-4, rtol=0)


def test_an_old_folder_that_names_no_prediction_is_told_by_its_tensors(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", **BETAS}))
    assert load_pipeline(tmp_path).scheduler.config.prediction_type == "epsilon"
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(pipeline.unet.state_dict(), weights, {"format": "pt", "modelspec.prediction_type": "v"})
    assert load_pipeline(tmp_path).scheduler.config.prediction_type == "v_prediction"


def test_a_student_keeps_what_its_teacher_predicts(tmp_path, sd15):
    teacher = load_pipeline(sd15(**marker("v_pred", "ztsnr")))
    student = build_student(teacher.unet, PruningPlan.for_unet(teacher.unet, [Remove(unit="mid_block")]))
    config = load_pipeline(save_pipeline(with_unet(teacher, student), tmp_path / "student")).scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    assert parameterization_of(teacher.scheduler).signal_power(torch.tensor(999)) == 0
    few_steps = lcm_scheduler(config, 50).config
    assert few_steps.prediction_type == "v_prediction" and few_steps.rescale_betas_zero_snr


def test_compress_remembers_what_was_said_of_the_model(tmp_path, sd15, monkeypatch):
    given = []
    monkeypatch.setattr(
        "asdm.compression.compress.load_pipeline", lambda model, **said: given.append(said) or load_pipeline("demo")
    )
    monkeypatch.setattr("asdm.compression.steps.analyze", lambda *_, **__: pytest.fail("far enough"))
    budget = {"params": 0.8, "refine": 0, "steps": 0, "samples": 0}
    with pytest.raises(pytest.fail.Exception):
        compress("demo", tmp_path / "out", **budget, prediction_type="v_prediction", config="theirs")
    said = {"prediction_type": "v_prediction", "config": "theirs"}
    assert given[0] == {"device": None, "dtype": torch.float32, **said}
    with pytest.raises(AsdmError, match=r"other settings \(prediction_type, config\)"):
        compress("demo", tmp_path / "out", **budget)
    with pytest.raises(pytest.fail.Exception):
        compress("demo", tmp_path / "other", **budget)
    assert "prediction_type" not in json.loads((tmp_path / "other" / "asdm.json").read_text())["settings"]


def test_what_was_assumed_is_one_line_on_standard_error(tmp_path, sd15, monkeypatch, capfd):
    path, out = sd15(), tmp_path / "images"
    arguments = ["generate", str(path), "a house", "--steps", "2", "--out", str(out), "--device", "cpu"]
    for more, lines in (
        ([], 1),
        (["--prediction-type", "v_prediction"], 0),
        (["--config", str(tmp_path / "c.json")], 0),
    ):
        (tmp_path / "c.json").write_text(json.dumps(OURS))
        monkeypatch.setattr(sys, "argv", ["asdm", *arguments, *more])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
        assert not ended.value.code
        notes = [line for line in capfd.readouterr().err.splitlines() if "note:" in line or "Warning" in line]
        assert len(notes) == lines and all("assumed epsilon" in note for note in notes)


LACKS = r"model.safetensors: its {} lacks {} of its \d+ tensors: {}.*; download or convert it again"


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["model.diffusion_model.out.2.weight"], LACKS.format("unet", 1, "conv_out.weight")),
        (["model.diffusion_model.middle_block.1."], LACKS.format("unet", 36, r"mid_block.*, mid.*, mid.* and 33 more")),
        (["first_stage_model.decoder.conv_in.weight"], LACKS.format("vae", 1, "decoder.conv_in.weight")),
        (["model.diffusion_model."], "model.safetensors: not a whole Stable Diffusion checkpoint: no tensor's name"),
        (["first_stage_model."], LACKS.format("vae", 120, "encoder.conv_in.weight")),
        (
            ["cond_stage_model.transformer.text_model.final"],  # the prefix is that of transformers 5.0
            LACKS.format("text_encoder", 2, r"(text_model\.)?final_layer_norm.weight"),
        ),
        (
            ["cond_stage_model.transformer.text_model.emb"],
            LACKS.format("text_encoder", 2, "embeddings.token_embedding"),
        ),
        (["cond_stage_model."], LACKS.format("text_encoder", 36, "embeddings")),
    ],
)
def test_missing_tensors_are_named(without, message, sd15):
    with pytest.raises(AsdmError, match=message) as error:
        load_pipeline(sd15(without))
    assert "\n" not in str(error.value)


UNET_KEY = "model.diffusion_model."
OUT = f"{UNET_KEY}out.2.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {OUT: torch.zeros(4, 5, 3, 3)},
            "its unet has other shapes than its config says: conv_out.weight 4x5x3x3 for 4x32",
        ),
        ({OUT: torch.zeros(4, 32, 3, 3, dtype=torch.int8)}, rf"holds {OUT} \(I8\), quantised weights"),
        ({"scaled_fp8": torch.zeros(2)}, "holds scaled_fp8, quantised weights"),
        (
            {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(32, 256)},
            "its unet has .*cond_proj.weight, for an input",
        ),
        (
            {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(32, 256)},
            "its unet has .*label_emb.0.0.weight, for an input",
        ),
        ({"joint_blocks.37.x_block.mlp.fc1.weight": torch.zeros(2)}, "a checkpoint of sd35_large; use SD 1.x"),
    ],
)
def test_other_shapes_and_numbers_are_named(tensors, message, sd15):
    with pytest.raises(AsdmError, match=message) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_pipeline(sd15(**tensors))
    assert "\n" not in str(error.value)


def test_what_sdxl_lacks_is_named(sdxl):
    last = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"  # by which diffusers knows SDXL
    for without, message in (
        (last, "text_encoder_2 lacks 1 of its"),
        ("model.diffusion_model.label_emb.0.0.weight", "unet lacks 1 of its"),
        ("conditioner.embedders.0.", "text_encoder lacks 36 of its 36"),
    ):
        with pytest.raises(AsdmError, match=message):
            load_pipeline(sdxl([without]))
