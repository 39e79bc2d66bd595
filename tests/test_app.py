"""The page of `asdm app`: the functions behind its tabs, and the page as it is built."""

import errno
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image

from asdm import AsdmError, AsdmWarning, PruningPlan, make_plan, save_pipeline
from asdm.app.compare import FIELDS, draw_comparison, request_of, require_within, save_comparison, with_newest
from asdm.app.evidence import evidence_file, find_evidence, loss_figure, pareto_figure, report_frame
from asdm.app.files import KEPT_SECONDS, new_folder
from asdm.app.models import KEPT, ModelLibrary, changed_ns
from asdm.app.plan_board import PlanBoard, diagram, summary_of
from asdm.app.settings import AppSettings, Limits
from asdm.app.trial import computed_profile, trial_student
from asdm.app.work import CancelledError, Ticket, Workbench
from asdm.benchmark.results import BenchmarkRow
from asdm.generation.image import read_about
from conftest import profile_by_hand, tiny_pipeline

LIMITS = Limits(side=64, steps=8)


@pytest.fixture(scope="module")
def board() -> PlanBoard:
    return PlanBoard.of(profile_by_hand(tiny_pipeline()))


# -- requests, sessions, models ------------------------------------------------------------------------


def test_a_request_has_the_models_usual_values_where_fields_are_empty():
    request = request_of({"prompt": " owl ", "steps": 0, "width": 0, "seed": 0, "image": None, "strength": 0.5}, LIMITS)
    assert request.prompts == ["owl"] and request.seed == 0
    assert request.steps is request.width is request.strength is request.scheduler is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": "x" * 3000}, "prompt: 3000 characters"),
        ({"prompt": "x", "steps": 9}, "steps=9: this page allows at most 8"),
        ({"prompt": "x", "width": 128, "height": 64}, "width=128: this page allows at most 64"),
        ({"prompt": "x", "seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"prompt": "x", "seed": float("nan")}, "seed=nan"),
        ({"prompt": "x", "width": 63}, "^width=63: must be a positive multiple of 8"),
        ({"prompt": "x", "scheduler": "eulr"}, "scheduler=eulr"),
        ({"prompt": "x", "image": "/etc/passwd"}, "not an image"),
        ({"prompt": "x", "lora": "/etc/passwd"}, "/etc/passwd: a LoRA must be a .safetensors file"),
        ({"prompt": "x", "lora": "gone.safetensors:0.5"}, "gone.safetensors: no such LoRA file"),
    ],
)
def test_what_a_request_may_not_have_is_refused(fields, told):
    with pytest.raises(AsdmError, match=told):
        request_of(fields, LIMITS)


def test_a_models_own_size_is_limited_too():
    request = request_of({"prompt": "x", "steps": 1}, LIMITS)
    with pytest.raises(AsdmError, match="width=16: this page allows at most 8"):
        draw_comparison(tiny_pipeline(), tiny_pipeline(), request, Limits(side=8), Ticket(), lambda *_: None)


@pytest.mark.parametrize("few_step_model", [0, 1])
def test_the_usual_steps_of_both_models_are_limited_too(few_step_model):
    """0 in the page's field Steps."""
    request = request_of({"prompt": "x", "steps": 0}, Limits(steps=8))
    models = [tiny_pipeline(), tiny_pipeline()]
    models[few_step_model].scheduler = LCMScheduler.from_config(models[few_step_model].scheduler.config)
    with pytest.raises(AsdmError, match="steps=25: this page allows at most 8"):
        draw_comparison(*models, request, Limits(steps=8), Ticket(), lambda *_: None)
    require_within(Limits(steps=25), request, *models)


def test_only_this_machine_may_name_any_model():
    AppSettings().require_model("anything")
    for host in ("0.0.0.0", "192.168.0.2", "example.org"):
        AppSettings(host=host).require_model("demo")
        with pytest.raises(AsdmError, match="/etc/model: this page offers demo"):
            AppSettings(host=host).require_model("/etc/model")


def test_only_this_machine_may_name_files():
    AppSettings().require_own_machine("lora")
    with pytest.raises(AsdmError, match="lora: this page reads no files of its machine"):
        AppSettings(host="0.0.0.0").require_own_machine("lora")


def test_old_files_are_deleted(tmp_path):
    old, young = new_folder(tmp_path), new_folder(tmp_path)
    (old / "image.png").write_bytes(b"x")
    os.utime(old, (time.time() - KEPT_SECONDS - 60,) * 2)
    newest = new_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {young, newest}


