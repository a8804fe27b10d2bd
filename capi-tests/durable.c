/* Flush and FUA: what they cover is in the file while the handle is still open, for a reader that opens it beside. */
#include "test.h"

static void reader_sees(int pattern, uint64_t offset, size_t length)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *reader;
    OK(qcow2_opts_set_bool(opts, "read_only", 1));
    OK(qcow2_opts_set_str(opts, "locking", "shared")); /* the writer is known, and flushes */
    OK(qcow2_open("disk.qcow2", opts, &reader));
    expect_pattern(reader, pattern, offset, length);
    OK(qcow2_close(reader));
    qcow2_opts_free(opts);
}

int main(void)
{
    uint8_t bytes[700];
    create_image("disk.qcow2", 64 << 20, (const char *[]){"extended_l2=on", NULL});
    qcow2_image *image = open_image("disk.qcow2");
    write_pattern(image, 0x61, 123, 70000);
    OK(qcow2_flush(image));
    reader_sees(0x61, 123, 70000);
    memset(bytes, 0x62, sizeof(bytes));
    OK(qcow2_pwrite(image, bytes, sizeof(bytes), 40 << 20, QCOW2_FUA));
    reader_sees(0x62, 40 << 20, sizeof(bytes));
    OK(qcow2_flush(image));
    OK(qcow2_flush(image));
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
