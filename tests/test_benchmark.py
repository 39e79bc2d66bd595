"""The benchmark times all in turns, generates the same prompts with each, and reports each method's failure."""

import gc
import json
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DPMSolverMultistepScheduler
from matplotlib import pyplot as plt
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from asdm import AsdmError, PruningPlan, build_student, save_decoder
from asdm.benchmark.baselines import attention_broadcast, deep_cache, t_gate, tome
from asdm.benchmark.costs import first_steps
from asdm.benchmark.method import Method, at_every, cached, combined, fresh, memoized
from asdm.benchmark.methods import cached_every, methods, with_guidance_until
from asdm.benchmark.models import benchmark_model, chosen_methods, open_results, save_results, unfinished
from asdm.benchmark.plot import benchmark_plot, pareto_front
from asdm.benchmark.results import Benchmark, BenchmarkRow, BenchmarkRun
from asdm.benchmark.run import judge_methods, time_methods
from asdm.benchmark.techniques import by_lcm, caching, in_openvino, pruned, with_dpm_solver, with_gri
from asdm.diffusion.conditioning import decode_latents
from asdm.diffusion.generation import generate
from asdm.distillation.consistency import lcm_scheduler
from asdm.measure import limits as limits_module
from asdm.measure.limits import machine_limits
from asdm.pipelines.derived import with_unet
from conftest import tiny_decoder, tiny_pipeline, tiny_pixart_pipeline

RESULTS = Path(__file__).parent.parent / "docs" / "results"


class FakeJudge:
    def __init__(self, device):
        pass

    def features(self, images):
        return torch.nn.functional.interpolate(images, 4).flatten(1) + 1


def without_mid_block(unet):
    return pruned(PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}]))


def test_a_tiny_decoder_joins_the_original_and_the_stacks(pipeline, tmp_path):
    decoder = save_decoder(tiny_decoder(), tmp_path / "decoder")
    without, found = (methods(25, {"lean": lambda given: given}, decoder=each) for each in (None, decoder))
    added = {method.name: method for method in found if method.name not in {each.name for each in without}}
    assert {"tiny decoder", "best runtime + tiny decoder", "lean + OpenVINO, 8 steps + tiny decoder"} <= set(added)
    assert added["lean + OpenVINO + tiny decoder"].setup == added["lean + OpenVINO, 8 steps + tiny decoder"].setup
    with added["tiny decoder"].prepared(pipeline) as ready:
        assert type(ready.vae) is AutoencoderTiny and ready.unet is pipeline.unet
        generate(ready, ["a"], steps=1)
        again = ready.vae
    with added["tiny decoder"].prepared(pipeline) as ready:
        assert ready.vae is again  # it was loaded once
    pipeline.register_to_config(_name_or_path="random:tiny")
    names = [method.name for method in chosen_methods(pipeline, {}, None, 25, ["tiny decoder"])]
    assert names[:2] == ["original", "tiny decoder"]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_methods_in_few_steps_have_names_of_their_own(steps):
    assert {method.steps for method in methods(steps) if not method.name.endswith("LCM")} <= set(range(1, steps + 1))


@pytest.mark.parametrize("longest", [0, 1e9])
def test_the_decoder_is_timed_in_the_precision_that_images_are_decoded_in(longest):
    pipeline = tiny_pipeline()
    pipeline.vae.half().register_to_config(force_upcast=True)
    found = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: found.append(args[0].dtype))
    time_methods(pipeline, [Method("original", "original", steps=2)], place="tiny", rounds=1, longest=longest)
    assert set(found) == {torch.float32} and pipeline.vae.dtype == torch.float16


def test_a_part_of_a_name_is_looked_for_among_all_methods(pipeline):
    chosen, everything = (chosen_methods(pipeline, {}, "demo", 25, only) for only in ([], ["ToMe"]))
    assert sum("ToMe" in method.name for method in chosen) == 1
    assert [method.name for method in everything] == [
        "original",
        *(f"ToMe, ratio {ratio}" for ratio in (0.25, 0.5, 0.75)),
    ]
    with pytest.raises(AsdmError, match=r"--only tome: no method's name contains this; names are original, 20 steps"):
        chosen_methods(pipeline, {}, "demo", 25, ["tome"])


