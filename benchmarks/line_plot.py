"""A plot of a few lines as one SVG, which a page on GitHub shows."""

from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 400, 30, 230


def line_plot(lines: Mapping[str, Points], x_label: str, *, heights: str = "{:g}", zero: bool = False) -> str:
    """A line a name, named beside the plot; ticks at every x that occurs. heights: how values are written. zero: a line at 0."""
    across = sorted({x for line in lines.values() for x, _ in line}) or [0.0]
    values = [y for line in lines.values() for _, y in line] + [0.0] * (zero or not lines)
    low, high = min(values), max(values)
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        width = across[-1] - across[0] or 1.0
        return _LEFT + (_RIGHT - _LEFT) * (x - across[0]) / width, _BOTTOM - (_BOTTOM - _TOP) * (y - low) / span

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="275" font-family="sans-serif" font-size="12">'
    ]
    if zero:
        level = place(0, 0)[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#bbb"/>')
    for at, (name, line) in enumerate(lines.items()):
        colour = f"hsl({360 * at / len(lines):.0f} 70% 40%)"
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_RIGHT + 15}" y="{40 + 18 * at}" fill="{colour}">{name}</text>')
    parts += [f'<text x="{place(x, low)[0]:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{x:g}</text>' for x in across]
    parts += [
        f'<text x="{_LEFT - 6}" y="{place(0, y)[1] + 4:.1f}" text-anchor="end">{heights.format(y)}</text>'
        for y in sorted({low, high, *([0.0] if zero else [(low + high) / 2])})
    ]
    middle = (_LEFT + _RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{_BOTTOM + 37}" text-anchor="middle">{x_label}</text></svg>')
    return "\n".join(parts) + "\n"
