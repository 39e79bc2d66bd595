"""Graphs for other runtimes give what torch gives, students' edits included."""

import copy
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from asdm import (
    AsdmError,
    PruningPlan,
    Remove,
    analyze,
    build_student,
    cache_features,
    distill,
    evaluate,
    export,
    fit_compensation,
    generate,
    generate_images,
    optimize,
    refine_plan,
    switch_unets,
    with_decoder,
    with_unet,
)
from asdm.cli.tables import speed_table
from asdm.diffusion.conditioning import encode_images
from asdm.evaluation.protocol.image_job import identity_of
from asdm.evaluation.report import headline_of, metrics_section
from asdm.families import UNetFamily
from asdm.families.tensors import fingerprint
from asdm.generation.lora import LoraFile
from asdm.generation.request import GenerationRequest
from asdm.measure.latency import Latency
from asdm.pipelines.derived import with_vae
from asdm.runtime import graphs
from asdm.runtime import openvino as openvino_graphs
from asdm.runtime.graphs import Graph
from asdm.runtime.openvino import OpenVinoVae, with_openvino_graphs
from asdm.runtime.writers import difference, program_of
from conftest import (
    lora_file,
    predict,
    profile_by_hand,
    tiny_decoder,
    tiny_inpainting_pipeline,
    tiny_pipeline,
    tiny_sdxl_pipeline,
    tiny_unet,
    unet_inputs,
)

openvino = pytest.importorskip("openvino")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
EDITS = [
    {"edit": "remove", "unit": "mid_block", "compensate": "linear"},
    {"edit": "remove", "unit": "up_blocks.3.resnets.1"},
    {"edit": "gri_attention", "unit": ATTENTION, "regions": 3, "pool": 2, "weighted": True},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.2.conv2", "experts": ["up_blocks.3.resnets.1.conv2"]},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.0.conv2", "experts": ["up_blocks.3.resnets.1.conv2"],
     "router": "prompt+time"},
]  # fmt: skip


def student_of(pipeline, *edits):
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "router" in name:
                parameter.normal_()
    return with_unet(pipeline, student)


