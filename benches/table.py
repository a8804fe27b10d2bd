"""From rounds to ratios, verdicts and a table, as text or Markdown."""

import datetime
import os
import platform
import statistics
import subprocess
from pathlib import Path

from programs import PEERS, has
from workloads import MEMORY

MET, MISSED = "ok", "MISSED"


class Measurement:
    """All that was measured for a line: runs of a few rounds, in each of which the sides took turns, QEMU and the peers
    between them."""

    def __init__(self, workload, kind):
        self.workload, self.kind = workload, kind
        self.runs = []  # of each: {"ours": [line...], "raw": [line...], "qemu": {"seconds": ...}, "imago": line, ...}

    def pairs(self):
        """Neighbouring rounds of ours and raw."""
        return [pair for run in self.runs for pair in zip(run["ours"], run.get("raw", []))]

    def per_op(self, side):
        """The median of the seconds for each operation; None if this side was not measured."""
        times = [line["seconds"] / line["ops"] for run in self.runs for line in lines_of(run, side)]
        return statistics.median(times) if times else None

    def speeds_of_raw(self):
        """Ours, where raw is 1."""
        return [raw["seconds"] / ours["seconds"] for ours, raw in self.pairs()]

    def speeds_by_cpu(self):
        """The same by the processor time of the threads, which other programs that are busy disturb less."""
        return [raw["cpu_seconds"] / ours["cpu_seconds"] for ours, raw in self.pairs()]

    def speeds_with_flush(self):
        """The same with the flush behind each round."""
        if not any(raw["flush_seconds"] for _, raw in self.pairs()):
            return []
        return [total(raw) / total(ours) for ours, raw in self.pairs()]

    def speeds_over(self, side, than="ours"):
        """How many times as fast as `side` is `than`: one for each run."""
        measured = [run for run in self.runs if lines_of(run, side) and lines_of(run, than)]
        return [median_per_op(run, side) / median_per_op(run, than) for run in measured]

    def resident_kib(self):
        """The most memory of ours and of QEMU; None where it was not asked for."""
        ours = [line.get("resident_kib") for run in self.runs for line in run["ours"]]
        qemu = [run["qemu"].get("resident_kib") for run in self.runs if run.get("qemu")]
        return (max(ours), max(qemu)) if ours and qemu and None not in ours + qemu else None


def lines_of(run, side):
    lines = run.get(side)
    lines = lines if isinstance(lines, list) else [lines] if lines else []
    return [{"ops": 1, **line} for line in lines]


def median_per_op(run, side):
    return statistics.median(line["seconds"] / line["ops"] for line in lines_of(run, side))


def total(line):
    return line["seconds"] + line["flush_seconds"]


def duration(seconds):
    """Three digits and a unit."""
    for unit, factor in (("us", 1e6), ("ms", 1e3), ("s", 1)):
        if seconds * factor < 1000 or unit == "s":
            return f"{number(seconds * factor)} {unit}"


