/* The list of options: each can be set to its default by the setter of its kind, and the keys of qemu-img are there. */
#include "test.h"

int main(void)
{
    static const char *const keys[] = {"cluster_size", "extended_l2", "lazy_refcounts", "backing_file", "backing_fmt",
                                       "compression_type", "preallocation", "refcount_bits", "compat", "backing",
                                       "data_file", "data_file_raw", "nocow", "extent_size_hint"};
    struct qcow2_option option;
    size_t found = 0, index;
    qcow2_opts *opts = qcow2_opts_new();
    for (index = 0; qcow2_option_describe(index, &option, sizeof(option)) == 0; index++) {
        CHECK(option.name[0] != 0 && option.help[0] != 0);
        CHECK((option.used_by & (QCOW2_OPTION_FOR_OPEN | QCOW2_OPTION_FOR_CREATE)) != 0);
        CHECK((option.values[0] != 0) == (option.kind == QCOW2_OPTION_CHOICE));
        if (option.default_value[0] != 0)
            OK(qcow2_opts_set_str(opts, option.name, option.default_value));
        if (option.kind == QCOW2_OPTION_BOOL)
            OK(qcow2_opts_set_bool(opts, option.name, 0));
        if (option.kind == QCOW2_OPTION_SIZE || option.kind == QCOW2_OPTION_NUMBER)
            OK(qcow2_opts_set_u64(opts, option.name, 65536 >> (option.kind == QCOW2_OPTION_NUMBER ? 10 : 0)));
        for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++)
            found += strcmp(keys[i], option.name) == 0;
    }
    CHECK(found == sizeof(keys) / sizeof(keys[0]));
    FAILS(qcow2_option_describe(index, &option, sizeof(option)), EINVAL, QCOW2_ERR_ARGUMENT, "index");
    qcow2_opts_free(opts);
    return 0;
}
