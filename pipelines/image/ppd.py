"""PPD: one model for many users, who are told apart by a few of their own comparisons (Dang et al., CVPR 2025, arXiv:2501.06655).

    L = −log σ( β · (ρ_w − ρ_l) ),   ρ = −½ · (‖ε − ε_θ(x_t, c, u)‖² − ‖ε − ε_ref(x_t, c)‖²)

u are tokens made of pairs of the user who compared this one, other pairs than this. They enter by a second cross-attention beside the
network's own; it alone is trained, and the reference is the same network with it off. The authors' own training code is closed: the
form above is theirs as others report it, and what nobody reports is an option here, its default told where it stands.
"""

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mmalign.data import score_pairs
from mmalign.data.clip_users import ClipUserEncoder, clip_scorer
from mmalign.data.reward_columns import PREFIX, column_scores
from mmalign.data.users import SCORERS_FILE, UserEmbeddings, embed_users, judged_by_scorers, scorer_users
from mmalign.denoisers.user_attention import (
    FOLDER,
    UserAttention,
    UserAttentionConfig,
    detached,
    load_user_attention,
    save_user_attention,
    user_attention,
)
from mmalign.denoisers.user_mixing import UserMix, reading
from mmalign.likelihood.reference import Reference, make_reference
from mmalign.rewards import scorer
from mmalign.training.align_trainer import Losses
from mmalign.training.config import PLAYGROUND, DenoiserConfig
from mmalign.training.measurement import Pairs
from mmalign.training.pipeline import AlignPipeline
from mmalign.training.prepare import Prepared, opened, prepare_source
from mmalign.training.trainer import DenoiserTrainer
from mmalign.training.user_data import UserPairs, with_users
from mmalign.training.weights import aligned_network, users_trainable


