"""One paper, one file: its Pipeline, its Config, its Trainer."""
