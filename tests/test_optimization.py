"""What is tried is measured, what is kept helps, and the pipeline goes on drawing."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image

from asdm import (
    AsdmError,
    PruningPlan,
    build_student,
    generate,
    load_pipeline,
    optimize,
    save_decoder,
    save_pipeline,
    with_unet,
)
from asdm.diffusion.conditioning import decode_latents, latent_shape
from asdm.diffusion.kinds import is_inpainting
from asdm.measure.latency import Timing
from asdm.pipelines.derived import with_vae
from asdm.runtime import decoding
from asdm.runtime.decoding import _in_openvino
from asdm.runtime.openvino import OpenVinoVae
from asdm.runtime.optimize import _install
from conftest import (
    load_ip_adapter,
    predict,
    tiny_decoder,
    tiny_inpainting_pipeline,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
)


@pytest.fixture
def gains(monkeypatch):
    """Timings by decree: each call of a changed UNet takes as long as it says."""

    def set_gain(gain):
        def measured(calls, **_):
            for call in calls.values():
                call()
            times = dict.fromkeys(calls, 1.0) | {"changed": 1 / gain, "after": 1 / gain}
            return Timing({name: [times[name]] * 2 for name in calls})

        monkeypatch.setattr("asdm.runtime.optimize.measure_interleaved", measured)

    monkeypatch.setattr("asdm.runtime.optimize.computes_in_bfloat16", lambda: True)
    return set_gain


def test_a_precision_that_the_cpu_emulates_is_not_tried(pipeline, gains, monkeypatch):
    gains(1.5)
    monkeypatch.setattr("asdm.runtime.optimize.computes_in_bfloat16", lambda: False)
    assert [measure.name for measure in optimize(pipeline).measures] == ["channels last", "fused projections"]


def test_what_helps_is_kept_and_the_pipeline_draws(pipeline, gains):
    before, reference = generate(pipeline, ["octopus"], steps=2), predict(pipeline.unet)
    gains(1.5)
    found = optimize(pipeline, max_error=1e-2)
    assert [measure.name for measure in found.measures] == ["channels last", "bfloat16", "fused projections"]
    assert all(measure.kept for measure in found.measures)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert 0 < found.measures[1].error < 1e-2 and found.speedup == pytest.approx(1.5)
    assert (generate(pipeline, ["octopus"], steps=2) - before).abs().mean() < 0.1
    assert "bfloat16: 1.50x" in str(found) and reference.dtype == torch.float32


def test_what_does_not_help_or_moves_the_prediction_is_not(pipeline, gains):
    unet = pipeline.unet
    gains(1.0)
    found = optimize(pipeline)
    assert pipeline.unet is unet and not any(measure.kept for measure in found.measures)
    gains(2.0)
    found = optimize(pipeline, max_error=0.0)
    assert {measure.name for measure in found.measures if measure.kept} <= {"channels last", "fused projections"}
    assert pipeline.unet.dtype == torch.float32
    with pytest.raises(AsdmError, match="max_error=-1: must be a finite number of at least 0"):
        optimize(pipeline, max_error=-1)


def test_projections_of_regional_attention_are_left_alone(pipeline, gains):
    gains(2.0)
    unit = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "gri_attention", "unit": unit, "regions": 2}])
    student = with_unet(pipeline, build_student(pipeline.unet, plan))
    found = optimize(student, max_error=1e-2)
    assert found.measures[-1].reason == "not with global-regional attention"
    assert student.unet.get_submodule(unit).processor.regions == 2


def test_what_other_pipelines_share_is_left_as_it_is(pipeline, gains):
    gains(2.0)
    other = with_unet(pipeline, pipeline.unet)
    before = generate(other, ["octopus"], steps=2)
    optimize(pipeline, max_error=1e-2)
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert torch.equal(generate(other, ["octopus"], steps=2), before)


def test_layers_that_transformers_keeps_in_float32_stay_there(gains, tmp_path):
    save_pipeline(tiny_pixart_pipeline(), tmp_path)

    def dtypes(pipeline):
        return {name: parameter.dtype for name, parameter in pipeline.text_encoder.named_parameters()}

    half = load_pipeline(tmp_path, dtype=torch.float16)
    expected, encoder = dtypes(half), half.text_encoder
    assert set(expected.values()) == {torch.float16, torch.float32}
    gains(1.5)
    optimize(half, max_error=1.0)
    assert half.text_encoder is encoder and dtypes(half) == expected
    cast = load_pipeline(tmp_path)
    _install(cast, copy.deepcopy(cast.transformer).half(), False)  # as is tried on GPUs
    assert dtypes(cast) == expected and cast.vae.dtype == torch.float16


def test_a_lora_is_not_fused_away(pipeline, gains):
    peft = pytest.importorskip("peft")
    gains(2.0)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    found = optimize(pipeline, max_error=1e-2)
    assert found.measures[-1].reason.startswith("not with a LoRA")


def test_an_offloaded_unet_and_an_ip_adapter_are_named(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.unet, "_hf_hook", object(), raising=False)
    with pytest.raises(AsdmError, match="offloaded"):
        optimize(pipeline)
    monkeypatch.undo()
    load_ip_adapter(pipeline)
    with pytest.raises(AsdmError, match="an IP-Adapter is loaded"):
        optimize(pipeline)


def test_threads_are_part_of_what_is_gained(pipeline, monkeypatch):
    counts = {}

    def measured(calls, **_):
        for name, call in calls.items():
            call()
            counts[name] = torch.get_num_threads()
        times = {"now": 2.0, "half": 1.0, "before": 2.0, "after": 1.0}
        return Timing({name: [times.get(name, 2.0)] * 2 for name in calls})

    monkeypatch.setattr("asdm.runtime.optimize.measure_interleaved", measured)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = optimize(pipeline)
        assert found.measures[-1].name == "2 threads" and found.measures[-1].kept
        assert (counts["before"], counts["after"], torch.get_num_threads()) == (4, 2, 2)
    finally:
        torch.set_num_threads(before)


def test_it_measures_for_real(pipeline):
    found = optimize(pipeline, rounds=2)
    assert found.before.ms > 0 and found.after.ms > 0


@pytest.fixture
def decoder_gains(monkeypatch):
    """Timings of ways to decode by decree."""

    def set_gains(gains):
        def measured(calls, **_):
            for call in calls.values():
                call()
            return Timing({name: [1 / gains.get(name, 1.0)] * 2 for name in calls})

        monkeypatch.setattr("asdm.runtime.decoding.measure_interleaved", measured)

    return set_gains


def test_the_fastest_way_to_decode_that_keeps_the_images_is_taken(pipeline, gains, decoder_gains, monkeypatch):
    monkeypatch.setattr(
        "asdm.runtime.decoding._in_openvino", lambda *_: (_ for _ in ()).throw(AsdmError("no openvino"))
    )
    vae = pipeline.vae
    gains(1.0)
    decoder_gains({"decoder: channels last": 1.2, "decoder: tiles": 5.0})
    found = optimize(pipeline, decoder="auto")
    by_name = {measure.name: measure for measure in found.of_decoder}
    assert by_name["decoder: OpenVINO int8"].reason == "no openvino"
    assert by_name["decoder: channels last"].kept and by_name["decoder: channels last"].error < 1e-6
    assert not by_name["decoder: tiles"].kept and by_name["decoder: tiles"].error > 1e-3  # tiles of 4x4 latents
    assert pipeline.vae is not vae and pipeline.vae.decoder.conv_in.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert not pipeline.vae.use_tiling and "decoder: tiles: 5.00x" in str(found)
    decoder_gains({})
    before = pipeline.vae
    found = optimize(pipeline, decoder="auto")
    assert pipeline.vae is before and not any(measure.kept for measure in found.of_decoder)


def test_tiles_are_offered_where_diffusers_puts_them_together_whole(pipeline):
    latents = torch.zeros(1, *latent_shape(pipeline))
    for side in (8, 12, 20, 64, 68, 96):
        pipeline.unet.register_to_config(sample_size=side)
        assert ("decoder: tiles" in decoding._ways(pipeline, latents)) == (side in (8, 64, 96)), side
    pipeline.unet.register_to_config(sample_size=24)
    latents = torch.randn(1, *latent_shape(pipeline))
    tiled = decoding._ways(pipeline, latents)["decoder: tiles"]()
    assert decode_latents(with_vae(pipeline, tiled), latents).shape == decode_latents(pipeline, latents).shape


def test_a_way_whose_images_have_another_size_is_a_fault_of_it(pipeline, gains, decoder_gains, monkeypatch):
    broken = copy.deepcopy(pipeline.vae)
    broken.decode = lambda latents: DecoderOutput(sample=torch.zeros(len(latents), 3, 5, 5))
    monkeypatch.setattr(decoding, "_ways", lambda *_: {"decoder: broken": lambda: broken})
    gains(1.0)
    decoder_gains({})
    (measure,) = optimize(pipeline, decoder="auto").of_decoder
    assert not measure.kept and "size" in measure.reason


def test_a_decoder_that_is_a_graph_already_is_left_as_it_is(pipeline, gains):
    pytest.importorskip("openvino")
    gains(1.0)
    graph = _in_openvino(pipeline, torch.randn(2, *latent_shape(pipeline)), None)
    pipeline.register_modules(vae=graph)
    assert optimize(pipeline, decoder="auto").of_decoder == [] and pipeline.vae is graph


def test_a_tiny_decoder_is_taken_whatever_it_gains(pipeline, gains, decoder_gains, tmp_path):
    gains(1.5)
    decoder_gains({"tiny decoder": 0.9, "tiny decoder, channels last": 0.8})
    other = with_unet(pipeline, pipeline.unet)
    found = optimize(pipeline, max_error=1e-2, decoder=save_decoder(tiny_decoder(), tmp_path / "decoder"))
    assert [measure.kept for measure in found.of_decoder] == [True, False]
    assert type(pipeline.vae) is AutoencoderTiny and pipeline.vae.dtype == pipeline.unet.dtype == torch.bfloat16
    assert type(other.vae) is AutoencoderKL and other.vae.dtype == torch.float32
    assert generate(pipeline, ["octopus"], steps=2).isfinite().all()


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_inpainting_pipeline, tiny_sdxl_pipeline])
def test_images_are_encoded_where_bfloat16_and_openvino_are_kept(make, gains, decoder_gains, monkeypatch):
    pytest.importorskip("openvino")
    pipeline = make()
    ways = {"decoder: OpenVINO": lambda: _in_openvino(pipeline, torch.randn(2, 4, 8, 8), None)}
    monkeypatch.setattr("asdm.runtime.decoding._ways", lambda *_: ways)
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    start = {"image": image, "mask": mask} if is_inpainting(pipeline) else {"image": image}
    expected = generate(pipeline, ["octopus"], steps=2, **start)
    gains(1.5)
    decoder_gains(dict.fromkeys(ways, 2.0))
    optimize(pipeline, max_error=1e-2, decoder="auto")
    assert pipeline.unet.dtype == torch.bfloat16 and type(pipeline.vae) is OpenVinoVae
    assert (generate(pipeline, ["octopus"], steps=2, **start) - expected).abs().mean() < 0.1


@pytest.mark.slow
def test_openvino_decodes_in_float_and_in_8_bits(pipeline, monkeypatch):
    pytest.importorskip("nncf")
    decoder = _in_openvino(pipeline, torch.randn(2, 4, 8, 8), None)
    found = optimize(pipeline, decoder="auto", rounds=1)  # may install one
    by_name = {measure.name: measure for measure in found.of_decoder}
    assert by_name["decoder: OpenVINO"].error < 1e-4 < by_name["decoder: OpenVINO int8"].error < 0.1
    pipeline.register_modules(vae=decoder)
    assert generate(pipeline, ["octopus"], steps=2).shape == (1, 3, 16, 16)