def test_a_benchmark_measures_all_methods_and_reports_failures(pipeline, data_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("asdm.benchmark.run.Judge", FakeJudge)
    entered = []

    @contextmanager
    def failing(given):
        entered.append(given)
        raise RuntimeError("does not run\nhere")
        yield given

    lean = without_mid_block(pipeline.unet)
    entries = [
        Method("original", "original", steps=4),
        Method("same", "ours", steps=4),
        Method("2 steps", "fewer steps", steps=2),
        cached_every(4, 2),
        combined("lean stack", "stack", cached(lean), caching(every=2), steps=2, kinds=at_every(2)),
        combined("few steps", "stack", by_lcm, steps=4),
        Method("broken", "baseline", failing),
        Method("from text alone", "baseline", image_to_image=False),
    ]
    limits = {"float32": {"matrix product": 1e-3, "3x3 convolution": 1e-4}}
    timed = time_methods(pipeline, entries, place="tiny", rounds=2, limits=limits)
    settings = {"data": data_folder, "samples": 2, "image_to_image": 1, "images_folder": tmp_path / "images"}
    *_, found = judge_methods(pipeline, entries, timed, **settings)
    rows = {row.name: row for row in found}
    assert [row.name for row in found] == [entry.name for entry in entries]
    assert rows["original"].speedup == 1 and rows["original"].teacher_distance["seen"] == pytest.approx(0, abs=1e-6)
    assert rows["same"].teacher_distance == pytest.approx(rows["original"].teacher_distance, abs=1e-6)
    assert rows["2 steps"].teacher_distance["seen"] > 0
    from_images = {name: row.image_to_image for name, row in rows.items()}
    assert from_images["same"]["teacher_distance"] == pytest.approx({"seen": 0, "held_out": 0}, abs=1e-6)
    assert from_images["2 steps"]["seed_part"]["seen"] > 0 and from_images["few steps"]["seed_part"]["seen"] > 0
    assert from_images["from text alone"] == from_images["broken"] == {}
    assert "text-to-image alone" in rows["from text alone"].image_to_image_error
    assert rows["from text alone"].teacher_distance and not t_gate(25, 5).image_to_image
    assert rows["broken"].error == "RuntimeError: does not run here" and rows["broken"].speedup is None
    assert len(entered) == 1  # it is not tried again
    assert all(row.images == 3 for name, row in rows.items() if name != "broken")
    original, stack = rows["original"], rows["lean stack"]
    assert stack.gmacs < original.gmacs and stack.unet_megabytes < original.unet_megabytes
    whole = {"text encoder", "scheduler", "VAE decoder"}
    assert set(stack.parts) == {"UNet, whole", "UNet, reusing", *whole} and not stack.extrapolated
    assert original.gflops == pytest.approx(4 * original.gmacs / original.parts["UNet, whole"])
    assert original.limit_share == pytest.approx(original.gflops / 1e-3)
    assert original.peak_megabytes > 0
    # Without guidance a call has one sample instead of two.
    few = rows["few steps"]
    assert few.gflops == pytest.approx(2 * original.gmacs / few.parts["UNet, whole"])
    assert few.teacher_distance["seen"] > 0 and isinstance(pipeline.scheduler, DDIMScheduler)
    assert len(list((tmp_path / "images" / "seen" / "original").glob("*.png"))) == 2
    run = BenchmarkRun.now(device="cpu", rounds=2, seed=0, limits=limits)
    made = Benchmark().with_place("other", run, [found[0].model_copy(update={"place": "other"})])
    made = made.with_place("tiny", run, found[:1]).with_place("tiny", run, found)  # again, instead of the first
    made.save(tmp_path / "made.json")
    assert Benchmark.load(tmp_path / "made.json") == made and "torch" in made.runs["other"].versions
    rows = json.loads((tmp_path / "made.json").read_text())
    assert [(row["place"], row["name"]) for row in rows] == [
        ("other", "original"),
        *(("tiny", row.name) for row in found),
    ]
    (tmp_path / "made_run.json").unlink()
    with pytest.raises(AsdmError, match="not the results of a benchmark"):
        Benchmark.load(tmp_path / "made.json")
    known = [row.model_copy(update={"speedup_interval": (row.speedup, row.speedup)}) for row in found if row.speedup]
    figure = benchmark_plot(known)
    assert [axes.get_title() for axes in figure.axes] == 2 * ["seen prompts"] + 2 * ["held-out prompts"]
    assert any("lean" in text.get_text() for text in figure.axes[0].texts)
    scales = {axes.get_ylabel().partition(",")[0]: axes.get_yscale() for axes in figure.axes}
    assert scales["distance to the original's images (1 - cosine)"] == "symlog"  # small distances are told apart
    plt.close(figure)


def test_a_stopped_benchmark_goes_on_with_the_images_that_it_has_not_judged(
    pipeline, data_folder, monkeypatch, tmp_path
):
    looked, timed = [], []

    class Stopping(FakeJudge):
        stops_at = 6

        def features(self, images):
            looked.append(len(images))
            if len(looked) == self.stops_at:
                raise KeyboardInterrupt
            return super().features(images)

    def times(_, entries, *, place, **__):
        timed.append(len(entries))
        return [BenchmarkRow(place=place, name=each.name, group=each.group, steps=each.steps) for each in entries]

    def measured(seed=0):
        looked.clear()
        settings = {"samples": 2, "image_to_image": 0, "steps": 4, "rounds": 1, "only": ["order 1"], "seed": seed}
        kept = unfinished(tmp_path, "a/model")
        return benchmark_model(pipeline, "a/model", students={}, data=data_folder, limits={}, kept=kept, **settings)

    monkeypatch.setattr("asdm.benchmark.run.Judge", Stopping)
    monkeypatch.setattr("asdm.benchmark.models.time_methods", times)
    with pytest.raises(KeyboardInterrupt):
        measured()
    kept = json.loads(unfinished(tmp_path, "a/model").read_text())["rows"]
    assert [row["images"] for row in kept] == [3, 3, 0, 0] and timed == [4]
    monkeypatch.setattr(Stopping, "stops_at", 0)
    found = measured()
    assert len(looked) == 7  # real images, the original again (all others are compared with it), and two methods
    assert [row.images for row in found.rows] == [3] * 4 and timed == [4]
    other = measured(seed=1)  # another benchmark
    assert len(looked) == 9 and timed == [4, 4]
    save_results(open_results(tmp_path), other, tmp_path)
    assert not list(tmp_path.glob("unfinished*"))


@pytest.mark.slow
def test_where_an_image_takes_long_its_time_is_put_together_from_parts(pipeline):
    slow = {"whole": 0.03, "reusing": 0.01}
    entered = []

    def slowness(step):
        return slow[at_every(3)(step)] if step else 0.5  # the first call warms up

    @contextmanager
    def slowly(given):
        entered.append(given)
        steps = iter(range(100))
        handle = given.unet.register_forward_hook(lambda *_: time.sleep(slowness(next(steps))))
        yield given
        # Behind the first call, one of each kind shows what is needed; two of each are timed.
        assert next(steps) == (4 if len(entered) == 1 else 7)
        handle.remove()

    slowest = Method("slow", "ours", slowly, 10, at_every(3))
    entries = [Method("original", "original"), *slowest.in_steps([10, 4])]
    _, slow_row, fewer = time_methods(pipeline, entries, place="tiny", rounds=1, longest=0)
    assert len(entered) <= 3  # for warming up and for one or two turns: in fewer steps it has the same parts
    assert (fewer.name, fewer.steps, fewer.parts) == ("slow, 4 steps", 4, slow_row.parts)
    assert fewer.seconds < slow_row.seconds and fewer.peak_megabytes == slow_row.peak_megabytes
    assert slow_row.extrapolated and slow_row.error is None
    parts = slow_row.parts
    assert set(parts) == {"text encoder", "VAE decoder", "scheduler", "UNet, whole", "UNet, reusing"}
    assert 0.4 > parts["UNet, whole"] > slow["whole"] and parts["UNet, reusing"] > slow["reusing"]
    calls = 4 * parts["UNet, whole"] + 6 * parts["UNet, reusing"]
    assert slow_row.seconds >= parts["text encoder"] + parts["VAE decoder"] + calls


@pytest.mark.parametrize("longest", [0, 100])
def test_steps_without_guidance_are_timed_apart(pipeline, longest):
    original = Method("original", "original", steps=10)
    entries = [original, with_guidance_until(original, 0.6), with_guidance_until(cached_every(10, 3), 0.5)]
    batches = defaultdict(int)
    handle = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: batches.update({len(args[0]): batches[len(args[0])] + 1}), with_kwargs=True
    )
    found = time_methods(pipeline, entries, place="tiny", rounds=1, longest=longest)
    handle.remove()
    assert [row.error for row in found] == [None] * 3 and batches[1] > 0
    assert [row.name for row in found[1:]] == [
        "guidance in 60% of the steps",
        "caching, every 3, order 0, guidance in 50% of the steps",
    ]
    kinds = [{part.removeprefix("UNet, ") for part in row.parts if part.startswith("UNet")} for row in found]
    assert kinds[:2] == [{"whole"}, {"whole", "whole, without guidance"}]
    assert kinds[2] == {"whole", "reusing", "whole, without guidance", "reusing, without guidance"}


