"""How quantities look in a terminal: the same in every command."""

from __future__ import annotations

from tetri.request import Slo

NOTHING = "-"  # there is no value
_BYTES = ("B", "kB", "MB", "GB", "TB")
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def seconds(value: float | None) -> str:
    """A duration: in ms below a second, in minutes from 100 seconds on."""
    if value is None:
        return NOTHING
    if abs(value) < 1:
        return f"{1e3 * value:.1f} ms"
    if abs(value) < 100:
        return f"{value:.2f} s"
    return ago(value)


def ago(value: float) -> str:
    """An age, in whole seconds or minutes."""
    minutes, rest = divmod(max(round(value), 0), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def amount(value: float) -> str:
    """A number of bytes, with three digits and a decimal unit."""
    unit = 0
    while value >= 999.5 and unit < len(_BYTES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_BYTES[unit]}"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    return f"{part / whole:.0%}" if whole else NOTHING


def number(value: float | None) -> str:
    """A mean or a rate, with three digits."""
    return NOTHING if value is None else f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def limits(slo: Slo) -> str:
    """Limits of latency."""
    return f"TTFT {seconds(slo.ttft_s)}   TPOT {seconds(slo.tpot_s)}"


def ratio(value: float | None) -> str:
    """A measured over a predicted time."""
    return NOTHING if value is None else f"{value:.2f}"


def count(number: int, noun: str) -> str:
    """A number of things: 1 chunk, 2 chunks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def bar(filled: float, width: int, start: float = 0.0, plain: bool = False) -> str:
    """A bar of `width` characters, filled from the share `start` to the share `filled`, at least by an eighth of a
    character; `plain`: in ASCII."""
    first = min(int(start * width), width - 1)
    if plain:
        last = max(first + 1, min(round(filled * width), width))
        return " " * first + "#" * (last - first) + " " * (width - last)
    whole, eighths = divmod(max(round((min(filled, 1.0) * width - first) * 8), 1), 8)
    text = " " * first + "█" * whole + (_EIGHTHS[eighths] if eighths else "")
    return text.ljust(width)[:width]


def sparkline(values: list[float], width: int, plain: bool = False) -> str:
    """The values as columns, in at most `width` characters: of values that share one, the largest counts."""
    if not values:
        return ""
    heights = "_.-=*#%@" if plain else "▁▂▃▄▅▆▇█"
    per = -(-len(values) // width)
    tops = [max(values[at : at + per]) for at in range(0, len(values), per)]
    most = max(tops) or 1.0
    return "".join(heights[min(int(top / most * len(heights)), len(heights) - 1)] for top in tops)