def run(path, **inputs):
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled({name: value.numpy() for name, value in inputs.items()}).values()))


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A pipeline, and the graphs that it needs for drawing, at one and a half times its own size."""
    pipeline, folder = tiny_pipeline(), tmp_path_factory.mktemp("graphs") / "out"
    export(pipeline, folder, parts=["unet", "vae_decoder"], size=24)
    return pipeline, folder


@pytest.mark.slow
def test_onnx_gives_the_same(pipeline, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    student = student_of(pipeline, *EDITS)
    made = export(student, tmp_path / "out", "onnx", parts=["unet", "text_encoder"])
    assert max(made.differences.values()) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "unet" / "model.onnx")
    assert {each.name: each.shape for each in session.get_inputs()}["timestep"] == [1]
    for batch in (1, 2, 3, 4):
        inputs = graph_inputs(student, batch)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        np.testing.assert_allclose(found, predict(student.unet, **inputs), atol=1e-4)


def graph_inputs(pipeline, batch):
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(batch, pipeline.tokenizer.model_max_length, 32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("router", ["input", "time", "input+time", "prompt"])
def test_a_student_with_all_kinds_of_edits(pipeline, tmp_path, router):
    student = student_of(pipeline, *EDITS[:3], EDITS[3] | {"router": router})
    made = export(student, tmp_path / "out", parts=None if router == "time" else ["unet"])
    assert set(made.differences) == {
        "unet",
        *(("vae_decoder", "vae_encoder", "text_encoder") if router == "time" else ()),
    }
    assert max(made.differences.values()) < 0.02
    for batch in (1, 2, 3, 4):
        inputs = graph_inputs(student, batch)
        found = run(tmp_path / "out" / "unet" / "openvino_model.xml", **inputs)
        np.testing.assert_allclose(found, predict(student.unet, **inputs), atol=0.03)
    # An export leaves nothing behind that the next call would stumble over.
    assert predict(student.unet).isfinite().all()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "vae" not in index
    assert (tmp_path / "out" / "tokenizer").is_dir() and (tmp_path / "out" / "scheduler").is_dir()


@pytest.mark.slow
def test_sdxl_has_two_text_encoders_and_added_embeddings(tmp_path):
    made = export(tiny_sdxl_pipeline(), tmp_path / "out")
    assert "text_encoder_2" in made.differences
    names = [i.get_any_name() for i in openvino.Core().read_model(tmp_path / "out/unet/openvino_model.xml").inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("int8", ["weights", "activations"])
def test_int8_keeps_weights_in_8_bits_and_computes_in_them_where_asked(pipeline, tmp_path, int8):
    pytest.importorskip("nncf")
    # OpenVINO 2026.4 does not compile a 1x1 convolution with 8-bit weights on a single position, the innermost stage's.
    pipeline.register_modules(unet=tiny_unet(sample_size=16))
    export(pipeline, tmp_path / "half", parts=["unet"])
    made = export(pipeline, tmp_path / "int8", int8=int8, parts=["unet"])
    assert 1e-4 < made.differences["unet"] < 0.3
    half, small = (tmp_path / name / "unet" / "openvino_model.bin" for name in ("half", "int8"))
    assert small.stat().st_size < 0.7 * half.stat().st_size
    model = openvino.Core().read_model(tmp_path / "int8" / "unet" / "openvino_model.xml")
    readers = {
        reader.get_node().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "FakeQuantize"
        for reader in op.output(0).get_target_inputs()
    }
    assert ("Convolution" in readers) == (int8 == "activations") and "MatMul" not in readers
    assert json.loads((tmp_path / "int8" / "asdm.json").read_text())["int8"] == int8


@pytest.fixture(scope="module")
def two_graphs(tmp_path_factory):
    """A student, and its UNet in two graphs."""
    folder = tmp_path_factory.mktemp("two_graphs") / "out"
    student = student_of(tiny_pipeline(), *EDITS[:3], EDITS[3] | {"router": "time"})
    export(student, folder, cache=1, parts=["unet_inner", "unet_outer", "vae_decoder"])
    return student, folder


def test_graphs_of_a_tiny_decoder_keep_the_latents_scale(pipeline, tmp_path):
    """The VAE scales latents by 0.5, and a tiny decoder does not."""
    fast = with_decoder(pipeline, tiny_decoder())
    export(fast, tmp_path / "out", parts=["vae_decoder"])
    ready = with_vae(pipeline, OpenVinoVae(tmp_path / "out" / "vae_decoder", pipeline.vae))
    found, expected = (generate(each, ["a prompt"], steps=2, seed=3) for each in (ready, fast))
    assert (found - expected).abs().max() < 0.05
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(encode_images(ready.vae, images), encode_images(pipeline.vae, images))


@pytest.mark.slow
def test_two_graphs_cache_as_the_torch_unet_does(two_graphs):
    student, folder = two_graphs
    ready = with_openvino_graphs(student, folder)
    images = {}
    for name, each in (("torch", student), ("graphs", ready)):
        with cache_features(each, every=2, order=1) as session:
            images[name] = generate(each, ["a prompt"], steps=6, seed=3)
        assert (session.full_steps, session.cached_steps) == (3, 3)
    assert (images["graphs"] - images["torch"]).abs().max() < 0.05
    assert (generate(ready, ["a prompt"], steps=6, seed=3) - images["torch"]).abs().max() > 0.01  # it did cache
    assert fingerprint(ready.unet) == fingerprint(student.unet)  # so a schedule that was found for one fits the other
    for settings, message in (
        ({"every": 2, "depth": 2}, "for depth 1; export others with cache=2"),
        ({"budget": 0.1}, "compares a layer's outputs"),
    ):
        with pytest.raises(AsdmError, match=message), cache_features(ready, **settings):
            pass
    assert json.loads((folder / "model_index.json").read_text()).get("unet_inner") is None


@pytest.mark.slow
def test_two_graphs_of_version_0_1_load(two_graphs, tmp_path):
    """Their marker says `inherit`, and their outer graph's input is `inherited`."""
    student, folder = two_graphs
    old = shutil.copytree(folder, tmp_path / "old")
    for name, now, then in (
        ("asdm.json", '"cache"', '"inherit"'),
        ("unet_outer/openvino_model.xml", "cached_features", "inherited"),
    ):
        text = (old / name).read_text()
        assert now in text
        (old / name).write_text(text.replace(now, then))
    images = []
    for each in (folder, old):
        ready = with_openvino_graphs(student, each)
        with cache_features(ready, every=2) as session:
            images.append(generate(ready, "octopus", steps=2))
        assert (session.full_steps, session.cached_steps) == (1, 1)
    assert torch.equal(*images)


