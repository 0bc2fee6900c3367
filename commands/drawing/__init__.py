"""Commands that draw, one per file."""
