/*
 * What a queue costs over io_uring on a plain file: the same requests, in the same order, as many in flight, on two
 * "sides" that take turns round by round in one process. `ours` is a qcow2_queue on an image; `raw` is a ring by hand
 * (ring.h) on a file of the same size. Over a backing file, raw does the least that copying on write can do: it reads
 * the subcluster from the backing file, where there is more to it than the block, and writes it into a file that is
 * empty. Every block carries a stamp that says where it belongs and which round wrote it; what was written is read back
 * and compared outside of the time that is measured. One JSON line for each side and round goes to stdout; run.py makes
 * a table of them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>

#include <qcow2.h>

#include "ring.h"

enum { BLOCK = 4096, FILL = 1 << 20, DEPTH_MAX = 256, COPY_MAX = 64 << 10 };

struct settings {
    const char *directory;
    bool write, fresh; /* fresh: each round on a new image, in which each write has to allocate */
    bool direct;       /* without the page cache */
    bool backing;      /* over a raw file that is full */
    unsigned depth, rounds;
    uint64_t ops, size;
    uint64_t scatter;  /* writes that allocate meet each so many bytes, a cluster, once before any twice */
    unsigned copied;   /* bytes that raw copies on a write over a backing file: a subcluster */
    const char *only;
    qcow2_opts *create_options;
};

struct side {
    const char *name;
    char path[4096];
    qcow2_image *image; /* ours */
    qcow2_queue *queue;
    int fd, base; /* raw; base: the backing file, or -1 */
    struct ring ring;
    uint8_t *version; /* of each block: which pass wrote it last; 0 is a hole */
};

static void fail(const char *what, const char *path, int error)
{
    fprintf(stderr, "queue: %s %s: %s (%s)\n", what, path, strerror(-error), qcow2_last_error());
    exit(1);
}

static int check(int result, const char *what, const struct side *side)
{
    if (result < 0)
        fail(what, side->path, result);
    return result;
}

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/* Where request `i` of a round goes. */
static uint64_t offset_of(const struct settings *s, uint64_t seed, uint64_t i)
{
    if (!s->fresh)
        return mix(seed * 0x632be59bd9b4e019 + i * 0x9e3779b97f4a7c15) % (s->size / BLOCK) * BLOCK;
    uint64_t pieces = s->size / s->scatter, half = (uint64_t)__builtin_ctzll(pieces) / 2;
    uint64_t piece = (i + seed) * 0x9e3779b97f4a7c15 & (pieces - 1);
    piece = ((piece ^ (piece >> half)) * 0xbf58476d1ce4e5b9) & (pieces - 1);
    return piece * s->scatter + (mix(piece) + i / pieces) % (s->scatter / BLOCK) * BLOCK;
}

static uint64_t stamp_of(uint64_t offset, uint8_t version)
{
    return version == 0 ? 0 : mix(offset + version);
}

static void put_stamps(unsigned char *buffer, uint32_t length, uint64_t offset, uint8_t version)
{
    for (uint32_t at = 0; at < length; at += BLOCK) {
        uint64_t stamp = stamp_of(offset + at, version);
        memcpy(buffer + at, &stamp, sizeof stamp);
    }
}

static unsigned char *new_buffer(size_t length)
{
    unsigned char *buffer = aligned_alloc(BLOCK, length);
    if (buffer == NULL)
        exit(1);
    for (uint64_t at = 0; at < length; at += 8) {
        uint64_t word = mix(at % BLOCK + 1);
        memcpy(buffer + at, &word, sizeof word);
    }
    return buffer;
}

/* the sides */

static bool is_ours(const struct side *side)
{
    return side->name[0] == 'o';
}

static void transfer(struct side *side, bool write, unsigned char *buffer, size_t length, uint64_t offset)
{
    if (is_ours(side)) {
        check(write ? qcow2_pwrite(side->image, buffer, length, offset, 0)
                    : qcow2_pread(side->image, buffer, length, offset, 0), "filling or verifying", side);
        return;
    }
    ssize_t n = write ? pwrite(side->fd, buffer, length, (off_t)offset) : pread(side->fd, buffer, length, (off_t)offset);
    if (n != (ssize_t)length)
        fail("filling or verifying", side->path, n < 0 ? -errno : -EIO);
}

