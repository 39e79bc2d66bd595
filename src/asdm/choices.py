"""Words that options, records and functions choose from. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

CompensationKind = Literal["none", "bias", "diagonal", "linear"]
