"""What a user gives is refused before the work begins: in one line that names the value, for every option and argument.

The walk over the command line finds the options by their types, so a new option is tried as well.
"""

import inspect
import math
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import asdm
from asdm import AsdmError, CacheSchedule, DecoderRecipe, GenerationRequest, PruningPlan, Stage, cli, lcm_scheduler
from asdm.benchmark.baselines import deep_cache, t_gate, tome
from asdm.benchmark.methods import methods
from asdm.data.sources import open_data
from asdm.diffusion.generation import default_steps, most_steps
from asdm.distillation.stages import Consistency, LossWeights, Semantics, parse_stages
from asdm.evaluation.image_folders import distinct_names, folder_names
from asdm.evaluation.metrics import Judge
from asdm.evaluation.protocol.weights import SOURCES
from asdm.student.plan import PlanMetrics
from conftest import tiny_decoder, tiny_pipeline, tiny_sdxl_pipeline

NAN, INF = math.nan, math.inf

# What each command needs beside the option that is tried.
NEEDED = {
    "analyze": ["demo"],
    "plan": ["demo", "--params", "0.8"],
    "prune": ["demo", "plan.json", "--out", "out"],
    "prepare-data": ["demo", "demo", "--out", "out"],
    "distill": ["demo", "demo", "--data", "demo", "--out", "out"],
    "distill-decoder": ["demo", "--data", "demo", "--out", "out"],
    "evaluate": ["demo"],
    "generate": ["demo", "x"],
    "export": ["demo", "--to", "onnx", "--out", "out"],
    "convert-lora": ["lora.safetensors", "--for", "demo", "--out", "out.safetensors"],
    "compress": ["demo", "--out", "out"],
    "demo": [],
    "benchmark": ["demo"],
    "app": [],
    "doctor": [],
}
BAD = {float: ("nan", "inf", "-1"), int: ("-1", "1" + 30 * "0"), Literal: ("x",)}


def options():
    """(command, option, its type) of the command line."""
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        for option, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is not Annotated:
                continue
            kind, info = get_args(hint)[:2]
            if get_origin(kind) in (Union, types.UnionType):
                kind = next(each for each in get_args(kind) if each is not type(None))
            kind = Literal if get_origin(kind) is Literal else kind
            declared = getattr(info, "param_decls", None) or [f"--{option.replace('_', '-')}"]
            if type(info).__name__ == "OptionInfo":
                yield name, declared[0], kind


