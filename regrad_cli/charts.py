"""Line charts and bar charts as inline SVG, from plain numbers. Knows no page, no file and no run.

Every chart names itself to screen readers, follows the page's light or dark scheme, and links to nothing. Texts are
escaped here. Numbers that are not finite are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from regrad_cli.shown import visible_line

WIDTH = 640
PLOT_HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 36, 44  # room around a line chart's plot: title, ticks, names of the axes
ROW = 24  # height of a bar with its space, and of a row of the legend
MARKED = 40  # a series of more points has no dot for each
MOST_POINTS = 1000  # of one series that are drawn
# Told apart in common kinds of colour blindness; lines differ in their dashes as well. (on light, on dark)
COLOURS = (
    ("#0067a5", "#5ab4f0"), ("#c04a00", "#ff9a57"), ("#00785a", "#3ccfa4"), ("#a3407c", "#ee9ac9"),
    ("#8a6500", "#e5bb3c"), ("#5b5bb5", "#b3b3ff"), ("#606060", "#c0c0c0"), ("#a01c28", "#ff8088"),
)  # fmt: skip
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
STYLE = (
    ".regrad-chart{color:#1c1c1c;max-width:100%;height:auto;font:12px system-ui,sans-serif}"
    ".regrad-chart text{fill:currentColor}.regrad-chart .grid{stroke:currentColor;stroke-opacity:.15}"
    ".regrad-chart .axis,.regrad-chart .whisker{stroke:currentColor;fill:none}"
    + "".join(f".regrad-chart .s{n}{{color:{light}}}" for n, (light, _) in enumerate(COLOURS))
    + "@media (prefers-color-scheme:dark){.regrad-chart{color:#e8e8e8}"
    + "".join(f".regrad-chart .s{n}{{color:{dark}}}" for n, (_, dark) in enumerate(COLOURS))
    + "}"
)


def line_chart(title: str, series: Mapping[str, Iterable[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """One line a series, {name: [(x, y), …]}, with a legend where there are several; an `<svg>` element."""
    lines = {name: [(x, y) for x, y in points if _finite(x, y)] for name, points in series.items()}
    every = [point for points in lines.values() for point in points]
    x_ticks, y_ticks = _ticks([x for x, _ in every]), _ticks([y for _, y in every])
    plot_right, plot_bottom = WIDTH - RIGHT, TOP + PLOT_HEIGHT

    def at_x(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (plot_right - LEFT)

    def at_y(y: float) -> float:
        return plot_bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * PLOT_HEIGHT

    drawn = [
        f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{plot_right}"/>{_text(LEFT - 6, at_y(y) + 4, _figure(y), "end")}'
        for y in y_ticks
    ]
    drawn += [_text(at_x(x), plot_bottom + 16, _figure(x), "middle") for x in x_ticks]
    drawn.append(f'<path class="axis" d="M{LEFT} {TOP}V{plot_bottom}H{plot_right}"/>')
    drawn.append(_text((LEFT + plot_right) / 2, plot_bottom + 34, x_label, "middle"))
    drawn.append(_text(0, 0, y_label, "middle", f"translate(13 {TOP + PLOT_HEIGHT / 2}) rotate(-90)"))
    if not every:
        drawn.append(_text((LEFT + plot_right) / 2, TOP + PLOT_HEIGHT / 2, "no data", "middle"))
    bottom = plot_bottom + BOTTOM
    for number, (name, points) in enumerate(lines.items()):
        style = f'class="s{number % len(COLOURS)}" stroke="currentColor" fill="none" stroke-width="2"'
        style += f' stroke-dasharray="{DASHES[number // len(COLOURS) % len(DASHES)]}"'
        thinned = points[:: math.ceil(len(points) / MOST_POINTS) or 1]
        if points and thinned[-1] != points[-1]:
            thinned.append(points[-1])
        path = "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in thinned)
        drawn.append(f'<path {style} d="M{path}"/>' if path else "")
        if len(points) <= MARKED:
            drawn += [
                f'<circle class="s{number % len(COLOURS)}" fill="currentColor" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" '
                f'r="3"><title>{_safe(f"{name}: {_figure(x)}, {_figure(y)}")}</title></circle>'
                for x, y in points
            ]
        if len(lines) > 1:
            place = LEFT + number % 3 * (WIDTH - LEFT) / 3, bottom + number // 3 * ROW
            drawn.append(f'<path {style} d="M{place[0]:.1f} {place[1]}h26"/>')
            drawn.append(_text(place[0] + 32, place[1] + 4, name))
    legend = math.ceil(len(lines) / 3) * ROW if len(lines) > 1 else 0
    return _svg(title, f"{y_label} over {x_label}: {', '.join(lines)}", bottom + legend, drawn)


def bar_chart(title: str, bars: Sequence[tuple[str, float, float | None, float | None]], label: str) -> str:
    """One bar a row of (name, value, low, high), whose interval is drawn where low and high are given; an `<svg>`."""
    kept = [bar for bar in bars if _finite(bar[1])]
    left = min(WIDTH // 2, 24 + 7 * max((len(name) for name, *_ in kept), default=0))
    ticks = _ticks([0.0, *(edge for bar in kept for edge in bar[1:] if edge is not None and _finite(edge))])
    bottom = TOP + ROW * max(1, len(kept))

    def at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - RIGHT - 40 - left)

    drawn = [
        f'<path class="grid" d="M{at(x):.1f} {TOP}V{bottom}"/>{_text(at(x), bottom + 16, _figure(x), "middle")}'
        for x in ticks
    ]
    for number, (name, value, low, high) in enumerate(kept):
        middle = TOP + ROW * number + ROW / 2
        start, end = sorted((at(0), at(value)))
        interval = low is not None and high is not None and _finite(low, high)
        told = f"{name}: {value:.1f}" + (f" ({low:.1f} to {high:.1f})" if interval else "")
        drawn.append(
            f'<rect class="s{number % len(COLOURS)}" fill="currentColor" x="{start:.1f}" y="{middle - 8:.1f}" '
            f'width="{end - start:.1f}" height="16"><title>{_safe(told)}</title></rect>'
        )
        if interval:
            assert low is not None and high is not None
            whisker = f"M{at(low):.1f} {middle - 4:.1f}v8m0-4H{at(high):.1f}m0-4v8"
            drawn.append(f'<path class="whisker" stroke-width="1.5" d="{whisker}"/>')
            end = max(end, at(high))
        drawn.append(_text(left - 8, middle + 4, name, "end"))
        drawn.append(_text(end + 6, middle + 4, f"{value:.1f}"))
    drawn.append(f'<path class="axis" d="M{at(0):.1f} {TOP}V{bottom}"/>')
    drawn.append(_text((left + WIDTH) / 2, bottom + 34, label, "middle"))
    told = "; ".join(f"{name} {value:.1f}" for name, value, *_ in kept) or "no data"
    return _svg(title, f"{label}: {told}", bottom + BOTTOM, drawn)


def _svg(title: str, description: str, height: float, drawn: Iterable[str]) -> str:
    head = f'<svg class="regrad-chart" role="img" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
    head += f' aria-label="{_safe(title)}"><title>{_safe(title)}</title><desc>{_safe(description)}</desc>'
    heading = f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{_safe(title)}</text>'
    return f"{head}<style>{STYLE}</style>{heading}{''.join(drawn)}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", transform: str = "") -> str:
    moved = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{moved}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    return escape(visible_line(text))


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers in equal steps of 1, 2 or 5 times a power of ten, from below the least value to above the most."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.4g}"
