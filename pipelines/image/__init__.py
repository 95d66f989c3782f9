"""Text-to-image methods, one paper a file."""
