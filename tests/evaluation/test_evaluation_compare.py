"""Runs are compared only where their numbers may be; then by their differences, corrected, in a page that loads nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mmalign import cli
from mmalign.evaluation import (
    compare_results,
    comparison_lines,
    holm,
    win_rate,
    win_rate_difference,
    write_comparison,
    write_report,
)
from mmalign.evaluation.compare_report import verdicts, warnings


@pytest.fixture
def runs(make_result):
    """Three runs over one base: strong wins nearly always, weak about half of the time, twin is weak again."""
    rng = np.random.default_rng(0)
    base = rng.integers(80, 160, size=120)
    strong = [(level, level + (25 if row % 10 else -25)) for row, level in enumerate(base)]
    weak = [(level, level + (25 if row % 2 else -25)) for row, level in enumerate(base)]
    found = {name: make_result(reds) for name, reds in (("strong", strong), ("weak", weak), ("twin", weak))}
    return {name: replace(result, aligned_fingerprint=name) for name, result in found.items()}


def scores(result, side, name="red"):
    return [getattr(row, f"{side}_scores")[name] for row in result.rows]


def test_win_rates_and_differences_are_those_of_the_rows(runs):
    comparison = compare_results(runs)
    red = comparison.scorers[0]
    assert (red.name, comparison.runs) == ("red", ("strong", "weak", "twin"))
    a, b = runs["strong"], runs["weak"]
    clusters = range(120)
    assert red.win_rates[1] == win_rate(scores(b, "aligned"), scores(b, "base"), clusters)
    assert [(pair.first, pair.second) for pair in red.differences] == [
        ("strong", "weak"),
        ("strong", "twin"),
        ("weak", "twin"),
    ]
    expected = win_rate_difference(scores(a, "aligned"), scores(b, "aligned"), scores(a, "base"), clusters)
    assert red.differences[0].difference == expected
    assert expected.value == pytest.approx(0.4)
    assert red.differences[2].difference.p_value == 1.0


def test_differences_are_corrected_over_pairs_and_held_out_scorers(runs):
    comparison = compare_results(runs)
    assert [(scorer.name, bool(scorer.seen_by)) for scorer in comparison.scorers] == [
        ("red", False),
        ("blue", False),
        ("green", True),
    ]
    held_out = [pair for scorer in comparison.scorers[:2] for pair in scorer.differences]
    assert [pair.p_corrected.held_out for pair in held_out] == holm([pair.difference.p_value for pair in held_out])
    everything = [pair for scorer in comparison.scorers for pair in scorer.differences]
    assert [pair.p_corrected.all for pair in everything] == holm([pair.difference.p_value for pair in everything])
    assert all(pair.p_corrected.held_out is None for pair in comparison.scorers[2].differences)


def test_findings_name_the_runs_that_are_ahead_and_no_others(runs):
    lines = verdicts(compare_results(runs))
    assert [line.split(":")[0] for line in lines] == [
        "strong wins more often than weak",
        "strong wins more often than twin",
    ]
    same = verdicts(compare_results({name: runs[name] for name in ("weak", "twin")}))
    assert same == ["No difference between the runs is shown, as told by red."]
    table = comparison_lines(compare_results(runs))
    assert table[0] == "red (held out), 120 comparisons on 120 prompts"
    assert any(line.startswith("  strong \N{MINUS SIGN} weak: +40.0 points (") for line in table)
    copies = {"a": runs["weak"], "b": runs["weak"]}
    assert any("the same model" in line for line in warnings(compare_results(copies)))


def test_a_scorer_that_any_run_trained_on_is_marked_and_told_last(runs):
    trained = replace(runs["weak"], settings={**runs["weak"].settings, "trained_on": ["green", "red"]})
    comparison = compare_results({"strong": runs["strong"], "weak": trained})
    assert [scorer.name for scorer in comparison.scorers] == ["blue", "green", "red"]
    assert comparison.scorers[2].seen_by == ("weak",) and comparison.scorers[1].seen_by == ("strong", "weak")
    assert "red (trained on by weak), 120 comparisons on 120 prompts" in comparison_lines(comparison)


def test_the_order_of_the_runs_does_not_turn_the_verdict_round(runs):
    """One run lists red first, the other blue: both tell, whichever run stands first."""
    turned = replace(runs["weak"], scorers=runs["weak"].scorers[::-1])
    forward, backward = (
        compare_results(order)
        for order in (
            {"strong": runs["strong"], "weak": turned},
            {"weak": turned, "strong": runs["strong"]},
        )
    )
    assert forward.judges == backward.judges == ("blue", "red")
    for comparison in (forward, backward):
        told = verdicts(comparison)
        assert sum("strong wins more often than weak" in line and "told by red" in line for line in told) == 1
        assert "No difference between the runs is shown, as told by blue." in told
        assert any("different orders" in line for line in warnings(comparison))
    assert compare_results(runs).judges == ("red",)
    assert not any("different orders" in line for line in warnings(compare_results(runs)))


def test_the_order_of_the_rows_does_not_matter(runs):
    shuffled = replace(runs["weak"], rows=runs["weak"].rows[::-1])
    ours = {"strong": runs["strong"], "weak": shuffled}
    assert compare_results(ours) == compare_results({"strong": runs["strong"], "weak": runs["weak"]})


def with_setting(result, **changed):
    return replace(result, settings={**result.settings, **changed})


def with_rows(result, change):
    return replace(result, rows=tuple(change(row) for row in result.rows))


def other_scorer(result):
    scorers = tuple(replace(s, fingerprint="another") if s.name == "red" else s for s in result.scorers)
    return replace(result, scorers=scorers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: with_rows(r, lambda row: replace(row, prompt=row.prompt + "!")), "prompts .240 are in one"),
        (lambda r: replace(r, rows=r.rows[1:]), "prompts .1 are in one of them only, such as 'prompt 0'"),
        (lambda r: with_rows(r, lambda row: replace(row, seed=row.seed + 1)), "seeds "),
        (lambda r: replace(r, rows=(*r.rows, replace(r.rows[0], seed=999))), "seeds .*or other numbers of them"),
        (lambda r: with_setting(r, num_inference_steps=5), "num_inference_steps .4 and 5"),
        (lambda r: with_setting(r, guidance_scale=7.5), "guidance_scale .5.0 and 7.5"),
        (lambda r: with_setting(r, height=512), "height .None and 512"),
        (lambda r: with_setting(r, scheduler_fingerprint="x"), "scheduler_fingerprint "),
        (lambda r: with_setting(r, tie_margin=0.5), "tie_margin "),
        (other_scorer, "the fingerprint of scorer red .channel-0 and another"),
        (lambda r: replace(r, base_fingerprint="other"), "the base's fingerprint .*--allow-different base"),
    ],
)
def test_what_may_not_be_compared_is_refused_by_its_field(runs, change, message):
    with pytest.raises(ValueError, match=f"^weak cannot be compared with strong: they differ in {message}"):
        compare_results({"strong": runs["strong"], "weak": change(runs["weak"])})


def test_only_the_base_may_differ_and_each_run_then_has_its_own(runs):
    def darker(row):
        return replace(row, base_scores={name: value - 1 for name, value in row.base_scores.items()})

    flattered = replace(with_rows(runs["weak"], darker), base_fingerprint="dark base")
    comparison = compare_results({"strong": runs["strong"], "weak": flattered}, allow_different=["base"])
    assert comparison.scorers[0].win_rates[1].rate == 1.0
    assert comparison.scorers[0].differences[0].difference.value == pytest.approx(0.9 - 1.0)
    assert any("over its own" in line for line in warnings(comparison))
    with pytest.raises(ValueError, match="may differ in base only, not in prompts"):
        compare_results(runs, allow_different=["prompts"])


def test_scorers_that_did_not_judge_every_run_are_left_out_and_said_so(runs):
    fewer = replace(runs["weak"], scorers=tuple(s for s in runs["weak"].scorers if s.name != "blue"))
    comparison = compare_results({"strong": runs["strong"], "weak": fewer})
    assert comparison.left_out == ("blue",)
    assert "Left out, as they did not judge every run: blue." in warnings(comparison)
    with pytest.raises(ValueError, match="no scorer judged every run"):
        compare_results({"strong": runs["strong"], "weak": replace(fewer, scorers=())})
    with pytest.raises(ValueError, match="at least two runs"):
        compare_results({"strong": runs["strong"]})


def test_the_page_loads_nothing_and_names_stay_text(runs, tmp_path):
    hostile = "<script>alert(1)</script>"
    comparison = compare_results({hostile: runs["strong"], "weak": runs["weak"]})
    html = write_comparison(comparison, tmp_path).read_text()
    assert hostile not in html and "&lt;script&gt;alert(1)" in html
    assert "<script" not in html and 'http-equiv="Content-Security-Policy"' in html and "<img" not in html
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["scorers"][0]["differences"][0]["p_corrected"]["held_out"] < 0.001
    assert data["scorers"][2]["seen_by"] == [hostile, "weak"]
    assert data["verdicts"] == verdicts(comparison)


def test_the_verb_reads_reports_and_says_in_one_line_what_differs(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("strong", "weak"):
        write_report(runs[name], name)
    assert cli.main(["compare", "strong", "weak/report.json", "--names", "A", "B"]) == 0
    shown = capsys.readouterr().out
    assert "A wins more often than B: A \N{MINUS SIGN} B is +40.0 points" in shown
    assert "comparison: comparison/compare.html" in shown and (tmp_path / "comparison/compare.json").is_file()
    write_report(with_setting(runs["weak"], seed=7), "other")
    assert cli.main(["compare", "strong", "other"]) == 2
    assert "other cannot be compared with strong: they differ in seed (0 and 7)" in capsys.readouterr().err
    assert cli.main(["compare", "strong", "strong"]) == 2
    assert "runs need different names" in capsys.readouterr().err
    assert cli.main(["compare", "strong", "weak", "--names", "A"]) == 2
    assert "--names gives 1 names for 2 runs" in capsys.readouterr().err
    assert cli.main(["compare", "strong", "weak", "--allow-different", "prompts"]) == 2
    assert "takes one of base, not 'prompts'" in capsys.readouterr().err
