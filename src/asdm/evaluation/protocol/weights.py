"""Where the weights of feature extractors are: a folder of the user's, the libraries' caches, or a download.

Nothing is loaded here. What is missing is named before any image is generated.
"""

from __future__ import annotations

import hashlib
import re
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download

from asdm.errors import AsdmError, needs_extra, one_line
from asdm.evaluation.protocol.metrics import JUDGE, Role
from asdm.pipelines.names import looks_like_path
from asdm.pipelines.transformers_models import require_safe_weights

_WEIGHTS = "model*.safetensors"  # in transformers' layout
_CONVERT = "convert it once, by save_pretrained of transformers, and name that folder (METRIC=FOLDER, --weights)"
_CONFIGS = ("config.json", "preprocessor_config.json")


@contextmanager
def metrics_extra(package: str, what: str) -> Iterator[None]:
    """Import in the block what the extra `metrics` brings; where it is missing or broken, say so.

    Args:
        package: what is imported from; torchmetrics names a missing one in several lines.
        what: the metrics that need it.
    """
    try:
        with needs_extra("metrics", what):
            import_module(package)
            yield
    except RuntimeError as error:  # of a torchvision that was compiled for another torch
        told = f"{what}: torchvision does not fit torch {torch.__version__} ({one_line(error, 80)})"
        raise AsdmError(f"{told}; install the version that does") from None


def _inception_url() -> str:
    with metrics_extra("torch_fidelity", "FID, IS and KID by Inception-v3"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    return str(URL_INCEPTION_V3)


def _alexnet_url() -> str:
    with metrics_extra("torchvision", "LPIPS"):
        from torchvision.models import AlexNet_Weights
    return str(AlexNet_Weights.DEFAULT.url)


@dataclass(frozen=True)
class Source:
    """The network of a role: a file of weights with its address, or a folder of transformers with its Hub id.

    `kind` says which class extracts the features. "judge" and "own-clip" need no weights from elsewhere.
    """

    kind: Literal["inception", "clip", "dinov2", "lpips", "judge", "own-clip"]
    title: str
    hub_id: str = ""
    url: Callable[[], str] | None = None

    @property
    def is_own(self) -> bool:
        """Whether it needs no weights from elsewhere."""
        return self.kind in ("judge", "own-clip")

    @property
    def name(self) -> str:
        """Return what the file or folder is called in the folder of weights."""
        return self.hub_id.rpartition("/")[2] if self.url is None else self.url().rpartition("/")[2]


SOURCES: Mapping[Role, Source] = {
    "inception": Source("inception", "Inception-v3 of the original FID", url=_inception_url),
    "clip": Source("clip", "CLIP ViT-g/14", "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    "cmmd": Source("clip", "CLIP ViT-L/14 at 336 px", "openai/clip-vit-large-patch14-336"),
    "dinov2": Source("dinov2", "DINOv2 ViT-L/14", "facebook/dinov2-large"),
    "lpips": Source("lpips", "AlexNet with LPIPS's weights", url=_alexnet_url),
    "pickscore": Source("clip", "PickScore v1", "yuvalkirstain/PickScore_v1"),
    "hpsv2": Source("clip", "HPSv2 as a CLIPModel", "adams-story/HPSv2-hf"),
}
DEMO_SOURCES: Mapping[Role, Source] = {
    **SOURCES,
    "inception": Source("judge", JUDGE),
    "clip": Source("own-clip", "the first model's own CLIP"),
    "cmmd": Source("own-clip", "the first model's own CLIP"),
}


def find_weights(source: Source, where: str | None, folder: Path | None) -> Path:
    """Return the file or folder of a source's weights; it is downloaded if it is not here.

    Args:
        where: a file, a folder or a Hub id in the place of the source's own.
        folder: the user's folder of weights; it is looked at first.

    Raises:
        AsdmError: the weights are nowhere and cannot be downloaded, or they are damaged.
    """
    if source.url is not None:
        return _find_file(source, where, folder)
    if where is not None and (looks_like_path(where) or Path(where).is_dir()):
        _require_folder(Path(where), source)
        return Path(where)
    hub_id = where or source.hub_id
    name = hub_id.rpartition("/")[2]
    if folder is not None and (folder / name).is_dir():
        _require_folder(folder / name, source)
        return folder / name
    return _download_folder(hub_id, source, folder)


def _find_file(source: Source, where: str | None, folder: Path | None) -> Path:
    places = [] if where is None else [Path(where)]
    places += [] if folder is None else [folder / source.name]
    places += [Path(torch.hub.get_dir()) / "checkpoints" / source.name]
    if where is not None and not places[0].is_file():
        raise AsdmError(f"{where}: no such file; {source.title} is {source.name}")
    found = next((place for place in places if place.is_file()), places[-1])
    if not found.is_file():
        assert source.url is not None
        try:
            found.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source.url(), str(found), progress=False)
        except (OSError, urllib.error.URLError) as error:
            raise _missing(source.name, source, folder, error) from None
    _require_whole(found)
    return found


def _require_whole(path: Path) -> None:
    """
    Raises:
        AsdmError: the file's content is not what its name says by the first digits of its SHA-256, or it holds more
            than tensors. torch-fidelity and torchvision would run what a pickle holds.
    """
    wanted = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if wanted is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        if found != wanted[1]:
            raise AsdmError(f"{path}: damaged (its SHA-256 begins with {found}, not {wanted[1]}); download it again")
    try:
        torch.load(path, weights_only=True, map_location="meta")
    except Exception as error:  # of pickle and zip, many kinds
        raise AsdmError(f"{path}: not a file of weights ({one_line(error)}); download it again") from None


def _download_folder(hub_id: str, source: Source, folder: Path | None) -> Path:
    try:
        found = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", _WEIGHTS]))
    except (OSError, ValueError) as error:
        raise _missing(hub_id.rpartition("/")[2], source, folder, error, hub_id) from None
    if not any(found.glob(_WEIGHTS)):
        raise AsdmError(f"{hub_id}: has no model.safetensors, and pickles are not read ({source.title}); {_CONVERT}")
    _require_folder(found, source)
    return found


def _require_folder(path: Path, source: Source) -> None:
    """
    Raises:
        AsdmError: a file is missing that transformers or this package reads, is damaged, or is a pickle.
    """
    missing = [name for name in _CONFIGS if not (path / name).is_file()]
    if not any(path.glob(_WEIGHTS)):
        missing.append("model.safetensors")
    if source.kind == "clip" and not ((path / "tokenizer.json").is_file() or (path / "vocab.json").is_file()):
        missing.append("tokenizer.json")
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if missing[:1] == ["model.safetensors"] and pickles:
        raise AsdmError(f"{pickles[0]}: a pickle, which is not read ({source.title}); {_CONVERT}")
    if missing:
        raise AsdmError(f"{path}: no {missing[0]} ({source.title}); put it there, or name another folder")
    require_safe_weights(path)


def _missing(name: str, source: Source, folder: Path | None, error: Exception, hub_id: str = "") -> AsdmError:
    what = f"the folder {name} (Hub id {hub_id})" if hub_id else name
    where = f"it is not in {folder}" if folder is not None else "it is not here"
    remedy = f"put it into {folder}" if folder is not None else "put it into a folder DIR and add --weights DIR"
    return AsdmError(f"{source.title} needs {what}: {where}, and a download fails ({one_line(error, 80)}); {remedy}")
