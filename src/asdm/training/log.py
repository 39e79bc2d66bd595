"""The log of a training: a line of JSON a step, and TensorBoard events where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from asdm.files import write_text
from asdm.reading import parse_json


class TrainingLog:
    """`log.jsonl`, a line a step, and TensorBoard events. Lines after the step that is resumed from are dropped."""

    def __init__(self, path: Path, from_step: int):
        kept = [row for row in read_log(path) if row["step"] <= from_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        self.board = _tensorboard(path.parent / "tensorboard", from_step)

    def write(self, row: dict[str, float]) -> None:
        """Append a step."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `log.jsonl`, of which each value is a number; a last line that was cut short is ignored."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            break
        rows.append({name: value for name, value in row.items() if isinstance(value, int | float)})
    return rows


def _tensorboard(folder: Path, from_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)
