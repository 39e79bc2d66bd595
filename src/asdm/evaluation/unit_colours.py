"""How the plot of a report and the page show a unit: its colour by its sensitivity, and the letter of its kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_hex

from asdm.sensitivity.profile import RedundancyMap

UNIT_LETTERS = {"resnet": "R", "attention": "A", "block": "B"}
PART_LETTERS = {"self_attention": "S", "cross_attention": "C", "feed_forward": "F"}
_LEAST = 1e-6  # of a logarithmic scale


@dataclass(frozen=True)
class SensitivityColours:
    """Colours from the least to the largest sensitivity of a profile's units, on a logarithmic scale."""

    low: float
    high: float
    scale: ScalarMappable

    @classmethod
    def of(cls, redundancy: RedundancyMap) -> SensitivityColours:
        """Return the colours of a profile."""
        values = [shown(unit.sensitivity) for unit in redundancy.units]
        low, high = min(values), max(values)
        # A scale of one value has no colours.
        return cls(low, high, ScalarMappable(LogNorm(low, max(high, 1.01 * low)), "viridis"))

    def __call__(self, sensitivity: float) -> tuple[str, str]:
        """Return a colour, and the ink that is legible on it."""
        red, green, blue, _ = self.scale.to_rgba(np.array(shown(sensitivity)))
        return to_hex((red, green, blue)), "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"


def shown(sensitivity: float) -> float:
    """Return the value at which a sensitivity is shown: on a logarithmic scale there is no zero."""
    return max(sensitivity, _LEAST)