@pytest.fixture
def refusal(monkeypatch, capfd, tmp_path):
    """Run `asdm ARGS`, which must be refused before a model is loaded; returns the line."""

    def loaded(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("asdm.cli.loading.load_model", loaded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asdm.compression.compress.load_pipeline", loaded)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["asdm", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capfd.readouterr()
        assert ended.value.code == 2, (arguments, error)
        assert out == "" and len(error.splitlines()) == 1 and error.startswith("error: "), (arguments, out, error)
        assert list(tmp_path.iterdir()) == [], arguments
        return error

    return call


@pytest.mark.parametrize("command", NEEDED)
def test_no_option_takes_what_is_no_number_of_its_range(refusal, command):
    assert set(NEEDED) == {name for name, _, _ in options()}
    for option, kind in [(option, kind) for name, option, kind in options() if name == command and kind in BAD]:
        for value in BAD[kind]:
            line = refusal(command, *NEEDED[command], f"{option}={value}")
            assert option in line and (value in line or value.lstrip("-") in line), line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "", "x"], "MODEL='': must be a name or path that is not empty"),
        (["generate", "demo", "\udcff"], "text in UTF-8"),
        (["generate", "demo"], "no prompt: give one behind MODEL"),
        (["generate", "demo", "x", "--prompt-file", "gone.txt"], "gone.txt: no such file of prompts"),
        (["generate", "demo", "-", "--prompt-file", "-"], "standard input is read once"),
        (["generate", "demo", "x", "--seeds", "3-1"], "seeds=3-1: a range must rise"),
        (["generate", "demo", "x", "--seeds", "3", "--seed", "0"], "--seed 0: --seeds says it already"),
        (["generate", "demo", "x", "--seeds", "3", "--num-images", "2"], "num_images=2: seeds=[3] says it already"),
        (["generate", "demo", "x", "--size", "64", "--width", "64"], "--size 64: is both sides"),
        (["generate", "demo", "x", "--width", "64"], "width=64: give height too"),
        (
            ["generate", "demo", "x", "--width", "60", "--height", "64"],
            "--width=60: must be a positive multiple of 8; the nearest is 64",
        ),
        (["generate", "demo", "x", "--scheduler", "eulr"], "scheduler=eulr: must be one of ddim"),
        (["generate", "demo", "x", "--lora", "gone.safetensors:0.5"], "gone.safetensors: no such LoRA file"),
        (["generate", "demo", "x", "--lora", "a", "--low-noise-model", "b"], "--lora a: does not go with"),
        (["generate", "demo", "x", "--control-scale", "2"], "control_scale=2.0: has no effect without controlnet"),
        (["generate", "demo", "x", "--controlnet", "./gone"], "controlnet=gone: has no effect without control_image"),
        (["generate", "demo", "x", "--strength", "0.5"], "strength=0.5: has no effect without image"),
        (["generate", "demo", "x", "--negative", "y", "--guidance", "1"], "negative=y: has no effect"),
        (["generate", "demo", "x", "--cache", "nan"], "--cache=nan: must be a finite number"),
        (["generate", "demo", "x", "--cache", ""], "--cache='': must be a name or path"),
        (["generate", "demo", "x", "--cache", "gone.json"], "gone.json: no such file"),
        (["generate", "demo", "x", "--image", "bild ü.png"], "bild ü.png: no such image file"),
        (["analyze", "demo", "--data", ""], "--data='': must be"),
        (["analyze", "demo", "--data", "größe ☃"], "größe ☃: no such data folder"),
        (["plan", "demo"], "exactly one of speedup, params, macs, preset"),
        (["plan", "demo", "--params", "0.8", "--macs", "0.8"], "got params, macs"),
        (["plan", "demo", "--preset", "huge"], "huge: no such preset"),
        (["plan", "demo", "--speedup", "1"], "above 1"),
        (["plan", "demo", "--speedup", "1e9"], "out of reach"),
        (["compress", "demo", "--out", "out", "--params", "nan"], "--params=nan"),
        (["compress", "demo", "--out", "out", "--macs", "60"], "--macs=60: must be a share of the original's up to 1"),
        (["plan", "demo", "--params", "5"], "--params=5: must be a share of the original's up to 1, such as 0.6, or"),
        (["plan", "demo", "--params", "0.8", "--experts", "5"], "--experts=5: must be a share"),
        (["prepare-data", "demo", "demo", "--out", "out", "--draws", "8"], "add --teacher-features float16"),
        (
            ["prepare-data", "demo", "demo", "--out", "out", "--teacher-features", "int8", "--recipe", "gone"],
            "gone: no",
        ),
        (["compress", "demo", "--out", "out"], "exactly one of"),
        (["compress", "demo", "--out", "out", "--preset", "huge", "--steps", "0"], "no such preset"),
        (["compress", "demo", "--out", "out", "--params", "0.8", "--data", "gone"], "gone: no such data folder"),
        (["compress", "demo", "--out", "out", "--params", "0.8", "--recipe", "gone"], "gone: no such recipe"),
        (["evaluate", "demo", "--data", "gone"], "gone: no such data folder"),
        (["evaluate", "demo", "--limit", "2"], "--limit 2: has no effect on an evaluation by speed and samples"),
        (["evaluate", "demo", "--protocol", "demo", "--rounds", "2"], "--rounds 2: has no effect on an evaluation by"),
        (["evaluate", "demo", "--protocol", "demo", "--metrics", "fit"], "metrics=fit: must be all or some of fid"),
        (["evaluate", "demo", "--protocol", "demo", "--metrics", "fid,fid"], "metrics=fid: named twice"),
        (["evaluate", "demo", "--protocol", "demo", "--metrics", "ssim=x"], "metrics=ssim=x: name a network behind ="),
        (["evaluate", "demo", "--protocol", "demo", "--images", "gone"], "gone: no such folder of real images"),
        (["evaluate", "demo", "--protocol", "demo", "--captions", "gone"], "gone: no such file of captions"),
        (["evaluate", "demo", "--protocol", "demo", "--weights", "gone"], "gone: no such folder of weights"),
        (["evaluate", "demo", "--protocol", "coco30k"], "captions: coco30k needs the file of prompts"),
        (["evaluate", "demo", "--layout", "dpg"], "--layout dpg: needs --prompts"),
        (["evaluate", "demo", "--layout", "dpg", "--prompts", "gone"], "gone: no such file of prompts for dpg"),
        (["evaluate", "demo", "--layout", "dpg", "--protocol", "demo"], "does not go with --protocol demo"),
        (["benchmark", "demo", "demo"], "demo: named twice"),
        (["benchmark", "demo", "--decoder", "./gone"], "gone: no such folder of a decoder"),
        (["distill-decoder", "demo", "--data", "gone", "--out", "out"], "gone: no such data folder"),
        (
            ["distill-decoder", "demo", "--data", "demo", "--out", "out", "--blocks", "3,x"],
            "--blocks=3,x: must be whole",
        ),
        (["prune", "demo", "plän.json", "--out", "out"], "plän.json: no such plan file"),
        (["nothing"], "No such command 'nothing'"),
        (["generate"], "Missing argument"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(refusal, arguments, told):
    assert told in refusal(*arguments)


def test_an_unknown_option_is_told_before_a_model_is_loaded(refusal):
    # With the punctuation of typer's own parser, or of click's.
    assert re.search("No such option:? '?--nothing", refusal("generate", "demo", "x", "--nothing"))


@pytest.fixture(scope="module")
def tiny():
    """A tiny pipeline, its map and a plan, for checks that come before all work."""
    pipeline = tiny_pipeline()
    redundancy = asdm.analyze(pipeline, sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1)
    return {
        "pipeline": pipeline,
        "unet": pipeline.unet,
        "redundancy": redundancy,
        "plan": PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}]),
    }


