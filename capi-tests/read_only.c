/* Options read_only and inspect: what still works, what does not, and that the file is never written to. */
#include "test.h"

int main(void)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    struct qcow2_info info;
    struct qcow2_extent extent;
    size_t n;
    uint8_t byte = 1;
    const char *settings[] = {"backing_file=/no/such/file", "backing_fmt=qcow2", NULL};

    create_image("plain.qcow2", 1 << 20, NULL);
    image = open_image("plain.qcow2");
    write_pattern(image, 0x31, 0, 4096);
    OK(qcow2_close(image));
    CHECK(shell("cp plain.qcow2 before"));
    OK(qcow2_opts_set_bool(opts, "read_only", 1));
    OK(qcow2_open("plain.qcow2", opts, &image));
    expect_pattern(image, 0x31, 0, 4096);
    FAILS(qcow2_pwrite(image, &byte, 1, 0, 0), EROFS, QCOW2_ERR_READ_ONLY, "read-only");
    FAILS(qcow2_pwrite(image, &byte, 1, 0, QCOW2_FUA), EROFS, QCOW2_ERR_READ_ONLY, "read-only");
    OK(qcow2_flush(image));
    OK(qcow2_close(image));
    CHECK(shell("cmp plain.qcow2 before"));

    /* The dirty and the corrupt bit do not stop a reader. */
    poke("plain.qcow2", 72, 8, 3);
    OK(qcow2_open("plain.qcow2", opts, &image));
    expect_pattern(image, 0x31, 0, 4096);
    OK(qcow2_get_info(image, &info, sizeof(info)));
    CHECK((info.flags & QCOW2_INFO_DIRTY) && (info.flags & QCOW2_INFO_CORRUPT));
    OK(qcow2_close(image));

    /* An image that cannot be used can be looked at. */
    create_image("overlay.qcow2", 1 << 20, settings);
    poke("overlay.qcow2", 72, 8, UINT64_C(1) << 50);
    OK(qcow2_opts_set_str(opts, "inspect", "on"));
    OK(qcow2_open("overlay.qcow2", opts, &image));
    OK(qcow2_get_info(image, &info, sizeof(info)));
    CHECK(strcmp(info.backing_file, "/no/such/file") == 0 && strcmp(info.backing_fmt, "qcow2") == 0);
    CHECK(info.incompatible_features == UINT64_C(1) << 50);
    CHECK(qcow2_size(image) == 1 << 20);
    FAILS(qcow2_pread(image, &byte, 1, 0, 0), EROFS, QCOW2_ERR_READ_ONLY, "inspect");
    FAILS(qcow2_pwrite(image, &byte, 1, 0, 0), EROFS, QCOW2_ERR_READ_ONLY, "inspect");
    FAILS(qcow2_map(image, 0, 512, 0, &extent, 1, &n), EROFS, QCOW2_ERR_READ_ONLY, "inspect");
    OK(qcow2_flush(image));
    OK(qcow2_close(image));
    qcow2_opts_free(opts);
    return 0;
}
