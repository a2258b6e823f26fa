"""One HTML page about a workspace, to be forwarded: numbers, settings, failures, classes and the worst regions.

Whoever imports this imports matplotlib and Jinja2.
"""

from desra_core.report.page import write_report

__all__ = ["write_report"]