def calls(tiny):
    """Each public function with arguments that are right; those that are numbers, words or names are made wrong."""
    pipeline, unet, redundancy, plan = (tiny[name] for name in ("pipeline", "unet", "redundancy", "plan"))
    image = Image.new("RGB", (16, 16))
    return {
        "generate": dict(
            pipeline=pipeline, prompts="x", steps=2, guidance_scale=2.0, cfg_cutoff=0.5, seed=0, strength=0.5,
            size=16, batch_size=1, image=image, mask=image, progress=print,
        ),
        "analyze": dict(
            pipeline=pipeline, data="x", prompts=["x"], sensitivity="taylor", compensate="linear", timesteps=1,
            samples=1, latency_rounds=1, seed=0, progress=print,
        ),
        "expert_usage": dict(pipeline=pipeline, prompts={"x": ["x"], "y": ["y"]}, timesteps=1, seed=0),
        "make_plan": dict(
            redundancy=redundancy, speedup=1.5, params=0.8, macs=0.8, preset="a-sdm", portable=True,
            compensate="bias", unet=unet, rounds=1, progress=print,
        ),
        "add_cond_conv": dict(plan=plan, unet=unet, params=0.1, router="time", activation="softmax"),
        "build_student": dict(unet=unet, plan=plan),
        "fit_compensation": dict(
            pipeline=pipeline, student=unet, data="x", prompts=["x"], timesteps=1, samples=1, ridge=0.1, seed=0,
            progress=print,
        ),
        "fold_compensation": dict(student=unet, within_blocks=True),
        "remeasure_plan": dict(plan=plan, unet=unet),
        "refine_plan": dict(
            pipeline=pipeline, redundancy=redundancy, plan=plan, data="x", prompts=["x"], timesteps=1, samples=1,
            rounds=1, seed=0, progress=print,
        ),
        "compress": dict(
            model="x", out="x", speedup=1.5, params=0.8, macs=0.8, preset="a-sdm", sensitivity="taylor",
            compensate="bias", refine=1, data="x", steps=1, recipe="joint", stages=[], captions="x", samples=1,
            image_to_image=1, strength=0.5, sampling_steps=1, decoder="x", save_decoder=True, dtype="float16", seed=0,
            progress=print, estimated=print,
        ),
        "distill": dict(
            teacher=pipeline, student=unet, data="x", folder="x", recipe="joint", steps=1, stages=[1], captions="x",
            device="cpu", seed=0, progress=print,
        ),
        "distill_decoder": dict(
            pipeline=pipeline, data="x", folder="x", recipe=DecoderRecipe(), minutes=1.0, seed=0, progress=print,
        ),
        "evaluate": dict(
            pipelines={"x": pipeline}, data="x", prompts=["x"], samples=1, image_to_image=1, strength=0.5, steps=1,
            guidance_scale=1.0, seed=0, rounds=1, quality=True, images_folder="x", progress=print,
        ),
        "evaluate_by_protocol": dict(
            pipelines={"x": pipeline}, protocol="demo", folder="x", images="x", captions="x", limit=2, metrics="ssim",
            weights="x", steps=1, guidance_scale=1.0, size=16, seed=0, batch_size=1, progress=print,
        ),
        "generate_for_scorer": dict(
            pipelines={"x": pipeline}, layout="dpg", prompts="x", folder="x", limit=1, steps=1, guidance_scale=1.0,
            size=16, seed=0, batch_size=1, progress=print,
        ),
        "export_checkpoint": dict(
            pipeline=pipeline, file="x.safetensors", program="diffusers", unet_only=True, dtype="fp32", license="mit",
        ),
        "convert_lora": dict(lora="x", unet=unet, file="x.safetensors", checkpoint="y.safetensors"),
        "export": dict(
            pipeline=pipeline, folder="x", to="onnx", size=16, int8="weights", data="x", cache=1, parts=["x"],
            progress=print,
        ),
        "cache_features": dict(
            pipeline=pipeline, speedup=1.1, every=2, steps=[0], budget=0.1, schedule="x", depth=1,
            spacing="late", order=1, damping=0.5,
        ),
        "calibrate_cache": dict(
            pipeline=pipeline, speedup=1.1, steps=4, data="x", samples=1, guidance_scale=1.0, depth=1, seed=0,
            progress=print,
        ),
        "generate_images": dict(
            pipeline=pipeline, request=GenerationRequest(prompts=["x"]), progress=print, cancelled=print, batch_size=1,
        ),
        "compare_images": dict(
            pipeline=pipeline, teacher=pipeline, request=GenerationRequest(prompts=["x"]), progress=print,
            cancelled=print,
        ),
        "CfgCutoff": dict(pipeline=pipeline, cfg_cutoff=0.5),
        "lcm_scheduler": dict(config=pipeline.scheduler.config, solver_steps=50),
        "load_pipeline": dict(model="demo", dtype=torch.float32, device="cpu"),
        "optimize": dict(pipeline=pipeline, max_error=0.1, compile=True, decoder="x", rounds=1, progress=print),
        "prepare_data": dict(
            pipeline=pipeline, data="x", folder="x", batch_size=1, steps=1, seed=0, progress=print,
            ignore_missing_shards=True,
        ),
        "record_teacher": dict(
            pipeline=pipeline, data="x", recipe="joint", stages=[1], draws=1, dtype="int8", seed=0, progress=print
        ),
        "save_decoder": dict(tiny=tiny_decoder(), folder="x", about={}),
        "save_pipeline": dict(pipeline=pipeline, folder="x", about={}),
        "switch_unets": dict(pipeline=pipeline, unets=[unet], below=[0.5], speedup=1.1),
        "with_decoder": dict(pipeline=pipeline, decoder="x"),
        "with_openvino_graphs": dict(pipeline=pipeline, folder="x"),
        "with_unet": dict(pipeline=pipeline, unet=unet),
    }  # fmt: skip


