"""The report says what was measured, loads nothing, survives hostile prompts, and reads back."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mmalign import evaluation
from mmalign.evaluation import WinRate, headline, read_report, result_lines, scorer_line, write_report
from mmalign.evaluation.intervals import student_t
from mmalign.evaluation.report import sample_rows, worst_losses
from mmalign.evaluation.report_pictures import left_sides
from mmalign.evaluation.report_plots import thin
from mmalign.evaluation.wording import notes, number, percent

WINS = [(100, 100 + 2 * row) for row in range(1, 31)]


class Page(HTMLParser):
    """Tags, everything a browser would load, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.loads, self.text, self.scripts = [], [], [], 0
        self.hidden: list[str] = []
        self.inside = self.about = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag
        self.hidden += [tag] * (("hidden", None) in attrs)
        self.about = dict(attrs).get("data-about", self.about)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")], "no event handlers in attributes"

    def handle_data(self, data):
        if self.inside not in ("style", "script"):
            self.text.append(data)
        else:
            assert "http" not in data and "url(" not in data and "@import" not in data

    def handle_endtag(self, tag):
        self.inside = ""


def page(result, folder, **options) -> Page:
    return Page(write_report(result, folder, **options).html.read_text(encoding="utf-8"))


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_headline_of_a_win_comes_from_the_first_held_out_scorer(make_result):
    result = make_result(WINS)
    assert result.judge.name == "red"
    assert [scorer.name for scorer in result.ranked_scorers] == ["red", "blue", "green"]
    assert headline(result) == (
        "Aligned beats base: it wins 100.0% of 30 comparisons on 30 prompts (95% interval 87.8% to 100.0%), "
        "as told by red, a scorer that was not used in training."
    )
    unsaid = headline(make_result(WINS, trained_on=()))
    assert unsaid.endswith("as told by green; what training used was not said.")


def test_headline_of_a_loss_and_of_no_difference(make_result):
    lost = make_result([(after, before) for before, after in WINS])
    assert headline(lost).startswith("Aligned loses to base: it wins 0.0% of 30 comparisons on 30 prompts")
    mixed = make_result([(100, 101 if row % 2 else 99) for row in range(40)])
    assert headline(mixed).startswith("No difference is shown: aligned wins 50.0% of 40 comparisons on 40 prompts (95%")
    assert "the interval contains 50%" in headline(mixed)


def test_the_headline_goes_by_the_corrected_p_value_as_every_other_verdict(make_result, tmp_path):
    """22 wins of 32 leave out 50 % by their interval, but not once two held-out scorers were looked at."""
    result = make_result([(100, 101 if row < 22 else 99) for row in range(32)])
    judge = result.judge
    assert judge.win_rate.shows_difference and judge.p_corrected.shown > 0.05
    assert headline(result).startswith(
        "No difference is shown: aligned wins 68.8% of 32 comparisons on 32 prompts (95%"
    )
    assert f"against base, but corrected p = {judge.p_corrected.shown:.3f}, as told by red" in headline(result)
    assert "50%" not in headline(result) and "no difference is shown" in scorer_line(result, judge)
    assert '<div class="rate even">' in write_report(result, tmp_path).html.read_text()
    alone = make_result([(100, 101 if row < 22 else 99) for row in range(32)], trained_on=("green", "blue"))
    assert headline(alone).startswith("Aligned beats base")
    assert '<div class="rate win">' in write_report(alone, tmp_path).html.read_text()


def test_a_judge_seen_in_training_is_called_so(make_result, tmp_path):
    result = make_result(WINS, trained_on=("red", "green", "blue"))
    assert "which was seen in training, so this is no evidence of better pictures" in headline(result)
    text = " ".join(page(result, tmp_path).text)
    assert "Every scorer here was seen in training" in text
    assert text.count("seen in training") > 3


def test_held_out_scorers_stand_first_and_the_training_scorer_is_marked(make_result, tmp_path):
    html = write_report(make_result(WINS), tmp_path).html.read_text()
    table = html[html.index("<h2>Win rate by scorer</h2>") : html.index("<h2>Scores</h2>")]
    assert table.index(">red<") < table.index(">blue<") < table.index(">green<")
    assert table.count('<span class="tag">seen in training</span>') == 1
    assert table.index(">blue<") < table.index('class="tag"')


