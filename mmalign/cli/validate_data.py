"""`mmalign validate-data`: every pair, captioned picture or pair of answers read as training would; its problems and a sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli.options import Alias, Command, Given, Option, UsageError, flag, number, one_of, switch, whole
from mmalign.files import staged

if TYPE_CHECKING:
    from PIL import Image

    from mmalign.data import AnswerPair, AnswerReport, AnswerSource, DataReport, PairRecord, PairSource

_SHOWN_PAIRS = 16
_SHOWN_KINDS = 40
_SHEET, _BAD_ROWS = "contact_sheet.png", "bad_rows.jsonl"
VERB = Command(
    prog="mmalign validate-data",
    description=(
        "Reads every row as training would. Prints pairs, ties and kinds of problems, and writes bad_rows.jsonl and "
        f"contact_sheet.png ({_SHOWN_PAIRS} pairs, captioned pictures or pictures that were asked about, evenly spaced)."
    ),
    example="mmalign validate-data my-pairs/ --output-dir validation",
    options=[
        Option(
            name="data",
            help='a Hub id, a parquet, .json, .jsonl or .tar file, a folder, or "playground", "playground-vision" or '
            '"playground-video"; may stand first without --data',
            metavar="DATA",
            required=True,
        ),
        Option(name="output_dir", help="where the two files go", metavar="DIR", default="validation"),
        Option(name="split", help="which split; none is train where there are several", metavar="NAME", nullable=True),
        Option(name="revision", help="of a Hub data set", metavar="NAME", nullable=True),
        Option(name="root", help="the folder that paths in the data are relative to", metavar="DIR", nullable=True),
        Option(name="max_rows", help="only the first N rows", convert=whole, metavar="N", nullable=True),
        Option(
            name="streaming",
            help="read a Hub data set as it comes, without storing it",
            convert=switch,
            default=False,
        ),
        Option(
            name="kind",
            help="pairs (of pictures or clips) or answers; told by the columns and the first row unless given",
            convert=one_of("pairs", "answers"),
            metavar="KIND",
            nullable=True,
        ),
        Option(
            name="resolution", help="side of the square that training crops to", convert=whole, metavar="N", default=512
        ),
        Option(
            name="aspect_buckets",
            help="each pair in the shape nearest to its own, as training with --aspect-buckets",
            convert=switch,
            default=False,
        ),
        Option(
            name="num_frames",
            help="read every side as a clip of N frames, as training a video model does; of answers, N frames of every clip",
            convert=whole,
            metavar="N",
            nullable=True,
        ),
        Option(
            name="fps",
            help="of answers: so many frames a second of every clip",
            convert=number,
            metavar="X",
            nullable=True,
        ),
        Option(name="workers", help="threads that decode", convert=whole, metavar="N", default=4),
    ],
    aliases=[
        Alias("dataset_name", "is data", lambda value: {"data": value}),
        Alias("dataset_split_name", "is split", lambda value: {"split": value}),
        Alias("train_split", "is split", lambda value: {"split": value}),
    ],
    epilog="Exit code: 0 every row can be used; 1 some rows were left out, or all; 2 the data could not be opened.\n",
)


def run(argv: Sequence[str]) -> int:
    """Checks, writes both files, prints the summary."""
    words = list(argv)
    given = VERB.read(["--data", *words] if words and not words[0].startswith("-") else words)
    if given is None:
        return 0
    source, report = (_check_answers if _holds_answers(given) else _check_pairs)(given)
    folder = Path(given["output_dir"]).expanduser()
    sheet = _contact_sheet(source, report)
    with staged(folder) as part:
        lines = [
            {"row": bad.row, "source_row": source.table_row(bad.row), "field": bad.field, "reason": bad.reason}
            for bad in report.bad_rows
        ]
        (part / _BAD_ROWS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if sheet is not None:
            sheet.save(part / _SHEET)
    if sheet is None:
        # An earlier check's sheet would show pairs that this data does not hold.
        (folder / _SHEET).unlink(missing_ok=True)
    print(summary(source, report))
    print(f"written: {folder / _BAD_ROWS}" + (f", {folder / _SHEET}" if sheet is not None else ""))
    return 1 if report.bad_rows else 0


def _holds_answers(given: Given) -> bool:
    from mmalign.cli.answer_data import is_playground
    from mmalign.data.kinds import kind_of

    if given["kind"] is None and is_playground(given["data"]):
        return True
    if given["kind"] is None and not given["streaming"]:
        where = {name: given[name] for name in ("split", "revision", "root")}
        return kind_of(given["data"], **where) == "answers"
    return bool(given["kind"] == "answers")


def _check_pairs(given: Given) -> tuple[PairSource, DataReport]:
    from mmalign.data import load_pairs, validate_pairs

    if given["fps"] is not None:
        raise UsageError("--fps is for answers; of pairs, --num-frames says which frames are read")
    names = ("split", "revision", "root", "max_rows", "streaming", "num_frames")
    source = load_pairs(given["data"], captioned=True, **{name: given[name] for name in names})
    options = {name: given[name] for name in ("resolution", "aspect_buckets", "workers")}
    return source, validate_pairs(source, **options)


def _check_answers(given: Given) -> tuple[AnswerSource, AnswerReport]:
    from mmalign.cli.answer_data import open_answers
    from mmalign.data import validate_answers

    if asked := given.explicit & {"resolution", "aspect_buckets", "streaming"}:
        raise UsageError(f"{flag(min(asked))} does not apply to answers")
    names = ("split", "revision", "root", "max_rows", "num_frames", "fps")
    source = open_answers(given["data"], **{name: given[name] for name in names})
    return source, validate_answers(source, workers=given["workers"])


def summary(source: PairSource | AnswerSource, report: DataReport) -> str:
    """What is printed: counts, then a line for each kind of problem with the first rows that have it.

    told: the pairs whose text and labels can be read, also where their pictures cannot.
    """
    from mmalign.data import AnswerReport, PairSource
    from mmalign.data.rankings import RANKED

    usable, ties = len(report.usable), report.num_ties
    users = f", {report.num_users} users" if report.num_users else ""
    rows = f"{report.num_rows} rows"
    if isinstance(source, PairSource) and source.form in RANKED:
        what = "pictures" if source.form == "imagereward" else "rankings"
        rows = f"{source.num_table_rows} {what} → {report.num_rows} pairs"
    lines = [
        f"{source.name}: {rows}, {source.form} columns",
        f"usable:   {usable} {source.unit}s of {report.num_prompts} prompts{users}{_ties(source, ties)}",
        f"left out: {len(report.bad_rows)} rows",
    ]
    if isinstance(report, AnswerReport):
        media = f"{report.num_pictures} pictures, {report.num_clips} clips"
        lines.insert(2, f"in them:  {media}; {report.num_marked} {source.unit}s with marked phrases")
    if report.told.pairs > usable:
        told = report.told
        lines.insert(1, f"told:     {told.pairs} {source.unit}s of {told.prompts} prompts{_ties(source, told.ties)}")
    if not usable and all("no such file" in bad.reason for bad in report.bad_rows):
        lines.append("no picture was found: name the folder that the paths in the data start from with --root")
    problems = report.problems
    for problem in problems[:_SHOWN_KINDS]:
        first = ", ".join(map(str, problem.rows[:5])) + (", …" if len(problem.rows) > 5 else "")
        lines.append(f"{len(problem.rows):>8}  {problem.example.field}: {problem.example.reason}\n{'':10}rows {first}")
    if len(problems) > _SHOWN_KINDS:
        lines.append(f"          and {len(problems) - _SHOWN_KINDS} more kinds, all in {_BAD_ROWS}")
    return "\n".join(lines)


def _ties(source: PairSource | AnswerSource, number: int) -> str:
    return f"; {number} of them ties" if source.sides == 2 else ""


def _contact_sheet(source: PairSource | AnswerSource, report: DataReport) -> Any:
    """Pairs evenly spaced over the usable rows, the preferred picture first; None where no row is usable."""
    from mmalign.data import AnswerSource
    from mmalign.evaluation import side_by_side

    answers = isinstance(source, AnswerSource)
    shown: list[tuple[list[Image.Image], str]] = []
    number = min(_SHOWN_PAIRS, len(report.usable))
    for at in range(number):
        record: Any = source[report.usable[at * len(report.usable) // number]]
        shown += _shown_answers(record) if answers else [_shown_pair(record)]
    if not shown:
        return None
    pictures, captions = zip(*shown, strict=True)
    if answers:
        # Wide enough for what is said.
        size: dict[str, int] = {"cell_size": 256, "max_caption_lines": 8}
        return side_by_side(pictures, captions, ["asked about"], rows_per_line=min(4, len(shown)), **size)
    titles = ["preferred", "other"] if source.sides == 2 else ["picture"]
    return side_by_side(pictures, captions, titles, rows_per_line=min(4 // len(titles), len(shown)))


def _shown_pair(record: PairRecord) -> tuple[list[Image.Image], str]:
    """The sides of a pair, the preferred one first, and what was asked for."""
    from mmalign.data.clips import glance

    sides = [glance(side) for side in record.sides]
    told = "tie" if record.label == 0.5 else f"{max(record.label, 1 - record.label):.0%}"
    where = f"row {record.row} ({told})" if record.image_1 is not None else f"row {record.row}"
    return sides if record.label >= 0.5 else sides[::-1], f"{where}: {' '.join(record.prompt.split())}"


def _shown_answers(pair: AnswerPair) -> list[tuple[list[Image.Image], str]]:
    """The last picture or clip that was asked about, what was asked, and the answers; nothing of a row without media."""
    from mmalign.data.answer_records import Picture
    from mmalign.data.clips import glance

    asked = " ".join(part for part in pair.prompt[-1].parts if isinstance(part, str))
    other = ("(liked)" if pair.label else "(not liked)") if pair.rejected is None else f"rather than {pair.rejected}"
    caption = f"row {pair.row}: {asked} | {pair.chosen} | {other}"
    media = [glance(medium.image if isinstance(medium, Picture) else medium.frames) for medium in pair.media[-1:]]
    return [(media, " ".join(caption.split()))] if media else []
