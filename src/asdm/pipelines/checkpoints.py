"""What a checkpoint says of itself: what its UNet predicts, whether its noise schedule ends at pure noise (zero
terminal SNR), and what kind of model it is.

Only names, shapes and metadata of files are read, and configs beside them. No weights are loaded.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, SchedulerMixin
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from torch import Tensor

from asdm.choices import PredictionType
from asdm.errors import AsdmError, one_line
from asdm.pipelines.untrusted import require_plausible
from asdm.reading import parse_json, parse_yaml

_SPELLINGS: dict[str, PredictionType] = {
    "epsilon": "epsilon", "eps": "epsilon", "noise": "epsilon",
    "v_prediction": "v_prediction", "v": "v_prediction", "v_pred": "v_prediction", "velocity": "v_prediction",
    "sample": "sample", "x0": "sample", "x_start": "sample", "original_sample": "sample",
}  # fmt: skip
# Of modelspec.architecture, where it says what is predicted.
_ARCHITECTURES: dict[str, PredictionType] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-inpainting": "epsilon",
}
_SCALINGS: dict[str, PredictionType] = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # of SDXL's own code
_ZERO_SNR = ("rescale_betas_zero_snr", "zero_terminal_snr", "zero_snr", "ztsnr", "zsnr")
_STEPS_OF_SD2_BASE = 875_000  # of the one SD 2.x checkpoint that is known by them, and predicts noise
SD_KINDS = ("v1", "v2", "inpainting", "inpainting_v2", "xl_base", "xl_inpaint", "playground-v2-5")
KIND_NAMES = {
    "v1": "SD 1.x", "inpainting": "SD 1.x for inpainting", "inpainting_v2": "SD 2.x for inpainting",
    "v2": "SD 2.x, whose 512-base predicts epsilon", "xl_base": "SDXL", "xl_inpaint": "SDXL for inpainting",
    "upscale": "the upscaler", "instruct-pix2pix": "InstructPix2Pix",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes (as tensors without data) and the metadata of a safetensors file."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> Header:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: torch.empty(each.get_shape(), dtype=_DTYPES.get(each.get_dtype(), torch.uint8), device="meta")
                for name, each in slices.items()
            }
            return cls(path, tensors, file.metadata() or {})

    def marker(self, name: str) -> str | None:
        """Return the tensor of this name, wherever in the checkpoint it is."""
        return next((each for each in self.tensors if each == name or each.endswith(f".{name}")), None)

    def number(self, name: str) -> float | None:
        """Return the value of the tensor of this name, where it has one."""
        found = self.marker(name)
        if found is None or self.tensors[found].numel() != 1:
            return None
        with safe_open(self.path, "pt") as file:
            return float(file.get_tensor(found))


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What one source says of a checkpoint; None where it says nothing.

    `source` is its name for messages; `scheduler` a whole config of a diffusers scheduler, or parts of one.
    """

    source: str
    prediction_type: str | None = None  # as it is written there
    zero_snr: bool | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.prediction_type is not None or self.zero_snr is not None or bool(self.scheduler)


@dataclass(frozen=True)
class Parameterization:
    """What all sources together say: the strongest decides. `remarks` are for the user.

    `source` is where the fields of the scheduler stand.
    """

    prediction_type: PredictionType | None
    zero_snr: bool | None
    scheduler: dict[str, Any]
    remarks: list[str]
    source: str = "its own config"


def as_prediction_type(value: Any, source: str) -> PredictionType:
    """Read a prediction type in any of its spellings.

    Raises:
        AsdmError: no such prediction type.
    """
    found = _SPELLINGS.get(_plain(value))
    if found is None:
        raise AsdmError(
            f"{source}: prediction type {value!r} is not known; it is {', '.join(get_args(PredictionType))} "
            "(prediction_type, --prediction-type)"
        )
    return found


def kind_of(header: Header) -> str:
    """Find the kind of a checkpoint in one file, by diffusers' names (`SD_KINDS` and others).

    SDXL, SD 2.x and inpainting are also found where the tensor is missing by which diffusers knows them.
    """
    try:
        kind: str = infer_diffusers_model_type(header.tensors)
    except (RuntimeError, LookupError, UnboundLocalError):  # it looks into tensors of some, and knows not all
        return "another kind"
    if kind != "v1" and kind != "inpainting":
        return kind
    names = header.tensors
    first = names.get("model.diffusion_model.input_blocks.0.0.weight")
    inpaints = first is not None and first.ndim == 4 and first.shape[1] == 9
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        return "xl_inpaint" if inpaints else "xl_base"
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        return "xl_refiner"
    if any(name.endswith("attn2.to_k.weight") and tensor.shape[-1] == 1024 for name, tensor in names.items()):
        return "inpainting_v2" if inpaints else "v2"
    return kind


