"""A page to share: all neurons of a model in one HTML file, without a server or a network."""

from entangle.report.report import Report, write_report

__all__ = ["Report", "write_report"]
