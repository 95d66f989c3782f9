"""Conditioning: rows stay together, dropout is decided per pair, sizes survive a cast."""

import pytest
import torch

from mmalign.denoisers import Conditioning


def conditioning(rows: int = 3, start: int = 0, **drop: None) -> Conditioning:
    number = torch.arange(start, start + rows).float()
    fields = dict(
        prompt_embeds=number[:, None, None].expand(rows, 4, 2),
        pooled=number[:, None].expand(rows, 5),
        time_ids=number[:, None].expand(rows, 6) + 1023,
    )
    return Conditioning(**(fields | drop))


def row_numbers(c: Conditioning) -> list[float]:
    assert c.pooled is not None and c.time_ids is not None
    columns = [c.prompt_embeds[:, 0, 0], c.pooled[:, 0], c.time_ids[:, 0] - 1023]
    assert torch.equal(columns[0], columns[1]) and torch.equal(columns[0], columns[2])
    return columns[0].tolist()


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 2]), [2, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_indexing_takes_the_same_rows_of_every_field(index: object, rows: list[float]) -> None:
    taken = conditioning()[index]  # type: ignore[index]
    assert row_numbers(taken) == rows and len(taken) == len(rows)


def test_repeat_pair_and_cat_keep_the_order() -> None:
    assert row_numbers(conditioning().repeat_pair()) == [0, 1, 2, 0, 1, 2]
    assert row_numbers(Conditioning.cat([conditioning(2), conditioning(2, start=7)])) == [0, 1, 7, 8]
    with pytest.raises(ValueError, match="only some"):
        Conditioning.cat([conditioning(), conditioning(pooled=None)])


def test_dropout_replaces_text_and_keeps_sizes_and_is_shared_in_a_pair() -> None:
    empty = Conditioning(torch.full((1, 4, 2), -1.0), torch.full((1, 5), -1.0))
    pair = conditioning().where(torch.tensor([True, False, True]), empty).repeat_pair()
    assert pair.prompt_embeds[:, 0, 0].tolist() == [0, -1, 2, 0, -1, 2]
    assert pair.pooled is not None and pair.pooled[:, 0].tolist() == [0, -1, 2, 0, -1, 2]
    assert pair.time_ids is not None and pair.time_ids[:, 0].tolist() == [1023, 1024, 1025] * 2
    with pytest.raises(ValueError, match="pooled"):
        conditioning().where(torch.tensor([True, False, True]), conditioning(pooled=None))


def test_casting_to_bfloat16_leaves_sizes_exact() -> None:
    cast = conditioning().to(dtype=torch.bfloat16)
    assert cast.prompt_embeds.dtype == torch.bfloat16
    assert cast.time_ids is not None and cast.time_ids[:, 0].tolist() == [1023, 1024, 1025]
