/* Which backing files are opened: none unless allowed; with "relative" only below the folder; with "any" any; a chain
 * that is a loop or too deep, and formats that are missing or unknown, are refused. */
#include <sys/stat.h>

#include "test.h"

static void overlay(const char *path, const char *backing, const char *format)
{
    char file[256], fmt[64];
    const char *settings[] = {file, fmt, NULL};
    snprintf(file, sizeof(file), "backing_file=%s", backing);
    snprintf(fmt, sizeof(fmt), "backing_fmt=%s", format);
    unlink(path);
    create_image(path, 1 << 20, settings);
}

static int open_with(const char *path, const char *key, const char *value, const char *policy)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    if (policy != NULL)
        OK(qcow2_opts_set_str(opts, "backing", policy));
    if (key != NULL)
        OK(qcow2_opts_set_str(opts, key, value));
    int result = qcow2_open(path, opts, &image);
    qcow2_opts_free(opts);
    if (result == 0) {
        expect_pattern(image, 0x42, 0, 4096);
        expect_pattern(image, 0, 4096, 4096);
        OK(qcow2_close(image));
    } else {
        CHECK(image == NULL);
    }
    return result;
}

#define DENIED(path, policy, part) FAILS(open_with(path, NULL, NULL, policy), EACCES, QCOW2_ERR_BACKING_DENIED, part)

int main(void)
{
    char absolute[512], here[256];
    CHECK(getcwd(here, sizeof(here)) != NULL && mkdir("in", 0755) == 0);
    fill_file("base.raw", 0x42, 4096);
    fill_file("in/base.raw", 0x42, 4096);

    overlay("in/near.qcow2", "base.raw", "raw");
    DENIED("in/near.qcow2", NULL, "'base.raw'");
    DENIED("in/near.qcow2", "none", "option 'backing'");
    OK(open_with("in/near.qcow2", NULL, NULL, "relative"));
    OK(open_with("in/near.qcow2", NULL, NULL, "any"));

    overlay("in/up.qcow2", "../base.raw", "raw");
    DENIED("in/up.qcow2", "relative", "'../base.raw'");
    OK(open_with("in/up.qcow2", NULL, NULL, "any"));
    snprintf(absolute, sizeof(absolute), "%s/base.raw", here);
    overlay("in/absolute.qcow2", absolute, "raw");
    DENIED("in/absolute.qcow2", "relative", absolute);
    OK(open_with("in/absolute.qcow2", NULL, NULL, "any"));
    CHECK(symlink("../base.raw", "in/link.raw") == 0);
    overlay("in/link.qcow2", "link.raw", "raw");
    DENIED("in/link.qcow2", "relative", "link.raw");
    overlay("in/json.qcow2", "json:{\"driver\":\"raw\"}", "raw");
    DENIED("in/json.qcow2", "any", "json:");

    /* A chain: each name counts from its own file's folder; the depth is limited. */
    overlay("top.qcow2", "in/near.qcow2", "qcow2");
    OK(open_with("top.qcow2", NULL, NULL, "relative"));
    OK(open_with("top.qcow2", "backing_depth_max", "2", "relative"));
    FAILS(open_with("top.qcow2", "backing_depth_max", "1", "relative"), ELOOP, QCOW2_ERR_CHAIN, "deeper than 1");
    overlay("a.qcow2", "b.qcow2", "qcow2");
    overlay("b.qcow2", "a.qcow2", "qcow2");
    FAILS(open_with("a.qcow2", NULL, NULL, "any"), ELOOP, QCOW2_ERR_CHAIN, "a.qcow2");
    overlay("self.qcow2", "self.qcow2", "qcow2");
    FAILS(open_with("self.qcow2", NULL, NULL, "any"), ELOOP, QCOW2_ERR_CHAIN, "self.qcow2");

    overlay("gone.qcow2", "missing.raw", "raw");
    FAILS(open_with("gone.qcow2", NULL, NULL, "any"), ENOENT, QCOW2_ERR_IO, "missing.raw");
    overlay("liar.qcow2", "base.raw", "qcow2");
    FAILS(open_with("liar.qcow2", NULL, NULL, "any"), EINVAL, QCOW2_ERR_NOT_QCOW2, "base.raw");

    /* Formats are declared or refused. To have none, the extension is made one that nobody knows. */
    overlay("nofmt.qcow2", "base.raw", "raw");
    uint64_t at = peek("nofmt.qcow2", 100, 4);
    while (peek("nofmt.qcow2", at, 4) != 0xe2792aca)
        at += 8 + (peek("nofmt.qcow2", at + 4, 4) + 7) / 8 * 8;
    poke("nofmt.qcow2", at, 4, 0x12345678);
    FAILS(open_with("nofmt.qcow2", NULL, NULL, "any"), ENOTSUP, QCOW2_ERR_BACKING_FORMAT, "base.raw");
    OK(open_with("nofmt.qcow2", "backing_fmt_missing", "raw", "any"));
    poke("nofmt.qcow2", at, 4, 0xe2792aca);
    poke("nofmt.qcow2", at + 8, 3, 0x766d64); /* "vmd" */
    FAILS(open_with("nofmt.qcow2", NULL, NULL, "any"), ENOTSUP, QCOW2_ERR_BACKING_FORMAT, "'vmd'");
    return 0;
}
