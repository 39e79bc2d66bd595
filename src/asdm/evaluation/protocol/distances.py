"""Metrics as functions of features and of images: torchmetrics' where it has them."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as torchmetrics and torch-fidelity
SPLITS = 10  # of the inception score
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # arXiv 2401.09603, section 4 and its code
_ALONE = {"sync_on_compute": False}  # rank 0 of a launch has the features of all
_ROWS = 2048  # of a kernel matrix that are in memory at once


class _Features(nn.Identity):
    """In the place of a metric's network: what comes in are features."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.num_features = features.shape[1]


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Return the Fréchet distance (arXiv 1706.08500) of features (images, channels): FID on Inception's, FD-DINOv2 on
    DINOv2's. It is in float64, with unbiased covariances."""
    metric = FrechetInceptionDistance(feature=_Features(real), **_ALONE)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute().clamp(min=0))


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float | None]:
    """Return the inception score (arXiv 1606.03498) of logits (images, classes): mean and deviation over 10 parts of
    the shuffled images, fewer if there are fewer than 20 images. The deviation of one part is None."""
    splits = min(SPLITS, max(1, len(logits) // 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = InceptionScore(feature=nn.Identity(), splits=splits, **_ALONE)
    metric.update(logits)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*degrees of freedom")
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if splits > 1 else None


def cmmd(generated: Tensor, real: Tensor) -> float:
    """Return CMMD (arXiv 2401.09603) of normalised CLIP embeddings (images, channels): 1,000 times the squared MMD with
    a Gaussian kernel of width 10. As in its code, a sample's kernel with itself counts."""
    kernels = [_mean_kernel(*pair) for pair in ((generated, generated), (real, real), (generated, real))]
    return CMMD_SCALE * (kernels[0] + kernels[1] - 2 * kernels[2])


def _mean_kernel(rows: Tensor, columns: Tensor) -> float:
    columns = columns.double()
    total = 0.0
    for some in rows.double().split(_ROWS):
        squared = torch.cdist(some, columns, compute_mode="use_mm_for_euclid_dist").square()
        total += float(torch.exp(-squared / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(rows) * len(columns))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity (pairs,) of pairs of images (pairs, 3, height, width), uint8: Gaussian windows
    of 11 pixels, each channel by itself."""
    found = structural_similarity_index_measure(
        images.float() / 255, others.float() / 255, data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found.reshape(-1)


def scores(images: Tensor, texts: Tensor, scale: float = 1.0) -> Tensor:
    """Return for each image (images, channels) the scaled cosine to its text (images, channels)."""
    return scale * F.cosine_similarity(images, texts)


def win_share(own: Tensor, others: Tensor) -> float:
    """Return the part of the places at which `own` is larger; equal values count half."""
    return float(((own > others).float() + 0.5 * (own == others).float()).mean())
