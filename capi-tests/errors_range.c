/* Requests past the end, however they are put: refused as a whole, with offset, length and size in the text. */
#include <limits.h>
#include <sys/uio.h>

#include "test.h"

#define DISK 1000448 /* a multiple of 512, not of a cluster */

int main(void)
{
    static const struct { uint64_t offset, length; } wrong[] = {
        {DISK, 1}, {DISK - 1, 2}, {0, DISK + 1}, {DISK + 1, 0}, {UINT64_MAX, 1}, {UINT64_MAX, 0}, {UINT64_MAX - 511, 512},
        {INT64_MAX, 4096}, {INT64_MAX, 0},
    };
    static uint8_t bytes[DISK + 1];
    struct qcow2_extent extent;
    struct iovec huge[2] = {{bytes, SSIZE_MAX}, {bytes, SSIZE_MAX}};
    size_t n = 7;
    OK(qcow2_create("disk.qcow2", DISK, NULL, 0));
    qcow2_image *image = open_image("disk.qcow2");
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        uint64_t offset = wrong[i].offset, length = wrong[i].length;
        char named[64];
        snprintf(named, sizeof(named), "%" PRIu64 " bytes at guest offset %" PRIu64, length, offset);
        FAILS(qcow2_pread(image, bytes, length, offset, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, named);
        FAILS(qcow2_pwrite(image, bytes, length, offset, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, named);
        FAILS(qcow2_write_zeroes(image, offset, length, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, named);
        FAILS(qcow2_discard(image, offset, length, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, named);
        FAILS(qcow2_map(image, offset, length, 0, &extent, 1, &n), EINVAL, QCOW2_ERR_OUT_OF_RANGE, named);
        CHECK(n == 0);
    }
    FAILS(qcow2_pread(image, bytes, SIZE_MAX, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "length");
    FAILS(qcow2_preadv(image, huge, 2, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "iov");
    OK(qcow2_pread(image, bytes, DISK, 0, 0));
    OK(qcow2_pread(image, bytes, 0, DISK, 0));
    OK(qcow2_pwrite(image, bytes, 1, DISK - 1, 0));
    OK(qcow2_write_zeroes(image, DISK - 1, 1, 0));
    OK(qcow2_discard(image, DISK, 0, 0));
    OK(qcow2_map(image, DISK, 0, 0, &extent, 1, &n));
    CHECK(n == 0);
    OK(qcow2_close(image));
    check_image("disk.qcow2");

    FAILS(qcow2_create("big.qcow2", UINT64_MAX, NULL, 0), EFBIG, QCOW2_ERR_TOO_LARGE, "");
    CHECK(access("big.qcow2", F_OK) != 0);
    return 0;
}
