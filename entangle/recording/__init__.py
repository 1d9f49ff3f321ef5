"""Watching a model's linear layers while it runs: the only place that registers hooks."""
