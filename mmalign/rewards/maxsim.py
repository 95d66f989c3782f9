"""Late interaction (ColBERT, arXiv:2004.12832) as a scorer of texts: how well a document answers a query, token against token.

    MaxSimScorer.from_pretrained("LiquidAI/LFM2-ColBERT-350M").score(["What is in the bag?"], ["A red shoe."])

Reads the folders that PyLate writes: a transformers trunk, a bias-free projection in 1_Dense, and the way of reading texts in
config_sentence_transformers.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmalign.files import absence_explained
from mmalign.rewards.checkpoints import fit_weights, part_of, read_checkpoint, shape_of
from mmalign.rewards.fingerprints import module_hash, text_hash, tokenizer_hash

_log = logging.getLogger(__name__)
_READING, _DENSE = "config_sentence_transformers.json", "1_Dense"
_FILES = ["*.json", "*.jinja", "*.safetensors", f"{_DENSE}/*.json", f"{_DENSE}/*.safetensors"]
_PUNCTUATION = tuple("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How PyLate reads texts: its fields, and its defaults where a file does not say.

    query_prefix, document_prefix     one token that stands behind the first; empty: none
    query_length, document_length     tokens at most, prefix included
    do_query_expansion                queries are filled up to query_length, and the filling is matched as well
    attend_to_expansion_tokens        the model attends to the filling
    skiplist_words                    tokens of documents that no query is matched with
    """

    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_length: int = 32
    document_length: int = 180
    do_query_expansion: bool = True
    attend_to_expansion_tokens: bool = False
    skiplist_words: tuple[str, ...] = _PUNCTUATION

    @classmethod
    def of(cls, folder: Path) -> Reading:
        """What a folder's file says; what it leaves open, and null, is PyLate's default."""
        path = folder / _READING
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = {field.name: said[field.name] for field in fields(cls) if said.get(field.name) is not None}
        if "skiplist_words" in known:
            known["skiplist_words"] = tuple(known["skiplist_words"])
        return cls(**known)


def max_sim(
    queries: Float[Tensor, "B Q D"],
    documents: Float[Tensor, "B K D"],
    query_mask: Bool[Tensor, "B Q"],
    document_mask: Bool[Tensor, "B K"],
) -> Float[Tensor, " B"]:
    """Σ_i max_j ⟨q_i, d_j⟩ over the tokens that the masks leave."""
    nearest = (queries @ documents.mT).masked_fill(~document_mask[:, None], -torch.inf).amax(-1)
    return nearest.masked_fill(~query_mask, 0).sum(-1)


