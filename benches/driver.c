/*
 * What libqcow2 costs over the raw system call, through the public header alone.
 *
 * Every workload runs twice, on two "sides" that get the same operations in the same order: `ours` on a qcow2 image,
 * `raw` on a plain file of the same size and sparsity with pread(2), pwrite(2) and fdatasync(2). The sides take turns
 * round by round in one process, so that a slow moment of the machine hits both. All that was written is read back and
 * compared afterwards, outside of the time that is measured. One JSON line for each side and round goes to stdout;
 * run.py makes tables of them.
 *
 * Built with COUNT_HEAP and linked statically with --wrap (see the Makefile), it also counts every call of malloc and
 * its relatives by the threads that do the I/O, the library's calls included.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <qcow2.h>

enum { STAMPED = 4096, BUFFER_MAX = 1 << 20, THREADS_MAX = 16, SCATTER = 128 << 10 };

enum order { RANDOM, ONCE, SEQUENTIAL };

struct workload {
    const char *name;
    enum order order;
    uint32_t block;      /* bytes of an operation */
    unsigned threads;
    bool write;
    bool fresh;          /* each round on a new, empty image; otherwise all is mapped and written before */
    bool flush_each;     /* a flush belongs to each operation; otherwise to each round of writes */
    uint64_t ops;        /* of a round */
    uint64_t size_mib;
};

static const struct workload workloads[] = {
    { "read-4k", RANDOM, 4096, 1, false, false, false, 200000, 512 },
    { "read-4k-2-threads", RANDOM, 4096, 2, false, false, false, 400000, 512 },
    { "overwrite-4k", RANDOM, 4096, 1, true, false, false, 200000, 512 },
    { "overwrite-4k-2-threads", RANDOM, 4096, 2, true, false, false, 400000, 512 },
    { "allocate-4k", ONCE, 4096, 1, true, true, false, 16384, 2048 },
    { "allocate-4k-flush-each", ONCE, 4096, 1, true, true, true, 1000, 2048 },
    { "read-seq-64k", SEQUENTIAL, 65536, 1, false, false, false, 8192, 512 },
    { "read-seq-1m", SEQUENTIAL, 1 << 20, 1, false, false, false, 512, 512 },
    { "overwrite-seq-64k", SEQUENTIAL, 65536, 1, true, false, false, 8192, 512 },
    { "overwrite-seq-1m", SEQUENTIAL, 1 << 20, 1, true, false, false, 512, 512 },
    { "allocate-seq-64k", SEQUENTIAL, 65536, 1, true, true, false, 8192, 512 },
    { "allocate-seq-1m", SEQUENTIAL, 1 << 20, 1, true, true, false, 512, 512 },
};

struct side;

struct side_calls {
    const char *name;
    int (*create)(struct side *);
    int (*open)(struct side *);
    int (*close)(struct side *);
    int (*read)(struct side *, void *, size_t, uint64_t);
    int (*write)(struct side *, const void *, size_t, uint64_t);
    int (*flush)(struct side *);
};

struct side {
    const struct side_calls *calls;
    char path[4096];
    const qcow2_opts *create_options; /* ours */
    bool direct;                      /* without the page cache */
    uint64_t size;
    qcow2_image *image; /* ours */
    int fd;             /* raw */
    uint8_t *version;   /* for each 4 KiB of the guest: which pass wrote it last; 0: nobody, it is a hole */
};

static void fail(const char *what, const char *path, int error)
{
    fprintf(stderr, "driver: %s %s: %s (%s)\n", what, path, strerror(-error), qcow2_last_error());
    exit(1);
}

static void check(int result, const char *what, const struct side *side)
{
    if (result < 0)
        fail(what, side->path, result);
}

/* ours */

static int ours_create(struct side *side)
{
    return qcow2_create(side->path, side->size, side->create_options, QCOW2_OVERWRITE);
}

