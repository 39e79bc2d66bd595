"""A saved student carries the code that loads it: without this package, with the same outputs."""

import ast
import sys

import pytest
import torch

from asdm import AsdmError, PruningPlan, build_student, load_pipeline, save_pipeline, with_unet
from asdm.student.standalone import module_source
from asdm.student.unet import MODULE_NAME, AsdmUNet2DConditionModel
from conftest import predict, tiny_sdxl_pipeline, unet_inputs, without_asdm

OUTER = "down_blocks.0.attentions.0.transformer_blocks.0"
EDITS = [
    {"edit": "remove", "unit": "mid_block"},
    {"edit": "remove", "unit": "down_blocks.1.resnets.1", "compensate": "linear"},
    {"edit": "remove", "unit": "up_blocks.2.attentions.1"},
    {"edit": "remove", "unit": f"{OUTER}.ff"},
    {"edit": "gri_attention", "unit": f"{OUTER}.attn1", "regions": 2, "pool": 2},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.2.conv2", "experts": ["up_blocks.3.resnets.1.conv2"]},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.0.conv2", "experts": ["up_blocks.3.resnets.1.conv2"],
     "router": "time"},
    {"edit": "cond_conv", "unit": "down_blocks.0.resnets.0.conv2", "experts": ["down_blocks.0.resnets.1.conv2"],
     "router": "prompt+time"},
]  # fmt: skip


def test_joined_modules_share_no_name():
    """In one file the second definition of a name would replace the first."""
    names: list[str] = []
    for node in ast.parse(module_source("asdm.student.unet")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert {name for name in names if names.count(name) > 1} <= {"Kind"}  # of annotations alone


@pytest.fixture
def student(pipeline):
    unet = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, EDITS))
    with torch.no_grad():  # as trained: what starts at zero is somewhere else
        for name, parameter in unet.named_parameters():
            if "router" in name or "compensation" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return with_unet(pipeline, unet)


@pytest.mark.slow
def test_a_student_loads_without_the_package_predicts_the_same_and_is_saved_again(student, tmp_path):
    student.save_pretrained(tmp_path / "student")  # as diffusers saves, and pushes to the Hub
    inputs = unet_inputs(student.unet)
    torch.save({"inputs": inputs, "noise_pred": predict(student.unet, **inputs)}, tmp_path / "tensors.pt")
    done = without_asdm(
        f"""
        import torch
        from diffusers import DiffusionPipeline
        tensors = torch.load({str(tmp_path / "tensors.pt")!r})
        for folder, again in (("student", "second"), ("second", "third")):
            pipeline = DiffusionPipeline.from_pretrained(f"{tmp_path}/{{folder}}", trust_remote_code=True)
            with torch.no_grad():
                noise_pred = pipeline.unet(**tensors["inputs"], return_dict=False)[0]
            torch.testing.assert_close(noise_pred, tensors["noise_pred"], atol=1e-5, rtol=0)
            assert type(pipeline.unet).from_config(f"{tmp_path}/{{folder}}/unet").config["edits"]
            pipeline.save_pretrained(f"{tmp_path}/{{again}}")
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline("octopus, noto", num_inference_steps=2).images[0].size == (16, 16)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for folder in ("student", "second", "third"):
        assert (tmp_path / folder / "unet" / f"{MODULE_NAME}.py").read_text() == module_source("asdm.student.unet")
    assert torch.equal(predict(load_pipeline(tmp_path / "third").unet), predict(student.unet))


def test_without_the_flag_its_code_is_not_run(student, tmp_path):
    save_pipeline(student, tmp_path / "student")
    script = "from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({folder!r})"
    done = without_asdm(script.format(folder=str(tmp_path / "student")), tmp_path)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


def test_diffusers_puts_a_student_on_a_device_by_name_and_does_not_balance_it(student, tmp_path):
    save_pipeline(student, tmp_path / "student")
    done = without_asdm(
        f"""
        from diffusers import DiffusionPipeline
        how = dict(pretrained_model_name_or_path={str(tmp_path / "student")!r}, trust_remote_code=True)
        pipeline = DiffusionPipeline.from_pretrained(**how, device_map="cpu")
        assert type(pipeline.unet).__name__ == "AsdmUNet2DConditionModel"
        DiffusionPipeline.from_pretrained(**how, device_map="balanced")
        """,
        tmp_path,
    )
    assert done.stderr.splitlines()[-1].startswith("Pass `trust_remote_code=True`"), done.stderr


def test_this_package_runs_no_code_from_a_folder(student, tmp_path):
    save_pipeline(student, tmp_path / "student")
    (tmp_path / "student" / "unet" / f"{MODULE_NAME}.py").write_text("raise SystemExit('ran')")
    loaded = load_pipeline(tmp_path / "student")
    assert type(loaded.unet) is AsdmUNet2DConditionModel
    assert torch.equal(predict(loaded.unet), predict(student.unet))


def test_a_student_of_sdxl_loads_with_its_default_size(tmp_path):
    pipeline = tiny_sdxl_pipeline()
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block.attentions.0"}])
    save_pipeline(with_unet(pipeline, build_student(pipeline.unet, plan)), tmp_path / "student")
    assert load_pipeline(tmp_path / "student").default_sample_size == pipeline.default_sample_size


def test_the_module_file_needs_torch_and_diffusers_only():
    import ast

    imported = set()
    for node in ast.walk(ast.parse(module_source("asdm.student.unet"))):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "diffusers"}
    defined = [node.name for node in ast.parse(module_source("asdm.student.unet")).body if hasattr(node, "name")]
    assert len(defined) == len(set(defined)), "two modules define the same name"


def test_a_model_card_tells_the_plan_and_how_to_load(student, pipeline, tmp_path):
    card = (save_pipeline(student, tmp_path / "student", {"teacher": "some/model"}) / "README.md").read_text()
    for words in ("base_model: some/model", "trust_remote_code=True", "- remove down_blocks.1.resnets.1 (compensate"):
        assert words in card
    stock = (save_pipeline(pipeline, tmp_path / "stock") / "README.md").read_text()
    assert "trust_remote_code" not in stock and "base_model" not in stock and "No edits" in stock
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "drop_layers", "layers_per_block": 1}])
    shorter = with_unet(pipeline, build_student(pipeline.unet, plan))
    card = (save_pipeline(shorter, tmp_path / "shorter") / "README.md").read_text()
    assert "- drop_layers (layers_per_block: 1" in card and "- stable-diffusion" in card
    assert "trust_remote_code" not in card and "No edits" not in card


def test_a_damaged_config_is_told_in_one_line(student, tmp_path):
    save_pipeline(student, tmp_path / "student")
    config = tmp_path / "student" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"linear"', '"cubic"'))
    with pytest.raises(AsdmError, match="compensate: 'cubic' is not allowed"):
        load_pipeline(tmp_path / "student")
