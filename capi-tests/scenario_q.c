/* Scenarios Q: copy-on-write of clusters that an internal snapshot shares. c0 to c5 are ours; c6 to c9 zero parts of
 * shared clusters and are made by qemu-io on the same image. */
#include "test.h"

#define CLUSTER 65536
#define SUB 2048

/* Where ours may differ: which holes between the first and the last subcluster that matters become allocated is each
 * writer's own choice. These must be allocated, and nothing outside of `may`. */
static const struct { uint64_t at; uint32_t must, may; bool zero7; } writes[] = {
    {30 * 1024, 1u << 13 | 1u << 15 | 1u << 18, 0x7e000, true},
    {20 * 1024, 1u << 10 | 1u << 13 | 1u << 18, 0x7fc00, true},
    {40 * 1024, 1u << 13 | 1u << 18 | 1u << 20, 0x1fe000, true},
    {26 * 1024, 1u << 13 | 1u << 18, 0x7e000, true},
    {14 * 1024, 1u << 7 | 1u << 13 | 1u << 18, 0x7ff80, false},
    {1 * 1024, 1u << 0 | 1u << 13 | 1u << 18, 0x7ffff, false},
};

static void expect_snapshot(void)
{
    CHECK(shell("qemu-img convert -f qcow2 -l snapshot.name=s -O raw disk.qcow2 snapshot.raw"));
    for (uint64_t n = 0; n < 10; n++) {
        CHECK(peek("snapshot.raw", n * CLUSTER + 13 * SUB, 1) == 0xd0 + n);
        CHECK(peek("snapshot.raw", n * CLUSTER + 18 * SUB, 1) == 0xe0 + n);
        for (uint64_t sub = 0; sub < 32; sub++)
            CHECK(sub == 13 || sub == 18 || peek("snapshot.raw", n * CLUSTER + sub * SUB, 8) == 0);
    }
}

static void expect_cluster(qcow2_image *image, uint64_t n)
{
    uint64_t base = n * CLUSTER, at = base + writes[n].at;
    uint8_t bytes[CLUSTER];
    OK(qcow2_pread(image, bytes, sizeof(bytes), base, 0));
    for (uint64_t i = 0; i < CLUSTER; i++) {
        int expected = i / SUB == 13 ? 0xd0 + (int)n : i / SUB == 18 ? 0xe0 + (int)n : 0;
        if (base + i >= at && base + i < at + 1024)
            expected = 0xf0 + (int)n;
        if (bytes[i] != expected)
            FAIL("cluster %" PRIu64 ", byte %" PRIu64 " is 0x%02x instead of 0x%02x", n, i, bytes[i], expected);
    }
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", NULL};
    need_qemu();
    create_image("disk.qcow2", 1 << 20, settings);
    for (int n = 0; n < 10; n++)
        CHECK(shell("qemu-io -f qcow2 -c 'write -z %dk 2k' -c 'write -P %d %dk 2k' -c 'write -P %d %dk 2k' disk.qcow2 >/dev/null",
                    n * 64 + 14, 0xd0 + n, n * 64 + 26, 0xe0 + n, n * 64 + 36));
    CHECK(shell("qemu-img snapshot -c s disk.qcow2"));

    qcow2_image *image = open_image("disk.qcow2");
    for (uint64_t n = 0; n < 6; n++)
        write_pattern(image, 0xf0 + (int)n, n * CLUSTER + writes[n].at, 1024);
    for (uint64_t n = 0; n < 6; n++)
        expect_cluster(image, n);
    OK(qcow2_close(image));
    for (uint64_t n = 0; n < 6; n++) {
        uint64_t entry = l2_entry_at("disk.qcow2", n), bitmap = peek("disk.qcow2", entry + 8, 8);
        uint32_t alloc = (uint32_t)bitmap, zero = (uint32_t)(bitmap >> 32);
        CHECK(kind(peek("disk.qcow2", entry, 8)) == COPIED);
        if ((alloc & writes[n].must) != writes[n].must || (alloc & ~writes[n].may) != 0 || (alloc & zero) != 0)
            FAIL("c%" PRIu64 ": bitmap %016" PRIx64, n, bitmap);
        CHECK((zero >> 7 & 1) == writes[n].zero7);
    }
    check_image("disk.qcow2");
    expect_snapshot();

    CHECK(shell("qemu-io -f qcow2 -c 'write -z 414k 3k' -c 'write -z 474k 2k' -c 'write -z 538k 1k' -c 'write -z 588k 1k' "
                "disk.qcow2 >/dev/null"));
    image = open_image("disk.qcow2");
    expect_pattern(image, 0, 414 * 1024, 3 * 1024);
    expect_pattern(image, 0xd6, 6 * CLUSTER + 13 * SUB, SUB);
    expect_pattern(image, 0, 474 * 1024, 2048);
    expect_pattern(image, 0, 538 * 1024, 1024);
    expect_pattern(image, 0xd8, 539 * 1024, 1024);
    /* A write into clusters that are still shared after QEMU changed only their bitmaps. */
    write_pattern(image, 0x66, 6 * CLUSTER + 15 * SUB, 512);
    expect_pattern(image, 0, 6 * CLUSTER + 15 * SUB + 512, SUB - 512);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    expect_snapshot();
    return 0;
}
