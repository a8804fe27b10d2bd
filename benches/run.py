#!/usr/bin/env python3
"""Measures what libqcow2 costs over the raw system calls, and prints tables. See driver.c for what is compared.

    make bench                                    on tmpfs and in the system's folder for temporary files
    make bench BENCH_DIRS="/dev/shm /mnt/disk"    in these folders
    BENCH_QUICK=1 make bench                      whether everything works, in seconds; its times mean nothing

For each workload: medians over the rounds of both sides, the median of the ratios of neighbouring rounds (the sides take
turns) with its quartiles, the same of the threads' processor time (which another program that is busy disturbs less),
and `qemu-img bench` with the same request size where it has such a workload, between our rounds.
What was written is verified by the driver, by `qemu-img check`, and against the raw twin by `qemu-img compare`.
The exit status tells whether everything was right; times do not change it, a missed target is marked in the table.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("BENCH_BUILD", ROOT / "build" / "bench"))
SUBCLUSTERED = {"cluster_size": "128k", "extended_l2": "on"}
STANDARD = {"cluster_size": "64k"}
LARGE = {"cluster_size": "2M", "extended_l2": "on"}
SEQUENTIAL_MISSES = 257 * 4096  # a step of `qemu-img bench` that comes back to a cluster late
TARGET = 1.15


class Workload:
    def __init__(self, name, qemu=None, options=SUBCLUSTERED, mapped=False):
        self.name, self.qemu, self.options, self.mapped = name, qemu, options, mapped
        self.program, self.call, self.settings = "driver", name, {}

    def label(self):
        return self.name + (" (standard)" if self.options is STANDARD else " (2 MiB)" if self.options is LARGE else "")

    def fits(self, kind):
        """Whether it says something about a file system. (Without the page cache there is nothing left of tmpfs.)"""
        return kind != "tmpfs" or not self.settings.get("direct")


class QueueWorkload(Workload):
    """`depth` requests of 4 KiB in flight, ours through a queue, raw through a ring: see queue.c."""

    def __init__(self, call, depth, qemu=None, options=SUBCLUSTERED, **settings):
        words = ["queue", call, "4k", f"d{depth}", *(key for key in settings if settings[key] == 1)]
        super().__init__("-".join(words), qemu, options)
        self.program, self.call, self.settings = "queue", call, {"depth": depth, **settings}


def qemu(block, count, step, write=False, fresh=False, depth=1, direct=False):
    return {"block": block, "count": count, "step": step, "write": write, "fresh": fresh, "depth": depth, "direct": direct}


WORKLOADS = [
    Workload("read-4k", qemu(4096, 50000, SEQUENTIAL_MISSES), mapped=True),
    Workload("read-4k", options=STANDARD, mapped=True),
    Workload("read-4k-2-threads", mapped=True),
    Workload("overwrite-4k", qemu(4096, 50000, SEQUENTIAL_MISSES, write=True), mapped=True),
    Workload("overwrite-4k", options=STANDARD, mapped=True),
    Workload("overwrite-4k-2-threads", mapped=True),
    Workload("allocate-4k", qemu(4096, 16384, 128 << 10, write=True, fresh=True)),
    Workload("allocate-4k-flush-each"),
    Workload("read-seq-64k", qemu(65536, 8192, 65536)),
    Workload("read-seq-1m", qemu(1 << 20, 512, 1 << 20)),
    Workload("write-seq-64k", qemu(65536, 8192, 65536, write=True, fresh=True)),
    Workload("write-seq-1m", qemu(1 << 20, 512, 1 << 20, write=True, fresh=True)),
    Workload("open-close"),
    QueueWorkload("read", 1, qemu(4096, 50000, SEQUENTIAL_MISSES)),
    QueueWorkload("read", 32, qemu(4096, 50000, SEQUENTIAL_MISSES, depth=32)),
    QueueWorkload("overwrite", 32, qemu(4096, 50000, SEQUENTIAL_MISSES, write=True, depth=32)),
    QueueWorkload("allocate", 1, qemu(4096, 16384, 128 << 10, write=True, fresh=True), ops=16384, size_mib=2048),
    QueueWorkload("allocate", 32, qemu(4096, 16384, 128 << 10, write=True, fresh=True, depth=32), ops=16384, size_mib=2048),
    QueueWorkload("allocate", 32, options=LARGE, ops=1024, size_mib=2048),
    QueueWorkload("allocate", 1, backing=1, ops=4096),
    QueueWorkload("allocate", 32, backing=1, ops=4096),
    QueueWorkload("read", 1, qemu(4096, 20000, SEQUENTIAL_MISSES, direct=True), direct=1, ops=20000),
    QueueWorkload("read", 32, qemu(4096, 50000, SEQUENTIAL_MISSES, depth=32, direct=True), direct=1),
    QueueWorkload("overwrite", 32, qemu(4096, 50000, SEQUENTIAL_MISSES, write=True, depth=32, direct=True), direct=1),
    QueueWorkload("allocate", 1, direct=1, ops=4096, size_mib=512),
    QueueWorkload("allocate", 32, direct=1, ops=16384, size_mib=2048),
]


def output_of(command):
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"failed ({result.returncode}): {' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def driver(program, workload, folder, **settings):
    """The driver's lines. Keys of `settings` are the driver's own; None leaves its default."""
    given = {key: value for key, value in settings.items() if value is not None}
    words = [f"{key}={value}" for key, value in {**workload.settings, **given, **workload.options}.items()]
    lines = output_of([BUILT / program, workload.call, folder, *words]).splitlines()
    return [json.loads(line) for line in lines]


def verify_images(folder):
    """A second opinion on what the driver left behind: no error, no leak, and the same bytes as its twin's."""
    if shutil.which("qemu-img"):
        output_of(["qemu-img", "check", "-q", "-f", "qcow2", folder / "ours.qcow2"])
        output_of(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", folder / "ours.qcow2", folder / "raw.img"])


def qemu_seconds_per_op(workload, folder, quick):
    """`qemu-img bench` on the image that we left, or on a new one of its own."""
    settings = workload.qemu
    if settings is None or not shutil.which("qemu-img"):
        return None
    image, count = folder / "ours.qcow2", 100 if quick else settings["count"]
    if settings["fresh"]:
        image = folder / "qemu.qcow2"
        image.unlink(missing_ok=True)
        options = ",".join(f"{key}={value}" for key, value in workload.options.items())
        size_bytes = max(settings["count"] * settings["step"], 1 << 20)
        output_of(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, size_bytes])
    cache = ["-t", "none", "-i", "io_uring"] if settings["direct"] else ["-t", "writeback"]
    command = ["qemu-img", "bench", "-f", "qcow2", *cache, "-d", settings["depth"], "-c", count]
    command += ["-s", settings["block"], "-S", settings["step"], *(["-w"] if settings["write"] else []), image]
    seconds = re.search(r"Run completed in ([0-9.]+) seconds", output_of(command))
    return float(seconds[1]) / count


