"""Pages that need no network and no server: one for a run, one for a comparison."""

from longtail.report.pages import comparison_report, run_report

__all__ = ["comparison_report", "run_report"]
