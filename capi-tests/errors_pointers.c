/* NULL where something has to be: -EINVAL that names the argument, never a crash. NULL where nothing is needed: fine. */
#include <sys/uio.h>

#include "test.h"

#define NULLED(call, name) FAILS(call, EINVAL, QCOW2_ERR_ARGUMENT, "'" name "'")

int main(void)
{
    qcow2_image *image;
    qcow2_opts *opts = qcow2_opts_new();
    struct qcow2_info info;
    struct qcow2_stats stats;
    struct qcow2_extent extent;
    struct qcow2_option option;
    struct iovec hole[2] = {{&info, 8}, {NULL, 8}}, empty[2] = {{NULL, 0}, {&info, 0}};
    qcow2_storage *storage;
    char *json;
    size_t n;

    NULLED(qcow2_create(NULL, 512, NULL, 0), "path");
    FAILS(qcow2_create("", 512, NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "empty");
    NULLED(qcow2_create_storage(NULL, 512, NULL, 0), "storage");
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    NULLED(qcow2_open(NULL, NULL, &image), "path");
    CHECK(image == NULL);
    NULLED(qcow2_open("disk.qcow2", NULL, NULL), "image");
    NULLED(qcow2_open_storage(NULL, NULL, &image), "storage");
    FAILS(qcow2_open_fd(-1, NULL, &image), EINVAL, QCOW2_ERR_ARGUMENT, "'fd' is -1");
    FAILS(qcow2_open_fd(12345, NULL, &image), EBADF, QCOW2_ERR_IO, "");
    image = open_image("disk.qcow2");

    NULLED(qcow2_pread(NULL, &info, 8, 0, 0), "image");
    NULLED(qcow2_pwrite(NULL, &info, 8, 0, 0), "image");
    NULLED(qcow2_preadv(NULL, hole, 1, 0, 0), "image");
    NULLED(qcow2_pwritev(NULL, hole, 1, 0, 0), "image");
    NULLED(qcow2_write_zeroes(NULL, 0, 8, 0), "image");
    NULLED(qcow2_discard(NULL, 0, 8, 0), "image");
    NULLED(qcow2_flush(NULL), "image");
    NULLED(qcow2_get_info(NULL, &info, sizeof(info)), "image");
    NULLED(qcow2_get_stats(NULL, &stats, sizeof(stats)), "image");
    NULLED(qcow2_info_json(NULL, &json), "image");
    NULLED(qcow2_map(NULL, 0, 1, 0, &extent, 1, &n), "image");
    CHECK(qcow2_size(NULL) == -EINVAL);

    NULLED(qcow2_pread(image, NULL, 8, 0, 0), "buf");
    NULLED(qcow2_pwrite(image, NULL, 8, 0, 0), "buf");
    NULLED(qcow2_preadv(image, NULL, 1, 0, 0), "iov");
    FAILS(qcow2_preadv(image, hole, 2, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "iov[1].iov_base is NULL, with iov_len 8");
    FAILS(qcow2_pwritev(image, hole, 2, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "iov[1]");
    FAILS(qcow2_pwritev(image, hole, -1, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "'iovcnt' is -1");
    NULLED(qcow2_get_info(image, NULL, sizeof(info)), "info");
    NULLED(qcow2_get_stats(image, NULL, sizeof(stats)), "stats");
    NULLED(qcow2_info_json(image, NULL), "json");
    NULLED(qcow2_map(image, 0, 512, 0, NULL, 1, &n), "extents");
    NULLED(qcow2_map(image, 0, 512, 0, &extent, 0, &n), "n_max");
    NULLED(qcow2_map(image, 0, 512, 0, &extent, 1, NULL), "n");
    NULLED(qcow2_option_describe(0, NULL, sizeof(option)), "option");
    CHECK(qcow2_probe(NULL, 512) == -EINVAL);

    NULLED(qcow2_opts_set_str(NULL, "backing", "any"), "opts");
    NULLED(qcow2_opts_set_str(opts, NULL, "any"), "key");
    NULLED(qcow2_opts_set_str(opts, "backing", NULL), "value");
    NULLED(qcow2_opts_set_u64(NULL, "cluster_size", 512), "opts");
    NULLED(qcow2_opts_set_bool(NULL, "read_only", 1), "opts");
    NULLED(qcow2_opts_set_storage(opts, QCOW2_ROLE_BACKING, 0, NULL), "storage");
    NULLED(qcow2_opts_set_resolver(NULL, NULL, NULL, NULL), "opts");
    NULLED(qcow2_opts_set_log(NULL, NULL, NULL, NULL), "opts");
    NULLED(qcow2_storage_new(NULL, NULL, &storage), "ops");
    NULLED(qcow2_storage_open(NULL, 0, &storage), "path");
    NULLED(qcow2_storage_open("disk.qcow2", 0, NULL), "storage");

    OK(qcow2_pread(image, NULL, 0, 0, 0));
    OK(qcow2_pwrite(image, NULL, 0, 1 << 20, QCOW2_FUA));
    OK(qcow2_preadv(image, NULL, 0, 0, 0));
    OK(qcow2_pwritev(image, empty, 2, 0, 0));
    OK(qcow2_opts_set_resolver(opts, NULL, NULL, NULL));
    OK(qcow2_opts_set_log(opts, NULL, NULL, NULL));
    OK(qcow2_close(image));
    OK(qcow2_close(NULL));
    qcow2_opts_free(opts);
    qcow2_opts_free(NULL);
    qcow2_storage_free(NULL);
    qcow2_string_free(NULL);
    return 0;
}
