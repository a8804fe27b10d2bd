/* Resizing: what the arguments may be, that a smaller file is smaller on the host, that a progress function ends it
 * with the old size in force, and that threads that write meanwhile see a size that stays in one piece. */
#include "test.h"

#include <pthread.h>
#include <sys/stat.h>

#define MIB (1 << 20)

static int stop(void *user, uint64_t done, uint64_t total)
{
    return ++*(int *)user > 2 && done < total ? 1 : 0;
}

static uint64_t file_bytes(void)
{
    struct stat info;
    CHECK(stat("disk.qcow2", &info) == 0);
    return (uint64_t)info.st_size;
}

static void *writer(void *handle)
{
    uint8_t byte = 7;
    for (int i = 0; i < 4000; i++) {
        uint64_t at = (uint64_t)i * 7919 * 512 % (8 * MIB);
        int result = qcow2_pwrite(handle, &byte, 1, at, 0);
        if (result != 0 && (result != -EINVAL || qcow2_last_error_code() != QCOW2_ERR_OUT_OF_RANGE))
            FAIL("write at %" PRIu64 " returned %d: %s", at, result, qcow2_last_error());
    }
    return NULL;
}

int main(void)
{
    qcow2_image *image;
    int calls = 0;
    create_image("disk.qcow2", MIB, NULL);
    image = open_image("disk.qcow2");
    FAILS(qcow2_resize(NULL, MIB, NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "image");
    FAILS(qcow2_resize(image, 2 * MIB, NULL, 2), EINVAL, QCOW2_ERR_ARGUMENT, "flags");
    FAILS(qcow2_resize(image, 1000, NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "shrinking");
    FAILS(qcow2_resize(image, UINT64_MAX, NULL, 0), EFBIG, QCOW2_ERR_TOO_LARGE, "size");
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_str(opts, "cluster_size", "4k"));
    FAILS(qcow2_resize(image, 2 * MIB, opts, 0), EINVAL, QCOW2_ERR_OPTION, "cluster_size");
    qcow2_opts_free(opts);
    CHECK(qcow2_size(image) == MIB);

    uint64_t small = file_bytes();
    OK(qcow2_resize(image, 64 * MIB - 100, NULL, 0));
    CHECK(qcow2_size(image) == 64 * MIB);
    write_pattern(image, 9, MIB / 2, 40 * MIB);
    OK(qcow2_flush(image));
    CHECK(file_bytes() > 40 * MIB);
    OK(qcow2_resize(image, MIB, NULL, QCOW2_ALLOW_SHRINK));
    CHECK(file_bytes() <= small + 2 * MIB);
    expect_pattern(image, 9, MIB / 2, MIB / 2);
    FAILS(qcow2_pwrite(image, "x", 1, MIB, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "past the end");
    OK(qcow2_resize(image, 2 * MIB, NULL, 0));
    expect_pattern(image, 0, MIB, MIB);

    opts = qcow2_opts_new();
    OK(qcow2_opts_set_str(opts, "preallocation", "full"));
    OK(qcow2_opts_set_progress(opts, stop, &calls, NULL));
    FAILS(qcow2_resize(image, 200 * MIB, opts, 0), ECANCELED, QCOW2_ERR_CANCELLED, "cancelled");
    CHECK(qcow2_size(image) == 2 * MIB && calls > 2);
    qcow2_opts_free(opts);
    OK(qcow2_close(image));
    check_image("disk.qcow2");

    image = open_image("disk.qcow2");
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, writer, image) == 0);
    for (int i = 0; i < 30; i++)
        OK(qcow2_resize(image, (uint64_t)(1 + i * 5 % 8) * MIB, NULL, QCOW2_ALLOW_SHRINK));
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
