"""Scripts in benchmarks/ that take hours run to their end on tiny models, and the ablation's recipes are right."""

import importlib
import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from asdm import AsdmError, PruningPlan, build_student, load_pipeline, save_pipeline, with_unet
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare
from asdm.student.edited_model import edits_of
from conftest import PixelJudge, tiny_pipeline


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.chdir(tmp_path)  # where runs/ablation is
    Path("runs/ablation").mkdir(parents=True)


@pytest.fixture
def small_demo(monkeypatch, tmp_path, designs):
    """In the place of "demo": a tiny pipeline, and twelve images of three variants and four others."""
    folder = save_pipeline(tiny_pipeline(), tmp_path / "demo")
    monkeypatch.setattr("asdm_demo.pipeline_folder", lambda: folder)
    monkeypatch.setattr("asdm_demo.images_folder", lambda: designs)


def test_every_recipe_has_steps_of_known_cost(pipeline):
    from ablation_costs import _kinds_of_step
    from ablation_recipes import LENGTHS, variants
    from ablation_students import stages_of

    student = build_student(
        pipeline.unet, PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    )
    for target in LENGTHS:
        for name, components in variants(target).items():
            stages = stages_of(student, components, 100)
            assert sum(stage.steps for stage in stages) == 100
            kinds = _kinds_of_step(name, stages)
            assert sum(share for _, share in kinds.values()) == pytest.approx(1)
            looks = ("semantics", "captions", "caption_semantics")
            looking = {kind: stage.losses.any_reads(*looks) for kind, (stage, _) in kinds.items()}
            assert all(is_looking == kind.endswith(", semantic") for kind, is_looking in looking.items())
            assert any(looking.values()) == any("sas" in component for component in components)


def test_captions_without_images_are_compared_by_the_teacher_or_by_clip(data_folder):
    from ablation_recipes import variants
    from ablation_students import stages_of

    pipeline = load_pipeline("demo")
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, []))
    recipes = variants(2.0)
    (teacher,), (clip,) = (stages_of(student, recipes[f"joint + sas on captions{by}"], 10) for by in ("", " by clip"))
    assert teacher.semantics.encoder == "unet" and teacher.losses.caption_text == 0 < teacher.losses.caption_semantic
    assert clip.semantics.encoder == "clip" and clip.losses.caption_text > 0 < clip.losses.caption_semantic
    lines = Path(clip.caption_only.file).read_text().splitlines()
    assert len(lines) == 2500 and "coconut, noto" in lines and "bone, flat" not in lines  # open, and judged
    short = clip.model_copy(update={"caption_only": clip.caption_only.model_copy(update={"sampling_steps": 1})})
    short = short.model_copy(update={"batch_size": 4})
    task = make_task(pipeline, student, prepare(pipeline, data_folder, Path("prepared")), short)
    with torch.no_grad():
        losses = task((torch.arange(4), 0), torch.Generator().manual_seed(0))
    assert losses["caption_text"] > 10 * abs(losses["caption_semantic"])  # the student is the teacher still


