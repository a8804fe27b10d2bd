/* Dirty bitmaps: made, recorded, listed, merged and removed; what QEMU finds; and the incremental backup of examples/. */
#include "test.h"

#define DISK (8 << 20)

static struct qcow2_extent extents[64];

/* The dirty extents of a bitmap, as text: "start+length ..." */
static const char *dirty(qcow2_image *image, const char *name)
{
    static char text[4096];
    size_t n, used = 0;
    uint64_t at = 0;
    text[0] = 0;
    while (at < DISK) {
        OK(qcow2_bitmap_extents(image, name, at, DISK - at, 0, extents, 2, &n)); /* resumed again and again */
        CHECK(n >= 1 && n <= 2);
        for (size_t i = 0; i < n; i++) {
            CHECK(extents[i].start == at && extents[i].length > 0 && extents[i].host_offset == 0 && extents[i].depth == 0);
            at += extents[i].length;
            if (extents[i].flags & QCOW2_EXTENT_DIRTY)
                used += (size_t)snprintf(text + used, sizeof(text) - used, "%" PRIu64 "+%" PRIu64 " ", extents[i].start, extents[i].length);
        }
    }
    return text;
}

static void expect_dirty(qcow2_image *image, const char *name, const char *expected)
{
    const char *found = dirty(image, name);
    if (strcmp(found, expected) != 0)
        FAIL("%s: dirty is %s, not %s", name, found, expected);
}

