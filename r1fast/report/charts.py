"""Charts of the report as inline SVG: they take their colours from the page, so both themes work."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

NUM_COLORS = 10  # --c0 ... --c9 of the page; 7 is a grey
MAX_POINTS = 240  # a line; longer ones are averaged in equal pieces

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 12, 36
LINE = 12  # between the lines of a label
CHAR = 5.6  # mean width of a letter at the size of the labels


@dataclass(slots=True)
class Series:
    """One stage in one chart. A y of None is a gap; `points` are marked with dots."""

    label: str
    color: int
    xs: list[float]
    ys: list[float | None]
    points: list[tuple[float, float]] = field(default_factory=list)

    def values(self) -> list[float]:
        return [y for y in self.ys if y is not None] + [y for _, y in self.points]


def curve_chart(
    name: str,
    series: Sequence[Series],
    *,
    share: bool = False,
    from_zero: bool = False,
    log: bool = False,
) -> str:
    """The stages one after the other on one axis of steps: raw values thin, rolling mean bold."""
    series = [s for s in series if s.values()]
    values = [y for s in series for y in s.values()]
    log = log and min(values) > 0
    if share:
        ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    elif log:
        ticks = decades(min(values), max(values))
    else:
        ticks = nice_ticks(min([*values, 0.0] if from_zero else values), max(values))
    scale = math.log10 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(y) - low) / (high - low))

    widths = segment_widths([max(s.xs, default=1) for s in series], WIDTH - LEFT - RIGHT)
    labels = [label_lines(s.label, w) for s, w in zip(series, widths, strict=True)]
    num_lines = max(map(len, labels), default=1)
    height = HEIGHT + LINE * (num_lines - 1)
    label = escape(describe(name, series), quote=True)
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">']
    for tick in ticks:
        y = at_y(tick)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}">{tick_label(tick)}</text>')
    left = float(LEFT)
    for i, (one, width) in enumerate(zip(series, widths, strict=True)):
        if i:
            out.append(f'<path class="edge" d="M{left:.1f} {TOP}V{HEIGHT - BOTTOM + 6}"/>')
        out += _segment(one, left, width, at_y, 0.0 if log else ticks[1] - ticks[0])
        out += _names(one, labels[i], num_lines, left, width)
        left += width
    out.append("</svg>")
    return "".join(out)


def _segment(one: Series, left: float, width: float, at_y, step: float) -> list[str]:
    """The line of one stage with its last value, one digit finer than `step`."""
    pad = min(5.0, width / 6)
    first, last = min(one.xs), max(one.xs)
    scale = (width - 2 * pad) / max(last - first, 1)

    def at(x: float, y: float) -> str:
        return f"{left + pad + (x - first) * scale:.1f} {at_y(y):.1f}"

    out = [f'<g style="--c:var(--c{one.color % NUM_COLORS})">']
    xs, ys = shorten(one.xs, one.ys)
    mean = rolling_mean(ys)
    if raw := line(xs, ys, at):
        out.append(f'<path class="raw" d="{raw}"/><path class="line" d="{line(xs, mean, at)}"/>')
    for x, y in one.points:
        cx, cy = at(x, y).split()
        text = escape(f"{one.label}, step {x:g}: {y:.4g}")
        out.append(f'<circle class="dot" cx="{cx}" cy="{cy}" r="3"><title>{text}</title></circle>')
    ends = [
        (*map(float, at(x, y).split()), y) for x, y in zip(xs, mean, strict=True) if y is not None
    ]
    if ends and width > 40:
        cx, cy, y = ends[-1]
        near = [
            py for x, py, _ in ends if x > cx - min(30, 0.4 * width)
        ]  # the text must not lie on the line
        above, below = min(near) - 7, max(near) + 15
        fits = below < HEIGHT - BOTTOM - 2
        place = below if above < TOP + 7 or (fits and below - cy < cy - above) else above
        out.append(
            f'<text class="value" x="{cx:.1f}" y="{place:.1f}">{value_label(y, step)}</text>'
        )
    return [*out, "</g>"]


def _names(one: Series, lines: list[str], num_lines: int, left: float, width: float) -> list[str]:
    """The name of a stage and its steps, below its line."""
    middle, y = f"{left + width / 2:.1f}", HEIGHT - BOTTOM + 17
    last = max(one.xs)
    spans = "".join(
        f'<tspan x="{middle}" y="{y + LINE * i}">{escape(text)}</tspan>'
        for i, text in enumerate(lines)
    )
    steps = f"{last:g} steps" if width > 48 else f"{last:g}"
    return [
        f'<g style="--c:var(--c{one.color % NUM_COLORS})">'
        f'<text class="stage">{spans}<title>{escape(one.label)}</title></text>'
        f'<text class="steps" x="{middle}" y="{y + LINE * num_lines + 1}">{steps}</text></g>'
    ]


def label_lines(label: str, width: float) -> list[str]:
    """The label broken between words where it is too long; a word too long is cut."""
    room = max(int((width - 4) / CHAR), 2)
    return [fit([text], width) for text in textwrap.wrap(label, room, break_long_words=False)]


def line(xs: Sequence[float], ys: Sequence[float | None], at) -> str:
    """An SVG path with a gap at every None; a lone value becomes a dot by its round cap."""
    parts, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{at(x, y)}")
        if pen == "M":
            parts.append("h0")
        pen = "L"
    return "".join(parts)


def describe(name: str, series: Sequence[Series]) -> str:
    """The chart in words, for those who do not see it."""
    parts = []
    for one in series:
        values = [y for y in rolling_mean(one.ys) if y is not None] or one.values()
        steps = f"{max(one.xs, default=0):g} steps"
        parts.append(f"{one.label}: {values[0]:.3g} to {values[-1]:.3g} over {steps}")
    return f"{name}. " + "; ".join(parts)


def segment_widths(sizes: Sequence[float], total: float) -> list[float]:
    """Shares of `total` in proportion to `sizes`, none below 0.9 of an even share."""
    floor = 0.9 / max(len(sizes), 1)
    whole = sum(sizes) or 1.0
    small = [size / whole < floor for size in sizes]
    rest = sum(size for size, tiny in zip(sizes, small, strict=True) if not tiny) or 1.0
    free = 1 - floor * sum(small)
    return [
        total * (floor if tiny else free * size / rest)
        for size, tiny in zip(sizes, small, strict=True)
    ]


def rolling_mean(ys: Sequence[float | None]) -> list[float | None]:
    """Centred mean over about a tenth of the line; gaps stay gaps."""
    reach = len(ys) // 20
    out: list[float | None] = []
    for i, y in enumerate(ys):
        near = [v for v in ys[max(i - reach, 0) : i + reach + 1] if v is not None]
        out.append(None if y is None else sum(near) / len(near))
    return out


def shorten(
    xs: Sequence[float], ys: Sequence[float | None]
) -> tuple[list[float], list[float | None]]:
    """At most MAX_POINTS points: means of equal pieces."""
    size = math.ceil(len(xs) / MAX_POINTS)
    if size <= 1:
        return list(xs), list(ys)
    out_x: list[float] = []
    out_y: list[float | None] = []
    for i in range(0, len(xs), size):
        piece = [y for y in ys[i : i + size] if y is not None]
        out_x.append(xs[min(i + size, len(xs)) - 1])
        out_y.append(sum(piece) / len(piece) if piece else None)
    return out_x, out_y


def nice_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """Round numbers that enclose low ... high."""
    if not high - low > 1e-4 * max(abs(low), abs(high)):  # flat, as far as labels can tell
        room = abs(low) / 2 or 1.0
        low, high = low - room, low + room
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose low ... high."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**i for i in range(first, max(last, first + 1) + 1)]


def tick_label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 0.001 else f"{value:g}"


def value_label(value: float, step: float) -> str:
    """One digit finer than the ticks; two where they are whole; by its size where `step` is tiny or 0."""
    if step < 1e-4:
        return f"{value:.2g}".replace("e-0", "e-")
    digits = 2 if step == 1 else max(1 - math.floor(math.log10(step) + 1e-9), 0)
    return f"{value:.{digits}f}"


def fit(options: Sequence[str], width: float) -> str:
    """The first text that fits, or the last one cut."""
    room = max(int((width - 4) / CHAR), 2)
    for text in options:
        if len(text) <= room:
            return text
    return options[-1][: room - 1] + "…"
