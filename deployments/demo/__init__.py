"""The models of ``desra demo``."""
