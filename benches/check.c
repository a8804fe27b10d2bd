/* What a check costs: qcow2_check beside the least that any check has to do (read the L1 table, the L2 tables and the
 * refcount blocks, count each cluster in two bytes, compare), and beside `qemu-img check`.
 *
 *     make bench-check                  a million allocated clusters, and sixteen
 *     build/bench-check IMAGE ROUNDS    any sound image of version 3 without snapshots, 16-bit refcounts
 *
 * The three take turns; medians of the wall clock, and the median of the ratios of neighbouring rounds. */
#include <endian.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <qcow2.h>

#define ROUNDS_MAX 200

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
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

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *values, int n)
{
    double sorted[ROUNDS_MAX];
    memcpy(sorted, values, (size_t)n * sizeof(*values));
    qsort(sorted, (size_t)n, sizeof(*sorted), by_size);
    return sorted[n / 2];
}

int main(int argc, char **argv)
{
    int rounds = argc > 2 ? atoi(argv[2]) : 11;
    if (argc < 2 || rounds < 1 || rounds > ROUNDS_MAX) {
        fprintf(stderr, "usage: %s IMAGE [ROUNDS]\n", argv[0]);
        return 2;
    }
    char command[4096];
    snprintf(command, sizeof(command), "qemu-img check -q -f qcow2 '%s' >/dev/null 2>&1", argv[1]);
    int have_qemu = system("qemu-img --version >/dev/null 2>&1") == 0;
    double ours[ROUNDS_MAX], minimum[ROUNDS_MAX], theirs[ROUNDS_MAX], to_minimum[ROUNDS_MAX], to_theirs[ROUNDS_MAX];
    struct qcow2_check_result result;
    for (int i = -1; i < rounds; i++) { /* the first round warms up */
        int at = i < 0 ? 0 : i;
        double start = now();
        if (qcow2_check(argv[1], NULL, 0, &result, sizeof(result)) != 0 || result.corruptions + result.leaks > 0) {
            fprintf(stderr, "%s: %s\n", argv[1], qcow2_last_error());
            return 1;
        }
        ours[at] = now() - start;
        start = now();
        if (least(argv[1]) != 0) {
            fprintf(stderr, "the minimal pass finds counts that differ\n");
            return 1;
        }
        minimum[at] = now() - start;
        start = now();
        if (have_qemu && system(command) != 0)
            return 1;
        theirs[at] = now() - start;
        to_minimum[at] = ours[at] / minimum[at];
        to_theirs[at] = theirs[at] / ours[at];
    }
    printf("%9llu clusters: qcow2_check %.2f ms, minimal pass %.2f ms, ratio %.2f",
           (unsigned long long)result.allocated_clusters, median(ours, rounds) * 1e3, median(minimum, rounds) * 1e3,
           median(to_minimum, rounds));
    if (have_qemu)
        printf("; qemu-img check %.1f ms, %.1f times ours", median(theirs, rounds) * 1e3, median(to_theirs, rounds));
    printf("\n");
    return 0;
}
