"""The commands of `desra`: from flags to a plan, a flow and a printed summary."""
