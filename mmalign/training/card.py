"""The model card of a run: what was aligned, from what, with which settings, and what was measured."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.files import write_file
from mmalign.training.align_config import AlignConfig

_PAPERS = {
    "smpo": ("SmPO", "2506.02698"),
    "inpo": ("DDIM-InPO", "2503.18454"),
    "diffusion-npo": ("Diffusion-NPO", "2505.11245"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "longalign": ("LongAlign", "2410.11817"),
    "ppd": ("PPD", "2501.06655"),
    "self-npo": ("Self-NPO", "2505.11777"),
    "token-dpo": ("preferences between answers", None),
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


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a kind of model says in its card.

    base_model, data: names. is_finetune: the folder holds a whole network, no adapter of one. tags: besides the method's. subject: what
    the     title says is made "by …". usage: Python that loads the folder. note: a paragraph under it. settings: of the method.
    judge: who is to say whether anything got better.
    """

    library: str
    task: str
    base_model: str
    is_finetune: bool
    data: str
    tags: list[str]
    subject: str
    usage: str
    note: str = ""
    settings: dict[str, Any]
    metrics: dict[str, Any]
    judge: str


def write_card(folder: Path, args: AlignConfig, card: Card) -> None:
    """Writes README.md with the Hub's metadata.

    No licence is stated: it is the base model's and the data's, which are not known here.
    """
    name, arxiv = _PAPERS.get(args.method, (args.method, None))
    data_name = public_name(card.data.partition("[")[0])
    header: dict[str, Any] = {"library_name": card.library, "pipeline_tag": card.task}
    if is_hub_id(card.base_model):
        relation = "finetune" if card.is_finetune else "adapter"
        header |= {"base_model": public_name(card.base_model), "base_model_relation": relation}
    if is_hub_id(card.data):
        header["datasets"] = [data_name]
    header["tags"] = ["mmalign", args.method, card.task, *card.tags]
    import yaml

    paper = f" ([paper](https://hf.co/papers/{arxiv}))" if arxiv else ""
    text = f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---
# {card.subject} by {name}

Trained with mmalign by {name}{paper} on `{data_name}`.
The licences of the base model and of the data apply.

```python
{card.usage}
```
{card.note}
## Training

{args.describe(args.world_size)}

```json
{_json(card.settings | {"max_steps": args.max_steps, "seed": args.seed})}
```

## Measured while training

```json
{_json(card.metrics)}
```

These numbers come from the training {args.unit} (`eval_*`: from held-out {args.unit}). {card.judge}
"""
    write_file(folder / "README.md", text)


def _json(values: dict[str, Any]) -> str:
    return json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}, indent=1)
