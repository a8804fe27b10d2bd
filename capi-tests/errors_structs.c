/* Structs of programs that were compiled with an older or a newer header, and sizes that cannot be. */
#include "test.h"

static ssize_t no_pread(void *user, void *buf, size_t length, uint64_t offset)
{
    (void)user, (void)buf, (void)length, (void)offset;
    return 0;
}

static int no_size(void *user, uint64_t *size)
{
    (void)user;
    *size = 0;
    return 0;
}

int main(void)
{
    union {
        struct qcow2_info info;
        uint8_t bytes[sizeof(struct qcow2_info) + 64];
    } out;
    struct {
        struct qcow2_storage_ops ops;
        uint64_t tail[2];
    } in;
    qcow2_image *image;
    qcow2_storage *storage;
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    image = open_image("disk.qcow2");

    /* A newer program: its tail is zeroed, what is behind it is not touched. */
    memset(&out, 0xee, sizeof(out));
    OK(qcow2_get_info(image, &out.info, sizeof(out.info) + 32));
    CHECK(out.info.size_bytes == 1 << 20);
    for (size_t at = 0; at < 64; at++)
        CHECK(out.bytes[sizeof(out.info) + at] == (at < 32 ? 0 : 0xee));
    FAILS(qcow2_get_info(image, &out.info, sizeof(out.info) - 8), EINVAL, QCOW2_ERR_ARGUMENT, "out_size");
    FAILS(qcow2_get_info(image, &out.info, 0), EINVAL, QCOW2_ERR_ARGUMENT, "'out_size' is 0");
    FAILS(qcow2_get_info(image, &out.info, SIZE_MAX), EINVAL, QCOW2_ERR_ARGUMENT, "large");
    FAILS(qcow2_get_stats(image, (struct qcow2_stats *)&out, 8), EINVAL, QCOW2_ERR_ARGUMENT, "'out_size' is 8");
    FAILS(qcow2_option_describe(0, (struct qcow2_option *)&out, 1), EINVAL, QCOW2_ERR_ARGUMENT, "'out_size' is 1");
    OK(qcow2_close(image));

    memset(&in, 0, sizeof(in));
    in.ops.pread = no_pread;
    in.ops.get_size = no_size;
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "'struct_size' is 0");
    in.ops.struct_size = offsetof(struct qcow2_storage_ops, destroy);
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "too small");
    /* An older program: its struct ends before punch_hole, which was appended. */
    in.ops.struct_size = offsetof(struct qcow2_storage_ops, punch_hole);
    OK(qcow2_storage_new(&in.ops, NULL, &storage));
    qcow2_storage_free(storage);
    storage = NULL;
    in.ops.struct_size = 1 << 30;
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "large");
    in.ops.struct_size = sizeof(in);
    in.tail[1] = 1;
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "does not know");
    CHECK(storage == NULL);
    in.tail[1] = 0;
    OK(qcow2_storage_new(&in.ops, NULL, &storage));
    qcow2_storage_free(storage);
    in.ops.get_size = NULL;
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "get_size");
    in.ops.get_size = no_size, in.ops.pread = NULL;
    FAILS(qcow2_storage_new(&in.ops, NULL, &storage), EINVAL, QCOW2_ERR_ARGUMENT, "pread");
    return 0;
}
