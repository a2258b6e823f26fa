"""The commands of `desra`: flags in, a plan, a flow, a summary out."""