def test_few_models_stay_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr("asdm.app.models.load_pipeline", lambda name, device: loaded.append(name) or name)
    library = ModelLibrary(AppSettings())
    for name in [*map(str, range(KEPT)), "0", "new", "0", "1"]:
        library.load(name)
    assert loaded == [*map(str, range(KEPT)), "new", "1"]


def test_a_model_that_was_built_again_is_loaded_again(tmp_path):
    library, folder = ModelLibrary(AppSettings(), device="cpu"), tmp_path / "pruned"
    pipeline = tiny_pipeline()
    save_pipeline(pipeline, folder)
    first = library.load(str(folder))
    assert library.load(str(folder)) is first
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    save_pipeline(pipeline, folder)
    again = library.load(str(folder))
    assert torch.equal(again.unet.conv_in.bias, pipeline.unet.conv_in.bias) and library.load(str(folder)) is again


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_model_the_page_asks_for_one(name):
    with pytest.raises(AsdmError, match="model: none is chosen; choose one, such as demo"):
        ModelLibrary(AppSettings(), device="cpu").load(name)


@pytest.mark.parametrize("name", ["gone", "a\0b", "x" * 5000])
def test_a_name_that_is_no_file_has_no_time_of_change(name):
    assert changed_ns(Path(name)) == 0


def test_a_comparison_is_saved_with_metadata(tmp_path, pipeline):
    lines = []
    request = request_of({"prompt": "owl/../x", "steps": 2, "seed": 3}, LIMITS)
    drawn = draw_comparison(pipeline, tiny_pipeline(), request, LIMITS, Ticket(), lambda *line: lines.append(line))
    saved = save_comparison(drawn, tmp_path)
    assert read_about(saved.student)["seed"] == 3 and read_about(saved.teacher)["prompt"] == "owl/../x"
    assert all(path.is_relative_to(tmp_path) and Image.open(path).size for path in (saved.both, saved.difference))
    assert lines[0] == (0.25, "first model, step 1 of 2") and lines[-1] == (1.0, "second model, step 2 of 2")
    assert saved.summary.startswith("| | first model | second model |\n")
    assert saved.mean_difference == 0 and len(with_newest((saved,) * 30, saved)) == 24


def test_a_trials_table_and_progress_name_the_teacher_and_the_trial(tmp_path, pipeline):
    pytest.importorskip("gradio")
    from asdm.app.plan_tab import TEACHER_AND_TRIAL

    lines = []
    request = request_of({"prompt": "owl", "steps": 1}, LIMITS)
    given = (request, LIMITS, Ticket(), lambda *line: lines.append(line), TEACHER_AND_TRIAL)
    drawn = draw_comparison(pipeline, tiny_pipeline(), *given)
    assert [line for _, line in lines] == ["teacher, step 1 of 1", "trial, step 1 of 1"]
    assert save_comparison(drawn, tmp_path, TEACHER_AND_TRIAL).summary.startswith("| | teacher | trial |\n")


def test_a_cancelled_drawing_ends_after_a_step(pipeline):
    ticket, steps = Ticket(), []

    def after_step(*_):
        steps.append(1)
        ticket.cancel()

    request = request_of({"prompt": "x", "steps": 8}, LIMITS)
    with pytest.raises(CancelledError):
        draw_comparison(pipeline, pipeline, request, LIMITS, ticket, after_step)
    assert len(steps) == 1


def test_one_request_computes_at_a_time_and_a_waiting_one_can_be_cancelled():
    workbench = Workbench()
    first, second = workbench.issue("a", "compare"), workbench.issue("b", "compare")
    ended = []

    def wait():
        with pytest.raises(CancelledError), workbench.computing(second):
            pass
        ended.append(True)

    with workbench.computing(first) as notes:
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        assert not ended
        workbench.cancel("b")
        waiting.join(5)
        assert ended and not first.is_cancelled()
        warnings.warn("lost text", AsdmWarning, stacklevel=1)
    assert notes == ["lost text"]
    assert workbench.ticket("b", "compare", second.id).is_cancelled(), "a session without a request must not compute"


def test_a_new_request_ends_the_sessions_earlier_one_of_its_kind_alone():
    workbench = Workbench()
    first, analysis = workbench.issue("a", "compare"), workbench.issue("a", "analysis")
    assert workbench.ticket("a", "compare", first.id) is first
    second = workbench.issue("a", "compare")
    assert first.is_cancelled() and not second.is_cancelled() and not analysis.is_cancelled()
    assert workbench.ticket("a", "compare", first.id).is_cancelled(), "a request must not take a later one's ticket"
    assert workbench.ticket("a", "compare", second.id) is second
    workbench.cancel("a", "compare")
    assert second.is_cancelled() and not analysis.is_cancelled()
    workbench.cancel("a")
    assert analysis.is_cancelled()


