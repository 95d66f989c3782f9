"""Training a Denscore on a tiny CLIP: it learns, weighs prompts alike, resumes exactly, and leaves a scorer that reads segments."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.rewards import ClipScorer, scorer
from mmalign.training.denscore import ComparedPairs, DenscoreConfig, DenscoreTrainer

PROMPTS = ("A red shirt. It lies on white.", "A blue bag. The background is black. It is small.", "A green dress.")


def rows(number: int = 12) -> list[dict[str, Any]]:
    """Whoever asked, brighter pictures are preferred; every fourth pair is a tie."""
    rng = np.random.default_rng(0)

    def picture(low: int, high: int) -> Image.Image:
        return Image.fromarray(rng.integers(low, high, (24, 24, 3), dtype=np.uint8))

    made = []
    for row in range(number):
        first = 0.5 if row % 4 == 3 else float(row % 2)
        low, high = (150, 0) if first == 1 else (0, 150)
        sides = {"jpg_0": picture(low, low + 100), "jpg_1": picture(high, high + 100)}
        made.append({"caption": PROMPTS[row % 3], "label_0": first, "label_1": 1 - first, **sides})
    return made


def run(clip_folder: Path, folder: Path, data: Any = None, **options: Any) -> DenscoreTrainer:
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "learning_rate": 3e-3, "warmup_steps": 0,
    }  # fmt: skip
    args = DenscoreConfig(**given | options)
    return DenscoreTrainer(model=str(clip_folder), args=args, train_dataset=rows() if data is None else data)


def weights(trainer: DenscoreTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_it_learns_what_people_prefer_and_leaves_a_scorer(clip_folder: Path, tmp_path: Path) -> None:
    trainer = run(clip_folder, tmp_path, max_steps=25)
    trainer.train()
    trainer.save_model()
    logged = trainer.state.log_history
    assert logged[0]["loss"] > 1.5 * logged[-2]["loss"]
    assert all(0 <= entry["accuracy"] <= 1 for entry in logged if "loss" in entry) and logged[-2]["accuracy"] == 1
    reward, before = (scorer(f"clip:{place}").in_segments() for place in (tmp_path, clip_folder))
    assert reward.fingerprint != before.fingerprint
    clear = [row for row in rows() if row["label_0"] != 0.5]
    margins = [
        reward.score([row["jpg_0"], row["jpg_1"]], [row["caption"]] * 2, scaled=True).diff().neg().item()
        for row in clear
    ]
    assert all((margin > 0) == (row["label_0"] == 1) for margin, row in zip(margins, clear, strict=True))


def test_the_loss_is_the_weighted_mean_over_the_scorer_s_own_logits(clip_folder: Path, tmp_path: Path) -> None:
    data = [rows()[0], rows()[3], rows()[1]]
    trainer = run(clip_folder, tmp_path, data)
    # The first prompt has two of the three pairs, and each prompt counts the same.
    assert trainer.train_dataset.weights == pytest.approx([0.75, 0.75, 1.5])
    inputs = trainer.collate([trainer.train_dataset[item] for item in range(3)])
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, inputs))
    clip = ClipScorer.from_pretrained(clip_folder).in_segments()
    expected = 0.0
    for row, weight in zip(data, (0.75, 0.75, 1.5), strict=True):
        scores = clip.score([row["jpg_0"], row["jpg_1"]], [row["caption"]] * 2, scaled=True)
        chosen, label = float((scores[0] - scores[1]).sigmoid()), row["label_0"]
        entropy = np.log(2) if label == 0.5 else 0.0
        expected += weight * (-label * np.log(chosen) - (1 - label) * np.log(1 - chosen) - entropy) / 3
    assert found == pytest.approx(expected, rel=1e-4)


def test_its_gradient_reaches_both_towers_and_the_scale(clip_folder: Path, tmp_path: Path) -> None:
    trainer = run(clip_folder, tmp_path)
    inputs = trainer.collate([trainer.train_dataset[item] for item in range(4)])
    trainer.compute_loss(trainer.model, inputs).backward()
    without = [name for name, value in trainer.model.named_parameters() if value.grad is None or not value.grad.any()]
    # A class embedding beyond the tower's own, and nothing else, may be left out.
    assert without == [], without


def test_accumulated_batches_are_one_large_batch(clip_folder: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    whole, parts = (
        run(clip_folder, tmp_path / "whole", **common),
        run(clip_folder, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2, **common),
    )
    started = weights(whole)
    for trainer in (whole, parts):
        trainer.train()
    moved = 0.0
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=1e-6)
        moved = max(moved, float((value - started[name]).abs().max()))
    assert moved > 1e-4


def test_a_stopped_run_goes_on_exactly(clip_folder: Path, tmp_path: Path) -> None:
    whole = run(clip_folder, tmp_path / "whole", max_steps=4)
    whole.train()
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(clip_folder, tmp_path / "parts", **options).train()
    second = run(clip_folder, tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    assert second.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    # A checkpoint is a scorer too.
    scorer(f"clip:{tmp_path / 'parts' / 'checkpoint-2'}").in_segments()


def test_unreadable_rows_are_left_out_and_told(
    clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = rows(4)
    broken[1]["label_0"] = broken[1]["label_1"] = 3.0
    with caplog.at_level(logging.WARNING, logger="mmalign"):
        trainer = run(clip_folder, tmp_path, broken)
    assert trainer.train_dataset.rows == [0, 2, 3] and "1 of 4 rows left out" in caplog.text
    from mmalign.data import load_pairs

    broken[0]["caption"] = ""
    with pytest.raises(ValueError, match="no pair that can be read"):
        ComparedPairs(load_pairs(broken[:2]))


def test_a_loss_that_is_not_finite_stops_the_run(clip_folder: Path, tmp_path: Path) -> None:
    trainer = run(clip_folder, tmp_path)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(float("nan"))
    with pytest.raises(ValueError, match="at step 0: lower learning_rate"):
        trainer.train()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        DenscoreConfig(output_dir=str(tmp_path), label_smoothing_factor=0.1)
