"""The report of a run: one self-contained HTML page, readable offline, on a phone and in the dark."""

from pact_nemo.report.page import write_report

__all__ = ["write_report"]
