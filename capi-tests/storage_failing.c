/* Callbacks that fail: the call returns their errno and a text, the handle lives on, and a retry works; a failed flush
 * is final, since nobody knows what is on disk. Missing callbacks are -ENOTSUP, nonsense results are -EIO. */
#include "memory_storage.h"

static ssize_t too_much(void *user, void *buf, size_t length, uint64_t offset)
{
    ssize_t n = memory_pread(user, buf, length, offset);
    return n < 0 ? n : (ssize_t)length + 1;
}

static ssize_t wild(void *user, void *buf, size_t length, uint64_t offset)
{
    (void)user, (void)buf, (void)length, (void)offset;
    return -1000000;
}

static ssize_t no_room(void *user, const void *buf, size_t length, uint64_t offset)
{
    (void)user, (void)buf, (void)length, (void)offset;
    return 0;
}

static void broken(struct memory *m, struct qcow2_storage_ops ops, int error)
{
    qcow2_storage *storage;
    qcow2_image *image;
    OK(qcow2_storage_new(&ops, m, &storage));
    FAILS(qcow2_open_storage(storage, NULL, &image), error, QCOW2_ERR_IO, "read");
    CHECK(image == NULL);
    qcow2_storage_free(storage);
}

int main(void)
{
    struct memory m;
    qcow2_image *image;
    uint8_t bytes[512] = {1};
    qcow2_storage *storage = memory_storage(&m, true);
    m.fail_write = ENOSPC;
    FAILS(qcow2_create_storage(storage, 1 << 20, NULL, 0), ENOSPC, QCOW2_ERR_IO, "write");
    m.fail_write = 0;
    OK(qcow2_create_storage(storage, 1 << 20, NULL, 0));
    m.fail_read = ETIMEDOUT;
    FAILS(qcow2_open_storage(storage, NULL, &image), ETIMEDOUT, QCOW2_ERR_IO, "read");
    m.fail_read = 0;
    OK(qcow2_open_storage(storage, NULL, &image));
    write_pattern(image, 0x33, 0, 4096);

    m.fail_write = ENOSPC;
    FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 0, 0), ENOSPC, QCOW2_ERR_IO, "write");
    FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 128 * 1024, 0), ENOSPC, QCOW2_ERR_IO, "write");
    m.fail_write = 0;
    m.fail_read = EHOSTDOWN;
    FAILS(qcow2_pread(image, bytes, sizeof(bytes), 0, 0), EHOSTDOWN, QCOW2_ERR_IO, "read");
    m.fail_read = 0;
    write_pattern(image, 0x34, 128 * 1024, 4096);
    expect_pattern(image, 0x34, 128 * 1024, 4096);
    OK(qcow2_flush(image));

    write_pattern(image, 0x35, 256 * 1024, 4096);
    m.fail_flush = EIO;
    FAILS(qcow2_flush(image), EIO, QCOW2_ERR_IO, "flush");
    m.fail_flush = 0;
    FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 0, 0), EIO, QCOW2_ERR_POISONED, "no more writes");
    expect_pattern(image, 0x34, 128 * 1024, 4096);
    CHECK(qcow2_close(image) == -EIO);

    /* What the flush before the failed one made durable is there. */
    OK(qcow2_open_storage(storage, NULL, &image));
    expect_pattern(image, 0x34, 128 * 1024, 4096);
    OK(qcow2_close(image));

    struct qcow2_storage_ops ops = {.struct_size = sizeof(ops), .pread = memory_pread, .get_size = memory_get_size};
    qcow2_storage *reader;
    OK(qcow2_storage_new(&ops, &m, &reader));
    FAILS(qcow2_create_storage(reader, 1 << 20, NULL, 0), ENOTSUP, QCOW2_ERR_IO, "");
    OK(qcow2_open_storage(reader, NULL, &image));
    FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 0, 0), ENOTSUP, QCOW2_ERR_IO, "write");
    CHECK(qcow2_close(image) <= 0);
    qcow2_storage_free(reader);
    ops.pread = too_much;
    broken(&m, ops, EIO);
    ops.pread = wild;
    broken(&m, ops, EIO);
    ops.pread = memory_pread;
    ops.pwrite = no_room;
    ops.flush = memory_flush;
    OK(qcow2_storage_new(&ops, &m, &reader));
    OK(qcow2_open_storage(reader, NULL, &image));
    FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 0, 0), ENOSPC, QCOW2_ERR_IO, "write");
    CHECK(qcow2_close(image) <= 0);
    qcow2_storage_free(reader);

    qcow2_storage_free(storage);
    CHECK(m.destroyed == 1);
    free(m.bytes);
    return 0;
}
