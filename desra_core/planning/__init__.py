"""Cache keys of every product, and which images lack it: what is left to do."""
