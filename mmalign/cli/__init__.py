"""The command line: `mmalign VERB …`, or `python -m mmalign VERB …` where a launcher wants a module."""

from mmalign.cli.dispatch import main

__all__ = ["main"]
