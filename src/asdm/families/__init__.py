"""Families of denoisers: all that knows an architecture. `family_of` finds the family of a model or pipeline."""

from asdm.families.base import Denoiser as Denoiser
from asdm.families.base import ModelFamily as ModelFamily
from asdm.families.records import BlockIO as BlockIO
from asdm.families.records import BlockPlace as BlockPlace
from asdm.families.records import Branch as Branch
from asdm.families.records import CacheCut as CacheCut
from asdm.families.records import Preset as Preset
from asdm.families.records import Unit as Unit
from asdm.families.records import UnitKind as UnitKind
from asdm.families.records import UnitLike as UnitLike
from asdm.families.records import block_of as block_of
from asdm.families.registry import component_of as component_of
from asdm.families.registry import denoiser_call as denoiser_call
from asdm.families.registry import denoiser_of as denoiser_of
from asdm.families.registry import families as families
from asdm.families.registry import family_named as family_named
from asdm.families.registry import family_of as family_of
from asdm.families.registry import macs_of_call as macs_of_call
from asdm.families.tensors import fingerprint as fingerprint
from asdm.families.tensors import require_plain as require_plain
from asdm.families.tensors import require_torch as require_torch
from asdm.families.unet import UNetFamily as UNetFamily

# Registered after UNets, which messages name where a model's family is not known.
from asdm.families.transformers import PixArtFamily as PixArtFamily  # isort: skip
