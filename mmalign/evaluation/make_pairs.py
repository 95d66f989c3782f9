"""Preference pairs of one's own: a model draws several pictures a prompt, a scorer picks the best and the worst."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmalign.evaluation.drawing import Side, check_prompts, draw_side, prompt_numbers
from mmalign.evaluation.generate import Pipeline
from mmalign.evaluation.scorers import score_files
from mmalign.files import write_file, write_json
from mmalign.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePairs:
    """A folder that `load_pairs` reads, how many pairs it holds, and how many prompts gave none."""

    folder: Path
    num_pairs: int
    num_left_out: int


def make_pairs(
    pipe: Pipeline,
    prompts: Sequence[str],
    scorer: Scorer,
    *,
    output_dir: str | Path,
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float | None = None,
    num_images_per_prompt: int = 4,
    min_margin: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> MadePairs:
    """Draws and scores, and writes metadata.jsonl with the best picture of each prompt as chosen and the worst as rejected.

    A prompt whose best and worst score lie no further apart than `min_margin` gives no pair. Called again, only missing pictures are
    drawn. Both scores are kept (`chosen_score`, `rejected_score`), and in judged_by.json whose they are. Raises ValueError where no
    prompt gives a pair.
    """
    check_prompts(prompts)
    prompts = list(dict.fromkeys(prompts))
    if num_images_per_prompt < 2:
        raise ValueError(f"num_images_per_prompt must be at least 2, got {num_images_per_prompt}")
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin must be a number, 0 or more, got {min_margin}")
    side = draw_side(
        pipe,
        prompts,
        label="drawn",
        output_dir=output_dir,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        batch_size=batch_size,
        height=height,
        width=width,
        progress=progress,
    )
    scored = score_files([scorer], side.pictures, side.prompts, batch_size=batch_size, progress=progress)
    rows = _rows(side, scored[scorer.name].tolist(), Path(output_dir), min_margin)
    if not rows:
        raise ValueError(
            f"no prompt has two pictures whose {scorer.name} scores differ by more than {min_margin:g}: lower min_margin, "
            "or draw more pictures a prompt"
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_json(Path(output_dir) / "judged_by.json", {"scorer": scorer.name, "fingerprint": scorer.fingerprint})
    write_file(Path(output_dir) / "metadata.jsonl", lines)
    return MadePairs(folder=Path(output_dir), num_pairs=len(rows), num_left_out=len(prompts) - len(rows))


def _rows(side: Side, scores: list[float], folder: Path, min_margin: float) -> list[dict[str, str | float]]:
    drawn: dict[int, list[int]] = {}
    for row, number in enumerate(prompt_numbers(side.prompts)):
        drawn.setdefault(number, []).append(row)
    found: list[dict[str, str | float]] = []
    for group in drawn.values():
        best, worst = max(group, key=scores.__getitem__), min(group, key=scores.__getitem__)
        if scores[best] - scores[worst] > min_margin:
            found.append(
                {
                    "prompt": side.prompts[best],
                    "chosen": side.pictures[best].relative_to(folder).as_posix(),
                    "rejected": side.pictures[worst].relative_to(folder).as_posix(),
                    "chosen_score": scores[best],
                    "rejected_score": scores[worst],
                }
            )
    return found
