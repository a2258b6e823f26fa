"""Finding artifacts without ground truth (Sections 3.2 and 3.3 of the paper), and other detectors beside it."""
