"""How a setting is refused."""

from __future__ import annotations

from pact_nemo.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message where the condition doesn't hold."""
    if not condition:
        raise ConfigError(message)


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError where the value is none of those allowed."""
    require(value in allowed, f"{key}={value!r}: must be one of {', '.join(allowed)}")
