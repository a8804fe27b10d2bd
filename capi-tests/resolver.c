/* A resolver decides what the names in a chain mean; storages given by the caller come before it. */
#include "memory_storage.h"

static int asked, destroyed;
static char last_name[64];
static uint32_t last_format, last_depth;

static int resolve(void *user, const char *name, uint32_t format, uint32_t depth, qcow2_storage **storage)
{
    CHECK(user == &asked);
    asked++;
    snprintf(last_name, sizeof(last_name), "%s", name);
    last_format = format;
    last_depth = depth;
    if (strcmp(name, "vault:middle") == 0)
        return qcow2_storage_open("middle.qcow2", QCOW2_STORAGE_READ_ONLY, storage);
    if (strcmp(name, "vault:base") == 0)
        return qcow2_storage_open("base.raw", QCOW2_STORAGE_READ_ONLY, storage);
    return strcmp(name, "vault:nothing") == 0 ? 0 : -EPERM;
}

static void destroy(void *user)
{
    CHECK(user == &asked);
    destroyed++;
}

static void overlay(const char *path, const char *backing, const char *format)
{
    char file[128], fmt[64];
    const char *settings[] = {file, fmt, NULL};
    snprintf(file, sizeof(file), "backing_file=%s", backing);
    snprintf(fmt, sizeof(fmt), "backing_fmt=%s", format);
    create_image(path, 1 << 20, settings);
}

int main(void)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    struct memory m;
    fill_file("base.raw", 0x42, 1 << 20);
    overlay("middle.qcow2", "vault:base", "raw");
    overlay("top.qcow2", "vault:middle", "qcow2");

    OK(qcow2_opts_set_resolver(opts, resolve, &asked, destroy));
    OK(qcow2_open("top.qcow2", opts, &image));
    CHECK(asked == 2 && strcmp(last_name, "vault:base") == 0 && last_format == QCOW2_FORMAT_RAW && last_depth == 1);
    expect_pattern(image, 0x42, 0, 1 << 20);
    OK(qcow2_close(image));

    overlay("refused.qcow2", "vault:other", "raw");
    FAILS(qcow2_open("refused.qcow2", opts, &image), EPERM, QCOW2_ERR_IO, "vault:other");
    overlay("nothing.qcow2", "vault:nothing", "raw");
    FAILS(qcow2_open("nothing.qcow2", opts, &image), EINVAL, QCOW2_ERR_ARGUMENT, "resolver");
    FAILS(qcow2_create("x.qcow2", 512, opts, 0), EINVAL, QCOW2_ERR_OPTION, "'resolver' means nothing for creating");

    /* A storage for the middle; the resolver is asked for the base alone. */
    qcow2_storage *storage = memory_storage(&m, true), *middle;
    qcow2_storage_free(storage);
    CHECK(m.destroyed == 1);
    OK(qcow2_storage_open("middle.qcow2", QCOW2_STORAGE_READ_ONLY, &middle));
    FAILS(qcow2_opts_set_storage(opts, QCOW2_ROLE_BACKING, 1, middle), EINVAL, QCOW2_ERR_ARGUMENT, "'position' is 1");
    FAILS(qcow2_opts_set_storage(opts, 99, 0, middle), EINVAL, QCOW2_ERR_ARGUMENT, "'role' is 99");
    OK(qcow2_opts_set_storage(opts, QCOW2_ROLE_BACKING, 0, middle));
    qcow2_storage_free(middle);
    asked = 0;
    OK(qcow2_open("top.qcow2", opts, &image));
    CHECK(asked == 1);
    CHECK(destroyed == 0);
    qcow2_opts_free(opts);
    expect_pattern(image, 0x42, 0, 1 << 20);
    write_pattern(image, 0x43, 100, 100);
    expect_pattern(image, 0x42, 0, 100);
    OK(qcow2_close(image));
    CHECK(destroyed == 1);
    return 0;
}