def number(value):
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def spread(values):
    """The median, and the quartiles around it."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{number(statistics.median(values))} ({number(low)}..{number(high)})"


def verdict(values, target):
    """Whether the median reaches the target; a half of the last digit that is shown is let through."""
    if target is None or not values:
        return ""
    return f">= {target:,.4g} {MET if statistics.median(values) >= target - 0.005 else MISSED}"


HEADINGS = ["workload", "on", "ours", "speed, raw = 1", "target", "by cpu", "with flush", "speed, QEMU = 1", "target", *PEERS]


def row(measurement):
    workload = measurement.workload
    raw, qemu = measurement.speeds_of_raw(), measurement.speeds_over("qemu")
    flushed = measurement.speeds_with_flush()
    cells = [workload.label, measurement.kind, duration(measurement.per_op("ours"))]
    cells += [spread(raw) if raw else "", verdict(raw, workload.raw_target)]
    cells += [number(statistics.median(values)) if values else "" for values in (measurement.speeds_by_cpu(), flushed)]
    cells += [spread(qemu) if qemu else "", verdict(qemu, workload.qemu_target)]
    for peer in PEERS:
        speeds = measurement.speeds_over("raw", peer)
        cells.append(number(statistics.median(speeds)) if speeds else "-")
    return cells


def remarks(measurement):
    """What does not fit into columns."""
    workload, lines = measurement.workload, []
    if workload.alone is not None:
        ours, raw = measurement.speeds_over("ours-alone"), measurement.speeds_over("raw-alone", "raw")
        lines.append(f"{workload.label}: {spread(ours)} times one thread (raw {spread(raw)}); {verdict(ours, 1.9)}")
    memory = measurement.resident_kib()
    if memory is not None:
        ours, qemu = (kib / 1024 for kib in memory)
        lines.append(f"{workload.label}: at most {ours:.1f} MiB resident, QEMU {qemu:.1f} MiB; "
                     f"{MET if ours <= qemu else MISSED}")
    return lines


FOOTNOTES = """\
Medians (quartiles) of the ratios of neighbouring rounds: the sides take turns. Operations are of 4 KiB unless said, one
at a time by the blocking calls unless said. "ours" is the time of one. Speeds are those of ours where the raw file, used
by the same system calls, is 1, and where QEMU (qemu-img bench, qemu-io, qemu-img check) is 1; for the peers
({peers}) their speed where raw is 1. A flush is no part of the time unless said, as in qemu-img bench; "with flush" is the speed
where raw is 1 and both end in one flush, "by cpu" counts the processor time of our threads instead of the clock's.
Over a backing file raw is the least that copying on write does: reading the subcluster from it (where that is larger
than the block), and writing it into an empty file. Where ours has 2 threads, so has raw. "open and close": raw opens,
reads 4 KiB, closes. "check": raw is a minimal pass over the same metadata in C. Images have subclusters (extended_l2) of
128 KiB clusters unless said; the peers know none and get standard clusters of 64 KiB. imago makes blocking calls inside
of its asynchronous ones: its depth is 1 always. qcow2-rs runs on tokio-uring where the depth is not 1."""


def footnotes(missing):
    text = FOOTNOTES.format(peers=" and ".join(PEERS))
    return text + "".join(f"\nNot to be had here: {what}." for what in missing)


def machine():
    """What the figures come from, in one line."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    qemu = "not installed"
    if has("qemu-img"):
        words = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True).stdout.split()
        qemu = words[2]
    return f"{datetime.date.today()}, {os.cpu_count()} cores of {model}, Linux {platform.release()}, QEMU {qemu}"


def load():
    return f"{os.getloadavg()[0]:.1f}"


def busy(loads):
    """A warning, where others used the machine meanwhile."""
    return f"Load before and after: {loads[0]}, {loads[1]}" + (
        ": others were busy on this machine, and times are noisy." if float(loads[0]) > 0.7 else ".")


def aligned(rows):
    """Rows as text; the first is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for cells in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        shown = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        lines.append("  ".join(shown).rstrip())
    return "\n".join(lines) + "\n"


def text(measurements, missing, loads, has_verdicts):
    rows = [HEADINGS, *(row(m) for m in measurements)]
    if not has_verdicts:
        rows = [[cell for column, cell in enumerate(cells) if HEADINGS[column] != "target"] for cells in rows]
    notes = ["BENCH_QUICK: times mean nothing."]
    if has_verdicts:
        notes = [line for m in measurements for line in remarks(m)]
    return "\n".join([aligned(rows), *notes, "", footnotes(missing), f"{machine()}. {busy(loads)}\n"])


def markdown(measurements, missing, loads):
    """The same for the README."""
    def line(cells):
        return "| " + " | ".join(cells) + " |"

    rows = [line(HEADINGS), line(["---"] * len(HEADINGS))]
    for m in measurements:
        cells = [cell.replace(">=", "≥").replace(f" {MET}", " ✓").replace(f" {MISSED}", " ✗") for cell in row(m)]
        cells[1] = "tmpfs" if m.workload.medium == MEMORY and m.kind == "tmpfs" else cells[1]
        rows.append(line(cells))
    notes = "".join(f"- {remark}\n" for m in measurements for remark in remarks(m))
    command = f"`make bench`, {machine()}. {busy(loads)}\n"
    return f"{command}\n" + "\n".join(rows) + f"\n\n{notes}\n{footnotes(missing)}\n"


def as_data(measurements):
    """For --json: every round, and what became of it."""
    return [{"workload": m.workload.label, "folder": m.kind, "cells": row(m), "runs": m.runs,
             "targets": {"raw": m.workload.raw_target, "qemu": m.workload.qemu_target}} for m in measurements]
