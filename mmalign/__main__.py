"""`python -m mmalign`, which is what `accelerate launch -m mmalign` runs."""

import sys

from mmalign.cli.dispatch import main

sys.exit(main())
