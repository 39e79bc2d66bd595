"""Requests one at a time, and their cancellation: models are not made for several requests at once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from torch import nn

from asdm.errors import AsdmWarning


class CancelledError(Exception):
    """The user cancelled a request, or closed the page."""


class Ticket:
    """A request's permission to go on. The page's events hand its `id` on."""

    def __init__(self) -> None:
        self.id = uuid4().hex
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the request at its next step."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        """Return whether the request must end."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """
        Raises:
            CancelledError: the request was cancelled.
        """
        if self.is_cancelled():
            raise CancelledError

    @contextmanager
    def guards(self, *models: nn.Module) -> Iterator[None]:
        """End the block at the next call of one of the models once the request is cancelled.

        Raises:
            CancelledError: the request was cancelled.
        """
        handles = [model.register_forward_pre_hook(lambda *_: self.check()) for model in models]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Workbench:
    """The tickets of all users' requests, and the lock that lets one of them compute."""

    def __init__(self) -> None:
        self._lock, self._tickets_lock = threading.Lock(), threading.Lock()
        self._tickets: dict[tuple[str, str], Ticket] = {}  # by session and kind of work

    def issue(self, session: str, work: str) -> Ticket:
        """Return a new ticket for a kind of work in a user's session; the session's earlier one of it is cancelled."""
        with self._tickets_lock:
            earlier = self._tickets.get((session, work))
            ticket = self._tickets[session, work] = Ticket()
        if earlier is not None:
            earlier.cancel()
        return ticket

    def ticket(self, session: str, work: str, id: str) -> Ticket:
        """Return a session's ticket by its id; one that is cancelled where a later one has replaced it, or the session
        has gone."""
        with self._tickets_lock:
            found = self._tickets.get((session, work))
        if found is None or found.id != id:
            found = Ticket()
            found.cancel()
        return found

    def cancel(self, session: str, *works: str) -> None:
        """Cancel a session's requests of these kinds of work; of all kinds where none is named."""
        with self._tickets_lock:
            ended = [key for key in self._tickets if key[0] == session and (not works or key[1] in works)]
            tickets = [self._tickets.pop(key) for key in ended]
        for ticket in tickets:
            ticket.cancel()

    def cancel_all(self) -> None:
        """Cancel the requests of all sessions."""
        with self._tickets_lock:
            tickets = list(self._tickets.values())
            self._tickets.clear()
        for ticket in tickets:
            ticket.cancel()

    @contextmanager
    def computing(self, ticket: Ticket) -> Iterator[list[str]]:
        """Wait for the other requests, then compute in the block; yield a list that gets the `AsdmWarning`s.

        Raises:
            CancelledError: the request was cancelled while it waited.
        """
        while not self._lock.acquire(timeout=0.2):
            ticket.check()
        notes: list[str] = []
        try:
            ticket.check()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", AsdmWarning)
                try:
                    yield notes
                finally:
                    notes += [str(one.message) for one in caught if issubclass(one.category, AsdmWarning)]
        finally:
            self._lock.release()
