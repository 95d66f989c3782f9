"""The whole job in one call: align, evaluate with a judge that nothing was trained on, report, save."""

import logging
from pathlib import Path
from typing import Any

from mmalign.evaluation import EvaluationResult, evaluate, write_report
from mmalign.playground import judges, measure, pairs, settings
from mmalign.rewards import scorer

logger = logging.getLogger("mmalign")

METHODS = {"smpo": "SmPOPipeline", "inpo": "InPOPipeline", "dpo": "DiffusionDPOPipeline", "sft": "DiffusionSFTPipeline"}


def run(
    output_dir: str | Path,
    *,
    method: str = "smpo",
    num_prompts: int = 500,
    seed: int = 0,
    **options: Any,
) -> tuple[EvaluationResult, Path]:
    """Aligns the playground's Stable Diffusion with `method`; returns the evaluation and the path of `report.html`.

    `options`: of the method's config, on top of its preset "playground".

    `output_dir` then holds the report, the picture `side_by_side.png`, the LoRA (`pytorch_lora_weights.safetensors`), and the aligned
    pipeline in `pipeline/`, which plain diffusers loads.
    """
    import mmalign

    folder = Path(output_dir)
    pipeline_class = getattr(mmalign, METHODS[method])
    pipe = pipeline_class.from_pretrained("playground")
    base = pipeline_class.from_pretrained("playground")
    aligned = pipe.align("playground", output_dir=folder, seed=seed, **options)
    pipe.save_pretrained(folder / "pipeline")
    seen = {**pipeline_class.config_class.presets["playground"], **options}.get("scorer")
    result = compare(pipe, base, folder / "evaluation", num_prompts=num_prompts, seed=seed, scorer_seen=seen)
    files = write_report(result, folder, history=aligned.history)
    return result, files.html


def compare(
    aligned: Any, base: Any, output_dir: Path, *, num_prompts: int, seed: int, scorer_seen: str | None = None
) -> EvaluationResult:
    """Aligned against base on held-out prompts: judge B tells the win rate, the reward is reported beside it."""
    asked = pairs.prompts().test
    reward = scorer("playground")
    return evaluate(
        aligned,
        base,
        asked[:num_prompts],
        scorers=[judges.load("B"), reward],
        output_dir=output_dir,
        num_inference_steps=settings.NUM_INFERENCE_STEPS,
        guidance_scale=measure.chosen_guidance(),
        trained_on=[reward.name] if scorer_seen else [],
        seed=1_000_000 * (seed + 1),
        batch_size=64,
        tie_margin=settings.TIE_MARGIN,
    )
