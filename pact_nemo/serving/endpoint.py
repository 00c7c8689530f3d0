"""Where a rollout server is and how to be let in."""

from __future__ import annotations

from dataclasses import dataclass, field

SERVED_MODEL_NAME = "policy"


@dataclass(frozen=True)
class ServerEndpoint:
    """Address of a rollout server.

    Attributes:
        url: ``http://host:port`` without a trailing slash.
        api_key: bearer token; never shown by ``repr``.
        model: name that the server gives its model.
    """

    url: str
    api_key: str = field(repr=False)
    model: str = SERVED_MODEL_NAME

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"}
