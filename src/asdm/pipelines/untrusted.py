"""What a stranger's model folder may ask for, checked before a library builds anything by it.

The libraries take a folder at its word: which classes to load, how many layers to make, how wide they are. Code in a
folder is never run, nothing is fetched by its configs, and memory and time are bounded by the size of its files.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, pipelines
from huggingface_hub import constants as hub
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModel, ImageProcessingMixin, PreTrainedModel, PreTrainedTokenizerBase

from asdm.errors import AsdmError, one_line
from asdm.families import families
from asdm.pipelines.quiet import quiet
from asdm.reading import MAX_WHOLE, read_json
from asdm.student.classes import student_class

MAX_MODULES = 20_000  # of a part; SDXL's UNet has 2,800
_MAX_WHOLE = 2**20  # of a config's numbers: widths, vocabularies, time steps
_MAX_SIDE = 512  # latents of a transformer with a table of positions; real ones have up to 256
_MAX_NAME = 64  # letters of a part's name
_LIBRARIES = ("diffusers", "transformers")
# Fields by which a config makes a library fetch or run code of others.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
_ADAPTER = "adapter_config.json"  # by which transformers takes the weights of the model that it names
_OF_TRANSFORMERS = (PreTrainedModel, PreTrainedTokenizerBase, ImageProcessingMixin)  # what parts can be
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_QUANTISED = ("quantization_config", "compression_config")


def require_safe_folder(folder: Path) -> None:
    """Raise an AsdmError where a pipeline's folder asks for code or weights of others, or holds pickles."""
    require_plain_files(folder)
    index = _read_object(folder / "model_index.json")
    _require_no_code(index, folder / "model_index.json")
    for part, kind in index.items():
        if isinstance(kind, list):
            _require_known_class(part, kind, folder)
            _require_no_pickle(folder / part)
    for config in sorted(folder.glob("*/*config.json")):
        require_safe_config(config)


def require_plain_files(folder: Path) -> None:
    """Raise an AsdmError where a folder, or one in it, has a pipe or a device, which may never end; or an adapter."""
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise AsdmError(f"{path}: a pipe or a device, not a file; remove it")
        if path.name == _ADAPTER:
            raise AsdmError(f"{path}: an adapter, whose weights and base are not loaded with a model; remove it")


def _require_no_pickle(part: Path) -> None:
    """Raise an AsdmError where the weights of a part are pickles alone."""
    suffixes = {path.suffix for path in part.glob("*")}
    if ".safetensors" not in suffixes and suffixes & set(_PICKLES):
        raise AsdmError(f"{part}: no .safetensors weights; pickles are not loaded, convert them first")


_reading = threading.Lock()
_readers, _was_offline = 0, False


@contextmanager
def without_network() -> Iterator[None]:
    """Let the libraries take nothing from the Hub while a folder is loaded in the block: its configs may name models
    there. Threads may be in such blocks at once."""
    global _readers, _was_offline
    with _reading:
        if _readers == 0:
            _was_offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
        _readers += 1
    try:
        yield
    finally:
        with _reading:
            _readers -= 1
            if _readers == 0:
                hub.HF_HUB_OFFLINE = _was_offline


@contextmanager
def bounded_modules(name: str) -> Iterator[None]:
    """Stop the building of a model in the block once it has more than `MAX_MODULES` modules.

    Raises:
        AsdmError: it has.
    """
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise AsdmError(f"{name}: its config asks for more than {MAX_MODULES} modules; download it again")

    hook = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def _require_known_class(part: str, kind: list[Any], folder: Path) -> None:
    """Raise an AsdmError unless a part's class is one of diffusers' or transformers', or a student's, and its name that
    of an argument of a pipeline."""
    if not (part.isidentifier() and part.isascii() and len(part) <= _MAX_NAME):
        raise AsdmError(f"{folder / 'model_index.json'}: {one_line(part)}: is no name of a part; download it again")
    place = f"{folder / 'model_index.json'}: {part}"
    if not _names_a_class(kind):
        return  # no part, or none that can be loaded
    library, class_name = kind
    is_student = part in [family.component for family in families()] and student_class(class_name) is not None
    of_diffusers = isinstance(getattr(pipelines, library, None), ModuleType)
    if not (library in _LIBRARIES or of_diffusers or is_student):
        raise AsdmError(f"{place} is of the library {library}; it must be of {' or '.join(_LIBRARIES)}")
    if library == "transformers" and class_name.startswith("Auto"):
        raise AsdmError(f"{place} is of the class {class_name}, which can run code; name the class itself")
    if not is_student and not _is_class_of_part(library, class_name):
        raise AsdmError(f"{place} is of the class {class_name}, which is no part of a pipeline; download it again")


def _names_a_class(kind: Any) -> bool:
    """Return whether an index's entry is the library and the class of a part."""
    return isinstance(kind, list) and len(kind) == 2 and all(isinstance(each, str) for each in kind)


