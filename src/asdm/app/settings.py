"""What the page allows: its address, its models, its folder, and the limits of a request."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field

from asdm.errors import AsdmError
from asdm.generation.request import GenerationRequest
from asdm.records import Record


class Limits(Record):
    """The most that one request may ask for."""

    side: int = Field(1024, ge=8, le=8192, description="pixels of an image's longer side")
    steps: int = Field(100, ge=1, le=1000, description="of sampling")
    waiting: int = Field(16, ge=1, le=1000, description="requests in the queue; others are refused")
    upload_megabytes: int = Field(32, ge=1, le=1024, description="of an uploaded file")

    def require(self, request: GenerationRequest) -> None:
        """
        Raises:
            AsdmError: a request exceeds a limit.
        """
        for name, value, most in (
            ("width", request.width, self.side),
            ("height", request.height, self.side),
            ("steps", request.steps, self.steps),
        ):
            if value is not None and value > most:
                raise AsdmError(f"{name}={value}: this page allows at most {most}")


class AppSettings(Record):
    """Where the page is served, and what it may read."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7860, ge=1, le=65535)
    models: list[str] = Field(["demo"], min_length=1, description="models that the page offers, the first as teacher")
    folder: Path = Field(Path(), description="the folder whose benchmarks, reports and trainings are shown")
    limits: Limits = Limits()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the page."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def require_model(self, name: str) -> None:
        """Refuse models by other names where other machines reach the page: a name can be any path or Hub id.

        Raises:
            AsdmError: the page does not offer the model.
        """
        if name not in self.models and not self.is_loopback:
            raise AsdmError(f"{name}: this page offers {', '.join(self.models)}; add others by asdm app --model")

    def require_own_machine(self, name: str) -> None:
        """Refuse to read a file of this machine for anyone else.

        Args:
            name: of the field that names the file.

        Raises:
            AsdmError: other machines reach the page.
        """
        if not self.is_loopback:
            raise AsdmError(f"{name}: this page reads no files of its machine; leave it empty")