def test_report_json_is_strict_and_reads_back(make_result, tmp_path, hostile):
    result = make_result(WINS[:5], prompts=hostile)
    files = write_report(result, tmp_path, history=[{"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.7}])
    data = strict(files.json.read_text())
    assert data["schema_version"] == 2
    assert data["headline"] == headline(result)
    assert data["history"] == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.7}]
    assert {"torch", "diffusers", "mmalign"} <= set(data["versions"])
    assert data["scorers"][1]["fingerprint"] == "channel-0"
    assert data["rows"][2]["prompt"] == hostile[2]
    assert data["rows"][0]["base_picture"] == "pictures/base/0.png"
    assert read_report(files.json) == read_report(tmp_path)
    again = read_report(tmp_path)
    assert [row.prompt for row in again.rows] == list(hostile)
    assert again.rows == result.rows and again.scorers == result.scorers
    assert again == result


def test_a_single_prompt_round_trips_without_nan_or_infinity(make_result, tmp_path):
    result = make_result(WINS[:1])
    data = strict(write_report(result, tmp_path).json.read_text())
    assert data["scorers"][0]["difference"]["low"] is None
    again = read_report(tmp_path).scorers[0]
    assert (again.difference.low, again.difference.high) == (-math.inf, math.inf)
    assert math.isnan(again.base.standard_error)
    assert "No difference is shown" in headline(result)


def test_pictures_outside_the_report_are_neither_named_nor_read(make_result, tmp_path):
    result = make_result(WINS[:3])
    files = write_report(result, tmp_path / "elsewhere")
    data = json.loads(files.json.read_text())
    assert data["rows"][0]["base_picture"] is None
    data["rows"][0]["base_picture"] = "../pictures/base/0.png"
    files.json.write_text(json.dumps(data))
    again = read_report(files.json)
    assert again.rows[0].base_picture is None
    rewritten = write_report(again, tmp_path / "elsewhere")
    assert rewritten.picture is None
    assert "not stored with this report" in rewritten.html.read_text()


def test_a_report_without_pictures_keeps_no_sheet_of_an_earlier_one(make_result, tmp_path):
    assert write_report(make_result(WINS[:3]), tmp_path).picture.is_file()
    assert write_report(make_result(WINS[:3]), tmp_path, num_samples=0).picture is None
    assert not (tmp_path / "side_by_side.png").exists()


def test_what_is_no_report_is_refused_by_its_name(tmp_path):
    file = tmp_path / "compare.json"
    for text, message in (
        ('{"schema_version": 2}', "compare.json is no report"),
        ("[1]", "is no report"),
        ("{", "not a whole"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_report(file)


def test_nobody_having_named_a_training_scorer_does_not_mean_that_there_was_none(make_result, tmp_path):
    html = write_report(make_result(WINS[:3], trained_on=()), tmp_path).html.read_text()
    assert "<dt>Trained on</dt><dd>not said</dd>" in html
    assert "<dt>Trained on</dt><dd>green</dd>" in write_report(make_result(WINS[:3]), tmp_path).html.read_text()


def test_the_terminal_is_told_what_takes_weight_from_the_headline(make_result):
    assert (
        "Every scorer here was seen in training"
        in result_lines(make_result(WINS, trained_on=("red", "green", "blue")))[1]
    )
    assert not any("Every scorer" in line for line in result_lines(make_result(WINS)))


def test_another_schema_is_refused(make_result, tmp_path):
    file = write_report(make_result(WINS[:3]), tmp_path).json
    file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(ValueError, match="schema_version 99"):
        read_report(file)


def test_the_page_loads_nothing_and_hostile_text_stays_text(make_result, tmp_path, hostile):
    result = make_result(WINS[:5], prompts=hostile)
    found = page(result, tmp_path, history=[{"step": 1, "<b onload=x>": 1.0, "loss": 0.7}])
    assert all(value.startswith("data:") for value in found.loads)
    assert found.tags.count("script") == 1 and found.tags.count("style") == 1
    assert found.tags.count("img") == 2 * 5
    text = "".join(found.text)
    assert "<b onload=x>" in text
    assert hostile[0] in text and hostile[1] in text and hostile[2] in text and hostile[3] in text
    assert "\x07" not in text and "half a pair � and a control � character" in text
    assert "Content-Security-Policy" in (tmp_path / "report.html").read_text()


def test_sides_are_shuffled_evenly_by_what_no_score_knows(make_result, tmp_path):
    wins, losses = make_result(WINS), make_result([(after, before) for before, after in WINS])
    left = left_sides(wins, wins.rows)
    assert left.count("aligned") == left.count("base") == 15
    assert left == left_sides(losses, losses.rows)
    other = replace(wins, aligned_fingerprint="other")
    assert left != left_sides(other, other.rows) != ["base", "aligned"] * 15
    html = write_report(wins, tmp_path, num_samples=30).html.read_text()
    assert re.findall(r'data-left="(\w+)"', html) == left
    lost = write_report(losses, tmp_path, num_samples=3).html.read_text()
    assert lost.count("data-left=") == lost.count('class="votes"') == 3, "what scores picked is not judged blind"


def test_the_page_brings_what_votes_are_counted_with(make_result, tmp_path):
    result = make_result(WINS, prompts=[f"prompt {row} </script>" for row in range(30)])
    found = page(result, tmp_path)
    about = json.loads(found.about)
    assert about["quantiles"][0] is None
    assert about["quantiles"][1:] == [student_t(0.975, votes - 1) for votes in range(2, 13)]
    assert (about["aligned_label"], about["base_fingerprint"]) == ("aligned", "base" * 4)
    assert found.tags.count("input") == 12 and found.tags.count("figure") == 12
    assert found.hidden.count("button") == 3 and found.hidden.count("input") == 12
    assert found.hidden.count("div") == 12, "without a script pairs stand side by side, and no vote can be cast"


def test_sample_is_fixed_before_scores_and_worst_losses_are_losses(make_result):
    gains = make_result(WINS)
    losses = make_result([(after, before) for before, after in WINS])
    assert [row.prompt for row in sample_rows(gains, 8, 0)] == [row.prompt for row in sample_rows(losses, 8, 0)]
    assert [row.prompt for row in sample_rows(gains, 8, 0)] != [row.prompt for row in sample_rows(gains, 8, 1)]
    assert worst_losses(gains, 6) == []
    assert [row.prompt for row in worst_losses(losses, 3)] == ["prompt 29", "prompt 28", "prompt 27"]
    assert len(worst_losses(make_result([(200, 100), (10, 9), (9, 10)], tie_margin=0.1), 6)) == 1


def test_large_pictures_are_embedded_smaller(make_result, tmp_path):
    found = page(make_result(WINS[:2], size=600), tmp_path)
    images = [value for value in found.loads if value.startswith("data:image")]
    assert len(images) == 4 and all(value.startswith("data:image/jpeg") for value in images)
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_curves_show_their_reference_and_their_gaps(make_result, tmp_path):
    history = [{"step": step, "loss": 0.693 - step / 1e3, "rewards/accuracies": 0.5 + step / 1e3} for step in range(9)]
    history[4]["loss"] = math.nan
    history += [{"step": 9, "train_runtime": 12.0, "note": "text"}]
    text = " ".join(page(make_result(WINS[:3]), tmp_path, history=history).text)
    for expected in ("loss", "rewards/accuracies", "ln 2 = 0.693", "chance, 0.5", "1 of 9 values are not finite"):
        assert expected in text
    assert "note" not in page(make_result(WINS[:3]), tmp_path).text
    assert len(thin([(float(x), 1.0) for x in range(5000)])) <= 400


def test_notes_tell_the_limits(make_result):
    result = make_result(WINS, tie_margin=0.001)
    text = " ".join(notes(result))
    for expected in ("single run", "within 0.001", "2 held-out scorers", "30 prompts is few", "Wilson"):
        assert expected in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.6321, "63.2%"), (0.5, "50.0%"), (0.5003, "50.03%"), (0.49999, "49.999%"), (1.0, "100.0%"), (0.0, "0.0%")],
)
def test_percent_never_prints_50_for_what_is_not(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "scale", "text"),
    [
        (21.3456, 0.12, "21.35"),
        (-0.0004, 0.1, "0.00"),
        (1234.5, 20.0, "1,234"),
        (-2.5, 1.0, "\N{MINUS SIGN}2.5"),
        (math.inf, 1.0, "∞"),
        (0.25, math.nan, "0.250"),
        (3e-6, 1e-6, "3.00e-06"),
    ],
)
def test_numbers_have_the_decimals_their_error_gives_sense_to(value, scale, text):
    assert number(value, scale) == text


def test_an_interval_that_touches_50_shows_no_difference():
    rate = WinRate(0.6, 0.5, 0.7, 6, 0, 4, 10, 10, 0.95, 0.05, "bootstrap")
    assert not rate.shows_difference
    assert replace(rate, low=0.501).shows_difference


def test_a_model_compared_with_itself_is_told_so(make_result, tmp_path):
    result = make_result(WINS[:3])
    same = replace(result, base_fingerprint=result.aligned_fingerprint)
    assert "compares a model with itself" in " ".join(page(same, tmp_path).text)
    assert "compares a model with itself" not in " ".join(page(result, tmp_path).text)


def test_public_names_are_sorted_and_light_to_import():
    assert evaluation.__all__ == sorted(evaluation.__all__, key=str.casefold)
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
    heavy = "{'diffusers', 'transformers', 'peft', 'accelerate', 'open_clip', 'torchvision'}"
    code = f"import sys, mmalign.evaluation; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