NEVER = {
    float: (NAN, INF, -INF, -1.0, "1", True, [1], 10**400),
    int: (NAN, INF, -1, 1.5, "1", True, [1], 10**30),
    str: ("", 7, True, NAN, "a\0b"),
    bool: (1, 0.0, "yes"),
    list: (7, "x", [NAN], [None], [True], [""], {"a": 1}),
    dict: (7, [], "x"),
}
PROMPTS = ("generate", "analyze", "fit_compensation", "refine_plan", "evaluate")


def is_allowed(name, argument, value):
    """A prompt may be an empty text; there may be fewer prompts than a batch could have."""
    if argument == "prompts" and name in PROMPTS:
        return value == [""] or (name == "generate" and value in ("", "x", "a\0b"))
    return (name, argument, value) == ("generate", "batch_size", 10**30)


def test_every_public_function_is_called_here(tiny):
    functions = {name for name in asdm.__all__ if not inspect.isclass(getattr(asdm, name))}
    assert functions - set(calls(tiny)) == set()


@pytest.mark.parametrize("name", calls({"pipeline": tiny_pipeline(), "unet": 0, "redundancy": 0, "plan": 0}))
def test_no_public_argument_takes_a_value_of_another_kind(tiny, name):
    function, right = getattr(asdm, name), calls(tiny)[name]
    defaults = {key: each.default for key, each in inspect.signature(function).parameters.items()}
    for argument, value in right.items():
        others = {key: each for key, each in right.items() if defaults[key] is inspect.Parameter.empty}
        others_of_ours = [each for each in tiny.values() if type(each) is not type(value) and not callable(value)]
        wrong = NEVER.get(type(value), (7, NAN, "x", True, *others_of_ours))
        if defaults[argument] is not None:
            wrong = (*wrong, None)
        for bad in wrong:
            if is_allowed(name, argument, bad):
                continue
            if name == "cache_features" and argument not in ("pipeline", "speedup", "every", "steps", "budget"):
                others |= {"every": 2}
            with pytest.raises(AsdmError, match=r"^[^\n]+$") as error:
                made = function(**{**others, argument: bad})
                made.__enter__() if hasattr(made, "__enter__") else None
            assert len(str(error.value)) < 400, (argument, bad)


