"""What a denoiser is conditioned on, one row an image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text embeddings (B, L, D); for SDXL also the pooled text (B, P) and time_ids (B, 6).

    time_ids: original height and width, top and left of the crop, target height and width. user: the tokens of whom the picture is
    for (B, U, W), and user_weight (B,): how strongly they act, 0 not at all; for networks with a user attention.
    """

    prompt_embeds: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B P"] | None = None
    time_ids: Float[Tensor, "B 6"] | None = None
    user: Float[Tensor, "B U W"] | None = None
    user_weight: Float[Tensor, " B"] | None = None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Conditioning":
        """The chosen rows; an int keeps the row axis."""
        if isinstance(index, int):
            index = [index]
        return Conditioning(
            *(None if value is None else value[_on(index, value)] for value in self._values())  # type: ignore[arg-type]
        )

    def repeat_pair(self) -> "Conditioning":
        """The rows twice over, for a batch laid out as [chosen…, rejected…]."""
        return Conditioning.cat([self, self])

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of all parts, which must carry the same fields."""
        columns = []
        for column in zip(*(part._values() for part in parts), strict=True):
            present = [value for value in column if value is not None]
            if present and len(present) != len(parts):
                raise ValueError("cannot join conditionings of which only some have pooled text, time_ids or a user")
            columns.append(torch.cat(present) if present else None)
        return Conditioning(*columns)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Moved, and the text cast; time_ids keep their dtype, because bfloat16 cannot hold a size such as 1023, as users do."""
        return Conditioning(
            self.prompt_embeds.to(device=device, dtype=dtype),
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
            *(None if value is None else value.to(device=device) for value in self._values()[2:]),
        )

    def where(self, mask: Bool[Tensor, " B"], other: "Conditioning") -> "Conditioning":
        """This row's text where mask is true, other's where it is false; time_ids are the image's and stay.

        Prompt dropout: `embeds.where(~dropped, empty)` before repeat_pair, so that both sides of a pair share the
        decision. `other` has B rows, or one that serves all.
        """
        if (self.pooled is None) != (other.pooled is None):
            raise ValueError("one conditioning has pooled text and the other has not")
        mask = mask.to(self.prompt_embeds.device)
        embeds = torch.where(mask[:, None, None], self.prompt_embeds, other.prompt_embeds)
        pooled = self.pooled
        if pooled is not None and other.pooled is not None:
            pooled = torch.where(mask[:, None], pooled, other.pooled)
        return replace(self, prompt_embeds=embeds, pooled=pooled)

    def _values(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def _on(index: slice | Sequence[int] | Tensor, value: Tensor) -> slice | list[int] | Tensor:
    if isinstance(index, Tensor):
        return index.to(value.device)
    return index if isinstance(index, slice) else list(index)
