"""The README.md of a saved pipeline: what was done to its UNet, and how to load it."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline, LCMScheduler
from huggingface_hub import ModelCardData

from asdm.families import denoiser_of
from asdm.student.edited_model import edits_of
from asdm.student.unet import MODULE_NAME

_CARD = """---
{metadata}
---

# {title}

{what}

## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{title}"{flag})
image = pipeline("a prompt"{images}{few_steps}).images[0]
```

{hint}{figures}## Plan

{plan}
"""
_HINT = f"""The flag lets the code of its UNet run, `unet/{MODULE_NAME}.py`, which needs nothing but diffusers. With
`asdm` installed, `asdm.load_pipeline` loads the folder without running code that lies in it. Another pipeline takes
its UNet by name, as diffusers compares classes exactly: `StableDiffusionImg2ImgPipeline.from_pipe(pipeline,
unet=pipeline.unet)`; or use `AutoPipelineForImage2Image.from_pipe(pipeline)`.

"""


def model_card(pipeline: DiffusionPipeline, title: str, teacher: str | None = None, figures: str = "") -> str:
    """A model card for the Hub, in Markdown.

    Args:
        title: what the model is called; where it is loaded from, in the snippet.
        teacher: the model it was made of; one with a Hub id is named as the base model.
        figures: a section of measured figures (`asdm.evaluation.report.metrics_section`).
    """
    denoiser = denoiser_of(pipeline)
    edits = edits_of(denoiser)
    parameters = sum(p.numel() for p in denoiser.parameters()) / 1e6
    base = teacher if teacher is not None and _is_hub_id(teacher) else None
    metadata = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", base_model=base, tags=["asdm", "stable-diffusion"]
    )
    made_of = "" if teacher is None else f", made of `{teacher}`"
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        what=f"A {type(pipeline).__name__} with a UNet of {parameters:.1f}M parameters{made_of}.",
        flag=", trust_remote_code=True" if edits else "",
        images=", image=image, mask_image=mask" if "Inpaint" in type(pipeline).__name__ else "",
        few_steps=", num_inference_steps=4, guidance_scale=1" if isinstance(pipeline.scheduler, LCMScheduler) else "",
        hint=_HINT if edits else "",
        figures=f"## Figures\n\n{figures.strip()}\n\n" if figures else "",
        plan="\n".join(f"- {edit}" for edit in edits) or "No edits: the UNet is a stock one, as its config says.",
    )


def _is_hub_id(model: str) -> bool:
    owner, _, name = model.partition("/")
    return bool(owner.strip(".~") and name) and "/" not in name and not Path(model).exists()