static int ours_open(struct side *side)
{
    qcow2_opts *opts = qcow2_opts_new();
    int result = qcow2_opts_set_str(opts, "cache", side->direct ? "direct" : "writeback");
    if (result == 0)
        result = qcow2_open(side->path, opts, &side->image);
    qcow2_opts_free(opts);
    return result;
}

static int ours_close(struct side *side)
{
    return qcow2_close(side->image);
}

static int ours_read(struct side *side, void *buffer, size_t length, uint64_t offset)
{
    return qcow2_pread(side->image, buffer, length, offset, 0);
}

static int ours_write(struct side *side, const void *buffer, size_t length, uint64_t offset)
{
    return qcow2_pwrite(side->image, buffer, length, offset, 0);
}

static int ours_flush(struct side *side)
{
    return qcow2_flush(side->image);
}

/* raw */

static int raw_create(struct side *side)
{
    int fd = open(side->path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    int result = fd < 0 || ftruncate(fd, (off_t)side->size) < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    return result;
}

static int raw_open(struct side *side)
{
    side->fd = open(side->path, O_RDWR | O_CLOEXEC | (side->direct ? O_DIRECT : 0));
    return side->fd < 0 ? -errno : 0;
}

static int raw_close(struct side *side)
{
    return close(side->fd) < 0 ? -errno : 0;
}

/* All or nothing, as qcow2_pread and qcow2_pwrite are. */
static int raw_read(struct side *side, void *buffer, size_t length, uint64_t offset)
{
    ssize_t n = pread(side->fd, buffer, length, (off_t)offset);
    return n == (ssize_t)length ? 0 : n < 0 ? -errno : -EIO;
}

static int raw_write(struct side *side, const void *buffer, size_t length, uint64_t offset)
{
    ssize_t n = pwrite(side->fd, buffer, length, (off_t)offset);
    return n == (ssize_t)length ? 0 : n < 0 ? -errno : -EIO;
}

static int raw_flush(struct side *side)
{
    return fdatasync(side->fd) < 0 ? -errno : 0;
}

static const struct side_calls side_calls[] = {
    { "ours", ours_create, ours_open, ours_close, ours_read, ours_write, ours_flush },
    { "raw", raw_create, raw_open, raw_close, raw_read, raw_write, raw_flush },
};

/* the heap */

static _Thread_local uint64_t heap_calls;

#ifdef COUNT_HEAP
void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_realloc(void *, size_t);
void *__real_aligned_alloc(size_t, size_t);
int __real_posix_memalign(void **, size_t, size_t);
void *__wrap_malloc(size_t);
void *__wrap_calloc(size_t, size_t);
void *__wrap_realloc(void *, size_t);
void *__wrap_aligned_alloc(size_t, size_t);
int __wrap_posix_memalign(void **, size_t, size_t);

void *__wrap_malloc(size_t size)
{
    heap_calls++;
    return __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    heap_calls++;
    return __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size)
{
    heap_calls++;
    return __real_realloc(old, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    heap_calls++;
    return __real_aligned_alloc(alignment, size);
}

int __wrap_posix_memalign(void **result, size_t alignment, size_t size)
{
    heap_calls++;
    return __real_posix_memalign(result, alignment, size);
}
#endif

/* where an operation goes, and what is there */

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/* Numbers 0 to n - 1 (n is a power of two) in another order. */
static uint64_t shuffled(uint64_t i, uint64_t n)
{
    unsigned half = (unsigned)__builtin_ctzll(n) / 2;
    i = (i * 0x9e3779b97f4a7c15) & (n - 1);
    i = ((i ^ (i >> half)) * 0xbf58476d1ce4e5b9) & (n - 1);
    return i ^ (i >> half);
}

/*
 * Where operation `i` goes. ONCE meets each block once: first a random block in every 128 KiB (a cluster of the images
 * that run.py makes, so that each of these operations has to allocate one), then the next block in every 128 KiB, ...
 */
static uint64_t offset_of(const struct workload *w, uint64_t size, uint64_t seed, uint64_t i)
{
    uint64_t pieces = size / SCATTER, piece;
    switch (w->order) {
    case RANDOM:
        return (mix(seed + i * 0x9e3779b97f4a7c15) & (size / w->block - 1)) * w->block;
    case ONCE:
        piece = shuffled((i + seed) % pieces, pieces);
        return piece * SCATTER + (mix(piece) + i / pieces) % (SCATTER / w->block) * w->block;
    default:
        return i * w->block & (size - 1);
    }
}

/* A buffer holds the same filling everywhere, and in front of each 4 KiB where they belong and which pass wrote them. */
static uint64_t stamp_of(uint64_t offset, uint8_t version)
{
    return version == 0 ? 0 : mix(offset + version);
}

static void put_stamps(unsigned char *buffer, uint32_t length, uint64_t offset, uint8_t version)
{
    for (uint32_t at = 0; at < length; at += STAMPED) {
        uint64_t stamp = stamp_of(offset + at, version);
        memcpy(buffer + at, &stamp, sizeof stamp);
    }
}

static unsigned char *new_buffer(void)
{
    unsigned char *buffer = aligned_alloc(STAMPED, BUFFER_MAX);
    if (buffer == NULL)
        exit(1);
    for (uint64_t at = 0; at < BUFFER_MAX; at += 8) {
        uint64_t word = mix(at % STAMPED + 1);
        memcpy(buffer + at, &word, sizeof word);
    }
    return buffer;
}

/* Reads the whole side back and compares every byte. */
static void verify(struct side *side, unsigned char *expected, unsigned char *buffer)
{
    static const unsigned char zeroes[STAMPED];
    for (uint64_t offset = 0; offset < side->size; offset += BUFFER_MAX) {
        check(side->calls->read(side, buffer, BUFFER_MAX, offset), "verifying", side);
        for (uint32_t at = 0; at < BUFFER_MAX; at += STAMPED) {
            uint8_t version = side->version[(offset + at) / STAMPED];
            put_stamps(expected, STAMPED, offset + at, version);
            if (memcmp(buffer + at, version == 0 ? zeroes : expected, STAMPED) != 0) {
                fprintf(stderr, "driver: %s: wrong data at 0x%" PRIx64 "\n", side->path, offset + at);
                exit(1);
            }
        }
    }
}

/* one round */

struct job {
    pthread_t thread;
    pthread_barrier_t *start;
    const struct workload *workload;
    struct side *side;
    uint64_t first, last; /* operations */
    uint64_t seed;
    uint8_t version;
    uint64_t heap_calls;
    struct timespec started, ended, cpu_started, cpu_ended;
    unsigned char *buffer;
};

static void run_io(struct job *job)
{
    const struct workload *w = job->workload;
    const struct side_calls *calls = job->side->calls;
    for (uint64_t i = job->first; i < job->last; i++) {
        uint64_t offset = offset_of(w, job->side->size, job->seed, i);
        int result;
        if (w->write) {
            put_stamps(job->buffer, w->block, offset, job->version);
            result = calls->write(job->side, job->buffer, w->block, offset);
            if (result == 0 && w->flush_each)
                result = calls->flush(job->side);
        } else {
            uint64_t stamp;
            result = calls->read(job->side, job->buffer, w->block, offset);
            memcpy(&stamp, job->buffer, sizeof stamp);
            if (result == 0 && stamp != stamp_of(offset, job->side->version[offset / STAMPED]))
                result = -EILSEQ;
        }
        if (result < 0)
            fail(w->name, job->side->path, result);
    }
}

static void *run_job(void *argument)
{
    struct job *job = argument;
    job->buffer = new_buffer();
    pthread_barrier_wait(job->start);
    uint64_t heap_before = heap_calls;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &job->cpu_started);
    clock_gettime(CLOCK_MONOTONIC, &job->started);
    run_io(job);
    clock_gettime(CLOCK_MONOTONIC, &job->ended);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &job->cpu_ended);
    job->heap_calls = heap_calls - heap_before;
    free(job->buffer);
    return NULL;
}

