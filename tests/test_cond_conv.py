"""CLME-CondConv: the exact start, the sum of convolutions it stands for, inheritance, files, speed-ups."""

from contextlib import ExitStack
from types import MethodType
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asdm import AsdmError, PruningPlan, build_student
from asdm.choices import Router
from asdm.edits.base import restored
from asdm.edits.cond_conv import CondResnetBlock2D
from asdm.edits.expert_kernels import CondConv2d
from asdm.edits.prompted_blocks import pooled_prompt
from asdm.families import family_of
from asdm.families.unet_structure import conv_channels
from asdm.measure.macs import counting_macs
from asdm.student.unet import AsdmUNet2DConditionModel
from conftest import predict, tiny_sdxl_unet, tiny_unet, unet_inputs

REMOVED = ("down_blocks.1.resnets.1", "up_blocks.2.resnets.1")
BANKS = {
    "down_blocks.1.resnets.0.conv2": ["down_blocks.1.resnets.1.conv2", "down_blocks.0.resnets.1.conv1"],
    "up_blocks.2.resnets.0.conv1": ["up_blocks.2.resnets.1.conv1"],
    "up_blocks.2.resnets.2.conv2": ["up_blocks.2.resnets.1.conv2"],
}
ROUTERS = get_args(Router)


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def edits_of(router="input", activation="softmax"):
    removals = [{"edit": "remove", "unit": unit} for unit in REMOVED]
    banks = [
        {"edit": "cond_conv", "unit": unit, "experts": experts, "router": router, "activation": activation}
        for unit, experts in BANKS.items()
    ]
    return removals + banks


