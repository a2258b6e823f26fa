"""HTML pages and charts about workspaces, evaluations, benchmarks and calibrations.

Whoever imports this imports matplotlib and Jinja2.
"""

from desra_core.report.workspace_page import write_report

__all__ = ["write_report"]
