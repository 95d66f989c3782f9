"""Pictures side by side in one image, with titles and captions that can be read."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 128
MAX_CELL = 512

_PAPER, _INK, _MUTED = "#ffffff", "#1a1a1a", "#5f6368"
_MARGIN, _GAP = 24, 12
_LINE_SPACING = 1.35


def side_by_side(
    rows_of_images: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    column_titles: Sequence[str],
    *,
    cell_size: int | None = None,
    rows_per_line: int = 1,
    font_size: int = 15,
    max_caption_lines: int = 4,
) -> Image.Image:
    """One row of pictures a prompt, its caption below, wrapped to the row's width; titles stand above the columns.

    rows_per_line: how many rows stand beside each other on the sheet.
    cell_size: longer edge of a shown picture; left out, pictures keep their size within 128 to 512 pixels. Pictures are
    enlarged by whole factors without smoothing where that fits (a 32-pixel picture stays crisp), else by Lanczos.
    """
    columns = len(column_titles)
    if len(rows_of_images) != len(captions) or not rows_of_images or columns == 0:
        raise ValueError("side_by_side needs one caption for every row, and at least one row and one column title.")
    for number, row in enumerate(rows_of_images):
        if len(row) != columns:
            raise ValueError(f"Row {number} has {len(row)} pictures, but there are {columns} column titles.")
    longest = max(max(image.size) for row in rows_of_images for image in row)
    size = cell_size or min(MAX_CELL, max(MIN_CELL, longest))
    cells = [[fit(image, size) for image in row] for row in rows_of_images]

    font, title_font = _font(font_size), _font(font_size + 2)
    column = max(max(image.width for row in cells for image in row), _title_width(column_titles, title_font))
    width = columns * column + (columns - 1) * _GAP
    blocks = [
        _block(row, wrap(caption, font, width, max_caption_lines), column, font)
        for row, caption in zip(cells, captions, strict=True)
    ]
    lines = [blocks[start : start + rows_per_line] for start in range(0, len(blocks), rows_per_line)]
    across = min(rows_per_line, len(blocks))
    head = _MARGIN + round(title_font.size * _LINE_SPACING)
    heights = [max(block.height for block in line) for line in lines]
    total = (_MARGIN + across * (width + _MARGIN), head + sum(heights) + _MARGIN * len(lines))

    sheet = Image.new("RGB", total, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for at in range(across * columns):
        left = _MARGIN + at // columns * (width + _MARGIN) + at % columns * (column + _GAP)
        draw.text((left, _MARGIN - 4), column_titles[at % columns], _MUTED, title_font)
    top = head
    for line, height in zip(lines, heights, strict=True):
        for at, block in enumerate(line):
            sheet.paste(block, (_MARGIN + at * (width + _MARGIN), top))
        top += height + _MARGIN
    return sheet


def _block(
    row: Sequence[Image.Image], caption: Sequence[str], column: int, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The pictures of one prompt with the lines of its caption."""
    below, line = max(image.height for image in row) + 6, round(font.size * _LINE_SPACING)
    block = Image.new("RGB", (len(row) * (column + _GAP) - _GAP, below + line * len(caption)), _PAPER)
    draw = ImageDraw.Draw(block)
    for at, image in enumerate(row):
        block.paste(image, (at * (column + _GAP), 0))
    for at, text in enumerate(caption):
        draw.text((0, below + at * line), text, _INK, font)
    return block


def fit(image: Image.Image, size: int) -> Image.Image:
    """The picture with its longer edge at `size`, or at the largest multiple of its own that is at least ⅔ of it."""
    image = image.convert("RGB")
    longest = max(image.size)
    factor = size // longest
    if factor >= 1 and 3 * factor * longest >= 2 * size and longest <= MIN_CELL:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = size / longest
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if target == image.size else image.resize(target, Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces, inside a word only where it is too long for a line."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()}…"]


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in scalable font: Latin letters, and an empty box for what it lacks."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("This Pillow was built without FreeType, so captions cannot be drawn. pip install -U pillow")
    return font


def _title_width(titles: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return int(max(font.getlength(title) for title in titles)) + 1
