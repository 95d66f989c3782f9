"""The scorers that `mmalign.rewards.scorer` makes: a table that the command line can show without loading torch."""

# Each also as "<name>:<file>", which reads the published weights from a file of your own.
FROM_FILES = ("hpsv2", "hpsv2.1", "hpsv3", "aesthetic", "imagereward")
SCORERS = ("pickscore", "denscore", *FROM_FILES, "clip:<Hub id or folder>", "denscore:<Hub id or folder>", "playground")
