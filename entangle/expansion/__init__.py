"""Sparse Expansion: a router and one sparse expert per cluster in place of a linear layer."""
