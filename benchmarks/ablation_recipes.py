"""The recipes that the ablation compares: their names, components and lengths, and the plans that they share."""

from __future__ import annotations

from pathlib import Path

from common import RESULTS

WORK = Path("runs/ablation")
SETTLED = RESULTS / "ablation"  # plans, and what a step costs, which are the same for all runs, whenever they are made
# "normalised": losses relative to the teacher's mean square, features weighted by area, a low weight of the task, time
# steps uniform in angle.
METHOD = ("normalised", "incubation", "cond-conv", "gri", "sas")  # each is put to BK-SDM's recipe by itself, too
EXTRAS = ("compensation", "muon", "splice")
COMPONENTS = (*METHOD, *EXTRAS)
LEFT_OUT = (*METHOD, "compensation")  # of the full recipe, one at a time
EARLY = "early"  # our students are not trained for the steps that the original draws
DEFAULT = ("normalised", *EXTRAS)  # what `compress` and `distill` do if nothing else is asked for
NAMED: dict[str, tuple[str, ...]] = {"bk-sdm": (), "joint": DEFAULT, "full": COMPONENTS}
EXPERTS = {
    "cond-conv": "time",
    "cond-conv by prompt": "prompt",
    "cond-conv by both": "prompt+time",
}  # what routers read
ON_CAPTIONS = "sas on captions"  # without their images; those of open pairs have none
BY_CLIP = f"{ON_CAPTIONS} by clip"  # meaning is what the pipeline's CLIP sees; compared with the caption's, too
SEMANTIC = {f"joint + {name}": (*DEFAULT, name) for name in (ON_CAPTIONS, BY_CLIP)}
HARD: dict[str, tuple[str, ...]] = {f"joint + {name}": (*DEFAULT, name) for name in EXPERTS}
BY_PROMPT = "joint + cond-conv by prompt"  # which shows at the fast plan what more time brings to expert kernels
RECORDED = "recorded"  # the teacher's answers are read from disk, as by the recipe small-gpu
FROM_DISK = f"joint + {RECORDED}"
LOW_SPEEDUP, FAST_SPEEDUP = 1.5, 2.0  # for the components one by one; of the students that switch
SHORT = " (short)"  # what a recipe is called in the runs of the components' length
LONG = " (long)"  # and in those that show what more time brings
SWITCHING = " + switching"  # and where the student is of the faster plan, and the original draws the last steps
SWITCHED = f"joint{SWITCHING}"
UNTRAINED = f"untrained{SWITCHING}"  # pruned and compensated, no more
STEPS, LAST_STEPS = 25, 8  # with a student of twice the speed they leave 1.5x
SWITCHED_BELOW = (LAST_STEPS + 0.5) / STEPS  # of the schedule
LENGTHS = {1.5: 600, 2.0: 600, 2.5: 600}  # steps of BK-SDM's recipe; the others take as many as cost the same
SHORT_LENGTH = 200  # of the components one by one, and of the named recipes beside them
LONG_LENGTH = 2400


def variants(target: float) -> dict[str, tuple[str, ...]]:
    """Return the components of each recipe at a speed-up, but for the fastest those of long runs, too; at the lowest
    also those of short runs."""
    if target > FAST_SPEEDUP:
        return {"bk-sdm": (), "joint": DEFAULT, **HARD}
    found = NAMED | {f"{name}{LONG}": components for name, components in NAMED.items()}
    if target == FAST_SPEEDUP:
        found |= {**HARD, f"{BY_PROMPT}{LONG}": HARD[BY_PROMPT], **SEMANTIC}
    if target == LOW_SPEEDUP:
        found |= {FROM_DISK: (*DEFAULT, RECORDED)}
        found |= {f"{name}{SHORT}": components for name, components in NAMED.items()}
        found |= {UNTRAINED: ("compensation",)}
        found |= {SWITCHED: (*DEFAULT, EARLY)}
        found |= {f"bk-sdm + {name}": (name,) for name in METHOD}
        found |= {f"full - {name}": tuple(c for c in COMPONENTS if c != name) for name in LEFT_OUT}
    return found


def is_short(name: str) -> bool:
    """Return whether a recipe's runs are of the length of the components one by one."""
    return name.removesuffix(LONG) not in ("teacher", *NAMED, *HARD, *SEMANTIC, FROM_DISK)


def length_of(name: str, target: float) -> int:
    """Return how many steps of BK-SDM's recipe a recipe's runs cost."""
    if is_short(name):
        return SHORT_LENGTH
    return LONG_LENGTH if name.endswith(LONG) else LENGTHS[target]


def without_length(name: str) -> str:
    """Return a recipe's name without the length of the run."""
    return name.removesuffix(SHORT).removesuffix(LONG)


def base_name(name: str) -> str:
    """Return a recipe's name without the length of the run, and what draws."""
    return without_length(name).removesuffix(SWITCHING)


def planned_speedup(name: str, target: float) -> float:
    """Return the speed-up of the student's plan, where the target is that of all steps."""
    return FAST_SPEEDUP if name.endswith(SWITCHING) else target


def speedup_of_all_steps(name: str, faster: float) -> float:
    """Return the speed-up of all UNet calls of an image, where the student's is `faster`."""
    originals = LAST_STEPS if name.endswith(SWITCHING) else 0
    return round(STEPS / ((STEPS - originals) / faster + originals), 3)