class Measurement:
    def __init__(self, workload):
        self.workload = workload
        self.rounds = {"ours": [], "raw": []}
        self.qemu = []

    def take(self, folder, quick, chunks, rounds, ops):
        for _ in range(chunks):
            size_mib = 64 if quick else None
            for line in driver(self.workload.program, self.workload, folder, rounds=rounds, ops=ops, size_mib=size_mib):
                self.rounds[line["side"]].append(line)
            if self.workload.name != "open-close":
                verify_images(folder)
            seconds = qemu_seconds_per_op(self.workload, folder, quick)
            if seconds is not None:
                self.qemu.append(seconds)

    def per_op(self, side, key="seconds"):
        return statistics.median(line[key] / line["ops"] for line in self.rounds[side])

    def ratios(self, *keys):
        def total(line):
            return sum(line[key] for key in keys)

        return [total(ours) / total(raw) for ours, raw in zip(self.rounds["ours"], self.rounds["raw"])]

    def row(self, has_target):
        ratios = sorted(self.ratios("seconds"))
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        ratio = statistics.median(ratios)
        verdict = ""
        if self.workload.mapped and has_target:
            verdict = "ok" if ratio <= TARGET else f"ABOVE {TARGET}"
        flushed = flush_ms = ""
        if any(line["flush_seconds"] for line in self.rounds["raw"]):
            flushed = f"{statistics.median(self.ratios('seconds', 'flush_seconds')):.2f}"
            flush_ms = f"{statistics.median(line['flush_seconds'] for line in self.rounds['ours']) * 1e3:.1f}"
        quicker = f"{statistics.median(self.qemu) * 1e6:.2f}" if self.qemu else ""
        bytes_per_op = self.rounds["ours"][0]["bytes"] / self.rounds["ours"][0]["ops"]
        return [
            self.workload.label(),
            f"{self.per_op('ours') * 1e6:.2f}",
            f"{self.per_op('raw') * 1e6:.2f}",
            f"{ratio:.3f}",
            f"{low:.2f}..{high:.2f}",
            f"{statistics.median(self.ratios('cpu_seconds')):.3f}",
            flush_ms,
            flushed,
            f"{bytes_per_op / self.per_op('ours') / (1 << 20):.0f}",
            quicker,
            verdict,
        ]


HEADINGS = ["workload", "ours us", "raw us", "ratio", "quartiles", "cpu ratio"]
HEADINGS += ["flush ms", "w/flush", "MiB/s", "qemu us", "target"]


def print_table(headings, rows):
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for row in [headings, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())
    print(flush=True)


