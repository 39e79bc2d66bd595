"""The README.md of a saved pipeline: what was done to its denoiser, and how to load it."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline, LCMScheduler
from huggingface_hub import ModelCardData

from asdm.families import component_of, denoiser_of, family_of
from asdm.student.edited_model import all_edits_of, edits_of

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

{hint}{metrics}## Plan

{plan}
"""
_HINT = """The flag lets the code of its {label} run, `{component}/{module}.py`, which needs nothing but diffusers. With
`asdm` installed, `asdm.load_pipeline` loads the folder without running code that lies in it.{other_pipelines}

"""
_OTHER_PIPELINES = """ Pass the UNet by name
to another pipeline, as diffusers compares classes exactly: `StableDiffusionImg2ImgPipeline.from_pipe(pipeline,
unet=pipeline.unet)`; or use `AutoPipelineForImage2Image.from_pipe(pipeline)`."""


def model_card(pipeline: DiffusionPipeline, title: str, teacher: str | None = None, metrics: str = "") -> str:
    """Return a model card for the Hub, in Markdown.

    Args:
        title: what the model is called; where it is loaded from, in the snippet.
        teacher: the model it was made of; one with a Hub id is named as the base model.
        metrics: a section of measured metrics (`asdm.evaluation.report.metrics_section`).
    """
    denoiser = denoiser_of(pipeline)
    family, needs_code = family_of(pipeline), bool(edits_of(denoiser))
    label = family.label
    parameters = sum(p.numel() for p in denoiser.parameters()) / 1e6
    base = teacher if teacher is not None and _is_hub_id(teacher) else None
    metadata = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", base_model=base, tags=["asdm", *family.tags]
    )
    made_of = "" if teacher is None else f", made of `{teacher}`"
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        what=f"A {type(pipeline).__name__} with a {label} of {parameters:.1f}M parameters{made_of}.",
        flag=", trust_remote_code=True" if needs_code else "",
        images=", image=image, mask_image=mask" if "Inpaint" in type(pipeline).__name__ else "",
        few_steps=", num_inference_steps=4, guidance_scale=1" if isinstance(pipeline.scheduler, LCMScheduler) else "",
        hint=_hint(pipeline) if needs_code else "",
        metrics=f"## Results\n\n{metrics.strip()}\n\n" if metrics else "",
        plan="\n".join(f"- {edit}" for edit in all_edits_of(denoiser))
        or f"No edits: the {label} is a stock one, as its config says.",
    )


def _hint(pipeline: DiffusionPipeline) -> str:
    component = component_of(pipeline)
    return _HINT.format(
        label=family_of(pipeline).label,
        component=component,
        module=denoiser_of(pipeline).module_name,
        other_pipelines=_OTHER_PIPELINES if component == "unet" else "",
    )


def _is_hub_id(model: str) -> bool:
    owner, _, name = model.partition("/")
    return bool(owner.strip(".~") and name) and "/" not in name and not Path(model).exists()
