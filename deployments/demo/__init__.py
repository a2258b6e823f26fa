"""The first five minutes, ``make demo``: sample photos and a small model pair, bundled."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
