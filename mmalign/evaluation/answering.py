"""Answers of a model to questions: in batches, greedy unless told otherwise, each kept as soon as it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from tqdm.auto import tqdm

from mmalign.data.answer_tokens import collate_prompts, encode_prompt, padding_token
from mmalign.data.fingerprints import processor_fingerprint
from mmalign.data.questions import Question, Questions
from mmalign.denoisers.parts import evaluating
from mmalign.files import full_disk_explained
from mmalign.rewards.fingerprints import module_hash, text_hash

# What must be the same for two answers to come from the same place.
_MADE_BY = {"model": "model", "data": "data", "options": "options"}
# How a line of answers begins.
_START = b'{"row": '


@dataclass(frozen=True, slots=True)
class Answered:
    """row: of the question. finished: whether the model ended its answer itself; else it was cut after max_new_tokens."""

    row: int
    question: str
    answer: str
    finished: bool


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """The answers to the questions of a data set, by row. model, data: fingerprints; options: what else decides about an answer."""

    answers: tuple[Answered, ...]
    model: str
    data: str
    options: Mapping[str, Any]


def answering_fingerprint(pipe: Any, weights: str | None = None) -> str:
    """sha256 over the weights and config of a pipeline's model, which adapters act, its settings of generation, and its processor.

    weights: what stands for the weights, where it is not the model as it is.
    """
    settings = pipe.model.generation_config.to_diff_dict() | {"transformers_version": None}
    return text_hash([weights or module_hash(pipe.model, "model"), settings, processor_fingerprint(pipe.processor)])


def answer(
    pipe: Any,
    questions: Questions,
    *,
    output: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    processor_kwargs: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
    progress: bool = True,
    description: str = "Answering",
    **generation: Any,
) -> AnswerFile:
    """The answers of a `TokenPipeline` to every question, in order. A row that cannot be read raises InvalidRow.

    output: a .jsonl that keeps each of them, with the fingerprints of model and data and the options; called again, only what is
    missing is answered, and ValueError is raised where the file holds answers of something else. fingerprint: of the model, where the
    caller knows it. generation: keywords of `model.generate`. The batch that an answer is made in does not matter, up to rounding.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}: nothing to do"
        )
    options = {
        "max_new_tokens": int(max_new_tokens),
        "processor_kwargs": dict(processor_kwargs or {}),
        "do_sample": False,
        **generation,
    }
    made_by: dict[str, Any] = {
        "model": fingerprint or answering_fingerprint(pipe),
        "data": questions.fingerprint(),
        "options": {name: _as_read_back(name, value) for name, value in options.items()},
    }
    path = None if output is None else Path(output)
    found = {} if path is None else _kept(path, made_by, len(questions))
    missing = [row for row in range(len(questions)) if row not in found]
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    bar = tqdm(total=len(questions), initial=len(found), desc=description, disable=not progress, unit="answer")
    with bar, nullcontext() if path is None else _appending(path) as file:
        for rows in batches:
            texts = _generate(pipe, questions, rows, processor_kwargs, max_new_tokens, generation)
            told = [Answered(row, questions[row].text, *said) for row, said in zip(rows, texts, strict=True)]
            if file is not None and path is not None:
                _append(file, path, told, made_by)
            found |= {one.row: one for one in told}
            bar.update(len(rows))
    return AnswerFile(tuple(found[row] for row in sorted(found)), **made_by)


def read_answers(path: str | Path) -> AnswerFile:
    """What `answer` kept in a file; ValueError names the first line that it did not write, or that another model wrote.

    A line that a stop has cut short is none.
    """
    file = Path(path)
    lines = list(_lines(file, _whole(file.read_bytes())))
    if not lines:
        raise ValueError(f"{file} holds no answers")
    made_by = {key: lines[0][key] for key in _MADE_BY}
    found = {one.row: one for one in _checked(file, lines, made_by)}
    return AnswerFile(tuple(found[row] for row in sorted(found)), **made_by)


