"""Evaluation: paired pictures, win rates with intervals over prompts, and a report that opens offline."""

from mmalign.evaluation.compare_report import comparison_lines, write_comparison
from mmalign.evaluation.compare_runs import Comparison, RunDifference, ScorerComparison, compare_results
from mmalign.evaluation.drawing import SamplerSettings, Side, draw_side
from mmalign.evaluation.evaluate import compare_sides, evaluate
from mmalign.evaluation.findings import conclusion, moved_statistics, result_lines, retention_line, scorer_line
from mmalign.evaluation.fingerprint import model_fingerprint
from mmalign.evaluation.generate import generate
from mmalign.evaluation.grid import side_by_side
from mmalign.evaluation.holm import Corrected, holm
from mmalign.evaluation.make_pairs import MadePairs, make_pairs
from mmalign.evaluation.report import ReportFiles, read_report, write_report
from mmalign.evaluation.result import (
    EvaluationResult,
    PictureStatistic,
    Retention,
    Row,
    ScalePoint,
    ScorerResult,
    Summary,
)
from mmalign.evaluation.retention import RetentionPlan
from mmalign.evaluation.win_rate import Difference, WinRate, paired_difference, win_rate, win_rate_difference
from mmalign.evaluation.wording import headline
from mmalign.rewards.scorer import Scorer

__all__ = [
    "compare_results",
    "compare_sides",
    "Comparison",
    "comparison_lines",
    "conclusion",
    "Corrected",
    "Difference",
    "draw_side",
    "evaluate",
    "EvaluationResult",
    "generate",
    "headline",
    "holm",
    "MadePairs",
    "make_pairs",
    "model_fingerprint",
    "moved_statistics",
    "paired_difference",
    "PictureStatistic",
    "read_report",
    "ReportFiles",
    "result_lines",
    "Retention",
    "retention_line",
    "RetentionPlan",
    "Row",
    "RunDifference",
    "SamplerSettings",
    "ScalePoint",
    "Scorer",
    "scorer_line",
    "ScorerComparison",
    "ScorerResult",
    "Side",
    "side_by_side",
    "Summary",
    "win_rate",
    "win_rate_difference",
    "WinRate",
    "write_comparison",
    "write_report",
]
