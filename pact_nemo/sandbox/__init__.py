"""Running untrusted tool code: a pool of confined worker processes, one call at a time in each."""

from pact_nemo.sandbox.limits import CallResult, Limits
from pact_nemo.sandbox.pool import Sandbox

__all__ = ["CallResult", "Limits", "Sandbox"]
