"""Training on pairs of several shapes: one shape a batch, every row once an epoch, true sizes, the same sequence after a stop."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training import worker
from training.runs import history, lora, trainer

from mmalign.training.bucketing import InBuckets, bucket_batches
from mmalign.training.sampling import Shuffled

# (height, width); at a resolution of 16 the shapes are 20×12, 16×16 and 12×20.
TALL, SQUARE, WIDE = (40, 24), (24, 24), (22, 36)


def mixed(*shapes: tuple[int, int]) -> list[dict[str, Any]]:
    """A pair of each shape, its two pictures of slightly different sizes, chosen brighter."""
    rng = np.random.default_rng(0)

    def picture(height: int, width: int, low: int, high: int) -> Image.Image:
        return Image.fromarray(rng.integers(low, high, (height, width, 3), dtype=np.uint8))

    return [
        {"prompt": f"a red bag {n}", "chosen": picture(h, w, 60, 255), "rejected": picture(h + 1, w + 1, 0, 200)}
        for n, (h, w) in enumerate(shapes)
    ]


EVEN = mixed(TALL, SQUARE, WIDE, TALL, SQUARE, WIDE, SQUARE, SQUARE)


def watched(run: Any) -> list[tuple[list[int], tuple[int, ...], torch.Tensor]]:
    """(rows, shape of the latents, time ids) of every batch from now on."""
    seen = []
    plain = run._pairs

    def pairs(data: Any, inputs: Any, epoch: int) -> Any:
        made = plain(data, inputs, epoch)
        seen.append((made.rows, tuple(made.x0.shape[1:]), made.conditioning.time_ids))
        return made

    run._pairs = pairs
    return seen


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5), st.integers(0, 5))
def test_every_batch_is_of_one_bucket_and_every_row_comes_once(of: list[int], size: int, epoch: int) -> None:
    buckets = torch.tensor(of)
    sampler = InBuckets(Shuffled(len(of), 7, lambda: epoch), buckets, size)
    order = list(sampler)
    assert len(order) == len(sampler) == len(set(order)) and order == list(sampler)
    for start in range(0, len(order), size):
        assert len(order[start : start + size]) == size and len({of[row] for row in order[start : start + size]}) == 1
    # Only what fills no batch of its bucket is left out.
    left = [of[row] for row in set(range(len(of))) - set(order)]
    assert all(left.count(bucket) == of.count(bucket) % size for bucket in set(of))
    batches = bucket_batches(buckets, list(range(len(of))), size, drop_last=False)
    assert sorted(row for batch in batches for row in batch) == list(range(len(of)))
    assert all(len(batch) <= size and len({of[row] for row in batch}) == 1 for batch in batches)


def test_the_order_follows_seed_and_epoch() -> None:
    buckets = torch.tensor([0, 1, 2] * 10)

    def order(seed: int, epoch: int) -> list[int]:
        return list(InBuckets(Shuffled(30, seed, lambda: epoch), buckets, 2))

    assert order(0, 0) == order(0, 0) and len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    kinds = [[buckets[row].item() for row in order(seed, 0)[::2]] for seed in range(200)]
    # No bucket's batches gather at an end of the epoch.
    early = np.mean([[kind.index(bucket) for bucket in (0, 1, 2)] for kind in kinds], axis=0)
    assert np.ptp(early) < 0.6


@pytest.mark.parametrize("method", ["dpo", "inpo", "smpo"])
def test_a_step_on_mixed_shapes_with_true_sizes(method: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, method, kind="sdxl", data=EVEN, aspect_buckets=True, max_steps=4)
    seen = watched(run)
    run.train()
    assert sorted(row for rows, _, _ in seen for row in rows) == list(range(8)) and len(seen) == 4
    assert {shape for _, shape, _ in seen} == {(4, 10, 6), (4, 8, 8), (4, 6, 10)}
    for rows, (_, height, width), ids in seen:
        for at, row in enumerate(rows):
            chosen, rejected = EVEN[row]["chosen"], EVEN[row]["rejected"]
            for line, image in ((ids[at], chosen), (ids[len(rows) + at], rejected)):
                assert line[:2].tolist() == [image.height, image.width]
                assert line[4:].tolist() == [2 * height, 2 * width]
    assert all(np.isfinite(history(run)))


def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": EVEN, "aspect_buckets": True, "max_steps": 7, "save_strategy": "steps"}
    options |= {"save_steps": 5, "learning_rate": 1e-3, "gradient_accumulation_steps": 1}
    whole = trainer(tmp_path, peft_config=lora(lora_dropout=0.2), **options)
    seen = watched(whole)
    whole.train()
    (tmp_path / "checkpoint-7").rename(tmp_path / "gone")
    again = trainer(tmp_path, peft_config=lora(lora_dropout=0.2), **options)
    seen_again = watched(again)
    again.train(resume_from_checkpoint="latest")
    assert [rows for rows, _, _ in seen_again] == [rows for rows, _, _ in seen[5:]]
    assert history(again) == pytest.approx(history(whole), abs=1e-6)
    assert sorted(row for rows, _, _ in seen[:4] for row in rows) == list(range(8))
    assert [rows for rows, _, _ in seen[:3]] != [rows for rows, _, _ in seen[4:]]


def test_accumulated_micro_batches_may_differ_in_shape(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=EVEN, aspect_buckets=True, max_steps=2, gradient_accumulation_steps=2)
    seen = watched(run)
    run.train()
    assert len(seen) == 4 and sorted(row for rows, _, _ in seen for row in rows) == list(range(8))


def test_two_processes_share_an_epoch(tmp_path: Path) -> None:
    ranks = worker.together(2, tmp_path, {"data": EVEN, "aspect_buckets": True, "max_steps": 2})
    rows = [[row for _, row, _ in rank["rows"]] for rank in ranks]
    assert sorted(rows[0] + rows[1]) == list(range(8)) and len(rows[0]) == len(rows[1]) == 4


def test_what_fills_no_batch_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmalign"):
        run = trainer(tmp_path, data=mixed(TALL, SQUARE, SQUARE, SQUARE, WIDE, WIDE), aspect_buckets=True, max_steps=3)
    told = "6×10: 1, 8×8: 3, 10×6: 2; 2 of 6 fill no batch of 2 in an epoch, 1 of them in none ever"
    assert told in caplog.text
    seen = watched(run)
    run.train()
    # Two batches are an epoch: the third one begins the next.
    assert len(seen) == 3 and all(0 not in rows for rows, _, _ in seen)
    with pytest.raises(ValueError, match="3 usable pairs do not fill one batch of 2 of one shape"):
        trainer(tmp_path, data=mixed(TALL, SQUARE, WIDE), aspect_buckets=True)
    with pytest.raises(ValueError, match="aspect_buckets needs dataloader_drop_last=True"):
        trainer(tmp_path, data=EVEN, aspect_buckets=True, dataloader_drop_last=False)


def test_evaluation_counts_every_pair_once(tmp_path: Path) -> None:
    held_out = mixed(TALL, SQUARE, WIDE, SQUARE, WIDE)
    for number, pair in enumerate(held_out):
        pair["prompt"] = f"a green dress {number}"
    run = trainer(tmp_path, data=EVEN, eval_dataset=held_out, aspect_buckets=True, per_device_eval_batch_size=4)
    seen = watched(run)
    one = run.evaluate()
    assert sorted(row for rows, _, _ in seen for row in rows) == list(range(5)) and len(seen) == 3
    run.args.per_device_eval_batch_size = 1
    assert run.evaluate()["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert run.one_forward()().shape[0] == 4


def test_clips_and_kept_paths_have_shapes_too(tmp_path: Path) -> None:
    def clip(seed: int, height: int, width: int) -> list[Image.Image]:
        frames = np.random.default_rng(seed).integers(0, 255, (9, height, width, 3), dtype=np.uint8)
        return [Image.fromarray(frame) for frame in frames]

    data = [
        {"prompt": "a", "chosen": clip(2 * n, *shape), "rejected": clip(2 * n + 1, *shape)}
        for n, shape in enumerate((TALL, TALL, WIDE, WIDE))
    ]
    kept = {"inversion_landings": "in_turn", "inversion_model": "reference", "cache_dir": str(tmp_path)}
    run = trainer(
        tmp_path, "smpo", kind="cogvideox", data=data, resolution=32, aspect_buckets=True, max_steps=4, **kept
    )
    seen = watched(run)
    run.train()
    shapes = {shape for _, shape, _ in seen}
    assert len(shapes) == 2 and {shape[:2] for shape in shapes} == {(4, 3)}
    assert all(np.isfinite(history(run)))
