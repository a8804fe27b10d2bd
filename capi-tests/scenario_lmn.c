/* Scenarios L, M and N: creating and growing with preallocation, over a backing file that is longer than the disk and
 * without one. 503 KiB lies in the middle of subcluster 27 of cluster 7. */
#include "test.h"

#define KIB 1024
#define LOWER_HALF UINT64_C(0x00000000ffffffff)

static void grow(uint64_t size, const char *mode)
{
    qcow2_image *image = open_image("disk.qcow2");
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_str(opts, "preallocation", mode));
    OK(qcow2_resize(image, size, opts, 0));
    qcow2_opts_free(opts);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
}

static void expect(int first, uint64_t boundary, uint64_t end)
{
    qcow2_image *image = open_image("disk.qcow2");
    CHECK((uint64_t)qcow2_size(image) == end);
    expect_pattern(image, first, 0, boundary);
    expect_pattern(image, 0, boundary, end - boundary);
    OK(qcow2_close(image));
    if (have_qemu())
        CHECK(shell("qemu-io -f qcow2 -c 'read -q -P %d 0 %d' -c 'read -q -P 0 %d %d' disk.qcow2 | (! grep .)", first,
                    (int)boundary, (int)boundary, (int)(end - boundary)));
}

static void scenario_l(const char *mode)
{
    char preallocation[40];
    snprintf(preallocation, sizeof(preallocation), "preallocation=%s", mode);
    unlink("disk.qcow2");
    create_image("disk.qcow2", 512 * KIB,
                 (const char *[]){"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", preallocation, NULL});
    check_image("disk.qcow2");
    /* A host cluster each, and nothing allocated in it: the backing file shows through. */
    for (uint64_t cluster = 0; cluster < 8; cluster++)
        expect_entry("L", "disk.qcow2", cluster, COPIED, 0);
    grow(1024 * KIB, "off");
    expect(0xff, 512 * KIB, 1024 * KIB);
    qcow2_image *image = open_image("disk.qcow2");
    struct qcow2_extent extent;
    size_t count;
    OK(qcow2_map(image, 0, 512 * KIB, 0, &extent, 1, &count));
    CHECK(count == 1 && extent.length == 512 * KIB && extent.depth == 1);
    OK(qcow2_close(image));
}

static void scenario_mn(bool backing, const char *mode)
{
    const char *with[] = {"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL};
    const char *without[] = {"extended_l2=on", NULL};
    unlink("disk.qcow2");
    create_image("disk.qcow2", 503 * KIB, backing ? with : without);
    if (!backing) {
        qcow2_image *image = open_image("disk.qcow2");
        write_pattern(image, 0xff, 0, 503 * KIB);
        OK(qcow2_close(image));
    }
    grow(1013 * KIB, mode);
    expect(0xff, 503 * KIB, 1013 * KIB);
    /* New clusters have a host cluster. What the backing file has there is hidden by zero bits, or by zeroes. */
    uint64_t bitmap = !backing ? 0 : strcmp(mode, "metadata") == 0 ? ~LOWER_HALF : LOWER_HALF;
    for (uint64_t cluster = 8; cluster < 16; cluster++)
        expect_entry(backing ? "M" : "N", "disk.qcow2", cluster, COPIED, bitmap);
}

int main(void)
{
    static const char *const modes[] = {"metadata", "falloc", "full"};
    fill_file("base.raw", 0xff, 1024 * KIB);
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_str(opts, "extended_l2", "on"));
    OK(qcow2_opts_set_str(opts, "cluster_size", "8k"));
    FAILS(qcow2_create("small.qcow2", 1 << 20, opts, 0), EINVAL, QCOW2_ERR_OPTION, "16384"); /* L1 */
    qcow2_opts_free(opts);
    for (int i = 0; i < 3; i++) {
        scenario_l(modes[i]);
        scenario_mn(true, modes[i]);
        scenario_mn(false, modes[i]);
    }
    return 0;
}
