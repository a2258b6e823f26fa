"""Find the cache key of each product of a run, and the images that lack the product."""
