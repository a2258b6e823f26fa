"""Measuring detectors: on data sets with human masks, and on artifacts that are injected into clean pairs."""