@pytest.mark.slow
def test_two_graphs_in_8_bits_with_ranges_from_data(pipeline, data_folder, tmp_path):
    pytest.importorskip("nncf")
    pipeline.register_modules(unet=tiny_unet(sample_size=16))
    parts = ["unet_inner", "unet_outer"]
    made = export(pipeline, tmp_path / "out", int8="activations", data=data_folder, cache=1, parts=parts)
    export(pipeline, tmp_path / "other", int8="activations", cache=1, parts=parts)
    weights = [(tmp_path / name / "unet_outer" / "openvino_model.bin").read_bytes() for name in ("out", "other")]
    assert weights[0] != weights[1]
    assert set(made.differences) == {"unet_inner", "unet_outer"} and 0 < max(made.differences.values()) < 0.3
    for name in made.differences:
        model = openvino.Core().read_model(tmp_path / "out" / name / "openvino_model.xml")
        assert any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


@pytest.mark.slow
def test_nothing_is_cached_within_one_graph(drawing, tmp_path):
    pipeline, folder = drawing
    ready = with_openvino_graphs(pipeline, folder)
    with pytest.raises(AsdmError, match="one graph, in which nothing"), cache_features(ready, every=2):
        pass
    with pytest.raises(AsdmError, match="cache=1, to=onnx"):
        export(pipeline, tmp_path / "other", "onnx", cache=1)


def test_graphs_stand_in_only_for_what_they_can_do(drawing, tmp_path):
    pipeline, folder = drawing
    ready = with_openvino_graphs(pipeline, folder)
    assert ready.text_encoder is pipeline.text_encoder and pipeline.unet is not ready.unet
    inputs = unet_inputs(pipeline.unet, batch=1)
    with pytest.raises(AsdmError, match="down_block_additional_residuals: not part of the exported graph"):
        ready.unet(**inputs, down_block_additional_residuals=())
    with pytest.raises(AsdmError, match="holds no OpenVINO graphs"):
        with_openvino_graphs(pipeline, tmp_path)


def test_what_needs_the_torch_denoiser_says_so_where_graphs_stand_in_for_it(drawing, tmp_path):
    pipeline, folder = drawing
    fast = with_openvino_graphs(pipeline, folder)
    plan = PruningPlan.for_unet(pipeline.unet, [Remove(unit="mid_block")])
    redundancy = profile_by_hand(pipeline)
    lora = LoraFile(path=lora_file(tiny_unet(), tmp_path / "lora.safetensors"))  # which gives the UNet its layers
    refused = {
        "optimize": lambda: optimize(fast),
        "analyze": lambda: analyze(fast),
        "refine_plan": lambda: refine_plan(fast, redundancy, plan),
        "fit_compensation": lambda: fit_compensation(fast, pipeline.unet),
        "build_student": lambda: build_student(fast.unet, plan),
        "export": lambda: export(fast, tmp_path / "out"),
        "switch_unets": lambda: switch_unets(pipeline, [fast.unet, pipeline.unet], below=[0.5]),
        "distill": lambda: distill(fast, pipeline.unet, "data", tmp_path / "run"),
        "LoRA": lambda: list(generate_images(fast, GenerationRequest(prompts=["x"], steps=1, loras=[lora]))),
        "a copy": lambda: copy.deepcopy(fast.unet),
        "a part": lambda: fast.enable_freeu(1, 1, 1, 1),
    }
    for name, work in refused.items():
        with pytest.raises(AsdmError, match="before with_openvino_graphs"):
            work()
            pytest.fail(name)
    assert not hasattr(fast.unet, "attn_processors") and os.listdir(tmp_path) == ["lora.safetensors"]