def test_a_row_tells_whether_experts_divide_the_styles(pipeline, monkeypatch, capsys):
    import ablation_judging
    from ablation_rows import print_division, print_table

    monkeypatch.setattr(ablation_judging, "EXPERT_PROMPTS", 2)
    conv = "up_blocks.3.resnets.0.conv2"
    edit = {"edit": "cond_conv", "unit": conv, "experts": ["up_blocks.3.resnets.1.conv2"], "router": "prompt"}
    student = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [edit])))
    fresh = ablation_judging.expert_division(student)
    assert fresh == {"expert_information": 0, "expert_chance": 0, "expert_explained": 0}
    with torch.no_grad():
        student.unet.get_submodule(conv).router.weight.normal_(std=100)
    found = ablation_judging.expert_division(student)
    assert found["expert_information"] > 0 < found["expert_explained"] <= 1
    rows = {"bk-sdm": [{"steps": 1}], "joint + cond-conv by prompt": [{"steps": 1} | found, {"steps": 1} | found]}
    print_table("plan", rows)
    print_division("plan", rows)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith(f"| joint + cond-conv by prompt | 2 | {found['expert_information']:.3f} ± 0.000 |")
    assert not told[-2].startswith("| bk-sdm")
    print_division("plan", {"bk-sdm": rows["bk-sdm"]})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": "1.75"}, "--targets 1.75: no such plan; there are 1.5, 2, 2.5"),
        ({"targets": "fast"}, "--targets fast: must be numbers"),
        ({"targets": "2", "only": "jont"}, "--only jont: no such recipe at these targets; there are teacher, bk-sdm"),
        ({"samples": 50}, "--samples 50: the rows in .* are of 100 images"),
    ],
)
def test_what_the_ablation_cannot_run_is_refused_before_a_model_is_loaded(options, told):
    import ablation

    values = {"only": "", "seeds": "0", "targets": "1.5", "samples": 100, "device": "cpu", "jobs": 1}
    with pytest.raises(AsdmError, match=f"^{told}"):
        ablation.run(**{**values, **options})


def test_the_ablation_times_students_as_they_are_left_by_their_training(small_demo):
    from ablation_students import folded_student_of, student_of, train

    unet, block = tiny_pipeline().unet, "down_blocks.0.attentions.0.transformer_blocks.0"
    folds, stays = f"{block}.attn1", "up_blocks.3.resnets.1"
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit} for unit in (folds, stays)])
    trained = student_of(unet, plan, ("compensation",))
    train(load_pipeline("demo"), trained, ("compensation",), 0, 0, Path("unused"))
    timed = folded_student_of(unet, plan, ("compensation",))
    assert timed.config.edits == trained.config.edits
    assert {edit.unit: edit.compensation for edit in edits_of(timed)} == {folds: "none", stays: "linear"}


@pytest.mark.slow
def test_a_run_of_the_ablation_adds_its_row_once(small_demo, monkeypatch, tmp_path):
    import ablation
    import ablation_costs
    import ablation_judging
    import ablation_recipes
    import ablation_rows
    import ablation_students
    from ablation_costs import FIT

    settled = tmp_path / "settled"  # which the first run makes
    for module in (ablation_costs, ablation_judging, ablation_students):
        monkeypatch.setattr(module, "SETTLED", settled)
    monkeypatch.setattr(ablation_rows, "ROWS", tmp_path / "ablation.json")
    monkeypatch.setattr(ablation_judging, "Judge", PixelJudge)
    monkeypatch.setattr(ablation_judging, "EXPERT_PROMPTS", 2)
    monkeypatch.setitem(ablation_recipes.LENGTHS, 2.0, 3)
    monkeypatch.setattr(ablation_recipes, "LONG_LENGTH", 6)
    run = partial(ablation.run, seeds="0", targets="2.0", samples=12, device="cpu", jobs=1)
    run(only="teacher")
    name = "joint + cond-conv by prompt"
    removed = [{"edit": "remove", "unit": f"up_blocks.3.{unit}.1"} for unit in ("resnets", "attentions")]
    PruningPlan.for_unet(tiny_pipeline().unet, removed).save(settled / "plan-2.json")
    costs = {"bk-sdm, joint": 2.0, f"{name}, joint": 3.0, FIT: 0.0}
    (settled / "seconds-a-step-2.json").write_text(json.dumps(costs))
    for _ in range(2):
        run(only=f"teacher,{name}")
    teacher, row = json.loads((tmp_path / "ablation.json").read_text())
    assert (teacher["name"], row["name"]) == ("teacher", name)
    assert row["steps"] == 2  # three of the other recipe's cost as much
    run(only="bk-sdm (long)")
    long = json.loads((tmp_path / "ablation.json").read_text())[-1]
    assert (long["name"], long["steps"]) == ("bk-sdm (long)", 6)
    assert (settled / "bk-sdm-long-2.png").is_file()
    assert 0 <= row["exact_pair_heldout"] <= 1 and row["teacher_distance_heldout"] > teacher["teacher_distance_heldout"]
    assert row["prediction_error_heldout"] > 0 and row["expert_chance"] >= 0


