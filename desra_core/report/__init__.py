"""HTML pages and charts about workspaces, evaluations, benchmarks and calibrations.

Importing this package loads matplotlib and Jinja2.
"""

from desra_core.report.workspace_page import write_report

__all__ = ["write_report"]
