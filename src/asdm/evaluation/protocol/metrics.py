"""The metrics that a protocol can be asked for, by name: the network that each needs, and its columns in results."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from asdm.errors import AsdmError, one_line

# What a network is for. Metrics of one role share its features.
Role = Literal["inception", "clip", "cmmd", "dinov2", "lpips", "pickscore", "hpsv2"]


class Metric(NamedTuple):
    """A metric: the role of its network, and what reports say."""

    role: Role | None  # None where no network is needed
    field: str  # of ProtocolMetrics
    title: str
    digits: int
    higher_is_better: bool
    about: str


METRICS = {
    "fid": Metric("inception", "fid", "FID", 2, False, "Fréchet distance to the real images (arXiv 1706.08500)"),
    "fd": Metric("inception", "frechet_distance", "FD", 2, False, "the same distance of the judge's features"),
    "is": Metric("inception", "inception_score", "IS", 2, True, "inception score (arXiv 1606.03498)"),
    "clip": Metric("clip", "clip_score", "CLIP", 4, True, "cosine of image and prompt (arXiv 2104.08718)"),
    "kid": Metric("inception", "kid", "KID", 5, False, "kernel distance to the real images (arXiv 1801.01401)"),
    "cmmd": Metric("cmmd", "cmmd", "CMMD", 3, False, "CLIP features' MMD to the real images (arXiv 2401.09603)"),
    "fd-dinov2": Metric("dinov2", "fd_dinov2", "FD-DINOv2", 1, False, "Fréchet distance (arXiv 2306.04675)"),
    "lpips": Metric("lpips", "lpips", "LPIPS", 4, False, "distance to the teacher's image (arXiv 1801.03924)"),
    "ssim": Metric(None, "ssim", "SSIM", 4, True, "likeness to the teacher's image (Wang et al. 2004)"),
    "pickscore": Metric("pickscore", "pickscore", "PickScore", 3, True, "predicted preference (arXiv 2305.01569)"),
    "hpsv2": Metric("hpsv2", "hpsv2", "HPSv2", 4, True, "predicted preference (arXiv 2306.09341)"),
}
ALL = "all"
JUDGE = "the judge, EfficientNet-Lite0"  # what results call it
# Metrics of each image and its prompt, by which a student may win against the teacher.
SCORES: dict[str, Role] = {"clip": "clip", "pickscore": "pickscore", "hpsv2": "hpsv2"}


class Requested(NamedTuple):
    """A requested metric, and where its network is, if the request says it: a folder, a file or a Hub id."""

    name: str
    where: str | None


def parse_metrics(text: str) -> list[Requested]:
    """Read metrics such as `fid,clip,pickscore=FOLDER`; `all` is all of them.

    Raises:
        AsdmError: no such metric, one that has no network to be named, or one that is named twice.
    """
    if text.strip() == ALL:
        return [Requested(name, None) for name in METRICS]
    found: list[Requested] = []
    for part in text.split(","):
        name, equals, where = (word.strip() for word in part.partition("="))
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise AsdmError(f"metrics={one_line(name, 80)}: must be {ALL} or some of {', '.join(METRICS)}{hint}")
        if equals and (not where or METRICS[name].role is None):
            raise AsdmError(f"metrics={one_line(part, 80)}: name a network behind =, or leave = out")
        if name in [other.name for other in found]:
            raise AsdmError(f"metrics={name}: named twice")
        found.append(Requested(name, where or None))
    return found


def roles_of(metrics: Sequence[Requested]) -> dict[Role, str | None]:
    """Return the roles that metrics need, each with where its network is, if a metric says it.

    Raises:
        AsdmError: two metrics name different networks for one role.
    """
    roles: dict[Role, str | None] = {}
    for name, where in metrics:
        role = METRICS[name].role
        if role is None:
            continue
        if where and roles.get(role) not in (None, where):
            raise AsdmError(f"metrics={name}={where}: another metric of these features names {roles[role]}; name one")
        roles[role] = where or roles.get(role)
    return roles
