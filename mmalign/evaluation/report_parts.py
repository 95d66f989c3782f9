"""What the pages are made of: the document, escaped text, embedded pictures, tables of settings, names of scorers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from mmalign.evaluation.report_assets import STYLE

SMALL = 128  # pictures up to this size are enlarged without smoothing
LARGEST = 512  # and above this one they are embedded smaller
# Nothing may be fetched, whatever a prompt or a label contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(kind: str, title: str, created: str, sections: Sequence[str], *, script: str = "") -> str:
    """A whole page of its own: style and script inside, nothing to load. `kind`: what stands before the title."""
    run = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header class="eyebrow"><span><b>mmalign {kind}</b> &nbsp;{text(title)}</span>'
        f"<span>{text(created.replace('T', ' ').removesuffix('+00:00'))} UTC</span></header>\n"
        f"<main>\n{''.join(sections)}</main>\n{run}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Escaped for HTML; control characters and half surrogate pairs are replaced by a mark."""
    clean = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(value))
    return escape(clean, quote=True)


def data_uri(image: Image.Image) -> str:
    """PNG for small pictures, JPEG for larger ones, never more than 512 pixels on the longer edge."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= SMALL
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def definitions(table: Mapping[str, Any], *, fingerprints: bool = False) -> str:
    """A table of names and values; fingerprints are cut to what tells them apart."""

    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            value = [f"{name} {one}" for name, one in value.items()]
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or "nothing"
        if value is None:
            return "the model's own"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float):
            return f"{value:,g}" if isinstance(value, float) else f"{value:,}"
        if fingerprints or re.fullmatch(r"[0-9a-f]{64}", str(value)):
            return f"<code>{text(str(value)[:16])}</code>"
        return text(value)

    rows = "".join(f"<div><dt>{text(key)}</dt><dd>{show(value)}</dd></div>" for key, value in table.items())
    return f'<dl class="settings">{rows}</dl>'


def name_cell(name: str, seen_in_training: bool) -> str:
    """A scorer's name, marked if it was seen in training."""
    tag = '<span class="tag">seen in training</span>' if seen_in_training else ""
    return f'<td class="name">{text(name)}{tag}</td>'