def test_other_shapes_than_the_exported_ones_are_refused_in_a_line(drawing):
    pipeline, folder = drawing
    ready = with_openvino_graphs(pipeline, folder)
    for size, message in (
        ({"width": 16, "height": 16}, "16x16 pixels: these graphs were exported for 24x24; .*--size 16"),
        ({"width": 24, "height": 32}, "24x32 pixels: .* or use the torch pipeline"),
    ):
        with pytest.raises(AsdmError, match=message):
            ready("octopus", num_inference_steps=1, **size)
    with pytest.raises(AsdmError, match="latent_sample of 1x4x8x8: the graph was exported for other shapes"):
        ready.vae.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("first", ["torch", "graphs"])
def test_an_evaluation_says_of_graphs_what_is_known(first, drawing):
    pipeline, folder = drawing
    models = {"torch": pipeline, "graphs": with_openvino_graphs(pipeline, folder)}
    models = {first: models[first], **models}
    found = evaluate(models, quality=False, image_to_image=0, steps=1, rounds=1)
    graph, torch_row = found.speed_of("graphs"), found.speed_of("torch")
    assert graph.unet_parameters is graph.gmacs is graph.gmacs_without_attention is None
    assert graph.unet_megabytes == models["graphs"].unet.megabytes > 0
    assert torch_row.unet_parameters > 0 and torch_row.gmacs > 0
    assert "parameters" not in headline_of(found)
    assert "| – | – / – |" in metrics_section(found)
    assert len(list(speed_table(found).rows)) == 2


@pytest.mark.parametrize("part", ["unet", "vae_decoder"])
def test_images_of_other_graphs_are_told_apart(part, drawing, tmp_path):
    pipeline, folder = drawing
    again, other = (shutil.copytree(folder, tmp_path / name) for name in ("again", "other"))
    structure = again / part / "openvino_model.xml"
    structure.write_text(structure.read_text().replace('name="Constant_', 'name="Constant_1'))  # as of another export
    weights = other / part / "openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    first, same, different = (identity_of(with_openvino_graphs(pipeline, each)) for each in (folder, again, other))
    assert same == first and different["model"] != first["model"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"sample_size": ...}),
        ("vae_decoder/config.json", {"scaling_factor": ...}),
        ("vae_decoder/config.json", {"scaling_factor": 0}),
        ("unet/openvino_model.xml", None),
    ],
)
def test_damaged_graphs_are_refused_before_anything_is_drawn(file, change, drawing, tmp_path):
    pipeline, folder = drawing
    folder = shutil.copytree(folder, tmp_path / "out")
    known = {} if change is None else json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps({key: value for key, value in known.items() if value is not ...}))
    with pytest.raises(AsdmError, match=r"out: cannot be loaded .*; export them again"):
        with_openvino_graphs(pipeline, folder)


def test_graphs_are_compiled_once_for_both_parts_of_a_guidance_that_ends(drawing, monkeypatch):
    pipeline, folder = drawing
    ready, compiled = with_openvino_graphs(pipeline, folder), []
    options = openvino_graphs.compile_options
    monkeypatch.setattr(
        openvino_graphs, "compile_options", lambda threads: compiled.append(threads) or options(threads)
    )
    drawn = [generate(ready, "octopus", steps=4, cfg_cutoff=0.5) for _ in range(2)]
    assert len(compiled) == 3  # the UNet for two samples and for one, the decoder
    assert torch.equal(*drawn)
    torch.testing.assert_close(
        drawn[0], generate(pipeline, "octopus", steps=4, cfg_cutoff=0.5, size=24), atol=0.05, rtol=0
    )
    assert ready.unet.precision in ("float32", "bfloat16")


