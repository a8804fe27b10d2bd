/* Section 0: a write from the middle of subcluster #3 to the end of its cluster, into a new cluster (1), into one that
 * is ours with #3 not allocated (2.1) and allocated (2.2); mirrored at the tail; and what each copies. */
#include "test.h"

#define CLUSTER 65536
#define SUB 2048
#define MIDDLE (3 * SUB + 1024)

static qcow2_image *image;

static uint64_t copied(void)
{
    struct qcow2_stats stats;
    OK(qcow2_get_stats(image, &stats, sizeof(stats)));
    return stats.copied_bytes;
}

/* Writes in the middle of a cluster; checks the bytes copied for it and the entry that comes out. */
static void step(const char *name, uint64_t cluster, uint64_t from, uint64_t to, uint64_t copies, uint64_t bitmap)
{
    uint64_t before = copied();
    write_pattern(image, 0x55, cluster * CLUSTER + from, to - from);
    if (copied() - before != copies)
        FAIL("%s copied %" PRIu64 " bytes instead of %" PRIu64, name, copied() - before, copies);
    OK(qcow2_flush(image));
    expect_entry(name, "disk.qcow2", cluster, COPIED, bitmap);
    expect_pattern(image, 0x55, cluster * CLUSTER + from, to - from);
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL};
    fill_file("base.raw", 0xff, 8 * CLUSTER);
    create_image("disk.qcow2", 8 * CLUSTER, settings);
    image = open_image("disk.qcow2");

    step("1: new cluster", 0, MIDDLE, CLUSTER, 1024, 0xfffffff8);
    expect_pattern(image, 0xff, 0, MIDDLE);

    write_pattern(image, 0x11, CLUSTER + 10 * SUB, SUB);
    step("2.1: ours, #3 unallocated", 1, MIDDLE, CLUSTER, 1024, 0xfffffff8);
    expect_pattern(image, 0xff, CLUSTER, MIDDLE);

    write_pattern(image, 0x22, 2 * CLUSTER + 3 * SUB, SUB);
    step("2.2: ours, #3 allocated, others not", 2, MIDDLE, CLUSTER, 0, 0xfffffff8);
    expect_pattern(image, 0x22, 2 * CLUSTER + 3 * SUB, 1024);
    step("2.2: all allocated", 2, MIDDLE, CLUSTER, 0, 0xfffffff8);

    step("tail, new cluster", 3, 0, MIDDLE, 1024, 0x0000000f);
    expect_pattern(image, 0xff, 3 * CLUSTER + MIDDLE, CLUSTER - MIDDLE);
    step("both ends, ours", 3, 5 * SUB + 512, 9 * SUB + 512, 512 + 1536, 0x000003ef);
    step("inside one subcluster, new cluster", 4, MIDDLE, MIDDLE + 512, 1024 + 512, 0x00000008);

    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