def _is_class_of_part(library: str, name: str) -> bool:
    """Return whether a class can be a part: a model, a tokenizer, a processor or a scheduler; True where it is not
    known, as of newer versions. Other classes load what no check here has seen."""
    found = _named_class(library, name)
    if found is None:
        return True
    if not isinstance(found, type) or issubclass(found, DiffusionPipeline):
        return False
    return library != "transformers" or issubclass(found, _OF_TRANSFORMERS)


def _named_class(library: str, name: str) -> Any:
    """Return what a library has under a name, as diffusers looks it up for a part; None where it has nothing."""
    place: Any = {"transformers": transformers, "diffusers": diffusers}.get(library) or getattr(pipelines, library)
    return getattr(place, name, None)


def classes_of_parts(folder: Path) -> dict[str, type[nn.Module]]:
    """Return the class of each model in a pipeline's folder, which is the one that its index names: diffusers passes
    over what the model's own config says. Of parts with a config and a known class alone."""
    found = {}
    for part, kind in _read_object(folder / "model_index.json").items():
        if _names_a_class(kind):
            made = student_class(kind[1]) or _named_class(*kind)
            if isinstance(made, type) and issubclass(made, nn.Module) and (folder / part / "config.json").is_file():
                found[part] = made
    return found


def require_safe_config(path: Path) -> None:
    """Raise an AsdmError where the config of a part asks for code of others, or for more than any model has."""
    is_tokenizer = path.name == "tokenizer_config.json"  # whose longest text may be 10^30, for none
    config = _read_object(path, math.inf if is_tokenizer else MAX_WHOLE)
    _require_no_code(config, path)
    if not is_tokenizer:
        require_plausible(config, path)


def _require_no_code(config: dict[str, Any], path: Path) -> None:
    asked = next((name for name in _CODE if config.get(name)), None)
    attention = [config.get(name) for name in ("attn_implementation", "_attn_implementation")]
    if asked is not None or any("/" in str(each) for each in attention):
        raise AsdmError(
            f"{path}: asks for others' code ({asked or 'attn_implementation'}), which is not run; remove it"
        )
    quantised = next((name for name in _QUANTISED if config.get(name)), None)
    if quantised is not None:
        raise AsdmError(
            f"{path}: has a {quantised}: quantised weights, which are not read; take the checkpoint in float32, "
            "float16 or bfloat16"
        )


def require_plausible(config: dict[str, Any], path: Path | str) -> None:
    """Raise an AsdmError where a number of a config is larger than any model's."""
    for name, value in config.items():
        inside = value if isinstance(value, list) else [value]
        large = [each for each in inside if isinstance(each, int) and abs(each) > _MAX_WHOLE]
        if large:
            raise AsdmError(f"{path}: {name}={large[0]}: must be at most {_MAX_WHOLE}; download it again")
    sides = config.get("sample_size")
    if "patch_size" in config and any(isinstance(side, int) and side > _MAX_SIDE for side in _listed(sides)):
        raise AsdmError(f"{path}: sample_size={sides}: must be at most {_MAX_SIDE}; download it again")


def require_as_large_as_its_files(module: nn.Module, folder: Path) -> None:
    """Raise an AsdmError where a model without weights has many more parameters than the files of its folder hold:
    transformers would make the others at random."""
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not files:
        return
    held = sum(map(_parameters_in, files))
    made = sum(parameter.numel() for parameter in module.parameters())
    if made > 2 * held + _MAX_WHOLE:
        raise AsdmError(
            f"{folder}: its config describes {made} parameters, and its files hold {held}; download it again"
        )


def require_no_more_than_its_files(kind: type[nn.Module], folder: Path) -> None:
    """Raise an AsdmError where the config of a model of that class describes many more parameters than its files hold:
    memory would be taken for them before anything is compared."""
    module = empty_model(kind, folder)
    if module is not None:
        require_as_large_as_its_files(module, folder)


def empty_model(kind: Any, folder: Path) -> nn.Module | None:
    """Make the model of that class that a folder's config describes, without weights; None where that is not
    possible."""
    try:
        with quiet(), bounded_modules(str(folder)), without_network():
            return without_weights(kind, folder)
    except AsdmError:
        raise
    except Exception:  # of the libraries, any kind; loading says what is wrong
        return None


def without_weights(kind: Any, folder: Path) -> nn.Module:
    """Make the model of that class that a folder's config describes, without weights; for AutoModel of the class that
    the config names. Raises what the libraries raise where that is not possible."""
    made: nn.Module
    with init_empty_weights(include_buffers=True):
        if kind is AutoModel:
            made = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        elif issubclass(kind, PreTrainedModel):
            made = kind(kind.config_class.from_pretrained(folder))
        else:
            made = kind.from_config(read_json(folder / "config.json"))
    return made


def _parameters_in(path: Path) -> int:
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_object(path: Path, largest: float = MAX_WHOLE) -> dict[str, Any]:
    try:
        found = read_json(path, largest)
    except (OSError, ValueError) as error:
        raise AsdmError(f"{path}: damaged ({one_line(error)}); download it again") from None
    if not isinstance(found, dict):
        raise AsdmError(f"{path}: damaged (no object); download it again")
    return found
