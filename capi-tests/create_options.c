/* What create options do, as the format's own bytes and qemu-img see it. */
#include "test.h"

static void create(const char *const *settings, uint64_t size)
{
    unlink("disk.qcow2");
    create_image("disk.qcow2", size, settings);
    qcow2_image *image = open_image("disk.qcow2");
    CHECK((uint64_t)qcow2_size(image) == (size + 511) / 512 * 512);
    write_pattern(image, 0x27, 0, size < 100000 ? size : 100000);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
}

int main(void)
{
    char cluster[32], refcount[32];
    for (int bits = 9; bits <= 21; bits++)
        for (int order = 0; order <= 6; order++) {
            snprintf(cluster, sizeof(cluster), "cluster_size=%d", 1 << bits);
            snprintf(refcount, sizeof(refcount), "refcount_bits=%d", 1 << order);
            create((const char *[]){cluster, refcount, bits % 2 ? "lazy_refcounts=on" : "lazy_refcounts=off",
                                    bits >= 14 && order % 2 ? "extended_l2=on" : "extended_l2=off", NULL}, 1 << 20);
            CHECK(peek("disk.qcow2", 20, 4) == (uint64_t)bits && peek("disk.qcow2", 96, 4) == (uint64_t)order);
            CHECK(peek("disk.qcow2", 4, 4) == 3 && peek("disk.qcow2", 24, 8) == 1 << 20);
        }
    create((const char *[]){"compat=0.10", NULL}, 1 << 20);
    CHECK(peek("disk.qcow2", 4, 4) == 2);
    if (qcow2_has_feature("zstd")) {
        create((const char *[]){"compression_type=zstd", NULL}, 1 << 20);
        CHECK(peek("disk.qcow2", 72, 8) == 8 && peek("disk.qcow2", 104, 1) == 1);
    }
    create(NULL, 513);
    create(NULL, 0);
    return 0;
}
