"""The first five minutes, ``make demo``: sample photos and a published model and its twin, bundled."""
