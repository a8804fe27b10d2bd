"""The lines of the table: what is measured, on what, against whom, and what it should reach."""

from dataclasses import dataclass, field

SUBCLUSTERED = {"cluster_size": "128k", "extended_l2": "on"}
LARGE = {"cluster_size": "2M", "extended_l2": "on"}
STANDARD = {"cluster_size": "64k"}

MEMORY, DISK = "memory", "disk"
KIB, MIB = 1 << 10, 1 << 20
SEQUENTIAL_MISSES = 257 * 4096  # a step of `qemu-img bench` that comes back to a cluster late
# Odd multiples of what an L2 slice of 4 KiB maps (32 MiB): each read needs another slice, until all had their turn.
SLICE_STEP = 61 * (32 << 20) + 4096


@dataclass
class Workload:
    """A line. `program` and `call` are what measures ours and raw; `settings` go to it, `options` to qcow2_create."""

    label: str
    program: str
    call: str
    medium: str = MEMORY
    settings: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    qemu: dict | None = None  # what qemu.py does: "does" names the function, the rest is its own
    peer: dict | None = None  # settings of benches/peers
    raw_target: float | None = None  # least speed, raw being 1
    qemu_target: float | None = None  # least speed, QEMU being 1
    image: str | None = None  # of large.c and check.c: see images.py
    fresh_image: bool = False  # another copy of it for each run
    rounds: int | None = None  # pairs in a run of the program, where the default is too much
    alone: str | None = None  # the same call with one thread, for what a second thread adds

    @property
    def is_image_checked(self):
        """Whether the program leaves ours.qcow2 behind, and next to it what `qemu-img compare` compares it with."""
        return self.program in ("driver", "queue")

    def quick_settings(self):
        """Small enough for a test of function: every step is taken, times mean nothing."""
        if self.program == "large":
            return {key: 20 for key in self.settings if key == "ops"}
        if self.program == "compressed":
            return {"size_mib": 16}
        return {"size_mib": 64, "ops": 32} if self.is_image_checked else {}


def bench(depth=1, block=4096, count=50000, step=SEQUENTIAL_MISSES, **more):
    """`qemu-img bench`."""
    return {"does": "bench", "depth": depth, "block": block, "count": count, "step": step, **more}


def peer(call, ops=50000, **settings):
    """benches/peers."""
    return {"call": call, "ops": ops, **settings}


def allocating(label, depth, options, raw_target, qemu_target, ops=16384, size_mib=2048, scatter=128 * KIB, medium=MEMORY,
               has_peers=False, **settings):
    """4 KiB into each cluster of a new disk, through a queue."""
    given = {"depth": depth, "ops": ops, "size_mib": size_mib, "scatter": scatter, **settings}
    direct = bool(settings.get("direct"))
    backing = bool(settings.get("backing"))
    theirs = bench(depth, count=ops, step=scatter, write=True, fresh=True, direct=direct, backing=backing)
    others = peer("write", order="once", fresh=True, depth=depth, ops=ops, size=size_mib * MIB) if has_peers else None
    return Workload(label, "queue", "allocate", medium, given, options, theirs, others, raw_target, qemu_target)


def sequential(medium):
    """64 KiB and 1 MiB, one call after the other."""
    settings = {"direct": 1} if medium == DISK else {}
    where = ", O_DIRECT" if medium == DISK else ""
    for word, block, count in (("64k", 64 * KIB, 8192), ("1m", MIB, 512)):
        shown = "64 KiB" if word == "64k" else "1 MiB"
        theirs = {"depth": 1, "block": block, "count": count, "step": block, "direct": medium == DISK}
        others = {"order": "sequential", "block": block, "ops": count}
        for call, what, write, fresh in (("read-seq", "read", False, False), ("overwrite-seq", "overwrite", True, False),
                                         ("allocate-seq", "allocating write", True, True)):
            yield Workload(f"sequential {what}, {shown}{where}", "driver", f"{call}-{word}", medium, settings, SUBCLUSTERED,
                           bench(**theirs, write=write, fresh=fresh),
                           peer("write" if write else "read", fresh=fresh, **others), raw_target=0.95, qemu_target=1.0)


