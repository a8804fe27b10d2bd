/* External data files: created beside the image, closed unless allowed, given as storages or found by a resolver; a raw
 * one is the disk byte by byte at any moment, and the map says where the bytes are. */
#include "memory_storage.h"

static qcow2_opts *options(const char *const *settings)
{
    qcow2_opts *opts = qcow2_opts_new();
    for (; *settings != NULL; settings += 2)
        OK(qcow2_opts_set_str(opts, settings[0], settings[1]));
    return opts;
}

#define OPTIONS(...) options((const char *const[]){__VA_ARGS__, NULL})

static int open_with(const char *path, qcow2_opts *opts, qcow2_image **image)
{
    int result = qcow2_open(path, opts, image);
    qcow2_opts_free(opts);
    return result;
}

static void by_name(void)
{
    qcow2_opts *opts = OPTIONS("data_file", "disk.data", "data_file_raw", "on");
    qcow2_image *image;
    struct qcow2_extent extents[4];
    struct qcow2_info info;
    uint8_t bytes[8192];
    size_t n;
    OK(qcow2_create("disk.qcow2", 1 << 20, opts, 0));
    FAILS(qcow2_create("disk2.qcow2", 1 << 20, opts, 0), EEXIST, QCOW2_ERR_EXISTS, "disk.data");
    CHECK(access("disk2.qcow2", F_OK) != 0);
    qcow2_opts_free(opts);
    FAILS(qcow2_open("disk.qcow2", NULL, &image), EACCES, QCOW2_ERR_BACKING_DENIED, "'disk.data'");
    OK(open_with("disk.qcow2", OPTIONS("backing", "relative"), &image));
    memset(bytes, 0x55, sizeof(bytes));
    OK(qcow2_pwrite(image, bytes, sizeof(bytes), 100000, 0));
    OK(qcow2_write_zeroes(image, 101000, 1000, 0));
    OK(qcow2_discard(image, 103000, 1000, 0));
    CHECK(peek("disk.data", 100000, 1) == 0x55 && peek("disk.data", 99999, 1) == 0);
    CHECK(peek("disk.data", 101000, 8) == 0 && peek("disk.data", 102000, 1) == 0x55);
    CHECK(peek("disk.data", 103000, 8) == 0 && peek("disk.data", 104000, 1) == 0x55);
    OK(qcow2_map(image, 100000, 4096, 0, extents, 4, &n));
    CHECK(n == 1 && extents[0].host_offset == 100000 && extents[0].length == 4096);
    CHECK(extents[0].flags == (QCOW2_EXTENT_DATA | QCOW2_EXTENT_PRESENT | QCOW2_EXTENT_OFFSET_VALID |
                               QCOW2_EXTENT_DATA_FILE));
    OK(qcow2_get_info(image, &info, sizeof(info)));
    CHECK((info.flags & QCOW2_INFO_DATA_FILE) != 0 && (info.flags & QCOW2_INFO_DATA_FILE_RAW) != 0);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    /* Another place, said by the caller; and an image that has no data file. */
    CHECK(rename("disk.data", "moved.data") == 0);
    FAILS(open_with("disk.qcow2", OPTIONS("backing", "any"), &image), ENOENT, QCOW2_ERR_IO, "disk.data");
    OK(open_with("disk.qcow2", OPTIONS("data_file", "moved.data"), &image));
    expect_pattern(image, 0x55, 104000, 4096);
    OK(qcow2_close(image));
    OK(qcow2_create("plain.qcow2", 1 << 20, NULL, 0));
    FAILS(open_with("plain.qcow2", OPTIONS("data_file", "moved.data"), &image), EINVAL, QCOW2_ERR_OPTION, "data_file");
    OK(open_with("disk.qcow2", OPTIONS("inspect", "on"), &image));
    OK(qcow2_close(image));
}

