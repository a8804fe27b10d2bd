/* The option overlap_check: an L2 entry that points to its own table is refused by the class that knows L2 tables. */
#include <fcntl.h>

#include "test.h"

static uint64_t word(int fd, uint64_t at)
{
    uint8_t bytes[8];
    uint64_t value = 0;
    CHECK(pread(fd, bytes, 8, (off_t)at) == 8);
    for (int i = 0; i < 8; i++)
        value = value << 8 | bytes[i];
    return value;
}

int main(void)
{
    qcow2_image *image;
    qcow2_opts *opts = qcow2_opts_new();
    uint8_t byte = 7;
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    OK(qcow2_open("disk.qcow2", NULL, &image));
    write_pattern(image, 0x5a, 0, 65536);
    OK(qcow2_close(image));

    int fd = open("disk.qcow2", O_RDWR);
    uint64_t table = word(fd, word(fd, 40)) & 0x00fffffffffffe00;
    uint8_t entry[8];
    for (int i = 0; i < 8; i++)
        entry[i] = (uint8_t)((table | 1ull << 63) >> (56 - 8 * i));
    CHECK(pwrite(fd, entry, 8, (off_t)table) == 8);

    FAILS(qcow2_opts_set_str(opts, "overlap_check", "some"), EINVAL, QCOW2_ERR_OPTION, "none, constant, cached or all");
    OK(qcow2_opts_set_str(opts, "overlap_check", "cached"));
    OK(qcow2_open("disk.qcow2", opts, &image));
    FAILS(qcow2_pwrite(image, &byte, 1, 100, 0), EIO, QCOW2_ERR_CORRUPT, "an L2 table");
    FAILS(qcow2_pwrite(image, &byte, 1, 70000, 0), EIO, QCOW2_ERR_CORRUPT, "");
    qcow2_close(image);
    CHECK(word(fd, table) == (table | 1ull << 63) && (word(fd, 72) & 2) == 2);
    close(fd);
    qcow2_opts_free(opts);
    return 0;
}
