"""Reports of runs are quick, unless a test measures."""

from tests.support.quick_reports import measured, quick_reports_unless_measured

__all__ = ["measured", "quick_reports_unless_measured"]
