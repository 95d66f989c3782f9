"""Retention: a verdict from an interval and a tolerance said beforehand, told by a scorer that nothing was trained on."""

import json
from dataclasses import replace

import pytest

from mmalign.evaluation import RetentionPlan, evaluate, read_report, result_lines, retention_line, write_report
from mmalign.evaluation.result import Retention, Summary
from mmalign.evaluation.retention import retention_scorer
from mmalign.evaluation.win_rate import Difference


def found(low, high, tolerance=0.1):
    side = Summary(mean=0.5, median=0.5, standard_error=0.01)
    difference = Difference((low + high) / 2, low, high, 40, 40, 0.95, 0.5)
    return Retention(scorer="red", fingerprint="f", base=side, aligned=side, difference=difference, tolerance=tolerance)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.05, "kept"),
        (-0.09, -0.01, "kept"),
        (0.2, 0.4, "kept"),
        (-0.1, 0.3, "undecided"),
        (-0.2, -0.05, "undecided"),
        (-0.3, -0.1, "undecided"),
        (-0.3, -0.11, "lost"),
        (float("-inf"), float("inf"), "undecided"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low, high, verdict):
    assert found(low, high).verdict == verdict


def test_the_line_tells_the_tolerance():
    assert retention_line(found(-0.05, 0.01)) == (
        "Retention kept: by red the mean score changed by \N{MINUS SIGN}0.020 (95% interval \N{MINUS SIGN}0.050 to +0.010) "
        "on 40 prompts; tolerated loss 0.1."
    )


def test_a_training_scorer_or_no_tolerance_is_refused(channel_scorer):
    red, green = channel_scorer("red"), channel_scorer("green", 1)
    plan = RetentionPlan(prompts=["a"], tolerance=0.1)
    assert retention_scorer(plan, [green, red], {"green"}) is red
    assert retention_scorer(replace(plan, scorer="green"), [red, green], set()) is green
    with pytest.raises(ValueError, match="scorer that was not trained on"):
        retention_scorer(replace(plan, scorer="green"), [red, green], {"green"})
    with pytest.raises(ValueError, match=r"told by 'clip', but the scorers are \['red'\]"):
        retention_scorer(replace(plan, scorer="clip"), [red], set())
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="number above zero"):
            retention_scorer(replace(plan, tolerance=tolerance), [red], set())


def test_retention_is_measured_on_its_own_prompts_and_stands_in_the_report(channel_scorer, tmp_path):
    from tiny import tiny_pipeline

    scorer = channel_scorer("red")
    result = evaluate(
        tiny_pipeline("sd", seed=1),
        tiny_pipeline("sd", seed=0),
        ["a red sneaker"],
        scorers=[scorer],
        output_dir=tmp_path,
        num_inference_steps=1,
        guidance_scale=2.0,
        retention_plan=RetentionPlan(prompts=["a blue bag", "a green shirt"], tolerance=10.0),
        progress=False,
    )
    kept = result.retention
    assert (kept.scorer, kept.verdict, kept.difference.num_clusters) == ("red", "kept", 2)
    assert kept.difference.value == pytest.approx(kept.aligned.mean - kept.base.mean)
    assert {row.prompt for row in result.rows} == {"a red sneaker"}
    files = write_report(result, tmp_path)
    assert json.loads(files.json.read_text())["retention"]["verdict"] == "kept"
    assert read_report(tmp_path).retention == kept
    assert "<h2>Retention</h2>" in files.html.read_text()
    assert retention_line(kept) in result_lines(result)