def in_place_in_memory():
    read, write = bench(), bench(write=True)
    one, two = {"ops": 100000}, {"ops": 200000}
    yield Workload("random read", "driver", "read-4k", settings=one, options=SUBCLUSTERED, qemu=read, peer=peer("read"),
                   raw_target=0.95, qemu_target=25)
    yield Workload("random read, 2 threads", "driver", "read-4k-2-threads", settings=two, options=SUBCLUSTERED,
                   raw_target=0.95, alone="read-4k")
    yield Workload("random read, queue, depth 32", "queue", "read", settings={"depth": 32}, options=SUBCLUSTERED,
                   qemu=bench(32), peer=peer("read", depth=32), raw_target=1.0, qemu_target=5)
    yield Workload("random overwrite", "driver", "overwrite-4k", settings=one, options=SUBCLUSTERED, qemu=write,
                   peer=peer("write"), raw_target=0.95, qemu_target=25)
    yield Workload("random overwrite, 2 threads", "driver", "overwrite-4k-2-threads", settings=two, options=SUBCLUSTERED)
    yield Workload("random overwrite, queue, depth 32", "queue", "overwrite", settings={"depth": 32}, options=SUBCLUSTERED,
                   qemu=bench(32, write=True), peer=peer("write", depth=32), raw_target=1.0, qemu_target=5)


def allocating_in_memory():
    once = bench(count=16384, step=128 * KIB, write=True, fresh=True)
    yield Workload("allocating write, 128 KiB clusters", "driver", "allocate-4k", options=SUBCLUSTERED, qemu=once,
                   peer=peer("write", order="once", fresh=True, ops=16384, size=2048 * MIB), raw_target=0.85, qemu_target=15)
    yield allocating("allocating write, 128 KiB clusters, queue, depth 32", 32, SUBCLUSTERED, 0.85, 2.5, has_peers=True)
    yield allocating("allocating write, 2 MiB clusters, queue, depth 32", 32, LARGE, 0.7, 10, ops=1024, scatter=2 * MIB)
    for depth, qemu_target in ((1, 5), (32, 1.4)):
        yield allocating(f"the same over a backing file, 128 KiB clusters, queue, depth {depth}", depth, SUBCLUSTERED, 0.8,
                         qemu_target, ops=4096, size_mib=512, backing=1)
    yield allocating("the same over a backing file, 2 MiB clusters, queue, depth 32", 32, LARGE, 0.7, 4, ops=1024,
                     scatter=2 * MIB, backing=1, copied=64 * KIB)


def large_disks():
    reopen = {"does": "reopen"}
    for what, image in (("1 GiB", "empty-1G"), ("1 TiB", "empty-1T"), ("1 TiB, 16 M clusters", "full-1T")):
        yield Workload(f"open and close, {what}", "large", "open", settings={"ops": 200}, qemu=reopen,
                       peer=peer("open", ops=50), raw_target=0.4, qemu_target=30, image=image)
    cold = {"does": "cold", "depth": 32, "count": 50000, "step": SLICE_STEP}
    yield Workload("random read with a cold map, 1 TiB, 16 M clusters, queue, depth 32", "large", "cold", qemu=cold,
                   settings={"depth": 32, "ops": 50000, "step": SLICE_STEP}, qemu_target=3, image="full-1T", rounds=1)
    yield Workload("zeroes over an empty 1 TiB", "large", "zeroes", qemu={"does": "zeroes"}, qemu_target=1000,
                   image="empty-1T", fresh_image=True, rounds=1)
    yield Workload("discard of 1 TiB, 16 M clusters", "large", "discard", qemu={"does": "discard"}, qemu_target=100,
                   image="full-1T", fresh_image=True, rounds=1)
    for what, image in (("1 M", "full-64G"), ("16 M", "full-1T")):
        yield Workload(f"check, {what} clusters", "check", "all", qemu={"does": "check"}, raw_target=1 / 1.5, qemu_target=10,
                       image=image)


