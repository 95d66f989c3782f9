"""Where the playground's files lie, in a checkout and in an installed wheel alike."""

from importlib.resources import files
from pathlib import Path

ASSETS = Path(str(files("mmalign"))) / "assets"
STABLE_DIFFUSION = ASSETS / "stable-diffusion"
SCENES = ASSETS / "stable-diffusion-scenes"
JUDGES = ASSETS / "judges"
REWARD_CLIP = ASSETS / "reward-clip"
PAIRS = ASSETS / "pairs"
CURVES = ASSETS / "curves"
VISION = ASSETS / "lfm2-vl"
VIDEO = ASSETS / "llava-onevision"