static void open_side(const struct settings *s, struct side *side)
{
    if (is_ours(side)) {
        qcow2_opts *opts = qcow2_opts_new();
        check(qcow2_opts_set_str(opts, "cache", s->direct ? "direct" : "writeback"), "option", side);
        check(qcow2_opts_set_str(opts, "backing", "relative"), "option", side);
        check(qcow2_open(side->path, opts, &side->image), "opening", side);
        qcow2_opts_free(opts);
        check(qcow2_queue_new(side->image, s->depth, QCOW2_QUEUE_IO_URING, &side->queue), "queue on", side);
    } else {
        side->fd = open(side->path, O_RDWR | O_CLOEXEC | (s->direct ? O_DIRECT : 0));
        check(side->fd < 0 ? -errno : 0, "opening", side);
        side->base = -1;
        if (s->backing) {
            char path[4200];
            snprintf(path, sizeof path, "%s/base.raw", s->directory);
            side->base = open(path, O_RDONLY | O_CLOEXEC | (s->direct ? O_DIRECT : 0));
            check(side->base < 0 ? -errno : 0, "opening the backing file of", side);
        }
        check(ring_open(&side->ring, s->depth, (int[]){ side->fd, side->base }, s->backing ? 2 : 1), "ring on", side);
    }
}

static void close_side(const struct settings *s, struct side *side)
{
    if (is_ours(side)) {
        qcow2_queue_free(side->queue);
        check(qcow2_close(side->image), "closing", side);
    } else {
        close(side->ring.fd);
        close(side->fd);
        if (s->backing)
            close(side->base);
    }
}

static void fill(const struct settings *s, struct side *side, unsigned char *buffer)
{
    for (uint64_t offset = 0; offset < s->size; offset += FILL) {
        put_stamps(buffer, FILL, offset, 1);
        transfer(side, true, buffer, FILL, offset);
    }
    memset(side->version, 1, s->size / BLOCK);
}

