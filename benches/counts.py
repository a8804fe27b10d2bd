"""What an operation does: calls of the heap and of the system. Unlike times these are the same each time, and judged."""

import json
import shutil
import subprocess

from programs import BUILT, output_of, words
from table import aligned
from workloads import COUNTED


def system_calls(call, options, folder, ops, is_mapped):
    """System calls of one operation: the difference of a run and of one with twice the operations. Those that allocate
    go all over a disk of full size, so that write-back of tables would show."""
    counts, size = [], ["size_mib=64"] if is_mapped else []
    for factor in (1, 2):
        log = folder.file("strace")
        command = ["strace", "-f", "-c", "-U", "name,calls", "-o", log, BUILT / "driver", call, folder.path, *words(options)]
        output_of([*command, "only=ours", f"ops={ops * factor}", "unverified=1", *size])
        fields = (line.split() for line in log.read_text().splitlines())
        counts.append({f[0]: int(f[1]) for f in fields if len(f) == 2 and f[1].isdigit() and f[0] != "total"})
    names = counts[0].keys() | counts[1].keys()
    per_op = {name: (counts[1].get(name, 0) - counts[0].get(name, 0)) / ops for name in names}
    return {name: n for name, n in sorted(per_op.items()) if abs(n) >= 0.005}


def heap_calls(call, options, folder, ops):
    # The second round: what a cache holds is there by then.
    settings = {"only": "ours", "rounds": 2, "ops": ops, "size_mib": 64}
    command = [BUILT / "driver-heap", call, folder.path, *words(settings), *words(options)]
    return json.loads(output_of(command).splitlines()[-1])["heap_calls"]


def judge(folder):
    """Prints the counts, and returns what is wrong with them. On the mapped path: no call of the heap, and one system
    call. An allocating write has one system call as well (hardly more: the file grows in large steps); tables leave at
    the flush."""
    wrong, rows = [], [["workload", "heap calls", "for each op", "system calls for each op"]]
    has_strace = shutil.which("strace") and subprocess.run(["strace", "-c", "true"], capture_output=True).returncode == 0
    for label, call, options, is_mapped in COUNTED:
        ops = 400 if not is_mapped else 2000 if folder.quick else 100000
        heap = heap_calls(call, options, folder, ops)
        calls = system_calls(call, options, folder, 2000 if is_mapped else 8192, is_mapped) if has_strace else None
        if is_mapped and heap != 0:
            wrong.append(f"{label}: {heap} heap calls in {ops} operations")
        if calls is not None and (list(calls.values()) != [1] if is_mapped else sum(calls.values()) > 1.02):
            wrong.append(f"{label}: not one system call for each operation: {calls}")
        shown = "not counted (no strace)" if calls is None else " ".join(f"{name}={n:.2f}" for name, n in calls.items())
        rows.append([label, f"{heap}/{ops}", f"{heap / ops:.3f}", shown])
    print(aligned(rows), flush=True)
    return wrong
