"""For whom pictures are drawn: --user and its kin, of generate and evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmalign.cli.options import Given, Option, UsageError, flag, number, one_of

if TYPE_CHECKING:
    from mmalign.data.users import UserEmbeddings


def user_options(*, group: str) -> list[Option]:
    """--user, and who that is."""
    return [
        Option(
            name="user",
            help="whom the pictures are for: a name in --users, or several as NAME=WEIGHT",
            metavar="NAME",
            many=True,
            group=group,
            nullable=True,
        ),
        Option(name="users", help="a file of `mmalign embed-users`", metavar="FILE", group=group, nullable=True),
        Option(
            name="user_scale",
            help="how strongly the user acts; none is 1, 0 draws the base's pictures",
            convert=number,
            metavar="X",
            group=group,
            nullable=True,
        ),
        Option(
            name="user_mix",
            help="how several users are mixed: their tokens, or what the network predicts for each; none is tokens",
            convert=one_of("tokens", "scores"),
            metavar="tokens|scores",
            group=group,
            nullable=True,
        ),
    ]


def user_of(given: Given) -> dict[str, Any]:
    """What the pipeline's call is told of users; nothing without --user."""
    words = given["user"]
    if not words:
        for name in ("users", "user_scale", "user_mix"):
            if given[name] is not None:
                raise UsageError(f"{flag(name)} belongs to --user")
        return {}
    if given["users"] is None:
        raise UsageError("--user is looked up in --users FILE, which `mmalign embed-users` makes")
    told = {"user_scale": 1.0 if given["user_scale"] is None else given["user_scale"]}
    if len(words) == 1 and "=" not in words[0] and given["user_mix"] is None:
        return told | {"user": words[0]}
    weights = {}
    for word in words:
        name, _, weight = word.rpartition("=")
        if not name:
            raise UsageError(f"--user {word}: several users are told as NAME=WEIGHT")
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise UsageError(f"--user {word}: {weight!r} is no number") from error
    return told | {"user": weights, "user_mix": given["user_mix"] or "tokens"}


def users_of(given: Given) -> UserEmbeddings | None:
    """Where --user is looked up; None without one."""
    if not given["user"]:
        return None
    from mmalign.data.users import UserEmbeddings

    return UserEmbeddings.load(given["users"])


def class_for(users: UserEmbeddings | None) -> Any:
    """For `load_pipeline`: the class whose call takes a user, where there are any."""
    if users is None:
        return None
    from mmalign import PPDPipeline

    return PPDPipeline