static void create_side(const struct settings *s, struct side *side, unsigned char *buffer)
{
    unlink(side->path);
    memset(side->version, s->backing ? 1 : 0, s->size / BLOCK);
    if (is_ours(side)) {
        check(qcow2_create(side->path, s->size, s->create_options, QCOW2_OVERWRITE), "creating", side);
    } else {
        int fd = open(side->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        check(fd < 0 || ftruncate(fd, (off_t)s->size) < 0 ? -errno : 0, "creating", side);
        close(fd);
    }
    open_side(s, side);
    if (!s->fresh)
        fill(s, side, buffer);
    check(is_ours(side) ? qcow2_flush(side->image) : fdatasync(side->fd) < 0 ? -errno : 0, "flushing", side);
    close_side(s, side);
    open_side(s, side);
}

/* Whether raw has nothing at a block that a guest would see the backing file through. */
static bool shows_base(const struct settings *s, const struct side *side, uint64_t offset)
{
    uint64_t first = offset / s->copied * s->copied;
    for (uint64_t at = first; s->backing && !is_ours(side) && at < first + s->copied; at += BLOCK)
        if (side->version[at / BLOCK] != 1)
            return false;
    return s->backing && !is_ours(side);
}

static void verify(const struct settings *s, struct side *side, unsigned char *expected, unsigned char *buffer)
{
    static const unsigned char zeroes[BLOCK];
    for (uint64_t offset = 0; offset < s->size; offset += FILL) {
        transfer(side, false, buffer, FILL, offset);
        for (uint32_t at = 0; at < FILL; at += BLOCK) {
            uint8_t version = side->version[(offset + at) / BLOCK];
            put_stamps(expected, BLOCK, offset + at, version);
            bool hole = version == 0 || shows_base(s, side, offset + at);
            if (memcmp(buffer + at, hole ? zeroes : expected, BLOCK) != 0) {
                fprintf(stderr, "queue: %s: wrong data at 0x%" PRIx64 "\n", side->path, offset + at);
                exit(1);
            }
        }
    }
}

/* one round */

struct flight {
    unsigned char *buffers; /* COPY_MAX for each slot */
    uint64_t offset[DEPTH_MAX];
    bool reads_base[DEPTH_MAX];
    uint64_t started, ended, seed;
    uint8_t version;
};

/* The write of raw over a backing file, in two steps. */
static void copy_on_write(const struct settings *s, struct side *side, struct flight *flight, uint64_t slot)
{
    unsigned char *buffer = flight->buffers + slot * COPY_MAX;
    uint64_t offset = flight->offset[slot], first = offset / s->copied * s->copied;
    bool reads = flight->reads_base[slot] = s->copied > BLOCK && !flight->reads_base[slot];
    if (!reads) {
        put_stamps(buffer + (offset - first), BLOCK, offset, flight->version);
    }
    ring_push(&side->ring, reads ? IORING_OP_READ : IORING_OP_WRITE, reads ? 1 : 0, buffer, s->copied, first, slot);
}

/* The next request into a slot. */
static void start(const struct settings *s, struct side *side, struct flight *flight, uint64_t slot)
{
    unsigned char *buffer = flight->buffers + slot * COPY_MAX;
    uint64_t offset = offset_of(s, flight->seed, flight->started++);
    flight->offset[slot] = offset;
    if (s->backing && !is_ours(side)) {
        copy_on_write(s, side, flight, slot);
        return;
    }
    if (s->write)
        put_stamps(buffer, BLOCK, offset, flight->version);
    if (is_ours(side)) {
        struct iovec iov = { buffer, BLOCK };
        check(s->write ? qcow2_queue_writev(side->queue, &iov, 1, offset, 0, slot)
                       : qcow2_queue_readv(side->queue, &iov, 1, offset, 0, slot), "preparing", side);
    } else {
        ring_push(&side->ring, s->write ? IORING_OP_WRITE : IORING_OP_READ, 0, buffer, BLOCK, offset, slot);
    }
}

static void end(const struct settings *s, struct side *side, struct flight *flight, uint64_t slot)
{
    uint64_t offset = flight->offset[slot], stamp;
    memcpy(&stamp, flight->buffers + slot * COPY_MAX, sizeof stamp);
    if (!s->write && stamp != stamp_of(offset, side->version[offset / BLOCK]))
        fail("wrong data read from", side->path, -EILSEQ);
    flight->ended++;
    if (flight->started < s->ops)
        start(s, side, flight, slot);
}

static void fly_ours(const struct settings *s, struct side *side, struct flight *flight)
{
    qcow2_completion done[DEPTH_MAX];
    while (flight->ended < s->ops) {
        int n = check(qcow2_queue_reap(side->queue, done, DEPTH_MAX, 1, -1), "reaping", side);
        for (int i = 0; i < n; i++) {
            check(done[i].result, "request on", side);
            end(s, side, flight, done[i].user_data);
        }
    }
}

static void fly_raw(const struct settings *s, struct side *side, struct flight *flight)
{
    while (flight->ended < s->ops) {
        uint64_t slot;
        int result;
        check(ring_wait(&side->ring), "waiting", side);
        while (ring_reap(&side->ring, &slot, &result)) {
            if (result != (int)(s->backing ? s->copied : BLOCK))
                fail("request on", side->path, result < 0 ? result : -EIO);
            if (flight->reads_base[slot])
                copy_on_write(s, side, flight, slot);
            else
                end(s, side, flight, slot);
        }
    }
}

static double seconds(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void run_round(const struct settings *s, struct side *side, unsigned round, unsigned char *buffers)
{
    struct flight flight = { .buffers = buffers, .seed = round, .version = (uint8_t)(2 + round % 250) };
    double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    for (uint64_t slot = 0; slot < s->depth && slot < s->ops; slot++)
        start(s, side, &flight, slot);
    (is_ours(side) ? fly_ours : fly_raw)(s, side, &flight);
    wall = seconds(CLOCK_MONOTONIC) - wall;
    cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    double flushing = seconds(CLOCK_MONOTONIC);
    if (s->write)
        check(is_ours(side) ? qcow2_flush(side->image) : fdatasync(side->fd) < 0 ? -errno : 0, "flushing", side);
    flushing = s->write ? seconds(CLOCK_MONOTONIC) - flushing : 0;
    printf("{\"side\": \"%s\", \"round\": %u, \"ops\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"seconds\": %.9f, "
           "\"cpu_seconds\": %.9f, \"flush_seconds\": %.9f, \"heap_calls\": 0}\n",
           side->name, round, s->ops, s->ops * BLOCK, wall, cpu, flushing);
    fflush(stdout);
    for (uint64_t i = 0; s->write && i < s->ops; i++)
        side->version[offset_of(s, round, i) / BLOCK] = flight.version;
}

/* What lies under ours, and what raw is filled with: the same. */
static void make_base(const struct settings *s, unsigned char *buffer)
{
    struct side base = { .name = "raw" };
    snprintf(base.path, sizeof base.path, "%s/base.raw", s->directory);
    base.fd = open(base.path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    check(base.fd < 0 ? -errno : 0, "creating", &base);
    for (uint64_t offset = 0; offset < s->size; offset += FILL) {
        put_stamps(buffer, FILL, offset, 1);
        transfer(&base, true, buffer, FILL, offset);
    }
    check(fdatasync(base.fd) < 0 ? -errno : 0, "flushing", &base);
    close(base.fd);
}

static void run(const struct settings *s)
{
    unsigned char *buffer = new_buffer(FILL), *expected = new_buffer(FILL);
    unsigned char *buffers = new_buffer((size_t)s->depth * COPY_MAX);
    struct side sides[2] = { { .name = "ours" }, { .name = "raw" } };
    if (s->backing)
        make_base(s, expected);
    for (unsigned i = 0; i < 2; i++) {
        snprintf(sides[i].path, sizeof sides[i].path, "%s/%s", s->directory, i == 0 ? "ours.qcow2" : "raw.img");
        sides[i].version = malloc(s->size / BLOCK);
    }
    for (unsigned round = 0; round < s->rounds; round++) {
        for (unsigned turn = 0; turn < 2; turn++) {
            struct side *side = &sides[(round + turn) % 2];
            if (s->only != NULL && strcmp(s->only, side->name) != 0)
                continue;
            if (s->fresh || round == 0)
                create_side(s, side, expected);
            run_round(s, side, round, buffers);
            if (s->write && (s->fresh || round + 1 == s->rounds))
                verify(s, side, expected, buffer);
            if (s->fresh || round + 1 == s->rounds)
                close_side(s, side);
        }
    }
    free(sides[0].version), free(sides[1].version), free(buffers), free(expected), free(buffer);
}

static int usage(void)
{
    fprintf(stderr, "usage: queue read|overwrite|allocate DIRECTORY [depth=N] [rounds=N] [ops=N] [size_mib=N (a power of two)]\n"
                    "             [direct=1] [backing=1 [copied=BYTES]] [scatter=BYTES] [only=ours|raw] [option of qcow2_create=value]...\n");
    return 2;
}

int main(int argc, char **argv)
{
    struct settings s = { .depth = 32, .rounds = 1, .ops = 100000, .size = 512 << 20,
                          .scatter = 128 << 10, .copied = BLOCK };
    if (argc < 3)
        return usage();
    s.write = strcmp(argv[1], "read") != 0;
    s.fresh = strcmp(argv[1], "allocate") == 0;
    if (s.write && !s.fresh && strcmp(argv[1], "overwrite") != 0)
        return usage();
    s.directory = argv[2];
    s.create_options = qcow2_opts_new();
    for (int i = 3; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL)
            return usage();
        *value++ = '\0';
        uint64_t number = strtoull(value, NULL, 0);
        if (strcmp(argv[i], "depth") == 0)
            s.depth = (unsigned)number;
        else if (strcmp(argv[i], "rounds") == 0)
            s.rounds = (unsigned)number;
        else if (strcmp(argv[i], "ops") == 0)
            s.ops = number;
        else if (strcmp(argv[i], "size_mib") == 0)
            s.size = number << 20;
        else if (strcmp(argv[i], "direct") == 0)
            s.direct = number != 0;
        else if (strcmp(argv[i], "backing") == 0)
            s.backing = number != 0;
        else if (strcmp(argv[i], "scatter") == 0)
            s.scatter = number;
        else if (strcmp(argv[i], "copied") == 0)
            s.copied = (unsigned)number;
        else if (strcmp(argv[i], "only") == 0)
            s.only = value;
        else if (qcow2_opts_set_str(s.create_options, argv[i], value) < 0)
            fail("option", argv[i], -EINVAL);
    }
    if (s.depth == 0 || s.depth > DEPTH_MAX || s.size == 0 || (s.size & (s.size - 1)) != 0 || s.scatter < BLOCK ||
        s.scatter > s.size || s.size % s.scatter != 0 || s.copied < BLOCK || s.copied > COPY_MAX || s.copied % BLOCK != 0)
        return usage();
    if (s.backing && (qcow2_opts_set_str(s.create_options, "backing_file", "base.raw") < 0 ||
                      qcow2_opts_set_str(s.create_options, "backing_fmt", "raw") < 0))
        fail("option", "backing_file", -EINVAL);
    run(&s);
    qcow2_opts_free(s.create_options);
    return 0;
}
