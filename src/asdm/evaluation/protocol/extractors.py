"""The networks that metrics read images by, each behind the same call: tensors of features by name.

They are the libraries' own: torch-fidelity's Inception, transformers' CLIP and DINOv2, torchmetrics' LPIPS, and the
judge. `open_extractor` makes one for a role.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import AutoModel, CLIPModel, PreTrainedModel

from asdm.errors import AsdmError
from asdm.evaluation.metrics import Judge
from asdm.evaluation.protocol.metrics import JUDGE
from asdm.evaluation.protocol.weights import Source, metrics_extra
from asdm.evaluation.real_images import image_embeds, text_embeds, tokens_of
from asdm.pipelines.clip import clip_statistics, load_clip, load_clip_tokenizer, load_tokenizer
from asdm.pipelines.damaged import refuse_damaged
from asdm.pipelines.transformers_models import load_transformers_model
from asdm.tensor_files import content_digest

FEATURES, LOGITS = "features", "logits"
LPIPS_SIDE = 32  # of the smallest images that AlexNet's layers take
DINOV2_SIDE = 224  # of the inputs in FD-DINOv2 (arXiv 2306.04675), where the model's own is 518


class Extractor(Protocol):
    """What gives features of images."""

    title: str
    identity: str  # tells its features from another's

    def images(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return tensors (images, ..) on the CPU by name, of `pixels` (images, 3, height, width), uint8."""
        ...


class TextExtractor(Extractor, Protocol):
    """What gives features of texts, too, to be compared with the images'."""

    scale: float  # of their cosine in a score

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return what the network reads of the captions."""
        ...

    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return tensors (captions, ..) on the CPU by name."""
        ...