class MaxSimScorer:
    """Scores texts; higher is better, at most the number of the query's tokens.

    num_truncated: how many of the texts so far were longer than what is read of them; the log says so once.
    """

    def __init__(
        self, trunk: Any, projection: nn.Linear, tokenizer: Any, reading: Reading, *, name: str, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = nn.ModuleDict({"trunk": trunk, "projection": projection}).eval().requires_grad_(False)
        self.tokenizer, self.reading = tokenizer, reading
        self.name, self.batch_size, self.num_truncated = name, batch_size, 0
        self._prefixes = [
            _token_of(tokenizer, prefix) if prefix else None
            for prefix in (reading.query_prefix, reading.document_prefix)
        ]
        # What PyLate fills with: the mask token of an encoder, the end token of a language model.
        fills = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._fill = next((token for token in fills if token is not None), None)
        if self._fill is None:
            raise ValueError(f"{name}: its tokenizer has no mask, end or padding token to fill queries with")
        # A word that is no token by itself is none to skip.
        skipped = (tokenizer.convert_tokens_to_ids(word) for word in reading.skiplist_words)
        self._skipped = torch.tensor([token for token in skipped if token is not None], dtype=torch.long)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> MaxSimScorer:
        """From a folder or Hub id in PyLate's layout, safetensors only."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        folder = Path(model).expanduser()
        with absence_explained(f"download {model} from the Hub, weights as safetensors, and pass its folder"):
            if not folder.is_dir():
                from huggingface_hub import snapshot_download

                folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=_FILES))
            elif revision is not None:
                raise ValueError(f"revision has no effect on the folder {folder}; leave it out")
            config = AutoConfig.from_pretrained(folder)
            if any("Bidirectional" in kind for kind in config.architectures or ()):
                raise ValueError(
                    f"{model} is a {config.architectures[0]}, which transformers has not: read as the causal model its scores would "
                    "mean nothing"
                )
            trunk: Any = AutoModel.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        projection = _projection(folder / _DENSE).to(dtype)
        return cls(
            trunk.to(device),
            projection.to(device),
            tokenizer,
            Reading.of(folder),
            name=name or f"maxsim:{model}",
            batch_size=batch_size,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over weights (with their dtype), tokenizer and the way of reading."""
        parts = [module_hash(part, self.name) for part in self.model.values()]
        return text_hash([*parts, tokenizer_hash(self.tokenizer), asdict(self.reading), self._fill])

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> Float[Tensor, " N"]:
        """Score of query i and document i, in float32 on the CPU."""
        if isinstance(queries, str) or isinstance(documents, str):
            raise ValueError("score takes lists of queries and documents, got a text: put it into a list")
        if len(queries) != len(documents):
            raise ValueError(f"{len(queries)} queries and {len(documents)} documents: give one document a query")
        parts = [torch.zeros(0)]
        for start in range(0, len(queries), self.batch_size):
            rows = slice(start, start + self.batch_size)
            asked, told = self.embed(queries[rows], is_query=True), self.embed(documents[rows], is_query=False)
            if (empty := ~told[1].any(1)).any():
                at = start + int(empty.nonzero()[0])
                raise ValueError(f"document {at} has no token that a query is matched with: {documents[at][:60]!r}")
            parts.append(max_sim(asked[0], told[0], asked[1], told[1]).cpu())
        scores = torch.cat(parts)
        if not torch.isfinite(scores).all():
            raise ValueError(f"{self.name} gave NaN or infinite scores: load it in float32")
        return scores

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, is_query: bool) -> tuple[Float[Tensor, "B T D"], Bool[Tensor, "B T"]]:
        """Unit vectors of the texts' tokens in float32, and which of them are matched."""
        ids, attended, real = (tensor.to(self.device) for tensor in self._read(texts, is_query))
        hidden = self.model["trunk"](input_ids=ids, attention_mask=attended.long()).last_hidden_state
        vectors = normalize(self.model["projection"](hidden).float(), dim=-1)
        if not is_query:
            return vectors, real & ~torch.isin(ids, self._skipped.to(ids.device))
        return vectors, torch.ones_like(real) if self.reading.do_query_expansion else real

    def _read(
        self, texts: Sequence[str], is_query: bool
    ) -> tuple[Integer[Tensor, "B T"], Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Tokens, filled on the right; which of them the model attends to; which are the text's own."""
        reading, prefix = self.reading, self._prefixes[0 if is_query else 1]
        longest = reading.query_length if is_query else reading.document_length
        room = longest - (prefix is not None)
        rows = self.tokenizer([text.strip() for text in texts], truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
        self._count_cut(sum(len(row) > room for row in rows), len(rows))
        if any(len(row) > room for row in rows):
            rows = self.tokenizer([text.strip() for text in texts], truncation=True, max_length=room, padding=False)[
                "input_ids"
            ]
        rows = [row if prefix is None else [*row[:1], prefix, *row[1:]] for row in rows]
        expanded = is_query and reading.do_query_expansion
        width = longest if expanded else max(1, *map(len, rows))
        ids = torch.tensor([[*row, *[self._fill] * (width - len(row))] for row in rows])
        real = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        attended = torch.ones_like(real) if expanded and reading.attend_to_expansion_tokens else real
        return ids, attended, real

    def _count_cut(self, count: int, total: int) -> None:
        if count and not self.num_truncated:
            _log.warning(
                "%s reads the beginning of long texts only: %d of %d were cut (said once; num_truncated counts on)",
                self.name,
                count,
                total,
            )
        self.num_truncated += count


def _token_of(tokenizer: Any, text: str) -> int:
    known = tokenizer.get_vocab()
    if text not in known:
        raise ValueError(
            f"the tokenizer has no token {text!r}, which its query or document prefix names: give PyLate's folder"
        )
    return int(known[text])


def _projection(folder: Path) -> nn.Linear:
    what = "a ColBERT projection"
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    activation = str(said.get("activation_function", "Identity")).rsplit(".", 1)[-1]
    if activation != "Identity":
        raise ValueError(f"{folder} projects through {activation}: a ColBERT's projection is linear")
    state = read_checkpoint(folder / "model.safetensors")
    width, depth = shape_of(state, "linear.weight", what)
    projection = nn.Linear(depth, width, bias=False)
    fit_weights(projection, part_of(state, "linear.", what), what)
    return projection
