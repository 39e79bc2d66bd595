"""How far the two other drawings of a design determine the held-out third: `python -m tools.demo.limit`.

A small convolutional net learns to draw one Fluent variant from the two real others. It sees what no diffusion model
sees: the other drawings themselves. Then it draws the determined held-out pairs. Its rate of exact pairs says how far
the two others determine them. Writes `limit.json` and `limit.png`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from asdm_demo import images_folder, pipeline_folder
from torch import Tensor, nn
from torch.nn import functional as F

from asdm.cli.main import one_line_errors
from asdm.cli.options import POSITIVE
from asdm.cli.output import say
from asdm.evaluation.sampling import EvaluationSet, examples_by_split
from asdm.files import write_text
from asdm.images import load_images
from asdm.measure.machine import fast_training
from asdm.pipelines.loading import load_pipeline
from tools.demo.build import Checker, write_sheet
from tools.demo.emoji import IMAGE_SIZE, ONE_DESIGN, Pair, concepts

BATCH, RATE, WIDTH, SHOWN = 16, 2e-3, 32, 48


class Translator(nn.Module):
    """Draw the third variant from the two others: a U of convolutions at 64, 32, 16 and 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH]
        self.down = nn.ModuleList(
            _block(given, width) for given, width in zip([6 + len(ONE_DESIGN), *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(below + width, width) for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.out = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, others: Tensor, style: int) -> Tensor:
        """Map `others` (batch, 6, height, width), the two other variants in the order of `ONE_DESIGN`, to the third."""
        label = torch.zeros(len(others), len(ONE_DESIGN), *others.shape[2:])
        label[:, style] = 1
        hidden, kept = torch.cat([others, label], 1), []
        for block in self.down:
            hidden = block(hidden)
            kept.append(hidden)
            hidden = F.avg_pool2d(hidden, 2)
        hidden = kept.pop()
        for block in self.up:
            hidden = block(torch.cat([F.interpolate(hidden, scale_factor=2), kept.pop()], 1))
        drawn: Tensor = self.out(hidden).tanh()
        return drawn


@fast_training()
def train(images: Tensor, seen: Tensor, steps: int) -> Translator:
    """Train on the designs of which nothing is held out.

    Args:
        images: (variant, concept, 3, height, width), in [-1, 1].
        seen: rows of the concepts to train on.
        steps: of AdamW, 16 designs each.
    """
    torch.manual_seed(0)
    net = Translator()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        style, rows = step % len(ONE_DESIGN), seen[torch.randint(len(seen), (BATCH,))]
        three = _augmented(images[:, rows])
        drawn, target = net(_others(three, style), style), three[style]
        loss = F.l1_loss(drawn, target) + F.mse_loss(drawn, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"step {step} of {steps}, loss {loss.item():.4f}")
    return net.eval()


def limit(
    folder: Annotated[Path, typer.Option(help="Where the metrics and the sheet go.")] = Path("runs/demo-build"),
    steps: Annotated[int, typer.Option(help="Training steps.", callback=POSITIVE)] = 1500,
) -> None:
    """Train a net that sees both other variants, and measure how exactly it draws the held-out third."""
    names, held_out = list(concepts()), examples_by_split(images_folder())["held_out"]
    images = torch.stack(
        [
            load_images([images_folder() / Pair(name, style).file_name for name in names], IMAGE_SIZE)
            for style in ONE_DESIGN
        ]
    )
    lacking = {example.concept for example in held_out}
    net = train(images, torch.tensor([row for row, name in enumerate(names) if name not in lacking]), steps)
    with torch.no_grad():
        drawn = torch.cat([_draw(net, images, names.index(str(each.concept)), str(each.style)) for each in held_out])
    checker = Checker(
        load_pipeline(pipeline_folder()), [EvaluationSet(split="held_out", prompts=[], examples=held_out)]
    )
    found: dict[str, Any] = {"steps": steps, "all": checker.metrics(drawn, held_out)}
    for style in ONE_DESIGN:
        rows = [row for row, each in enumerate(held_out) if each.style == style]
        found[style] = checker.metrics(drawn[rows], [held_out[row] for row in rows])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "limit.json", json.dumps(found, indent=1) + "\n")
    write_sheet(list(zip(held_out, drawn, strict=True))[:: len(held_out) // SHOWN][:SHOWN], folder / "limit.png")
    say(json.dumps(found, indent=1))


def _block(given: int, width: int) -> nn.Sequential:
    def half(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, width, 3, padding=1, padding_mode="replicate")
        return [convolution, nn.GroupNorm(8, width), nn.SiLU()]

    return nn.Sequential(*half(given), *half(width))


def _others(three: Tensor, style: int) -> Tensor:
    return torch.cat([three[other] for other in range(len(ONE_DESIGN)) if other != style], 1)


def _augmented(three: Tensor) -> Tensor:
    """Mirror half of the batches, and exchange the colour channels of half: of all three variants alike."""
    if torch.rand(()) < 0.5:
        three = three.flip(-1)
    return three[:, :, torch.randperm(3)] if torch.rand(()) < 0.5 else three


def _draw(net: Translator, images: Tensor, concept: int, style: str) -> Tensor:
    which = ONE_DESIGN.index(style)
    drawn: Tensor = net(_others(images[:, concept, None], which), which)
    return drawn


if __name__ == "__main__":
    with one_line_errors():
        typer.run(limit)