def test_the_first_step_without_guidance_is_computed_whole(pipeline):
    """The timed kinds are those of the calls that caching makes."""
    method = with_guidance_until(cached_every(10, 3), 0.5)
    made = []
    with method.prepared(pipeline) as ready:
        ready.unet.register_forward_pre_hook(lambda *_: made.append("reusing"))
        ready.unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: made.__setitem__(-1, "whole"))
        generate(ready, "octopus", steps=10, cfg_cutoff=method.cfg_cutoff)
    assert made == [method.kinds(step).removesuffix(", without guidance") for step in range(10)]
    assert made[5] == "whole" and 5 % 3


@pytest.mark.parametrize("make", [tome, deep_cache, attention_broadcast, t_gate])
def test_a_baseline_runs_and_leaves_the_pipeline_as_it_was(make, pipeline):
    pytest.importorskip({tome: "tomesd", deep_cache: "DeepCache", t_gate: "tgate"}.get(make, "diffusers"))
    entry = make(8, 0.5 if make is tome else 2)
    expected = generate(with_dpm_solver(pipeline), ["a photograph"], steps=8)
    (row,) = time_methods(pipeline, [entry], place="tiny", rounds=1)
    assert row.error is None and row.seconds > 0
    kinds = {part for part in row.parts if part.startswith("UNet")}
    assert kinds == {f"UNet, {entry.kinds(step)}" for step in range(8)}
    with entry.prepared(pipeline) as ready:
        assert not torch.equal(generate(ready, ["a photograph"], steps=8), expected)
    assert torch.equal(generate(pipeline, ["a photograph"], steps=8), expected)


