/*
 * What a check costs: `ours` is qcow2_check, `raw` the least that any check has to do: read the L1 table, the L2 tables
 * and the refcount blocks, count each cluster in two bytes, compare. They take turns; one JSON line for each side and
 * round goes to stdout, in which an operation is a whole check.
 *
 *     build/bench/check all IMAGE [rounds=N]    a sound image of version 3 without snapshots, 16-bit refcounts
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <qcow2.h>

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void *take(int fd, uint64_t offset, size_t length)
{
    char *bytes = malloc(length);
    if (bytes == NULL || pread(fd, bytes, length, (off_t)offset) < 0)
        exit(1);
    return bytes;
}

/* The least: no check of anything but the counts. Returns how many differ. */
static uint64_t least(const char *path)
{
    int fd = open(path, O_RDONLY);
    unsigned char *header = take(fd, 0, 104);
    uint64_t word;
    uint32_t half;
    memcpy(&half, header + 20, 4);
    unsigned bits = be32toh(half);
    memcpy(&half, header + 36, 4);
    uint64_t l1_entries = be32toh(half);
    memcpy(&word, header + 40, 8);
    uint64_t l1_offset = be64toh(word);
    memcpy(&word, header + 48, 8);
    uint64_t table_offset = be64toh(word);
    memcpy(&half, header + 56, 4);
    uint64_t table_clusters = be32toh(half);
    uint64_t size = (uint64_t)lseek(fd, 0, SEEK_END), cluster = 1ull << bits, clusters = (size + cluster - 1) >> bits;
    uint16_t *counts = calloc(clusters + 65536, 2);
    uint64_t *l1 = take(fd, l1_offset, l1_entries * 8), *l2 = malloc(cluster);
    counts[0]++;
    for (uint64_t at = l1_offset; at < l1_offset + l1_entries * 8; at += cluster)
        counts[at >> bits]++;
    for (uint64_t i = 0; i < l1_entries; i++) {
        uint64_t offset = be64toh(l1[i]) & 0x00fffffffffffe00;
        if (offset == 0)
            continue;
        counts[offset >> bits]++;
        if (pread(fd, l2, cluster, (off_t)offset) < 0)
            exit(1);
        for (uint64_t j = 0; j < cluster / 8; j++) {
            uint64_t data = be64toh(l2[j]) & 0x00fffffffffffe00;
            if (data != 0 && data >> bits < clusters)
                counts[data >> bits]++;
        }
    }
    for (uint64_t i = 0; i < table_clusters; i++)
        counts[(table_offset >> bits) + i]++;
    uint64_t *table = take(fd, table_offset, table_clusters << bits), per_block = cluster / 2, wrong = 0;
    for (uint64_t i = 0; i * per_block < clusters; i++)
        if (table[i] != 0)
            counts[be64toh(table[i]) >> bits]++;
    uint16_t *block = (uint16_t *)l2;
    for (uint64_t i = 0; i * per_block < clusters; i++) {
        memset(block, 0, cluster);
        if (table[i] != 0 && pread(fd, block, cluster, (off_t)be64toh(table[i])) < 0)
            exit(1);
        for (uint64_t j = 0; j < per_block && i * per_block + j < clusters; j++)
            wrong += be16toh(block[j]) != counts[i * per_block + j];
    }
    free(table), free(counts), free(l1), free(l2), free(header);
    close(fd);
    return wrong;
}

static void check_with_ours(const char *path)
{
    struct qcow2_check_result result;
    if (qcow2_check(path, NULL, 0, &result, sizeof(result)) == 0 && result.corruptions + result.leaks == 0)
        return;
    fprintf(stderr, "check: %s: %s\n", path, qcow2_last_error());
    exit(1);
}

static void check_with_least(const char *path)
{
    if (least(path) == 0)
        return;
    fprintf(stderr, "check: %s: the minimal pass finds counts that differ\n", path);
    exit(1);
}

int main(int argc, char **argv)
{
    static const char *const names[] = { "ours", "raw" };
    int rounds = argc > 3 && sscanf(argv[3], "rounds=%d", &rounds) == 1 ? rounds : 1;
    if (argc < 3 || argc > 4 || strcmp(argv[1], "all") != 0 || rounds < 1) {
        fprintf(stderr, "usage: check all IMAGE [rounds=N]\n");
        return 2;
    }
    check_with_ours(argv[2]); /* what is read first comes from the page cache for both */
    for (int round = 0; round < rounds; round++)
        for (int turn = 0; turn < 2; turn++) {
            int side = (round + turn) % 2;
            double start = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
            (side == 0 ? check_with_ours : check_with_least)(argv[2]);
            printf("{\"side\": \"%s\", \"round\": %d, \"ops\": 1, \"bytes\": 0, \"seconds\": %.9f, \"cpu_seconds\": %.9f, "
                   "\"flush_seconds\": 0, \"heap_calls\": 0}\n",
                   names[side], round, now(CLOCK_MONOTONIC) - start, now(CLOCK_PROCESS_CPUTIME_ID) - cpu);
            fflush(stdout);
        }
    return 0;
}