def on_disk():
    for depth, qemu_target, count in ((1, 1.0, 5000), (32, 1.1, 30000), (64, 1.1, 30000)):
        yield Workload(f"random read, O_DIRECT, depth {depth}", "queue", "read", DISK,
                       {"depth": depth, "direct": 1, "ops": count}, SUBCLUSTERED,
                       bench(depth, count=count, direct=True), peer("read", depth=depth, ops=count),
                       raw_target=0.98, qemu_target=qemu_target)
    yield Workload("random overwrite, O_DIRECT, depth 32", "queue", "overwrite", DISK,
                   {"depth": 32, "direct": 1, "ops": 30000}, SUBCLUSTERED,
                   bench(32, count=30000, write=True, direct=True), peer("write", depth=32, ops=30000),
                   raw_target=0.98, qemu_target=1.1)
    for depth, qemu_target, ops, size_mib in ((1, 1.1, 2048, 256), (32, 5, 4096, 512)):
        yield allocating(f"allocating write, 128 KiB clusters, O_DIRECT, depth {depth}", depth, SUBCLUSTERED, 1.0, qemu_target,
                         ops=ops, size_mib=size_mib, medium=DISK, direct=1, has_peers=True)
    for depth, qemu_target in ((1, 1.0), (32, 2.5)):
        yield allocating(f"the same over a backing file, O_DIRECT, depth {depth}", depth, SUBCLUSTERED, 0.9, qemu_target,
                         ops=2048, size_mib=256, medium=DISK, direct=1, backing=1)
    yield Workload("allocating write with a flush after each", "driver", "allocate-4k-flush-each", DISK, {"ops": 200},
                   SUBCLUSTERED, bench(count=200, step=128 * KIB, write=True, fresh=True, flush_each=True),
                   peer("write", order="once", fresh=True, ops=200, size=2048 * MIB, flush_each=1),
                   raw_target=0.55, qemu_target=1.5)


def compressed(label, call, method, qemu_target):
    """8 requests of 1 MiB through a queue; raw is the codec alone, on as many threads as there are processors."""
    settings = {"method": method, "depth": 8, "block": MIB, "size_mib": 128}
    theirs = {"does": f"compressed_{call}", "method": method, "depth": 8, "block": MIB}
    return Workload(label, "compressed", call, settings=settings, qemu=theirs, raw_target=0.9, qemu_target=qemu_target)


COMPRESSED = [
    compressed("sequential read of 1 MiB, compressed with zlib, queue, depth 8", "read", "zlib", 2.5),
    compressed("sequential read of 1 MiB, compressed with zstd, queue, depth 8", "read", "zstd", 2),
    compressed("compressed writing of 1 MiB, zlib, queue, depth 8", "write", "zlib", 2.5),
    compressed("compressed writing of 1 MiB, zstd, queue, depth 8", "write", "zstd", 1.8),
]

WORKLOADS = [*in_place_in_memory(), *allocating_in_memory(), *sequential(MEMORY), *large_disks(), *COMPRESSED,
             *on_disk(), *sequential(DISK)]

# Whose system calls and heap calls are counted, with what they may need: label, call of the driver, options, is it mapped.
COUNTED = [
    ("random read", "read-4k", SUBCLUSTERED, True),
    ("random read (standard)", "read-4k", STANDARD, True),
    ("random read, 2 threads", "read-4k-2-threads", SUBCLUSTERED, True),
    ("random overwrite", "overwrite-4k", SUBCLUSTERED, True),
    ("random overwrite (standard)", "overwrite-4k", STANDARD, True),
    ("random overwrite, 2 threads", "overwrite-4k-2-threads", SUBCLUSTERED, True),
    ("allocating write", "allocate-4k", SUBCLUSTERED, False),
]
