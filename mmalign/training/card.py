"""The model card of a run: what was aligned, from what, with which settings, and what was measured."""

import json
from pathlib import Path
from typing import Any

from mmalign.training.config import DenoiserConfig

_PAPERS = {
    "smpo": ("SmPO", "2506.02698"),
    "inpo": ("DDIM-InPO", "2503.18454"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "sft": ("supervised fine-tuning on preferred pictures", None),
}


def write_card(
    folder: Path,
    args: DenoiserConfig,
    *,
    base_model: str,
    data: str,
    metrics: dict[str, Any],
    is_lora: bool,
    license: str | None,
) -> None:
    """Writes README.md with the Hub's metadata. The licence is the base model's, or left out where it is not known."""
    name, arxiv = _PAPERS[args.method]
    tags = ["mmalign", args.method, "text-to-image", "diffusers-training", "diffusers", *(["lora"] if is_lora else [])]
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": base_model,
        "base_model_relation": "adapter" if is_lora else "finetune",
        "datasets": [data],
        "tags": tags,
    }
    if license:
        header["license"] = license
    import yaml

    paper = f" ([paper](https://hf.co/papers/{arxiv}))" if arxiv else ""
    load = "pipe.load_lora_weights(FOLDER)" if is_lora else "pipe = DiffusionPipeline.from_pretrained(FOLDER)"
    settings = {"axes": [args.latents, args.comparison, "+".join(args.loss_type)], **args.loss_options()}
    text = f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---
# {base_model} aligned by {name}

Trained with [mmalign](https://pypi.org/project/mmalign) by {name}{paper} on `{data}`.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base_model!r})
{load}
```

## Training

{args.describe(args.world_size)}

```json
{json.dumps(settings | {"max_steps": args.max_steps, "seed": args.seed}, indent=1)}
```

## Measured while training

```json
{json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}, indent=1)}
```

These numbers come from the training pairs. Whether the pictures got better is for a held-out judge: `mmalign evaluate`.
"""
    from mmalign.training.checkpoints import write_text

    write_text(folder / "README.md", text)
