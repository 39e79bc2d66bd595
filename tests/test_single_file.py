"""Checkpoints in one file, in the layout of the original Stable Diffusion 1.x (CompVis) code."""

import re

import huggingface_hub.constants
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from asdm import compress, generate, load_pipeline
from conftest import tiny_inpainting_pipeline, tiny_pipeline

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
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_key(name: str) -> str:
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
        name = f"output_blocks.{3 * int(found[1]) + 2}.{1 if found[1] == '0' else 2}.{found[2]}"
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


def original_layout(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    tensors = {unet_key(name): tensor for name, tensor in pipeline.unet.state_dict().items()}
    tensors |= {vae_key(n): vae_tensor(n, tensor) for n, tensor in pipeline.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    texts = pipeline.text_encoder.state_dict()
    tensors |= {prefix + name.removeprefix("text_model."): tensor for name, tensor in texts.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Where the Hub's files are kept: the configurations that a single file does not hold come from there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def keep(repository: str, pipeline: StableDiffusionPipeline) -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        pipeline.save_pretrained(folder / "snapshots" / ("0" * 40))
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()

    return keep


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
    made = compress(str(tmp_path / "model.safetensors"), tmp_path / "out", params=0.8, repair=0, steps=0, samples=0)
    assert type(load_pipeline(made.folder)) is StableDiffusionPipeline


def test_a_checkpoint_for_inpainting_in_one_file(tmp_path, hub_cache):
    pipeline = tiny_inpainting_pipeline()
    hub_cache("stable-diffusion-v1-5/stable-diffusion-inpainting", pipeline)
    save_file(original_layout(pipeline), tmp_path / "model.safetensors")
    loaded = load_pipeline(tmp_path / "model.safetensors")
    assert type(loaded) is StableDiffusionInpaintPipeline
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)
