"""Tools that look into a UNet's modules (casting, offloading, LoRA, quantisation) or call it in their own ways
(threads, checkpointing) meet in a student what they meet in the stock UNet."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from asdm import AsdmError, AsdmUNet2DConditionModel, PruningPlan, build_student
from asdm.edits.expert_kernels import CondConv2d
from asdm.edits.projections import projection_of, reshape_saved
from asdm.families.tensors import fingerprint
from asdm.training.sharding import shard_like
from conftest import predict, saved_by_0_1, student_of_every_kind, tiny_transformer, tiny_unet, unet_inputs

peft = pytest.importorskip("peft")
OUTER = "down_blocks.0.attentions.0.transformer_blocks.0"
BANK = "up_blocks.1.resnets.2.conv2"


@pytest.fixture
def student():
    return student_of_every_kind()


# -- folders of before -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, "1MB"])
def test_a_folder_of_version_0_1_loads_and_computes_the_same_bits(student, tmp_path, shard):
    saved = saved_by_0_1()
    student.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & saved["own"].keys():
            tensors[name] = tensors[name].view(saved["own"][name]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    loaded = AsdmUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), predict(student))
    assert len(loaded.state_dict()) == saved["tensors"] and fingerprint(loaded) == saved["fingerprint"]
    own = {
        name: tensor.view(saved["own"][name]) for name, tensor in student.state_dict().items() if name in saved["own"]
    }
    assert own.keys() == saved["own"].keys()
    for name, tensor in own.items():  # as a training that was interrupted then is taken up
        assert shard_like(student.get_parameter(name), tensor).shape == student.get_parameter(name).shape
    again = student_of_every_kind()
    again.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in own.items()}, strict=False)
    again.load_state_dict(own, strict=False)
    assert torch.equal(predict(again), predict(student))


@pytest.mark.parametrize(
    ("make", "unit"), [(tiny_unet, "mid_block"), (tiny_transformer, "transformer_blocks.1.ff")], ids=["unet", "pixart"]
)
def test_an_average_of_its_weights_is_saved_and_loaded(make, unit, tmp_path):
    original = make()
    student = build_student(original, PruningPlan.for_unet(original, [{"edit": "remove", "unit": unit}]))
    average = EMAModel(student.parameters(), decay=0.5, model_cls=type(student), model_config=student.config)
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, type(student))
    assert again.decay == 0.5
    assert all(map(torch.equal, again.shadow_params, average.shadow_params))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("kind", ["linear", "diagonal", "bias"])
def test_a_map_computes_what_its_formula_says(kind, tokens):
    x = torch.randn(2, 9, 6) if tokens else torch.randn(2, 6, 3, 3)
    layer = projection_of(kind, 6, tokens=tokens)
    assert torch.equal(layer(x), torch.zeros_like(x) if tokens else x)
    nn.init.normal_(layer.bias)
    bias = layer.bias if tokens else layer.bias[:, None, None]
    if kind == "bias":
        expected = bias.expand_as(x) if tokens else x + bias
    else:
        nn.init.normal_(layer.weight)
        weight = layer.weight.view(6, 6) if kind == "linear" else layer.weight.view(6)
        if kind == "diagonal":
            expected = x * (weight if tokens else weight[:, None, None]) + bias
        else:
            expected = F.linear(x, weight, layer.bias) if tokens else F.conv2d(x, weight[..., None, None], layer.bias)
    assert torch.equal(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == {"linear": 42, "diagonal": 12, "bias": 6}[kind]


# -- by type ---------------------------------------------------------------------------------------------


def test_every_parameter_is_held_by_a_layer_that_tools_know(student):
    known = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
    holders = [module for module in student.modules() if next(module.parameters(recurse=False), None) is not None]
    assert all(isinstance(module, known) for module in holders)
    assert all(isinstance(m.weight, torch.Tensor) for m in student.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def test_layerwise_casting_stores_all_layers_in_8_bits(student):
    before = predict(student)
    student.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    whole = [name for name, parameter in student.named_parameters() if parameter.dtype == torch.float32]
    assert all("norm" in name for name in whole)
    assert 0 < (predict(student) - before).abs().max() < 0.3 * before.abs().max()


@pytest.mark.parametrize(
    "settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(student, settings):
    before, cpu = predict(student), torch.device("cpu")
    apply_group_offloading(student, onload_device=cpu, offload_device=cpu, **settings)
    assert torch.equal(predict(student), before)


def test_linear_layers_can_be_replaced_by_stock_ones(student):
    before = predict(student)
    for name, module in list(student.named_modules()):
        if isinstance(module, nn.Linear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.load_state_dict(module.state_dict())
            student.set_submodule(name, plain)
    assert torch.equal(predict(student), before)


def test_a_bank_that_a_tool_replaces_by_its_own_convolution_is_missed(student):
    own = student.get_submodule(BANK)
    plain = nn.Conv2d(own.in_channels, own.out_channels, own.kernel_size, padding=own.padding)
    student.set_submodule(BANK, plain)  # as quanto does with every nn.Conv2d
    with pytest.raises(AsdmError, match=r"^conv2: a Conv2d is in the place of a CondConv2d, .* leave layers of this"):
        predict(student)


def test_quantised_weights_of_a_map_are_loaded_as_they_are():
    class Quantised:
        shape = torch.Size([6, 6])

        def numel(self):
            return 36

        def view(self, *_):
            raise NotImplementedError

    tensor = Quantised()
    tensors = {"ff.weight": tensor}
    reshape_saved({"ff": projection_of("linear", 6, tokens=True)}, tensors)
    assert tensors == {"ff.weight": tensor}


def test_regional_attention_compiles_without_graph_breaks(student):
    transformer = student.down_blocks[0].attentions[0]
    inputs = torch.randn(2, 32, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        compiled = torch.compile(transformer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*inputs, return_dict=False)[0], transformer(*inputs, return_dict=False)[0])


# -- LoRA on banks and maps ------------------------------------------------------------------------------


def with_lora(student, seed=1, **config):
    student.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def test_a_lora_on_a_bank_adds_to_what_the_mixed_kernel_gives(student):
    module, x, temb = student.get_submodule(BANK), torch.randn(2, 32, 5, 5), torch.randn(2, 128)
    before = module(x, temb)
    with_lora(student, target_modules=["conv1", "conv2"])
    layer = student.get_submodule(BANK)
    delta = F.conv2d(x, layer.get_delta_weight("default"), padding=1)
    assert torch.allclose(layer(x, temb=temb), before + delta, atol=1e-5)


def test_a_lora_on_all_layers_is_trained(student):
    targets = ["conv1", "conv2", "conv_shortcut", "to_q", "mid_block.compensation", "time_compensation"]
    with_lora(student.train(), target_modules=targets).enable_gradient_checkpointing()
    student(**unet_inputs(student)).sample.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == ("lora_" in name), name


@pytest.fixture
def softmax_banks():
    return student_of_every_kind(without="sigmoid")


def test_a_lora_is_fused_into_a_bank_and_out_of_it(softmax_banks, tmp_path):
    student = softmax_banks
    plain = predict(student)
    lora = predict(with_lora(student, target_modules=["conv1", "conv2", "to_q", "mid_block.compensation"]))
    assert not torch.allclose(lora, plain, atol=1e-2)
    student.fuse_lora()
    assert torch.allclose(predict(student), lora, atol=1e-4)
    student.unfuse_lora()
    assert torch.allclose(predict(student), lora, atol=1e-4)
    student.fuse_lora()
    student.unload_lora()
    assert torch.allclose(predict(student), lora, atol=1e-4)
    student.save_pretrained(tmp_path)
    assert torch.equal(predict(AsdmUNet2DConditionModel.from_pretrained(tmp_path)), predict(student))
    with_lora(student, target_modules=["conv2"])  # another one afterwards
    assert not torch.allclose(predict(student), lora, atol=1e-2)


def test_what_cannot_be_fused_into_a_bank_is_said(student, softmax_banks):
    with_lora(student, target_modules=["conv2"])  # one of its banks is mixed by sigmoid
    before = predict(student)
    with pytest.raises(AsdmError, match=r"up_blocks.*conv2: expert kernels mixed by sigmoid .* cannot be fused"):
        student.fuse_lora()
    with pytest.warns(UserWarning, match="Already unmerged"):
        student.unfuse_lora()
    assert torch.equal(predict(student), before)
    softmax_banks.add_adapter(peft.LoraConfig(r=4, target_modules=["conv2"], use_dora=True))
    predict(softmax_banks)
    with pytest.raises(AsdmError, match="cannot be fused"):
        softmax_banks.fuse_lora()


def test_a_lora_merged_by_other_ways_is_refused(softmax_banks):
    student = with_lora(softmax_banks, target_modules=["conv2"])
    lora = predict(student)
    student.get_submodule(BANK).merge()
    with pytest.raises(AsdmError, match=r"a LoRA \(default\) was merged into a convolution's own kernel, .* fuse_lora"):
        predict(student)
    with pytest.raises(AsdmError, match="fuse_lora"):
        copy.deepcopy(student).unload_lora()  # what was merged would be forgotten
    student.get_submodule(BANK).unmerge()
    assert torch.allclose(predict(student), lora, atol=1e-4)


def test_a_merged_lora_that_is_disabled_leaves_the_experts_too(softmax_banks):
    student = softmax_banks
    plain = predict(student)
    lora = predict(with_lora(student, target_modules=["conv2"]))
    student.fuse_lora()
    student.disable_lora()
    for each in (student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.allclose(predict(each), plain, atol=1e-4)  # peft unmerges in this call
    student.enable_lora()
    assert torch.allclose(predict(student), lora, atol=1e-4)


# -- nothing is told to a module between calls -----------------------------------------------------------


def test_calls_of_several_threads_do_not_meet(student):
    calls = [unet_inputs(student, batch, size) for batch, size in ((1, 8), (2, 16), (3, 8))]
    calls += [{**call, "timestep": call["timestep"].expand(len(call["sample"])).contiguous()} for call in calls]
    expected = [predict(student, **call) for call in calls]
    wrong = []

    def run(first):
        for turn in range(8):
            index = (turn + first) % len(calls)
            try:
                assert torch.equal(predict(student, **calls[index]), expected[index])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_checkpointing_recomputes_each_call_as_it_was():
    gradients = []
    for checkpointing in (False, True):
        student = student_of_every_kind().train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        first, second = unet_inputs(student, 2, 8), unet_inputs(student, 3, 16)
        second["timestep"] = torch.tensor([1, 500, 900])
        loss = student(**first).sample.square().mean() + student(**second).sample.square().mean()
        predict(student, **{**unet_inputs(student, 1, 24), "timestep": 5})
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, atol=1e-6), name


def test_modules_remember_nothing_of_a_call(student):
    def attributes():
        return {
            name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in student.named_modules()
        }

    before = attributes()
    predict(student, **unet_inputs(student, 3, 16))
    assert attributes() == before


def test_any_batch_goes_through_a_traced_graph(student):
    inputs = unet_inputs(student)
    shapes = {name: {0: torch.export.Dim.AUTO} if value.ndim else {} for name, value in inputs.items()}
    program = torch.export.export(
        student,
        (),
        kwargs={**inputs, "return_dict": False},
        dynamic_shapes={**shapes, "return_dict": None},
        strict=False,  # the default of newer torch
    ).module()
    for batch in (1, 3):
        call = unet_inputs(student, batch)
        assert torch.allclose(program(**call, return_dict=False)[0], predict(student, **call), atol=1e-4)


def test_a_bank_routed_by_time_is_mixed_once_for_one_time_step(student):
    banks = [module for module in student.modules() if isinstance(module, CondConv2d) and module.router_kind == "time"]
    rows = []
    for bank in banks:
        bank.router.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    inputs = unet_inputs(student, batch=3)
    for timestep in (7, 7.5, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])):
        predict(student, **{**inputs, "timestep": timestep})
    assert rows == [1, 1, 1, 1, 3]


def test_a_removed_branch_puts_out_as_many_tokens_as_come_in():
    unet = tiny_unet(**saved_by_0_1()["unet"])
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": f"{OUTER}.attn1"}])
    tokens = torch.randn(2, 9, 32)  # what token merging takes apart again
    assert torch.equal(build_student(unet, plan).get_submodule(f"{OUTER}.attn1")(tokens), torch.zeros_like(tokens))


def test_merged_tokens_are_refused_by_regional_attention(student):
    attention = student.get_submodule(f"{OUTER}.attn1")
    attention.register_forward_pre_hook(lambda _module, args: (args[0][:, ::2],))  # as token merging does
    with pytest.raises(AsdmError, match=r"gri_attention: 32 tokens of a map of 8x8; .*tomesd"):
        predict(student)
