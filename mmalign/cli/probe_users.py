"""`mmalign probe-users`: whether the tokens of a file tell its users apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.cli.options import Command, Option, whole

_WHAT = "the users"


def _token(value: Any) -> int | str:
    return value if value in ("auto", "mean") else whole(value)


VERB = Command(
    prog="mmalign probe-users",
    description="Trains a classifier on nine tenths of the groups of a file of users, and tells how often it finds the user of the "
    "others among the k likeliest, beside chance: PPD's own check of its first stage. If it finds nobody, `mmalign train ppd` will "
    "not either.",
    example="mmalign probe-users --users users.safetensors",
    options=[
        Option(name="users", help="a file of `mmalign embed-users`", metavar="FILE", required=True, group=_WHAT),
        Option(
            name="token",
            help="which token of a group it reads, or their mean; auto is the last of a vision language model's, else the mean",
            convert=_token,
            metavar="N|mean|auto",
            default="auto",
            group=_WHAT,
        ),
        Option(
            name="min_groups",
            help="only users with so many groups",
            convert=whole,
            metavar="N",
            default=10,
            group=_WHAT,
        ),
        Option(
            name="epochs",
            help="passes over the groups; few groups need more",
            convert=whole,
            metavar="N",
            default=10,
            group=_WHAT,
        ),
        Option(name="seed", help="which groups are held out", convert=whole, metavar="N", default=0, group=_WHAT),
    ],
)


def run(argv: Sequence[str]) -> int:
    """Probes, and prints how often users were found."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.data.users import UserEmbeddings
    from mmalign.evaluation.user_probe import probe_users

    users = UserEmbeddings.load(given["users"])
    print(
        probe_users(
            users, token=given["token"], min_groups=given["min_groups"], epochs=given["epochs"], seed=given["seed"]
        )
    )
    return 0