def check_rows(answers: AnswerFile, questions: Sequence[Question]) -> None:
    """ValueError for answers to other rows than these questions."""
    if [one.row for one in answers.answers] != [question.row for question in questions]:
        raise ValueError(
            f"{len(answers.answers)} answers do not belong to these {len(questions)} questions row by row: are all of them answered?"
        )


@torch.no_grad()
def _generate(
    pipe: Any,
    questions: Questions,
    rows: list[int],
    processor_kwargs: Mapping[str, Any] | None,
    max_new_tokens: int,
    generation: Mapping[str, Any],
) -> list[tuple[str, bool]]:
    """(answer, whether it was ended) of each row."""
    model, processor = pipe.model, pipe.processor
    encoded = [
        encode_prompt(questions.prompt(row), row, processor, model.config, processor_kwargs=processor_kwargs)
        for row in rows
    ]
    pad = padding_token(processor)
    inputs = {name: tensor.to(model.device) for name, tensor in collate_prompts(encoded, pad).items()}
    with evaluating([model]):
        options = {"do_sample": False, **generation}
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **options)
    told = written[:, inputs["input_ids"].shape[1] :]
    tokenizer = getattr(processor, "tokenizer", processor)
    ends = generation.get("eos_token_id", model.generation_config.eos_token_id)
    ended = torch.isin(told, torch.tensor([] if ends is None else ends, device=told.device)).any(1)
    texts = tokenizer.batch_decode(told, skip_special_tokens=True)
    return [(text.strip(), bool(end)) for text, end in zip(texts, ended.tolist(), strict=True)]


def _as_read_back(name: str, value: Any) -> Any:
    """An option as it stands in a file."""
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"{name}: {value!r} cannot be kept with the answers that it decides about; give plain numbers, texts, lists or dicts"
        ) from error


def _kept(path: Path, made_by: Mapping[str, Any], number: int) -> dict[int, Answered]:
    """The answers that a file holds already. A line that a stop has cut short is taken off its end."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = _whole(content)
    found = {one.row: one for one in _checked(path, list(_lines(path, whole)), made_by)}
    if beyond := next((row for row in found if not 0 <= row < number), None):
        raise ValueError(f"{path} answers row {beyond} of {number}: move it away")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    elif whole and not whole.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return found


def _whole(content: bytes) -> bytes:
    """A file without a line at its end that a stop has cut short; what `answer` did not begin to write stays."""
    at = content.rfind(b"\n") + 1
    last = content[at:]
    if not last.startswith(_START[: len(last)]):
        return content
    try:
        json.loads(last)
    except ValueError:
        return content[:at]
    return content


def _lines(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    wanted = {*Answered.__dataclass_fields__, *_MADE_BY}
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if not isinstance(told, dict) or set(told) != wanted:
            raise ValueError(f"{path}, line {number} was not written by mmalign answer: move the file away")
        yield told


def _checked(path: Path, lines: list[dict[str, Any]], made_by: Mapping[str, Any]) -> Iterator[Answered]:
    for number, line in enumerate(lines, start=1):
        if differing := [name for key, name in _MADE_BY.items() if line[key] != made_by[key]]:
            raise ValueError(
                f"{path}, line {number}: an answer with other {' and '.join(differing)} than asked for now: move the file away, or "
                "write to another one"
            )
        yield Answered(**{name: line[name] for name in Answered.__dataclass_fields__})


def _appending(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a buffer, which would be written once more when the file is closed.
    return path.open("ab", buffering=0)


def _append(file: IO[bytes], path: Path, answers: list[Answered], made_by: Mapping[str, Any]) -> None:
    """Whole lines or none."""
    lines = "".join(json.dumps(asdict(one) | dict(made_by), ensure_ascii=False) + "\n" for one in answers)
    before = file.tell()
    try:
        with full_disk_explained(path.parent):
            # Half a character pair, which a model may write, is no UTF-8.
            rest = lines.encode(errors="replace")
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except BaseException:
        os.truncate(path, before)
        raise
