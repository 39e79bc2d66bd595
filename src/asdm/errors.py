"""The one error that a user's input can cause; everything else that is raised is a fault of ours."""

from __future__ import annotations


class AsdmError(ValueError):
    """A problem with what the user gave: names the offending value, what is allowed and the remedy.

    The command line prints it as one line and exits with status 2.
    """
