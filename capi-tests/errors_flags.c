/* Each flags parameter refuses each bit that the call does not know, and does nothing then. */
#include <sys/uio.h>

#include "test.h"

int main(void)
{
    qcow2_image *image;
    qcow2_storage *storage;
    struct qcow2_extent extents[4];
    uint8_t bytes[512];
    struct iovec iov = {bytes, sizeof(bytes)};
    size_t n;
    memset(bytes, 0x42, sizeof(bytes));
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    image = open_image("disk.qcow2");
    OK(qcow2_pwrite(image, bytes, sizeof(bytes), 0, 0));
    memset(bytes, 0x43, sizeof(bytes));
    for (int bit = 0; bit < 32; bit++) {
        uint32_t flags = UINT32_C(1) << bit;
        char named[32];
        snprintf(named, sizeof(named), "0x%" PRIx32, flags);
        FAILS(qcow2_pread(image, bytes, sizeof(bytes), 0, flags), EINVAL, QCOW2_ERR_ARGUMENT, named);
        FAILS(qcow2_preadv(image, &iov, 1, 0, flags), EINVAL, QCOW2_ERR_ARGUMENT, named);
        FAILS(qcow2_map(image, 0, 512, flags, extents, 4, &n), EINVAL, QCOW2_ERR_ARGUMENT, named);
        FAILS(qcow2_discard(image, 0, 512, flags), EINVAL, QCOW2_ERR_ARGUMENT, named);
        if ((flags & (QCOW2_FUA | QCOW2_MAY_UNMAP | QCOW2_NO_FALLBACK)) == 0)
            FAILS(qcow2_write_zeroes(image, 0, 4096, flags | QCOW2_MAY_UNMAP), EINVAL, QCOW2_ERR_ARGUMENT, named);
        if ((flags & (QCOW2_FUA | QCOW2_COMPRESSED)) == 0) {
            FAILS(qcow2_pwrite(image, bytes, sizeof(bytes), 0, flags | QCOW2_FUA), EINVAL, QCOW2_ERR_ARGUMENT, named);
            FAILS(qcow2_pwritev(image, &iov, 1, 0, flags), EINVAL, QCOW2_ERR_ARGUMENT, named);
        }
        if (flags != QCOW2_OVERWRITE)
            FAILS(qcow2_create("disk.qcow2", 512, NULL, flags | QCOW2_OVERWRITE), EINVAL, QCOW2_ERR_ARGUMENT, named);
        if (flags != QCOW2_STORAGE_READ_ONLY)
            FAILS(qcow2_storage_open("disk.qcow2", flags, &storage), EINVAL, QCOW2_ERR_ARGUMENT, named);
    }
    expect_pattern(image, 0x42, 0, sizeof(bytes));
    expect_pattern(image, 0, 512, 4096);
    CHECK(qcow2_size(image) == 1 << 20);
    OK(qcow2_close(image));

    FAILS(qcow2_create("disk.qcow2", 512, NULL, 0), EEXIST, QCOW2_ERR_EXISTS, "disk.qcow2");
    OK(qcow2_create("disk.qcow2", 512, NULL, QCOW2_OVERWRITE));
    image = open_image("disk.qcow2");
    CHECK(qcow2_size(image) == 512);
    OK(qcow2_close(image));
    return 0;
}