static double seconds(struct timespec time)
{
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double flush(struct side *side)
{
    struct timespec started, ended;
    clock_gettime(CLOCK_MONOTONIC, &started);
    check(side->calls->flush(side), "flushing", side);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    return seconds(ended) - seconds(started);
}

/* Runs the operations on all threads, and says how long that took from the first start to the last end. */
static void run_round(const struct workload *w, struct side *side, unsigned round, uint8_t version)
{
    struct job jobs[THREADS_MAX];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, w->threads);
    for (unsigned t = 0; t < w->threads; t++) {
        jobs[t] = (struct job){ .start = &start, .workload = w, .side = side, .seed = round, .version = version,
                                .first = w->ops * t / w->threads, .last = w->ops * (t + 1) / w->threads };
        if (pthread_create(&jobs[t].thread, NULL, run_job, &jobs[t]) != 0)
            exit(1);
    }
    double started = 1e300, ended = 0, cpu = 0;
    uint64_t calls = 0;
    for (unsigned t = 0; t < w->threads; t++) {
        pthread_join(jobs[t].thread, NULL);
        double s = seconds(jobs[t].started), e = seconds(jobs[t].ended);
        started = s < started ? s : started;
        ended = e > ended ? e : ended;
        cpu += seconds(jobs[t].cpu_ended) - seconds(jobs[t].cpu_started);
        calls += jobs[t].heap_calls;
    }
    pthread_barrier_destroy(&start);
    double flush_seconds = w->write && !w->flush_each ? flush(side) : 0;
    printf("{\"workload\": \"%s\", \"side\": \"%s\", \"round\": %u, \"ops\": %" PRIu64 ", \"bytes\": %" PRIu64
           ", \"seconds\": %.9f, \"cpu_seconds\": %.9f, \"flush_seconds\": %.9f, \"heap_calls\": %" PRIu64 "}\n",
           w->name, side->calls->name, round, w->ops, w->ops * w->block, ended - started, cpu, flush_seconds, calls);
    fflush(stdout);
    if (w->write)
        for (uint64_t i = 0; i < w->ops; i++) {
            uint64_t offset = offset_of(w, side->size, round, i);
            memset(side->version + offset / STAMPED, version, w->block / STAMPED);
        }
}

