"""Muon: its matrices, and its steps beside torch's own optimisers; AdamW of 8 bits beside AdamW."""

import sys

import pytest
import torch
from torch import nn

from asdm import AsdmError
from asdm.edits.projections import projection_of
from asdm.training.optimizers import Muon, make_optimizer, orthogonalized


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 8, 8)])
def test_singular_values_are_pushed_to_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    along = torch.einsum("bji,bjk,bik->bi", left, orthogonalized(matrices), right)
    assert torch.allclose(along, values.new_tensor(1.0), atol=0.7) and (along > 0).all()


def test_no_gradient_gives_no_step():
    matrix = nn.Parameter(torch.ones(4, 4))
    matrix.grad = torch.zeros(4, 4)
    Muon([{"params": [matrix], "muon": True}], lr=0.1).step()
    assert torch.equal(matrix, torch.ones(4, 4))


def test_matrices_step_as_torchs_muon_and_vectors_as_its_adamw():
    generator = torch.Generator().manual_seed(0)

    def parameters():
        return nn.Parameter(torch.ones(12, 20)), nn.Parameter(torch.ones(12))

    ours, theirs = parameters(), parameters()
    muon = make_optimizer(dict(zip(["w", "b"], ours, strict=True)), "muon", 0.05, (0.9, 0.99), 0.1, {})
    reference = (
        torch.optim.Muon([theirs[0]], lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs[1]], lr=0.05, betas=(0.9, 0.99), weight_decay=0.0),
    )
    for _ in range(3):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=generator)
            their.grad = our.grad.clone()
        muon.step()
        for optimizer in reference:
            optimizer.step()
    moved = (ours[0] - 1).norm()
    assert (ours[0] - theirs[0]).norm() < 0.02 * moved  # theirs iterates in bfloat16
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)


def test_a_kernel_steps_as_its_matrix():
    kernel, matrix = nn.Parameter(torch.zeros(6, 4, 3, 3)), nn.Parameter(torch.zeros(6, 36))
    kernel.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    matrix.grad = kernel.grad.flatten(1).clone()
    for parameter in (kernel, matrix):
        Muon([{"params": [parameter], "muon": True}], lr=0.1).step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_factors_slow_down_the_weights_they_name():
    weights = {"a.weight": nn.Parameter(torch.ones(4, 4)), "b.weight": nn.Parameter(torch.ones(4, 4))}
    optimizer = make_optimizer(weights, "adamw", 0.1, (0.9, 0.99), 0.0, {"a.": 0.5})
    factors = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    assert factors == {id(weights["a.weight"]): 0.5, id(weights["b.weight"]): 1.0}


def test_moments_of_8_bits_take_a_quarter_of_the_memory_and_step_as_adamw_does():
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(128, 96, generator=generator)
    moved, moments = [], []
    target = torch.randn(128, 96, generator=generator)
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(start.clone())
        optimizer = make_optimizer({"w": weight}, name, 0.01, (0.9, 0.99), 0.1, {})
        for _ in range(20):
            (weight - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(weight.detach() - start)
        moments.append(sum(t.nbytes for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor)))
    assert (moved[0] - moved[1]).norm() < 0.05 * moved[0].norm()
    assert moments[1] < 0.28 * moments[0]  # and the scales of their blocks, and two tables


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(AsdmError, match=r"optimizer=adamw8bit: bitsandbytes.* not installed.*asdm-diffusion\[8bit\]"):
        make_optimizer({"w": nn.Parameter(torch.ones(4, 4))}, "adamw8bit", 0.1, (0.9, 0.99), 0.0, {})


def test_scales_of_channels_are_no_matrices():
    """Neither decayed nor made orthogonal, though a depthwise 1x1 convolution holds them."""
    weights = {"map": projection_of("diagonal", 4).weight, "kernel": projection_of("linear", 4).weight}
    groups = make_optimizer(weights, "muon", 0.05, (0.9, 0.99), 0.1, {}).param_groups
    assert {tuple(group["params"][0].shape): (group["muon"], group["weight_decay"]) for group in groups} == {
        (4, 1, 1, 1): (False, 0.0),
        (4, 4, 1, 1): (True, 0.1),
    }
