/* Scenarios Q: copy-on-write of clusters that an internal snapshot shares. Writes into c0 to c5, zeroes into c6 to
 * c9; the snapshot, and what is zero in the active state alone, are read back by QEMU. */
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

/* c6, c7 and c9 stay shared: there the entry alone says what is zero. In c8 half of an allocated subcluster becomes
 * zero, which has to be written into a copy. */
static const struct { uint64_t cluster, at, length; bool shared; uint32_t alloc, zero; } zeroes[] = {
    {6, 30 * 1024, 3 * 1024, true, 1u << 13 | 1u << 18, 1u << 7 | 1u << 15 | 1u << 16},
    {7, 26 * 1024, 2 * 1024, true, 1u << 18, 1u << 7 | 1u << 13},
    {8, 26 * 1024, 1024, false, 0x7e000, 1u << 7},
    {9, 12 * 1024, 1024, true, 1u << 13 | 1u << 18, 1u << 6 | 1u << 7},
};

static uint64_t hosts_of_snapshot[10];

static void expect_zeroed_entries(void)
{
    for (size_t i = 0; i < sizeof(zeroes) / sizeof(zeroes[0]); i++) {
        uint64_t n = zeroes[i].cluster, at = l2_entry_at("disk.qcow2", n);
        uint64_t descriptor = peek("disk.qcow2", at, 8), bitmap = peek("disk.qcow2", at + 8, 8);
        if (bitmap != ((uint64_t)zeroes[i].zero << 32 | zeroes[i].alloc))
            FAIL("c%" PRIu64 ": bitmap %016" PRIx64, n, bitmap);
        if (zeroes[i].shared ? descriptor != hosts_of_snapshot[n] : kind(descriptor) != COPIED)
            FAIL("c%" PRIu64 ": descriptor %016" PRIx64, n, descriptor);
    }
}

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
    qcow2_image *image = open_image("disk.qcow2");
    for (uint64_t n = 0; n < 10; n++) {
        OK(qcow2_write_zeroes(image, n * CLUSTER + 7 * SUB, SUB, 0));
        write_pattern(image, 0xd0 + (int)n, n * CLUSTER + 13 * SUB, SUB);
        write_pattern(image, 0xe0 + (int)n, n * CLUSTER + 18 * SUB, SUB);
    }
    OK(qcow2_close(image));
    for (uint64_t n = 0; n < 10; n++)
        expect_entry("Q", "disk.qcow2", n, COPIED, UINT64_C(0x0000008000042000));
    for (uint64_t n = 0; n < 10; n++)
        hosts_of_snapshot[n] = peek("disk.qcow2", l2_entry_at("disk.qcow2", n), 8) & ~COPIED;
    CHECK(shell("qemu-img snapshot -c s disk.qcow2"));

    image = open_image("disk.qcow2");
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

    image = open_image("disk.qcow2");
    for (size_t i = 0; i < sizeof(zeroes) / sizeof(zeroes[0]); i++)
        OK(qcow2_write_zeroes(image, zeroes[i].cluster * CLUSTER + zeroes[i].at, zeroes[i].length, 0));
    expect_pattern(image, 0, 414 * 1024, 3 * 1024);
    expect_pattern(image, 0xd6, 6 * CLUSTER + 13 * SUB, SUB);
    expect_pattern(image, 0, 474 * 1024, 2048);
    expect_pattern(image, 0, 538 * 1024, 1024);
    expect_pattern(image, 0xd8, 539 * 1024, 1024);
    OK(qcow2_flush(image));
    expect_zeroed_entries();
    /* A write into a cluster that is still shared after only its bitmap was changed. */
    write_pattern(image, 0x66, 6 * CLUSTER + 15 * SUB, 512);
    expect_pattern(image, 0, 6 * CLUSTER + 15 * SUB + 512, SUB - 512);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    expect_snapshot();
    return 0;
}
