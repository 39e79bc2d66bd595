"""A pytest plugin of `diffusers_tests.py`: where diffusers' own tests make a UNet2DConditionModel, they get a student.

Their modules are imported as they are; then the class that they know by that name is another one. What failed is
written down as JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    UNet2DConditionModel,
)  # before the tests put the sources of their checkout first
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer

from asdm.families.unet_structure import prompt_channels, removable_units
from asdm.student.unet import AsdmUNet2DConditionModel

KIND, RESULTS = "ASDM_TESTED_KIND", "ASDM_TEST_RESULTS"  # environment: which class, and the file to write
STOCK, OTHER_WEIGHTS = "stock", "stock, other weights"
# Packages that some tests import and none of ours needs; where one is missing, the tests that use it are skipped.
THEIR_PACKAGES = ("parameterized", "requests_mock")
Edits = list[dict[str, Any]]
_failed: dict[str, dict[str, str]] = {}
_skipped: list[str] = []
_counts: dict[str, int] = {}


def _removed(unet: UNet2DConditionModel) -> Edits:
    """Of the way up every second layer, of each other attention a branch, with all kinds of maps in their places."""
    edits: Edits = []
    branches = itertools.cycle(["ff", "attn1", "attn2"])
    maps = itertools.cycle(["linear", "diagonal", "bias", "none"])
    for unit in removable_units(unet):
        if unit.parent is None and unit.name.startswith("up_blocks") and unit.name.endswith(".1"):
            time = {"compensate_time": True} if unit.kind == "resnet" else {}
            edits.append({"edit": "remove", "unit": unit.name, "compensate": "linear", **time})
        elif unit.kind == "attention":
            branch = f"{unit.name}.transformer_blocks.0.{next(branches)}"
            edits.append({"edit": "remove", "unit": branch, "compensate": next(maps)})
    return edits


def _lean(unet: UNet2DConditionModel) -> Edits:
    """No mid block, and no innermost stage where that can go."""
    edits: Edits = [{"edit": "remove", "unit": "mid_block"}] if unet.mid_block is not None else []
    *_, outer, inner = unet.config.block_out_channels
    if outer == inner:
        edits.append({"edit": "remove", "unit": f"down_blocks.{len(unet.down_blocks) - 1}"})
    return edits


def _regional(unet: UNet2DConditionModel) -> Edits:
    """Global-regional attention in the place of each self-attention."""
    names = [unit.name for unit in removable_units(unet) if unit.kind == "self_attention"]
    return [{"edit": "gri_attention", "unit": name, "regions": 2, "pool": 2, "weighted": True} for name in names]


def _expert_kernels(unet: UNet2DConditionModel) -> Edits:
    """Give one convolution of each resnet the other one's kernel as an expert, with all kinds of routers."""
    routers = itertools.cycle(["input", "time", "input+time", "prompt", "prompt+time"])
    pairs = itertools.cycle([("conv2", "conv1"), ("conv1", "conv2")])
    resnets = [unit for unit in removable_units(unet) if unit.kind == "resnet"]
    return [
        {
            "edit": "cond_conv",
            "unit": f"{unit.name}.{conv}",
            "experts": [f"{unit.name}.{expert}"],
            "router": router if prompt_channels(unet, unit.name) else router.replace("prompt", "input"),
        }
        for unit, (conv, expert), router in zip(resnets, pairs, routers, strict=False)
    ]


def _all(unet: UNet2DConditionModel) -> Edits:
    """Return what the others do, where what was removed leaves something to do."""
    edits = _removed(unet)
    gone = tuple(f"{edit['unit']}." for edit in edits)
    return edits + [edit for edit in _regional(unet) + _expert_kernels(unet) if not f"{edit['unit']}.".startswith(gone)]


STUDENTS: dict[str, Callable[[UNet2DConditionModel], Edits]] = {
    "no edits": lambda unet: [],
    "removed": _removed,
    "lean": _lean,
    "regional": _regional,
    "expert-kernels": _expert_kernels,
    "all": _all,
}


class StockWithOtherWeights(UNet2DConditionModel):
    """Fails the tests that compare with numbers that the stock class gave for some seed."""

    @wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _randomize(self)


class Student(AsdmUNet2DConditionModel):
    """A student of random weights that has the edits of the kind under test, unless it is given others."""

    def __init__(self, edits: Any = None, **unet_config: Any):
        if edits is None:
            with torch.device("meta"):
                edits = STUDENTS[os.environ[KIND]](UNet2DConditionModel(**unet_config))
        super().__init__(edits, **unet_config)
        _randomize(self, "compensation", "expert_", "router")

    __init__.__signature__ = AsdmUNet2DConditionModel.__init__.__signature__  # type: ignore[attr-defined]


# A pipeline that was saved finds the class by its name.
StockWithOtherWeights.__name__ = UNet2DConditionModel.__name__
Student.__name__, Student.__module__ = AsdmUNet2DConditionModel.__name__, AsdmUNet2DConditionModel.__module__


def _randomize(unet: nn.Module, *names: str) -> None:
    """Move the parameters of these names, or all, from what they were made with."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in unet.named_parameters():
            if not names or any(part in name for part in names):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _tokenizer(of: str, *args: Any, **kwargs: Any) -> CLIPTokenizer:
    """Return a tokenizer with a token for each byte; the tests' own is on the Hub."""
    if not of.startswith("hf-internal-testing/"):
        return _from_pretrained(of, *args, **kwargs)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(f"{letter}</w>" for letter in alphabet)]
    return CLIPTokenizer({token: number for number, token in enumerate(tokens)}, model_max_length=77)


_from_pretrained, _load_pipeline = CLIPTokenizer.from_pretrained, DiffusionPipeline.from_pretrained.__func__


def _trusting(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Return a saved student brings its code, which diffusers runs where it is told that it may."""
    return _load_pipeline(cls, *args, **{"trust_remote_code": True, **kwargs})


def pytest_configure() -> None:
    CLIPTokenizer.from_pretrained = _tokenizer  # type: ignore[method-assign]
    if os.environ[KIND] in STUDENTS:
        DiffusionPipeline.from_pretrained = classmethod(_trusting)  # type: ignore[assignment]
    for name in THEIR_PACKAGES:
        try:
            __import__(name)
        except ImportError:
            missing: Any = ModuleType(name)
            skip = pytest.mark.skip(reason=f"needs {name}")
            missing.parameterized = missing
            missing.expand = lambda *_, skip=skip, **__: skip
            sys.modules[name] = missing


def pytest_itemcollected(item: Any) -> None:
    kind, module = os.environ[KIND], item.module
    if kind != STOCK and vars(module).get("UNet2DConditionModel") is UNet2DConditionModel:
        module.UNet2DConditionModel = StockWithOtherWeights if kind == OTHER_WEIGHTS else Student


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if call.excinfo is not None and report.failed:
        report.user_properties += [("error", call.excinfo.typename), ("message", _first_line(call.excinfo.value))]
    return report


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _failed.setdefault(
            report.nodeid, {"error": "failed", "message": report.longreprtext} | dict(report.user_properties)
        )
    if report.skipped:
        _skipped.append(report.nodeid)
    if report.when == "call" or report.outcome != "passed":
        _counts[report.outcome] = _counts.get(report.outcome, 0) + 1


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _failed[report.nodeid] = {"error": "not collected", "message": str(report.longrepr)}


def pytest_sessionfinish(session: Any) -> None:
    if not hasattr(session.config, "workerinput"):
        found = {"counts": _counts, "failed": _failed, "skipped": _skipped}
        Path(os.environ[RESULTS]).write_text(json.dumps(found), "utf-8")
