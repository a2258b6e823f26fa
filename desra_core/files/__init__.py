"""Whole files: written atomically, locked, and identified by their content."""