def claims_of(header: Header, kind: str) -> list[Claim]:
    """Read what a checkpoint in one file and the configs beside it say.

    The strongest comes first: a config of the file's name, its marker tensors, its metadata, the folder's config, its
    number of training steps.

    Raises:
        AsdmError: a config is damaged, or a prediction type not known.
    """
    path = header.path
    named = [path.with_suffix(suffix) for suffix in (".yaml", ".yml", ".json")]
    shared = [path.parent / "scheduler_config.json", path.parent / "scheduler" / "scheduler_config.json"]
    of_name, of_folder = ([claim_of_config(each) for each in paths if each.is_file()] for paths in (named, shared))
    claims = (*of_name, *claims_of_tensors(header), *of_folder, _by_steps(header, kind))
    return [claim for claim in claims if claim]


def claims_of_tensors(header: Header) -> list[Claim]:
    """Read what marker tensors and the metadata of a file say."""
    return [claim for claim in (_by_markers(header), *_by_metadata(header)) if claim]


def claim_of_scheduler(scheduler: Any) -> Claim:
    """Read what the scheduler of a pipeline says that was loaded from a folder."""
    claim = _claim_of(scheduler.config, type(scheduler).__name__)
    is_default = "prediction_type" in scheduler.config.get("_use_default_values", ())
    return replace(claim, prediction_type=None) if is_default else claim


def claim_of_config(path: Path) -> Claim:
    """Read a config: a diffusers scheduler's (.json), or a training's in the original code's layout (.yaml).

    Raises:
        AsdmError: it is neither YAML nor JSON.
    """
    try:
        text = path.read_text("utf-8")
        content = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except (ValueError, OSError) as error:
        raise AsdmError(f"{path}: not a config ({one_line(error)}); correct it, or remove it") from None
    return _claim_of(content, str(path)) if isinstance(content, dict) else Claim(str(path))


