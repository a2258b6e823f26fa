"""Super-resolution: checkpoints to networks, photos to results of a bounded amount of memory."""
