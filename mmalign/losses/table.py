"""The table: every loss by name. A plain dict; a callable is accepted wherever a name is."""

from dataclasses import dataclass

from mmalign.losses import absolute, diffusion, links, logistic, reference_free, transport, unpaired
from mmalign.losses.info import LossFunction, LossInfo, PublishedBeta, hyper_parameters, keywords

PAIR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
POLICY = ("policy_chosen", "policy_rejected")
SINGLE = ("policy", "reference", "label")
LENGTHS = ("chosen_length", "rejected_length")
ANY, TOKEN, DENOISER = ("token", "denoiser"), ("token",), ("denoiser",)

TWO_TERMS = "it is not a function of one margin, which is what a signed strength scales"
KEEPS_CHOSEN = (
    "its likelihood term always raises the chosen side, which a negative strength would turn into the worse one"
)
SORTED = "its items are order statistics of the batch, not pairs"
UNPAIRED = "its items are single samples, without a margin"

TRL = PublishedBeta(0.1, 0.1, "TRL's default, log-probabilities summed over tokens")
LFM2 = PublishedBeta(5.0, 5.0, "LFM2's preference stage, as third parties report it; log-ratios per token")
DIFFUSION_DPO = (
    PublishedBeta(2000.0, 2000.0, "Diffusion-DPO paper, SD1.5; −½ · mean squared error (SDXL: 5000)"),
    PublishedBeta(5000.0, 5000.0, "Diffusion-DPO launchers; −½ · mean squared error"),
    PublishedBeta(2500.0, 5000.0, "diffusers' SD1.5 LoRA script, which omits the ½"),
)


def _paper(beta: float) -> PublishedBeta:
    return PublishedBeta(beta, beta, "the paper, log-probabilities summed over tokens")


@dataclass(frozen=True, slots=True)
class Loss:
    """An entry: the function and what there is to say about it."""

    function: LossFunction
    info: LossInfo


def _entry(
    function: LossFunction,
    meaning: str,
    arxiv: str,
    *,
    key: str = "",
    inputs: tuple[str, ...] = PAIR,
    optional: tuple[str, ...] = (),
    modalities: tuple[str, ...] = ANY,
    batch_coupled: bool = False,
    betas: tuple[PublishedBeta, ...] = (),
    no_strength: str = "",
    no_weight: str = "",
) -> Loss:
    name = function.__name__
    if ("strength" in keywords(function)) == bool(no_strength):
        raise TypeError(f"{name} must either take a strength or say why not")
    required, hyper = hyper_parameters(function)
    info = LossInfo(
        key=key or name,
        meaning=meaning,
        arxiv=arxiv,
        inputs=inputs,
        optional=optional,
        required=required,
        hyper=hyper,
        modalities=modalities,
        reference_free=not any(field.startswith("reference") for field in inputs),
        batch_coupled=batch_coupled,
        unpaired="label" in inputs,
        betas=betas,
        no_strength=no_strength,
        no_weight=no_weight,
        alias_of=name if key and key != name else "",
    )
    return Loss(function, info)


