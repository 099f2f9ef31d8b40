"""What the pages share: the templates, and how numbers and changes are put into words.

Both pages, of a run and of a search, stand in one file each and fetch nothing. Their look is ``page.html.j2``.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def environment() -> Environment:
    """The templates of this folder. What they are given is escaped, and a name that is not given is an error."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"fixed": fixed, "count": count, "size": size}
    return made


def fixed(value: float | None, digits: int) -> str:
    """With so many digits after the point; n/a where nothing was measured."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def count(value: int | None) -> str:
    """With a comma after every three digits."""
    return "n/a" if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Bytes with the decimal prefix that leaves at most three digits before the point."""
    if value is None:
        return "n/a"
    units = ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value:.0f} {units[0]}"


def change(gain: float) -> str:
    """What distillation did to a share of the rows, as a verb and percentage points."""
    if gain == 0:
        return "neither gained nor lost"
    return f"{'gained' if gain > 0 else 'lost'} {abs(100 * gain):.2f} percentage points"
