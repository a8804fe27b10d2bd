"""The table as a picture, an SVG: for each line the speeds of ours, QEMU and the peers, the raw file being 1."""

import math
import statistics
from html import escape

from programs import PEERS

LEFT, WIDTH, LINE, TOP = 470, 560, 22, 70
LOW, HIGH = 0.005, 20
COLOURS = {"ours": "#c0392b", "qemu": "#2c3e50", "imago": "#2980b9", "qcow2-rs": "#27ae60"}
NAMES = {"ours": "libqcow2", "qemu": "QEMU"}


def position(speed):
    """Where a speed is on the axis, which is logarithmic."""
    share = (math.log10(speed) - math.log10(LOW)) / (math.log10(HIGH) - math.log10(LOW))
    return LEFT + WIDTH * min(max(share, 0), 1)


def speeds(measurement):
    """Each side's median speed, where raw is 1."""
    found = {}
    for side in ("ours", "qemu", *PEERS):
        values = measurement.speeds_over("raw", side)
        if values:
            found[side] = statistics.median(values)
    return found


def text(x, y, words, anchor="start", size=12):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def mark(side, x, y):
    """A dot, with a shape of its own for those who cannot tell colours apart."""
    colour = COLOURS[side]
    if side == "ours":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    if side == "qemu":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    up = -5 if side == "imago" else 5
    points = f"{x:.1f},{y + up:.1f} {x - 5:.1f},{y - up * 0.8:.1f} {x + 5:.1f},{y - up * 0.8:.1f}"
    return f'<polygon points="{points}" fill="{colour}"/>'


def draw(measurements, caption):
    shown = [m for m in measurements if m.speeds_of_raw()]
    bottom = TOP + LINE * len(shown)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 40}" height="{bottom + 50}" '
             'font-family="sans-serif">', f'<rect width="100%" height="100%" fill="white"/>']
    parts.append(text(10, 22, "Speed, the raw file being 1 (to the right is faster; the axis is logarithmic)", size=15))
    for i, side in enumerate(COLOURS):
        x = LEFT + i * 120
        parts += [mark(side, x, 42), text(x + 10, 46, NAMES.get(side, side))]
    parts.append(text(LEFT + len(COLOURS) * 120 + 10, 46, "| target"))
    for exponent in range(round(math.log10(LOW)), round(math.log10(HIGH)) + 1):
        x, is_raw = position(10**exponent), exponent == 0
        stroke = 'stroke="#555" stroke-width="1.5"' if is_raw else 'stroke="#ddd"'
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 8}" x2="{x:.1f}" y2="{bottom}" {stroke}/>')
        parts.append(text(x, bottom + 16, "raw" if is_raw else f"{10.0**exponent:g}", "middle"))
    for i, m in enumerate(shown):
        y = TOP + LINE * i + LINE / 2
        parts.append(text(LEFT - 12, y + 4, f"{m.workload.label} ({m.kind})", "end"))
        found = speeds(m)
        if m.workload.raw_target:
            x = position(m.workload.raw_target)
            parts.append(f'<line x1="{x:.1f}" y1="{y - 8}" x2="{x:.1f}" y2="{y + 8}" stroke="{COLOURS["ours"]}"/>')
        parts += [mark(side, position(speed), y) for side, speed in reversed(found.items())]
    parts.append(text(10, bottom + 40, caption))
    return "\n".join([*parts, "</svg>", ""])
