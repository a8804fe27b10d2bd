/*
 * What a write into the middle of a subcluster does to a qcow2 image with extended_l2.
 *
 *     subcluster_write OVERLAY EXPECTED
 *
 * OVERLAY is an image with extended_l2=on over a backing file; it is created (over base.raw beside it) if it does not
 * exist. EXPECTED is a raw file with the same guest data: it gets the same writes, so that others can compare.
 * Each situation writes from the middle of subcluster #3 to the end of a cluster, and shows the cluster before and
 * after, as the L2 entry in the file has it and as qcow2_map() tells it.
 */
#define _POSIX_C_SOURCE 200809L

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <qcow2.h>

#define CLUSTER 65536
#define CELLS 32
#define SUBCLUSTER (CLUSTER / CELLS)
#define FROM (3 * SUBCLUSTER + SUBCLUSTER / 2)
#define DISK (8 * CLUSTER)

#define ALLOCATED '#'
#define ZERO '0'
#define BACKING '.'

static qcow2_image *image;
static int image_file, expected_file;

static void must(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "%s: %s\n", what, qcow2_last_error());
        exit(1);
    }
}

static void give_up(const char *what)
{
    perror(what);
    exit(1);
}

/* A big-endian number of the image file; 0 past its end. */
static uint64_t number_at(uint64_t offset, int bytes)
{
    uint8_t raw[8] = {0};
    uint64_t value = 0;
    if (pread(image_file, raw, (size_t)bytes, (off_t)offset) < 0)
        give_up("reading the image file");
    for (int i = 0; i < bytes; i++)
        value = value << 8 | raw[i];
    return value;
}

/* The L2 entry of a cluster, found as the format says: header, L1 table, L2 table. Two words of 8 bytes: where the
 * cluster is, and the bitmap (bit n: subcluster n is allocated, bit 32 + n: it reads as zero). */
static void l2_entry(uint64_t cluster, uint64_t *descriptor, uint64_t *bitmap)
{
    uint64_t entries = CLUSTER / 16, l1 = number_at(40, 8);
    uint64_t l2 = number_at(l1 + cluster / entries * 8, 8) & UINT64_C(0x00fffffffffffe00);
    *descriptor = l2 == 0 ? 0 : number_at(l2 + cluster % entries * 16, 8);
    *bitmap = l2 == 0 ? 0 : number_at(l2 + cluster % entries * 16 + 8, 8);
}

static void cells_of_entry(uint64_t bitmap, char *cells)
{
    for (int i = 0; i < CELLS; i++)
        cells[i] = bitmap >> i & 1 ? ALLOCATED : bitmap >> (CELLS + i) & 1 ? ZERO : BACKING;
    cells[CELLS] = 0;
}

/* The same from the library: what is not in the image itself (depth 0) shows through. */
static void cells_of_map(uint64_t cluster, char *cells)
{
    struct qcow2_extent extents[CELLS];
    size_t n;
    must(qcow2_map(image, cluster * CLUSTER, CLUSTER, 0, extents, CELLS, &n), "qcow2_map");
    for (size_t i = 0; i < n; i++) {
        uint64_t first = (extents[i].start - cluster * CLUSTER) / SUBCLUSTER, count = extents[i].length / SUBCLUSTER;
        char cell = extents[i].depth > 0 || !(extents[i].flags & QCOW2_EXTENT_PRESENT) ? BACKING
                    : extents[i].flags & QCOW2_EXTENT_ZERO                            ? ZERO
                                                                                      : ALLOCATED;
        memset(cells + first, cell, count);
    }
    cells[CELLS] = 0;
}

static struct qcow2_stats stats(void)
{
    struct qcow2_stats now;
    must(qcow2_get_stats(image, &now, sizeof(now)), "qcow2_get_stats");
    return now;
}

/* One write, to the image and to the file that says what has to come out. */
static void write_both(uint64_t offset, size_t length, int byte)
{
    static uint8_t bytes[CLUSTER];
    memset(bytes, byte, length);
    must(qcow2_pwrite(image, bytes, length, offset, 0), "qcow2_pwrite");
    if (pwrite(expected_file, bytes, length, (off_t)offset) != (ssize_t)length)
        give_up("writing the expected data");
}

static void show(const char *title, const char *cells)
{
    printf("    %-8s [", title);
    for (int i = 0; i < CELLS; i++)
        printf("%c%s", cells[i], i % 8 == 7 && i + 1 < CELLS ? " " : "");
    printf("]");
}

