"""Ask much of the page for a long time: several users at once, some of whom cancel. No request may be lost, nobody may
see another one's results, and the server's memory must stay flat."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from asdm.app.compare import FIELDS, OWN_SCHEDULER
from asdm.choices import IMAGE_STRENGTH
from asdm.errors import AsdmError, needs_extra
from tools.page.serving import Served

Outcome = Literal["done", "cancelled", "lost", "failed", "another user's"]
SECONDS_TO_ANSWER = 600
GROWTH, GROWTH_MB = 1.05, 30.0  # of the server's memory, that is no leak
SETTLED = 0.25  # part of the time after which the server has allocated what it needs


@dataclass
class Soak:
    """What happened to the requests, and the server's resident memory in MB, once a second."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    @property
    def memory_before(self) -> float:
        """The median in the quarter after the server has settled, in MB."""
        count = len(self.memory)
        return statistics.median(self.memory[int(SETTLED * count) : int(2 * SETTLED * count) + 1])

    @property
    def memory_after(self) -> float:
        """The median in the last quarter, in MB."""
        return statistics.median(self.memory[-max(1, int(SETTLED * len(self.memory))) :])

    @property
    def is_flat(self) -> bool:
        """Whether the server's memory did not grow."""
        return self.memory_after <= GROWTH * self.memory_before + GROWTH_MB

    def row(self) -> dict[str, Any]:
        """Return the result as a row of a table."""
        counts = {name: self.outcomes[name] for name in ("done", "cancelled", "lost", "failed", "another user's")}
        memory = {"MB before": round(self.memory_before), "MB after": round(self.memory_after)}
        return {"requests": self.outcomes.total(), **counts, "seconds": round(self.seconds), **memory}

    def require_good(self) -> None:
        """
        Raises:
            AsdmError: a request was lost or failed, a user saw another one's result, or memory grew.
        """
        bad = {name: count for name, count in self.outcomes.items() if name not in ("done", "cancelled")}
        if bad:
            raise AsdmError(f"requests: {bad}; {'; '.join(self.errors[:3])}")
        if not self.is_flat:
            raise AsdmError(f"memory grew from {self.memory_before:.0f} MB to {self.memory_after:.0f} MB")


def field_values(**given: Any) -> list[Any]:
    """Return a value for each of the page's fields, in their order: the given one, or the page's own."""
    usual = {"negative": "", "scheduler": OWN_SCHEDULER, "image": None, "strength": IMAGE_STRENGTH, "lora": ""}
    return [given.get(name, usual.get(name, 0)) for name in FIELDS]


class User:
    """Someone with a session of their own who compares the embedded pipeline with itself."""

    def __init__(self, address: str, number: int):
        with needs_extra("web", "requests to the page"):
            from gradio_client import Client
        self.client: Any = Client(address, download_files=False, verbose=False)
        self.prompt = f"apple, noto, for user {number}"
        self.chance = random.Random(number)

    def ask(self, seed: int, cancels: bool) -> Outcome:
        """Compare once, and cancel meanwhile if told."""
        fields = field_values(prompt=self.prompt, seed=seed, steps=1)
        ticket = self.client.predict(api_name="/begin")
        job = self.client.submit("demo", "demo", *fields, ticket, api_name="/compare")
        if cancels:
            time.sleep(self.chance.random())
            self.client.predict(api_name="/cancel")
        try:
            _, summary, *_, history = job.result(timeout=SECONDS_TO_ANSWER)
        except FutureTimeoutError:
            return "lost"
        if not isinstance(summary, str):  # an update of nothing
            return "cancelled" if cancels else "failed"
        captions = [str(one["caption"]) for one in history]
        own = all(caption.startswith(self.prompt) for caption in captions) and f"(seed {seed})" in captions[0]
        return "done" if own else "another user's"


def soak(
    served: Served,
    requests: int = 300,
    *,
    users: int = 4,
    cancelled: float = 0.1,
    progress: Callable[[int, int, str], Any] = lambda *_: None,
) -> Soak:
    """Send small requests to the page, in turn from several users at once.

    Args:
        cancelled: the part of the requests that their users cancel.
        progress: called with finished requests, all requests, and the outcomes so far.
    """
    result, ended, lock = Soak(), threading.Event(), threading.Lock()
    every = round(1 / cancelled) if cancelled else requests + 1

    def use(number: int) -> None:
        user = User(served.address, number)
        for index in range(number, requests, users):
            try:
                outcome = user.ask(index, cancels=index % every == every - 1)
            except Exception as error:  # of the client: told, and the user goes on
                outcome = "failed"
                result.errors.append(f"request {index}: {error}")
            with lock:
                result.outcomes[outcome] += 1
                progress(result.outcomes.total(), requests, ", ".join(f"{n} {c}" for n, c in result.outcomes.items()))

    def watch() -> None:
        server = psutil.Process(served.pid)
        while not ended.wait(1):
            result.memory.append(server.memory_info().rss / 1e6)

    watcher, started = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    try:
        with ThreadPoolExecutor(users) as pool:
            list(pool.map(use, range(users)))
    finally:
        ended.set()
        watcher.join()
    result.seconds = time.perf_counter() - started
    return result
