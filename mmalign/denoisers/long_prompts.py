"""Prompts longer than CLIP's 77 positions, for any pipeline with a CLIP: read in segments (LongAlign, arXiv:2410.11817).

    read_long_prompts(pipe, LongPrompts())      # from now on, in training as in drawing; None: cut at 77 again

It takes the place of the pipeline's own `encode_prompt`, through which its call and our adapters get all their text.
Shapes: B prompts, S segments of P = 77 positions, L = max_tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from mmalign.denoisers.segments import SEGMENT_TOKENS, segments
from mmalign.denoisers.text_adapter import T5Tail

# In the folder of a saved pipeline: how it reads prompts.
SETTINGS = "long_prompts.json"
# Of the empty text's positions, the last ones: their mean is pad*.
_PAD_POSITIONS = 60
# Changes whenever the segments or embeddings of a prompt do.
_RULE = 1
# Whose meaning is another text beside the prompt, or other layers than those that are read here.
_REFUSED = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "clip_skip")


@dataclass(frozen=True, kw_only=True)
class LongPrompts:
    """How a long prompt becomes one sequence of embeddings.

    layout      "segments": each segment is encoded by itself and keeps its start and its words; ends and padding are dropped, and the
                rest up to max_tokens is filled with pad*, the mean padding of the empty text. "concatenate": all 77 positions of each
                segment one after the other, the naive way
    max_tokens  embeddings a prompt may have; "concatenate" rounds up to whole segments
    pack        short sentences share a segment
    compat      "longalign": the released splitter, for the released weights
    """

    layout: Literal["segments", "concatenate"] = "segments"
    max_tokens: int = 240
    pack: bool = False
    compat: Literal["longalign"] | None = None

    def __post_init__(self) -> None:
        problems = {
            f"layout must be 'segments' or 'concatenate', got {self.layout!r}": self.layout
            not in ("segments", "concatenate"),
            f"max_tokens must be at least 77, got {self.max_tokens}": self.max_tokens < 77,
            f"compat must be 'longalign' or None, got {self.compat!r}": self.compat not in ("longalign", None),
            "compat='longalign' has its own segments: leave pack off and layout 'segments'": self.compat is not None
            and (self.pack or self.layout != "segments"),
        }
        for message, violated in problems.items():
            if violated:
                raise ValueError(message)


class Segmented(NamedTuple):
    """Embeddings, the mean pooled text of a prompt's segments, and where the embeddings are words or starts, not padding."""

    embeds: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B P"] | None
    mask: Bool[Tensor, "B L"]


class _Clip(NamedTuple):
    tokenizer: Any
    encoder: Any


class _Read(NamedTuple):
    """One CLIP's (S, 77, D) states, pooled text (S, P), and where words or starts are (S, 77); the last row is the empty text."""

    states: Tensor
    pooled: Tensor | None
    kept: Tensor