def test_graphs_draw_from_images_in_half_precision_and_at_their_own_size(drawing, tmp_path):
    pipeline, folder = drawing
    ready = with_openvino_graphs(pipeline, folder)
    assert generate(ready, ["octopus"], steps=2).shape == (1, 3, 24, 24)
    image = Image.new("RGB", (24, 24), "red")
    drawn = generate(ready, ["octopus"], steps=4, image=image, strength=0.5)
    expected = generate(pipeline, ["octopus"], steps=4, image=image, strength=0.5)
    assert (drawn - expected).abs().mean() < 0.05
    halved = tiny_pipeline().to(torch.bfloat16)
    assert generate(with_openvino_graphs(halved, folder), ["octopus"], steps=2).isfinite().all()
    # Between two steps of the schedule, as some schedulers ask.
    inputs = unet_inputs(pipeline.unet, batch=1, size=12)
    several = [ready.unet(**inputs | {"timestep": timestep}).sample for timestep in (10, torch.tensor(10.5), 11)]
    assert not torch.equal(several[0], several[1]) and not torch.equal(several[1], several[2])
    for size in (0, -8, 25):
        with pytest.raises(AsdmError, match=f"size={size}: must be a"):
            export(pipeline, tmp_path / "other", size=size)


def test_graphs_take_the_time_step_in_one_dimension(drawing):
    """optimum and OpenVINO GenAI give it one dimension."""
    pipeline, folder = drawing
    assert timestep_dimensions(folder) == 1
    inputs = {**unet_inputs(pipeline.unet, batch=2, size=12), "timestep": torch.tensor([321.0])}
    inputs["encoder_hidden_states"] = torch.randn(2, pipeline.tokenizer.model_max_length, 32)
    found = run(folder / "unet" / "openvino_model.xml", **inputs)
    np.testing.assert_allclose(found, predict(pipeline.unet, **inputs), atol=0.03)


def timestep_dimensions(folder):
    model = openvino.Core().read_model(folder / "unet" / "openvino_model.xml")
    return model.input("timestep").partial_shape.rank.get_length()


