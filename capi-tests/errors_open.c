/* Files that are no good: each refusal has its own text, gives no handle, and leaves the file as it was. */
#include "test.h"

static uint8_t original[1 << 20], after[1 << 20];
static size_t size;

static void restore(void)
{
    write_file("disk.qcow2", original, size);
}

static size_t slurp(const char *path, uint8_t *to)
{
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    size_t n = fread(to, 1, sizeof(original), file);
    fclose(file);
    return n;
}

static void refused(uint64_t offset, int bytes, uint64_t value, int error, int code, const char *named)
{
    qcow2_image *image = (qcow2_image *)&size;
    static uint8_t before[1 << 20];
    restore();
    poke("disk.qcow2", offset, bytes, value);
    slurp("disk.qcow2", before);
    FAILS(qcow2_open("disk.qcow2", NULL, &image), error, code, named);
    CHECK(image == NULL);
    CHECK(slurp("disk.qcow2", after) == size && memcmp(before, after, size) == 0);
}

int main(void)
{
    qcow2_image *image;
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    size = slurp("disk.qcow2", original);
    CHECK(size < sizeof(original));

    refused(0, 4, 0x51464900, EINVAL, QCOW2_ERR_NOT_QCOW2, "0x51464900");
    refused(4, 4, 4, EINVAL, QCOW2_ERR_BAD_HEADER, "version");
    refused(20, 4, 8, EINVAL, QCOW2_ERR_BAD_HEADER, "cluster_bits");
    refused(20, 4, 22, EINVAL, QCOW2_ERR_BAD_HEADER, "cluster_bits");
    refused(40, 8, 0x30001, EINVAL, QCOW2_ERR_BAD_HEADER, "l1_table_offset");
    refused(40, 8, UINT64_C(1) << 40, EINVAL, QCOW2_ERR_BAD_HEADER, "l1_table_offset");
    refused(36, 4, 0x7fffffff, EINVAL, QCOW2_ERR_BAD_HEADER, "l1_size");
    refused(48, 8, 0x10001, EINVAL, QCOW2_ERR_BAD_HEADER, "refcount_table_offset");
    refused(32, 4, 1, ENOTSUP, QCOW2_ERR_UNSUPPORTED, "encryption");
    refused(72, 8, 2, EIO, QCOW2_ERR_CORRUPT, "corrupt");
    refused(72, 8, 4, EINVAL, QCOW2_ERR_OPTION, "external data file");
    refused(72, 8, UINT64_C(1) << 40, ENOTSUP, QCOW2_ERR_UNSUPPORTED, "40");
    refused(96, 4, 7, EINVAL, QCOW2_ERR_BAD_HEADER, "refcount_order");

    restore();
    CHECK(truncate("disk.qcow2", 50) == 0);
    FAILS(qcow2_open("disk.qcow2", NULL, &image), EINVAL, QCOW2_ERR_BAD_HEADER, "");
    CHECK(truncate("disk.qcow2", 0) == 0);
    CHECK(qcow2_open("disk.qcow2", NULL, &image) == -EINVAL && image == NULL);
    FAILS(qcow2_open("missing.qcow2", NULL, &image), ENOENT, QCOW2_ERR_IO, "");
    FAILS(qcow2_open(".", NULL, &image), EISDIR, QCOW2_ERR_IO, "");
    CHECK(shell("mkfifo pipe"));
    CHECK(qcow2_open("pipe", NULL, &image) == -EINVAL && qcow2_last_error_code() == QCOW2_ERR_ARGUMENT);
    return 0;
}
