"""MACs and latency are counted as they are defined."""

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn

from asdm.edits import Remove, edited
from asdm.families import denoiser_call, family_of
from asdm.measure.latency import Latency, Timing, measure_interleaved
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes
from asdm.pipelines.random_models import UNETS
from asdm.sensitivity import costs
from conftest import student_of_every_kind, tiny_sdxl_unet, tiny_unet


def test_sd15_macs_are_the_published_ones():
    """338.6 G without attention products and 401.6 G with them, as BK-SDM counts them."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS["sd15"])
    with counting_macs(unet) as count:
        denoiser_call(unet, batch_size=1)()
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
            denoiser_call(unet, batch_size=batch_size)()
        counts.append(count.below())
    assert counts[0] == counts[1]


def test_the_lowest_level_saves_the_time_that_the_mid_block_takes_more(unet, monkeypatch):
    """Of modules that take one millisecond per MAC. The removed downsampler counts too."""
    family = family_of(unet)

    def latencies(model, call, names, **_):
        with counting_macs(model) as count:
            call()
        found = {name: Latency(ms := count.below(name), ms, ms, 5) for name in names}
        return found, Timing({"model": [count.below() / 1000] * 5}, {"model": [0.0] * 5})

    monkeypatch.setattr(costs, "module_latencies", latencies)
    edits = [Remove("down_blocks.3"), Remove("mid_block")]
    with torch.no_grad():
        measured = costs.measure_costs(unet, family.units(unet), rounds=5)
        level, mid_block = costs.measure_edits(unet, edits, measured, rounds=5)
    assert level.ms == pytest.approx(level.macs) and mid_block.ms == pytest.approx(mid_block.macs)
    assert level.enlarges["mid_block"] > 3 and not mid_block.enlarges


def test_counting_leaves_no_hooks(unet):
    with counting_macs(unet):
        denoiser_call(unet)()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def fused():
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    return unet


def adapted():
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "conv1"]))
    return unet


def weightless():
    with init_empty_weights():
        return UNet2DConditionModel(**tiny_unet().config)


@pytest.mark.parametrize(
    ("make", "macs", "without_attention"),
    [
        (tiny_unet, 27103360, 25247744),
        (fused, 27103360, 25247744),
        (weightless, 27103360, 25247744),
        (adapted, 28231040, 26375424),
        (tiny_sdxl_unet, 23881728, 23431168),
        # 0.1.0 counted 4608 products by element in it, and not the mixing of 64 biases.
        (student_of_every_kind, 9120576 - 4608 + 64, 8661824 - 4608 + 64),
    ],
)
def test_macs_are_those_of_earlier_versions(make, macs, without_attention):
    unet = make()
    with counting_macs(unet) as count:
        denoiser_call(unet, batch_size=1)()
    assert (count.below(), count.below(with_attention=False)) == (macs, without_attention)


class Layers(nn.Module):
    """Every kind of product: (batch, 4, 6, 6) to (batch, 36, 3)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.linear = nn.Linear(8, 3, bias=False)
        self.constant = nn.Parameter(torch.zeros(3))

    def forward(self, images):
        tokens = self.depthwise(self.conv(images)).flatten(2)  # (batch, 8, 9)
        tokens = self.linear(tokens.mT)  # its input is a view that is no matrix
        tokens = tokens + self.constant.expand_as(tokens) * tokens.sigmoid()
        scores = tokens @ tokens.mT
        attended = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return {"attended": attended + scores @ tokens}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_macs_are_counted_by_hand(device, batch_size):
    model = Layers().to(device)
    with counting_macs(model) as count:
        model(torch.randn(batch_size, 4, 6, 6, device=device))
    convolution, depthwise, linear = 9 * 4 * 8 * 9, 9 * 8 * 9, 9 * 8 * 3
    assert count.below("conv") == convolution
    assert count.below("depthwise") == depthwise
    assert count.below("linear") == count.below("linear", with_attention=False) == linear
    assert count.below(with_attention=False) == convolution + depthwise + linear
    assert count.below() - count.below(with_attention=False) == 4 * 9 * 9 * 3


def test_a_unit_and_what_is_below_it_are_counted_together(unet):
    with counting_macs(unet) as count:
        denoiser_call(unet, batch_size=1)()
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
    with pytest.raises(KeyError), edited(unet, Remove(unit="down_blocks.3"), family_of(unet)):
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
