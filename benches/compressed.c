/*
 * What reading and writing compressed clusters through a queue costs over the codecs alone, on two "sides" that take
 * turns round by round in one process. `ours` is a qcow2_queue on an image, with so many requests in flight; `raw` is as
 * many threads as there are processors (threads=N), which do nothing but decompress (or compress) the same clusters, from
 * memory to memory, with the library's codecs and settings (benches/codec). The data compresses about 2:1: words and
 * records from a seeded generator, different in each cluster. What was read is compared outside of the time that is
 * measured. One JSON line for each side and round goes to stdout, with the keys of queue.c.
 *
 * write: each round on a new image. Until everything has been written and reaped; flushing is measured by itself.
 * small=1: a blocking pread of `block` bytes at a time, from one end to the other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <qcow2.h>

enum { CLUSTER = 64 << 10, DEPTH_MAX = 256, THREADS_MAX = 256, WORDS = 4096 };

/* benches/codec */
struct codec;
extern struct codec *codec_new(bool zstd);
extern size_t codec_pack(struct codec *, const unsigned char *from, size_t length, unsigned char *to, size_t room);
extern bool codec_unpack(struct codec *, const unsigned char *from, size_t length, unsigned char *to, size_t room);

struct settings {
    bool write, blocking, zstd;
    unsigned depth, rounds, threads;
    size_t block;
    uint64_t size;
    const char *only;
    const char *backend;
};

/* The disk, and what the codec makes of each of its clusters. */
struct disk {
    unsigned char *content, *packed;
    size_t *length;
    char path[4096];
};

static void fail(const char *what, int error)
{
    fprintf(stderr, "compressed: %s: %s (%s)\n", what, strerror(-error), qcow2_last_error());
    exit(1);
}

static int check(int result, const char *what)
{
    if (result < 0)
        fail(what, result);
    return result;
}

