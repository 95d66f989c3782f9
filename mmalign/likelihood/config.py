"""How latents are inverted: one frozen record, and the published scripts' constants."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """DDIM or ReNoise inversion of clean latents up to a timestep (DDIM-InPO arXiv:2503.18454, SmPO arXiv:2506.02698).

    num_steps      moves on the way to the last timestep; smaller timesteps take proportionally fewer
    renoise_steps  R, corrections a move: the prediction is repeated at the estimated target (ReNoise, arXiv:2403.14602)
    combine        which predictions e_0 … e_R move the latent: "mean" of all, "mean_refined" without e_0, "last"
    solver         "euler"; "heun" averages a prediction at the source and one at the target timestep (R does not apply)
    eta            0 is deterministic; noise of this share of the forward process is mixed into every move
    eta_form       "bayes": the inverse of DDIM-η, whose η = 1 is the forward process; "published": InPO's released code
    share_eta_noise  the two sides of a pair, laid out [chosen…, rejected…], get the same noise
    grid           "per_sample": moves of about equal length from the data to the row's timestep; "strided": landings a fixed
                   stride apart, counted down from it (for training on every landing)
    compat         "official-0.20" repeats the released scripts, defects included: the network is told the source
                   timestep (a negative one first), landings miss the conditioning timestep, τ is taken at the latter
    fp16_alphas    with compat, ᾱ in float16 where τ is taken, as released
    """

    num_steps: int = 10
    renoise_steps: int = 0
    combine: Literal["last", "mean", "mean_refined"] = "mean"
    solver: Literal["euler", "heun"] = "euler"
    eta: float = 0.0
    eta_form: Literal["bayes", "published"] = "bayes"
    share_eta_noise: bool = False
    grid: Literal["per_sample", "strided"] = "per_sample"
    compat: Literal["official-0.20"] | None = None
    fp16_alphas: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        problems = {
            "num_steps must be at least 1": self.num_steps < 1,
            "renoise_steps must not be negative": self.renoise_steps < 0,
            "combine='mean_refined' needs renoise_steps ≥ 1": self.combine == "mean_refined" and not self.renoise_steps,
            "solver='heun' is a scheme of its own: leave renoise_steps 0 and combine 'mean'": self.solver == "heun"
            and (self.renoise_steps > 0 or self.combine != "mean"),
            "eta must lie in 0 … 1": not 0 <= self.eta <= 1,
            "share_eta_noise needs eta > 0": self.share_eta_noise and self.eta == 0,
            "fp16_alphas belongs to compat='official-0.20'": self.fp16_alphas and self.compat is None,
            "compat='official-0.20' has its own grid and solver, and eta_form 'published'": self.compat is not None
            and (self.grid != "per_sample" or self.solver != "euler" or (self.eta > 0 and self.eta_form == "bayes")),
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "combine": ("last", "mean", "mean_refined"),
    "solver": ("euler", "heun"),
    "eta_form": ("bayes", "published"),
    "grid": ("per_sample", "strided"),
    "compat": (None, "official-0.20"),
}

# The constants of the released training scripts, to be used for reproducing published checkpoints only.
OFFICIAL_INVERSION: dict[str, InversionConfig] = {
    "inpo": InversionConfig(num_steps=10, eta=0.1, eta_form="published", compat="official-0.20", fp16_alphas=True),
    "smpo-sd15": InversionConfig(num_steps=5, renoise_steps=1, compat="official-0.20", fp16_alphas=True),
    "smpo-sdxl": InversionConfig(num_steps=10, renoise_steps=1, compat="official-0.20", fp16_alphas=True),
}
