/* Writing zeroes and discarding: each flag, the end of the image, what version 2 and option "discard" make of them, and
 * a storage that punches holes. */
#include "memory_storage.h"

#define CLUSTER 65536
#define SUB 2048

static uint64_t host_offset(qcow2_image *image, uint64_t offset)
{
    struct qcow2_extent extent;
    size_t n;
    OK(qcow2_map(image, offset, 1, 0, &extent, 1, &n));
    CHECK(n == 1);
    return extent.flags & QCOW2_EXTENT_OFFSET_VALID ? extent.host_offset : 0;
}

static qcow2_image *open_with(const char *key, const char *value)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    OK(qcow2_opts_set_str(opts, key, value));
    OK(qcow2_open("disk.qcow2", opts, &image));
    qcow2_opts_free(opts);
    return image;
}

static void flags_do_what_they_say(void)
{
    const char *settings[] = {"extended_l2=on", NULL};
    create_image("disk.qcow2", 1 << 20, settings);
    qcow2_image *image = open_image("disk.qcow2");
    write_pattern(image, 7, 0, 2 * CLUSTER);
    uint64_t host = host_offset(image, 0);

    OK(qcow2_write_zeroes(image, 0, CLUSTER, QCOW2_FUA));
    expect_pattern(image, 0, 0, CLUSTER);
    CHECK(host != 0 && host_offset(image, 0) == host);
    /* Durable without a flush: what is in the file now is what a crash would leave. */
    expect_entry("FUA", "disk.qcow2", 0, COPIED, UINT64_C(0xffffffff00000000));
    OK(qcow2_write_zeroes(image, 0, CLUSTER, QCOW2_MAY_UNMAP));
    CHECK(host_offset(image, 0) == 0);

    /* Part by part, and with subclusters that never held anything: the last part lets the cluster go. */
    write_pattern(image, 7, 2 * CLUSTER, 2 * SUB);
    OK(qcow2_write_zeroes(image, 2 * CLUSTER, SUB, QCOW2_MAY_UNMAP));
    CHECK(host_offset(image, 2 * CLUSTER + SUB) != 0);
    OK(qcow2_write_zeroes(image, 2 * CLUSTER + SUB, SUB, QCOW2_MAY_UNMAP));
    OK(qcow2_flush(image));
    expect_entry("part by part", "disk.qcow2", 2, 0, UINT64_C(0x0000000300000000));

    FAILS(qcow2_write_zeroes(image, CLUSTER + 100, 1000, QCOW2_NO_FALLBACK), ENOTSUP, QCOW2_ERR_UNSUPPORTED, "without writing data");
    expect_pattern(image, 7, CLUSTER, CLUSTER);
    OK(qcow2_write_zeroes(image, CLUSTER + SUB, SUB, QCOW2_NO_FALLBACK));
    OK(qcow2_write_zeroes(image, CLUSTER + 100, 1000, 0));
    expect_pattern(image, 7, CLUSTER, 100);
    expect_pattern(image, 0, CLUSTER + 100, 1000);
    expect_pattern(image, 7, CLUSTER + 1100, SUB - 1100);
    expect_pattern(image, 0, CLUSTER + SUB, SUB);
    expect_pattern(image, 7, CLUSTER + 2 * SUB, CLUSTER - 2 * SUB);

    OK(qcow2_discard(image, CLUSTER + 3 * SUB + 1, 2 * SUB, 0));
    expect_pattern(image, 7, CLUSTER + 3 * SUB, SUB);
    expect_pattern(image, 0, CLUSTER + 4 * SUB, SUB);
    expect_pattern(image, 7, CLUSTER + 5 * SUB, SUB);
    OK(qcow2_write_zeroes(image, 1 << 20, 0, QCOW2_FUA | QCOW2_MAY_UNMAP | QCOW2_NO_FALLBACK));
    OK(qcow2_discard(image, 1 << 20, 0, 0));
    OK(qcow2_close(image));
    check_image("disk.qcow2");

    image = open_with("discard", "ignore");
    FAILS(qcow2_discard(image, 1 << 20, 1, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "1048576");
    OK(qcow2_discard(image, 0, 1 << 20, 0));
    expect_pattern(image, 7, CLUSTER + 5 * SUB, SUB);
    OK(qcow2_close(image));
    image = open_with("read_only", "on");
    FAILS(qcow2_write_zeroes(image, 0, 1, 0), EROFS, QCOW2_ERR_READ_ONLY, "read-only");
    FAILS(qcow2_discard(image, 0, 1, 0), EROFS, QCOW2_ERR_READ_ONLY, "read-only");
    OK(qcow2_close(image));
}

/* The last subcluster is half inside: that half is all of it. One sector less is not. */
static void the_end_of_the_image_counts_as_whole(void)
{
    const char *settings[] = {"extended_l2=on", NULL};
    const uint64_t size = CLUSTER + 3 * SUB + SUB / 2, end = CLUSTER + 3 * SUB;
    unlink("disk.qcow2");
    create_image("disk.qcow2", size, settings);
    qcow2_image *image = open_image("disk.qcow2");
    write_pattern(image, 7, 0, size);
    FAILS(qcow2_write_zeroes(image, end, SUB / 2 - 512, QCOW2_NO_FALLBACK), ENOTSUP, QCOW2_ERR_UNSUPPORTED, "data");
    OK(qcow2_discard(image, end, SUB / 2 - 512, 0));
    expect_pattern(image, 7, end, SUB / 2);
    OK(qcow2_write_zeroes(image, end, SUB / 2, QCOW2_NO_FALLBACK));
    expect_pattern(image, 0, end, SUB / 2);
    write_pattern(image, 8, end, SUB / 2);
    OK(qcow2_discard(image, end, SUB / 2, 0));
    expect_pattern(image, 0, end, SUB / 2);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
}

/* No zero flag: with nothing below, a cluster can be given up; over a backing file, zeroes are data. */
static void version_2_does_what_it_can(void)
{
    const char *alone[] = {"compat=v2", NULL};
    const char *backed[] = {"compat=v2", "backing_file=base.raw", "backing_fmt=raw", NULL};
    fill_file("base.raw", 0xff, 1 << 20);
    for (int backing = 0; backing < 2; backing++) {
        unlink("disk.qcow2");
        create_image("disk.qcow2", 1 << 20, backing ? backed : alone);
        qcow2_image *image = open_image("disk.qcow2");
        write_pattern(image, 7, 0, CLUSTER);
        OK(qcow2_discard(image, 0, CLUSTER, 0));
        expect_pattern(image, backing ? 7 : 0, 0, CLUSTER);
        write_pattern(image, 7, 0, CLUSTER);
        if (backing)
            FAILS(qcow2_write_zeroes(image, 0, 2 * CLUSTER, QCOW2_MAY_UNMAP | QCOW2_NO_FALLBACK), ENOTSUP, QCOW2_ERR_UNSUPPORTED, "data");
        else
            OK(qcow2_write_zeroes(image, 0, 2 * CLUSTER, QCOW2_MAY_UNMAP | QCOW2_NO_FALLBACK));
        OK(qcow2_write_zeroes(image, 0, 2 * CLUSTER, QCOW2_MAY_UNMAP));
        expect_pattern(image, 0, 0, 2 * CLUSTER);
        CHECK((host_offset(image, 0) != 0) == backing);
        OK(qcow2_close(image));
        check_image("disk.qcow2");
    }
}

static struct { int calls, fail; uint64_t bytes; } punched;

static int memory_punch(void *user, uint64_t offset, uint64_t length)
{
    struct memory *m = user;
    punched.calls++;
    if (punched.fail != 0)
        return -punched.fail;
    pthread_mutex_lock(&m->lock);
    CHECK(offset % 512 == 0 && length != 0 && offset + length <= m->size);
    memset(m->bytes + offset, 0, length);
    pthread_mutex_unlock(&m->lock);
    punched.bytes += length;
    return 0;
}

/* 16 clusters are filled, discarded and flushed. `with`: the storage has the callback; it fails with `fail`. An older
 * caller's struct ends before the member. */
static void a_storage_gets_its_space_back(bool with, int fail, size_t struct_size)
{
    struct memory m;
    struct qcow2_storage_ops ops = {.struct_size = struct_size, .pread = memory_pread, .pwrite = memory_pwrite,
                                    .flush = memory_flush, .get_size = memory_get_size, .truncate = memory_truncate,
                                    .destroy = memory_destroy, .punch_hole = with ? memory_punch : NULL};
    qcow2_storage *storage;
    qcow2_image *image;
    memset(&m, 0, sizeof(m));
    memset(&punched, 0, sizeof(punched));
    punched.fail = fail;
    pthread_mutex_init(&m.lock, NULL);
    OK(qcow2_storage_new(&ops, &m, &storage));
    OK(qcow2_create_storage(storage, 1 << 20, NULL, 0));
    OK(qcow2_open_storage(storage, NULL, &image));
    qcow2_storage_free(storage);
    for (int round = 0; round < 2; round++) {
        write_pattern(image, 7, 0, 1 << 20);
        OK(qcow2_discard(image, 0, 1 << 20, 0));
        OK(qcow2_flush(image));
    }
    expect_pattern(image, 0, 0, 1 << 20);
    OK(qcow2_close(image));
    bool called = with && struct_size > offsetof(struct qcow2_storage_ops, punch_hole);
    CHECK(called ? fail ? punched.calls == 1 : punched.calls >= 2 : punched.calls == 0);
    /* The clusters, and the L2 table in which nothing is left. */
    CHECK(punched.bytes == (called && !fail ? 2 * ((1 << 20) + 65536) : 0));
    write_file("memory.qcow2", m.bytes, m.size);
    check_image("memory.qcow2");
    free(m.bytes);
}

int main(void)
{
    CHECK(qcow2_has_feature("write_zeroes") == 1 && qcow2_has_feature("discard") == 1);
    flags_do_what_they_say();
    the_end_of_the_image_counts_as_whole();
    version_2_does_what_it_can();
    a_storage_gets_its_space_back(true, 0, sizeof(struct qcow2_storage_ops));
    a_storage_gets_its_space_back(true, ENOTSUP, sizeof(struct qcow2_storage_ops));
    a_storage_gets_its_space_back(false, 0, sizeof(struct qcow2_storage_ops));
    a_storage_gets_its_space_back(true, 0, offsetof(struct qcow2_storage_ops, punch_hole));
    return 0;
}
