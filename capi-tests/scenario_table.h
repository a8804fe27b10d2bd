/* Runs the steps of a table in scenarios/ (step, backing, op, offset, length, cluster, entry, bitmap), each as one
 * open, one request and one close, and checks after each: the L2 entries, the data against a shadow, qemu-img check. */
#ifndef SCENARIO_TABLE_H
#define SCENARIO_TABLE_H

#include "test.h"

#define DISK_MAX (4 << 20)

static uint8_t shadow[DISK_MAX], guest[DISK_MAX];
static size_t disk;

/* Where our entry is another one than QEMU's: this one and no other (docs/divergences.md says why). */
static const struct { const char *step; uint64_t cluster, kind, bitmap; } ours[] = {
    {"E13", 22, 0, UINT64_C(0xffffffff00000000)},
    {"E14", 24, COPIED, UINT64_C(0xffff00000000ffff)},
    {"E14", 25, 0, UINT64_C(0xffffffff00000000)},
    {"H13", 22, 0, UINT64_C(0xffffffff00000000)},
    {"H14", 24, COPIED, UINT64_C(0xffff00000000ffff)},
    {"H14", 25, 0, UINT64_C(0xffffffff00000000)},
};

static void request(const char *op, uint64_t offset, uint64_t length, int pattern)
{
    qcow2_image *image = open_image("disk.qcow2");
    uint8_t *bytes = malloc(length);
    memset(bytes, pattern, length);
    if (strcmp(op, "write") == 0 || strcmp(op, "write compressed") == 0) {
        OK(qcow2_pwrite(image, bytes, length, offset, strcmp(op, "write") == 0 ? 0 : QCOW2_COMPRESSED));
    } else {
        pattern = 0;
        if (strcmp(op, "zero") == 0)
            OK(qcow2_write_zeroes(image, offset, length, 0));
        else if (strcmp(op, "zero+unmap") == 0)
            OK(qcow2_write_zeroes(image, offset, length, QCOW2_MAY_UNMAP));
        else if (strcmp(op, "discard") == 0)
            OK(qcow2_discard(image, offset, length, 0));
        else
            FAIL("unknown request '%s'", op);
    }
    free(bytes);
    OK(qcow2_close(image));
    memset(shadow + offset, pattern, length);
}

static void expect_data(const char *step)
{
    qcow2_image *image = open_image("disk.qcow2");
    OK(qcow2_pread(image, guest, disk, 0, 0));
    OK(qcow2_close(image));
    for (size_t at = 0; at < disk; at++)
        if (guest[at] != shadow[at])
            FAIL("%s: guest byte %zu is 0x%02x instead of 0x%02x", step, at, guest[at], shadow[at]);
    write_file("shadow.raw", shadow, disk);
    if (have_qemu() && !shell("qemu-img compare -q -f qcow2 -F raw disk.qcow2 shadow.raw"))
        FAIL("%s: qemu-img compare finds other data than we do", step);
}

/* The entry is QEMU's, or, where `ours` has it, just that one. */
static void expect_row(const char *step, uint64_t cluster, uint64_t entry, uint64_t bitmap)
{
    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++)
        if (strcmp(ours[i].step, step) == 0 && ours[i].cluster == cluster) {
            expect_entry(step, "disk.qcow2", cluster, ours[i].kind, ours[i].bitmap);
            return;
        }
    expect_entry(step, "disk.qcow2", cluster, kind(entry), bitmap);
}

/* The rows of the table that are for this run (with a backing file or without), on a new disk of `size` bytes; fails
 * unless there are so many steps. */
static void run_table(const char *table, bool backing, size_t size, int steps_expected)
{
    char path[512], line[256], step[16], op[32], previous[16] = "";
    const char *with[] = {"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL};
    const char *without[] = {"extended_l2=on", NULL};
    int row_backing, steps = 0;
    uint64_t offset, length, cluster, entry, bitmap;

    disk = size;
    CHECK(disk <= DISK_MAX);
    fill_file("base.raw", 0xff, disk);
    unlink("disk.qcow2");
    create_image("disk.qcow2", disk, backing ? with : without);
    memset(shadow, backing ? 0xff : 0, disk);
    snprintf(path, sizeof(path), "%s/%s", getenv("SCENARIOS"), table);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL && fgets(line, sizeof(line), file) != NULL);
    while (fgets(line, sizeof(line), file) != NULL) {
        int n = sscanf(line, "%15[^\t]\t%d\t%31[^\t]\t%" SCNu64 "\t%" SCNu64 "\t%" SCNu64 "\t%" SCNx64 "\t%" SCNx64, step,
                       &row_backing, op, &offset, &length, &cluster, &entry, &bitmap);
        CHECK(n == 8 && offset + length <= disk);
        if (row_backing != backing)
            continue;
        if (strcmp(step, previous) != 0) {
            strcpy(previous, step);
            request(op, offset, length, ++steps);
            check_image("disk.qcow2");
            expect_data(step);
        }
        expect_row(step, cluster, entry, bitmap);
    }
    fclose(file);
    if (steps != steps_expected)
        FAIL("%s has %d steps instead of %d", table, steps, steps_expected);
}

#endif
