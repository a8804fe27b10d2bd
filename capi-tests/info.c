/* Facts: the struct, and JSON that qemu-img info agrees with in every key that both have. */
#include "test.h"

int main(void)
{
    const char *settings[] = {"extended_l2=on", "cluster_size=32k", "refcount_bits=8", "lazy_refcounts=on", "backing_file=base.raw",
                              "backing_fmt=raw", NULL};
    struct qcow2_info info;
    char *json;
    fill_file("base.raw", 1, 4096);
    create_image("disk.qcow2", 5 << 20, settings);
    qcow2_image *image = open_image("disk.qcow2");
    OK(qcow2_get_info(image, &info, sizeof(info)));
    CHECK(info.size_bytes == 5 << 20 && qcow2_size(image) == 5 << 20);
    CHECK(info.cluster_size_bytes == 32768 && info.subcluster_size_bytes == 1024);
    CHECK(info.version == 3 && info.refcount_bits == 8 && info.compression_type == QCOW2_COMPRESSION_ZLIB);
    CHECK((info.flags & ~QCOW2_INFO_ALLOCATED_BYTES) ==
          (QCOW2_INFO_EXTENDED_L2 | QCOW2_INFO_LAZY_REFCOUNTS | QCOW2_INFO_BACKING_FILE));
    CHECK(info.incompatible_features == 16 && info.compatible_features == 1 && info.autoclear_features == 0);
    CHECK(strcmp(info.backing_file, "base.raw") == 0 && strcmp(info.backing_fmt, "raw") == 0 && info.snapshots == 0);
    CHECK(info.file_size_bytes >= 4 * 32768 && info.reserved == 0);

    OK(qcow2_info_json(image, &json));
    CHECK(strstr(json, "\"virtual-size\": 5242880") != NULL && strstr(json, "\"filename\": \"disk.qcow2\"") != NULL);
    write_file("ours.json", json, strlen(json));
    qcow2_string_free(json);
    OK(qcow2_close(image));
    need_qemu();
    CHECK(shell("qemu-img info --output=json disk.qcow2 >theirs.json"));
    if (!shell("diff -u theirs.json ours.json >&2"))
        FAIL("our JSON is not that of qemu-img info");
    return 0;
}