static void situation(const char *title, uint64_t cluster, const char *why)
{
    char before[CELLS + 1], after[CELLS + 1], mapped[CELLS + 1], written[CELLS + 1];
    uint64_t descriptor, bitmap, old_descriptor, old_bitmap;
    memset(written, ' ', 3);
    written[3] = '>';
    memset(written + 4, '=', CELLS - 4);

    must(qcow2_flush(image), "qcow2_flush");
    l2_entry(cluster, &old_descriptor, &old_bitmap);
    cells_of_entry(old_bitmap, before);
    struct qcow2_stats first = stats();
    write_both(cluster * CLUSTER + FROM, CLUSTER - FROM, 'A' + (int)cluster);
    struct qcow2_stats then = stats();
    must(qcow2_flush(image), "qcow2_flush");
    l2_entry(cluster, &descriptor, &bitmap);
    cells_of_entry(bitmap, after);
    cells_of_map(cluster, mapped);

    printf("\n%s\n", title);
    show("before", before);
    printf("\n");
    show("write", written);
    printf("\n");
    show("after", after);
    printf("  %s\n", strcmp(after, mapped) == 0 ? "(qcow2_map agrees)" : "BUT qcow2_map SAYS:");
    if (strcmp(after, mapped) != 0) {
        show("map", mapped);
        printf("\n");
        exit(1);
    }
    printf("    L2 entry  %016" PRIx64 " %016" PRIx64 "%s\n", descriptor, bitmap,
           descriptor == old_descriptor && bitmap == old_bitmap ? "  (not touched)" : "");
    printf("    copied    %" PRIu64 " bytes, zero-filled %" PRIu64 ": %s\n", then.copied_bytes - first.copied_bytes,
           then.zero_filled_bytes - first.zero_filled_bytes, why);
}

int main(int argc, char **argv)
{
    qcow2_opts *opts = qcow2_opts_new();
    if (argc != 3) {
        fprintf(stderr, "usage: %s OVERLAY EXPECTED\n", argv[0]);
        return 2;
    }
    if (access(argv[1], F_OK) != 0) {
        qcow2_opts *format = qcow2_opts_new();
        must(qcow2_opts_set_bool(format, "extended_l2", 1), "extended_l2");
        must(qcow2_opts_set_str(format, "backing_file", "base.raw"), "backing_file");
        must(qcow2_opts_set_str(format, "backing_fmt", "raw"), "backing_fmt");
        must(qcow2_create(argv[1], DISK, format, 0), "qcow2_create");
        qcow2_opts_free(format);
    }
    /* Other files are opened only where the program allows it. */
    must(qcow2_opts_set_str(opts, "backing", "relative"), "backing");
    must(qcow2_open(argv[1], opts, &image), "qcow2_open");
    qcow2_opts_free(opts);
    image_file = open(argv[1], O_RDONLY);
    expected_file = open(argv[2], O_WRONLY);
    if (image_file < 0 || expected_file < 0)
        give_up(image_file < 0 ? argv[1] : argv[2]);

    printf("libqcow2 %s: writing from the middle of subcluster #3 to the end of its cluster\n", qcow2_version_string());
    printf("    A cluster is 32 subclusters of %d bytes:\n", SUBCLUSTER);
    printf("    %c allocated in the image   %c reads as zero   %c the backing file shows through\n", ALLOCATED, ZERO, BACKING);

    situation("1. A new cluster", 0, "the head of #3, from the backing file; #0 to #2 stay there");
    write_both(1 * CLUSTER + 8 * SUBCLUSTER, 4 * SUBCLUSTER, '1');
    situation("2.1 A cluster that is ours, with #3 not allocated", 1, "the head of #3, from the backing file");
    uint64_t descriptor, bitmap;
    l2_entry(2, &descriptor, &bitmap);
    if (bitmap >> (CELLS + 3) & 1)
        situation("2.1 A cluster that is ours, with #3 reading as zero", 2, "the head of #3");
    write_both(3 * CLUSTER + 2 * SUBCLUSTER, 3 * SUBCLUSTER, '2');
    situation("2.2 A cluster that is ours, with #3 allocated", 3, "only the bitmap gains #5 to #31");
    situation("2.2 The same again, with all of them allocated", 3, "no metadata changes either");

    must(qcow2_close(image), "qcow2_close");
    close(image_file);
    close(expected_file);
    return 0;
}
