"""Pairs with the users who compared them: which of a user's groups may tell a pair who they are, and which one does."""

import hashlib
import logging
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.data import PairSource, PreferenceDataset
from mmalign.data.users import UserEmbeddings, pair_key
from mmalign.likelihood import draws
from mmalign.training.prepare import Prepared

logger = logging.getLogger("mmalign")


@dataclass(frozen=True)
class UserPairs(Prepared):
    """Pairs of users who have an embedding. groups: row → the groups of its user that the pair itself had no part in, never empty."""

    users: UserEmbeddings
    groups: dict[int, list[int]]

    def told(
        self, rows: list[int], *, seed: int, epoch: int, dropout: float = 0.0, others: bool = False
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, " B"]]:
        """The tokens of each row's user, of a group drawn by (seed, epoch, row), and how strongly they act: 1, or 0 for a dropped user.

        others: the tokens of another user instead, drawn likewise.
        """
        purpose = "another user" if others else "user group"
        chosen = [
            self._drawn(generator, self._elsewhere(row) if others else self.groups[row])
            for row, generator in zip(rows, draws.row_generators(seed, epoch, rows, purpose), strict=True)
        ]
        kept = draws.rand(draws.row_generators(seed, epoch, rows, "user dropout")) >= dropout
        return self.users.tokens[chosen], kept.float()

    @staticmethod
    def _drawn(generator: torch.Generator, groups: list[int]) -> int:
        return groups[int(torch.randint(len(groups), (1,), generator=generator))]

    def _elsewhere(self, row: int) -> list[int]:
        own = self.users.groups[self.groups[row][0]].user
        return [index for index, group in enumerate(self.users.groups) if group.user != own]


def with_users(prepared: Prepared, source: PairSource, users: UserEmbeddings) -> UserPairs:
    """The pairs of `prepared` whose user has an embedding that they had no part in; the others are left out and counted.

    source: where the pairs come from. A pair is opened only where its user has a group with the same prompt. ValueError where no pair
    is left.
    """
    encoded, compared = prepared.encoded, prepared.dataset.compared
    groups: dict[int, list[int]] = {}
    unknown = own_only = 0
    kept = torch.zeros(len(compared), dtype=torch.bool)
    for place, index in enumerate(compared.kept.tolist()):
        row, user = int(encoded.rows[index]), encoded.user_ids[index]
        if user is None or user not in users.of_user:
            unknown += 1
            continue
        prompt = encoded.prompts[int(encoded.prompt_index[index])]
        allowed = _without_pair(users, users.of_user[user], prompt, source, row)
        if not allowed:
            own_only += 1
            continue
        groups[row], kept[place] = allowed, True
    logger.info(
        "%s: %d of %d pairs have a user with an embedding; left out are %d of other users and %d that made their user's only one",
        prepared.name,
        len(groups),
        len(compared),
        unknown,
        own_only,
    )
    if not groups:
        raise ValueError(
            f"no pair of {prepared.name} has a user with an embedding of other pairs: make the embeddings of this data's users "
            "(mmalign embed-users), with more than one group a user"
        )
    chosen = replace(compared, kept=compared.kept[kept], first=compared.first[kept], strength=compared.strength[kept])
    digest = f"{prepared.fingerprint}/{users.fingerprint}"
    same = {field.name: getattr(prepared, field.name) for field in fields(Prepared)}
    same |= {
        "dataset": PreferenceDataset(encoded, chosen),
        "fingerprint": hashlib.sha256(digest.encode()).hexdigest(),
    }
    return UserPairs(**same, users=users, groups=groups)


def _without_pair(users: UserEmbeddings, groups: list[int], prompt: str, source: PairSource, row: int) -> list[int]:
    """Of a user's groups those that the pair at `row` had no part in."""
    if not any(prompt in users.groups[index].prompts for index in groups):
        return groups
    key = pair_key(source[row])
    return [index for index in groups if key not in users.groups[index].pairs]
