/* Scenarios I: discards of clusters whose bitmap is filled in part. What is discarded never shows the backing file
 * again, and neither does what is cut off and comes back (I4). */
#include "test.h"

#define DISK (1 << 20)
#define CLUSTER 65536
#define HALF_ZERO UINT64_C(0x0000ffff00000000)
#define ALL_ZERO UINT64_C(0xffffffff00000000)

static void discard(uint64_t offset, uint64_t length)
{
    qcow2_image *image = open_image("disk.qcow2");
    OK(qcow2_discard(image, offset, length, 0));
    expect_pattern(image, 0, offset, length);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
}

static void expect_pattern_in_file(int pattern, uint64_t offset, size_t length)
{
    qcow2_image *image = open_image("disk.qcow2");
    expect_pattern(image, pattern, offset, length);
    OK(qcow2_close(image));
}

static void run(bool backing)
{
    const char *with[] = {"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL};
    const char *without[] = {"extended_l2=on", NULL};
    int below = backing ? 0xff : 0;
    fill_file("base.raw", 0xff, DISK);
    unlink("disk.qcow2");
    create_image("disk.qcow2", DISK, backing ? with : without);
    qcow2_image *image = open_image("disk.qcow2");
    write_pattern(image, 1, 0, 2 * CLUSTER);
    OK(qcow2_close(image));

    discard(0, 2 * CLUSTER);
    expect_entry("I1", "disk.qcow2", 0, 0, ALL_ZERO);
    expect_entry("I1", "disk.qcow2", 1, 0, ALL_ZERO);

    poke("disk.qcow2", l2_entry_at("disk.qcow2", 0) + 8, 2, 0);
    expect_entry("I2", "disk.qcow2", 0, 0, HALF_ZERO);
    expect_pattern_in_file(0, 0, CLUSTER / 2);
    expect_pattern_in_file(below, CLUSTER / 2, CLUSTER / 2);

    discard(0, CLUSTER);
    expect_entry("I3", "disk.qcow2", 0, 0, backing ? ALL_ZERO : HALF_ZERO);
    expect_pattern_in_file(below, 2 * CLUSTER, DISK - 2 * CLUSTER);

    image = open_image("disk.qcow2");
    OK(qcow2_resize(image, CLUSTER, NULL, QCOW2_ALLOW_SHRINK));
    CHECK(qcow2_size(image) == CLUSTER);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    image = open_image("disk.qcow2");
    OK(qcow2_resize(image, DISK, NULL, 0));
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    expect_entry("I4", "disk.qcow2", 1, 0, backing ? ALL_ZERO : 0);
    expect_pattern_in_file(0, CLUSTER, DISK - CLUSTER);
    discard(CLUSTER, CLUSTER);
    expect_entry("I4, discarded again", "disk.qcow2", 1, 0, backing ? ALL_ZERO : 0);
}

int main(void)
{
    run(true);
    run(false);
    return 0;
}
