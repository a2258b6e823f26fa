"""Learn from people: a detector from their masks, and from their ratings how many viewers notice a region."""
