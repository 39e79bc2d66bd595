"""MACs and latency are counted as they are defined."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from asdm.edits import Remove
from asdm.edits.surgery import edited
from asdm.families.unet_calls import unet_call
from asdm.measure.latency import measure_interleaved
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes
from asdm.pipelines.random_models import UNETS
from conftest import tiny_sdxl_unet, tiny_unet


def test_sd15_macs_are_the_published_ones():
    """338.6 G without attention products and 401.6 G with them, as BK-SDM counts them."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS["sd15"])
    with counting_macs(unet) as count:
        unet_call(unet, batch_size=1)()
    assert count.below(with_attention=False) / 1e9 == pytest.approx(338.6, abs=0.3)
    assert count.below() / 1e9 == pytest.approx(401.6, abs=0.3)
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(859.5, abs=0.1)


@pytest.mark.parametrize("shape", ["sd21", "sdxl"])
def test_other_full_size_shapes_have_the_published_size(shape):
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS[shape])
    expected = {"sd21": 865.9, "sdxl": 2567.5}[shape]
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("make", [tiny_unet, tiny_sdxl_unet])
def test_macs_are_per_sample(make):
    counts = []
    for batch_size in (1, 3):
        unet = make()
        with counting_macs(unet) as count:
            unet_call(unet, batch_size=batch_size)()
        counts.append(count.below())
    assert counts[0] == counts[1]


def test_counting_leaves_no_hooks(unet):
    with counting_macs(unet):
        unet_call(unet)()
    assert not any(module._forward_hooks for module in unet.modules())


def test_a_unit_and_what_is_below_it_are_counted_together(unet):
    with counting_macs(unet) as count:
        unet_call(unet, batch_size=1)()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    queries, width = 64, 32
    assert count.below(name, with_attention=False) == 4 * queries * width * width
    assert count.below(name) - count.below(name, with_attention=False) == 2 * queries * queries * width


def test_interleaved_rounds_find_the_slower_call():
    def work(size):
        matrix = torch.randn(size, size)
        return lambda: matrix @ matrix @ matrix

    times = measure_interleaved({"slow": work(600), "fast": work(150)}, rounds=9)
    assert times.speedup("slow", "fast").value > 2
    for time in times.values():
        assert time.rounds >= 9
        assert time.low_ms <= time.ms <= time.high_ms


def test_an_edit_is_undone_after_its_block(unet):
    before = {name: id(module) for name, module in unet.named_modules()}
    with pytest.raises(KeyError), edited(unet, Remove(unit="down_blocks.3")):
        assert {name: id(module) for name, module in unet.named_modules()} != before
        raise KeyError
    assert {name: id(module) for name, module in unet.named_modules()} == before


def test_the_peak_counts_what_lives_at_once_and_not_what_was_there_before():
    given = torch.zeros(1_000_000)  # 4 MB

    def call():
        first = given + 1
        second = first * 2  # both live: 8 MB
        del first
        second.add_(1)  # in place: nothing new
        third = second.view(1000, 1000).mT  # shares its memory
        return third.contiguous()  # 8 MB again

    assert peak_megabytes(call) == pytest.approx(8.0, rel=1e-3)
    assert peak_megabytes(lambda: given.view(1000, 1000)) == 0.0