class SegmentEncoder:
    """The CLIPs of a pipeline, side by side, over the segments of a prompt.

    `penultimate`: states before the last layer, as SDXL and SD3 have them. `pooled`: which of the CLIPs' pooled texts are read.
    """

    def __init__(
        self, clips: Sequence[tuple[Any, Any]], config: LongPrompts, *, penultimate: bool, pooled: Sequence[int]
    ) -> None:
        self.clips = [_Clip(*clip) for clip in clips]
        self.config = config
        self._penultimate, self._pooled = penultimate, pooled

    def segments(self, prompt: str) -> list[str]:
        """The prompt's segments, before any cut at max_tokens."""
        return segments(prompt, self._length, pack=self.config.pack, compat=self.config.compat)

    def num_tokens(self, prompt: str) -> int:
        """Embeddings that the prompt would fill: Σ (1 + words) over its segments, or 77 each."""
        pieces = self.segments(prompt)
        if self.config.layout == "concatenate":
            return len(pieces) * self._positions
        return sum(1 + min(self._length(piece), SEGMENT_TOKENS) for piece in pieces)

    @property
    def num_embeddings(self) -> int:
        """L: how many embeddings every prompt gets."""
        whole = -(-self.config.max_tokens // self._positions) * self._positions
        return whole if self.config.layout == "concatenate" else self.config.max_tokens

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts fill more embeddings than there are, or have a segment that is cut (compat only)."""
        return sum(
            self.num_tokens(prompt) > self.num_embeddings
            or any(self._length(piece) > SEGMENT_TOKENS for piece in self.segments(prompt))
            for prompt in prompts
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Segmented:
        """The prompts' embeddings; the second and further CLIPs' stand beside the first's."""
        pieces = [self.segments(prompt) for prompt in prompts]
        texts = [piece for prompt in pieces for piece in prompt]
        reads = [self._read(clip, [*texts, ""]) for clip in self.clips]
        if any(not torch.equal(read.kept.cpu(), reads[0].kept.cpu()) for read in reads):
            raise ValueError("the pipeline's two CLIPs cut words differently, so that their segments do not line up")
        states = torch.cat([read.states.to(reads[0].states) for read in reads], dim=-1)
        lengths = [len(prompt) for prompt in pieces]
        rows = [
            self._row(*part, states[-1])
            for part in zip(states[:-1].split(lengths), reads[0].kept[:-1].split(lengths), strict=True)
        ]
        pooled = None
        if self._pooled:
            each = torch.cat([_pooled(reads[place]) for place in self._pooled], dim=-1)[:-1]
            pooled = torch.stack([part.mean(0) for part in each.split(lengths)])
        return Segmented(torch.stack([row for row, _ in rows]), pooled, torch.stack([mask for _, mask in rows]))

    @property
    def _positions(self) -> int:
        return self.clips[0].tokenizer.model_max_length

    def _length(self, text: str) -> int:
        ids = self.clips[0].tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return len(ids)

    def _row(self, states: Tensor, kept: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """One prompt's segments (s, 77, D) as L embeddings and their mask."""
        if self.config.layout == "concatenate":
            missing = self.num_embeddings // self._positions - len(states)
            states = torch.cat([states, empty.expand(max(0, missing), -1, -1)]).flatten(0, 1)
            kept = functional.pad(kept.flatten(), (0, len(states) - kept.numel()))
            return states[: self.num_embeddings], kept[: self.num_embeddings]
        words = states[kept][: self.num_embeddings]
        room = self.num_embeddings - len(words)
        padding = empty[-_PAD_POSITIONS:].mean(0).expand(room, -1)
        mask = torch.arange(self.num_embeddings, device=words.device) < len(words)
        return torch.cat([words, padding]), mask

    def _read(self, clip: _Clip, texts: Sequence[str]) -> _Read:
        device = next(clip.encoder.parameters()).device
        tokens = clip.tokenizer(
            list(texts),
            padding="max_length",
            max_length=clip.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        # CLIP reads from left to right: what stands behind a word does not change it, and needs no mask.
        output = clip.encoder(tokens.input_ids, output_hidden_states=self._penultimate)
        # By the mask, not by the padding's id: SDXL's second tokenizer pads with the id of "!".
        kept = tokens.attention_mask.bool() & (tokens.input_ids != clip.tokenizer.eos_token_id)
        states = output.hidden_states[-2] if self._penultimate else output.last_hidden_state
        pooled = output.get("text_embeds", output.get("pooler_output"))
        return _Read(states, pooled, kept)


def _pooled(read: _Read) -> Tensor:
    assert read.pooled is not None
    return read.pooled


class LongPromptReader:
    """Stands in for a pipeline's `encode_prompt`, with its arguments and results.

    `tail`: further embeddings behind CLIP's, from the whole prompt.
    """

    def __init__(self, pipe: Any, family: str, config: LongPrompts, tail: T5Tail | None = None) -> None:
        if family not in _CLIPS:
            raise ValueError(
                f"{family} reads prompts by T5 alone, or was never tried with more than one segment: leave long_prompts out; it serves "
                f"{', '.join(_CLIPS)}"
            )
        names, penultimate, pooled = _CLIPS[family]
        clips = [(getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")) for name in names]
        self.family, self.config, self.tail = family, config, tail
        self.encoder = SegmentEncoder(clips, config, penultimate=penultimate, pooled=pooled)
        self._pipe = pipe
        self._original = type(pipe).encode_prompt
        self._signature = inspect.signature(self._original)

    @property
    def settings(self) -> dict[str, Any]:
        """All that its embeddings depend on beside the networks, as JSON values."""
        tail = {} if self.tail is None else {"tail_tokens": self.tail.max_tokens}
        return asdict(self.config) | {"rule": _RULE} | tail

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks beside the pipeline's own parts that prompts go through, by name."""
        return {} if self.tail is None else self.tail.networks

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than CLIP's segments have room for."""
        return self.encoder.count_truncated(prompts)

    def __call__(self, *args: Any, **options: Any) -> Any:
        bound = self._signature.bind(self._pipe, *args, **options)
        bound.apply_defaults()
        given = bound.arguments
        for name in _REFUSED:
            # Every text encoder reads the same text, which pipelines may say explicitly.
            if given.get(name) not in (None, given.get(name.rpartition("_")[0])):
                raise ValueError(f"{name} has no effect with long_prompts: leave one of the two out")
        if given["prompt_embeds"] is None:
            prompts = [given["prompt"]] if isinstance(given["prompt"], str) else list(given["prompt"])
            given["prompt"] = prompts
            self._fill(given, "", self._encode(prompts, given))
        if given.get("do_classifier_free_guidance") and given["negative_prompt_embeds"] is None:
            self._fill(given, "negative_", self._negative(given))
        return self._original(*bound.args, **bound.kwargs)

    def _negative(self, given: dict[str, Any]) -> Segmented:
        number, negative = len(given["prompt_embeds"]), given["negative_prompt"]
        if self.family in _REPEATED_BY_US:
            number //= given["num_images_per_prompt"]
        texts = list(negative) if isinstance(negative, list | tuple) else [negative or ""] * number
        if len(texts) != number:
            raise ValueError(f"{number} prompts and {len(texts)} negative prompts: give one, or as many")
        encoded = self._encode(texts, given)
        if negative is None and self._pipe.config.get("force_zeros_for_empty_prompt", False):
            assert encoded.pooled is not None
            return Segmented(torch.zeros_like(encoded.embeds), torch.zeros_like(encoded.pooled), encoded.mask)
        return encoded

    def _encode(self, prompts: list[str], given: dict[str, Any]) -> Segmented:
        read = self.encoder(prompts)
        embeds, pooled = read.embeds, read.pooled
        if self.family == "flux":
            embeds = self._t5(prompts, given)
        elif self.family == "stable-diffusion-3":
            t5 = self._t5(prompts, given)
            embeds = torch.cat([functional.pad(embeds, (0, t5.shape[-1] - embeds.shape[-1])), t5], dim=1)
        elif self.tail is not None:
            embeds = torch.cat([embeds, self.tail.to(embeds.device)(prompts).to(embeds)], dim=1)
        if self.family in _REPEATED_BY_US:
            # The others' own encode_prompt does it to what it is given.
            number = given["num_images_per_prompt"]
            embeds = embeds.repeat_interleave(number, dim=0)
            pooled = None if pooled is None else pooled.repeat_interleave(number, dim=0)
        return Segmented(embeds, pooled, read.mask)

    def _t5(self, prompts: list[str], given: dict[str, Any]) -> Tensor:
        return self._pipe._get_t5_prompt_embeds(prompts, max_sequence_length=given["max_sequence_length"])

    @staticmethod
    def _fill(given: dict[str, Any], prefix: str, encoded: Segmented) -> None:
        given[f"{prefix}prompt_embeds"] = encoded.embeds
        if encoded.pooled is not None:
            given[f"{prefix}pooled_prompt_embeds"] = encoded.pooled


# Family → the endings of its CLIPs' names, whether the states before the last layer are read, and which pooled texts are.
_CLIPS: dict[str, tuple[tuple[str, ...], bool, tuple[int, ...]]] = {
    "stable-diffusion": (("",), False, ()),
    "stable-diffusion-xl": (("", "_2"), True, (1,)),
    "stable-diffusion-3": (("", "_2"), True, (0, 1)),
    "flux": (("",), False, (0,)),
}
_REPEATED_BY_US = ("stable-diffusion-3", "flux")


def read_long_prompts(pipe: Any, config: LongPrompts | None, tail: T5Tail | None = None) -> None:
    """From now on `pipe` reads long prompts so; None: as diffusers does it. ValueError for a family without a CLIP."""
    from mmalign.denoisers import adapter_for

    vars(pipe).pop("encode_prompt", None)
    if config is not None:
        pipe.encode_prompt = LongPromptReader(pipe, adapter_for(pipe).family, config, tail)


def long_prompts_of(pipe: Any) -> LongPromptReader | None:
    """What reads the pipeline's long prompts; None where they are cut."""
    reader = vars(pipe).get("encode_prompt")
    return reader if isinstance(reader, LongPromptReader) else None
