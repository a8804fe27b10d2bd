/* Runs the steps of a table in scenarios/ (step, backing, op, offset, length, cluster, entry, bitmap), each as one
 * open, one request and one close, and checks after each: the L2 entries, the data against a shadow, qemu-img check.
 * Requests that the library does not have yet (zero, discard, compressed) are made by qemu-io in between. */
#ifndef SCENARIO_TABLE_H
#define SCENARIO_TABLE_H

#include "test.h"

#define DISK (1 << 20)

static uint8_t shadow[DISK], guest[DISK];

static void by_qemu_io(const char *command)
{
    if (!shell("qemu-io -f qcow2 -c '%s' disk.qcow2 >qemu-io.log 2>&1 || { cat qemu-io.log >&2; false; }", command))
        FAIL("qemu-io: %s", command);
}

static void request(const char *op, uint64_t offset, uint64_t length, int pattern)
{
    char command[128];
    if (strcmp(op, "write") == 0) {
        qcow2_image *image = open_image("disk.qcow2");
        write_pattern(image, pattern, offset, length);
        OK(qcow2_close(image));
    } else if (strcmp(op, "write compressed") == 0) {
        snprintf(command, sizeof(command), "write -c -P %d %" PRIu64 " %" PRIu64, pattern, offset, length);
        by_qemu_io(command);
    } else {
        const char *verb = strcmp(op, "zero") == 0 ? "write -z" : strcmp(op, "zero+unmap") == 0 ? "write -z -u" : "discard";
        CHECK(strcmp(verb, "discard") != 0 || strcmp(op, "discard") == 0);
        snprintf(command, sizeof(command), "%s %" PRIu64 " %" PRIu64, verb, offset, length);
        by_qemu_io(command);
        pattern = 0;
    }
    memset(shadow + offset, pattern, length);
}

static void expect_data(const char *step)
{
    qcow2_image *image = open_image("disk.qcow2");
    OK(qcow2_pread(image, guest, DISK, 0, 0));
    OK(qcow2_close(image));
    for (size_t at = 0; at < DISK; at++)
        if (guest[at] != shadow[at])
            FAIL("%s: guest byte %zu is 0x%02x instead of 0x%02x", step, at, guest[at], shadow[at]);
    write_file("shadow.raw", shadow, DISK);
    if (!shell("qemu-img compare -q -f qcow2 -F raw disk.qcow2 shadow.raw"))
        FAIL("%s: qemu-img compare finds other data than we do", step);
}

/* The rows of the table that are for this run (with a backing file or without); returns how many steps. */
static int run_table(const char *table, bool backing)
{
    char path[512], line[256], step[16], op[32], previous[16] = "";
    const char *with[] = {"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL};
    const char *without[] = {"extended_l2=on", NULL};
    int row_backing, steps = 0;
    uint64_t offset, length, cluster, entry, bitmap;

    fill_file("base.raw", 0xff, DISK);
    unlink("disk.qcow2");
    create_image("disk.qcow2", DISK, backing ? with : without);
    memset(shadow, backing ? 0xff : 0, DISK);
    snprintf(path, sizeof(path), "%s/%s", getenv("SCENARIOS"), table);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL && fgets(line, sizeof(line), file) != NULL);
    while (fgets(line, sizeof(line), file) != NULL) {
        int n = sscanf(line, "%15[^\t]\t%d\t%31[^\t]\t%" SCNu64 "\t%" SCNu64 "\t%" SCNu64 "\t%" SCNx64 "\t%" SCNx64, step,
                       &row_backing, op, &offset, &length, &cluster, &entry, &bitmap);
        CHECK(n == 8 && offset + length <= DISK);
        if (row_backing != backing)
            continue;
        if (strcmp(step, previous) != 0) {
            strcpy(previous, step);
            request(op, offset, length, ++steps);
            check_image("disk.qcow2");
            expect_data(step);
        }
        expect_entry(step, "disk.qcow2", cluster, kind(entry), bitmap);
    }
    fclose(file);
    return steps;
}

#endif