def test_a_plan_by_hand_is_for_a_denoiser(tiny):
    for name in ("pipeline", "redundancy", "plan"):
        with pytest.raises(AsdmError, match=r"^unet=[^\n]*: must be a denoiser"):
            PruningPlan.for_unet(tiny[name])
    with pytest.raises(AsdmError, match=r"^edits=[^\n]{,90}: must be a list of edits"):
        PruningPlan.for_unet(tiny["unet"], tiny["unet"])


RECORDS = {
    Stage: {"name": "a", "steps": 1},
    LossWeights: {},
    Semantics: {},
    Consistency: {},
    DecoderRecipe: {},
    PlanMetrics: {"target": {}, "predicted_sensitivity": 0.1, "predicted_speedup": 1.1},
    GenerationRequest: {"prompts": ["x"]},
    CacheSchedule: {
        "fingerprint": "x", "steps": 4, "full_steps": (0,), "depth": 1, "order": 1, "full_ms": 2.0, "cached_ms": 1.0,
        "speedup": 1.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_no_field_of_a_record_takes_what_is_no_number(kind):
    kind(**RECORDS[kind])
    numbers = [
        name
        for name, field in kind.model_fields.items()
        if {float, int} & {field.annotation, *get_args(field.annotation)}
    ]
    numbers += kind.model_validate(RECORDS[kind]).model_extra or ()  # the weights of losses
    assert numbers
    for name in numbers:
        for bad in (NAN, INF, -INF, True, "x", [1]):
            with pytest.raises(AsdmError, match=rf"^{name}\b[^\n]*$"):
                kind(**RECORDS[kind] | {name: bad})


def test_stages_by_hand_are_refused_in_one_line():
    for row, told in [
        ({"name": "a", "steps": 1, "losses": {"task": NAN}}, "losses.task=nan"),
        ({"name": "a", "steps": 1, "semantics": {"every": True}}, "semantics.every=True"),
        ({"name": "a", "steps": 1, "batch_size": 8, "accumulation": 3}, "batch_size=8: not a multiple of 3"),
        ({"name": "../a", "steps": 1}, "name='../a'"),
        ({"name": "", "steps": 1}, "name=''"),
        ({"name": "a"}, "steps: field required"),
        ({"name": "a", "steps": 1, "consistency": {"student_steps": 51}}, "consistency.student_steps=51: more than"),
        (7, "valid dictionary"),
    ]:
        with pytest.raises(AsdmError, match=r"^not a stage: [^\n]+$") as error:
            parse_stages([row])
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (asdm.GriAttention, {"regions": NAN}),
        (asdm.GriAttention, {"regions": 0}),
        (asdm.GriAttention, {"pool": True}),
        (asdm.GriAttention, {"weighted": 1}),
        (asdm.Remove, {"unit": None}),
        (asdm.Remove, {"compensate": "nothing"}),
        (asdm.Remove, {"unit": torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 1)] * 9)}),
        (asdm.CondConv, {"experts": "abc"}),
        (asdm.CondConv, {"experts": ["a"], "router": NAN}),
    ],
)
def test_an_edit_takes_only_what_it_says(kind, fields):
    with pytest.raises(AsdmError, match=r"^[^\n]{,200}$"):
        kind(**{"unit": "mid_block", **fields})


