"""The options of preference training of models that answer in tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mmalign import losses
from mmalign.data.answer_records import AnswerPair
from mmalign.data.answer_tokens import EncodedAnswers
from mmalign.training.align_config import AlignConfig
from mmalign.training.inherited import REFUSED_OF_TOKENS
from mmalign.training.loss_config import LossConfig
from mmalign.training.token_checks import check_token_losses, check_tokens

# What the models and pairs that ship with the package train well with (benchmarks/answers.py).
PLAYGROUND: dict[str, Any] = {
    "beta": 2.0, "learning_rate": 1e-4, "max_steps": 150, "per_device_train_batch_size": 16, "warmup_steps": 10,
    "gradient_checkpointing": False,
}  # fmt: skip


@dataclass
class TokenConfig(LossConfig, AlignConfig):
    """Options of DPO and of every loss of pairs or of single answers in `mmalign.losses`, beside those of `AlignConfig`.

    beta               scale of the log-ratio; TRL's convention, log-probabilities summed over tokens
    logps              what an answer's log-probability is: the "sum" over its tokens, their "mean", or "ld", in which tokens behind the
                       length of the pair's shorter answer count `ld_alpha` (LD-DPO)
    ld_alpha           with logps "ld": between 0 (they do not count) and 1 (the sum)
    joint              the prompt's words count too: log π(x, y) instead of log π(y | x)
    desirable_weight, undesirable_weight   of liked and disliked answers, with losses of single answers, for which a pair is one of each
    max_length         tokens of prompt and answer; a longer row is a bad one
    truncate           "answer": instead of that, a long row loses its answer's end; prompts and their media are never cut
    num_frames         frames of a clip, sampled evenly from it; None is all that the data have
    processor_kwargs   for the model's processor, such as its image budget
    on_bad_row         "raise": rows that cannot be read stop the run before it starts; "skip": they are left out and told
    trained_parts      "lm": the language model; "lm+projector": and what brings pictures into it; "all": and the encoders
    reference          "adapter" (the LoRA off), "copy" (a frozen copy), or "auto": whichever fits
    reference_cache    keep the reference's log-probability of every token in cache_dir: a second run over the same rows then needs no
                       pass of the reference
    share_prompt       the prompt is read once for both answers, where the model's cache allows it; saves time on long prompts
    """

    method: ClassVar[str] = "token-dpo"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"playground": PLAYGROUND}
    refused: ClassVar[Mapping[str, str]] = REFUSED_OF_TOKENS
    not_the_run: ClassVar[frozenset[str]] = AlignConfig.not_the_run | {"on_bad_row"}
    # Whether a method's loss reads KL(π_ref ‖ π) at every token.
    needs_kl: ClassVar[bool] = False

    beta: float = 0.1
    logps: Literal["sum", "mean", "ld"] = "sum"
    ld_alpha: float | None = None
    joint: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    max_length: int | None = None
    truncate: Literal["answer"] | None = None
    num_frames: int | None = None
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    on_bad_row: Literal["raise", "skip"] = "raise"
    trained_parts: Literal["lm", "lm+projector", "all"] = "lm"
    reference: Literal["auto", "adapter", "copy"] = "auto"
    reference_cache: bool = False
    share_prompt: bool = False

    weight_decay: float = 0.0
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        self.list_losses()
        super().__post_init__()
        check_tokens(self)
        self._check_losses()

    def _check_losses(self) -> None:
        check_token_losses(self)

    @property
    def starting_beta(self) -> float:
        """β."""
        return self.beta

    @property
    def is_unpaired(self) -> bool:
        """Losses of single answers, liked or not."""
        return any(losses.get(key).unpaired for key in self.loss_type)

    @property
    def is_per_token(self) -> bool:
        """The losses that scale rewards by β divide them by the answers' lengths themselves."""
        scaled = [info for info in map(losses.get, self.loss_type) if "beta" in info.hyper]
        return bool(scaled) and all("chosen_length" in info.inputs for info in scaled)

    def loss_options(self) -> dict[str, Any]:
        """The hyper-parameters that go to `losses.compute`."""
        options = super().loss_options()
        if self.is_unpaired:
            options |= {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return options

    def taken(self, pair: AnswerPair) -> AnswerPair:
        """A row as the method takes it; may raise InvalidRow. Whole answers are compared: their marked phrases count for nothing."""
        return replace(pair, chosen_marks=None, rejected_marks=None)

    def taking(self) -> dict[str, Any]:
        """The options that `taken` reads."""
        return {}

    def check_encoded(self, pair: AnswerPair, encoded: EncodedAnswers) -> None:
        """InvalidRow for a row of whose tokens the method can make nothing."""

    def about(self) -> str:
        """The loss, of which log-probabilities."""
        told = {"sum": "summed over tokens", "mean": "per token", "ld": f"behind the shorter answer × {self.ld_alpha}"}
        joint = ", prompt included" if self.joint else ""
        return f"loss={self.objective()}, log-probabilities {told[self.logps]}{joint}"

    def details(self, elements: int | None) -> list[str]:
        """β, and what is trained."""
        lines = [f"beta {self.beta:g}"] if self.takes_beta else []
        if self.trained_parts != "lm":
            lines.append(f"trained: {self.trained_parts}")
        return lines
