"""`python -m mmalign.cli`, which is what `accelerate launch -m mmalign.cli` runs."""

import sys

from mmalign.cli.dispatch import main

sys.exit(main())