@pytest.mark.slow
def test_graphs_of_version_0_1_take_the_time_step_as_a_number(drawing, tmp_path, monkeypatch):
    pipeline, folder = drawing
    make = graphs._denoiser_graph

    def earlier(*arguments):
        graph = make(*arguments)
        return replace(graph, inputs=graph.inputs | {"timestep": torch.tensor(499.5)})

    monkeypatch.setattr(graphs, "_denoiser_graph", earlier)
    export(pipeline, tmp_path / "old", parts=["unet", "vae_decoder"], size=24)
    assert timestep_dimensions(tmp_path / "old") == 0
    images = [
        generate(with_openvino_graphs(pipeline, each), ["octopus"], steps=2) for each in (folder, tmp_path / "old")
    ]
    torch.testing.assert_close(*images, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_sdxl_and_inpainting_pipelines_draw_by_their_graphs(tmp_path):
    for make, more in (
        (tiny_sdxl_pipeline, {}),
        (tiny_inpainting_pipeline, {"image": Image.new("RGB", (16, 16), "red"), "mask": Image.new("L", (16, 16), 255)}),
    ):
        pipeline = make()
        export(pipeline, tmp_path / make.__name__, parts=["unet", "vae_decoder"])
        drawn = generate(with_openvino_graphs(pipeline, tmp_path / make.__name__), ["octopus"], steps=2, **more)
        expected = generate(pipeline, ["octopus"], steps=2, **more)
        assert (drawn - expected).abs().mean() < 0.05


def test_graphs_compute_in_the_faster_precision(drawing, monkeypatch):
    from asdm.runtime import openvino as openvino_graphs

    pipeline, folder = drawing
    own = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    for faster, expected in (("float32", "float32"), ("own", {"f32": "float32", "bf16": "bfloat16"}[own])):
        times = {name: Latency(1.0 if name == faster else 2.0, 1.0, 2.0, 1) for name in ("own", "float32")}
        monkeypatch.setattr(openvino_graphs, "measure_interleaved", lambda _, times=times: times)
        openvino_graphs.compile_options.cache_clear()
        ready = with_openvino_graphs(pipeline, folder)
        ready.unet(**unet_inputs(pipeline.unet, batch=1, size=12))
        assert ready.unet.precision == expected
    openvino_graphs.compile_options.cache_clear()


def test_a_graph_for_one_batch_alone_is_refused():
    class EachAlone(torch.nn.Module):
        def forward(self, sample):
            return (torch.cat([each * 2 for each in sample.split(1)]),)

    graph = Graph("unet", EachAlone(), {"sample": torch.zeros(2, 3)}, ["out_sample"], {})
    with pytest.raises(AsdmError, match="unet: its graph takes no other batch than the examples'"):
        program_of(graph)


def test_what_cannot_be_exported_is_said_before_anything_is_written(pipeline, tmp_path):
    with pytest.raises(AsdmError, match="to='tflite': must be one of openvino, onnx"):
        export(pipeline, tmp_path / "out", "tflite")
    with pytest.raises(AsdmError, match="int8=weights, to=onnx: int8 is for openvino, and weights or activations"):
        export(pipeline, tmp_path / "out", "onnx", int8="weights")
    with pytest.raises(AsdmError, match="data=demo, int8=weights: only int8 activations look at data"):
        export(pipeline, tmp_path / "out", int8="weights", data="demo")
    with pytest.raises(AsdmError, match="load it in float32"):
        export(student_of(tiny_pipeline(), Remove(unit="mid_block")).to(torch.bfloat16), tmp_path / "out")
    guided = with_unet(tiny_pipeline(), tiny_unet(time_cond_proj_dim=32))
    with pytest.raises(AsdmError, match="guidance by an embedding"):
        export(guided, tmp_path / "out")
    without_text = tiny_pipeline()
    without_text.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(AsdmError, match="export: this pipeline has no tokenizer; load it with its text encoders"):
        export(without_text, tmp_path / "out")
    for parts, cache, said in (
        (
            ["unet", "unett"],
            1,
            "parts='unett': this export's graphs are unet, vae_decoder, vae_encoder, text_encoder, ",
        ),
        (["unet_inner"], None, "parts='unet_inner': .*, text_encoder; give cache, the depth of these two"),
        ([], None, r"parts=\[\]: must be a list with 1 or more"),
    ):
        with pytest.raises(AsdmError, match=said):
            export(pipeline, tmp_path / "out", parts=parts, cache=cache)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(AsdmError, match="was not written by asdm"):
        export(pipeline, tmp_path / "mine")
    assert not (tmp_path / "out").exists()


def test_only_unets_are_exported(pipeline, tmp_path):
    family = UNetFamily()
    family.component = "transformer"
    pipeline.unet.family = family
    with pytest.raises(AsdmError, match="export: graphs are for UNets; this pipeline has a UNet2DConditionModel"):
        export(pipeline, tmp_path / "out")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_graph_that_computes_no_numbers_is_refused(number):
    class Two(torch.nn.Module):
        def forward(self, x):
            return x, x

    graph = Graph("unet", Two(), {"x": torch.ones(3)}, ["first", "second"], {})
    right, wrong = np.ones(3, np.float32), np.full(3, number, np.float32)
    assert difference(graph, lambda: [right, right], 0.02) == 0
    for outputs in ([wrong, right], [right, wrong]):
        with pytest.raises(AsdmError, match=r"differs from torch's by (nan|inf)%, more than 2%"):
            difference(graph, lambda outputs=outputs: outputs, 0.02)
