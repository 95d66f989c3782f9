"""The model card of a denoiser's run: how diffusers loads what was trained, and who is to judge it."""

from pathlib import Path
from typing import Any

from mmalign.training.card import Card, public_name, write_card
from mmalign.training.loading import EMBEDDED
from mmalign.training.run_config import RunConfig


def write_picture_card(
    folder: Path,
    args: RunConfig,
    *,
    base_model: str,
    data: str,
    metrics: dict[str, Any],
    settings: dict[str, Any],
    trained: tuple[str, str] | None,
    task: str,
    users: bool = False,
) -> None:
    """Writes README.md; `trained`: name and class of a fully trained component, None for a LoRA. `settings`: of the method.

    `users`: a user attention was trained, neither of both. `task`: the Hub's name for what the model does.
    """
    is_lora = trained is None and not users
    judge = "Whether the clips got better, people must say who do not know which is which."
    if task == "text-to-image":
        judge = "Whether the pictures got better is for a held-out judge:\n`mmalign evaluate`."
    base = public_name(base_model)
    card = Card(
        library="diffusers",
        task=task,
        base_model=base_model,
        is_finetune=not (is_lora or users),
        data=data,
        tags=["diffusers-training", "diffusers", *(["lora", "template:sd-lora"] if is_lora else [])],
        subject=f"A negative side of {base}" if args.trains_negative else f"{base} aligned",
        usage=_usage_of(args, base, trained, users),
        note=_WITHOUT_USERS if users else "",
        settings=settings,
        metrics=metrics,
        judge=judge,
    )
    write_card(folder, args, card)


def _usage_of(args: RunConfig, base: str, trained: tuple[str, str] | None, users: bool) -> str:
    """Python that loads what was trained."""
    if users:
        return _usage_of_users(base)
    return _usage_negative(base) if args.trains_negative else _usage(base, trained)


def _usage(base: str, trained: tuple[str, str] | None) -> str:
    """Python that loads the result; FOLDER is the card's own folder, or its id on the Hub."""
    # Plain diffusers does not know the embedded models by name.
    package, loader = ("mmalign", "SmPOPipeline") if base in EMBEDDED else ("diffusers", "DiffusionPipeline")
    if trained is None:
        return f"""from {package} import {loader}

pipe = {loader}.from_pretrained({base!r})
pipe.load_lora_weights(FOLDER)"""
    name, kind = trained
    return f"""from diffusers import {kind}
from {package} import {loader}

{name} = {kind}.from_pretrained(FOLDER, subfolder={name!r})
pipe = {loader}.from_pretrained({base!r}, {name}={name})"""


_WITHOUT_USERS = """
Whom a picture is for is read from a few pairs of theirs; no weights change for someone new. Plain diffusers knows nothing of users and
draws the base's pictures. Embeddings of the people in the training data are not part of this folder.
"""


def _usage_of_users(base: str) -> str:
    """Python that draws for a user."""
    return f"""from mmalign import PPDPipeline
from mmalign.data.users import UserEmbeddings

pipe = PPDPipeline.from_pretrained({base!r})
pipe.load_aligned(FOLDER)
pipe.users = UserEmbeddings.load("users.safetensors")  # of `mmalign embed-users`; scorers' lie in FOLDER
pipe("a prompt", user="one of them").images[0]"""


def _usage_negative(base: str) -> str:
    """The same for a negative side, which guidance leads away from."""
    return f"""from mmalign import SelfNPOPipeline

pipe = SelfNPOPipeline.from_pretrained({base!r})
pipe.load_negative(FOLDER)  # runs in the negative branch alone; it draws worse than the base by itself"""