@pytest.mark.slow
def test_attention_over_more_tokens_is_trained_and_compared(small_demo, monkeypatch, tmp_path):
    import more_tokens

    class ToMe:
        def apply_patch(self, model, **_):
            return model

    found = {}
    monkeypatch.setattr(more_tokens, "tome", ToMe)
    monkeypatch.setattr(more_tokens, "Judge", PixelJudge)
    monkeypatch.setattr(more_tokens, "SIDE", 16)
    monkeypatch.setattr(more_tokens, "GRI_KINDS", ((4, 2),))
    monkeypatch.setattr(more_tokens, "finish", lambda name, rows, **settings: found.update({name: rows} | settings))
    more_tokens.train(steps=2)
    more_tokens.compare(steps=2, samples=2, rounds=1)
    rows = {row["attention"]: row for row in found["more_tokens"]}
    assert found["tokens"] == 256 and load_pipeline("runs/more-tokens/teacher").unet.config.sample_size == 16
    assert rows["full attention"]["teacher_distance"] == pytest.approx(0, abs=1e-6)
    untrained, distilled = (rows[f"GRI, regions 4, pool 2{which}"] for which in ("", ", distilled"))
    assert untrained["teacher_distance"] > 0 and untrained["teacher_distance"] != distilled["teacher_distance"]
    assert all(0 <= row["exact_pair"] <= 1 and row["ms"] > 0 for row in rows.values())


@pytest.fixture
def results(monkeypatch, tmp_path):
    """The folder of the results, and what date and machine the scripts say."""
    import common

    today = {"date": "2026-11-02", "machine": "this one"}
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "machine", lambda *_: dict(today))
    return tmp_path, today


def rows_in(path):
    return json.loads(path.read_text())["rows"]


@pytest.fixture
def incubation_memory(results, monkeypatch):
    """The script on models of two blocks; also a list of what it measures, and what it finds."""
    import incubation_memory as script

    class Models:
        def __init__(self, shape):
            self.student = torch.nn.ModuleDict({"small": torch.nn.Linear(1, 1), "large": torch.nn.Linear(9, 9)})
            self.blocks = list(self.student)

    def in_child(function, *arguments):
        if function is script.measure:
            measured.append(arguments[1:3])
            return {"peak_mb": found["peak_mb"], "step_seconds": found["step_seconds"]}
        return {"gpu_gb": found["gpu_gb"], "estimated_mb": 1} if function is script.estimated else None

    measured, found = [], {"peak_mb": 7, "step_seconds": 2.0, "gpu_gb": 1}
    monkeypatch.setattr(script, "RESULTS", results[0])
    monkeypatch.setattr(script, "machine", lambda: dict(results[1]))
    monkeypatch.setattr(script, "Models", Models)
    monkeypatch.setattr(script, "in_child", in_child)
    monkeypatch.setattr(script, "WAYS", dict.fromkeys(("one block", "joint")))
    return script, measured, found


