"""Class weights for a user's own models (Eq. 9 of the paper), counted over artifact-free pairs."""
