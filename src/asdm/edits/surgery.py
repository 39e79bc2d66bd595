"""Until all rooms use `asdm.edits` and `asdm.measure.hooks`: the functions of this module at their old place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from asdm.edits import base
from asdm.measure.hooks import swapped as swapped


def edited(unet: Any, edit: base.Edit) -> AbstractContextManager[None]:
    from asdm.families import family_of

    return base.edited(unet, edit, family_of(unet))


def replaced_paths(unet: Any, edit: base.Edit) -> list[str]:
    from asdm.families import family_of

    return list(edit.replacements(unet, family_of(unet)))
