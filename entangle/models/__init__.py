"""Loading language models and addressing their linear layers."""
