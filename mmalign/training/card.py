"""The model card of a run: what was aligned, from what, with which settings, and what was measured."""

import json
import re
from pathlib import Path
from typing import Any

from mmalign.files import write_file
from mmalign.training.loading import EMBEDDED
from mmalign.training.run_config import RunConfig

_PAPERS = {
    "smpo": ("SmPO", "2506.02698"),
    "inpo": ("DDIM-InPO", "2503.18454"),
    "diffusion-npo": ("Diffusion-NPO", "2505.11245"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "longalign": ("LongAlign", "2410.11817"),
    "ppd": ("PPD", "2501.06655"),
    "self-npo": ("Self-NPO", "2505.11777"),
    "sft": ("supervised fine-tuning on preferred pictures", None),
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def public_name(name: object) -> str:
    """A model's or a data set's name as a card may tell it: a Hub id as it is, of a path on this machine only its last part."""
    text = str(name or "unknown")
    return text if is_hub_id(text) else Path(text).name or "unknown"


def is_hub_id(name: str) -> bool:
    """Whether a name is spelled as one on the Hub and is no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def write_card(
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
    """Writes README.md with the Hub's metadata; `trained`: name and class of a fully trained component, None for a LoRA.
    `settings`: of the method. `users`: a user attention was trained, neither of both.

    No licence is stated: it is the base model's and the data's, which are not known here. `task`: the Hub's name
    for what the model does.
    """
    is_lora = trained is None and not users
    judge = "Whether the clips got better, people must say who do not know which is which."
    if task == "text-to-image":
        judge = "Whether the pictures got better is for a held-out judge:\n`mmalign evaluate`."
    name, arxiv = _PAPERS.get(args.method, (args.method, None))
    base, data_name = public_name(base_model), public_name(data.partition("[")[0])
    header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    if is_hub_id(base_model):
        header |= {"base_model": base, "base_model_relation": "adapter" if is_lora or users else "finetune"}
    if is_hub_id(data):
        header["datasets"] = [data_name]
    header["tags"] = ["mmalign", args.method, task, "diffusers-training", "diffusers"]
    header["tags"] += ["lora", "template:sd-lora"] if is_lora else []
    import yaml

    paper = f" ([paper](https://hf.co/papers/{arxiv}))" if arxiv else ""
    text = f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---
# {f"A negative side of {base}" if args.trains_negative else f"{base} aligned"} by {name}

Trained with mmalign by {name}{paper} on `{data_name}`.
The licences of the base model and of the data apply.

```python
{_usage_of(args, base, trained, users)}
```
{_WITHOUT_USERS if users else ""}
## Training

{args.describe(args.world_size)}

```json
{_json(settings | {"max_steps": args.max_steps, "seed": args.seed})}
```

## Measured while training

```json
{_json(metrics)}
```

These numbers come from the training pairs (`eval_*`: from held-out pairs). {judge}
"""
    write_file(folder / "README.md", text)


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


def _json(values: dict[str, Any]) -> str:
    return json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}, indent=1)