def claim_of(config: str | Path) -> Claim:
    """Read the config that a user names: a file, a folder (a pipeline's, or a scheduler's), or a Hub id.

    Raises:
        AsdmError: there is none there, or it says nothing of what a UNet predicts.
    """
    path = Path(config)
    if path.is_dir():
        candidates = [path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"]
        claim = next((claim_of_config(each) for each in candidates if each.is_file()), None)
    elif path.is_file():
        claim = claim_of_config(path)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of one library about another's arguments
                claim = _claim_of(DDIMScheduler.load_config(str(config), subfolder="scheduler"), str(config))
        except (OSError, ValueError) as error:
            raise AsdmError(
                f"config {config}: no such folder or file, and not found on the Hub ({one_line(error)})"
            ) from None
    if not claim:
        raise AsdmError(
            f"config {config}: says nothing of what a UNet predicts; name a pipeline's folder or Hub id, a "
            "scheduler_config.json, or a .yaml of the original code"
        )
    return claim


def settled(claims: Sequence[Claim], given: PredictionType | None, name: str) -> Parameterization:
    """Combine claims, the strongest first. The user's own statement, `given`, overrides them.

    Raises:
        AsdmError: the one that decides names no prediction type; `name` is the checkpoint's in the message.
    """
    remarks = [*_contradictions(claims, "prediction_type")] if given is None else []
    remarks += _contradictions(claims, "zero_snr", "zero terminal SNR ")
    deciding = next((each for each in claims if each.prediction_type), None)
    prediction = given
    if given is None and deciding is not None:
        prediction = as_prediction_type(deciding.prediction_type, f"{name}, {deciding.source}")
    zero_snr = next((each.zero_snr for each in claims if each.zero_snr is not None), None)
    if zero_snr and prediction is None:
        prediction = "v_prediction"
        remarks.append(
            "says that its noise schedule ends at zero SNR, and not what it predicts; assumed v_prediction, as to "
            "predict noise has no meaning there"
        )
    if zero_snr and prediction == "epsilon":
        zero_snr = False
        remarks.append("a noise schedule that ends at zero SNR is left out, as to predict noise has no meaning there")
    of_scheduler = next((each for each in claims if each.scheduler), None)
    if of_scheduler is None:
        return Parameterization(prediction, zero_snr, {}, remarks)
    return Parameterization(prediction, zero_snr, of_scheduler.scheduler, remarks, of_scheduler.source)


def scheduler_for(scheduler: Any, said: Parameterization) -> Any:
    """Make a scheduler that samples as was said, of the same class where that class can.

    Raises:
        AsdmError: a field of its config has a value of which no scheduler can be made.
    """
    if type(scheduler).__name__.startswith("EDM") and not said.scheduler:
        return scheduler.from_config(scheduler.config, **_without_none(prediction_type=said.prediction_type))
    named = said.scheduler.get("_class_name")
    kind: Any = type(scheduler) if named is None else getattr(diffusers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise AsdmError(f"scheduler {named}: not one of diffusers'")
    config = dict(said.scheduler) if named else {**scheduler.config, **said.scheduler}
    changes = _without_none(prediction_type=said.prediction_type, rescale_betas_zero_snr=said.zero_snr)
    if said.zero_snr and not said.scheduler.get("rescale_betas_zero_snr"):
        changes["timestep_spacing"] = "trailing"  # the first step is that of pure noise (arXiv 2305.08891, Sec. 3.3)
    unable = said.zero_snr and not takes_zero_snr(kind)
    if unable or (said.prediction_type == "sample" and not predicts_samples(kind)):
        kind = DDIMScheduler
        changes |= {"clip_sample": False, "set_alpha_to_one": config.get("set_alpha_to_one", False)}
    require_plausible(config, said.source)
    try:
        return kind.from_config(config, **changes)
    except Exception as error:  # of diffusers, any kind
        raise AsdmError(
            f"{said.source}: no {kind.__name__} can be made of it ({type(error).__name__}: {one_line(error, 100)}); "
            "correct it, or remove it"
        ) from None


def takes_zero_snr(kind: type) -> bool:
    """Return whether a class of schedulers can end at zero SNR. Others ignore the config's field."""
    return "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def edm_scheduler(header: Header) -> Any | None:
    """Return the sampler of a checkpoint with EDM's noise levels (CosXL's marker tensors); None for all others."""
    most, least = header.number("edm_vpred.sigma_max"), header.number("edm_vpred.sigma_min")
    if most is None:
        return None
    return EDMEulerScheduler(
        sigma_min=0.002 if least is None else least,
        sigma_max=most,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )


def predicts_samples(kind: type) -> bool:
    """Return whether a class of schedulers takes predictions of the image itself."""
    return not any(name in kind.__name__ for name in ("PNDM", "Euler", "LMS", "Heun", "KDPM2"))


def _plain(value: Any) -> str:
    return str(value).lower().replace("-", "_")


def _spelt(value: Any) -> str:
    """As diffusers spells it, where it is known."""
    return _SPELLINGS.get(_plain(value), str(value))


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _contradictions(claims: Sequence[Claim], name: str, what: str = "") -> Iterator[str]:
    said = [(claim.source, getattr(claim, name)) for claim in claims if getattr(claim, name) is not None]
    other = next((each for each in said if each[1] != said[0][1]), None)
    if other is not None:
        yield f"{said[0][0]} says {what}{said[0][1]}, {other[0]} {other[1]}; the former counts"


def _by_markers(header: Header) -> Claim:
    predicts, ends = header.marker("v_pred"), header.marker("ztsnr")
    if header.marker("edm_mean") or header.marker("edm_vpred.sigma_max"):
        return Claim("")  # `edm_scheduler` reads these
    source = " and ".join(name for name in (predicts, ends) if name)
    return Claim(f"the tensor {source}", "v_prediction" if predicts else None, True if ends else None)


def _by_metadata(header: Header) -> Iterator[Claim]:
    about = header.metadata
    for name in ("modelspec.prediction_type", "prediction_type"):
        if about.get(name):
            yield Claim(f"its metadata ({name})", _spelt(about[name]))
    if (trained := _truth(about.get("ss_v_parameterization"))) is not None:
        yield Claim("its metadata (ss_v_parameterization)", "v_prediction" if trained else "epsilon")
    architecture = about.get("modelspec.architecture", "").split("/")[0]
    if architecture in _ARCHITECTURES:
        yield Claim("its metadata (modelspec.architecture)", _ARCHITECTURES[architecture])
    for name in ("ss_zero_terminal_snr", *_ZERO_SNR):
        if (ends := _truth(about.get(name))) is not None:
            yield Claim(f"its metadata ({name})", zero_snr=ends)


def _by_steps(header: Header, kind: str | None) -> Claim:
    steps = header.number("global_step") or header.metadata.get("global_step")
    is_base = kind == "v2" and str(steps).removesuffix(".0") == str(_STEPS_OF_SD2_BASE)
    return Claim(f"its {_STEPS_OF_SD2_BASE} steps of training", "epsilon" if is_base else None)


def _claim_of(content: Mapping[str, Any], source: str) -> Claim:
    """Return what a config says: a diffusers scheduler's, or one of the original code, or of SDXL's."""
    if "prediction_type" in content or str(content.get("_class_name", "")).endswith("Scheduler"):
        prediction = _spelt(content.get("prediction_type", "epsilon"))
        return Claim(source, prediction, _zero_snr_of(content), dict(content) if "_class_name" in content else {})
    model = content.get("model")
    params = model.get("params") if isinstance(model, dict) else content
    if not isinstance(params, dict):
        return Claim(source)
    zero_snr = _zero_snr_of(params)
    names = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
    schedule = {ours: params[theirs] for theirs, ours in names.items() if theirs in params}
    if "parameterization" in params:
        return Claim(source, _spelt(params["parameterization"]), zero_snr, schedule)
    if "linear_start" in params:  # as the original code takes it
        return Claim(source, "epsilon", zero_snr, schedule)
    found = [_SCALINGS[name] for name in _targets(params) if name in _SCALINGS]
    return Claim(source, found[0] if found else None, zero_snr)


def _zero_snr_of(content: Mapping[str, Any]) -> bool | None:
    return next((bool(content[name]) for name in _ZERO_SNR if content.get(name) is not None), None)


def _targets(content: Any) -> Iterator[str]:
    """Yield names of the classes that a config of SDXL's code names, at any depth."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name == "target" and isinstance(value, str):
                yield value.rpartition(".")[2]
            yield from _targets(value)


def _truth(value: str | None) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
