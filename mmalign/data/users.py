"""Who a picture is for: tokens that an encoder made of a few of a user's pairs, and which pairs these were.

A user has groups of N pairs each, disjoint; every group gives tokens (L, D). Pairs are known by their content, so that none is trained
on together with tokens that it helped to make, whichever data set it turns up in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.data.clips import frames_of
from mmalign.data.pairs import PairSource
from mmalign.data.records import InvalidRow, PairRecord
from mmalign.data.shards import read_notes, read_shard, write_shard
from mmalign.data.unfinished import Unfinished

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("mmalign")
_FORMAT = 1
_MEANING = ("encoder", "scorer", "fingerprint", "model", "layers", "prompt")
# In a run whose users are scorers.
SCORERS_FILE = "users.safetensors"


@dataclass(frozen=True)
class Shot:
    """One comparison of a user, as an encoder reads it."""

    prompt: str
    preferred: Image.Image
    rejected: Image.Image


@dataclass(frozen=True, eq=False)
class Profile:
    """What an encoder made of a user's shots: tokens (L, D); the text that it wrote, if it did, and why it stopped."""

    tokens: Float[Tensor, "L D"]
    text: str = ""
    stopped: str = ""


class UserEncoder(Protocol):
    """Makes tokens of a few comparisons. made_by: everything that the tokens depend on, as JSON values."""

    @property
    def made_by(self) -> dict[str, Any]: ...

    def encode(self, shots: Sequence[Shot]) -> Profile: ...


@dataclass(frozen=True)
class Group:
    """The pairs that one row of tokens was made of, by key, with their prompts, and what the encoder wrote."""

    user: str
    pairs: tuple[str, ...]
    prompts: tuple[str, ...]
    text: str = ""
    stopped: str = ""


