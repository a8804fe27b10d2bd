/*
 * Large disks: what is done once with all of one, or before its tables are in memory. The image is made by run.py, which
 * also measures what QEMU needs for the same. One JSON line for each side and round goes to stdout.
 *
 *     open     `ours` opens the image and closes it again; `raw` opens the file, reads 4 KiB and closes it
 *     cold     random reads through a queue on a handle that knows no L2 table yet, each to another L2 slice as long as
 *              there are such; then the most memory that the process had
 *     zeroes   zeroes over the whole disk, a flush, and closing
 *     discard  the same with a discard
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <qcow2.h>

enum { BLOCK = 4096, DEPTH_MAX = 256 };

struct settings {
    const char *path;
    unsigned rounds, depth;
    uint64_t ops, step; /* cold: each read is so many bytes behind the one before, and goes round at the end */
};

struct elapsed {
    double wall, cpu;
};

static void check(int result, const char *what, const char *path)
{
    if (result >= 0)
        return;
    fprintf(stderr, "large: %s %s: %s (%s)\n", what, path, strerror(-result), qcow2_last_error());
    exit(1);
}

static double seconds(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static struct elapsed start(void)
{
    return (struct elapsed){ seconds(CLOCK_MONOTONIC), seconds(CLOCK_PROCESS_CPUTIME_ID) };
}

static struct elapsed stop(struct elapsed began)
{
    return (struct elapsed){ seconds(CLOCK_MONOTONIC) - began.wall, seconds(CLOCK_PROCESS_CPUTIME_ID) - began.cpu };
}

static void report(const char *side, unsigned round, uint64_t ops, struct elapsed elapsed)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"side\": \"%s\", \"round\": %u, \"ops\": %" PRIu64 ", \"bytes\": 0, \"seconds\": %.9f, \"cpu_seconds\": %.9f, "
           "\"flush_seconds\": 0, \"heap_calls\": 0, \"resident_kib\": %ld}\n",
           side, round, ops, elapsed.wall, elapsed.cpu, usage.ru_maxrss);
    fflush(stdout);
}

static qcow2_image *open_image(const struct settings *s)
{
    qcow2_image *image;
    check(qcow2_open(s->path, NULL, &image), "opening", s->path);
    return image;
}

static void open_ours(const struct settings *s)
{
    check(qcow2_close(open_image(s)), "closing", s->path);
}

static void open_raw(const struct settings *s)
{
    static char buffer[BLOCK];
    int fd = open(s->path, O_RDWR | O_CLOEXEC);
    check(fd < 0 || pread(fd, buffer, BLOCK, 0) != BLOCK || close(fd) < 0 ? -errno : 0, "opening", s->path);
}

static void run_open(const struct settings *s, unsigned round)
{
    for (unsigned turn = 0; turn < 2; turn++) {
        int is_ours = (round + turn) % 2 == 0;
        struct elapsed began = start();
        for (uint64_t i = 0; i < s->ops; i++)
            (is_ours ? open_ours : open_raw)(s);
        report(is_ours ? "ours" : "raw", round, s->ops, stop(began));
    }
}

static void run_cold(const struct settings *s, unsigned round)
{
    qcow2_image *image = open_image(s);
    qcow2_queue *queue;
    qcow2_completion done[DEPTH_MAX];
    uint64_t started = 0, ended = 0, blocks = (uint64_t)qcow2_size(image) / BLOCK;
    unsigned char *buffers = aligned_alloc(BLOCK, (size_t)s->depth * BLOCK);
    check(qcow2_queue_new(image, s->depth, QCOW2_QUEUE_AUTO, &queue), "queue on", s->path);
    struct elapsed began = start();
    while (ended < s->ops) {
        for (; started < s->ops && started - ended < s->depth; started++) {
            struct iovec iov = { buffers + started % s->depth * BLOCK, BLOCK };
            uint64_t offset = started * (s->step / BLOCK) % blocks * BLOCK;
            check(qcow2_queue_readv(queue, &iov, 1, offset, 0, started), "preparing", s->path);
        }
        int n = qcow2_queue_reap(queue, done, DEPTH_MAX, 1, -1);
        check(n, "reaping", s->path);
        for (int i = 0; i < n; i++)
            check(done[i].result, "reading", s->path);
        ended += (uint64_t)n;
    }
    struct elapsed elapsed = stop(began);
    report("ours", round, s->ops, elapsed);
    for (size_t i = 0; i < (size_t)s->depth * BLOCK; i++)
        check(buffers[i] == 0 ? 0 : -EILSEQ, "data where the disk is empty:", s->path);
    qcow2_queue_free(queue);
    check(qcow2_close(image), "closing", s->path);
    free(buffers);
}

static void run_whole(const struct settings *s, unsigned round, int discards)
{
    qcow2_image *image = open_image(s);
    uint64_t size = (uint64_t)qcow2_size(image);
    struct elapsed began = start();
    check(discards ? qcow2_discard(image, 0, size, 0) : qcow2_write_zeroes(image, 0, size, 0), "all of", s->path);
    check(qcow2_flush(image), "flushing", s->path);
    check(qcow2_close(image), "closing", s->path);
    report("ours", round, 1, stop(began));
    image = open_image(s);
    qcow2_extent extent = { .start = 0 };
    size_t n = 1;
    for (uint64_t offset = 0; offset < size && n == 1; offset += extent.length) {
        check(qcow2_map(image, offset, size - offset, 0, &extent, 1, &n), "mapping", s->path);
        check(extent.flags & QCOW2_EXTENT_ZERO ? 0 : -EILSEQ, "not zero everywhere:", s->path);
    }
    check(qcow2_close(image), "closing", s->path);
}

static int usage(void)
{
    fprintf(stderr, "usage: large open|cold|zeroes|discard IMAGE [rounds=N] [ops=N] [depth=N] [step=BYTES]\n");
    return 2;
}

int main(int argc, char **argv)
{
    struct settings s = { .path = argc > 2 ? argv[2] : NULL, .rounds = 1, .depth = 32, .ops = 1, .step = BLOCK };
    if (argc < 3)
        return usage();
    for (int i = 3; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL)
            return usage();
        *value++ = '\0';
        uint64_t number = strtoull(value, NULL, 0);
        if (strcmp(argv[i], "rounds") == 0)
            s.rounds = (unsigned)number;
        else if (strcmp(argv[i], "depth") == 0)
            s.depth = (unsigned)number;
        else if (strcmp(argv[i], "ops") == 0)
            s.ops = number;
        else if (strcmp(argv[i], "step") == 0)
            s.step = number;
        else
            return usage();
    }
    if (s.depth == 0 || s.depth > DEPTH_MAX || s.ops == 0 || s.step == 0 || s.step % BLOCK != 0)
        return usage();
    for (unsigned round = 0; round < s.rounds; round++) {
        if (strcmp(argv[1], "open") == 0)
            run_open(&s, round);
        else if (strcmp(argv[1], "cold") == 0)
            run_cold(&s, round);
        else if (strcmp(argv[1], "zeroes") == 0 || strcmp(argv[1], "discard") == 0)
            run_whole(&s, round, argv[1][0] == 'd');
        else
            return usage();
    }
    return 0;
}