static void operations(void)
{
    struct qcow2_bitmap facts;
    size_t n;
    CHECK(shell("qemu-img create -q -f qcow2 disk.qcow2 8M && qemu-img create -q -f qcow2 other.qcow2 8M"));
    qcow2_image *image = open_image("disk.qcow2"), *other = open_image("other.qcow2");
    OK(qcow2_bitmap_add(image, "a", 4096, 0));
    OK(qcow2_bitmap_add(image, "b", 0, QCOW2_BITMAP_DISABLED));
    OK(qcow2_bitmap_add(other, "c", 65536, 0));
    write_pattern(image, 1, 4096, 512);
    write_pattern(image, 1, (1 << 20) - 1, 2);
    write_pattern(other, 1, 5 << 20, 512);
    expect_dirty(image, "a", "4096+4096 1044480+8192 ");
    expect_dirty(image, "b", "");
    OK(qcow2_bitmap_describe(image, 0, &facts, sizeof(facts)));
    CHECK(strcmp(facts.name, "a") == 0 && facts.granularity_bytes == 4096);
    CHECK(facts.flags == (QCOW2_BITMAP_ENABLED | QCOW2_BITMAP_IN_USE) && facts.reserved == 0);
    OK(qcow2_bitmap_describe(image, 1, &facts, sizeof(facts)));
    CHECK(strcmp(facts.name, "b") == 0 && facts.granularity_bytes == 65536 && facts.flags == 0);
    FAILS(qcow2_bitmap_describe(image, 2, &facts, sizeof(facts)), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    OK(qcow2_bitmap_merge(image, "b", NULL, "a"));
    OK(qcow2_bitmap_merge(image, "b", other, "c"));
    expect_dirty(image, "b", "0+65536 983040+131072 5242880+65536 ");
    OK(qcow2_bitmap_enable(image, "b"));
    OK(qcow2_bitmap_disable(image, "a"));
    OK(qcow2_bitmap_clear(image, "a"));
    write_pattern(image, 2, 7 << 20, 512);
    expect_dirty(image, "a", "");
    expect_dirty(image, "b", "0+65536 983040+131072 5242880+65536 7340032+65536 ");
    /* Inside of what one bit stands for. */
    OK(qcow2_bitmap_extents(image, "b", 100, 65536, 0, extents, 64, &n));
    CHECK(n == 2 && extents[0].start == 100 && extents[0].length == 65436 && extents[1].length == 100);
    OK(qcow2_bitmap_extents(image, "b", 100, 0, 0, extents, 64, &n));
    CHECK(n == 0);
    OK(qcow2_bitmap_remove(image, "a"));
    /* Another size: what the disk gains is dirty, and what it loses is forgotten. */
    OK(qcow2_resize(image, DISK + 65536, NULL, 0));
    OK(qcow2_bitmap_extents(image, "b", DISK, 65536, 0, extents, 64, &n));
    CHECK(n == 1 && extents[0].length == 65536 && extents[0].flags == QCOW2_EXTENT_DIRTY);
    OK(qcow2_resize(image, DISK, NULL, QCOW2_ALLOW_SHRINK));
    expect_dirty(image, "b", "0+65536 983040+131072 5242880+65536 7340032+65536 ");
    OK(qcow2_close(image));
    OK(qcow2_close(other));
    CHECK(shell("qemu-img check -q -f qcow2 disk.qcow2 && qemu-img info disk.qcow2 | grep -q 'name: b'"));
}

static void refusals(void)
{
    size_t n = 7;
    struct qcow2_bitmap facts;
    qcow2_image *image = open_image("disk.qcow2");
    FAILS(qcow2_bitmap_add(image, "b", 0, 0), EEXIST, QCOW2_ERR_BITMAP, "exists");
    FAILS(qcow2_bitmap_add(image, "x", 3, 0), EINVAL, QCOW2_ERR_ARGUMENT, "granularity");
    FAILS(qcow2_bitmap_add(image, "x", 0, 2), EINVAL, QCOW2_ERR_ARGUMENT, "flags");
    FAILS(qcow2_bitmap_add(image, NULL, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "name");
    FAILS(qcow2_bitmap_add(NULL, "x", 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "image");
    FAILS(qcow2_bitmap_remove(image, "x"), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    FAILS(qcow2_bitmap_clear(image, "x"), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    FAILS(qcow2_bitmap_enable(image, "x"), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    FAILS(qcow2_bitmap_disable(image, NULL), EINVAL, QCOW2_ERR_ARGUMENT, "name");
    FAILS(qcow2_bitmap_merge(image, "b", NULL, "x"), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    FAILS(qcow2_bitmap_merge(image, "b", NULL, NULL), EINVAL, QCOW2_ERR_ARGUMENT, "other");
    FAILS(qcow2_bitmap_extents(image, "x", 0, 1, 0, extents, 64, &n), ENOENT, QCOW2_ERR_BITMAP, "no bitmap");
    CHECK(n == 0);
    FAILS(qcow2_bitmap_extents(image, "b", 0, 1, 1, extents, 64, &n), EINVAL, QCOW2_ERR_ARGUMENT, "flags");
    FAILS(qcow2_bitmap_extents(image, "b", 0, 1, 0, extents, 0, &n), EINVAL, QCOW2_ERR_ARGUMENT, "n_max");
    FAILS(qcow2_bitmap_extents(image, "b", 0, 1, 0, NULL, 64, &n), EINVAL, QCOW2_ERR_ARGUMENT, "extents");
    FAILS(qcow2_bitmap_extents(image, "b", DISK, 1, 0, extents, 64, &n), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "past the end");
    FAILS(qcow2_bitmap_describe(image, 0, &facts, 8), EINVAL, QCOW2_ERR_ARGUMENT, "out_size");
    OK(qcow2_close(image));
}

/* The example, against the content of the image: a full backup, two incremental ones. */
static void backup(void)
{
    CHECK(shell("${CC:-cc} -std=c11 -Wall -Wextra -Werror \"$root/examples/incremental_backup.c\" -I\"$root/include\" "
                "-L\"$root/build\" -lqcow2 -Wl,-rpath,\"$root/build\" -o incremental_backup"));
    CHECK(shell("qemu-img create -q -f qcow2 vm.qcow2 8M && qemu-io -f qcow2 -c 'write -P 1 0 3M' vm.qcow2 >/dev/null"));
    CHECK(shell("./incremental_backup vm.qcow2 backup.raw | grep -qx 'full: 8388608 of 8388608 bytes copied'"));
    CHECK(shell("qemu-img compare -q -f qcow2 -F raw vm.qcow2 backup.raw"));
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 2 1M 64k' -c 'write -z 2M 64k' vm.qcow2 >/dev/null")); /* QEMU records */
    CHECK(shell("./incremental_backup vm.qcow2 backup.raw | grep -qx 'incremental: 131072 of 8388608 bytes copied'"));
    CHECK(shell("qemu-img compare -q -f qcow2 -F raw vm.qcow2 backup.raw"));
    qcow2_image *image = open_image("vm.qcow2"); /* we record */
    write_pattern(image, 3, 4 << 20, 1);
    OK(qcow2_close(image));
    CHECK(shell("./incremental_backup vm.qcow2 backup.raw | grep -qx 'incremental: 65536 of 8388608 bytes copied'"));
    CHECK(shell("qemu-img compare -q -f qcow2 -F raw vm.qcow2 backup.raw && qemu-img check -q -f qcow2 vm.qcow2"));
}

int main(void)
{
    need_qemu();
    operations();
    refusals();
    backup();
    return 0;
}
