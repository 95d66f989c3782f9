"""Moving garments: what is told of a clip is seen in its pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.playground import judges, moving, moving_questions, photographs, picture_questions, world
from mmalign.playground.moving import WAYS
from mmalign.playground.photographs import GARMENTS
from mmalign.playground.questions import Question, is_right
from mmalign.playground.world import COLOURS

DATA = photographs.load("test")
CLIPS = moving.draw_clips(DATA.labels, range(80), seed=3)
PIXELS = moving.compose(DATA, CLIPS)


def _centres(frames: Tensor) -> Tensor:
    """(T, 2) x and y of what is not background."""
    background = torch.cat([frames[:, :, :2].flatten(2), frames[:, :, -2:].flatten(2)], 2).median(2).values
    weight = ((frames - background[:, :, None, None]).norm(dim=1) - 0.2).clamp(min=0)
    places = torch.arange(world.SIZE).float()
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(1) * places).sum(1), (weight.sum(2) * places).sum(1)], 1) / total[:, None]


def test_the_way_told_is_the_way_of_the_pixels() -> None:
    for clip, frames in zip(CLIPS, PIXELS, strict=True):
        for thing, start, stop in zip(clip.things, clip.starts, (*clip.starts[1:], moving.NUM_FRAMES), strict=True):
            first, last = _centres(frames[start:stop])[[0, -1]]
            moved = last - first
            along = {"left": -moved[0], "right": moved[0], "up": -moved[1], "down": moved[1]}
            assert max(along, key=lambda way: float(along[way])) == WAYS[thing.way]
            assert along[WAYS[thing.way]] > 4


def test_colours_and_garments_told_are_those_of_the_frames() -> None:
    told = [[(moving.shown_in(clip, frame)[0], clip) for frame in range(moving.NUM_FRAMES)] for clip in CLIPS]
    flat = [pair for frames in told for pair in frames]
    seen = judges.load("B").read(PIXELS.flatten(0, 1))
    # The judge knows larger garments, in the middle.
    garments = torch.tensor([thing.garment for thing, _ in flat])
    assert (seen.garment.argmax(1) == garments).float().mean() > 0.65
    assert (seen.measured.colour == torch.tensor([thing.colour for thing, _ in flat])).float().mean() > 0.97
    assert (seen.measured.background == torch.tensor([clip.background for _, clip in flat])).float().mean() > 0.97
    assert all(DATA.labels[thing.photograph] == thing.garment for thing, _ in flat)


def test_two_things_differ_and_stand_out() -> None:
    assert {len(clip.things) for clip in CLIPS} == {1, 2}
    for clip in CLIPS:
        colours = [clip.background, *(thing.colour for thing in clip.things)]
        assert len(set(colours)) == len(colours)
        assert len({thing.garment for thing in clip.things}) == len(clip.things)


def test_a_row_is_the_same_whichever_rows_are_asked_for_with_it() -> None:
    assert moving.draw_clips(DATA.labels, [7, 2], seed=3) == [CLIPS[7], CLIPS[2]]
    assert moving.draw_clips(DATA.labels, [7], seed=4) != [CLIPS[7]]
    assert torch.equal(moving.compose(DATA, [CLIPS[7]])[0], PIXELS[7])


def test_as_a_data_set_holds_it() -> None:
    video = moving.to_video(PIXELS[0])
    assert len(video.frames) == len(video.indices) == video.total_frames == 8
    again = torch.from_numpy(np.stack([np.asarray(frame) for frame in video.frames])).movedim(-1, 1) / 255
    assert (again - PIXELS[0]).abs().max() < 0.51 / 255


def test_descriptions_say_all_and_are_known_from_other_sentences() -> None:
    thing, other = CLIPS[0].things[0], next(clip for clip in CLIPS if len(clip.things) == 2)
    for clip in CLIPS:
        text = moving_questions.describe(clip)
        assert moving_questions.is_description(text)
        for thing in clip.things:
            assert f"{COLOURS[thing.colour]} {GARMENTS[thing.garment]} moving {WAYS[thing.way]}" in text
        assert text.endswith(f", {COLOURS[clip.background]} background")
    text = moving_questions.describe(other)
    assert text.index(GARMENTS[other.things[0].garment]) < text.index(GARMENTS[other.things[1].garment])
    for wrong in ("", text + "!", text.replace("moving", "going"), text.replace(", then ", " and "), "red background"):
        assert not moving_questions.is_description(wrong)


@pytest.mark.parametrize("kind", moving_questions.YES_OR_NO)
def test_no_is_the_truth_of_what_is_not_in_the_clip(kind: str) -> None:
    rng = np.random.default_rng(0)
    for clip in CLIPS:
        if kind not in moving_questions.kinds_of(clip):
            continue
        basic, twin = moving_questions.hallucination_pair(clip, kind, rng)
        assert (basic.answer, twin.answer) == ("yes", "no") and basic.text != twin.text
        assert _holds(basic.text, clip) and not _holds(twin.text, clip)
        for question in (basic, twin):
            named, there = question.compared
            assert (named == there) == (question.answer == "yes") or kind == "exists"


def _holds(text: str, clip: moving.Clip) -> bool:
    """Reads a yes-or-no question about a clip anew."""
    words = text.rstrip("?").split()
    named = [word for word in words if word in GARMENTS]
    shown = {GARMENTS[thing.garment]: thing for thing in clip.things}
    if "before" in words:
        return list(shown) == named
    if "move" in words:
        return WAYS[shown[named[0]].way] == words[-1]
    return named[0] in shown if words[-1] in GARMENTS else COLOURS[shown[named[0]].colour] == words[-1]


def test_open_questions_have_the_clips_own_answers() -> None:
    rng = np.random.default_rng(1)
    clip = next(clip for clip in CLIPS if len(clip.things) == 2)
    ways = {GARMENTS[thing.garment]: WAYS[thing.way] for thing in clip.things}
    colours = {GARMENTS[thing.garment]: COLOURS[thing.colour] for thing in clip.things}
    for _ in range(8):
        way, colour = (moving_questions.ask(clip, kind, rng) for kind in ("way", "colour"))
        assert ways[way.text.rstrip("?").split()[-2]] == way.answer
        assert colours[colour.text.rstrip("?").split()[-1]] == colour.answer
    first = clip.things[0]
    assert moving_questions.ask(clip, "first", rng).answer == f"{COLOURS[first.colour]} {GARMENTS[first.garment]}"
    with pytest.raises(ValueError, match="kind must be one of"):
        moving_questions.ask(clip, "size", rng)


@pytest.mark.parametrize("kind", picture_questions.YES_OR_NO)
def test_pictures_are_asked_about_likewise(kind: str) -> None:
    rng = np.random.default_rng(2)
    for picture in [(g, c, (c + 3) % 8) for g in range(8) for c in range(8)]:
        basic, twin = picture_questions.hallucination_pair(picture, kind, rng)
        word = {"exists": GARMENTS[picture[0]], "coloured": COLOURS[picture[1]], "behind": COLOURS[picture[2]]}[kind]
        assert (basic.answer, twin.answer) == ("yes", "no")
        assert word in basic.text.rstrip("?").split() and basic.text != twin.text
        assert word not in twin.text.rstrip("?").split() or kind != "exists"
        assert [named == there for named, there in (basic.compared, twin.compared)] == [True, False]
        assert picture_questions.is_description(picture_questions.ask(picture, "describe", rng).answer)


def test_answers_are_right_by_their_words() -> None:
    closed, opened = Question("exists", "is there a bag?", "yes"), Question("first", "what appears first?", "red bag")
    assert is_right(closed, "Yes, there is.") and not is_right(closed, "no") and not is_right(closed, "yesterday")
    assert is_right(opened, "Red bag.") and not is_right(opened, "bag red") and not is_right(opened, "red")
    assert not is_right(closed, "")