_ENTRIES = (
    # one margin, logistic link
    _entry(logistic.sigmoid, "DPO: log-odds of the label", "2305.18290", betas=(TRL, *DIFFUSION_DPO)),
    _entry(
        logistic.sigmoid_norm,
        "DPO on log-ratios per token",
        "2407.15229",
        inputs=PAIR + LENGTHS,
        betas=(LFM2,),
    ),
    _entry(
        logistic.sigmoid_norm,
        "DPO on log-ratios per token",
        "2407.15229",
        key="ln_dpo",
        inputs=PAIR + LENGTHS,
        betas=(LFM2,),
    ),
    _entry(
        logistic.cdpo, "DPO with smoothed labels: the margin stays finite", "2305.18290", betas=(TRL, *DIFFUSION_DPO)
    ),
    _entry(logistic.robust, "DPO made unbiased under flipped labels", "2403.00409", betas=(TRL, *DIFFUSION_DPO)),
    # one margin, other links
    _entry(
        links.hinge,
        "hinge: pairs beyond a margin stop teaching",
        "2309.06657",
        betas=(PublishedBeta(0.05, 0.05, "RSO's γ, log-probabilities summed over tokens"),),
    ),
    _entry(
        links.ipo,
        "square: aims at a margin of 1/(2β)",
        "2310.12036",
        optional=LENGTHS,
        betas=(PublishedBeta(0.1, 0.1, "TRL's default, log-ratios per token; the paper's τ"),),
    ),
    _entry(links.exo_pair, "reverse KL to a smoothed label", "2402.00856", betas=(TRL,)),
    _entry(
        links.discopop,
        "a blend of logistic and exponential, found by search",
        "2406.08414",
        betas=(_paper(0.05),),
    ),
    # each side held to a level of its own
    _entry(
        absolute.nca_pair,
        "noise contrast: holds the chosen likelihood up",
        "2402.05369",
        no_strength=TWO_TERMS,
        betas=(_paper(0.01),),
    ),
    _entry(
        absolute.bco_pair,
        "two binary classifiers, no reward shift",
        "2404.04656",
        no_strength=TWO_TERMS,
        betas=(TRL, PublishedBeta(0.01, 0.01, "TRL's recipe of the paper")),
    ),
    _entry(
        absolute.sppo_hard,
        "self-play: square loss to ±1/(2β) on each side",
        "2405.00675",
        no_strength=TWO_TERMS,
        betas=(PublishedBeta(1e-3, 1e-3, "the GPO scripts (arXiv:2410.02197), which share this layout"),),
    ),
    _entry(
        absolute.apo_zero,
        "anchored: chosen up, rejected down",
        "2408.06266",
        no_strength=TWO_TERMS,
        betas=(_paper(0.1),),
    ),
    _entry(
        absolute.apo_down,
        "anchored: both down, the rejected one more",
        "2408.06266",
        no_strength=TWO_TERMS,
        betas=(_paper(0.1),),
    ),
    _entry(
        absolute.ln_pref,
        "LFM2-style: DPO on rewards per token, and each side to its level",
        "2511.23404",
        inputs=PAIR + LENGTHS,
        no_strength=TWO_TERMS,
        betas=(LFM2,),
    ),
    # sorted batches
    _entry(
        transport.aot,
        "optimal transport of pair margins, policy against reference",
        "2406.05882",
        batch_coupled=True,
        no_strength=SORTED,
        no_weight=SORTED,
        betas=(_paper(0.01),),
    ),
    _entry(
        transport.aot_unpaired,
        "optimal transport of log-ratios, chosen against rejected",
        "2406.05882",
        batch_coupled=True,
        no_strength=SORTED,
        no_weight=SORTED,
        betas=(_paper(0.01),),
    ),
    # no reference
    _entry(
        reference_free.sft,
        "supervised learning on the chosen side",
        "2405.16436",
        inputs=("policy_chosen",),
        optional=("chosen_length",),
        no_strength=KEEPS_CHOSEN,
    ),
    _entry(
        reference_free.simpo,
        "log-probability per token, with a target margin",
        "2405.14734",
        inputs=POLICY + LENGTHS,
        betas=(
            PublishedBeta(2.0, 2.0, "the paper, base models (to 2.5), γ/β from .3 to .55; log-probabilities per token"),
            PublishedBeta(10.0, 10.0, "the paper, instruct models; log-probabilities per token"),
        ),
    ),
    _entry(
        reference_free.cpo,
        "DPO under a uniform reference, plus likelihood of the chosen side",
        "2401.08417",
        inputs=POLICY,
        optional=("chosen_length",),
        no_strength=KEEPS_CHOSEN,
        betas=(TRL,),
    ),
    _entry(
        reference_free.orpo,
        "supervised learning plus the odds ratio of the two sides",
        "2403.07691",
        inputs=POLICY + LENGTHS,
        modalities=TOKEN,
        no_strength=KEEPS_CHOSEN,
        betas=(PublishedBeta(0.1, 0.1, "the paper's λ, a weight outside the logarithm"),),
    ),
    # single samples
    _entry(
        unpaired.kto,
        "prospect theory: gains and losses from a KL baseline",
        "2402.01306",
        inputs=(*SINGLE, "kl"),
        batch_coupled=True,
        no_strength=UNPAIRED,
        betas=(TRL,),
    ),
    _entry(
        unpaired.apo_zero_unpaired,
        "anchored: liked up, disliked down",
        "2408.06266",
        inputs=SINGLE,
        no_strength=UNPAIRED,
        betas=(TRL,),
    ),
    _entry(
        unpaired.bco,
        "binary classifier around a reward shift",
        "2404.04656",
        inputs=SINGLE,
        batch_coupled=True,
        no_strength=UNPAIRED,
        betas=(TRL, PublishedBeta(0.01, 0.01, "TRL's recipe of the paper")),
    ),
    # denoisers
    _entry(
        diffusion.diffusion_kto,
        "KTO for denoisers; the baseline is the batch mean",
        "2404.04465",
        inputs=SINGLE,
        optional=("kl",),
        modalities=DENOISER,
        batch_coupled=True,
        no_strength=UNPAIRED,
        betas=(PublishedBeta(1000.0, 2000.0, "the release, which omits the ½ of −½ · mean squared error"),),
    ),
    _entry(
        diffusion.mapo,
        "reference-free margin of a bounded score, plus the denoising error",
        "2406.06424",
        inputs=POLICY,
        modalities=DENOISER,
        no_strength=KEEPS_CHOSEN,
        betas=(PublishedBeta(0.1, 0.1, "the release; a weight outside the logarithm, so the ½ does not touch it"),),
    ),
    _entry(
        diffusion.sdpo,
        "DPO whose rejected gradient cannot harm the chosen side",
        "2511.03317",
        modalities=DENOISER,
        betas=(PublishedBeta(5000.0, 5000.0, "the release's Diffusion-DPO launchers; −½ · mean squared error"),),
    ),
)

LOSSES: dict[str, Loss] = {entry.info.key: entry for entry in _ENTRIES}