@dataclass
class PPDConfig(DenoiserConfig):
    """Defaults of PPD; see `DenoiserConfig` for the other options.

    The presets take batch, learning rate and length from second-hand reports of the paper, and β from Diffusion-DPO: PPD's is unknown.

    users              who compared what: a file of `mmalign embed-users`, or the name of a CLIP-like scorer, which reads the pairs
                       themselves
    user_scorers       synthetic users instead: every one of these scorers compares every pair, and has a token of its own; or
                       "column:<name>", rewards that the data carry
    user_shots, user_groups   with a scorer as users: pairs of a group, and groups of a user at most
    user_dropout       share of pairs whose user is withheld. The network is then the reference, and such a pair teaches nothing: 0,
                       unless a recipe is to be repeated
    user_projection    width of a linear map of the tokens that all layers share, where tokens are wide
    user_rank          rank of the trained W'_k and W'_v, which are whole unless it is given
    user_blocks        only attention layers with one of these words in their names
    beta_elements      β holds for latents of so many numbers and is scaled to those of the run, so that errors summed over the latent
                       count the same: 65536 for β of Stable Diffusion XL
    validation_user    for whom the sample pictures are drawn
    """

    method: ClassVar[str] = "ppd"
    takes_lora: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "sd15": {
            "beta": 5000.0, "learning_rate": 1e-5, "num_train_epochs": 1,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 96, "fp16": True,
        },
        "sdxl": {
            "beta": 5000.0, "learning_rate": 1e-5, "num_train_epochs": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 768, "fp16": True,
            "gradient_checkpointing": True,
        },
        "cascade": {
            "beta": 5000.0, "beta_elements": 65536, "learning_rate": 1e-5, "num_train_epochs": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 768, "bf16": True,
            "gradient_checkpointing": True, "user_projection": 2048,
        },
        "playground": {**PLAYGROUND, "users": "playground"},
    }  # fmt: skip

    beta: float | Literal["auto"] = 5000.0
    users: str | None = "pickscore"
    user_scorers: list[str] = field(default_factory=list)
    user_shots: int = 4
    user_groups: int = 20
    user_dropout: float = 0.0
    user_projection: int | None = None
    user_rank: int | None = None
    user_blocks: list[str] = field(default_factory=list)
    beta_elements: int | None = None
    validation_user: str | None = None

    def __post_init__(self) -> None:
        if self.user_scorers and self.users == self.default("users"):
            self.users = None
        super().__post_init__()
        counted = self.users is not None and not self.users.endswith(".safetensors")
        for message, violated in {
            "say who compares: users (a file, or a CLIP-like scorer) or user_scorers, and not both": (
                (self.users is None) == (not self.user_scorers)
            ),
            "user_scorers are the comparison: leave comparison at 'human'": self.user_scorers
            and self.comparison != "human",
            "user_shots and user_groups belong to a scorer as users": not counted
            and (self.user_shots != self.default("user_shots") or self.user_groups != self.default("user_groups")),
            "validation_steps and validation_user go together: without a user PPD draws what the base draws": (
                (self.validation_steps > 0) != (self.validation_user is not None)
            ),
            "user_dropout must be 0 or more and below 1": not 0 <= self.user_dropout < 1,
            "beta_elements scales a given beta: leave it out with beta='auto'": self.beta_elements is not None
            and self.beta == "auto",
            "beta_elements must be positive": self.beta_elements is not None and self.beta_elements < 1,
            "reference has no effect on PPD: it is the network without its users": self.reference != "auto",
        }.items():
            if violated:
                raise ValueError(message)

    @classmethod
    def preset_options(cls, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the preset adds to `given`; no users of its own beside scorers."""
        added = super().preset_options(name, given)
        return {option: value for option, value in added.items() if option != "users" or not given.get("user_scorers")}

    def attention(self, users: UserEmbeddings) -> UserAttentionConfig:
        """What is put on the network for these users' tokens."""
        return UserAttentionConfig(
            width=users.width,
            encoder=users.encoder,
            projection=self.user_projection,
            rank=self.user_rank,
            blocks=tuple(self.user_blocks) or None,
        )

    def sampling(self) -> dict[str, Any]:
        """The user of the sample pictures."""
        return {"user": self.validation_user}

    def beta_of(self, elements: int) -> float:
        """β at the first step, for latents of so many numbers."""
        return self.starting_beta * (1.0 if self.beta_elements is None else elements / self.beta_elements)

    def details(self, elements: int | None) -> list[str]:
        """Who the users are, and β as it is scaled."""
        lines = [*super().details(elements), f"users: {self.users or 'scorers ' + ', '.join(self.user_scorers)}"]
        if self.beta_elements is not None and elements is not None:
            lines.append(
                f"beta {self.starting_beta:g} at {self.beta_elements:,} numbers a latent is {self.beta_of(elements):g} at {elements:,}"
            )
        return lines


class PPDTrainer(DenoiserTrainer):
    """Trains PPD; arguments as in `DenoiserTrainer`, without a peft_config: a LoRA on the pipeline stays as it is.

    Evaluation also tells how often the implicit preference is right when every pair is told of another user
    ("users/shuffled_accuracies"); the difference, "users/gap", is what the model knows of its users.
    """

    config_class = PPDConfig
    args: PPDConfig
    _train: UserPairs
    _others = False

    def check_arguments(self, args: PPDConfig, train_dataset: Any, eval_dataset: Any, peft_config: Any) -> None:
        """ValueError for what cannot work, before anything is read or moved."""
        super().check_arguments(args, train_dataset, eval_dataset, peft_config)
        if args.validation_user is not None and not isinstance(self.pipe, PPDPipeline):
            raise ValueError(
                "validation_user needs a PPDPipeline, whose call takes a user: PPDPipeline.from_pipe(model)"
            )
        if peft_config is not None:
            raise ValueError("PPD trains a user attention and no LoRA: leave peft_config out")

    def prepare_data(self, data: Any, args: Any, *, like: Any = None) -> Any:
        """Encoded and compared pairs with their users' embeddings."""
        if isinstance(data, UserPairs):
            return data
        source = opened(data, args, like)
        progress = not args.disable_tqdm
        if args.user_scorers:
            judges = {
                name: None if name.startswith(PREFIX) else scorer(name, device=args.device)
                for name in args.user_scorers
            }
            scores = {
                name: column_scores(source, name)
                if judge is None
                else score_pairs(source, judge, cache_dir=args.cache_dir, progress=progress)
                for name, judge in judges.items()
            }
            source, users = judged_by_scorers(source, scores), scorer_users(args.user_scorers)
        elif args.users.endswith(".safetensors"):
            users = UserEmbeddings.load(args.users)
        else:
            users = embed_users(
                source,
                ClipUserEncoder(clip_scorer(args.users, args.device)),
                shots=args.user_shots,
                per_user=args.user_groups,
                seed=args.seed,
                progress=progress,
            )
        return with_users(prepare_source(source, self.denoiser, args, like=like), source, users)

    def made_trainable(self, args: PPDConfig, peft_config: Any) -> AbstractContextManager[None]:
        """The user attention, and nothing else."""
        return users_trainable(self.network, args.attention(self._train.users), args.seed)

    def make_reference(self, ref_model: Any) -> Reference:
        """The network without its users."""
        if ref_model is not None:
            raise ValueError("PPD's reference is the pipeline without its users: leave ref_model out")
        return make_reference(self.network, kind="none" if self.args.is_reference_free else "users")

    def set_up(self) -> None:
        """As for every method, with β scaled to the latents; the users can then be named in the pipeline's call."""
        super().set_up()
        self.beta = self.args.beta_of(self.elements)
        if isinstance(self.pipe, PPDPipeline):
            self.pipe.users = self._train.users

    def _write_card(self, folder: Path) -> None:
        """With the scorers' tokens where they are the users: those of people are never written, they tell what people like."""
        super()._write_card(folder)
        if self.args.user_scorers:
            self._train.users.save(folder / SCORERS_FILE)

    def row_losses(self, model: nn.Module, inputs: dict[str, Any], *, epoch: int, data: Prepared) -> Losses:
        """As for every method; in evaluation also with every pair told of another user."""
        found = super().row_losses(model, inputs, epoch=epoch, data=data)
        name = "rewards/accuracies"
        if epoch >= 0 or name not in found.panel or not isinstance(data, UserPairs) or len(data.users) < 2:
            return found
        self._others = True
        try:
            shuffled = super().row_losses(model, inputs, epoch=epoch, data=data).panel[name]
        finally:
            self._others = False
        right, weight = found.panel[name]
        gap = right - shuffled[0]
        return replace(found, panel={**found.panel, "users/shuffled_accuracies": shuffled, "users/gap": (gap, weight)})

    def _pairs(self, data: Prepared, inputs: dict[str, Any], epoch: int) -> Pairs:
        pairs = super()._pairs(data, inputs, epoch)
        assert isinstance(data, UserPairs)
        tokens, weight = data.told(
            pairs.rows,
            seed=self.args.seed,
            epoch=epoch,
            dropout=self.args.user_dropout if epoch >= 0 else 0.0,
            others=self._others,
        )
        conditioning = replace(
            pairs.conditioning,
            user=tokens.repeat(pairs.sides, 1, 1).to(pairs.x0.device),
            user_weight=weight.repeat(pairs.sides).to(pairs.x0.device),
        )
        return replace(pairs, conditioning=conditioning)


User = str | Tensor | Mapping[str, float]


class PPDPipeline(AlignPipeline):
    """A text-to-image pipeline that PPD teaches its users: `pipe(prompt, user=…)` draws for one of them, `pipe(prompt)` as the base.

    users: the embeddings in which names are looked up; None until they are set or training leaves them there.
    """

    config_class = PPDConfig
    trainer_class = PPDTrainer
    users: UserEmbeddings | None = None
    _detached: UserAttention | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        # A class is made for every base family; its call takes what the family's takes, and the user.
        super().__init_subclass__(**options)
        cls.__call__ = _call_for(super().__call__)  # type: ignore[method-assign, misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Loads any supported text-to-image pipeline, and the user attention where it was saved with one."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = _own_folder(str(pretrained_model_name_or_path), options.get("revision"))
        network = aligned_network(pipe)[1]
        if folder is not None and user_attention(network) is None:
            load_user_attention(network, folder).to(next(network.parameters()).dtype)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Saves a folder that plain diffusers loads and draws the base's pictures with; the user attention lies in its own subfolder.

        Embeddings of users are not written: they tell what people like.
        """
        network = aligned_network(self)[1]
        if user_attention(network) is None:
            super().save_pretrained(save_directory, **options)
            return
        with detached(network) as self._detached:
            try:
                super().save_pretrained(save_directory, **options)
            finally:
                self._detached = None

    def _save_more(self, folder: Path) -> None:
        if self._detached is not None:
            save_user_attention(self._detached, folder)

    def user_tokens(self, user: User) -> Tensor:
        """Tokens (L, D) of a user: a name, tokens as they are, or names with weights, whose tokens are summed."""
        if isinstance(user, Tensor):
            return user
        if self.users is None:
            raise ValueError(
                f"user {user!r} cannot be looked up: set pipe.users = UserEmbeddings.load(…), or pass tokens (L, D)"
            )
        branch = user_attention(aligned_network(self)[1])
        learned = {} if branch is None else branch.config.encoder
        if learned and self.users.encoder and self.users.encoder != learned:
            raise ValueError(
                f"pipe.users were made by {_told(self.users.encoder)}, and this model learned to read {_told(learned)}: make them anew "
                "with its encoder"
            )
        if isinstance(user, str):
            return self.users.user(user)
        return torch.stack([weight * self.users.user(name) for name, weight in user.items()]).sum(0)

    def user_mix(self, user: User | Sequence[User], scale: float, mix: str, prompts: int, images: int) -> UserMix:
        """What the network reads for `prompts` prompts with `images` pictures each."""
        given: list[Any] = list(user) if isinstance(user, list | tuple) else [user] * prompts
        if len(given) != prompts:
            raise ValueError(f"{prompts} prompts need one user or {prompts}, got {len(given)}")
        if mix == "tokens":
            parts = [(torch.stack([self.user_tokens(one) for one in given]), scale)]
        elif mix == "scores":
            weighted = [one if isinstance(one, Mapping) else None for one in given]
            first = weighted[0]
            if first is None or any(one != first for one in weighted):
                raise ValueError("user_mix='scores' needs one mapping of names to weights for all prompts")
            parts = [(self.user_tokens(name).expand(prompts, -1, -1), scale * weight) for name, weight in first.items()]
        else:
            raise ValueError(f"user_mix must be 'tokens' or 'scores', got {mix!r}")
        return UserMix([(tokens.repeat_interleave(images, 0), weight) for tokens, weight in parts], mix == "scores")


def _call_for(base: Any) -> Any:
    """A family's call with three more arguments."""

    @functools.wraps(base)
    def call(
        self: Any,
        *args: Any,
        user: User | Sequence[User] | None = None,
        user_scale: float = 1.0,
        user_mix: Literal["tokens", "scores"] = "tokens",
        **options: Any,
    ) -> Any:
        if user is None:
            return base(self, *args, **options)
        asked = inspect.signature(base).bind(self, *args, **options)
        given = asked.arguments
        if given.get("true_cfg_scale", 1.0) != 1.0:
            raise ValueError(
                "true_cfg_scale runs a second network call that cannot be told from the first: leave user or it out"
            )
        prompt: Any = given.get("prompt")
        prompts = 1 if isinstance(prompt, str) else len(given["prompt_embeds"] if prompt is None else prompt)
        images = given.get("num_images_per_prompt") or 1
        mix = self.user_mix(user, user_scale, user_mix, prompts, images)
        with reading(aligned_network(self)[1], mix):
            return base(self, *args, **options)

    signature = inspect.signature(base)
    kinds = inspect.Parameter
    own = [kinds(name, kinds.KEYWORD_ONLY, default=value) for name, value in _CALL.items()]
    named = [part for part in signature.parameters.values() if part.kind is not kinds.VAR_KEYWORD]
    rest = [part for part in signature.parameters.values() if part.kind is kinds.VAR_KEYWORD]
    call.__signature__ = signature.replace(parameters=[*named, *own, *rest])  # type: ignore[attr-defined]
    return call


_CALL = {"user": None, "user_scale": 1.0, "user_mix": "tokens"}


def _told(encoder: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {str(value)[:40]}" for name, value in sorted(encoder.items()))


def _own_folder(name: str, revision: str | None) -> Path | None:
    """Where a saved pipeline's user attention lies; None where it has none."""
    folder = Path(name).expanduser()
    if folder.exists() or name.count("/") != 1:
        return folder if (folder / FOLDER).is_dir() else None
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=revision, allow_patterns=[f"{FOLDER}/*"]))
    return folder if (folder / FOLDER).is_dir() else None
