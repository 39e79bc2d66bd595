"""What a checkpoint says of itself: what its UNet predicts, and whether its noise schedule ends at pure noise (zero
terminal SNR).

Only names, shapes and metadata of files are read, and configs beside them. No weights are loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from diffusers import DDIMScheduler

from asdm.choices import PredictionType
from asdm.errors import AsdmError, one_line, shown
from asdm.pipelines.headers import Header
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
class CheckpointFacts:
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
            f"{source}: prediction type {shown(value)} is not known; it is {', '.join(get_args(PredictionType))} "
            "(prediction_type, --prediction-type)"
        )
    return found


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
        text = path.read_text("utf-8-sig")
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


def settled(claims: Sequence[Claim], given: PredictionType | None, name: str) -> CheckpointFacts:
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
        return CheckpointFacts(prediction, zero_snr, {}, remarks)
    return CheckpointFacts(prediction, zero_snr, of_scheduler.scheduler, remarks, of_scheduler.source)


def _plain(value: Any) -> str:
    return str(value).lower().replace("-", "_")


def _spelt(value: Any) -> str:
    """As diffusers spells it, where it is known."""
    return _SPELLINGS.get(_plain(value), str(value))


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