def test_a_request_starts_though_the_one_before_it_has_not_ended_yet(tmp_path, monkeypatch):
    """Each press of a button is sent, with its own ticket."""
    pytest.importorskip("gradio")
    from asdm.app.handlers import Page
    from asdm.app.page import build_page

    page, loaded = Page(AppSettings(folder=tmp_path), tmp_path), []
    handlers = {fn.api_name: fn for fn in build_page(page).fns.values() if fn.fn}
    computing = [fn for fn in handlers.values() if fn.concurrency_id == "computing"]
    assert {fn.fn.__name__ for fn in computing} == {"compare", "compute", "draw"}
    assert all(fn.trigger_mode == "multiple" for fn in computing)
    user = SimpleNamespace(session_hash="a")
    first, second = handlers["begin"].fn(user), handlers["begin"].fn(user)
    monkeypatch.setattr(page.library, "load", lambda name: loaded.append(name) or pytest.fail("computes"))
    fields = [{"prompt": "owl"}.get(name, 0 if name == "seed" else None) for name in FIELDS]
    handlers["compare"].fn(user, lambda *_, **__: None, "demo", "demo", *fields, first, ())
    assert not loaded
    with pytest.raises(pytest.fail.Exception, match="computes"):
        handlers["compare"].fn(user, lambda *_, **__: None, "demo", "demo", *fields, second, ())
    assert loaded == ["demo"]


def test_a_log_is_followed_from_before_its_first_step_and_a_vanished_one_is_passed_over(tmp_path):
    gradio = pytest.importorskip("gradio")
    from asdm.app.handlers import Page
    from asdm.app.page import build_page

    fns = [fn for fn in build_page(Page(AppSettings(folder=tmp_path), tmp_path)).fns.values() if fn.fn]
    of_log, of_switch = [fn.fn for fn in fns if fn.fn.__name__ == "followed"]
    (ticked,) = [fn.fn for fn in fns if fn.fn.__name__ == "ticked"]
    (tmp_path / "log.jsonl").write_text("")
    assert of_log("log.jsonl", True).active and of_switch("log.jsonl", True).active
    assert not of_log("log.jsonl", False).active and not of_switch(None, True).active
    assert ticked("log.jsonl") == gradio.skip()
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert len(ticked("log.jsonl").data) == 1
    (tmp_path / "log.jsonl").unlink()
    assert ticked("log.jsonl") == gradio.skip()


# -- plans ---------------------------------------------------------------------------------------------


def test_a_click_removes_a_unit_and_another_one_brings_it_back(board):
    unit = board.redundancy.units[0].name
    removed = board.toggle(unit)
    assert removed.removed() == {unit} and removed.speedup > 1
    assert removed.sensitivity == board.redundancy.units[0].sensitivity
    assert removed.toggle(unit).chosen == frozenset() and board.chosen == frozenset()
    with pytest.raises(AsdmError, match="no such unit"):
        board.toggle("gone")


def test_a_whole_attention_takes_the_place_of_its_parts(board):
    part = next(unit for unit in board.redundancy.units if unit.parent)
    both = board.toggle(part.name).toggle(part.parent)
    assert {edit.edit.unit for edit in both.chosen_edits} == {part.parent} and part.name in both.removed()
    assert not both.toggle(part.name).chosen, "a click on a removed part takes the edit back that removes it"


@pytest.mark.parametrize("block", ["mid_block", "down_blocks.3"])
def test_a_block_that_can_go_whole_has_a_button_in_the_diagram(board, block):
    assert f'data-unit="{block}"' in diagram(board) and 'data-unit="up_blocks.1"' not in diagram(board)
    inside = [unit.name for unit in board.redundancy.units if unit.block == block]
    removed = board.toggle(inside[0]).toggle(block)
    assert removed.chosen_labels == [block], "the whole takes the place of its units"
    crossed = {block, *(unit for unit in removed.choices[min(removed.chosen)].covers)}
    assert crossed.issuperset(inside) and diagram(removed).count('aria-pressed="true"') == len(crossed)
    assert removed.toggle(block).chosen == removed.toggle(inside[0]).chosen == frozenset()


def test_the_lowest_level_goes_with_its_decoder_block_and_says_so(board):
    assert 'data-about="down_blocks.3 with up_blocks.0: ' in diagram(board)


