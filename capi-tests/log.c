/* The log callback is told about corruption, once, with text; and gives its pointer back when nothing uses it. */
#include "test.h"

static int errors, destroyed;

static void log_line(void *user, uint32_t level, const char *text)
{
    CHECK(user == &errors && text != NULL && strlen(text) > 0);
    errors += level == QCOW2_LOG_ERROR && strstr(text, "corrupt") != NULL;
}

static void destroy(void *user)
{
    CHECK(user == &errors);
    destroyed++;
}

int main(void)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    uint8_t byte;
    create_image("disk.qcow2", 1 << 20, (const char *[]){"extended_l2=on", NULL});
    image = open_image("disk.qcow2");
    write_pattern(image, 1, 0, 4096);
    OK(qcow2_close(image));
    poke("disk.qcow2", l2_entry_at("disk.qcow2", 0) + 8, 8, UINT64_C(0x100000001));

    OK(qcow2_opts_set_log(opts, log_line, &errors, destroy));
    OK(qcow2_open("disk.qcow2", opts, &image));
    qcow2_opts_free(opts);
    CHECK(destroyed == 0);
    FAILS(qcow2_pread(image, &byte, 1, 0, 0), EIO, QCOW2_ERR_CORRUPT, "corrupt");
    CHECK(qcow2_pread(image, &byte, 1, 0, 0) == -EIO);
    CHECK(errors >= 1);
    qcow2_close(image);
    CHECK(destroyed == 1);
    return 0;
}
