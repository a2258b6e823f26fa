"""How well detectors find artifacts: on data with masks by people, and on artifacts that are injected."""
