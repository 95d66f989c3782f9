"""The forms of preference data for models that answer, and a row of any of them as RawAnswers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.data.answer_marks import BadMarks, parse_marks
from mmalign.data.answer_records import Span
from mmalign.data.answer_turns import COLUMNS, RawTurn, answer_of, check_said, read_turns, user_turn, with_media
from mmalign.data.columns import read_scores
from mmalign.data.judgements import label_of_chosen
from mmalign.data.raw import bad, empty, given, read_text, read_user, what

Form = Literal[
    "preference", "implicit prompt", "unpaired", "rlaif-v", "ms-swift", "ms-swift messages", "sharegpt", "rrpo", "videochat2"
]  # fmt: skip
REQUIRED: dict[Form, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "implicit prompt": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "rlaif-v": ("question", "chosen", "rejected"),
    "ms-swift": ("messages", "rejected_response"),
    "ms-swift messages": ("messages", "rejected_messages"),
    "sharegpt": ("conversations", "chosen", "rejected"),
    "rrpo": ("question", "answer", "pred"),
    "videochat2": ("QA", "QA_NEG", "video"),
}
MEDIA_COLUMNS = tuple(name for names in COLUMNS.values() for name in names)
SCORES = {"score": ("chosen_score", "rejected_score")}
# What would change the answer and cannot be honoured.
_REFUSED = {
    "audio": "sound is not read",
    "audios": "sound is not read",
    "tools": "tools are not written into the prompt",
}
_REFUSED_IN: dict[Form, dict[str, str]] = {
    "videochat2": dict.fromkeys(("start", "end"), "clips are read whole: cut the file"),
}
_JUDGEMENTS = ("confidence", "chosen_votes", "rejected_votes", "user_id", *SCORES["score"])
_OPTIONAL: dict[Form, tuple[str, ...]] = {
    "ms-swift messages": ("rejected_images", "rejected_videos"),
    "sharegpt": ("system",),
    "rrpo": ("answer_masked", "pred_masked"),
}


@dataclass(frozen=True, slots=True)
class RawAnswers:
    """As AnswerPair, its media not opened yet."""

    prompt: tuple[RawTurn, ...]
    chosen: str
    rejected: str | None
    label: float
    chosen_marks: tuple[Span, ...] | None
    rejected_marks: tuple[Span, ...] | None
    fields: tuple[str, ...]
    scores: dict[str, tuple[float, float]]
    user_id: str | None


# The turns that were asked, and each answer: its text, its field, and its tagged text with the field of that, if it has one.
_Told = tuple[tuple[RawTurn, ...], list[tuple[str, str, Any, str]]]


def recognise(columns: Collection[str]) -> Form:
    """Which form a table with these columns has."""
    found = [form for form, names in REQUIRED.items() if set(names) <= set(columns)]
    if len(found) > 1 and "implicit prompt" in found:
        found.remove("implicit prompt")
    if len(found) == 1:
        return found[0]
    trouble = f"both {found[0]} and {found[1]}, drop the columns of one" if found else "not preference data of answers"
    known = "; ".join(f"({', '.join(names)}) as in {form}" for form, names in REQUIRED.items())
    raise ValueError(f"columns {', '.join(sorted(map(str, columns))) or '(none)'}: {trouble}. Expected one of {known}")


def used_columns(form: Form, columns: Collection[str]) -> list[str]:
    """The columns that are looked at, in a fixed order; the rest need not be read."""
    optional = (*_OPTIONAL.get(form, ()), *MEDIA_COLUMNS, *_JUDGEMENTS, *_refused(form))
    return list(dict.fromkeys((*REQUIRED[form], *(name for name in optional if name in columns))))


def read_answers(form: Form, raw: Mapping[str, Any], row: int) -> RawAnswers:
    """One row, checked field by field; InvalidRow names the first field at fault."""
    for name, reason in _refused(form).items():
        if not empty(raw.get(name)):
            raise bad(row, name, f"holds {what(raw[name])}, and {reason}")
    turns, answers = _READERS[form](raw, row)
    if not turns or turns[-1].role != "user":
        last = repr(turns[-1].role) if turns else "nothing"
        raise bad(
            row, REQUIRED[form][0], f"the conversation before the answer ends with {last}, expected the user's turn"
        )
    prompt = with_media(turns, raw, row, llava=form == "rrpo")
    check_said(prompt, REQUIRED[form][0], row)
    chosen, *rest = (_untagged(answer, row) for answer in answers)
    rejected, rejected_marks = rest[0] if rest else (None, None)
    fields = tuple(field for _, field, _, _ in answers)
    if chosen[0] == rejected:
        raise bad(row, fields[1], f"the same answer as {fields[0]}")
    return RawAnswers(
        prompt=prompt,
        chosen=chosen[0],
        rejected=rejected,
        label=_liked(raw, row) if form == "unpaired" else label_of_chosen(raw, row),
        chosen_marks=chosen[1],
        rejected_marks=rejected_marks,
        fields=fields,
        scores=read_scores((raw, raw), row, SCORES) if rest else {},
        user_id=read_user(raw, row),
    )


def _refused(form: Form) -> dict[str, str]:
    return _REFUSED | _REFUSED_IN.get(form, {})


def _untagged(answer: tuple[str, str, Any, str], row: int) -> tuple[str, tuple[Span, ...] | None]:
    """An answer without its tags, and its marks."""
    text, field, tagged, where = answer
    try:
        if given(tagged):
            text, marks = parse_marks(read_text({where: tagged}, where, row), text)
        else:
            where = field
            text, marks = parse_marks(text)
    except BadMarks as error:
        raise bad(row, where, str(error)) from error
    if not text.strip():
        raise bad(row, field, "the answer is empty")
    return text, marks or None


def _liked(raw: Mapping[str, Any], row: int) -> float:
    label = raw.get("label")
    # Arrays do not say whether they are equal.
    if getattr(label, "ndim", None) or label not in (0, 1):
        raise bad(row, "label", f"expected true or false, got {what(label)}")
    return float(label)


def _paired(
    raw: Mapping[str, Any], row: int, turns: tuple[RawTurn, ...] | None, fields: tuple[str, ...], where: str
) -> _Told:
    """Answers that may bring the whole conversation with them, which must be the same in both and, if there is one, the prompt."""
    answers = []
    for field in fields:
        before, text = answer_of(raw.get(field), field, row)
        if turns is None:
            turns, where = before, field
        if not turns:
            raise bad(row, field, "holds no turn before the answer, and the row has no prompt column")
        if before and before != turns:
            raise bad(row, field, f"the conversation before its last turn is not that of {where}")
        answers.append((text, field, None, field))
    return turns or (), answers


def _preference(raw: Mapping[str, Any], row: int) -> _Told:
    return _paired(raw, row, _prompt(raw, row), ("chosen", "rejected"), "prompt")


def _implicit(raw: Mapping[str, Any], row: int) -> _Told:
    return _paired(raw, row, None, ("chosen", "rejected"), "chosen")


def _unpaired(raw: Mapping[str, Any], row: int) -> _Told:
    return _paired(raw, row, _prompt(raw, row), ("completion",), "prompt")


def _rlaif(raw: Mapping[str, Any], row: int) -> _Told:
    return _paired(raw, row, (user_turn(raw.get("question"), "question", row),), ("chosen", "rejected"), "question")


def _swift(raw: Mapping[str, Any], row: int) -> _Told:
    return _paired(raw, row, None, ("messages", "rejected_response"), "messages")


def _swift_messages(raw: Mapping[str, Any], row: int) -> _Told:
    for kind in ("images", "videos"):
        other = raw.get(f"rejected_{kind}")
        if not empty(other) and other != raw.get(kind):
            raise bad(row, f"rejected_{kind}", f"differs from {kind}: both answers must be to the same prompt")
    return _paired(raw, row, None, ("messages", "rejected_messages"), "messages")


def _sharegpt(raw: Mapping[str, Any], row: int) -> _Told:
    turns = read_turns(raw.get("conversations"), "conversations", row)
    if not empty(raw.get("system")):
        turns = (*read_turns([{"role": "system", "content": raw["system"]}], "system", row), *turns)
    return _paired(raw, row, turns, ("chosen", "rejected"), "conversations")


def _rrpo(raw: Mapping[str, Any], row: int) -> _Told:
    turns, answers = _paired(
        raw, row, (user_turn(raw.get("question"), "question", row),), ("answer", "pred"), "question"
    )
    return turns, [(text, field, raw.get(f"{field}_masked"), f"{field}_masked") for text, field, _, _ in answers]


def _videochat2(raw: Mapping[str, Any], row: int) -> _Told:
    sides = [_questions(raw.get(field), field, row) for field in ("QA", "QA_NEG")]
    if [asked for asked, _ in sides[0]] != [asked for asked, _ in sides[1]]:
        raise bad(row, "QA_NEG", "asks other questions than QA")
    if [answer for _, answer in sides[0][:-1]] != [answer for _, answer in sides[1][:-1]]:
        raise bad(row, "QA_NEG", "answers differ in more than the last question: write a row for each")
    turns: list[RawTurn] = []
    for asked, answer in sides[0]:
        turns += [user_turn(asked, "QA", row), RawTurn("assistant", (answer,))]
    return tuple(turns[:-1]), [(sides[0][-1][1], "QA", None, "QA"), (sides[1][-1][1], "QA_NEG", None, "QA_NEG")]


def _questions(value: Any, field: str, row: int) -> list[tuple[str, str]]:
    """(instruction and question, answer) of every item."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, Mapping) for item in value):
        raise bad(row, field, f"expected a list of {{i, q, a}}, got {what(value)}")
    found = []
    for at, item in enumerate(value):
        instruction = item.get("i") if given(item.get("i")) else ""
        texts = read_text({field: instruction}, field, row), read_text({field: item.get("q")}, field, row)
        found.append(("\n".join(filter(None, texts)), answer_of(item.get("a"), f"{field}[{at}].a", row)[1]))
    return found


def _prompt(raw: Mapping[str, Any], row: int) -> tuple[RawTurn, ...]:
    value = raw.get("prompt")
    return read_turns(value, "prompt", row) if isinstance(value, list | tuple) else (user_turn(value, "prompt", row),)


_READERS: dict[Form, Callable[[Mapping[str, Any], int], _Told]] = {
    "preference": _preference,
    "implicit prompt": _implicit,
    "unpaired": _unpaired,
    "rlaif-v": _rlaif,
    "ms-swift": _swift,
    "ms-swift messages": _swift_messages,
    "sharegpt": _sharegpt,
    "rrpo": _rrpo,
    "videochat2": _videochat2,
}