def test_sampling_takes_as_many_steps_as_the_scheduler_has(tiny):
    few = tiny_pipeline()
    few.scheduler = lcm_scheduler(few.scheduler.config, 50)
    assert (most_steps(few), default_steps(few)) == (50, 4)
    assert asdm.generate(few, "x", steps=50, size=8).shape == (1, 3, 8, 8)
    for pipeline, steps in ((few, 51), (few, 60), (tiny["pipeline"], 1001), (tiny["pipeline"], 5000)):
        with pytest.raises(AsdmError, match=rf"steps={steps}: .* at most"):
            asdm.generate(pipeline, "x", steps=steps)
        with pytest.raises(AsdmError, match=rf"steps={steps}: .* at most"):
            asdm.calibrate_cache(pipeline, speedup=1.1, steps=steps)
    few.scheduler = DDIMScheduler.from_config(few.scheduler.config)  # which carries the solver's steps along
    assert (most_steps(few), default_steps(few)) == (1000, 25)
    few.scheduler = lcm_scheduler(few.scheduler.config, 2)
    assert default_steps(few) == 2


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_sizes_are_those_that_the_pipeline_draws(make):
    pipeline = make()
    assert pipeline.vae_scale_factor == 2
    for size in (8, 24):
        assert asdm.generate(pipeline, "x", steps=1, size=size).shape[2:] == (size, size)
    for size, nearest in ((10, 8), (100, 96), (4, 8)):
        with pytest.raises(AsdmError, match=f"size={size}: .* multiple of 8; the nearest is {nearest}"):
            asdm.generate(pipeline, "x", steps=1, size=size)
    assert asdm.generate(pipeline, "x", steps=2, image=Image.new("L", (18, 26))).shape[2:] == (26, 18)
    with pytest.raises(AsdmError, match=r"\(3, 3\) pixels"):
        asdm.generate(pipeline, "x", steps=2, image=Image.new("RGB", (3, 3)))