static uint64_t next(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static size_t put(unsigned char *to, size_t at, size_t end, const void *from, size_t length)
{
    if (length > end - at)
        length = end - at;
    memcpy(to + at, from, length);
    return at + length;
}

/* Two thirds are words, the frequent ones often; the rest are records of 32 bytes that resemble each other. */
static void generate(unsigned char *content, uint64_t size)
{
    static char words[WORDS][16];
    uint64_t seed = 1;
    for (unsigned word = 0; word < WORDS; word++) {
        unsigned length = 2 + (unsigned)(next(&seed) % 9);
        for (unsigned i = 0; i < length; i++)
            words[word][i] = (char)('a' + next(&seed) % 26 * (next(&seed) % 26) / 25);
        words[word][length] = ' ';
    }
    for (uint64_t start = 0; start < size; start += CLUSTER) {
        size_t at = 0;
        while (at < CLUSTER * 2 / 3) {
            uint64_t random = next(&seed);
            uint64_t word = random % WORDS >> (random >> 32) % 9;
            at = put(content + start, at, CLUSTER, words[word], strlen(words[word]));
        }
        for (uint32_t number = (uint32_t)next(&seed); at < CLUSTER; number++) {
            uint64_t random = next(&seed), record[4] = { number, random, random % 50 << 32 | 7, 0x0000600000000000 | (random & 0xfff8) };
            at = put(content + start, at, CLUSTER, record, sizeof record);
        }
    }
}

static double seconds(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* the codec alone */

struct crew {
    const struct settings *settings;
    struct disk *disk;
    bool pack;
    atomic_uint_fast64_t next;
};

static void *codec_thread(void *argument)
{
    struct crew *crew = argument;
    struct codec *codec = codec_new(crew->settings->zstd);
    unsigned char *room = malloc(CLUSTER);
    uint64_t clusters = crew->settings->size / CLUSTER, cluster;
    while ((cluster = atomic_fetch_add(&crew->next, 1)) < clusters) {
        unsigned char *packed = crew->disk->packed + cluster * CLUSTER;
        const unsigned char *content = crew->disk->content + cluster * CLUSTER;
        size_t *length = &crew->disk->length[cluster];
        if (crew->pack && codec_pack(codec, content, CLUSTER, room, CLUSTER - 1) == 0)
            fail("the codec alone did not make it smaller", -EILSEQ);
        if (!crew->pack && !codec_unpack(codec, packed, *length, room, CLUSTER))
            fail("the codec alone failed", -EILSEQ);
        if (!crew->pack && (cluster % 64 == 0) && memcmp(room, content, CLUSTER) != 0)
            fail("the codec alone came to something else", -EILSEQ);
    }
    free(room);
    return NULL;
}

static void run_codec(const struct settings *s, struct disk *disk)
{
    struct crew crew = { .settings = s, .disk = disk, .pack = s->write };
    pthread_t threads[THREADS_MAX];
    for (unsigned i = 0; i < s->threads; i++)
        check(-pthread_create(&threads[i], NULL, codec_thread, &crew), "starting a thread");
    for (unsigned i = 0; i < s->threads; i++)
        pthread_join(threads[i], NULL);
}

static void prepare(const struct settings *s, struct disk *disk)
{
    struct codec *codec = codec_new(s->zstd);
    disk->content = malloc(s->size);
    disk->packed = malloc(s->size);
    disk->length = calloc(s->size / CLUSTER, sizeof *disk->length);
    generate(disk->content, s->size);
    uint64_t stored = 0;
    for (uint64_t at = 0; at < s->size; at += CLUSTER) {
        size_t length = codec_pack(codec, disk->content + at, CLUSTER, disk->packed + at, CLUSTER - 1);
        disk->length[at / CLUSTER] = length;
        stored += length;
    }
    fprintf(stderr, "%s: %" PRIu64 " bytes become %" PRIu64 " (%.2f)\n", s->zstd ? "zstd" : "zlib", s->size, stored,
            (double)s->size / (double)stored);
}

/* ours */

static uint32_t backend(const struct settings *s)
{
    return s->backend && strcmp(s->backend, "threads") == 0 ? QCOW2_QUEUE_THREADS : QCOW2_QUEUE_AUTO;
}

static void start(const struct settings *s, qcow2_queue *queue, unsigned char *buffers, struct disk *disk, uint64_t at, uint64_t slot)
{
    if (s->write) {
        struct iovec iov = { disk->content + at, s->block };
        check(qcow2_queue_writev(queue, &iov, 1, at, QCOW2_COMPRESSED, slot), "preparing");
    } else {
        struct iovec iov = { buffers + slot * s->block, s->block };
        check(qcow2_queue_readv(queue, &iov, 1, at, 0, slot), "preparing");
    }
}

/* Sequentially from one end to the other. Once, in the first round, what is read is compared. */
static void run_queue(const struct settings *s, qcow2_queue *queue, unsigned char *buffers, struct disk *disk, bool compare)
{
    qcow2_completion done[DEPTH_MAX];
    uint64_t offset[DEPTH_MAX], started = 0, ended = 0;
    for (uint64_t slot = 0; slot < s->depth && started < s->size; slot++, started += s->block)
        start(s, queue, buffers, disk, offset[slot] = started, slot);
    while (ended < s->size) {
        int n = check(qcow2_queue_reap(queue, done, DEPTH_MAX, 1, -1), "reaping");
        for (int i = 0; i < n; i++, ended += s->block) {
            uint64_t slot = done[i].user_data;
            check(done[i].result, "a request");
            if (compare && memcmp(buffers + slot * s->block, disk->content + offset[slot], s->block) != 0)
                fail("wrong data", -EILSEQ);
            if (started < s->size) {
                start(s, queue, buffers, disk, offset[slot] = started, slot);
                started += s->block;
            }
        }
    }
}

static void run_blocking(const struct settings *s, qcow2_image *image, unsigned char *buffer, struct disk *disk, bool compare)
{
    for (uint64_t at = 0; at < s->size; at += s->block) {
        if (s->write) {
            check(qcow2_pwrite(image, disk->content + at, s->block, at, QCOW2_COMPRESSED), "writing");
            continue;
        }
        check(qcow2_pread(image, buffer, s->block, at, 0), "reading");
        if (compare && memcmp(buffer, disk->content + at, s->block) != 0)
            fail("wrong data", -EILSEQ);
    }
}

static void create(const struct settings *s, const struct disk *disk)
{
    qcow2_opts *opts = qcow2_opts_new();
    check(qcow2_opts_set_str(opts, "compression_type", s->zstd ? "zstd" : "zlib"), "option");
    check(qcow2_create(disk->path, s->size, opts, QCOW2_OVERWRITE), "creating");
    qcow2_opts_free(opts);
}

static void fill(const struct settings *s, const struct disk *disk)
{
    qcow2_image *image;
    create(s, disk);
    check(qcow2_open(disk->path, NULL, &image), "opening");
    for (uint64_t at = 0; at < s->size; at += 1 << 20)
        check(qcow2_pwrite(image, disk->content + at, 1 << 20, at, QCOW2_COMPRESSED), "writing");
    check(qcow2_close(image), "closing");
}

struct timing {
    double wall, cpu, flush;
};

static void run_ours(const struct settings *s, struct disk *disk, unsigned round, struct timing *timing)
{
    qcow2_image *image;
    qcow2_queue *queue = NULL;
    unsigned char *buffers = malloc((size_t)s->depth * s->block);
    memset(buffers, 1, (size_t)s->depth * s->block);
    if (s->write)
        create(s, disk);
    check(qcow2_open(disk->path, NULL, &image), "opening");
    if (!s->blocking)
        check(qcow2_queue_new(image, s->depth, backend(s), &queue), "queue");
    for (unsigned pass = s->write || round > 0; pass < 2; pass++) { /* the first reading round is one to compare */
        timing->wall = seconds(CLOCK_MONOTONIC), timing->cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        if (s->blocking)
            run_blocking(s, image, buffers, disk, pass == 0);
        else
            run_queue(s, queue, buffers, disk, pass == 0);
        timing->wall = seconds(CLOCK_MONOTONIC) - timing->wall, timing->cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - timing->cpu;
    }
    if (s->write) {
        timing->flush = seconds(CLOCK_MONOTONIC);
        check(qcow2_flush(image), "flushing");
        timing->flush = seconds(CLOCK_MONOTONIC) - timing->flush;
        unsigned char *found = malloc(1 << 20);
        for (uint64_t at = 0; at < s->size; at += 1 << 20) {
            check(qcow2_pread(image, found, 1 << 20, at, 0), "reading");
            if (memcmp(found, disk->content + at, 1 << 20) != 0)
                fail("wrong data was written", -EILSEQ);
        }
        free(found);
    }
    qcow2_queue_free(queue);
    check(qcow2_close(image), "closing");
    free(buffers);
}

static void run(const struct settings *s, struct disk *disk)
{
    prepare(s, disk);
    if (!s->write)
        fill(s, disk);
    for (unsigned round = 0; round < s->rounds; round++) {
        for (unsigned turn = 0; turn < 2; turn++) {
            bool ours = (round + turn) % 2 == 0;
            const char *name = ours ? "ours" : "raw";
            struct timing timing = { 0 };
            if (s->only != NULL && strcmp(s->only, name) != 0)
                continue;
            if (ours) {
                run_ours(s, disk, round, &timing);
            } else {
                timing.wall = seconds(CLOCK_MONOTONIC), timing.cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
                run_codec(s, disk);
                timing.wall = seconds(CLOCK_MONOTONIC) - timing.wall, timing.cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - timing.cpu;
            }
            printf("{\"side\": \"%s\", \"round\": %u, \"ops\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"seconds\": %.9f, "
                   "\"cpu_seconds\": %.9f, \"flush_seconds\": %.9f, \"heap_calls\": 0}\n",
                   name, round, s->size / s->block, s->size, timing.wall, timing.cpu, timing.flush);
            fflush(stdout);
        }
    }
}

static int usage(void)
{
    fprintf(stderr, "usage: compressed read|write DIRECTORY [method=zlib|zstd] [depth=N] [block=BYTES] [rounds=N] [size_mib=N]\n"
                    "                  [threads=N] [blocking=1] [backend=threads] [only=ours|raw]\n");
    return 2;
}

int main(int argc, char **argv)
{
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    struct settings s = { .depth = 8, .rounds = 1, .block = 1 << 20, .size = 128 << 20, .threads = processors > 0 ? (unsigned)processors : 1 };
    if (argc < 3 || (strcmp(argv[1], "read") != 0 && strcmp(argv[1], "write") != 0))
        return usage();
    s.write = argv[1][0] == 'w';
    for (int i = 3; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        if (value == NULL)
            return usage();
        *value++ = '\0';
        uint64_t number = strtoull(value, NULL, 0);
        if (strcmp(argv[i], "method") == 0)
            s.zstd = strcmp(value, "zstd") == 0;
        else if (strcmp(argv[i], "depth") == 0)
            s.depth = (unsigned)number;
        else if (strcmp(argv[i], "block") == 0)
            s.block = number;
        else if (strcmp(argv[i], "rounds") == 0)
            s.rounds = (unsigned)number;
        else if (strcmp(argv[i], "size_mib") == 0)
            s.size = number << 20;
        else if (strcmp(argv[i], "threads") == 0)
            s.threads = (unsigned)number;
        else if (strcmp(argv[i], "blocking") == 0)
            s.blocking = number != 0;
        else if (strcmp(argv[i], "backend") == 0)
            s.backend = value;
        else if (strcmp(argv[i], "only") == 0)
            s.only = value;
        else
            return usage();
    }
    bool fits = s.block > 0 && s.size > 0 && s.size % s.block == 0 && (!s.write || s.block % CLUSTER == 0);
    if (s.depth == 0 || s.depth > DEPTH_MAX || s.threads == 0 || s.threads > THREADS_MAX || !fits)
        return usage();
    struct disk disk = { 0 };
    snprintf(disk.path, sizeof disk.path, "%s/compressed.qcow2", argv[2]);
    run(&s, &disk);
    free(disk.content), free(disk.packed), free(disk.length);
    return 0;
}
