"""Diffing: what the features of a crosscoder tell of the difference between two models. Reading a report imports no torch."""

from typing import TYPE_CHECKING, Any

from saelab.diffing.report import DiffReport, diff_path, load_diff

if TYPE_CHECKING:
    from saelab.diffing.running import diff_report

__all__ = ["DiffReport", "diff_path", "diff_report", "load_diff"]


def __getattr__(name: str) -> Any:
    if name == "diff_report":
        from saelab.diffing.running import diff_report

        return diff_report
    raise AttributeError(f"module 'saelab.diffing' has no attribute {name!r}; it has {', '.join(__all__)}")