@pytest.mark.slow
def test_openvino_draws_the_same_within_the_same_loop(pipeline):
    pytest.importorskip("openvino")
    entry = combined("graph", "runtime", in_openvino(), steps=4)
    expected = generate(pipeline, ["a photograph"], steps=4)
    (row,) = time_methods(pipeline, [entry], place="tiny", rounds=1)
    assert row.error is None and row.dtype in ("float32", "bfloat16") and row.gmacs > 0
    assert row.unet_megabytes < sum(p.numel() for p in pipeline.unet.parameters()) * 4 / 1e6
    with entry.prepared(pipeline) as ready:
        assert (generate(ready, ["a photograph"], steps=4) - expected).abs().mean() < 0.02
        assert generate(ready, ["a", "b", "c"], steps=2).shape == (3, 3, 16, 16)  # any batch


def test_what_takes_long_to_make_is_made_once_and_so_is_its_failure(pipeline):
    calls = []

    def maker(given):
        calls.append(given)
        if len(calls) == 1:
            raise ValueError("not on this machine")
        return given

    failing = cached(maker)
    for _ in range(2):
        with pytest.raises(ValueError, match="not on this machine"):
            failing(pipeline)
    working = cached(maker, maker)
    for _ in range(2):
        with working(pipeline) as ready:
            assert ready is pipeline
    assert len(calls) == 3
    with fresh(maker)(pipeline):
        assert len(calls) == 4


def test_all_sample_with_the_same_scheduler(pipeline):
    ready = with_dpm_solver(pipeline)
    assert ready is pipeline and isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    scheduler = pipeline.scheduler
    assert with_dpm_solver(pipeline).scheduler is scheduler


