"""The ablation's script: what its recipes are made of, what their steps cost, and what is told of expert kernels."""

from pathlib import Path

import pytest
import torch

from asdm import PruningPlan, build_student, load_pipeline, with_unet
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.chdir(tmp_path)  # where runs/ablation is
    Path("runs/ablation").mkdir(parents=True)


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