def test_images_that_are_no_numbers_are_told_and_not_saved(monkeypatch, capfd, tmp_path):
    pipeline = tiny_pipeline()
    with pytest.raises(AsdmError, match=r"1 of 1 images are no numbers .* guidance scale 1e\+30"):
        asdm.generate(pipeline, "x", steps=1, guidance_scale=1e30)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(NAN)
    monkeypatch.setattr("asdm.cli.loading.load_model", lambda *_, **__: pipeline)
    monkeypatch.setattr(sys, "argv", ["asdm", "generate", "demo", "x", "--steps", "1", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "1 of 1 images are no numbers" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_is_not_possible_is_told_before_the_data_is_prepared(tiny, data_folder, tmp_path):
    student = asdm.build_student(tiny["unet"], tiny["plan"])
    good = Stage(name="good", steps=1, batch_size=1)
    for changes, told in [
        ({"student_blocks": ["nothing"]}, "nothing: no such block"),
        ({"trained": "routers"}, "trained=routers"),
        ({"scope": "consistency", "consistency": {"solver_steps": 1001}}, "solver_steps=1001"),
        ({"losses": {"semantic": 1}, "semantics": {"encoder": "clip"}}, "no clip folder"),
    ]:
        bad = Stage(name="bad", steps=1, batch_size=1, **changes)
        with pytest.raises(AsdmError, match=told):
            asdm.distill(tiny["pipeline"], student, data_folder, tmp_path / "out", stages=[good, bad])
        assert not (tmp_path / "out" / "prepared").exists()


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("webdataset", "data", lambda _: open_data("https://host/{0..1}.tar")),
        ("datasets", "data", lambda _: open_data("hf:owner/name")),
        ("openvino", "openvino", lambda pipeline: asdm.export(pipeline, "out", "openvino")),
        ("nncf", "int8", lambda pipeline: asdm.export(pipeline, "out", "openvino", int8="weights")),
        ("onnxscript", "onnx", lambda pipeline: asdm.export(pipeline, "out", "onnx")),
        ("tomesd", "benchmark", lambda pipeline: tome(4, 0.5).prepared(pipeline).__enter__()),
        ("DeepCache", "benchmark", lambda pipeline: deep_cache(4, 2).prepared(pipeline).__enter__()),
        ("tgate", "benchmark", lambda pipeline: t_gate(4, 2).prepared(pipeline).__enter__()),
        ("efficientnet_lite_pytorch", "judge", lambda _: Judge()),
        ("torch_fidelity", "metrics", lambda _: SOURCES["inception"].name),
        ("torchvision", "metrics", lambda _: SOURCES["lpips"].name),
    ],
)
def test_what_is_not_installed_is_told_with_its_extra(tiny, monkeypatch, package, extra, use):
    for module in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AsdmError, match=rf"{package} is not installed; .*asdm-diffusion\[{extra}\]"):
        use(tiny["pipeline"])


def test_models_of_one_name_are_told_apart(monkeypatch, tmp_path):
    assert distinct_names(["demo", "demo", "x", "demo"]) == ["demo", "demo (2)", "x", "demo (3)"]
    folders = ["runs/a/student", "runs/b/student", "other", "runs/a/student"]
    assert distinct_names(folders, shortest=True) == ["a/student", "b/student", "other", "a/student (2)"]
    assert folder_names(["a/b", "a_b", "a b"]) == {"a/b": "a_b", "a_b": "a_b (2)", "a b": "a_b (3)"}
    seen = []

    class Evaluated(Exception):
        pass

    def evaluated(pipelines, **_):
        seen.extend(pipelines)
        raise Evaluated

    monkeypatch.setattr("asdm.evaluation.comparison.evaluate", evaluated)
    monkeypatch.setattr("asdm.cli.loading.load_model", lambda *_, **__: tiny_pipeline())
    monkeypatch.setattr(sys, "argv", ["asdm", "evaluate", "demo", "demo"])
    with pytest.raises(Evaluated):
        cli.main()
    assert seen == ["demo", "demo (2)"]
    with pytest.raises(AsdmError, match="original: two methods have this name"):
        methods(25, {"original": lambda pipeline: pipeline})


def test_other_libraries_give_no_advice_and_benchmarks_need_a_package_only_where_they_use_it(tmp_path):
    """In a fresh interpreter, without the packages of the extras."""
    scripts = Path(__file__).parent.parent / "benchmarks"
    script = (
        "import asdm, sys, importlib\n"
        "asdm.generate(asdm.load_pipeline('demo'), 'a cat', steps=1)\n"
        "print('drawn')\n"
        "for name in ('tomesd', 'DeepCache', 'tgate', 'openvino', 'nncf', 'webdataset'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(scripts)!r})\n"
        "for name in ('ablation', 'caching', 'gpu', 'incubation_memory', 'more_tokens', 'student', 'training_step'):\n"
        "    importlib.import_module(name)\n"
        "sys.argv = ['student.py', 'gri']\n"
        "sys.modules['common'].run(sys.modules['student'].app)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "", done.stderr
    told = "error: ToMe: tomesd is not installed; install it with pip install 'asdm-diffusion[benchmark]'"
    assert done.stdout.splitlines() == ["drawn", told]
