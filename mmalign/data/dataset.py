"""PreferenceDataset: encoded pairs with their winners, one item a pair or captioned picture, as a trainer's data loader wants them."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from mmalign.data.comparison import Compared
from mmalign.data.encoded import EncodedPairs


class PreferenceItem(TypedDict):
    """One pair, or a captioned picture, the chosen of no other. row: its number in the source, which keys every random draw.

    size_*: six numbers, see EncodedPairs.
    """

    row: int
    chosen: Float[Tensor, "C *F h w"]
    rejected: NotRequired[Float[Tensor, "C *F h w"]]
    prompt_index: int
    strength: float
    size_chosen: Int[Tensor, "6"]
    size_rejected: NotRequired[Int[Tensor, "6"]]


class PreferenceBatch(TypedDict):
    """B pairs; the text is encoded.conditioning(prompt_index)."""

    row: Int[Tensor, " B"]
    chosen: Float[Tensor, "B C *F h w"]
    rejected: NotRequired[Float[Tensor, "B C *F h w"]]
    prompt_index: Int[Tensor, " B"]
    strength: Float[Tensor, " B"]
    size_chosen: Int[Tensor, "B 6"]
    size_rejected: NotRequired[Int[Tensor, "B 6"]]


class PreferenceDataset(Dataset[PreferenceItem]):
    """The pairs that `compared` keeps, each ordered as (chosen, rejected)."""

    def __init__(self, encoded: EncodedPairs, compared: Compared) -> None:
        if compared.num_pairs != len(encoded):
            raise ValueError(
                f"{compared.num_pairs} pairs were compared but {len(encoded)} are encoded: call "
                "compare(encoded.labels, …) with these very pairs"
            )
        if len(compared) == 0:
            raise ValueError(f"no pair is left to train on: {compared}")
        self.encoded, self.compared = encoded, compared

    def __len__(self) -> int:
        return len(self.compared)

    @property
    def buckets(self) -> Int[Tensor, " N"] | None:
        """Which shape each item has; None where all have the same."""
        return None if self.encoded.bucket is None else self.encoded.bucket[self.compared.kept]

    def __getitem__(self, item: int) -> PreferenceItem:
        pair = self.compared.kept[item : item + 1] if item >= 0 else self.compared.kept[item].reshape(1)
        if not len(pair):
            raise IndexError(f"pair {item} of {len(self)}")
        first = int(self.compared.first[item])
        sides = self.encoded.latents(pair)[0]
        found = PreferenceItem(
            row=int(self.encoded.rows[pair]),
            chosen=sides[first],
            prompt_index=int(self.encoded.prompt_index[pair]),
            strength=float(self.compared.strength[item]),
            size_chosen=self.encoded.sizes(pair, first)[0],
        )
        if len(sides) == 2:
            found["rejected"], found["size_rejected"] = sides[1 - first], self.encoded.sizes(pair, 1 - first)[0]
        return found


def collate(items: Sequence[PreferenceItem]) -> PreferenceBatch:
    """Stack items into a batch of tensors."""
    batch = PreferenceBatch(
        row=torch.tensor([item["row"] for item in items]),
        chosen=torch.stack([item["chosen"] for item in items]),
        prompt_index=torch.tensor([item["prompt_index"] for item in items]),
        strength=torch.tensor([item["strength"] for item in items], dtype=torch.float32),
        size_chosen=torch.stack([item["size_chosen"] for item in items]),
    )
    if "rejected" in items[0]:
        batch["rejected"] = torch.stack([item["rejected"] for item in items])
        batch["size_rejected"] = torch.stack([item["size_rejected"] for item in items])
    return batch
