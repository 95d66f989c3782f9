"""`mmalign embed-users`: who compared the pairs of a data set, as tokens that PPD reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmalign.cli.models import DTYPES, best_device, device_option
from mmalign.cli.options import Command, Given, Option, UsageError, one_of, switch, whole

_DATA, _HOW = "whose pairs", "how they are read"
_MODEL = "llava-onevision"
VERB = Command(
    prog="mmalign embed-users",
    description="Reads a few pairs of every user at a time and writes what they say of the user: a file for `mmalign train ppd` and "
    "`mmalign generate`. Without a vision language model, a CLIP-like scorer tells how chosen pictures differ from the others.",
    example="mmalign embed-users --data playground --encoder playground --output users.safetensors",
    options=[
        Option(
            name="data",
            help="preference pairs with a column user_id, as for `mmalign train`",
            required=True,
            group=_DATA,
        ),
        Option(name="split", help="of a Hub data set or of the playground", group=_DATA, nullable=True),
        Option(
            name="root",
            help="the folder that paths in --data are relative to",
            metavar="DIR",
            group=_DATA,
            nullable=True,
        ),
        Option(name="max_users", help="only the first so many", convert=whole, metavar="N", group=_DATA, nullable=True),
        Option(
            name="user",
            help="take all pairs as one person's, of this name, whatever the data say: someone new",
            metavar="NAME",
            group=_DATA,
            nullable=True,
        ),
        Option(
            name="output",
            help="the file; a pass that was stopped goes on when it is called again",
            metavar="FILE",
            default="users.safetensors",
            group=_DATA,
        ),
        Option(
            name="encoder",
            help=f"{_MODEL} (or {_MODEL}:<Hub id or folder>), or a CLIP-like scorer: playground, pickscore, clip:<Hub id or folder>",
            required=True,
            group=_HOW,
        ),
        Option(name="shots", help="pairs of a group", convert=whole, metavar="N", default=4, group=_HOW),
        Option(name="per_user", help="groups of a user at most", convert=whole, metavar="N", default=20, group=_HOW),
        Option(name="seed", help="which pairs form a group", convert=whole, metavar="N", default=0, group=_HOW),
        Option(
            name="layers",
            help=f"of {_MODEL}: all, last, or numbers of layers; none is all",
            metavar="N",
            many=True,
            group=_HOW,
            nullable=True,
        ),
        Option(
            name="max_new_tokens",
            help=f"of {_MODEL}: where its text is cut off; none is 1024",
            convert=whole,
            metavar="N",
            group=_HOW,
            nullable=True,
        ),
        Option(
            name="dtype",
            help=f"precision of {_MODEL}; none is float32",
            convert=one_of(*DTYPES),
            metavar="|".join(DTYPES),
            group=_HOW,
            nullable=True,
        ),
        Option(
            name="probe",
            help="then train a classifier that tells the users of held-out groups: are they told apart?",
            convert=switch,
            default=False,
            group=_HOW,
        ),
        device_option(_HOW),
    ],
)


def run(argv: Sequence[str]) -> int:
    """Embeds, and says how many users, how texts ended, and where the file is."""
    given = VERB.read(argv)
    if given is None:
        return 0
    from mmalign.data import load_pairs
    from mmalign.data.users import embed_users, one_persons

    source = load_pairs(given["data"], split=given["split"], root=given["root"])
    if given["user"] is not None:
        source = one_persons(source, given["user"])
    encoder = encoder_of(given)
    users = embed_users(
        source,
        encoder,
        shots=given["shots"],
        per_user=given["per_user"],
        max_users=given["max_users"],
        seed=given["seed"],
        output=given["output"],
    )
    print(
        f"{len(users)} users, {len(users.groups)} groups of {given['shots']} pairs, tokens {tuple(users.tokens.shape[1:])}: "
        f"{given['output']}"
    )
    ends = Counter(group.stopped for group in users.groups if group.stopped)
    if ends["length"]:
        print(
            f"{ends['length']} of {len(users.groups)} texts were cut off at max_new_tokens: their tokens stand in the middle of one"
        )
    if given["probe"]:
        from mmalign.evaluation.user_probe import probe_users

        print(probe_users(users))
    return 0


def encoder_of(given: Given) -> Any:
    """What reads the pairs."""
    name, _, source = given["encoder"].partition(":")
    device = best_device(given["device"])
    if name != _MODEL:
        for option in ("layers", "max_new_tokens", "dtype"):
            if given[option] is not None:
                raise UsageError(f"--{option.replace('_', '-')} belongs to --encoder {_MODEL}")
        from mmalign.data.clip_users import ClipUserEncoder, clip_scorer

        return ClipUserEncoder(clip_scorer(given["encoder"], device))
    import torch

    from mmalign.data.vlm_users import MODEL, VlmUserEncoder

    return VlmUserEncoder.from_pretrained(
        source or MODEL,
        device=device,
        dtype=getattr(torch, given["dtype"] or "float32"),
        layers=_layers(given["layers"]),
        max_new_tokens=given["max_new_tokens"] or 1024,
    )


def _layers(words: list[str] | None) -> Any:
    if words is None:
        return "all"
    if words in (["all"], ["last"]):
        return words[0]
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise UsageError(f"--layers takes all, last, or numbers, got {' '.join(words)}") from error