def test_a_few_step_student_samples_at_the_steps_it_was_trained_at(pipeline, monkeypatch):
    monkeypatch.setattr("asdm.benchmark.techniques.export", lambda *_, **__: None)
    monkeypatch.setattr("asdm.benchmark.techniques.with_openvino_graphs", lambda given, _: with_unet(given, given.unet))
    student = tiny_pipeline()
    student.scheduler = lcm_scheduler(student.scheduler.config, 10)
    chosen = chosen_methods(pipeline, {"quick": student}, None, 8, ["quick"])
    assert [method.name for method in chosen][1:] == ["quick, 4 steps of LCM", "quick + OpenVINO, 4 steps of LCM"]
    for method in chosen[1:]:
        with method.prepared(pipeline) as ready:
            assert ready.scheduler.config.original_inference_steps == 10
    with by_lcm(pipeline) as ready:
        assert ready.scheduler.config.original_inference_steps == 50
    with pytest.raises(AsdmError, match=r"a few-step model, .* this one by --student"):
        with_dpm_solver(student)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pixart_pipeline])
def test_first_steps_are_as_many_as_are_timed(make):
    pipeline = make()
    latents, calls = first_steps(pipeline, Method("original", "original", steps=25), 2)
    assert len(calls) == 3 and decode_latents(pipeline, latents).shape == (1, 3, 16, 16)


def test_what_is_made_of_a_pipeline_goes_with_it(pipeline):
    made = memoized(lambda _: tiny_pipeline())
    given = with_unet(pipeline, pipeline.unet)
    found = weakref.ref(made(given))
    assert made(given) is found()
    del given
    gc.collect()
    assert found() is None  # another pipeline may have the same id


def test_our_parts_leave_the_pipeline_as_it_was():
    pipeline = tiny_pipeline()
    modules = dict(pipeline.unet.named_modules())
    students = {"bk-base": without_mid_block(pipeline.unet), "lean": without_mid_block(pipeline.unet)}
    entries = methods(8, students, few_step={"quick": without_mid_block(pipeline.unet)}, data="demo", full=True)
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)) and names[0] == "original"
    groups = {entry.name: entry.group for entry in entries}
    assert (groups["bk-base"], groups["lean"]) == ("baseline", "ours")
    assert "lean + runtime + caching, every 3, 3 steps" in names
    assert "lean + OpenVINO int8 + caching, every 3, 3 steps, guidance in 36% of the steps" in names
    assert {name for name in names if name.endswith("4 steps of LCM")} == {
        f"{name}4 steps of LCM"
        for name in ("", "OpenVINO, ", "lean + runtime, ", "lean + OpenVINO, ", "quick, ", "quick + OpenVINO, ")
    }
    (switched,) = (entry for entry in entries if entry.name == "lean, from 50% of the schedule on the original")
    with switched.prepared(pipeline) as ready:
        assert [unet is pipeline.unet for unet in ready.unet.denoisers] == [False, True]
    for entry in entries:
        if entry.name.startswith("caching") and entry.kinds(1) != "mixed":
            with entry.prepared(pipeline) as ready:
                assert ready is pipeline
            assert dict(pipeline.unet.named_modules()) == modules
    shorter = [entry.name for entry in methods(8, students, data="demo")]
    assert set(shorter) < set(names) and len(shorter) < len(names) / 2
    assert {groups[name] for name in shorter} == set(groups.values())
    assert {"OpenVINO, 3 steps", "caching, calibrated, 2x", "lean + OpenVINO int8", "DeepCache, interval 5"} < set(
        shorter
    )
    speed_alone = {entry.name for entry in methods(8, students) if entry.engine is None}
    assert speed_alone < set(names) and not any("calibrated" in name for name in speed_alone)
    elsewhere = {entry.name for entry in methods(8, students, graphs=False)}
    assert elsewhere == {name for name in speed_alone if "OpenVINO" not in name}


@pytest.mark.parametrize(("faster", "pool"), [(False, 2), (True, 4)])
def test_gri_takes_the_place_of_the_outermost_self_attentions(pipeline, faster, pool):
    edits = with_gri(pipeline, faster).unet.config.edits
    assert [edit["edit"] for edit in edits] == ["gri_attention"] * 5
    assert {edit.get("pool", 2) for edit in edits} == {pool}


