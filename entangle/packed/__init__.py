"""Sparse experts that stay packed: formats, modules that compute with them, models on disk."""
