"""Preference data: read and checked, compared, encoded once, and handed to a trainer.

source = load_pairs("playground")
encoded = encode_pairs(source, denoiser, resolution=32)
compared = compare(encoded.labels, None, ComparisonConfig(kind="human"))
loader = DataLoader(PreferenceDataset(encoded, compared), collate_fn=collate)
"""

from mmalign.data.answer_records import AnswerPair
from mmalign.data.answer_validation import AnswerReport, validate_answers
from mmalign.data.answers import AnswerSource, load_answers
from mmalign.data.comparison import Compared, ComparisonConfig, compare
from mmalign.data.dataset import PreferenceBatch, PreferenceDataset, PreferenceItem, collate
from mmalign.data.encoded import EncodedPairs
from mmalign.data.latents import encode_pairs
from mmalign.data.pairs import PairSource, load_pairs
from mmalign.data.records import BadRow, InvalidRow, PairRecord
from mmalign.data.scoring import score_pairs
from mmalign.data.smoothing import Normalizer
from mmalign.data.splitting import split_by_prompt
from mmalign.data.storage import cache_size, clear_cache, default_cache_dir
from mmalign.data.validation import DataReport, Problem, validate_pairs

__all__ = [
    "AnswerPair",
    "AnswerReport",
    "AnswerSource",
    "BadRow",
    "cache_size",
    "clear_cache",
    "collate",
    "compare",
    "Compared",
    "ComparisonConfig",
    "DataReport",
    "default_cache_dir",
    "encode_pairs",
    "EncodedPairs",
    "InvalidRow",
    "load_answers",
    "load_pairs",
    "Normalizer",
    "PairRecord",
    "PairSource",
    "PreferenceBatch",
    "PreferenceDataset",
    "PreferenceItem",
    "Problem",
    "score_pairs",
    "split_by_prompt",
    "validate_answers",
    "validate_pairs",
]
