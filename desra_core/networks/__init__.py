"""Load SR and segmentation networks from checkpoints, enlarge photos, and label the pixels of results."""
