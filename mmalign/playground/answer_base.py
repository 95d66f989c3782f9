"""Trains a small model that sees to answer questions: first its eye alone, then everything but the eye."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.playground.chat import IGNORED, Chat
from mmalign.playground.fit import FitConfig, fit
from mmalign.playground.questions import Question

TURNS = 4
YES_SHARE = 0.6
EXTRA_WEIGHT = 0.3
# Indices into GARMENTS, COLOURS or WAYS.
_COMPARED = (8, 8)


@dataclass(frozen=True)
class Seeing:
    """A model with its parts by name. look: pixels of a batch → what the language model reads in place of the media tokens."""

    model: Any
    tower: nn.Module
    look: Callable[[Tensor], Float[Tensor, "B N D"]]
    media_token_id: int


@dataclass(frozen=True)
class World:
    """questions: the module that asks. draw: rows → (pixels, what each shows). glimpse: rows → (pixels, facts seen at once)."""

    questions: ModuleType
    draw: Callable[[Sequence[int]], tuple[Tensor, list[Any]]]
    glimpse: Callable[[Sequence[int]], tuple[Tensor, Int[Tensor, "B F"]]]
    glimpse_sizes: tuple[int, ...]


def train(
    seeing: Seeing, world: World, chat: Chat, configs: tuple[FitConfig, FitConfig], work_dir: Path, name: str
) -> list[dict[str, float]]:
    """Both stages, one after the other; their curves. Unfinished training is kept in `work_dir` under `name`."""
    eye, answers = configs
    first = train_eye(seeing, world, eye, work_dir / f"{name}-eye.pt")
    second = train_answers(seeing, world, chat, answers, work_dir / f"{name}-answers.pt")
    return [{"stage": stage, **entry} for stage, curve in enumerate((first, second), 1) for entry in curve]


def train_eye(
    seeing: Seeing, world: World, config: FitConfig, checkpoint: Path | None = None
) -> list[dict[str, float]]:
    """The vision tower and its projector learn to tell what is seen, by linear maps that are not kept."""
    torch.manual_seed(config.seed)
    pixels, _ = world.glimpse([0])
    width = seeing.look(pixels).flatten(1).shape[1]
    reader = nn.Linear(width, sum(world.glimpse_sizes))
    parts = nn.ModuleList([seeing.tower, seeing.model.model.multi_modal_projector, reader])

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        pixels, facts = world.glimpse(range(step * config.batch_size, (step + 1) * config.batch_size))
        return _told(reader(seeing.look(pixels).flatten(1)), facts, world.glimpse_sizes)

    return fit(parts, loss_of, config, checkpoint=checkpoint, name="eye")


def train_answers(
    seeing: Seeing, world: World, chat: Chat, config: FitConfig, checkpoint: Path | None = None, *, closed: float = 0.5
) -> list[dict[str, float]]:
    """Projector and language model learn from dialogues, as LLaVA's do; the tower stays as it is. closed: share of yes-or-no questions.

    People ask about what is there: more yes-or-no questions are answered by yes than by no, which a model takes for a habit of the
    world. Beside it linear maps, which are not kept, read all that is shown from the last token of a picture or a clip, and before the
    last layer what a question names and what is shown instead: without that, yes is all that a small model learns to say.
    """
    torch.manual_seed(config.seed)
    seeing.tower.requires_grad_(False)
    width = seeing.model.get_input_embeddings().embedding_dim
    reader, comparer = nn.Linear(width, sum(world.questions.FACT_SIZES)), nn.Linear(width, sum(_COMPARED))
    parts = nn.ModuleList([seeing.model, reader, comparer])

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        pixels, shown = world.draw(range(step * config.batch_size, (step + 1) * config.batch_size))
        rng = np.random.default_rng([config.seed, step])
        asked = [draw_questions(world.questions, one, rng, closed=closed) for one in shown]
        ids, labels = chat.batch(asked)
        output = read(seeing, pixels, ids, ids != chat.tokenizer.pad_token_id)
        hidden = output.last_hidden_state
        said = labels[:, 1:] != IGNORED
        logits = seeing.model.lm_head(hidden[:, :-1][said])
        facts = torch.tensor([world.questions.facts(one) for one in shown])
        extra = _told(reader(hidden[:, chat.summary]), facts, world.questions.FACT_SIZES)
        about_to_say = said & (labels[:, :-1] == IGNORED)
        compared = torch.tensor([turn.compared for turns in asked for turn in turns])
        extra = extra + _told(comparer(output.hidden_states[-2][:, :-1][about_to_say]), compared, _COMPARED)
        return F.cross_entropy(logits, labels[:, 1:][said]) + EXTRA_WEIGHT * extra

    curve = fit(parts, loss_of, config, checkpoint=checkpoint, name="answers")
    seeing.tower.requires_grad_(True)
    return curve


def read(seeing: Seeing, pixels: Tensor, ids: Int[Tensor, "B T"], mask: Tensor) -> Any:
    """The language model's states of every layer; the same as the model's own forward has, for the whole batch at once."""
    embedded = seeing.model.get_input_embeddings()(ids)
    media = (ids == seeing.media_token_id)[..., None]
    embedded = embedded.masked_scatter(media, seeing.look(pixels))
    return seeing.model.model.language_model(
        inputs_embeds=embedded, attention_mask=mask.long(), use_cache=False, output_hidden_states=True
    )


def draw_questions(questions: ModuleType, shown: Any, rng: np.random.Generator, *, closed: float) -> list[Question]:
    """Questions about one picture or clip: yes or no with the probability `closed`, else open ones and descriptions."""
    kinds = questions.kinds_of(shown)
    sorts = [[kind for kind in kinds if (kind in questions.YES_OR_NO) == yes_or_no] for yes_or_no in (False, True)]
    drawn = [str(rng.choice(sorts[int(rng.random() < closed)])) for _ in range(TURNS)]
    return [questions.ask(shown, kind, rng, true=bool(rng.random() < YES_SHARE)) for kind in drawn]


def _told(guesses: Float[Tensor, "B K"], facts: Int[Tensor, "B F"], sizes: Sequence[int]) -> Tensor:
    """Cross-entropies of facts whose guesses stand side by side, summed; −1 is no fact."""
    parts = zip(guesses.split(list(sizes), 1), facts.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(guess, fact, ignore_index=-1) for guess, fact in parts]).sum()
