"""Evaluation: paired pictures and graded answers, with intervals over prompts, and reports that open offline."""

from mmalign.evaluation.answer_evaluation import AnswerEvaluation, answer_retention, evaluate_answers
from mmalign.evaluation.answer_grades import Accuracy, Graded, accuracy, grade
from mmalign.evaluation.answer_likelihood import AnswerLikelihoods, compare_likelihoods
from mmalign.evaluation.answer_report import answer_lines, write_answer_report
from mmalign.evaluation.answer_wins import AnswerWins, ControlledRate, judge_answers, length_controlled
from mmalign.evaluation.answering import Answered, AnswerFile, answer, read_answers
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
from mmalign.evaluation.win_rate import (
    Difference,
    WinRate,
    paired_difference,
    share_difference,
    win_rate,
    win_rate_difference,
)
from mmalign.evaluation.wording import headline
from mmalign.rewards.scorer import Scorer

__all__ = [
    "Accuracy",
    "accuracy",
    "answer",
    "answer_lines",
    "answer_retention",
    "Answered",
    "AnswerEvaluation",
    "AnswerFile",
    "AnswerLikelihoods",
    "AnswerWins",
    "compare_likelihoods",
    "compare_results",
    "compare_sides",
    "Comparison",
    "comparison_lines",
    "conclusion",
    "ControlledRate",
    "Corrected",
    "Difference",
    "draw_side",
    "evaluate",
    "evaluate_answers",
    "EvaluationResult",
    "generate",
    "grade",
    "Graded",
    "headline",
    "holm",
    "judge_answers",
    "length_controlled",
    "MadePairs",
    "make_pairs",
    "model_fingerprint",
    "moved_statistics",
    "paired_difference",
    "PictureStatistic",
    "read_answers",
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
    "share_difference",
    "Side",
    "side_by_side",
    "Summary",
    "win_rate",
    "win_rate_difference",
    "WinRate",
    "write_answer_report",
    "write_comparison",
    "write_report",
]
