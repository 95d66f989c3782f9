"""docs/losses.md names every loss as the table has it. Printed by `python -m losses.test_losses_docs` in tests/."""

from pathlib import Path

from mmalign import losses

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def rows() -> list[str]:
    """The page's table, one line a loss."""
    lines = [
        "| key | what it is | paper | for | reference | takes a signed strength | hyper-parameters |",
        "|" + "---|" * 7,
    ]
    for key in losses.names():
        info = losses.get(key)
        hyper = ", ".join(f"`{name}` {value}" for name, value in info.hyper.items() if value is not None)
        more = ", ".join(f"`{name}`" for name, value in info.hyper.items() if value is None)
        cells = (
            f"`{key}`",
            info.meaning + (f" (as `{info.alias_of}`)" if info.alias_of else ""),
            f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv})",
            " and ".join(info.modalities) + (", single samples" if info.unpaired else ""),
            "no" if info.reference_free else "yes",
            "no" if info.no_strength else "yes",
            "; ".join(filter(None, (hyper, more))) or "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_page_has_the_table():
    assert "\n".join(rows()) in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print("\n".join(rows()))
