"""Performance measurements; each module prints one table."""