class UserEmbeddings:
    """Users and their groups, with tokens (G, L, D), one row a group. made_by: what made them."""

    def __init__(self, groups: Sequence[Group], tokens: Float[Tensor, "G L D"], made_by: Mapping[str, Any]) -> None:
        if tokens.ndim != 3 or len(tokens) != len(groups) or not groups:
            raise ValueError(
                f"{len(groups)} groups of users need tokens ({len(groups)}, L, D), got {tuple(tokens.shape)}"
            )
        if not torch.isfinite(tokens).all():
            raise ValueError("the users' tokens are not finite: run the encoder in float32 or bfloat16")
        self.groups, self.tokens, self.made_by = list(groups), tokens.float(), dict(made_by)
        self.of_user: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            self.of_user.setdefault(group.user, []).append(index)

    def __len__(self) -> int:
        return len(self.of_user)

    def __repr__(self) -> str:
        return f"UserEmbeddings({len(self)} users, {len(self.groups)} groups of {tuple(self.tokens.shape[1:])})"

    @property
    def width(self) -> int:
        """D of the tokens."""
        return self.tokens.shape[-1]

    @property
    def encoder(self) -> dict[str, Any]:
        """Of what made them, that without which tokens mean something else: another precision, other pairs or a cut text do not."""
        return {name: value for name, value in self.made_by.items() if name in _MEANING}

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens, groups and what made them; the data's name, which moves with its file, is no part of it."""
        made_by = {name: value for name, value in self.made_by.items() if name != "data"}
        told = json.dumps([made_by, [asdict(group) for group in self.groups]], sort_keys=True)
        return hashlib.sha256(told.encode() + self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def user(self, name: str, group: int = 0) -> Float[Tensor, "L D"]:
        """The tokens of one of a user's groups."""
        if name not in self.of_user:
            known = ", ".join(sorted(self.of_user)[:8])
            raise ValueError(f"no user {name!r} among the {len(self)} with an embedding ({known}, …)")
        places = self.of_user[name]
        if not 0 <= group < len(places):
            raise ValueError(f"user {name!r} has {len(places)} groups, and group {group} was asked for")
        return self.tokens[places[group]]

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whole or not at all."""
        notes = {"format": _FORMAT, "made_by": self.made_by, "groups": [asdict(group) for group in self.groups]}
        return write_shard(Path(path), {"tokens": self.tokens}, notes)

    @classmethod
    def load(cls, path: str | Path) -> UserEmbeddings:
        """Reads what `save` wrote."""
        from safetensors import SafetensorError

        place = Path(path).expanduser()
        if not place.is_file():
            raise ValueError(f"{place}: no such file of users; make one with `mmalign embed-users`")
        try:
            notes, tokens = read_notes(place), read_shard(place)["tokens"]
            groups = [_group(fields) for fields in notes["groups"]]
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{place} holds no users of this version: make it anew with `mmalign embed-users`"
            ) from error
        return cls(groups, tokens, notes["made_by"])


def _group(fields: dict[str, Any]) -> Group:
    return Group(**fields | {"pairs": tuple(fields["pairs"]), "prompts": tuple(fields["prompts"])})


def pair_key(record: PairRecord) -> str:
    """sha256 of a pair's prompt and pictures, whichever side they stand on."""
    sides = sorted(_content(side) for side in record.sides)
    return hashlib.sha256("/".join([*sides, record.prompt]).encode()).hexdigest()


def shot_of(record: PairRecord) -> Shot:
    """A pair as an encoder reads it; ValueError for a tie."""
    if record.label == 0.5:
        raise ValueError(f"row {record.row} is a tie, which says nothing of a user: leave it out")
    first, second = (frames_of(side)[0] for side in record.sides)
    return Shot(record.prompt, *((first, second) if record.label > 0.5 else (second, first)))


def embed_users(
    source: PairSource,
    encoder: UserEncoder,
    *,
    shots: int = 4,
    per_user: int = 20,
    max_users: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool = True,
) -> UserEmbeddings:
    """Every user's pairs, ties left out, shuffled and cut into disjoint groups of `shots`, at most `per_user`, and encoded.

    Pairs that are left over, and users with fewer than `shots` of them, have no part in it. Which pairs form a group depends on (seed,
    user) alone. max_users: only the first so many by name. output: the file to write; what is read lies beside it until it is
    written, in <output>.unfinished, where an interrupted pass over the same pairs with the same encoder and options goes on.
    """
    if shots < 1 or per_user < 1:
        raise ValueError(f"shots and per_user must be at least 1, got {shots} and {per_user}")
    rows: dict[str, list[int]] = {}
    for row, opinion in enumerate(source.opinions()):
        if opinion is not None and opinion[0] is not None and opinion[1] != 0.5:
            rows.setdefault(opinion[0], []).append(row)
    if not rows:
        raise ValueError(f"{source.name} tells no user of any pair: it needs a column user_id")
    enough = [user for user in sorted(rows) if len(rows[user]) >= shots][:max_users]
    if not enough:
        raise ValueError(f"no user of {source.name} has {shots} pairs that are no ties: lower shots")
    _log.info("%s: %d of %d users have %d pairs or more", source.name, len(enough), len(rows), shots)
    plan = [(user, part) for user in enough for part in _groups(user, rows[user], shots, per_user, seed)]
    made_by = {**encoder.made_by, "data": source.name, "shots": shots, "per_user": per_user, "seed": seed}
    kept = None
    if output is not None:
        told = json.dumps([_FORMAT, source.fingerprint, made_by, max_users], sort_keys=True)
        kept = Unfinished(Path(f"{output}.unfinished"), hashlib.sha256(told.encode()).hexdigest())
        if len(kept):
            _log.info("going on after %d of %d groups", len(kept), len(plan))
    groups, tokens = [], []
    for place, (user, part) in enumerate(tqdm(plan, desc="Reading users", unit="group", disable=not progress)):
        if kept is not None and (done := kept.get(place)) is not None:
            groups.append(_group(done[1]))
            tokens.append(done[0])
            continue
        try:
            records = [source[row] for row in part]
        except InvalidRow as error:
            _log.warning("a group of user %s is left out: %s", user, error)
            continue
        profile = encoder.encode([shot_of(record) for record in records])
        prompts = tuple(record.prompt for record in records)
        groups.append(Group(user, tuple(map(pair_key, records)), prompts, profile.text, profile.stopped))
        tokens.append(profile.tokens.detach().cpu().float())
        if kept is not None:
            kept.add(place, tokens[-1], asdict(groups[-1]))
    if not groups:
        raise ValueError(f"no group of {source.name} could be read: see the bad rows above")
    users = UserEmbeddings(groups, torch.stack(tokens), made_by)
    if kept is not None and output is not None:
        users.save(output)
        kept.remove()
    return users


def embed_user(pairs: Iterable[PairRecord], encoder: UserEncoder) -> Float[Tensor, "L D"]:
    """The tokens of someone new, from a few of their pairs: nothing is trained."""
    return encoder.encode([shot_of(pair) for pair in pairs]).tokens


def scorer_users(names: Sequence[str]) -> UserEmbeddings:
    """A one-hot token for each of several scorers, so that a network learns a token of its own for every one."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"name each scorer once, got {', '.join(names) or 'none'}")
    return UserEmbeddings(
        [Group(name, (), ()) for name in names],
        torch.eye(len(names))[:, None],
        {"encoder": f"one of {', '.join(names)}"},
    )


def judged_by_scorers(source: PairSource, scores: Mapping[str, Float[Tensor, "R 2"]]) -> PairSource:
    """Every row once for each scorer, whose `user_id` is the scorer's name and who prefers what the scorer gives more.

    A row that a scorer finds equal, or could not score, is that user's tie. Pictures are encoded once for each.
    """
    for name, values in scores.items():
        if values.shape != (len(source), 2):
            raise ValueError(f"scores of {name} must be ({len(source)}, 2), got {tuple(values.shape)}")
    rows: list[int] = []
    opinions: list[tuple[str, float]] = []
    for name, values in scores.items():
        preferred = ((values[:, 0] - values[:, 1]).nan_to_num(0.0).sign() + 1) / 2
        rows += range(len(source))
        opinions += [(name, label) for label in preferred.tolist()]
    return source.judged(rows, opinions, f"{source.name} judged by {', '.join(scores)}")


def one_persons(source: PairSource, user: str) -> PairSource:
    """The same pairs, all compared by one user; rows that cannot be read are left out."""
    told = [(row, opinion[1]) for row, opinion in enumerate(source.opinions()) if opinion is not None]
    return source.judged([row for row, _ in told], [(user, label) for _, label in told], f"{source.name} of {user}")


def _groups(user: str, rows: list[int], shots: int, per_user: int, seed: int) -> list[list[int]]:
    digest = hashlib.sha256(f"users/{seed}/{user}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    order = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    return [order[start : start + shots] for start in range(0, len(order) - shots + 1, shots)][:per_user]


def _content(side: Any) -> str:
    digest = hashlib.sha256()
    for frame in frames_of(side):
        digest.update(repr(frame.size).encode() + frame.tobytes())
    return digest.hexdigest()
