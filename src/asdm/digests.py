"""Short digests, by which files tell models, data and settings apart. Files of earlier versions hold them: a digest of
the same must stay the same."""

from __future__ import annotations

import hashlib


def short_digest(*parts: str | bytes) -> str:
    """Return the first 16 digits of the SHA-256 of these parts, joined."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]
