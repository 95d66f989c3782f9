"""Do embeddings tell users apart? A classifier from one group's tokens to whose they are: PPD's own check of its first stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.data.users import UserEmbeddings


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Shares of held-out groups whose user is among the k likeliest, by k, at the best learning rate; chance is k / num_users."""

    top: dict[int, float]
    num_users: int
    num_held_out: int
    learning_rate: float

    def __str__(self) -> str:
        told = ", ".join(
            f"top-{k} {share:.1%} (chance {min(1.0, k / self.num_users):.1%})" for k, share in self.top.items()
        )
        return f"{self.num_held_out} held-out groups of {self.num_users} users: {told}"


class UserClassifier(nn.Module):
    """Linear to `hidden`, GELU, four residual blocks (linear, GELU, layer norm, dropout), linear to the users."""

    def __init__(self, width: int, num_users: int, *, hidden: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, num_users)
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of every user."""
        x = F.gelu(self.first(x))
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = self.dropout(norm(F.gelu(x + linear(x))))
        return self.last(x)


def probe_users(
    users: UserEmbeddings,
    *,
    token: int | Literal["mean", "auto"] = "auto",
    min_groups: int = 10,
    learning_rates: Sequence[float] = (1e-3, 1e-4, 1e-5, 1e-6),
    epochs: int = 10,
    batch_size: int = 64,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
) -> ProbeResult:
    """Trains the classifier on nine tenths of the groups and reads it, without dropout, on the others; users are in both by design.

    token: which row of the tokens it reads, or their mean, where rows have no order; "auto" is the last layer (as published) of a
    vision language model, else the mean. Only users with `min_groups` groups count. The best learning rate is chosen on the held-out
    groups, as published, which flatters a little.
    """
    if token == "auto":
        token = -1 if users.made_by.get("encoder") == "vision-language" else "mean"
    length = users.tokens.shape[1]
    if isinstance(token, int) and not -length <= token < length:
        raise ValueError(f"token {token} is none of the {length} that a group has")
    known = sorted(user for user, groups in users.of_user.items() if len(groups) >= min_groups)
    if len(known) < 2:
        raise ValueError(f"the probe needs two users with {min_groups} groups or more, and there are {len(known)}")
    rows = [index for user in known for index in users.of_user[user]]
    labels = torch.tensor([known.index(users.groups[index].user) for index in rows])
    features = users.tokens[rows].mean(1) if token == "mean" else users.tokens[rows, token]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(0.1 * len(rows)))
    test, train = order[:held], order[held:]
    best: tuple[float, float, Tensor] | None = None
    for rate in learning_rates:
        places = _places(features, labels, train, test, len(known), rate, epochs, batch_size, seed)
        right = (places < 1).float().mean().item() + 1e-3 * (places < max(ranks)).float().mean().item()
        if best is None or right > best[0]:
            best = right, rate, places
    assert best is not None
    top = {k: (best[2] < k).float().mean().item() for k in ranks if k <= len(known)}
    return ProbeResult(top, len(known), held, best[1])


def _places(
    features: Float[Tensor, "G D"],
    labels: Int[Tensor, " G"],
    train: Int[Tensor, " N"],
    test: Int[Tensor, " M"],
    num_users: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Int[Tensor, " M"]:
    """How many users a trained classifier finds likelier than the true one, for every test row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UserClassifier(features.shape[1], num_users)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=1e-4)
        an_epoch = math.ceil(len(train) / batch_size)
        warmup, total = max(1, round(0.1 * an_epoch)), epochs * an_epoch

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(features[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        logits = model.eval()(features[test])
    return (logits > logits.gather(1, labels[test][:, None])).sum(1)