def test_a_profile_whose_latencies_have_an_infinite_quotient_is_shown(board):
    others = [each.model_copy(update={"latency_ms": 1e300}) for each in board.redundancy.others]
    redundancy = board.redundancy.model_copy(update={"latency_ms": 1e-300, "others": others})
    assert "mid_block: inf% of a call" in diagram(PlanBoard.of(redundancy))


def test_the_list_and_the_diagram_show_one_board(board):
    unit = board.redundancy.units[0].name
    clicked = board.toggle(unit)
    assert clicked.chosen_labels == [unit] and board.with_labels([unit]) == clicked
    assert diagram(clicked).count('aria-pressed="true"') == 1
    assert "1 edit " in summary_of(clicked) and "by the profile's latencies" in summary_of(clicked)
    measured_on_a_busy_machine = board.redundancy.model_copy(update={"latency_doubt": 1.0})
    assert "by the profile's MACs" in summary_of(PlanBoard.of(measured_on_a_busy_machine).toggle(unit))


def test_the_best_plan_is_the_programmes(board):
    target = 1 + (board.reachable - 1) / 2
    best = board.best(target)
    assert best.speedup >= target - 1e-6
    greedy = board
    for unit in sorted((u for u in board.redundancy.units if u.parent is None), key=lambda u: u.sensitivity):
        if greedy.speedup < target:
            greedy = greedy.toggle(unit.name)
    assert greedy.speedup < target or best.sensitivity <= 1.001 * greedy.sensitivity
    with pytest.raises(AsdmError, match="out of reach"):
        board.best(board.reachable * 2)


def test_a_plan_is_saved_and_loaded(board, tmp_path):
    best = board.best(1 + (board.reachable - 1) / 3)
    best.plan().save(tmp_path / "plan.json")
    again = board.with_plan(PruningPlan.load(tmp_path / "plan.json"))
    assert again.plan().edits == best.plan().edits and again.chosen == best.chosen
    with pytest.raises(AsdmError, match="the plan is empty"):
        board.plan()
    other = PruningPlan.model_validate({"base": {"class": "UNet2DConditionModel", "fingerprint": "0"}, "edits": []})
    with pytest.raises(AsdmError, match=r"for another model.*load a plan of this model"):
        board.with_plan(other)


def test_edits_that_the_profile_lacks_stay_in_the_plan(board):
    plan = make_plan(board.redundancy, params=0.8, compensate="none")
    expert = {
        "edit": "cond_conv",
        "unit": "down_blocks.0.resnets.0.conv2",
        "experts": ["down_blocks.0.resnets.1.conv2"],
    }
    plan = PruningPlan.for_unet(tiny_pipeline().unet, [*plan.edits, expert])
    loaded = board.with_plan(plan)
    assert len(loaded.others) == 1 and set(map(str, loaded.plan().edits)) == set(map(str, plan.edits))


def test_names_of_a_profile_are_text_in_the_diagram(board):
    unit = board.redundancy.units[0].model_copy(update={"name": 'down_blocks.0."><img src=x onerror=alert(1)>'})
    redundancy = board.redundancy.model_copy(update={"units": [unit, *board.redundancy.units[1:]]})
    assert "<img" not in diagram(PlanBoard.of(redundancy))


def test_the_trials_student_is_pruned_and_fitted(board, pipeline):
    unit = board.redundancy.units[0].name
    lines = []
    plan = board.toggle(unit).plan()
    pipeline.register_to_config(_name_or_path="random:tiny")  # is fitted on noise, which takes no sampling
    student = trial_student(pipeline, plan, Ticket(), lambda *line: lines.append(line), samples=1)
    assert [edit["unit"] for edit in student.unet.config["edits"]] == [unit]
    assert lines[-1] == (1.0, f"fitting compensations, 1 of 1: {unit}") and pipeline.unet.config.get("edits") is None


def test_a_trial_and_an_analysis_end_at_the_next_call_of_the_denoiser(board, pipeline):
    calls, ticket = [], Ticket()

    def after_call(*_):
        calls.append(1)
        ticket.cancel()

    handle = pipeline.unet.register_forward_hook(after_call)
    with pytest.raises(CancelledError):
        trial_student(pipeline, board.toggle(board.redundancy.units[0].name).plan(), ticket, lambda *_: None)
    assert len(calls) == 1
    with pytest.raises(CancelledError):
        computed_profile(pipeline, ticket, lambda *_: None)
    handle.remove()
    assert len(calls) == 1 and not pipeline.unet._forward_pre_hooks, "the hooks stay"


