"""Global-regional attention: beside a naive one, at any size, in a UNet, in files."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention
from torch._subclasses.fake_tensor import FakeTensorMode

from asdm import AsdmError, GriAttention, PruningPlan, build_student
from asdm.distillation.weightless import weightless
from asdm.edits import edited
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.families import family_of
from asdm.measure.macs import counting_macs
from asdm.student.unet import AsdmUNet2DConditionModel
from conftest import predict, tiny_sdxl_unet, tiny_unet, unet_inputs

OUTER = "down_blocks.0.attentions.0.transformer_blocks.0"


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8).eval()
    with torch.no_grad():
        for projection in (attention.to_q, attention.to_k):
            projection.weight.mul_(4)  # logits far enough apart to matter
    return attention


def attend(attention, hidden_states, height, width, **settings):
    with torch.no_grad():
        return GriAttnProcessor(**settings)(attention, hidden_states, map_sides=(height, width))


def naive(attention, hidden_states, height, width, regions, pool, weighted=False):
    """Each token by itself: the keys of its region, then the averages of squares, in one softmax."""

    def bounds(position, side):
        count = min(regions, side)
        length = -(-side // count)
        start = min(position // length * length, side - length)
        return range(start, start + length)

    with torch.no_grad():
        query, key, value = (p(hidden_states) for p in (attention.to_q, attention.to_k, attention.to_v))
        rows = []
        for y in range(height):
            for x in range(width):
                keys = [[i * width + j] for i in bounds(y, height) for j in bounds(x, width)]
                if pool:
                    keys += [
                        [i * width + j for i in range(a, min(a + pool, height)) for j in range(b, min(b + pool, width))]
                        for a in range(0, height, pool)
                        for b in range(0, width, pool)
                    ]
                k = torch.stack([key[:, which].mean(1) for which in keys], 1).unflatten(2, (2, 8))
                v = torch.stack([value[:, which].mean(1) for which in keys], 1).unflatten(2, (2, 8))
                q = query[:, y * width + x].unflatten(1, (2, 8))
                logits = torch.einsum("bhd,bkhd->bhk", q, k) / 8**0.5
                if weighted:
                    seen = {i * width + j for i in bounds(y, height) for j in bounds(x, width)}
                    counts = [1.0 if n < len(seen) else float(len(set(which) - seen)) for n, which in enumerate(keys)]
                    logits = logits + torch.tensor(counts).log()
                rows.append(torch.einsum("bhk,bkhd->bhd", logits.softmax(-1), v).flatten(1))
        return attention.to_out[0](torch.stack(rows, 1))


@pytest.mark.parametrize("sides", [(8, 8), (4, 12), (5, 7), (9, 2), (1, 3)])
@pytest.mark.parametrize("settings", [(2, 2, False), (3, 2, True), (4, 0, False), (2, 3, True), (1, 4, True)])
def test_it_is_the_naive_computation(attention, sides, settings):
    regions, pool, weighted = settings
    hidden_states = torch.randn(3, sides[0] * sides[1], 16, generator=torch.Generator().manual_seed(1))
    ours = attend(attention, hidden_states, *sides, regions=regions, pool=pool, weighted=weighted)
    expected = naive(attention, hidden_states, *sides, regions, pool, weighted)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert ours.std() > 0.05


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["_native_flash", "_native_efficient"])
def test_it_is_computed_whatever_backend_diffusers_is_set_to(attention, backend, weighted):
    hidden_states = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))
    settings = {"regions": 2, "pool": 2, "weighted": weighted}
    expected = attend(attention, hidden_states, 8, 8, **settings)
    with attention_backend(backend):
        assert torch.equal(attend(attention, hidden_states, 8, 8, **settings), expected)


def test_one_region_without_pooling_is_full_attention(unet):
    plan = PruningPlan.for_unet(unet, [{"edit": "gri_attention", "unit": f"{OUTER}.attn1", "regions": 1, "pool": 0}])
    assert torch.allclose(predict(build_student(unet, plan)), predict(unet), atol=1e-6)


@pytest.mark.parametrize(("height", "width", "batch"), [(8, 8, 1), (16, 8, 3), (24, 40, 2)])
def test_a_unet_with_it_takes_any_size_and_batch(unet, height, width, batch):
    edits = [GriAttention(unit=f"{block}.attn1", regions=3, pool=2) for block in (OUTER, OUTER.replace("0", "1", 1))]
    student = build_student(unet, PruningPlan.for_unet(unet, edits))
    inputs = unet_inputs(unet, batch)
    inputs["sample"] = torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(2))
    moved = (predict(student, **inputs) - predict(unet, **inputs)).square().mean()
    assert 0 < moved < 0.1 * predict(unet, **inputs).square().mean()


def test_it_goes_with_removals_in_the_same_transformer_and_into_files(unet, tmp_path):
    edits = [
        {"edit": "remove", "unit": f"{OUTER}.ff"},
        {"edit": "gri_attention", "unit": f"{OUTER}.attn1", "regions": 2, "pool": 2, "weighted": True},
        {"edit": "remove", "unit": f"{OUTER}.attn2"},
    ]
    student = build_student(unet, PruningPlan.for_unet(unet, edits))
    student.save_pretrained(tmp_path)
    loaded = AsdmUNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.config["edits"] == edits
    assert torch.equal(predict(loaded), predict(student))
    plain = build_student(unet, PruningPlan.for_unet(unet, [edits[0], edits[2]]))
    assert not torch.equal(predict(student), predict(plain))
    with pytest.raises(ValueError, match="does not exist"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_two_in_one_transformer():
    unet = tiny_sdxl_unet()
    units = [f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn1" for i in range(2)]
    plans = [
        PruningPlan.for_unet(unet, [GriAttention(unit=unit, regions=2, pool=0) for unit in units[:n]]) for n in (1, 2)
    ]
    one, two = (build_student(unet, plan) for plan in plans)
    assert not torch.equal(predict(one), predict(two))


def test_an_edit_for_a_while_leaves_no_trace(unet):
    before = predict(unet)
    with edited(unet, GriAttention(unit=f"{OUTER}.attn1", regions=4, pool=0), family_of(unet)):
        assert not torch.equal(predict(unet), before)
    assert torch.equal(predict(unet), before)
    assert not any(isinstance(getattr(m, "processor", None), GriAttnProcessor) for m in unet.modules())


def test_it_learns(unet):
    plan = PruningPlan.for_unet(unet, [GriAttention(unit=f"{OUTER}.attn1", regions=3, pool=2, weighted=True)])
    student = build_student(unet, plan).train()
    student(**unet_inputs(unet)).sample.square().mean().backward()
    for name in ("to_q", "to_k", "to_v"):
        gradient = student.get_submodule(f"{OUTER}.attn1.{name}").weight.grad
        assert gradient is not None and gradient.abs().sum() > 0


def test_an_estimate_of_a_training_leaves_no_trace(unet):
    edit = GriAttention(unit=f"{OUTER}.attn1", regions=5, pool=3, weighted=True)  # that no other test has
    student = build_student(unet, PruningPlan.for_unet(unet, [edit]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        predict(weightless(student))
    assert type(predict(student)) is torch.Tensor


def test_macs_count_the_keys_that_queries_meet(unet):
    plan = PruningPlan.for_unet(unet, [GriAttention(unit=f"{OUTER}.attn1", regions=2, pool=4)])
    counts = []
    for model in (unet, build_student(unet, plan)):
        with counting_macs(model) as count:
            predict(model)
        counts.append(count)
    assert counts[0].attention[f"{OUTER}.attn1"] == 2 * 64 * 64 * 32
    assert counts[1].attention[f"{OUTER}.attn1"] == 2 * 64 * (16 + 4) * 32
    assert counts[1].below(with_attention=False) == counts[0].below(with_attention=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"unit": f"{OUTER}.attn2"}, "not a self-attention"),
        ({"unit": "down_blocks.0.resnets.0"}, "not a self-attention"),
        ({"unit": f"{OUTER.replace('0', '7', 1)}.attn1"}, "no such unit"),
        ({"unit": f"{OUTER}.attn1", "regions": 0}, "regions"),
        ({"unit": f"{OUTER}.attn1", "pools": 2}, "pools"),
    ],
)
def test_what_cannot_be_is_said(unet, edit, message):
    with pytest.raises(AsdmError, match=message):
        PruningPlan.for_unet(unet, [{"edit": "gri_attention", **edit}])


def test_an_attention_is_not_removed_and_regional_at_once(unet):
    edits = [{"edit": "gri_attention", "unit": f"{OUTER}.attn1"}, {"edit": "remove", "unit": f"{OUTER}.attn1"}]
    with pytest.raises(AsdmError, match="named twice"):
        PruningPlan.for_unet(unet, edits)