/* a side's life */

static void fill(struct side *side, unsigned char *buffer)
{
    for (uint64_t offset = 0; offset < side->size; offset += BUFFER_MAX) {
        put_stamps(buffer, BUFFER_MAX, offset, 1);
        check(side->calls->write(side, buffer, BUFFER_MAX, offset), "filling", side);
    }
    memset(side->version, 1, side->size / STAMPED);
    check(side->calls->flush(side), "flushing", side);
}

/* A new file; and unless it has to be empty, full of data, closed and opened again. */
static void prepare(const struct workload *w, struct side *side, unsigned char *buffer)
{
    unlink(side->path);
    memset(side->version, 0, side->size / STAMPED);
    check(side->calls->create(side), "creating", side);
    check(side->calls->open(side), "opening", side);
    if (w->fresh)
        return;
    fill(side, buffer);
    check(side->calls->close(side), "closing", side);
    check(side->calls->open(side), "opening", side);
}

static void finish(const struct workload *w, struct side *side, bool unverified, unsigned char *expected,
                   unsigned char *buffer)
{
    if (w->write && !unverified)
        verify(side, expected, buffer);
    check(side->calls->close(side), "closing", side);
}

struct settings {
    struct workload workload;
    const char *directory;
    const char *only; /* one side, for counting its system calls or for a profiler */
    unsigned rounds;
    bool direct;
    bool unverified; /* for counting system calls: reading back takes some too */
    qcow2_opts *create_options;
};

