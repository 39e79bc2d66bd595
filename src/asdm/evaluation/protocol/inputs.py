"""What a protocol reads from files, and whether all of it is there: prompts, real images, networks' weights.

Nothing here needs a pipeline, so that a command refuses before it loads one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asdm.choices import ProtocolName
from asdm.errors import AsdmError
from asdm.evaluation.metrics import require_judge
from asdm.evaluation.protocol.captions import read_captions
from asdm.evaluation.protocol.measurement import needs_real_images
from asdm.evaluation.protocol.metrics import Requested, Role, parse_metrics, roles_of
from asdm.evaluation.protocol.protocols import PROTOCOLS, Protocol
from asdm.evaluation.protocol.weights import SOURCES, Source, find_weights
from asdm.evaluation.sampling import examples_by_split
from asdm.images import readable_suffixes
from asdm.registry import DATASETS, registered_folder


@dataclass(frozen=True)
class Network:
    """The network of a role, with its weights' place; None where it needs none from elsewhere."""

    source: Source
    path: Path | None

    @property
    def title(self) -> str:
        """What reports call it, with the name of its weights."""
        return self.source.title if self.path is None else f"{self.source.title} ({self.path.name})"


@dataclass(frozen=True)
class Inputs:
    """The prompts of the whole protocol, the real images, the names of metrics, and the networks that they need."""

    prompts: Sequence[str]
    real: Sequence[Path]
    metrics: Sequence[str]
    networks: Mapping[Role, Network]


def read_inputs(
    protocol: ProtocolName,
    *,
    images: str | Path | None = None,
    captions: str | Path | None = None,
    metrics: str | None = None,
    weights: str | Path | None = None,
) -> Inputs:
    """Find all that a protocol needs beside pipelines; weights that are not here are downloaded.

    Raises:
        AsdmError: as `evaluate_by_protocol`.
    """
    found = PROTOCOLS[protocol]
    requested = parse_metrics(",".join(found.metrics) if metrics is None else metrics)
    names = [name for name, _ in requested]
    prompts, real = _prompts(found, captions), _real_images(found, images, names)
    networks = _networks(found, requested, None if weights is None else Path(weights))
    names = list(dict.fromkeys(_name_by_network(name, networks) for name in names))
    return Inputs(prompts=prompts, real=real, metrics=names, networks=networks)


def _name_by_network(metric: str, networks: Mapping[Role, Network]) -> str:
    """Return a metric's name: the Fréchet distance of Inception's features is the FID, and that of no others."""
    if metric not in ("fid", "fd"):
        return metric
    return "fd" if networks["inception"].source.kind == "judge" else "fid"


def _prompts(protocol: Protocol, captions: str | Path | None) -> list[str]:
    if captions is not None:
        return read_captions(Path(captions), protocol.prompts)
    if protocol.name != "demo":
        raise AsdmError(f"captions: {protocol.name} needs the file of prompts; for COCO 2014 captions_val2014.json")
    found = examples_by_split(protocol.name)
    return [example.caption for example in [*found["held_out"], *found["seen"]]][: protocol.prompts]


def _real_images(protocol: Protocol, images: str | Path | None, metrics: Sequence[str]) -> list[Path]:
    if images is None and not any(map(needs_real_images, metrics)):
        return []
    if images is None and protocol.name != "demo":
        raise AsdmError(f"images: {protocol.name} needs the folder of real images; for COCO 2014 val2014")
    folder = registered_folder(protocol.name, DATASETS) if images is None else Path(images)
    if folder is None or not folder.is_dir():
        raise AsdmError(f"{folder}: no such folder of real images")
    suffixes = readable_suffixes()
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if len(found) < 2:
        raise AsdmError(f"{folder}: has {len(found)} images; name a folder of real images")
    return found


def _networks(protocol: Protocol, requested: Sequence[Requested], weights: Path | None) -> dict[Role, Network]:
    if weights is not None and not weights.is_dir():
        raise AsdmError(f"{weights}: no such folder of weights")
    networks = {}
    for role, where in roles_of(requested).items():
        source = protocol.sources[role]
        if source.kind == "judge" and where is None:
            require_judge()
        if source.is_own and where is None:
            networks[role] = Network(source, None)
        else:  # what the caller names takes the place of the demo's own networks
            source = SOURCES[role]
            networks[role] = Network(source, find_weights(source, where, weights))
    return networks
