"""Metrics: masks against masks by people, removal and addition of artifacts, fidelity of results."""