static bool is_wanted(const struct settings *settings, const struct side *side)
{
    return settings->only == NULL || strcmp(settings->only, side->calls->name) == 0;
}

static void run_workload(const struct settings *settings)
{
    const struct workload *w = &settings->workload;
    unsigned char *buffer = new_buffer(), *expected = new_buffer();
    struct side sides[2] = { { .calls = &side_calls[0] }, { .calls = &side_calls[1] } };
    for (unsigned s = 0; s < 2; s++) {
        snprintf(sides[s].path, sizeof sides[s].path, "%s/%s", settings->directory, s == 0 ? "ours.qcow2" : "raw.img");
        sides[s].size = w->size_mib << 20;
        sides[s].create_options = settings->create_options;
        sides[s].direct = settings->direct;
        sides[s].version = malloc(sides[s].size / STAMPED);
        if (!w->fresh && is_wanted(settings, &sides[s]))
            prepare(w, &sides[s], expected);
    }
    for (unsigned round = 0; round < settings->rounds; round++) {
        for (unsigned turn = 0; turn < 2; turn++) {
            struct side *side = &sides[(round + turn) % 2]; /* who is first takes turns too */
            if (!is_wanted(settings, side))
                continue;
            if (w->fresh)
                prepare(w, side, expected);
            run_round(w, side, round, (uint8_t)(2 + round % 250));
            if (w->fresh)
                finish(w, side, settings->unverified, expected, buffer);
        }
    }
    for (unsigned s = 0; s < 2; s++) {
        if (!w->fresh && is_wanted(settings, &sides[s]))
            finish(w, &sides[s], settings->unverified, expected, buffer);
        free(sides[s].version);
    }
    free(expected);
    free(buffer);
}

static int usage(void)
{
    fprintf(stderr, "usage: driver WORKLOAD DIRECTORY [rounds=N] [ops=N] [size_mib=N (a power of two)] [only=ours|raw]\n"
                    "              [direct=1] [unverified=1] [option of qcow2_create=value]...\nworkloads:");
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++)
        fprintf(stderr, " %s", workloads[i].name);
    fprintf(stderr, "\n");
    return 2;
}

static void set_option(struct settings *settings, char *argument)
{
    char *value = strchr(argument, '=');
    if (value == NULL)
        exit(usage());
    *value++ = '\0';
    if (strcmp(argument, "rounds") == 0)
        settings->rounds = (unsigned)strtoul(value, NULL, 0);
    else if (strcmp(argument, "ops") == 0)
        settings->workload.ops = strtoull(value, NULL, 0);
    else if (strcmp(argument, "size_mib") == 0)
        settings->workload.size_mib = strtoull(value, NULL, 0);
    else if (strcmp(argument, "direct") == 0)
        settings->direct = strtoul(value, NULL, 0) != 0;
    else if (strcmp(argument, "unverified") == 0)
        settings->unverified = strtoul(value, NULL, 0) != 0;
    else if (strcmp(argument, "only") == 0)
        settings->only = value;
    else if (qcow2_opts_set_str(settings->create_options, argument, value) < 0)
        fail("option", argument, -EINVAL);
}

int main(int argc, char **argv)
{
    struct settings settings = { .rounds = 1 };
    if (argc < 3)
        return usage();
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++)
        if (strcmp(argv[1], workloads[i].name) == 0)
            settings.workload = workloads[i];
    settings.directory = argv[2];
    settings.create_options = qcow2_opts_new();
    for (int i = 3; i < argc; i++)
        set_option(&settings, argv[i]);
    uint64_t size_mib = settings.workload.size_mib;
    if (settings.workload.name == NULL || size_mib == 0 || (size_mib & (size_mib - 1)) != 0)
        return usage();
    run_workload(&settings);
    qcow2_opts_free(settings.create_options);
    return 0;
}
