/* An image behind a descriptor: the caller's own stays open and its position where it was; relative names lead nowhere. */
#include "test.h"

int main(void)
{
    const char *settings[] = {"backing_file=base.raw", "backing_fmt=raw", NULL};
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    int fd = open("disk.qcow2", O_RDWR);
    CHECK(fd >= 0 && lseek(fd, 100, SEEK_SET) == 100);
    OK(qcow2_open_fd(fd, NULL, &image));
    write_pattern(image, 0x12, 5000, 5000);
    CHECK(lseek(fd, 0, SEEK_CUR) == 100);
    CHECK(close(fd) == 0);
    expect_pattern(image, 0x12, 5000, 5000);
    OK(qcow2_close(image));
    check_image("disk.qcow2");

    fill_file("base.raw", 1, 512);
    create_image("overlay.qcow2", 1 << 20, settings);
    fd = open("overlay.qcow2", O_RDWR);
    OK(qcow2_opts_set_str(opts, "backing", "relative"));
    FAILS(qcow2_open_fd(fd, opts, &image), EACCES, QCOW2_ERR_BACKING_DENIED, "base.raw");
    close(fd);
    qcow2_opts_free(opts);
    return 0;
}
