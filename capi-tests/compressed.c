/* QCOW2_COMPRESSED: what is stored, in every state that a cluster can be in, with both methods; what is refused. */
#include <sys/stat.h>
#include <sys/uio.h>

#include "test.h"

#define CLUSTER 65536

static uint8_t bytes[4 * CLUSTER];

/* One cluster: as qcow2_map() has it. */
static void expect_kind(qcow2_image *image, uint64_t cluster, uint64_t wanted)
{
    struct qcow2_extent extent;
    size_t n = 0;
    OK(qcow2_map(image, cluster * CLUSTER, 512, 0, &extent, 1, &n));
    uint64_t kind = extent.flags & (QCOW2_EXTENT_DATA | QCOW2_EXTENT_COMPRESSED | QCOW2_EXTENT_ZERO);
    if (n != 1 || kind != wanted)
        FAIL("cluster %" PRIu64 " has flags 0x%" PRIx64 " instead of 0x%" PRIx64, cluster, kind, wanted);
}

static const uint64_t IS_COMPRESSED = QCOW2_EXTENT_DATA | QCOW2_EXTENT_COMPRESSED;

static off_t size_of(const char *path)
{
    struct stat facts;
    CHECK(stat(path, &facts) == 0);
    return facts.st_size;
}

static void clusters_of_each_kind(const char *method, const char *extended)
{
    char type[32], subclusters[32];
    const char *settings[] = {type, subclusters, NULL};
    snprintf(type, sizeof(type), "compression_type=%s", method);
    snprintf(subclusters, sizeof(subclusters), "extended_l2=%s", extended);
    unlink("disk.qcow2");
    create_image("disk.qcow2", 64 * CLUSTER + 1024, settings);
    qcow2_image *image = open_image("disk.qcow2");
    off_t empty = size_of("disk.qcow2");

    /* Text, zeroes, noise, text: compressed, zero, plain, compressed. */
    uint32_t word = 1;
    for (size_t at = 0; at < sizeof(bytes); at++) {
        word = word * 1664525 + 1013904223;
        bytes[at] = at / CLUSTER == 2 ? (uint8_t)(word >> 24) : at / CLUSTER == 1 ? 0 : (uint8_t)"compressed "[at % 11];
    }
    struct iovec iov[] = {{bytes, 1000}, {bytes + 1000, sizeof(bytes) - 1000}};
    OK(qcow2_pwritev(image, iov, 2, 8 * CLUSTER, QCOW2_COMPRESSED | QCOW2_FUA));
    expect_kind(image, 8, IS_COMPRESSED);
    expect_kind(image, 9, QCOW2_EXTENT_ZERO);
    expect_kind(image, 10, QCOW2_EXTENT_DATA);
    expect_kind(image, 11, IS_COMPRESSED);
    static uint8_t found[sizeof(bytes)];
    OK(qcow2_pread(image, found, sizeof(found), 8 * CLUSTER, 0));
    CHECK(memcmp(found, bytes, sizeof(bytes)) == 0);

    /* Over what is there, and a part of what is compressed. */
    OK(qcow2_pwrite(image, bytes, 2 * CLUSTER, 10 * CLUSTER, QCOW2_COMPRESSED));
    expect_kind(image, 10, IS_COMPRESSED);
    expect_kind(image, 11, QCOW2_EXTENT_ZERO);
    write_pattern(image, 7, 8 * CLUSTER + 100, 100);
    expect_kind(image, 8, QCOW2_EXTENT_DATA);
    expect_pattern(image, 7, 8 * CLUSTER + 100, 100);
    OK(qcow2_pread(image, found, 100, 8 * CLUSTER, 0));
    CHECK(memcmp(found, bytes, 100) == 0);

    /* Many of them in little space; and the end of the image, which is no whole cluster. */
    memset(bytes, 9, sizeof(bytes));
    for (uint64_t cluster = 16; cluster < 60; cluster += 4)
        OK(qcow2_pwrite(image, bytes, sizeof(bytes), cluster * CLUSTER, QCOW2_COMPRESSED));
    OK(qcow2_pwrite(image, bytes, 1024, 64 * CLUSTER, QCOW2_COMPRESSED));
    expect_kind(image, 64, IS_COMPRESSED);
    expect_pattern(image, 9, 16 * CLUSTER, 44 * CLUSTER);
    OK(qcow2_close(image));
    CHECK(size_of("disk.qcow2") <= empty + 8 * CLUSTER);
    check_image("disk.qcow2");
    if (have_qemu())
        CHECK(shell("qemu-io -f qcow2 -r -c 'read -P 9 1M 2752k' -c 'read -P 9 4M 1k' -c 'read -P 7 524388 100' disk.qcow2 >/dev/null"));
}

static void what_is_refused(void)
{
    unlink("disk.qcow2");
    create_image("disk.qcow2", 4 * CLUSTER + 1024, NULL);
    qcow2_image *image = open_image("disk.qcow2");
    FAILS(qcow2_pwrite(image, bytes, CLUSTER, 512, QCOW2_COMPRESSED), EINVAL, QCOW2_ERR_ARGUMENT, "offset");
    FAILS(qcow2_pwrite(image, bytes, CLUSTER + 1, 0, QCOW2_COMPRESSED), EINVAL, QCOW2_ERR_ARGUMENT, "length");
    FAILS(qcow2_pwrite(image, bytes, 512, 4 * CLUSTER, QCOW2_COMPRESSED), EINVAL, QCOW2_ERR_ARGUMENT, "length");
    FAILS(qcow2_pwrite(image, bytes, 2048, 4 * CLUSTER, QCOW2_COMPRESSED), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "end");
    FAILS(qcow2_write_zeroes(image, 0, CLUSTER, QCOW2_COMPRESSED), EINVAL, QCOW2_ERR_ARGUMENT, "0x8");
    OK(qcow2_pwrite(image, NULL, 0, CLUSTER, QCOW2_COMPRESSED));
    expect_pattern(image, 0, 0, 4 * CLUSTER + 1024);
    OK(qcow2_close(image));
}

int main(void)
{
    CHECK(qcow2_has_feature("write_compressed") == 1);
    clusters_of_each_kind("zlib", "off");
    clusters_of_each_kind("zlib", "on");
    if (qcow2_has_feature("zstd")) {
        clusters_of_each_kind("zstd", "off");
        clusters_of_each_kind("zstd", "on");
    }
    what_is_refused();
    return 0;
}
