"""What a user gives is refused before the work begins: in one line that names the value, for every option and argument.

The walk over the command line finds the options by their types, so a new option is tried as well.
"""

import inspect
import math
import sys
import types
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from PIL import Image

import asdm
from asdm import AsdmError, PruningPlan, cli
from conftest import tiny_pipeline

NAN, INF = math.nan, math.inf
NO_NUMBERS = (NAN, INF, -INF, "1", True, [1])

# What each command needs beside the option that is tried.
NEEDED = {
    "analyze": ["demo"],
    "plan": ["demo", "--params", "0.8"],
    "prune": ["demo", "plan.json", "--out", "out"],
    "prepare-data": ["demo", "demo", "--out", "out"],
    "distill": ["demo", "demo", "--data", "demo", "--out", "out"],
    "evaluate": ["demo"],
    "generate": ["demo", "x"],
    "export": ["demo", "--to", "onnx", "--out", "out"],
    "compress": ["demo", "--out", "out"],
    "demo": [],
    "benchmark": ["demo"],
    "demo-build": [],
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

    monkeypatch.setattr(cli, "_load", loaded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asdm.compression.load_pipeline", loaded)

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
        (["generate", "demo", "x", "--inherit", "nan"], "--inherit=nan: must be a finite number"),
        (["generate", "demo", "x", "--inherit", ""], "--inherit='': must be a name or path"),
        (["generate", "demo", "x", "--inherit", "gone.json"], "gone.json: no such file"),
        (["generate", "demo", "x", "--image", "bild ü.png"], "bild ü.png: no such image file"),
        (["analyze", "demo", "--data", ""], "--data='': must be"),
        (["analyze", "demo", "--data", "größe ☃"], "größe ☃: no such data folder"),
        (["plan", "demo"], "exactly one of speedup, params, macs, preset"),
        (["plan", "demo", "--params", "0.8", "--macs", "0.8"], "got params, macs"),
        (["plan", "demo", "--preset", "huge"], "huge: no such preset"),
        (["plan", "demo", "--speedup", "1"], "above 1"),
        (["plan", "demo", "--speedup", "1e9"], "out of reach"),
        (["compress", "demo", "--out", "out", "--params", "nan"], "--params=nan"),
        (["compress", "demo", "--out", "out"], "exactly one of"),
        (["compress", "demo", "--out", "out", "--preset", "huge", "--steps", "0"], "no such preset"),
        (["compress", "demo", "--out", "out", "--params", "0.8", "--data", "gone"], "gone: no such data folder"),
        (["compress", "demo", "--out", "out", "--params", "0.8", "--recipe", "gone"], "gone: no such recipe"),
        (["evaluate", "demo", "--data", "gone"], "gone: no such data folder"),
        (["benchmark", "demo", "demo"], "demo: named twice"),
        (["prune", "demo", "plän.json", "--out", "out"], "plän.json: no such plan file"),
        (["nothing"], "No such command 'nothing'"),
        (["generate", "demo", "x", "--nothing"], "No such option: --nothing"),
        (["generate"], "Missing argument"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(refusal, arguments, told):
    assert told in refusal(*arguments)


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
            pipeline=pipeline, prompts="x", steps=2, guidance_scale=2.0, guidance_end=0.5, seed=0, strength=0.5,
            size=16, batch_size=1, image=image, mask=image, progress=print,
        ),
        "analyze": dict(
            pipeline=pipeline, data="x", prompts=["x"], sensitivity="taylor", compensate="linear", timesteps=1,
            samples=1, latency_rounds=1, seed=0, progress=print,
        ),
        "make_plan": dict(
            redundancy=redundancy, speedup=1.5, params=0.8, macs=0.8, preset="a-sdm", compensate="bias", unet=unet,
            rounds=1, progress=print,
        ),
        "add_banks": dict(plan=plan, unet=unet, params=0.1, router="time", activation="softmax"),
        "build_student": dict(unet=unet, plan=plan),
        "fit_compensation": dict(
            pipeline=pipeline, student=unet, data="x", prompts=["x"], timesteps=1, samples=1, ridge=0.1, seed=0,
            progress=print,
        ),
        "repair_plan": dict(
            pipeline=pipeline, redundancy=redundancy, plan=plan, data="x", prompts=["x"], timesteps=1, samples=1,
            rounds=1, seed=0, progress=print,
        ),
        "compress": dict(
            model="x", out="x", speedup=1.5, params=0.8, macs=0.8, preset="a-sdm", sensitivity="taylor",
            compensate="bias", repair=1, data="x", steps=1, recipe="joint", stages=[], samples=1, sampling_steps=1,
            seed=0, progress=print,
        ),
        "distill": dict(
            teacher=pipeline, student=unet, data="x", folder="x", recipe="joint", steps=1, stages=[1], seed=0,
            progress=print,
        ),
        "evaluate": dict(
            pipelines={"x": pipeline}, data="x", prompts=["x"], samples=1, steps=1, guidance_scale=1.0, seed=0,
            rounds=1, quality=True, images_folder="x", progress=print,
        ),
        "export": dict(
            pipeline=pipeline, folder="x", to="onnx", size=16, int8="weights", data="x", inherit=1, parts=["x"],
            progress=print,
        ),
        "inherit_features": dict(
            pipeline=pipeline, speedup=1.1, every=2, steps=[0], budget=0.1, schedule="x", granularity="layer", depth=1,
            spacing="early", order=1, damping=0.5,
        ),
        "calibrate_inheritance": dict(
            pipeline=pipeline, speedup=1.1, steps=4, data="x", samples=1, guidance_scale=1.0, depth=1, seed=0,
            progress=print,
        ),
        "GuidanceEnd": dict(pipeline=pipeline, guidance_end=0.5),
        "lcm_scheduler": dict(config=pipeline.scheduler.config, solver_steps=50),
        "load_pipeline": dict(model="demo", dtype=torch.float32, device="cpu"),
        "optimize": dict(pipeline=pipeline, max_error=0.1, compile=True, rounds=1, progress=print),
        "prepare_data": dict(
            pipeline=pipeline, data="x", folder="x", batch_size=1, steps=1, seed=0, skip_unread=True, progress=print
        ),
        "save_pipeline": dict(pipeline=pipeline, folder="x", about={}),
        "switch_unets": dict(pipeline=pipeline, unets=[unet], below=[0.5], speedup=1.1),
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
PROMPTS = ("generate", "analyze", "fit_compensation", "repair_plan", "evaluate")


def is_allowed(name, argument, value):
    """A prompt may be an empty text; there may be fewer prompts than a batch could have."""
    if argument == "prompts" and name in PROMPTS:
        return value == [""] or (name == "generate" and value in ("", "x", "a\0b"))
    return (name, argument, value) in [("generate", "batch_size", 10**30), ("export", "parts", [""])]


def test_every_public_function_is_called_here(tiny):
    functions = {name for name in asdm.__all__ if not inspect.isclass(getattr(asdm, name))}
    assert functions - set(calls(tiny)) == set()


@pytest.mark.parametrize("name", calls({"pipeline": tiny_pipeline(), "unet": 0, "redundancy": 0, "plan": 0}))
def test_no_public_argument_takes_what_is_no_number_word_or_name(tiny, name):
    function, right = getattr(asdm, name), calls(tiny)[name]
    defaults = {key: each.default for key, each in inspect.signature(function).parameters.items()}
    for argument, value in right.items():
        others = {key: each for key, each in right.items() if defaults[key] is inspect.Parameter.empty}
        wrong = NEVER.get(type(value), (7, NAN, "x", True))
        if defaults[argument] is not None:
            wrong = (*wrong, None)
        for bad in wrong:
            if is_allowed(name, argument, bad):
                continue
            if name == "inherit_features" and argument not in ("pipeline", "speedup", "every", "steps", "budget"):
                others |= {"every": 2}
            with pytest.raises(AsdmError, match=r"^[^\n]+$") as error:
                made = function(**{**others, argument: bad})
                made.__enter__() if hasattr(made, "__enter__") else None
            assert len(str(error.value)) < 400, (argument, bad)