static void in_storages(void)
{
    struct memory file, data;
    qcow2_image *image;
    uint8_t bytes[3000];
    qcow2_storage *at = memory_storage(&file, true), *beside = memory_storage(&data, true);
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_storage(opts, QCOW2_ROLE_DATA_FILE, 0, beside));
    OK(qcow2_opts_set_bool(opts, "data_file_raw", 1));
    FAILS(qcow2_create("never.qcow2", 1 << 20, opts, 0), EINVAL, QCOW2_ERR_OPTION, "storage");
    OK(qcow2_create_storage(at, 1 << 20, opts, 0));
    CHECK(data.size == 1 << 20);
    qcow2_opts_free(opts);
    FAILS(qcow2_open_storage(at, NULL, &image), EINVAL, QCOW2_ERR_OPTION, "no name");
    opts = qcow2_opts_new();
    FAILS(qcow2_opts_set_storage(opts, QCOW2_ROLE_DATA_FILE, 1001, beside), EINVAL, QCOW2_ERR_ARGUMENT, "position");
    FAILS(qcow2_opts_set_storage(opts, 3, 0, beside), EINVAL, QCOW2_ERR_ARGUMENT, "role");
    OK(qcow2_opts_set_storage(opts, QCOW2_ROLE_DATA_FILE, 0, beside));
    qcow2_storage_free(beside);
    OK(qcow2_open_storage(at, opts, &image));
    qcow2_opts_free(opts);
    qcow2_storage_free(at);
    memset(bytes, 0x77, sizeof(bytes));
    OK(qcow2_pwrite(image, bytes, sizeof(bytes), 12345, 0));
    int flushes = data.flushes;
    OK(qcow2_flush(image));
    CHECK(data.flushes > flushes && data.destroyed == 0);
    CHECK(memcmp(data.bytes + 12345, bytes, sizeof(bytes)) == 0 && data.bytes[12344] == 0);
    /* Another size for both; no callback reserves space, so that zeroes are written for it. */
    int writes = data.writes;
    OK(qcow2_resize(image, 13000, NULL, QCOW2_ALLOW_SHRINK));
    CHECK(data.size == 13312 && data.writes == writes);
    opts = OPTIONS("preallocation", "falloc");
    OK(qcow2_resize(image, 1 << 20, opts, 0));
    qcow2_opts_free(opts);
    CHECK(data.size == 1 << 20 && data.writes > writes && data.bytes[13312] == 0);
    expect_pattern(image, 0x77, 12345, 13312 - 12345);
    OK(qcow2_close(image));
    CHECK(data.destroyed == 1 && file.destroyed == 1);
    free(file.bytes);
    free(data.bytes);
}

struct asked {
    char name[64];
    uint32_t format, depth;
    int calls;
};

static int resolve(void *user, const char *name, uint32_t format, uint32_t depth, qcow2_storage **storage)
{
    struct asked *asked = user;
    snprintf(asked->name, sizeof(asked->name), "%s", name);
    asked->format = format;
    asked->depth = depth;
    asked->calls++;
    return qcow2_storage_open("moved.data", format == QCOW2_FORMAT_DATA_FILE ? QCOW2_STORAGE_READ_ONLY : 0, storage);
}

static void by_resolver(void)
{
    for (int read_only = 0; read_only < 2; read_only++) {
        struct asked asked = {"", 0, 9, 0};
        qcow2_opts *opts = qcow2_opts_new();
        qcow2_image *image;
        OK(qcow2_opts_set_resolver(opts, resolve, &asked, NULL));
        OK(qcow2_opts_set_bool(opts, "read_only", read_only));
        OK(open_with("disk.qcow2", opts, &image));
        CHECK(asked.calls == 1 && asked.depth == 0 && strcmp(asked.name, "disk.data") == 0);
        CHECK(asked.format == (read_only ? QCOW2_FORMAT_DATA_FILE : QCOW2_FORMAT_DATA_FILE_WRITABLE));
        expect_pattern(image, 0x55, 104000, 4096);
        OK(qcow2_close(image));
    }
}

int main(void)
{
    by_name();
    in_storages();
    by_resolver();
    return 0;
}
