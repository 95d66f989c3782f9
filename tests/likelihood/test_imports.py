"""Importing the likelihood pulls in torch, and none of the model libraries."""

import subprocess
import sys


def test_import_is_light() -> None:
    code = "import sys, mmalign.likelihood; print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
