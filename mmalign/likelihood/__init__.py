"""Model and batch to log-ratio: the only move that knows the modality.

For denoisers: draws keyed by row, noised latents by forward noise or inversion, excess errors, and the reference.
"""

from mmalign.likelihood import draws
from mmalign.likelihood.config import OFFICIAL_INVERSION, InversionConfig
from mmalign.likelihood.denoising import (
    DenoisingPoint,
    excess_errors,
    forward_points,
    mean_squared_error,
    output_space_scale,
    pair_log_probs,
    prediction_error,
)
from mmalign.likelihood.grids import LandingTable, draw_timesteps, landing_table
from mmalign.likelihood.inversion import Inversion, PathPoint, RoundTrip, invert, reconstruct, round_trip
from mmalign.likelihood.reference import Reference, make_reference

__all__ = [
    "DenoisingPoint",
    "draw_timesteps",
    "draws",
    "excess_errors",
    "forward_points",
    "Inversion",
    "InversionConfig",
    "invert",
    "landing_table",
    "LandingTable",
    "make_reference",
    "mean_squared_error",
    "OFFICIAL_INVERSION",
    "output_space_scale",
    "pair_log_probs",
    "PathPoint",
    "prediction_error",
    "reconstruct",
    "Reference",
    "round_trip",
    "RoundTrip",
]
