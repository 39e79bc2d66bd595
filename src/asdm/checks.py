"""Checks of what a user gives, shared by all functions, records and commands: each value is refused before any work.

A range is tested as `low <= value <= high`, so that NaN, which compares false with everything, cannot pass.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, get_args

from asdm.errors import AsdmError, shown

Check = Callable[[str, Any], None]
"""Raises an AsdmError that names the argument and its value, unless the value is allowed."""

LARGEST_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits
LARGEST_FIRST_SEED = 2**31 - 1  # of measurements and trainings, which add the numbers of their images to it
LEAST_COUNT = 10_000  # of parameters or multiply-accumulates; no model has as few

P = ParamSpec("P")
R = TypeVar("R")


def arguments(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check arguments of a function by name before it is called; None passes where it is the default."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
        assert checks.keys() <= signature.parameters.keys(), checks.keys() - signature.parameters.keys()

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            for name, check in checks.items():
                if name in given and not (given[name] is None and name in optional):
                    check(name, given[name])
            return function(*args, **kwargs)

        return call

    return decorate


def refused(name: str, value: Any, allowed: str) -> AsdmError:
    """Return the error for a value that is not allowed, in one line."""
    return AsdmError(f"{name}={shown(value)}: must be {allowed}")


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    remedy: str = "",
) -> Check:
    """Return a finite number, from `low` to `high`, or between `above` and `below`, which are left out themselves."""
    limits = [
        *([f"above {above:g}"] if above > -math.inf else []),
        *([f"of at least {low:g}"] if low > -math.inf else []),
        *([f"below {below:g}"] if below < math.inf else []),
        *([f"at most {high:g}"] if high < math.inf else []),
    ]
    allowed = " ".join(["a finite number", " and ".join(limits)]).strip() + (f"; {remedy}" if remedy else "")

    def check(name: str, value: Any) -> None:
        fits = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
        if not (fits and low <= value <= high and above < value < below):
            raise refused(name, value, allowed)

    return check


def share_or_count(name: str, value: Any) -> None:
    """A share of a whole, up to 1, or a number of its units, which is at least `LEAST_COUNT`: a smaller one was meant
    as a percentage, or in millions."""
    number(above=0)(name, value)
    if 1 < value < LEAST_COUNT:
        allowed = f"a share of the original's up to 1, such as 0.6, or a number from {LEAST_COUNT} on, such as 5e6"
        raise AsdmError(f"{name}={value:g}: must be {allowed}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point ones
        return False


def whole(low: int = 1, high: int | None = None) -> Check:
    """Return a whole number from `low` to `high`."""
    allowed = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"

    def check(name: str, value: Any) -> None:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        if not (fits and low <= int(value) and (high is None or int(value) <= high)):
            raise refused(name, value, allowed)

    return check


def multiple_of(unit: int, high: int) -> Check:
    """Return a positive whole multiple of `unit`, up to `high`."""
    within = whole(1, high)

    def check(name: str, value: Any) -> None:
        within(name, value)
        if value % unit:
            nearest = max(1, round(value / unit)) * unit
            raise AsdmError(f"{name}={value}: must be a positive multiple of {unit}; the nearest is {nearest}")

    return check


def each(item: Check, least: int = 0, allowed: str = "a list") -> Check:
    """Return a collection of at least so many items, each of which passes the check; a text is none."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
            raise refused(name, value, allowed)
        if len(value) < least:
            raise refused(name, value, f"{allowed} with {least} or more")
        for one in value:
            item(name, one)

    return check


def named(item: Check) -> Check:
    """Return a dictionary of at least one, by names, each of which passes the check."""

    def check(name: str, value: Any) -> None:
        if not (isinstance(value, Mapping) and value):
            raise refused(name, value, "a dictionary by names, with at least one entry")
        for key, one in value.items():
            text(name, key)
            item(f"{name}[{key!r}]", one)

    return check


def one_of(*allowed: str) -> Check:
    """One of some words."""

    def check(name: str, value: Any) -> None:
        if not (isinstance(value, str) and value in allowed):
            raise refused(name, value, f"one of {', '.join(allowed)}")

    return check


def literal(kind: Any) -> Check:
    """One of the words of a Literal."""
    return one_of(*get_args(kind))


def any_of(*checks: Check) -> Check:
    """Return what passes one of the checks; the last one's error is told."""

    def check(name: str, value: Any) -> None:
        for one in checks[:-1]:
            try:
                return one(name, value)
            except AsdmError:
                continue
        return checks[-1](name, value)

    return check


def a(kind: type | tuple[type, ...], remedy: str = "") -> Check:
    """Return an instance of a class."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    allowed = f"of type {' or '.join(each.__name__ for each in kinds)}" + (f"; {remedy}" if remedy else "")

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise refused(name, value, allowed)

    return check


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise refused(name, value, "True or False")


def text(name: str, value: Any) -> None:
    """A text, which may be empty, as a prompt may."""
    if not isinstance(value, str):
        raise refused(name, value, "a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a command line that are no text
        raise refused(name, value, "text in UTF-8") from None


def path(name: str, value: Any) -> None:
    """A name of a file or folder, or what is named like one: a model, a data source."""
    if not isinstance(value, str | os.PathLike):
        raise refused(name, value, "a name or path")
    if not os.fspath(value) or "\0" in str(value):
        raise refused(name, str(value), "a name or path that is not empty")


def floating(name: str, value: Any) -> None:
    """A torch.dtype in which networks compute."""
    if str(value) not in ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64"):
        raise refused(name, value, "torch.float32, torch.float16 or torch.bfloat16")


def function(name: str, value: Any) -> None:
    """Something to be called."""
    if not callable(value):
        raise refused(name, value, "a function")


def has(*attributes: str, allowed: str) -> Check:
    """Return an object with these attributes, whatever its class: subclasses of others' pipelines and UNets work
    too."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
            raise refused(name, value, allowed)

    return check


PIPELINE = any_of(
    *(
        has(denoiser, "scheduler", allowed="a pipeline with a denoiser and a scheduler; asdm.load_pipeline loads one")
        for denoiser in ("unet", "transformer")
    )
)
UNET = has("config", "state_dict", allowed="a denoiser, such as asdm.load_pipeline(MODEL).unet")
SEED = whole(0, LARGEST_FIRST_SEED)
IMAGE_SEED = whole(0, LARGEST_SEED)
STEPS = whole(1, 10_000)  # of sampling; a scheduler allows fewer
TRAINING_STEPS = whole(0, 10**9)
SAMPLES = whole(1, 10**6)
ROUNDS = whole(1, 10_000)
TIMESTEPS = whole(1, 1000)
GUIDANCE = number(0)
SPEEDUP = number(1)
PROMPTS = each(text, allowed="a list of texts")
