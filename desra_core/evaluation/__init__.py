"""Metrics: masks against human masks, and how faithful results are."""
