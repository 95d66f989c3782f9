"""Preference data of answers in every form, with faults between good rows.

`FORMS[name]` is (a good row of it, the pair that must be read from it, what can be wrong with it). Pictures and clips lie in a
folder that `write_media` fills.
"""

from pathlib import Path
from typing import Any

from data.faults import bad_paths, write_pictures
from PIL import Image

Row = dict[str, Any]
# What is changed in a good row, the field that must be named, and a part of the reason.
Fault = tuple[Row, str, str]
# (role, parts) with "image" and "clip" for media; chosen; rejected; marked phrases of both.
Read = tuple[list[tuple[str, list[str]]], str, str | None, list[str], list[str]]
FRAMES = 6


def write_media(folder: Path) -> None:
    """picture.png, other.png, clip/ with six frames of 6×4, short/ with one, mixed/ with two sizes; bad files of every kind."""
    write_pictures(folder, 1)
    Image.new("RGB", (6, 4), (1, 2, 3)).save(folder / "picture.png")
    Image.new("RGB", (6, 4), (3, 2, 1)).save(folder / "other.png")
    for name, sizes in (("clip", [(6, 4)] * FRAMES), ("short", [(6, 4)]), ("mixed", [(6, 4)] * 5 + [(4, 6)])):
        (folder / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", size, (40 * number, 0, 0)).save(folder / name / f"{number}.png")


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def said(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def human(value: Any) -> Row:
    return {"from": "human", "value": value}


def gpt(value: Any) -> Row:
    return {"from": "gpt", "value": value}


PART = {"type": "image"}
TEXT = {"type": "text", "text": "what is it?"}
CLIP = {"type": "video", "video": "clip"}
ASKED = [("user", ["image", "what is it?"])]
PLAIN: Read = (ASKED, "a bag", "a shoe", [], [])

# Faults that are the same in each form whose answers are `chosen` and `rejected`.
ANSWERS: list[Fault] = [
    ({"chosen": None}, "chosen", "expected text, got None"),
    ({"chosen": ""}, "chosen", "the answer is empty"),
    ({"rejected": " \n"}, "rejected", "the answer is empty"),
    ({"rejected": "<MASK></MASK>"}, "rejected", "the answer is empty"),
    ({"rejected": "a bag"}, "rejected", "the same answer as chosen"),
    ({"rejected": "a <MASK>bag</MASK>"}, "rejected", "the same answer as chosen"),
    ({"chosen": "a <MASK>bag"}, "chosen", "never closed"),
    ({"chosen": "a bag</MASK>"}, "chosen", "without a <MASK> before it"),
    ({"rejected": "<MASK>a <MASK>shoe</MASK></MASK>"}, "rejected", "nested tags"),
    ({"rejected": "<image> a shoe"}, "rejected", "the answer holds a mark <image>"),
    ({"rejected": "half \ud800"}, "rejected", "no valid Unicode"),
    ({"rejected": 3}, "rejected", "expected text, got 3"),
    ({"rejected": [user("a shoe")]}, "rejected", "ends with the turn of 'user'"),
    ({"rejected": []}, "rejected", "expected a list of messages, got list"),
]
# Those of a form whose media stand in the columns and whose prompt has no places for them.
SHARED: list[Fault] = [
    ({"image": None, "images": ["picture.png", None]}, "images[1]", "no image (None)"),
    ({"images": ["picture.png"]}, "images", "has image as well"),
    ({"audios": ["a.wav"]}, "audios", "sound is not read"),
    ({"tools": "[]x"}, "tools", "not written into the prompt"),
    ({"video": "short"}, "video", "holds 1 frame(s), and 3 are asked for"),
    ({"video": "mixed"}, "video", "frames of different sizes"),
    ({"video": "picture.png"}, "video", "holds 1 frame(s)"),
    ({"video": "cut.mp4"}, "video", "damaged or truncated video"),
    ({"videos": ["clip", "none.mp4"]}, "videos[1]", "no such file: 'none.mp4'"),
    ({"video": {"frames": ["other.png"] * 3, "fps": 0}}, "video", "fps is 0, expected a number above 0"),
    ({"video": {"frames": ["other.png"] * 3, "fps": "8"}}, "video", "fps is '8'"),
    ({"video": {"frames": ["other.png"] * 3, "fps": 10**400}}, "video", "fps is an integer of more than 18 digits"),
    ({"video": {"frames": ["other.png"] * 3, "indices": [[0], 1, 2]}}, "video", "not a list of whole numbers"),
    ({"video": {"frames": ["other.png"] * 3, "indices": [0, 4]}}, "video", "3 frames, but 2 indices"),
    ({"video": {"frames": ["other.png"] * 3, "indices": [0, 4, 4]}}, "video", "not in ascending order"),
    ({"video": {"frames": ["other.png"] * 3, "indices": [0, 4, 5], "total_frames": 5}}, "video", "index 5 of a video"),
    ({"video": {"frames": ["other.png"] * 3, "total_frames": 9}}, "video", "pass the indices"),
    ({"video": {"frames": ["other.png"] * 3, "rate": 8}}, "video", "a clip with rate: expected frames, fps"),
    ({"video": {"frames": ["other.png", "none.png", "other.png"]}}, "video", "frame 1: no such file: 'none.png'"),
    ({"video": {"frames": []}}, "video", "holds 0 frame(s)"),
    ({"confidence": 0.2}, "confidence", "expected 0.5 … 1"),
    ({"chosen_score": 1, "rejected_score": "high"}, "rejected_score", "got 'high'"),
    ({"user_id": {"name": "x"}}, "user_id", "expected text or a number, got dict"),
    *(({"image": path}, "image", reason) for path, reason in bad_paths() if path is not None),
]  # fmt: skip
MESSAGES: list[Fault] = [
    ({"prompt": []}, "prompt", "expected a list of messages"),
    ({"prompt": ["x"]}, "prompt", "expected messages with role and content, got 'x'"),
    ({"prompt": [{"role": "tool", "content": "x"}]}, "prompt", "a message of role 'tool'"),
    ({"prompt": [user([{"type": "audio"}])]}, "prompt", "a part of type 'audio'"),
    ({"prompt": [user([PART, {"type": "text"}])]}, "prompt", "expected text, got None"),
    ({"prompt": [user([PART, PART, TEXT])]}, "images", "2 image placeholder(s) in prompt but 1 image(s)"),
    ({"prompt": [user([PART, TEXT])], "images": []}, "prompt", "1 image placeholder(s) in prompt but 0 image(s)"),
    ({"prompt": [user([CLIP, {"type": "video"}, TEXT])]}, "prompt", "1 video placeholder(s) in prompt but 0 video(s)"),
    ({"prompt": [user([PART, TEXT]), said("hm")]}, "prompt", "ends with 'assistant', expected the user's turn"),
    ({"prompt": [{"role": "system", "content": [PART]}, user("x")]}, "prompt", "a part of type 'image' in a turn of 'system'"),
    ({"prompt": [user([PART, TEXT]), said(""), user("so?")]}, "prompt", "a turn of 'assistant' is empty"),
    ({"chosen": [said([PART])]}, "chosen", "a part of type 'image' in a turn of 'assistant'"),
    ({"prompt": [user([PART, TEXT]), said("hm") | {"tool_calls": [{}]}, user("so?")]}, "prompt", "a message with tool_calls, which"),
    ({"chosen": [said("a bag") | {"reasoning_content": "it has a strap"}]}, "chosen", "with reasoning_content, which is not read"),
    ({"chosen": [user("other"), said("a bag")]}, "chosen", "is not that of prompt"),
]  # fmt: skip

FORMS: dict[str, tuple[Row, Read, list[Fault]]] = {
    "preference": (
        {"prompt": "what is it?", "chosen": "a bag", "rejected": "a shoe", "image": "picture.png"},
        PLAIN,
        [
            *ANSWERS,
            *SHARED,
            ({"prompt": None}, "prompt", "expected text, got None"),
            ({"prompt": "", "image": None}, "prompt", "a turn of 'user' is empty"),
            ({"prompt": "<image><image>?"}, "image", "2 image placeholder(s) in prompt but 1 image(s)"),
            ({"prompt": "<image>?", "image": None, "video": "clip"}, "prompt", "1 image placeholder(s) in prompt but 0 image(s)"),
            ({"prompt": "<video>?"}, "prompt", "1 video placeholder(s) in prompt but 0 video(s)"),
            ({"image": None, "images": ["picture.png"] * 3, "prompt": "<image><image>"}, "images", "2 image placeholder(s) in prompt"),
        ],
    ),
    "preference in messages": (
        {
            "prompt": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user([PART, TEXT, CLIP])],
            "chosen": [said([{"type": "text", "text": "a "}, {"type": "text", "text": "bag"}])],
            "rejected": [said("a <MASK>shoe</MASK>")],
            "images": ["picture.png"],
        },
        ([("system", ["Be brief."]), ("user", ["image", "what is it?", "clip"])], "a bag", "a shoe", [], ["shoe"]),
        MESSAGES,
    ),
    "implicit prompt": (
        {
            "chosen": [user("<image>what is it?"), said("well"), user("so?"), said("a bag")],
            "rejected": [user("<image>what is it?"), said("well"), user("so?"), said("a shoe")],
            "image": "picture.png",
        },
        ([*ASKED, ("assistant", ["well"]), ("user", ["so?"])], "a bag", "a shoe", [], []),
        [
            ({"chosen": [said("a bag")]}, "chosen", "holds no turn before the answer"),
            ({"chosen": "a bag", "rejected": "a shoe"}, "chosen", "holds no turn before the answer"),
            ({"rejected": [user("what?"), said("a shoe")]}, "rejected", "is not that of chosen"),
        ],
    ),
    "unpaired": (
        {"prompt": "what is it?", "completion": "a <MASK>bag</MASK>", "label": False, "image": "picture.png"},
        (ASKED, "a bag", None, ["bag"], []),
        [
            ({"label": None}, "label", "expected true or false, got None"),
            ({"label": "true"}, "label", "expected true or false, got 'true'"),
            ({"label": 0.5}, "label", "expected true or false, got 0.5"),
            ({"completion": None}, "completion", "expected text, got None"),
            ({"completion": " "}, "completion", "the answer is empty"),
        ],
    ),
    "rlaif-v": (
        {"question": "what is it?", "chosen": "a bag", "rejected": "a shoe", "image": "picture.png", "ds_name": "x", "idx": 3},
        PLAIN,
        [*ANSWERS, *SHARED, ({"question": 7}, "question", "expected text, got 7")],
    ),
    "ms-swift": (
        {"messages": [user("<image>what is it?"), said("a bag")], "rejected_response": "a shoe", "images": ["picture.png"]},
        PLAIN,
        [
            ({"rejected_response": None}, "rejected_response", "expected text, got None"),
            ({"messages": [user("<image>what is it?")]}, "messages", "ends with the turn of 'user'"),
            ({"messages": [said("a bag")]}, "messages", "holds no turn before the answer"),
            ({"messages": None}, "messages", "expected text, got None"),
            ({"images": []}, "messages", "1 image placeholder(s) in messages but 0 image(s)"),
        ],
    ),
    "ms-swift messages": (
        {
            "messages": [user("<video>\n<image>what is it?"), said("a bag")],
            "rejected_messages": [user("<video>\n<image>what is it?"), said("a shoe")],
            "images": ["picture.png"],
            "rejected_images": ["picture.png"],
            "videos": ["clip"],
        },
        ([("user", ["clip", "image", "what is it?"])], "a bag", "a shoe", [], []),
        [
            ({"rejected_messages": [user("<video>who?"), said("a shoe")]}, "rejected_messages", "is not that of messages"),
            ({"rejected_images": ["other.png"]}, "rejected_images", "differs from images"),
            ({"videos": ["clip", "clip"]}, "videos", "1 video placeholder(s) in messages but 2 video(s)"),
        ],
    ),
    "sharegpt": (
        {
            "conversations": [human("<image>what is it?"), gpt("well"), human("so?")],
            "chosen": gpt("a bag"),
            "rejected": gpt("a shoe"),
            "images": ["picture.png"],
            "system": "Be brief.",
        },
        ([("system", ["Be brief."]), *ASKED, ("assistant", ["well"]), ("user", ["so?"])], "a bag", "a shoe", [], []),
        [
            ({"conversations": [human("<image>x"), {"from": "observation", "value": "y"}]}, "conversations", "of role 'observation'"),
            ({"conversations": "x"}, "conversations", "expected a list of messages, got 'x'"),
            ({"chosen": human("a bag")}, "chosen", "ends with the turn of 'user'"),
            ({"rejected": gpt(None)}, "rejected", "expected text, got None"),
            ({"system": 3}, "system", "expected text, got 3"),
        ],
    ),
    "rrpo as documented": (
        {
            "question": "<image>\nwhat is it?",
            "answer": "a red bag.",
            "pred": "a blue shoe.",
            "answer_masked": "a <MASK> red </MASK> <MASK>bag</MASK>.",
            "pred_masked": "a <MASK>blue shoe</MASK>.",
            "src": "s",
            "sample_id": 0,
            "video": "clip",
        },
        ([("user", ["clip", "what is it?"])], "a red bag.", "a blue shoe.", ["red", "bag"], ["blue shoe"]),
        [
            ({"answer_masked": "a <MASK>big</MASK> bag."}, "answer_masked", "'big bag.' and 'red bag.' from character 2"),
            ({"pred_masked": "a <MASK>blue shoe."}, "pred_masked", "never closed"),
            ({"pred_masked": 3}, "pred_masked", "expected text, got 3"),
            ({"question": "<image>\n<image>\nwhat?"}, "video", "2 video placeholder(s) in question but 1 video(s)"),
            ({"video": None}, "question", "1 image placeholder(s) in question but 0 image(s)"),
        ],
    ),
    "rrpo as loaded": (
        {
            "question": "<image>\nwhat is it?",
            "answer": "a bag",
            "pred": "a <MASK>shoe</MASK>",
            "media_path": {"frames": "clip", "fps": 2.0, "indices": [0, 2, 4, 6, 8, 10], "total_frames": 12},
        },
        ([("user", ["clip", "what is it?"])], "a bag", "a shoe", [], ["shoe"]),
        [({"media_path": "../clip"}, "media_path", "leaves the data set's folder")],
    ),
    "videochat2": (
        {
            "QA": [{"i": "Look.", "q": "first?", "a": "yes"}, {"i": "", "q": "what is it?", "a": "a bag"}],
            "QA_NEG": [{"i": "Look.", "q": "first?", "a": "yes"}, {"i": "", "q": "what is it?", "a": "a shoe"}],
            "video": "clip",
            "sample_id": 1,
        },
        ([("user", ["clip", "Look.\nfirst?"]), ("assistant", ["yes"]), ("user", ["what is it?"])], "a bag", "a shoe", [], []),
        [
            ({"QA": []}, "QA", "expected a list of {i, q, a}"),
            ({"QA_NEG": [{"q": "what is it?", "a": "a shoe"}]}, "QA_NEG", "asks other questions than QA"),
            (
                {"QA_NEG": [{"i": "Look.", "q": "first?", "a": "no"}, {"q": "what is it?", "a": "a shoe"}]},
                "QA_NEG",
                "in more than the last question",
            ),
            ({"QA": [{"q": None, "a": "x"}]}, "QA", "expected text, got None"),
            ({"QA": [{"q": "x", "a": 3}]}, "QA[0].a", "expected text, got 3"),
            ({"start": 1.0, "end": 2.0}, "start", "cut the file"),
        ],
    ),
}  # fmt: skip


def interleaved(row: Row, faults: list[Fault]) -> list[Row]:
    """Good, good with the first fault, good, good with the second, …, good."""
    rows = [row]
    for change, _, _ in faults:
        rows += [row | change, row]
    return rows
