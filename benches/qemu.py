"""What QEMU's programs need for the same. Each function returns seconds for one operation (and what else is known)."""

import json
import os
import re
import subprocess
import sys
import time

from programs import has, output_of, words

DISCARD_AT_ONCE = 1 << 30  # qemu-io takes less than 2 GiB


def bench(workload, folder):
    """`qemu-img bench` on the image that we left, or on a new one of its own."""
    settings = workload.qemu
    image, count = folder.file("ours.qcow2"), 32 if folder.quick else settings["count"]
    if settings.get("fresh"):
        image = new_image(workload, folder)
    cache = ["-t", "none", "-i", "io_uring"] if settings.get("direct") else ["-t", "writeback"]
    command = ["qemu-img", "bench", "-f", "qcow2", *cache, "-d", settings["depth"], "-c", count]
    command += ["-s", settings["block"], "-S", settings["step"], *(["-w"] if settings.get("write") else [])]
    command += ["--flush-interval", "1"] if settings.get("flush_each") else []
    return {"seconds": run_seconds(output_of([*command, image])) / count}


def run_seconds(output):
    return float(re.search(r"Run completed in ([0-9.]+) seconds", output)[1])


def new_image(workload, folder):
    settings, image = workload.qemu, folder.file("qemu.qcow2")
    image.unlink(missing_ok=True)
    options = ["-o", ",".join(words(workload.options))]
    size_bytes = max(settings["count"] * settings["step"], 1 << 20)
    if settings.get("backing"):
        options += ["-b", folder.file("base.raw"), "-F", "raw"]
        size_bytes = min(size_bytes, folder.file("base.raw").stat().st_size)
    output_of(["qemu-img", "create", "-q", "-f", "qcow2", *options, image, size_bytes])
    return image


def cold(workload, folder):
    """`qemu-img bench` on a disk whose L2 tables are larger than the cache, and the most memory that it had."""
    settings = workload.qemu
    count = 20 if folder.quick else settings["count"]
    command = ["qemu-img", "bench", "-f", "qcow2", "-t", "writeback", "-d", settings["depth"], "-c", count]
    command += ["-s", 4096, "-S", settings["step"], folder.image(workload.image)]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return {"seconds": run_seconds(output) / count, "resident_kib": usage.ru_maxrss}


def qemu_io(commands, image=None):
    """How long a run of qemu-io takes that gets these commands."""
    started = time.monotonic()
    words = ["qemu-io", "-f", "qcow2", str(image)] if image else ["qemu-io"]
    result = subprocess.run(words, input="\n".join([*commands, "quit", ""]), capture_output=True, text=True)
    elapsed = time.monotonic() - started
    if result.returncode != 0 or "rror" in result.stdout + result.stderr or "failed" in result.stdout:
        sys.exit(f"qemu-io failed on {image}: {result.stdout[-400:]}{result.stderr[-400:]}")
    return elapsed


def reopen(workload, folder):
    """Opening and closing many times in one process; starting and ending that is taken off."""
    count = 20 if folder.quick else 1000
    pair = [f"open -o driver=qcow2 {folder.image(workload.image)}", "close"]
    idle = qemu_io([])
    return positive((qemu_io(pair * count) - idle) / count)


def positive(seconds):
    """A difference of two times, unless noise is all that there is to it."""
    return {"seconds": seconds} if seconds > 0 else None


def zeroes(workload, folder):
    """Zeroes over the whole disk, flush and close; opening it is taken off."""
    image = folder.copy(folder.image(workload.image))
    size = virtual_size(image)
    idle = qemu_io([], image)
    return positive(qemu_io([f"write -z -n 0 {size}", "flush"], image) - idle)


def discard(workload, folder):
    """The same with discards: of 1 GiB, because qemu-io takes no more at once."""
    image = folder.copy(folder.image(workload.image))
    step = min(DISCARD_AT_ONCE, virtual_size(image))
    idle = qemu_io([], image)
    commands = [f"discard {offset} {step}" for offset in range(0, virtual_size(image), step)]
    return positive(qemu_io([*commands, "flush"], image) - idle)


def virtual_size(image):
    return json.loads(output_of(["qemu-img", "info", "--output=json", image]))["virtual-size"]


def check(workload, folder):
    started = time.monotonic()
    output_of(["qemu-img", "check", "-q", "-f", "qcow2", folder.image(workload.image)])
    return {"seconds": time.monotonic() - started}


def compressed_read(workload, folder):
    """`qemu-img bench` on the compressed image that the program has left."""
    settings, image = workload.qemu, folder.file("compressed.qcow2")
    count = virtual_size(image) // settings["block"]
    command = ["qemu-img", "bench", "-f", "qcow2", "-t", "writeback", "-d", settings["depth"], "-c", count]
    return {"seconds": run_seconds(output_of([*command, "-s", settings["block"], "-S", settings["block"], image])) / count}


def compressed_write(workload, folder):
    """`qemu-img convert -c` of the same content, with as many coroutines as it takes, out of order."""
    settings, source = workload.qemu, folder.file("plain.raw")
    plain = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder.file("compressed.qcow2"), source]
    output_of(plain)
    options = ["-o", f"compression_type={settings['method']}"]
    started = time.monotonic()
    output_of(["qemu-img", "convert", "-c", "-m", 16, "-W", "-f", "raw", "-O", "qcow2", *options, source, folder.file("qemu.qcow2")])
    return {"seconds": (time.monotonic() - started) / (source.stat().st_size // settings["block"])}


def run(workload, folder):
    """What the line asks QEMU for; None where it asks for nothing, QEMU is not installed, or noise hid its time."""
    if workload.qemu is None or not has("qemu-img") or not has("qemu-io"):
        return None
    functions = {"bench": bench, "cold": cold, "reopen": reopen, "zeroes": zeroes, "discard": discard, "check": check}
    functions |= {"compressed_read": compressed_read, "compressed_write": compressed_write}
    return functions[workload.qemu["does"]](workload, folder)
