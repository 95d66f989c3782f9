"""Methods for models that watch clips, one paper a file."""
