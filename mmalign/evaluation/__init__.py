"""Evaluation: paired pictures, win rates with intervals over prompts, and a report that opens offline."""

from mmalign.evaluation.drawing import SamplerSettings, Side, draw_side
from mmalign.evaluation.evaluate import compare_sides, evaluate
from mmalign.evaluation.fingerprint import model_fingerprint
from mmalign.evaluation.generate import generate
from mmalign.evaluation.grid import side_by_side
from mmalign.evaluation.make_pairs import MadePairs, make_pairs
from mmalign.evaluation.report import ReportFiles, read_report, write_report
from mmalign.evaluation.result import EvaluationResult, PictureStatistic, Row, ScorerResult, Summary
from mmalign.evaluation.scorers import Scorer
from mmalign.evaluation.win_rate import Difference, WinRate, paired_difference, win_rate, win_rate_difference
from mmalign.evaluation.wording import headline

__all__ = [
    "compare_sides",
    "Difference",
    "draw_side",
    "evaluate",
    "EvaluationResult",
    "generate",
    "headline",
    "MadePairs",
    "make_pairs",
    "model_fingerprint",
    "paired_difference",
    "PictureStatistic",
    "read_report",
    "ReportFiles",
    "Row",
    "SamplerSettings",
    "Scorer",
    "ScorerResult",
    "Side",
    "side_by_side",
    "Summary",
    "win_rate",
    "win_rate_difference",
    "WinRate",
    "write_report",
]
