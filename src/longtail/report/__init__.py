"""Pages that need no network and no server: one for a run, one for a comparison, one for any runs side by side."""

from longtail.report.pages import comparison_report, run_report, runs_report

__all__ = ["comparison_report", "run_report", "runs_report"]