class JudgeExtractor:
    """The judge: features and ImageNet's logits."""

    title = JUDGE

    def __init__(self, device: torch.device | str) -> None:
        self._judge = Judge(device)
        self.identity = _identity("judge", self._judge.network)

    def images(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self._judge.features(_in_range(pixels))
        return {FEATURES: features, LOGITS: self._judge.logits(features)}


class InceptionExtractor:
    """The Inception-v3 of the original FID, as torch-fidelity has it and torchmetrics calls it: 2,048 features, and the
    logits without bias that the inception score reads.

    Args:
        path: torch-fidelity's weights.
    """

    title = "Inception-v3 of the original FID"

    def __init__(self, path: Path, device: torch.device | str) -> None:
        with metrics_extra("torch_fidelity", "FID, IS and KID by Inception-v3"):
            from torchmetrics.image.fid import NoTrainInceptionV3

        with refuse_damaged(path):
            self._network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
        self._device = device
        self.identity = _identity("inception", self._network)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self._network(pixels.to(self._device))
        logits = features.mm(self._network.fc.weight.T)
        return {FEATURES: features.cpu(), LOGITS: logits.cpu()}


class ClipExtractor:
    """A CLIPModel: normalised embeddings of images and of texts. Preference models of CLIP's architecture are such."""

    def __init__(self, clip: CLIPModel, tokenizer: Any, title: str, *, scaled: bool = False) -> None:
        self._clip, self._tokenizer, self.title = clip, tokenizer, title
        self.scale = float(clip.logit_scale.detach().exp()) if scaled else 1.0
        self.identity = _identity("clip", clip, clip_statistics(clip))

    @classmethod
    def of_folder(cls, path: Path, title: str, device: torch.device | str, *, scaled: bool = False) -> ClipExtractor:
        """Load a CLIPModel and its tokenizer from a folder."""
        clip = load_transformers_model(CLIPModel, path).to(device)
        tokenizer = load_tokenizer(path)
        _require_words(path, tokenizer, clip)
        return cls(clip, tokenizer, title, scaled=scaled)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> dict[str, Tensor]:
        return {FEATURES: F.normalize(image_embeds(self._clip, _in_range(pixels)), dim=1).cpu()}

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        return tokens_of(self._clip, self._tokenizer, captions).tolist()  # type: ignore[no-any-return]

    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {FEATURES: F.normalize(text_embeds(self._clip, self._tokenizer, captions), dim=1).cpu()}


class Dinov2Extractor:
    """DINOv2's class token after the last norm (arXiv 2306.04675, appendix)."""

    title = "DINOv2 ViT-L/14"

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self._network = load_transformers_model(AutoModel, path).to(device)
        self._mean, self._deviation = (torch.tensor(each).view(3, 1, 1) for each in clip_statistics(self._network))
        self._device = device
        self.identity = _identity("dinov2", self._network, DINOV2_SIDE, clip_statistics(self._network))

    @torch.no_grad()
    def images(self, pixels: Tensor) -> dict[str, Tensor]:
        side = (DINOV2_SIDE, DINOV2_SIDE)
        resized = F.interpolate(pixels.float() / 255, side, mode="bicubic", antialias=True).clamp(0, 1)
        inputs = ((resized - self._mean) / self._deviation).to(self._device)
        return {FEATURES: self._network(pixel_values=inputs).pooler_output.cpu()}


class Lpips:
    """LPIPS of pairs of images, by torchmetrics.

    Args:
        path: torchvision's weights of AlexNet.
        name: by which torchvision looks for them, if that is another.
    """

    title = "AlexNet with LPIPS's weights"

    def __init__(self, path: Path, device: torch.device | str, name: str | None = None) -> None:
        with metrics_extra("torchvision", "LPIPS"):
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        with refuse_damaged(path), _hub_folder_with(path, name or path.name):
            self._metric = LearnedPerceptualImagePatchSimilarity("alex", reduction="none", sync_on_compute=False)
        self._metric.to(device)
        self._device = device
        self.identity = _identity("lpips", self._metric.net)

    @torch.no_grad()
    def pairs(self, pixels: Tensor, others: Tensor) -> Tensor:
        """Return the distance (pairs,) of each pair of images (pairs, 3, height, width), uint8."""
        distances = self._metric(_in_range(pixels).to(self._device), _in_range(others).to(self._device))
        return distances.reshape(-1).cpu()


def open_extractor(
    role: str, source: Source, path: Path | None, pipeline: DiffusionPipeline, device: torch.device | str
) -> Extractor | TextExtractor | None:
    """Load the network of a role; None where it is the first model's own CLIP, and there is none.

    Args:
        path: its weights; None for a source that needs none from elsewhere.
        pipeline: the first model's.
    """
    if source.kind == "judge":
        return JudgeExtractor(device)
    if source.kind == "own-clip":
        clip = load_clip(pipeline)
        if clip is None:
            return None
        return ClipExtractor(clip.to(device), load_clip_tokenizer(clip.name_or_path, pipeline), source.title)
    assert path is not None
    if source.kind == "inception":
        return InceptionExtractor(path, device)
    if source.kind == "dinov2":
        return Dinov2Extractor(path, device)
    # PickScore's score is its scaled logit (arXiv 2305.01569, equation 1); HPSv2's and the CLIP score are cosines.
    return ClipExtractor.of_folder(path, source.title, device, scaled=role == "pickscore")


def _identity(kind: str, network: nn.Module, *more: Any) -> str:
    """Return what tells a network's features from another's: all its numbers, its config, how its inputs are made."""
    config = network.config.to_json_string() if isinstance(network, PreTrainedModel) else ""
    return f"{kind} {content_digest(network.state_dict())} {config} {more}"


def _require_words(path: Path, tokenizer: Any, clip: CLIPModel) -> None:
    """
    Raises:
        AsdmError: the tokenizer has tokens that the model has no embedding of.
    """
    known = clip.config.text_config.vocab_size
    if len(tokenizer) > known:
        raise AsdmError(f"{path}: its tokenizer has {len(tokenizer)} tokens, its model {known}; download it again")


def _in_range(pixels: Tensor) -> Tensor:
    """Convert uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


@contextmanager
def _hub_folder_with(path: Path, name: str) -> Iterator[None]:
    """Let torch.hub find one file of weights by a name, which torchvision otherwise downloads."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoints" / name
        place.parent.mkdir()
        os.symlink(path.resolve(), place)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
