"""Command line: parse, call, write. Heavy imports happen inside the commands."""