def system_calls(workload, folder, ops):
    """System calls of one operation: the difference of a run and of one with twice the operations. Those that allocate
    go all over a disk of full size, so that write-back of tables would show."""
    counts, size = [], ["size_mib=64"] if workload.mapped else []
    for factor in (1, 2):
        log = folder / "strace"
        command = ["strace", "-f", "-c", "-U", "name,calls", "-o", log, BUILT / "driver", workload.name, folder]
        options = [f"{key}={value}" for key, value in workload.options.items()]
        output_of([*command, "only=ours", f"ops={ops * factor}", "unverified=1", *options, *size])
        fields = (line.split() for line in log.read_text().splitlines())
        counts.append({f[0]: int(f[1]) for f in fields if len(f) == 2 and f[1].isdigit() and f[0] != "total"})
    names = counts[0].keys() | counts[1].keys()
    per_op = {name: (counts[1].get(name, 0) - counts[0].get(name, 0)) / ops for name in names}
    return {name: n for name, n in sorted(per_op.items()) if abs(n) >= 0.005}


def check_what_an_operation_does(folder, quick):
    """Heap and system calls of an operation. On the mapped path: no call of the heap, and one system call. An allocating
    write has one system call as well (hardly more: the file grows in large steps); tables leave at the flush."""
    wrong, rows = [], []
    has_strace = shutil.which("strace") and subprocess.run(["strace", "-c", "true"], capture_output=True).returncode == 0
    for workload in [w for w in WORKLOADS if w.mapped or w.name == "allocate-4k"]:
        ops = 400 if not workload.mapped else 2000 if quick else 100000
        # The second round: what a cache holds is there by then.
        lines = driver("driver-heap", workload, folder, only="ours", rounds=2, ops=ops, size_mib=64)
        heap = lines[-1]["heap_calls"]
        calls = system_calls(workload, folder, 2000 if workload.mapped else 8192) if has_strace else None
        if workload.mapped and heap != 0:
            wrong.append(f"{workload.label()}: {heap} heap calls in {ops} operations")
        if calls is not None and (list(calls.values()) != [1] if workload.mapped else sum(calls.values()) > 1.02):
            wrong.append(f"{workload.label()}: not one system call for each operation: {calls}")
        shown = "not counted (no strace)" if calls is None else " ".join(f"{name}={n:.2f}" for name, n in calls.items())
        rows.append([workload.label(), f"{heap}/{ops}", f"{heap / ops:.3f}", shown])
    print_table(["workload", "heap calls", "for each op", "system calls for each op"], rows)
    return wrong


def file_system(folder):
    return output_of(["stat", "-f", "-c", "%T", folder]).strip()


def measure(base, is_first, options):
    """All workloads in a folder of their own below `base`; returns the rounds, and what was wrong."""
    with tempfile.TemporaryDirectory(prefix="qcow2-bench-", dir=base) as name:
        folder, rows, kept = Path(name), [], []
        kind = file_system(folder)
        print(f"{base} ({kind}), microseconds for each operation; target: a mapped 4 KiB operation on tmpfs <= {TARGET}\n")
        for workload in WORKLOADS:
            if not workload.fits(kind) or options.only and not re.search(options.only, workload.label()):
                continue
            measurement = Measurement(workload)
            slow = workload.name == "allocate-4k-flush-each" and kind != "tmpfs"
            ops = 50 if options.quick else 100 if slow else None
            measurement.take(folder, options.quick, options.chunks, options.rounds, ops)
            rows.append(measurement.row(kind == "tmpfs" and not options.quick))
            kept.append({"folder": kind, "workload": workload.label(), "rounds": measurement.rounds, "qemu": measurement.qemu})
            if sys.stderr.isatty():
                print(f"  {workload.label()} done", file=sys.stderr, flush=True)
        print_table(HEADINGS, rows)
        wrong = check_what_an_operation_does(folder, options.quick) if is_first and not options.only else []
        return kept, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="default: /dev/shm, and the folder for temporary files")
    parser.add_argument("--quick", action="store_true", default=os.environ.get("BENCH_QUICK", "") not in ("", "0"))
    parser.add_argument("--chunks", type=int, help="runs of the driver for each workload, `qemu-img bench` in between")
    parser.add_argument("--rounds", type=int, help="pairs of rounds in a run of the driver")
    parser.add_argument("--only", help="workloads that this regular expression finds")
    parser.add_argument("--json", help="write every single round to this file")
    parser.add_argument("--no-build", action="store_true", help="the driver is built already")
    options = parser.parse_args()
    options.chunks = options.chunks or (1 if options.quick else 5)
    options.rounds = options.rounds or (2 if options.quick else 3)
    if not options.no_build:
        subprocess.run(["make", "-s", "-C", str(ROOT), "bench-driver"], check=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    folders = options.folders or ([memory] if options.quick else [memory, tempfile.gettempdir()])
    rounds, wrong = [], []
    for folder in folders:
        kept, faults = measure(folder, folder == folders[0], options)
        rounds += kept
        wrong += faults
    if options.json:
        Path(options.json).write_text(json.dumps(rounds, indent=1))
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
