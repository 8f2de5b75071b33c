"""Runs here last as long as their training: sizes are measured and pictures drawn only where a test asks for it."""

from tests.support.quick_reports import measured, quick_reports_unless_measured

__all__ = ["measured", "quick_reports_unless_measured"]
