/* Options that are wrong: the key, the value, the kind, the combination, the call. Each is refused by name. */
#include "test.h"

static void create_fails(const char *const *settings, const char *named)
{
    qcow2_opts *opts = qcow2_opts_new();
    for (; *settings != NULL; settings += 2)
        OK(qcow2_opts_set_str(opts, settings[0], settings[1]));
    FAILS(qcow2_create("never.qcow2", 1 << 20, opts, 0), EINVAL, QCOW2_ERR_OPTION, named);
    qcow2_opts_free(opts);
    CHECK(access("never.qcow2", F_OK) != 0);
}

int main(void)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;

    FAILS(qcow2_opts_set_str(opts, "cluster_sise", "64k"), EINVAL, QCOW2_ERR_OPTION, "unknown option 'cluster_sise'");
    FAILS(qcow2_opts_set_str(opts, "", "64k"), EINVAL, QCOW2_ERR_OPTION, "unknown option ''");
    FAILS(qcow2_opts_set_str(opts, "caf\xe9", "64k"), EINVAL, QCOW2_ERR_ARGUMENT, "UTF-8");
    static const char *const wrong[][2] = {
        {"cluster_size", "3000"}, {"cluster_size", "256"}, {"cluster_size", "4M"}, {"cluster_size", ""},
        {"cluster_size", "-1"}, {"refcount_bits", "3"}, {"refcount_bits", "128"}, {"compat", "2"},
        {"extended_l2", "maybe"}, {"compression_type", "lzma"}, {"backing", "all"}, {"backing_fmt", "vmdk"},
        {"read_only", "1"}, {"l2_cache_size", "1Q"}, {"backing_depth_max", "99999999999"}, {"backing_file", ""},
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        FAILS(qcow2_opts_set_str(opts, wrong[i][0], wrong[i][1]), EINVAL, QCOW2_ERR_OPTION, wrong[i][0]);
        CHECK(strstr(qcow2_last_error(), wrong[i][1]) != NULL);
    }
    FAILS(qcow2_opts_set_str(opts, "preallocation", "some"), EINVAL, QCOW2_ERR_OPTION, "off, metadata, falloc or full");
    FAILS(qcow2_opts_set_u64(opts, "cluster_size", 1000), EINVAL, QCOW2_ERR_OPTION, "1000");
    FAILS(qcow2_opts_set_u64(opts, "read_only", 1), EINVAL, QCOW2_ERR_OPTION, "read_only");
    FAILS(qcow2_opts_set_u64(opts, "compat", 3), EINVAL, QCOW2_ERR_OPTION, "compat");
    FAILS(qcow2_opts_set_bool(opts, "cluster_size", 1), EINVAL, QCOW2_ERR_OPTION, "cluster_size");

    /* What was refused has left nothing behind: the object still opens and creates with its defaults. */
    OK(qcow2_create("plain.qcow2", 1 << 20, opts, 0));
    OK(qcow2_open("plain.qcow2", opts, &image));
    OK(qcow2_close(image));
    check_image("plain.qcow2");

    /* An option of the other call would be left out silently: it is refused. */
    OK(qcow2_opts_set_u64(opts, "cluster_size", 65536));
    FAILS(qcow2_open("plain.qcow2", opts, &image), EINVAL, QCOW2_ERR_OPTION, "'cluster_size' means nothing for opening");
    CHECK(image == NULL);
    qcow2_opts_free(opts);
    create_fails((const char *[]){"read_only", "on", NULL}, "'read_only' means nothing for creating");

    create_fails((const char *[]){"extended_l2", "on", "cluster_size", "8k", NULL}, "cluster_size");
    create_fails((const char *[]){"extended_l2", "on", "compat", "0.10", NULL}, "extended_l2");
    create_fails((const char *[]){"refcount_bits", "1", "compat", "0.10", NULL}, "refcount_bits");
    create_fails((const char *[]){"lazy_refcounts", "on", "compat", "v2", NULL}, "lazy_refcounts");
    create_fails((const char *[]){"compression_type", "zstd", "compat", "v2", NULL}, "compression_type");
    create_fails((const char *[]){"backing_file", "base.raw", NULL}, "backing_fmt");
    create_fails((const char *[]){"backing_fmt", "raw", NULL}, "backing_fmt");
    return 0;
}
