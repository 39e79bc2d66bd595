"""The command line: every mistake of a user is one line on standard error and exit status 2."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import ControlNetModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from asdm import PruningPlan, cli, save_pipeline
from asdm.benchmark.models import MeasuredModel
from asdm.benchmark.results import BenchmarkRow, BenchmarkRun
from asdm.cli.output import console, print_skipped
from asdm.files import write_text
from conftest import lora_file, tiny_pipeline, tiny_pixart_pipeline, tiny_sdxl_pipeline, tiny_unet


@pytest.fixture
def model(tmp_path):
    return str(save_pipeline(tiny_pipeline(), tmp_path / "model"))


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run `asdm ARGS` in a temporary folder; returns exit status, standard output and error."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["asdm", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        out, error = capfd.readouterr()
        return status, out, error

    return call


def mistakes(model, tmp_path):
    plan = tmp_path / "other.json"
    unit = [{"edit": "remove", "unit": "mid_block"}]
    plan.write_text(
        PruningPlan.for_unet(tiny_pipeline().unet, unit).to_json().replace('"fingerprint": "', '"fingerprint": "0')
    )
    bad_unit = tmp_path / "unit.json"
    bad_unit.write_text(PruningPlan.for_unet(tiny_pipeline().unet, unit).to_json().replace("mid_block", "mud_block"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "real.png")
    other = tiny_pipeline()
    other.scheduler.register_to_config(prediction_type="v_prediction")
    other_kind = save_pipeline(other, tmp_path / "other_kind")
    stages = tmp_path / "stages.yaml"
    stages.write_text("- {name: a, steps: 2}")
    return [
        (["analyze", tmp_path / "absent"], "no such folder or file"),
        (["analyze", "absent/"], "absent/: no such folder or file"),
        (["analyze", "random:sd99"], "no such shape"),
        (["analyze", tmp_path / "empty"], "not a pipeline folder"),
        (["analyze", model, "--data", tmp_path / "empty"], "no images with captions"),
        (["plan", model, "--speedup", "1000"], "out of reach"),
        (["plan", model, "--preset", "huge"], "no such preset"),
        (["plan", "absent.json", "--speedup", "2"], "no such redundancy profile"),
        (["plan", model], "exactly one of"),
        (["prune", model, "absent.json", "--out", "pruned"], "no such plan file"),
        (["prune", model, plan, "--out", "pruned"], "plan for another model"),
        (["prune", model, bad_unit, "--out", "pruned"], "mud_block: no such unit"),
        (["prune", model, bad_unit, "--out", "theirs"], "was not written by asdm"),
        (["distill", model, model, "--data", tmp_path / "absent", "--out", "distilled"], "no such data folder"),
        (["generate", model, "x", "--image", tmp_path / "text.png", "--out", "drawn"], "not an image"),
        (["generate", model, "x", "--image", tmp_path / "absent.png", "--out", "drawn"], "no such image file"),
        (["compress", model, "--out", "made", "--speedup", "1.5"], "need data"),
        (["compress", model, "--out", "theirs", "--speedup", "1.5", "--steps", "0"], "was not written by asdm"),
        (["analyze", model, "--out", "theirs"], "is a folder; name a file"),
        (["analyze", model, "--out", tmp_path / "pipe"], "pipe: is a device or a pipe; name a file"),
        (["plan", model, "--speedup", "1.1", "--out", "theirs"], "is a folder; name a file"),
        (["generate", model, "x", "--image", tmp_path / "real.png", "--strength", "0.01"], "leave at least one"),
        (["generate", model, "x", "--cache", "500"], "is the limit"),
        (["generate", model, "x", "--size", "25"], "must be a positive multiple"),
        (["generate", model, "x", "--size", "100"], "multiple of 8; the nearest is 96"),
        (["generate", model, "x", "--steps", "1001"], "has 1000; give as many at most"),
        (["plan", model, "--params", "1e9"], "params=1e.09: the denoiser has"),
        (["plan", model, "--macs", "1e15"], "macs=1e.15: the denoiser has"),
        (["compress", model, "--out", "made", "--macs", "1e15", "--steps", "0"], "macs=1e.15: the denoiser has"),
        (["generate", model, "x", "--strength", "0.5"], "0.5: has no effect without image"),
        (["generate", model, "x", "--switch-at", "0.5"], "0.5: has no effect without --low-noise-model"),
        (["generate", model, "x", "--low-noise-model", model, "--switch-at", "1"], "above 0 and below 1"),
        (["generate", model, "x", "--low-noise-model", other_kind], "predicts epsilon, .* v_prediction"),
        (["analyze", model, "--cache", "2", "--plot", "drawn.png"], "not at units"),
        (["distill", model, model, "--data", "demo", "--out", "done", "--processes", "2"], "add --dry-run"),
        (["distill", model, model, "--data", "demo", "--out", "done", "--recipe", stages, "--steps", "5"], "their own"),
        (["compress", model, "--out", "made", "--speedup", "1.5", "--recipe", stages, "--steps", "5"], "their own"),
        (["export", model, "--to", "checkpoint", "--out", "one.safetensors", "--size", "64"], "does not go with --to"),
        (["export", model, "--to", "onnx", "--out", "graphs", "--for", "sdcpp"], "does not go with --to onnx"),
        (["export", model, "--to", "checkpoint", "--out", "one.ckpt"], "ends in .safetensors"),
        (["export", model, "--to", "checkpoint", "--out", "one.safetensors"], "widths of SD 1.x, SD 2.x and SDXL"),
        (
            ["convert-lora", tmp_path / "absent.safetensors", "--for", model, "--out", "l.safetensors"],
            "no such LoRA file",
        ),
        (["plan", model, "--portable", "--preset", "bk-tiny"], "does not go with --portable"),
        (["plan", model, "--portable", "--params", "0.5", "--experts", "0.1"], "does not go with --portable"),
        (["plan", "--remeasure", "plan.json", "--portable"], "leave out other options"),
        (["plan", "--remeasure", "plan.json", "--router", "time"], "leave out other options"),
        (
            ["plan", model, "--macs", "0.8", "--router", "time"],
            "--router time: is of expert kernels",
        ),
        (
            ["plan", model, "--preset", "a-sdm", "--data", "demo"],
            "--data demo: a preset needs no analysis",
        ),
        (["plan", "map.json", "--macs", "0.8", "--data", "demo"], "--data demo: a profile is measured already; name"),
        (
            ["plan", model, "--preset", "bk-base", "--compensate", "linear"],
            "compensate linear: bk-base drops whole",
        ),
        (["analyze", model, "--steps", "9"], "--steps 9: has no effect without --cache"),
        (["analyze", 300 * "long"], "no such"),
        (["analyze", model, "--data", 300 * "long"], "no such data folder"),
        (["distill", other_kind, model, "--data", "demo", "--out", "done"], "predicts epsilon, .* v_prediction"),
    ]


def test_every_mistake_is_one_line_and_status_2_and_leaves_nothing(run, model, tmp_path):
    cases = mistakes(model, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, message in cases:
        status, _, error = run(*arguments)
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert status == 2, (arguments, error)
        assert len(lines) == 1, (arguments, error)
        assert message in lines[0] or re.search(message, lines[0]), (arguments, lines[0])
        assert "Traceback" not in error
        left = sorted(path.name for path in tmp_path.iterdir() if path.name != "distilled.training")
        assert left == before, arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (tiny_pipeline, ["--preset", "bk-base", "--refine", "1"], "refine=1: does not go with bk-base, which drops"),
        (tiny_pipeline, ["--preset", "bk-base", "--experts", "0.1"], "experts=0.1: does not go with bk-base, which"),
        (tiny_sdxl_pipeline, ["--preset", "bk-tiny", "--refine", "1"], "bk-tiny: a preset for models of another shape"),
        (tiny_pipeline, ["--preset", "a-sdm", "--config", "no/such"], "config no/such: no such folder or file"),
        (tiny_pixart_pipeline, ["--portable", "--macs", "0.8"], "portable: no shape of a smaller transformer is known"),
        (tiny_pixart_pipeline, ["--experts", "0.1", "--macs", "0.8"], "experts=0.1: a transformer has no convolutions"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_the_analysis(run, tmp_path, monkeypatch, kind, arguments, message):
    model = save_pipeline(kind(), tmp_path / "model")
    for module in ("asdm", "asdm.compression.steps", "asdm.estimates.forecast"):
        monkeypatch.setattr(f"{module}.{'Forecast' if 'forecast' in module else 'analyze'}", pytest.fail)
    status, _, error = run("plan", model, *arguments)
    assert status == 2 and f"error: {message}" in error
    if "--refine" in arguments:
        status, _, error = run("compress", model, "--out", "made", "--steps", "0", "--samples", "0", *arguments)
        assert status == 2 and f"error: {message}" in error and not (tmp_path / "made").exists()


def test_the_path_of_a_file_is_printed_as_it_is(run, model):
    assert run("analyze", model, "--timesteps", 1, "--samples", 1, "--out", "map.json")[0] == 0
    name = f"{'a long name ' * 10}[bold].json"
    status, out, _ = run("plan", "map.json", "--params", 0.8, "--out", name)
    assert status == 0 and f"written to {name}\n" in out


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_results_are_saved_where_they_cannot_be_printed(command, run, model, monkeypatch, tmp_path):
    shutil.copytree(model, tmp_path / "modèle")
    short = {"evaluate": ["--samples", 0, "--steps", 1, "--rounds", 1], "analyze": ["--timesteps", 1, "--samples", 1]}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed, (tmp_path / "out").open("w", encoding="ascii") as ascii_file:
        for name, file in (("closed", closed), ("ascii", ascii_file)):
            monkeypatch.setattr(sys, "stdout", file)
            monkeypatch.setattr(console, "quiet", False)
            assert run(command, "modèle", *short[command], "--out", f"{name}.json")[0] == 0
            assert (tmp_path / f"{name}.json").is_file() and console.quiet == (name == "closed")
    assert "mod?le" in (tmp_path / "out").read_text() and "written to ascii.json" in (tmp_path / "out").read_text()


def test_main_job_by_its_single_commands(run, model, data_folder, monkeypatch, tmp_path):
    assert run("analyze", model, "--timesteps", 1, "--samples", 1, "--out", "map.json", "--plot", "map.png")[0] == 0
    assert run("plan", "map.json", "--params", 0.8, "--out", "plan.json")[0] == 0
    assert run("prune", model, "plan.json", "--out", "pruned")[0] == 0
    assert run("prune", model, "plan.json", "--out", "apart", "--no-fold")[0] == 0
    (tmp_path / "stages.json").write_text(json.dumps([{"name": "a", "steps": 2, "batch_size": 2}]))
    status, out, _ = run("distill", model, "apart", "--data", data_folder, "--out", "done", "--recipe", "stages.json")
    assert status == 0
    assert "written to done" in out
    folders = ("apart", "pruned", "done")
    apart, pruned, done = (json.loads((tmp_path / name / "unet" / "config.json").read_text()) for name in folders)
    assert apart["edits"] != pruned["edits"] == done["edits"]
    status, _, _ = run("evaluate", model, "done", "--data", data_folder, "--samples", 2, "--steps", 2, "--rounds", 2)
    assert status == 0
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["speed"]) == 2
    prompts = "octopus, noto", "pear"
    status, _, _ = run("generate", "done", *prompts, "--steps", 2, "--dtype", "bfloat16", "--out", "drawn")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["octopus__noto.png", "pear.png"]
    again = run(
        "generate",
        "done",
        "pear",
        "--image",
        tmp_path / "drawn" / "pear.png",
        "--steps",
        4,
        "--cache",
        1.1,
        "--out",
        "drawn",
    )
    assert again[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"pear\n\ntree\n")))
    status, out, _ = run("generate", "done", "-", "--steps", 2, "--compare", model, "--grid", "--out", "compared")
    assert status == 0 and "one image each" in out
    names = [f"{prompt}{kind}.png" for prompt in ("pear", "tree") for kind in ("", "_comparison", "_teacher")]
    assert sorted(path.name for path in (tmp_path / "compared").iterdir()) == ["grid.png", *names]
    printed = [line for line in out.splitlines() if line.endswith(".png")]
    assert sorted(printed) == sorted(f"compared/{name}" for name in ["grid.png", *names])
    with Image.open(tmp_path / "drawn" / "pear-1.png") as image:
        assert image.size == (16, 16)
    drawn = {}
    for name, finish in {
        "student": [],
        "both": ["--low-noise-model", model],
        "original": ["--low-noise-model", model, "--switch-at", 0.9999],
    }.items():
        assert run("generate", "done", "pear", "--steps", 4, "--out", name, *finish)[0] == 0
        with Image.open(tmp_path / name / "pear.png") as image:
            drawn[name] = image.tobytes()
    assert run("generate", model, "pear", "--steps", 4, "--out", "alone")[0] == 0
    with Image.open(tmp_path / "alone" / "pear.png") as image:
        assert image.tobytes() == drawn["original"]
    assert len(set(drawn.values())) == 3


@pytest.mark.slow
def test_compress_interrupted_says_how_to_go_on(run, model, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("asdm.compression.steps.full_plan", interrupted)
    command = ["compress", model, "--out", "made", "--params", 0.8, "--sampling-steps", 2]
    command += ["--sensitivity", "taylor", "--refine", 0, "--steps", 0, "--samples", 0]
    status, _, error = run(*command)
    assert status == 130
    assert "run the same command again" in error
    monkeypatch.undo()
    assert run(*command)[0] == 0
    assert (tmp_path / "made" / "report.html").is_file()
    status, told, beside = run(*command)
    assert status == 0 and "made: nothing is left to compute" in beside and "report.html" in told


def test_what_has_no_effect_or_cannot_be_is_refused_before_anything_is_measured(run, model, monkeypatch, tmp_path):
    def measured(*_, **__):
        raise AssertionError

    for function in ("asdm.evaluate", "asdm.measure.limits.machine_limits"):
        monkeypatch.setattr(function, measured)
    (tmp_path / "file").write_text("x")
    for command, message in (
        (["evaluate", model, "--samples", 0, "--images", "drawn"], "--images drawn: has no effect with --samples 0"),
        (["evaluate", model, "--samples", 0, "--data", "demo"], "--data demo: has no effect with --samples 0"),
        (["evaluate", model, "--image-to-image", 0, "--strength", 0.5], "--strength 0.5: has no effect with --image"),
        (["evaluate", model, "--images", "file"], "file: is a file; name a folder"),
        (["evaluate", model, "--images", "file/in"], "file/in: file is a file; name a folder"),
        (["benchmark", model, "--images", "drawn"], "--images drawn: has no effect without --data"),
        (["benchmark", "random:sd15", "--data", "demo", "--samples", 9], "--samples 9: has no effect without --data"),
        (["benchmark", "--image-to-image", 0, "--strength", 0.5], "--strength 0.5: has no effect with --image"),
        (["benchmark", model, "--data", "demo", "--images", "file"], "file: is a file; name a folder"),
        (["benchmark", model, "--out", "file"], "file: is a file; name a folder"),
        (["benchmark", model, "other/"], "other/: no such folder or file"),
        (["benchmark", model, "random:nosuch"], "random:nosuch: no such shape"),
        (["benchmark", model, "--only", "nosuch"], "--only nosuch: no method's name contains this"),
    ):
        status, _, error = run(*command)
        assert status == 2 and f"error: {message}" in error, (command, error)


def test_an_interrupted_measurement_says_what_is_there(run, model, data_folder, monkeypatch, tmp_path):
    places = []

    def measured(_pipeline, place, *, images_folder, **_):
        places.append(images_folder)
        if len(places) != 2:
            raise KeyboardInterrupt
        run = BenchmarkRun.now(device="cpu", rounds=1, seed=0, limits={})
        row = BenchmarkRow(place=place, name="original", group="original", steps=4, error="none")
        return MeasuredModel(model=place, settings={}, run=run, rows=[row])

    def drawing(*_, images_folder, **__):
        if images_folder is not None:
            images_folder.mkdir()
        raise KeyboardInterrupt

    shutil.copytree(model, tmp_path / "other")
    monkeypatch.setattr("asdm.benchmark.models.benchmark_model", measured)
    monkeypatch.setattr("asdm.measure.limits.machine_limits", lambda _: {})
    monkeypatch.setattr("asdm.cli.benchmark._announce", lambda *_, **__: None)
    monkeypatch.setattr("asdm.evaluate", drawing)
    two_models = ["benchmark", "model", "other", "--data", data_folder, "--images", "drawn"]
    for command, message in (
        (two_models, "interrupted; nothing was written"),
        (two_models, "interrupted; finished models are in benchmark/benchmark.json\n"),
        (["evaluate", model], "interrupted; nothing was written"),
        (["evaluate", model, "--images", "drawn"], "no results were written; finished images are in drawn"),
    ):
        status, _, error = run(*command)
        assert status == 130 and message in error, error
    assert places == [Path("drawn/model"), Path("drawn/model"), Path("drawn/other")]


def test_a_full_disk_is_told_and_nothing_is_lost(run, model, monkeypatch, tmp_path):
    plan = PruningPlan.for_unet(tiny_pipeline().unet, [{"edit": "remove", "unit": "mid_block"}])
    plan.save(tmp_path / "plan.json")
    shutil.copytree(model, tmp_path / "target")
    before = (tmp_path / "target" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    status, _, error = run("prune", model, "plan.json", "--out", "target")
    assert status == 2
    assert "No space left on device" in error
    assert (tmp_path / "target" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system in which no folder can be made")
def test_a_folder_that_cannot_be_made_is_told(run, model, tmp_path):
    PruningPlan.for_unet(tiny_pipeline().unet, [{"edit": "remove", "unit": "mid_block"}]).save(tmp_path / "plan.json")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    shared = ["--captions", "prompts.txt", "--metrics", "ssim", "--steps", 1]
    for command in (
        ["prune", model, "plan.json", "--out", "/proc/x/y"],
        ["generate", model, "a cat", "--steps", 1, "--out", "/proc/x"],
        ["evaluate", model, "--protocol", "demo", *shared, "--folder", "/proc/x"],
    ):
        status, _, error = run(*command)
        told = [line for line in error.splitlines() if line.startswith("error:")]
        assert status == 2 and len(told) == 1 and "/proc/x" in told[0] and "Traceback" not in error, command


def test_a_device_that_is_not_there_is_told(run, model):
    status, _, error = run("generate", model, "x", "--device", "quantum")
    assert status == 2
    assert "device quantum" in error


def test_the_help_loads_no_heavy_package():
    script = "import sys, asdm.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "matplotlib", "pydantic", "PIL"}
    assert heavy & set(done.stdout.split()) == set()


def test_the_help_lists_the_models_that_the_api_allows():
    from asdm.cli import options
    from asdm.pipelines.names import model_help

    assert set(re.findall(r"random:[\w-]+", options.MODEL)) == set(re.findall(r"random:[\w-]+", model_help()))


@pytest.mark.slow
def test_from_a_model_to_one_file_for_other_programs(run, model, tmp_path):
    """As docs/export.md has it; tiny widths are for diffusers alone."""
    status, _, error = run("plan", model, "--portable", "--params", "0.6", "--out", "plan.json")
    assert status == 0, error
    plan = json.loads((tmp_path / "plan.json").read_text())
    (edit,) = plan["edits"]
    assert edit["edit"] == "drop_layers"
    blocks = [f"up_blocks.3.attentions.{index}.transformer_blocks.0" for index in range(3)]
    plan["edits"] = [{"edit": "drop_layers", "layers_per_block": 1, "transformer_blocks": blocks, "fitted": True}]
    (tmp_path / "fitted.json").write_text(json.dumps(plan))
    lora = lora_file(tiny_pipeline().unet, tmp_path / "lora.safetensors")
    for name in ("plan", "fitted"):
        status, told, error = run("prune", model, f"{name}.json", "--out", name)
        assert status == 0, error
        assert ("relative squared error" in told) == (name == "fitted" or edit.get("fitted", False))
        made = ["export", name, "--to", "checkpoint", "--for", "diffusers", "--out", f"{name}.safetensors"]
        status, told, error = run(*made)
        assert status == 0 and f"written to {name}.safetensors" in told.replace("\n", ""), error
        for student in (name, f"{name}.safetensors"):
            status, told, error = run("convert-lora", lora, "--for", student, "--out", "converted.safetensors")
            assert status == 0 and re.search(r"\d+ layers are adapted; dropped are [1-9]", told), error
            assert "not expected" not in error  # diffusers' words on what stands in a config
            for_file = any("input_blocks" in key for key in load_file(tmp_path / "converted.safetensors"))
            assert for_file == (student == f"{name}.safetensors")
        status, _, error = run("convert-lora", lora, "--for", student, "--out", student)
        assert status == 2 and f"{student}: is the student's own file" in error.replace("\n", " ")


def test_a_controlnet_reads_its_image_from_a_file(run, model, tmp_path):
    ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(16, 32)).save_pretrained(
        tmp_path / "net"
    )
    Image.new("I;16", (30, 20), 40_000).save(tmp_path / "depth.png")
    control = ["--controlnet", tmp_path / "net", "--control-image", tmp_path / "depth.png"]
    status, out, error = run("generate", model, "pear", *control, "--steps", "2", "--out", "drawn")
    assert (status, out.split()) == (0, ["drawn/pear.png"]), error
    status, _, error = run("generate", model, "pear", *control[:3], tmp_path / "gone.png")
    assert status == 2 and "gone.png: no such image file" in error


def test_names_of_skipped_files_are_printed_and_written_as_text(capfd, tmp_path):
    names = {"\x1b[31mred.png": "damaged", "bad\udcfe.png": "damaged"}
    print_skipped(names)
    assert capfd.readouterr().err.splitlines()[1:] == ["  \\x1b[31mred.png: damaged", "  bad?.png: damaged"]
    write_text(tmp_path / "report.html", "\n".join(names))
    assert (tmp_path / "report.html").read_text("utf-8").endswith("bad\\udcfe.png")


def test_an_output_does_not_replace_what_is_read(run, model, data_folder, tmp_path):
    plan = PruningPlan.for_unet(tiny_pipeline().unet, [{"edit": "remove", "unit": "mid_block"}])
    plan.save(tmp_path / "plan.json")
    assert run("prune", model, "plan.json", "--out", "student")[0] == 0
    before = (tmp_path / "student" / "model_index.json").stat().st_mtime_ns
    others = ["--data", data_folder, "--steps", "1", "--yes"]
    for command in (
        ["prune", "student", "plan.json", "--out", "./student"],
        ["distill", model, "student", "--out", "student", *others],
        ["distill", "student", model, "--out", tmp_path / "student", *others],
    ):
        status, _, error = run(*command)
        assert status == 2 and "student: is read, and would be replaced by the output" in error, error
    assert (tmp_path / "student" / "model_index.json").stat().st_mtime_ns == before
