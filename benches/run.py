#!/usr/bin/env python3
"""Measures what libqcow2 costs over the raw system calls, and beside QEMU and other libraries, and prints one table.

    make bench                                  on tmpfs, and in the system's folder for temporary files
    make bench BENCH_DIRS="/dev/shm /mnt/disk"  in these: memory first, then a disk whose files can be opened with O_DIRECT
    make bench PLOT=1                           and build/bench/table.svg
    make bench BENCH_ARGS="--only open"         some lines; --json and --markdown write files
    BENCH_QUICK=1 make bench                    whether everything works, in seconds; its times mean nothing

workloads.py has the lines and their targets. What ours writes is verified by the program that wrote it, by `qemu-img
check`, and against the raw twin by `qemu-img compare`. The exit status tells whether everything was right; times do not
change it, a missed target is marked in the table.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import counts
import picture
import qemu
import table
from programs import BUILT, PEERS, ROOT, Folder, has, run_peer, run_program, verify_images
from workloads import DISK, MEMORY, WORKLOADS


def is_possible(workload):
    """Whether what it needs is there. (What is missing is said below the table.)"""
    return (BUILT / workload.program).exists() and (workload.image is None or has("qemu-img"))


def measure(workload, folder, runs, rounds, has_peers):
    measurement = table.Measurement(workload, folder.kind)
    for _ in range(runs):
        run = run_program(workload, folder, rounds)
        verify_images(workload, folder)
        if workload.alone is not None:
            alone = run_program(workload, folder, rounds, call=workload.alone)
            run |= {f"{side}-alone": lines for side, lines in alone.items()}
        theirs = qemu.run(workload, folder)
        if theirs is not None:
            run["qemu"] = theirs
        for name in PEERS if has_peers and workload.peer is not None else ():
            line = run_peer(name, workload, folder)
            if line is not None:
                run[name] = line
        measurement.runs.append(run)
    folder.clear()
    return measurement


def measure_all(folders, options):
    has_peers = not options.quick and (BUILT / "peers").exists()
    wanted = [w for w in WORKLOADS if is_possible(w) and (not options.only or re.search(options.only, w.label))]
    measurements, is_whole = [], False
    try:
        for workload in wanted:
            started = time.monotonic()
            measurements.append(measure(workload, folders[workload.medium], options.runs, options.rounds, has_peers))
            if not options.quick:
                print(f"  {workload.label}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        is_whole = True
    except KeyboardInterrupt:
        print(f"interrupted: {len(measurements)} of {len(wanted)} lines were measured", file=sys.stderr)
    return measurements, is_whole


def interrupt(*_):
    raise KeyboardInterrupt


def missing(options):
    """What the table lacks, and why."""
    found = [] if has("qemu-img") and has("qemu-io") else ["qemu-img and qemu-io (and the images that they make)"]
    if not options.quick and not (BUILT / "peers").exists():
        found.append(f"{' and '.join(PEERS)} (benches/peers could not be built)")
    return found + sorted({f"benches/{w.program}.c" for w in WORKLOADS if not (BUILT / w.program).exists()})


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="memory, disk (default: /dev/shm, and the folder for temporary files)")
    parser.add_argument("--quick", action="store_true", default=os.environ.get("BENCH_QUICK", "") not in ("", "0"))
    parser.add_argument("--runs", type=int, help="runs of the programs for each line, QEMU and the peers in between")
    parser.add_argument("--rounds", type=int, help="pairs of rounds of ours and raw in a run")
    parser.add_argument("--only", help="lines that this regular expression finds")
    parser.add_argument("--json", help="write every single round to this file")
    parser.add_argument("--markdown", help="write the table to this file, for the README")
    parser.add_argument("--plot", help="draw the table into this file, an SVG")
    parser.add_argument("--no-build", action="store_true", help="the programs are built already")
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else 5)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, interrupt)  # what was measured until then is shown, and the folders are removed
    if not options.no_build:
        targets = ["bench-driver"] if options.quick else ["bench-driver", "bench-peers"]
        subprocess.run(["make", "-s", "-C", str(ROOT), *targets], check=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    bases = (options.folders + [memory, tempfile.gettempdir()][len(options.folders):])[:2]
    loads = [table.load()]
    with (tempfile.TemporaryDirectory(prefix="qcow2-bench-", dir=bases[0]) as in_memory,
          tempfile.TemporaryDirectory(prefix="qcow2-bench-", dir=bases[1]) as on_disk):
        folders = {MEMORY: Folder(in_memory, options.quick), DISK: Folder(on_disk, options.quick)}
        measurements, is_whole = measure_all(folders, options)
        loads.append(table.load())
        print(table.text(measurements, missing(options), loads, has_verdicts=not options.quick), flush=True)
        wrong = counts.judge(folders[MEMORY]) if is_whole and not options.only else []
    if options.json:
        Path(options.json).write_text(json.dumps(table.as_data(measurements), indent=1))
    if options.markdown:
        Path(options.markdown).write_text(table.markdown(measurements, missing(options), loads))
    if options.plot:
        Path(options.plot).write_text(picture.draw(measurements, table.machine()))
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0 if is_whole else 130


if __name__ == "__main__":
    sys.exit(main())
