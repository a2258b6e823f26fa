"""The first five minutes, ``make demo``: sample photos and a small model pair, bundled."""