def moved(student, seed=0):
    """The student with routers and experts that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, CondConv2d):
                module.router.weight.copy_(torch.randn(module.router.weight.shape, generator=generator))
                module.router.bias.copy_(torch.randn(module.router.bias.shape, generator=generator))
    return student


def bank(router="input", activation="softmax", experts=3):
    torch.manual_seed(0)
    read = {name: {"input": 6, "prompt": 12, "time": 10}[name] for name in router.split("+")}
    conv = CondConv2d.around(nn.Conv2d(6, 8, 3, padding=1), ["e"] * experts, router, activation, read)
    with torch.no_grad():
        for parameter in (conv.expert_weight, conv.expert_bias, conv.router.weight, conv.router.bias):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return conv


def naive(conv, hidden_states, temb, prompt):
    """E convolutions, then their sum."""
    routing = conv.routing(hidden_states, temb, prompt).expand(len(hidden_states), -1)
    experts = conv.expert_weight.view(-1, *conv.weight.shape)
    kernels = [(conv.weight, conv.bias), *zip(experts, conv.expert_bias, strict=True)]
    outputs = [F.conv2d(hidden_states, weight, bias, padding=1) for weight, bias in kernels]
    return sum(part[:, None, None, None] * output for part, output in zip(routing.T, outputs, strict=True))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_fresh_student_is_the_plain_pruned_one(unet, router, activation):
    plain = build_student(unet, PruningPlan.for_unet(unet, edits_of()[:2]))
    fresh = build_student(unet, PruningPlan.for_unet(unet, edits_of(router, activation)))
    assert torch.allclose(predict(fresh), predict(plain), atol=1e-6)
    assert not torch.allclose(predict(moved(fresh)), predict(plain), atol=1e-2)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
# One kernel, kernels of the samples, outputs of the experts; the same of one expert.
@pytest.mark.parametrize(("batch", "experts"), [(1, 3), (3, 3), (9, 3), (1, 1), (3, 1)])
def test_outputs_and_gradients_are_those_of_the_naive_sum(router, activation, batch, experts):
    conv = bank(router, activation, experts)
    hidden_states, temb, prompt = torch.randn(batch, 6, 5, 7), torch.randn(batch, 10), torch.randn(batch, 12)
    gradients = []
    for function in (conv, lambda *given: naive(conv, *given)):
        conv.zero_grad()
        inputs = hidden_states.clone().requires_grad_(True)
        output = function(inputs, temb, prompt)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients.append([output.detach(), inputs.grad, *(p.grad.clone() for p in conv.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("router", ["time", "input+time", "prompt"])
@pytest.mark.parametrize("changed", ["padding_mode", "_conv_forward"])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_it_pads_as_other_convolutions_where_images_shall_tile(router, changed, batch):
    def circular(self, states, weight, bias):
        return F.conv2d(F.pad(states, (1, 1, 1, 1), mode="circular"), weight, bias)

    conv = bank(router)
    setattr(conv, changed, "circular" if changed == "padding_mode" else MethodType(circular, conv))
    hidden_states, temb, prompt = torch.randn(batch, 6, 5, 7), torch.randn(batch, 10), torch.randn(batch, 12)
    shifted = conv(hidden_states.roll((2, 3), (2, 3)), temb, prompt)
    torch.testing.assert_close(shifted, conv(hidden_states, temb, prompt).roll((2, 3), (2, 3)))


@pytest.mark.parametrize("router", ["input+time", "prompt+time"])
def test_the_routing_learns_from_the_first_step(unet, router):
    student = build_student(unet, PruningPlan.for_unet(unet, edits_of(router))).train()
    student(**unet_inputs(unet)).sample.square().mean().backward()
    for module in student.modules():
        if isinstance(module, CondConv2d):
            assert module.router.weight.grad.abs().sum() > 0


def test_one_time_step_is_mixed_once_for_the_batch(unet):
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of("time"))))
    rows = []
    name = next(iter(BANKS))
    conv = student.get_submodule(name)
    routing = conv.routing
    conv.routing = lambda *given: rows.append(routing(*given)) or rows[-1]
    inputs = unet_inputs(unet, batch=3)
    together = predict(student, **inputs)
    apart = predict(student, **{**inputs, "timestep": inputs["timestep"].expand(3)})
    assert [len(row) for row in rows] == [1, 3]
    assert torch.allclose(together, apart, atol=1e-5)
    several = predict(student, **{**inputs, "timestep": torch.tensor([321, 5, 900])})
    assert torch.allclose(several[0], together[0], atol=1e-5)
    assert not torch.allclose(several[1], together[1], atol=1e-4)


def test_embeddings_that_differ_in_the_batch_are_never_shared():
    unet = tiny_sdxl_unet()
    edit = {"edit": "cond_conv", "unit": "down_blocks.1.resnets.0.conv2", "experts": ["down_blocks.1.resnets.1.conv2"]}
    student = moved(build_student(unet, PruningPlan.for_unet(unet, [edit | {"router": "time"}])))
    inputs = unet_inputs(unet)
    conv = student.get_submodule(edit["unit"])
    rows, routing = [], conv.routing
    conv.routing = lambda *given: rows.append(routing(*given)) or rows[-1]
    both = predict(student, **inputs)
    (mixtures,) = rows
    assert len(mixtures) == 2 and not torch.allclose(*mixtures)  # the pooled prompt and the sizes are read, too
    added = {name: tensor[1:] for name, tensor in inputs["added_cond_kwargs"].items()}
    second = {
        "sample": inputs["sample"][1:],
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["encoder_hidden_states"][1:],
        "added_cond_kwargs": added,
    }
    assert torch.allclose(both[1:], predict(student, **second), atol=1e-5)


def test_experts_are_the_teachers_kernels_on_the_channels_they_share(unet):
    student = build_student(unet, PruningPlan.for_unet(unet, edits_of()))
    name = "down_blocks.1.resnets.0.conv2"
    conv, state = student.get_submodule(name), unet.state_dict()
    kernel = state["down_blocks.1.resnets.1.conv2.weight"].flatten(1)
    assert conv.expert_weight.shape == (2 * len(kernel), kernel.shape[1])  # as optimisers for matrices take it
    assert torch.equal(conv.expert_weight[: len(kernel)], kernel)
    assert torch.equal(conv.expert_bias[1], state["down_blocks.0.resnets.1.conv1.bias"])
    channels = conv_channels(unet)
    assert channels["up_blocks.2.resnets.0.conv1"] == (64, 32)
    assert channels["up_blocks.2.resnets.1.conv1"] == (32, 32)
    bank = student.get_submodule("up_blocks.2.resnets.0.conv1").expert_weight.view(32, 96, 3, 3)
    source = state["up_blocks.2.resnets.1.conv1.weight"]
    assert torch.equal(bank[:, :32], source[:, :32])  # hidden on hidden
    assert bank[:, 32:64].abs().sum() == 0
    assert torch.equal(bank[:, 64:], source[:, 32:])  # skip on skip


@pytest.mark.parametrize("router", ["input+time", "prompt+time"])
def test_save_and_load_is_bit_identical_and_names_stay(unet, tmp_path, router):
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of(router, "sigmoid"))))
    student.save_pretrained(tmp_path)
    loaded = AsdmUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), predict(student))
    state = unet.state_dict()
    assert all(torch.equal(student.state_dict()[f"{name}.weight"], state[f"{name}.weight"]) for name in BANKS)


@pytest.mark.parametrize("router", ["input+time", "prompt+time"])
def test_gradient_checkpointing_gives_the_same_gradients(unet, router):
    gradients = []
    for checkpointing in (False, True):
        student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of(router)))).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        student(**unet_inputs(unet)).sample.square().mean().backward()
        gradients.append(student.get_submodule(next(iter(BANKS))).router.weight.grad)
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("router", ROUTERS)
def test_it_compiles_without_graph_breaks(router):
    conv = bank(router)
    resnet = CondResnetBlock2D(in_channels=6, out_channels=8, temb_channels=10, groups=2).eval()
    resnet.expert_convs = ("conv1",)
    resnet.conv1 = conv
    given, prompt = (torch.randn(2, 6, 5, 5), torch.randn(2, 10)), torch.randn(2, 12)
    with torch.no_grad():
        compiled = torch.compile(resnet, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(*given, prompt=prompt), resnet(*given, prompt=prompt), atol=1e-6)


def test_it_works_in_bfloat16_under_autocast_and_channels_last(unet):
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of("input+time"))))
    expected = predict(student)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(predict(student).float(), expected, atol=0.04)
    assert torch.allclose(predict(student.to(memory_format=torch.channels_last)), expected, atol=1e-4)


def test_a_router_sees_the_prompt_of_its_own_sample(unet):
    """A batch with guidance has two halves with two prompts: each is what it is alone."""
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of("prompt"))))
    inputs = unet_inputs(unet, batch=3)
    inputs["sample"] = inputs["sample"][:1].repeat(3, 1, 1, 1)  # the prompts alone differ
    conv = student.get_submodule(next(iter(BANKS)))
    rows, routing = [], conv.routing
    conv.routing = lambda *given: rows.append(routing(*given)) or rows[-1]
    together = predict(student, **inputs)
    (mixtures,) = rows
    assert (mixtures[0] - mixtures[1]).abs().max() > 1e-2
    for index in range(3):
        alone = {name: value if value.ndim == 0 else value[index : index + 1] for name, value in inputs.items()}
        assert torch.allclose(predict(student, **alone), together[index : index + 1], atol=1e-5)
    at_another_step = predict(student, **{**inputs, "timestep": torch.tensor(5)})
    assert not torch.allclose(at_another_step, together, atol=1e-3)
    assert torch.equal(rows[-1], mixtures)  # the prompt alone decides


def test_the_pooled_prompt_is_the_mean_of_the_tokens_that_count():
    states, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    bias = (1 - mask.float())[:, None] * -10000.0  # as UNet2DConditionModel passes it on
    pooled = pooled_prompt(states, bias)
    assert torch.allclose(pooled[0], states[0, :2].mean(0))
    assert torch.allclose(pooled[1:], pooled_prompt((states, "an image"))[1:])  # without any, all, as in a softmax


def test_a_masked_token_does_not_reach_the_router(unet):
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of("prompt+time"))))
    inputs, mask = unet_inputs(unet), torch.ones(2, 5)
    mask[:, 3:] = 0
    changed = inputs["encoder_hidden_states"].clone()
    changed[:, 3:] += 5
    expected = predict(student, **inputs, encoder_attention_mask=mask)
    assert torch.allclose(
        predict(student, **{**inputs, "encoder_hidden_states": changed}, encoder_attention_mask=mask),
        expected,
        atol=1e-5,
    )
    assert not torch.allclose(predict(student, **inputs), expected, atol=1e-3)


def test_a_prompt_without_a_token_is_pooled_as_the_attention_reads_it(unet):
    student = moved(build_student(unet, PruningPlan.for_unet(unet, edits_of("prompt"))))
    inputs, mask = unet_inputs(unet), torch.ones(2, 5)
    mask[0] = 0
    masked, plain = predict(student, **inputs, encoder_attention_mask=mask), predict(student, **inputs)
    assert torch.allclose(masked, plain, atol=1e-3)  # a bias of -10000 rounds the logits


def test_the_prompt_is_only_where_a_block_reads_it(unet):
    edit = {"edit": "cond_conv", "experts": ["down_blocks.3.resnets.1.conv2"], "router": "prompt"}
    with pytest.raises(AsdmError, match="no cross-attention in its block, hence no prompt to route by; use router inp"):
        PruningPlan.for_unet(unet, [{**edit, "unit": "down_blocks.3.resnets.0.conv2"}])
    student = build_student(unet, PruningPlan.for_unet(unet, [{**edit, "unit": "mid_block.resnets.1.conv2"}]))
    assert not torch.allclose(predict(moved(student)), predict(unet), atol=1e-3)
    with pytest.raises(AsdmError, match="no encoder_hidden_states"):
        student.mid_block(torch.randn(2, 64, 1, 1), torch.randn(2, 128))


@pytest.mark.parametrize("router", ["time", "prompt+time"])
def test_the_teachers_convolution_returns_without_its_block(unet, router):
    """As a refinement tries it: what other edits changed in the block stays."""
    plan = PruningPlan.for_unet(unet, edits_of(router))
    student = moved(build_student(unet, plan))
    plain = build_student(unet, PruningPlan.for_unet(unet, edits_of()[:2]))
    with ExitStack() as stack:
        for edit in plan.edits[2:]:
            stack.enter_context(restored(student, unet, edit, family_of(unet)))
        assert torch.allclose(predict(student), predict(plain), atol=1e-6)
    assert not torch.allclose(predict(student), predict(plain), atol=1e-2)


def test_macs_count_the_mixing(unet):
    name = next(iter(BANKS))
    counts = []
    for edits in (edits_of()[:2], edits_of("time")[:3]):
        model = build_student(unet, PruningPlan.for_unet(unet, edits))
        with counting_macs(model) as count:
            predict(model, **unet_inputs(model, batch=1))  # a batch at one time step shares its mixture
        counts.append(count.plain[name])
    own = unet.get_submodule(name)
    assert counts[1] - counts[0] == 2 * (own.weight.numel() + own.bias.numel())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"unit": "down_blocks.0.resnets.0.conv3", "experts": ["down_blocks.0.resnets.1.conv2"]}, "no convolution"),
        ({"unit": "down_blocks.0.resnets.0.conv2", "experts": ["down_blocks.9.resnets.1.conv2"]}, "no convolution"),
        ({"unit": "down_blocks.0.resnets.0.conv2", "experts": ["down_blocks.3.resnets.1.conv2"]}, "as many output"),
        ({"unit": "down_blocks.0.resnets.0.conv2", "experts": []}, "experts"),
        ({"unit": "down_blocks.0.resnets.0.conv2", "experts": ["mid_block.resnets.0.conv1"], "router": "x"}, "router"),
    ],
)
def test_what_cannot_be_is_said(unet, edit, message):
    with pytest.raises(AsdmError, match=message):
        PruningPlan.for_unet(unet, [{"edit": "cond_conv", **edit}])


def test_a_bank_of_a_removed_resnet_is_refused(unet):
    edits = [
        {"edit": "cond_conv", "unit": "down_blocks.1.resnets.1.conv2", "experts": ["down_blocks.1.resnets.0.conv2"]},
        {"edit": "remove", "unit": "down_blocks.1.resnets.1"},
    ]
    with pytest.raises(AsdmError, match="lies inside"):
        PruningPlan.for_unet(unet, edits)
