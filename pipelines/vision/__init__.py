"""Models that see and answer, one paper a file."""