def test_the_front_holds_what_no_other_beats():
    def row(name, speedup, distance):
        return BenchmarkRow(
            place="p",
            name=name,
            group="ours",
            steps=1,
            speedup=speedup,
            teacher_distance={"seen": distance},
            concept_top5={"seen": 1 - distance},
        )

    rows = [row("base", 1, 0.0), row("good", 2, 0.1), row("worse", 1.5, 0.2), row("fast", 3, 0.3), row("far", 3, 0.4)]
    rows.append(BenchmarkRow(place="p", name="broken", group="baseline", steps=1, error="x"))
    for quality in ("teacher_distance", "concept_top5"):
        assert [found.name for found in pareto_front(rows, "seen", quality)] == ["base", "good", "fast"]


@pytest.mark.parametrize("name", ["benchmark", "benchmark_gpu"])
@pytest.mark.slow
def test_results_of_earlier_versions_load_are_continued_and_drawn(name, tmp_path):
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    found = Benchmark.load(RESULTS / f"{name}.json")
    assert len(found.rows) == len(saved)
    for before, row in zip(saved, found.rows, strict=True):
        assert row.group == {"peer": "baseline"}.get(before["group"], before["group"])
        assert "inheritance" not in row.name and ("inheritance" not in before["name"] or "caching" in row.name)
        interval = before.get("seconds_quartiles") or before.get("seconds_interval")
        assert row.seconds_interval == (interval and tuple(interval))
        assert row.ratio is None or row.ratio.value == before["speedup"]
    place, run = next(iter(found.runs.items()))
    continued = found.with_place("another", run, [found.rows[0].model_copy(update={"place": "another"})])
    continued.save(tmp_path / "continued.json")
    again = Benchmark.load(tmp_path / "continued.json")
    assert again == continued and again.rows[:-1] == found.rows
    plt.close(benchmark_plot([row for row in found.rows if row.place == place]))


def test_labels_of_the_plot_do_not_cover_each_other():
    rows = [
        BenchmarkRow(
            place="p",
            name=f"a method, number {index}",
            group="stack",
            steps=1,
            speedup=1 + index / 50,
            teacher_distance={"seen": index / 500},
        )
        for index in range(12)
    ]
    figure = benchmark_plot(rows)
    figure.canvas.draw()  # which places the labels
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        common = [Bbox.intersection(box, other) for other in boxes[:index]]
        covered = sum(each.width * each.height for each in common if each is not None)
        assert covered < 0.05 * box.width * box.height
    plt.close(figure)


@pytest.mark.parametrize(("in_bfloat16", "size"), [(True, 96), (False, 12)])
def test_the_machine_s_limits_are_told_for_each_dtype(in_bfloat16, size, monkeypatch):
    sizes, product = {}, limits_module._product

    def noted(size, dtype, device):
        sizes[dtype] = size
        return product(size, dtype, device)

    monkeypatch.setattr(limits_module, "computes_in_bfloat16", lambda: in_bfloat16)
    monkeypatch.setattr(limits_module, "_product", noted)
    limits = machine_limits(size=96, repeats=1)
    assert sizes == {torch.float32: 96, torch.bfloat16: size}  # less where a CPU would take minutes
    assert set(limits) == {"float32", "bfloat16"}
    assert all(value > 0 for best in limits.values() for value in best.values())


def test_the_script_for_a_gpu_measures_each_way_and_says_which_does_not_run(unet, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "WAYS", {name: gpu.WAYS[name] for name in ("eager", "CUDA graph")})
    student = build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}]))
    models = {"original": unet, "student": student}
    rows = gpu.measured(models, [torch.float32], [1, 2], "cpu", 1, {"float32": {"matrix product": 100.0}})
    measured = {(row["model"], row["images"]): row for row in rows if "error" not in row}
    assert set(measured) == {(name, count) for name in models for count in (1, 2)}
    assert all(row["way"] == "eager" and row["ms"] > 0 and row["of_the_best"] > 0 for row in measured.values())
    failed = [row for row in rows if "error" in row]
    assert torch.cuda.is_available() or (len(failed) == 4 and {row["way"] for row in failed} == {"CUDA graph"})
