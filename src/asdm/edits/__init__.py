"""Edits of a model's architecture. A new kind is one file here and one import below."""

from asdm.edits.base import Edit as Edit
from asdm.edits.base import EditedFamily as EditedFamily
from asdm.edits.base import UnitEdit as UnitEdit
from asdm.edits.base import apply_edits as apply_edits
from asdm.edits.base import candidate_edits as candidate_edits
from asdm.edits.base import compensated as compensated
from asdm.edits.base import edited as edited
from asdm.edits.base import parse_edits as parse_edits
from asdm.edits.base import register_edit as register_edit
from asdm.edits.base import removed_units as removed_units
from asdm.edits.base import restored as restored
from asdm.edits.cond_conv import CondConv as CondConv
from asdm.edits.drop_layers import DropLayers as DropLayers
from asdm.edits.regional_attention import GriAttention as GriAttention
from asdm.edits.remove import Remove as Remove