# -- evidence ------------------------------------------------------------------------------------------


def test_evidence_is_found_in_the_folder_and_nowhere_else(tmp_path):
    folder, outside = tmp_path / "runs", tmp_path / "report.html"
    (folder / "a" / ".hidden").mkdir(parents=True)
    outside.write_text("secret")
    for name in ("a/report.html", "a/log.jsonl", "b.json", "b_run.json", "a/.hidden/report.html"):
        (folder / name).write_text("{}")
    (folder / "a" / "linked").symlink_to(tmp_path)
    found = find_evidence(folder)
    assert (found.reports, found.logs, found.benchmarks) == (["a/report.html"], ["a/log.jsonl"], ["b.json"])
    assert evidence_file(folder, "a/report.html", "report.html").is_file()
    for name in ("../report.html", str(outside), "a/linked/report.html", "b.json", "gone/report.html", "", None):
        with pytest.raises(AsdmError):
            evidence_file(folder, name, "report.html")


def test_no_script_of_a_report_runs(tmp_path):
    (tmp_path / "report.html").write_text('<script>alert(1)</script>"></iframe><script>alert(2)</script>')
    frame = report_frame(tmp_path / "report.html")
    assert "<script>" not in frame and frame.count("</iframe>") == 1 and 'sandbox=""' in frame


def test_figures_show_the_rows(monkeypatch):
    pytest.importorskip("plotly")
    rows = [
        BenchmarkRow(place="p", name=f"<b>{n}", group="ours", steps=8, speedup=n, teacher_distance={"seen": 0.1 * n})
        for n in (1.0, 2.0)
    ]
    figure = pareto_figure(rows, "seen", "teacher_distance")
    assert list(figure.data[0].x) == [1.0, 2.0] and "&lt;b&gt;2.0" in figure.data[0].text[1]
    with pytest.raises(AsdmError, match="kid: not in this benchmark"):
        pareto_figure(rows, "seen", "kid")
    curve = loss_figure([{"step": step, "loss": 1 / step, "learning_rate": 1.0} for step in range(1, 11)])
    assert [trace.name for trace in curve.data] == ["loss"] and list(curve.data[0].y) == [1 / s for s in range(1, 11)]
    with pytest.raises(AsdmError, match="no step yet"):
        loss_figure([])


# -- the page ------------------------------------------------------------------------------------------


def test_handlers_show_errors_as_sentences(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from asdm.app.handlers import sentences, without_paths

    def failing(error):
        @sentences
        def handler():
            raise error

        return handler

    with pytest.raises(gradio.Error) as shown:
        failing(AsdmError("steps=<9>: too many"))()
    assert shown.value.message == "steps=&lt;9&gt;: too many"
    with pytest.raises(gradio.Error, match="Out of memory"):
        failing(RuntimeError("CUDA out of memory"))()
    with pytest.raises(gradio.Error, match=r"disk: plan\.json: No space left"):
        failing(OSError(errno.ENOSPC, "No space left on device", "/tmp/gradio/0ab1/plan.json"))()
    with pytest.raises(gradio.Error, match="A fault of the program: division"):
        failing(ZeroDivisionError("division"))()
    told = []
    monkeypatch.setattr("gradio.Info", told.append)
    failing(CancelledError())()
    assert told == ["Cancelled."]
    assert without_paths("/tmp/gradio/0ab1/plan.json: not a plan") == "plan.json: not a plan"


def test_without_a_place_for_temporary_files_the_page_says_so(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from asdm.app.page import serve

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(AsdmError, match=r"no folder for temporary files .*; set TMPDIR"):
        serve(AppSettings(folder=tmp_path))


def test_the_page_is_built_without_a_model(tmp_path):
    pytest.importorskip("gradio")
    from asdm.app.handlers import Page
    from asdm.app.page import build_page

    blocks = build_page(Page(AppSettings(models=["gone"], folder=tmp_path), tmp_path))
    names = [block.label for block in blocks.blocks.values() if type(block).__name__ == "Tab"]
    assert names[:3] == ["Compare", "Plan", "Evidence"]
    computing = [fn for fn in blocks.fns.values() if fn.concurrency_id == "computing"]
    assert len(computing) == 3 and all(fn.concurrency_limit == 1 for fn in computing)
    callable_by_programs = {fn.api_name for fn in blocks.fns.values() if fn.fn and fn.api_visibility != "private"}
    assert callable_by_programs == {"begin", "compare", "cancel"}