def test_memory_and_times_that_are_missing_are_measured(incubation_memory, results):
    script, measured, found = incubation_memory
    path, today = results[0] / "incubation_memory_sd15.json", results[1]
    settings = {"shape": "sd15", "rounds": 1, "batch_size": 1, "dtype": "float32"}
    whole = {"way": "joint", "block": None, "gpu_gb": 1, "estimated_mb": 1, "peak_mb": 5, "step_seconds": 1.5}
    about = {"date": "2026-11-01", "machine": "this one", **settings}
    path.write_text(json.dumps({**about, "rows": [whole]}))
    script.main(times=False)
    one, joint = rows_in(path)
    assert measured == [("one block", "large")] and joint == {**whole, **about}
    assert one["peak_mb"] == 7 and "step_seconds" not in one and one["date"] == today["date"]
    script.main(times=False)
    assert len(measured) == 1
    script.main()  # the time is missing still
    assert len(measured) == 2 and rows_in(path)[0]["step_seconds"] == 2.0
    found["gpu_gb"] = 3
    script.main(again=True)
    assert len(measured) == 4 and [row["gpu_gb"] for row in rows_in(path)] == [3, 3]
    joint = rows_in(path)[1]
    assert (joint["peak_mb"], joint["step_seconds"], joint["date"]) == (7, 1.5, today["date"])


def test_memory_of_other_settings_is_not_known(incubation_memory, results):
    script, measured, _ = incubation_memory
    script.main()
    script.main(shape="sdxl")
    assert len(measured) == 4 and rows_in(results[0] / "incubation_memory_sd15.json")[0]["shape"] == "sd15"
    script.main(rounds=2)
    assert len(measured) == 6
    results[1]["machine"] = "another one"
    script.main(rounds=2)
    assert len(measured) == 8
    assert {row["machine"] for row in rows_in(results[0] / "incubation_memory_sd15.json")} == {"another one"}


def test_results_of_several_days_keep_their_date_machine_and_seed(results, monkeypatch):
    import reliability as script

    folder, today = results
    monkeypatch.setattr(script, "machine", lambda: dict(today))
    earlier = {"date": "2026-11-01", "machine": "another one", "seed": 3}
    path = folder / "reliability_kills.json"
    rows = [{"command": command, "kills": 2} for command in ("plan", "prune")]
    path.write_text(json.dumps({**earlier, "rows": rows}))
    for _ in range(2):
        script.add_rows("reliability_kills", [{"command": "prune", "kills": 5}], seed=0)
        assert rows_in(path) == [
            {"command": "plan", "kills": 2, **earlier},
            {"command": "prune", "kills": 5, **today, "seed": 0},
        ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("student", ["folding", "--only", "embedded,nope"], r"only='nope': must be one of embedded, sd15"),
        ("gpu", ["--device", "cpu", "--dtype", "nope"], r"dtype='nope': must be one of float32"),
        ("gpu", ["--device", "nope"], r"device nope: not to be had"),
        ("gpu", ["--preset", "nope"], r"nope: no such preset"),
        ("training_step", ["compare"], r"training_estimate.json: not there; the command estimate"),
        ("reliability", ["kills", "--only", "nope"], r"only='nope': must be one of .*compress"),
        ("reliability", ["disks", "--only", "nope"], r"only='nope': must be one of .*compress"),
    ],
)
def test_what_an_option_does_not_allow_is_refused_before_any_work(results, monkeypatch, script, arguments, message):
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "RESULTS", results[0], raising=False)
    monkeypatch.setattr(module, "workplace", lambda: nullcontext(results[0]), raising=False)
    told = CliRunner().invoke(module.app, arguments)
    assert isinstance(told.exception, AsdmError) and re.search(message, str(told.exception))


def test_times_are_compared_for_a_shape_that_has_an_estimate(results, monkeypatch):
    import training_step as script

    monkeypatch.setattr(script, "RESULTS", results[0])
    (results[0] / "training_estimate.json").write_text(json.dumps({"rows": [{"shape": "sd15"}, {"shape": "sdxl"}]}))
    with pytest.raises(AsdmError, match=r"model='sd21': must be one of sd15, sdxl"):
        script.compare("sd21")


def test_make_reliability_runs_all_parts_and_last_the_one_that_needs_a_right():
    import reliability as script

    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    (parts,) = re.findall(r"^reliability:.*\n\tfor part in (.+); do", makefile, re.MULTILINE)
    *others, last = parts.split()
    assert last == "disks" and {*others, last} == {
        command.callback.__name__ for command in script.app.registered_commands
    }
