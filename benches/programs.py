"""Starts the programs that measure ours, raw and the peers, and makes the images that they need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from workloads import STANDARD

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("BENCH_BUILD", ROOT / "build" / "bench"))
PEERS = ("imago", "qcow2-rs")


def output_of(command):
    """What a command prints; the end of everything where it fails."""
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"failed ({result.returncode}): {' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def has(program):
    return shutil.which(program) is not None


def words(settings):
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


class Folder:
    """Where the files of one medium are."""

    def __init__(self, path, quick):
        self.path, self.quick = Path(path), quick
        self.kind = output_of(["df", "--output=fstype", path]).split()[-1]

    def file(self, name):
        return self.path / name

    def image(self, name):
        """A large image: "empty-1T" has no cluster, "full-1T" all of them (in a file with holes for data)."""
        state, size = name.split("-")
        size = {"1G": "64M", "64G": "1G", "1T": "8G"}[size] if self.quick else size
        path = self.file(f"{state}-{size}.qcow2")
        if not path.exists():
            preallocation = "metadata" if state == "full" else "off"
            output_of(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation}", path, size])
        return path

    def copy(self, image):
        """Another file of the same, holes included."""
        path = self.file("copy.qcow2")
        path.unlink(missing_ok=True)
        output_of(["cp", "--sparse=auto", image, path])
        return path

    def clear(self):
        """Gives back what the last workload needed; the large images stay."""
        for name in ("ours.qcow2", "raw.img", "base.raw", "qemu.qcow2", "peer.qcow2", "copy.qcow2", "compressed.qcow2",
                     "plain.raw"):
            self.file(name).unlink(missing_ok=True)


def run_program(workload, folder, rounds, call=None):
    """The lines of ours and raw (and whatever else the program measures), by side. `call` replaces the workload's."""
    settings = dict(workload.settings)
    if folder.quick:
        settings |= workload.quick_settings()
    target = folder.path
    if workload.image is not None:
        target = folder.image(workload.image)
        target = folder.copy(target) if workload.fresh_image else target
    settings["rounds"] = rounds if workload.rounds is None else min(rounds, workload.rounds)
    if workload.program == "check":
        settings = {"rounds": rounds}
    command = [BUILT / workload.program, call or workload.call, target, *words(settings), *words(workload.options)]
    sides = {}
    for line in output_of(command).splitlines():
        line = json.loads(line)
        sides.setdefault(line["side"], []).append(line)
    return sides


def verify_images(workload, folder):
    """A second opinion on what the program left behind: no error, no leak, and the same bytes as its twin's. (Over a
    backing file the twin holds no more than what was written: there the program's own verification has to do.)"""
    if not has("qemu-img"):
        return
    if workload.is_image_checked:
        ours, raw = folder.file("ours.qcow2"), folder.file("raw.img")
        output_of(["qemu-img", "check", "-q", "-f", "qcow2", ours])
        if not workload.settings.get("backing"):
            output_of(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", ours, raw])
    elif workload.fresh_image:
        output_of(["qemu-img", "check", "-q", "-f", "qcow2", folder.file("copy.qcow2")])


def peer_image(workload, folder):
    """The image for a peer, with standard clusters, because no other kind is known to all: new, or with what raw has."""
    path, settings = folder.file("peer.qcow2"), workload.peer
    options = ["-o", ",".join(words(STANDARD))]
    if settings["call"] == "open":
        return folder.image(workload.image)
    if settings.get("fresh"):
        path.unlink(missing_ok=True)
        size_bytes = (64 << 20) if folder.quick else settings.get("size", 512 << 20)
        output_of(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size_bytes])
    elif not path.exists():
        output_of(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, folder.file("raw.img"), path])
    return path


def run_peer(name, workload, folder):
    """The line of a peer; None where it fails, which is said, and is not our failure."""
    settings = {key: value for key, value in workload.peer.items() if key not in ("call", "fresh")}
    settings["direct"] = workload.settings.get("direct")
    if folder.quick:
        settings |= {"ops": 32, "size": 64 << 20}
    call, image = workload.peer["call"], peer_image(workload, folder)
    if call == "read":
        settings["twin"] = folder.file("raw.img")
    command = [BUILT / "peers", name, call, image, *words(settings)]
    try:
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        print(f"{name} did not come to an end: {' '.join(map(str, command))}", file=sys.stderr)
        return None
    if result.returncode != 0:
        print(f"{name} failed at '{workload.label}': {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])
