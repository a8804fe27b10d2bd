/* Snapshots: each call, what it refuses, and what qemu-img makes of the image in between. */
#include "test.h"

static int stop_at_once(void *user, uint64_t done, uint64_t total)
{
    CHECK(done <= total);
    return ++*(int *)user;
}

static int count_calls(void *user, uint64_t done, uint64_t total)
{
    CHECK(done <= total);
    ++*(int *)user;
    return 0;
}

static void list_and_compare(qcow2_image *image)
{
    struct qcow2_snapshot_info info;
    qcow2_snapshots *list;
    OK(qcow2_snapshot_list(image, &list));
    CHECK(qcow2_snapshots_count(list) == 2 && qcow2_snapshots_count(NULL) == 0);
    OK(qcow2_snapshots_get(list, 0, &info, sizeof(info)));
    CHECK(strcmp(info.id, "1") == 0 && strcmp(info.name, "first") == 0 && info.size_bytes == 8 << 20);
    CHECK(info.date_sec == 1234567890 && info.date_nsec == 5 && info.vm_clock_nsec == UINT64_C(7000000003));
    CHECK(info.icount == UINT64_MAX && info.vm_state_bytes == 0);
    OK(qcow2_snapshots_get(list, 1, &info, sizeof(info)));
    CHECK(strcmp(info.id, "2") == 0 && strcmp(info.name, "second") == 0 && info.date_sec > 1500000000);
    FAILS(qcow2_snapshots_get(list, 2, &info, sizeof(info)), EINVAL, QCOW2_ERR_ARGUMENT, "index");
    FAILS(qcow2_snapshots_get(list, 0, &info, 8), EINVAL, QCOW2_ERR_ARGUMENT, "size");
    FAILS(qcow2_snapshots_get(NULL, 0, &info, sizeof(info)), EINVAL, QCOW2_ERR_ARGUMENT, "list");
    qcow2_snapshots_free(list);
    qcow2_snapshots_free(NULL);
}

/* Nobody has the image open. */
static void compare_json(void)
{
    char *json;
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    if (!have_qemu())
        return;
    OK(qcow2_opts_set_bool(opts, "inspect", 1));
    OK(qcow2_open("disk.qcow2", opts, &image));
    qcow2_opts_free(opts);
    OK(qcow2_info_json(image, &json));
    write_file("ours.json", json, strlen(json));
    qcow2_string_free(json);
    OK(qcow2_close(image));
    CHECK(shell("qemu-img info --output=json disk.qcow2 >theirs.json"));
    if (!shell("diff -u theirs.json ours.json >&2"))
        FAIL("our JSON is not that of qemu-img info");
}

static void refusals(qcow2_image *image)
{
    struct qcow2_snapshot_facts facts = {.struct_size = sizeof(facts), .date_nsec = 1000000000};
    qcow2_image *opened = image;
    FAILS(qcow2_snapshot_create(image, "x", &facts, 0), EINVAL, QCOW2_ERR_ARGUMENT, "date_nsec");
    FAILS(qcow2_snapshot_create(image, "", NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "name");
    FAILS(qcow2_snapshot_create(image, NULL, NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "name");
    FAILS(qcow2_snapshot_create(image, "x", NULL, 1), EINVAL, QCOW2_ERR_ARGUMENT, "flags");
    FAILS(qcow2_snapshot_create(NULL, "x", NULL, 0), EINVAL, QCOW2_ERR_ARGUMENT, "image");
    FAILS(qcow2_snapshot_apply(image, "none", 0), ENOENT, QCOW2_ERR_SNAPSHOT, "none");
    FAILS(qcow2_snapshot_delete(image, "none", 0, NULL, NULL), ENOENT, QCOW2_ERR_SNAPSHOT, "none");
    FAILS(qcow2_snapshot_open(image, "none", 0, &opened), ENOENT, QCOW2_ERR_SNAPSHOT, "none");
    CHECK(opened == NULL);
}

int main(void)
{
    const char *settings[] = {"backing_file=base.raw", "backing_fmt=raw", NULL};
    struct qcow2_snapshot_facts facts = {.struct_size = sizeof(facts), .date_sec = 1234567890, .date_nsec = 5,
                                         .vm_clock_nsec = UINT64_C(7000000003)};
    qcow2_image *image, *opened;
    struct qcow2_extent extent;
    size_t n;
    int calls = 0;

    fill_file("base.raw", 9, 1 << 20);
    create_image("disk.qcow2", 8 << 20, settings);
    image = open_image("disk.qcow2");
    refusals(image);
    write_pattern(image, 1, 100000, 300000);
    OK(qcow2_snapshot_create(image, "first", &facts, 0));
    write_pattern(image, 2, 200000, 1000);
    OK(qcow2_snapshot_create(image, "second", NULL, 0));
    write_pattern(image, 3, 200000, 500);
    list_and_compare(image);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    compare_json();

    image = open_image("disk.qcow2");
    OK(qcow2_snapshot_open(image, "first", 0, &opened));
    expect_pattern(opened, 1, 100000, 300000);
    expect_pattern(opened, 9, 0, 100000);
    OK(qcow2_map(opened, 100000, 1, 0, &extent, 1, &n));
    CHECK(n == 1 && (extent.flags & QCOW2_EXTENT_DATA) != 0 && extent.depth == 0);
    FAILS(qcow2_pwrite(opened, &calls, 1, 0, 0), EROFS, QCOW2_ERR_READ_ONLY, "read-only");
    FAILS(qcow2_snapshot_delete(image, "1", 0, NULL, NULL), EBUSY, QCOW2_ERR_SNAPSHOT, "open");
    OK(qcow2_snapshot_apply(image, "1", 0));
    expect_pattern(image, 1, 100000, 300000);
    write_pattern(image, 4, 100000, 300000);
    expect_pattern(opened, 1, 100000, 300000);
    OK(qcow2_close(opened));

    FAILS(qcow2_snapshot_delete(image, "first", 0, stop_at_once, &calls), ECANCELED, QCOW2_ERR_CANCELLED, "");
    CHECK(calls == 1);
    OK(qcow2_snapshot_delete(image, "first", 0, count_calls, &calls));
    CHECK(calls > 2);
    expect_pattern(image, 4, 100000, 300000);

    /* A snapshot outlives the handle that it was opened with. */
    OK(qcow2_snapshot_open(image, "second", 0, &opened));
    OK(qcow2_close(image));
    expect_pattern(opened, 2, 200000, 1000);
    FAILS(qcow2_open("disk.qcow2", NULL, &image), EBUSY, QCOW2_ERR_LOCKED, "disk.qcow2");
    OK(qcow2_close(opened));
    check_image("disk.qcow2");
    if (have_qemu())
        CHECK(shell("qemu-img snapshot -a second disk.qcow2 && qemu-img snapshot -d second disk.qcow2"));
    check_image("disk.qcow2");
    return 0;
}
