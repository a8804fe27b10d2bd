/* qcow2_check and its siblings, that for an open image among them: the numbers of `qemu-img check`, findings, repair by path, descriptor and storage,
 * cancelling at every call of the progress function; and that a dirty image is repaired when it is opened to write. */
#include "test.h"

static struct qcow2_check_result result;

struct seen {
    unsigned findings, leaks, too_low, destroyed, calls, cancel_at;
    uint64_t done;
};

static void on_finding(void *user, const struct qcow2_finding *finding)
{
    struct seen *seen = user;
    seen->findings++;
    seen->leaks += finding->kind == QCOW2_FINDING_LEAK;
    seen->too_low += finding->kind == QCOW2_FINDING_COUNT_TOO_LOW;
    CHECK(finding->text != NULL && strlen(finding->text) > 10 && finding->clusters > 0);
}

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    struct seen *seen = user;
    CHECK(total > 0 && done <= total && done >= seen->done);
    seen->done = done;
    return ++seen->calls == seen->cancel_at;
}

static void on_destroy(void *user)
{
    ((struct seen *)user)->destroyed++;
}

/* 64 KiB clusters as both tools lay them out: refcount table, block, L1, L2, then data from 0x50000 on. */
static void make(const char *path)
{
    qcow2_image *image;
    char data[65536];
    memset(data, 7, sizeof(data));
    OK(qcow2_create(path, 4 << 20, NULL, QCOW2_OVERWRITE));
    OK(qcow2_open(path, NULL, &image));
    for (int i = 0; i < 4; i++)
        OK(qcow2_pwrite(image, data, sizeof(data), (uint64_t)i * sizeof(data), 0));
    OK(qcow2_close(image));
}

static void damage(const char *path)
{
    poke(path, 0x20000 + 2 * 6, 2, 0); /* cluster 6 counts as free */
    poke(path, 0x20000 + 2 * 7, 2, 3); /* cluster 7 has three references too many */
}

int main(void)
{
    struct seen seen = {0};
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_finding(opts, on_finding, &seen, on_destroy));
    OK(qcow2_opts_set_progress(opts, on_progress, &seen, NULL));
    OK(qcow2_opts_set_str(opts, "check_memory", "1M"));

    make("disk");
    OK(qcow2_check("disk", NULL, 0, &result, sizeof(result)));
    CHECK(result.corruptions == 0 && result.leaks == 0 && result.check_errors == 0);
    CHECK(result.total_clusters == 64 && result.allocated_clusters == 4 && result.image_end_offset == 0x90000);

    damage("disk");
    OK(qcow2_check("disk", opts, 0, &result, sizeof(result)));
    /* The two counts, and the two COPIED flags that they make wrong. */
    CHECK(result.corruptions == 3 && result.leaks == 1 && result.corruptions_fixed == 0);
    CHECK(seen.findings == 4 && seen.leaks == 1 && seen.too_low == 1 && seen.calls > 0);
    if (have_qemu())
        CHECK(shell("qemu-img check --output=json disk 2>/dev/null | grep -q '\"corruptions\": 3' && "
                    "qemu-img check --output=json disk 2>/dev/null | grep -q '\"leaks\": 1'"));

    /* Cancelled at every call: what is left is no worse, and the next repair finishes. */
    unsigned cancelled = 0;
    for (unsigned at = 1; at < 1000; at++) {
        make("disk");
        damage("disk");
        seen = (struct seen){.cancel_at = at};
        int done = qcow2_check("disk", opts, QCOW2_CHECK_FIX_ALL, &result, sizeof(result));
        if (done == 0)
            break;
        CHECK(done == -ECANCELED && qcow2_last_error_code() == QCOW2_ERR_CANCELLED);
        cancelled++;
        seen = (struct seen){0};
        OK(qcow2_check("disk", opts, 0, &result, sizeof(result)));
        CHECK(result.corruptions <= 3 && result.leaks <= 1 && result.check_errors == 0);
        seen = (struct seen){0};
        OK(qcow2_check("disk", opts, QCOW2_CHECK_FIX_ALL, &result, sizeof(result)));
        CHECK(result.corruptions == 0 && result.leaks == 0);
    }
    CHECK(cancelled > 3);
    CHECK(result.corruptions == 0 && result.corruptions_fixed == 1 && result.leaks_fixed == 1);
    if (have_qemu())
        CHECK(shell("qemu-img check -q disk"));

    /* By descriptor and by storage; leaks alone leave what is too low. */
    seen = (struct seen){0};
    make("disk");
    damage("disk");
    int fd = open("disk", O_RDWR);
    CHECK(fd >= 0);
    OK(qcow2_check_fd(fd, opts, QCOW2_CHECK_FIX_LEAKS, &result, sizeof(result)));
    CHECK(result.leaks == 0 && result.leaks_fixed == 1 && result.corruptions == 2);
    seen = (struct seen){0};
    CHECK(close(fd) == 0);
    qcow2_storage *storage;
    OK(qcow2_storage_open("disk", 0, &storage));
    OK(qcow2_check_storage(storage, opts, QCOW2_CHECK_FIX_ALL | QCOW2_CHECK_FIX_LEAKS, &result, sizeof(result)));
    CHECK(result.corruptions == 0 && result.leaks == 0);
    qcow2_storage_free(storage);

    /* A dirty image: a reader leaves it alone, a writer repairs it. */
    qcow2_image *image;
    make("disk");
    damage("disk");
    poke("disk", 79, 1, 1);
    qcow2_opts *reading = qcow2_opts_new();
    OK(qcow2_opts_set_bool(reading, "read_only", true));
    OK(qcow2_open("disk", reading, &image));
    OK(qcow2_close(image));
    OK(qcow2_check("disk", NULL, 0, &result, sizeof(result)));
    CHECK(result.corruptions == 3);
    OK(qcow2_open("disk", NULL, &image));
    char data[512];
    OK(qcow2_pread(image, data, sizeof(data), 65536, 0));
    CHECK(data[0] == 7 && data[511] == 7);
    OK(qcow2_close(image));
    OK(qcow2_check("disk", NULL, 0, &result, sizeof(result)));
    CHECK(result.corruptions == 0 && result.leaks == 0);
    OK(qcow2_open("disk", NULL, &image));

    /* An image that is open, with what has been written and not yet flushed: nothing is wrong, and nothing lost. */
    memset(data, 8, sizeof(data));
    for (uint64_t at = 0; at < 63 * 65536; at += 3 * 65536) {
        OK(qcow2_pwrite(image, data, sizeof(data), at, 0));
        OK(qcow2_discard(image, at + 65536, 65536, 0));
    }
    seen = (struct seen){0};
    OK(qcow2_check_image(image, opts, 0, &result, sizeof(result)));
    if (result.corruptions + result.leaks + result.check_errors > 0 || seen.calls == 0)
        FAIL("%" PRIu64 " corruptions, %" PRIu64 " leaks, %u calls", result.corruptions, result.leaks, seen.calls);
    CHECK(result.total_clusters == 64 && result.allocated_clusters > 20 && result.allocated_clusters < 26);
    struct qcow2_check_result before = result;
    seen = (struct seen){.cancel_at = 1};
    FAILS(qcow2_check_image(image, opts, 0, &result, sizeof(result)), ECANCELED, QCOW2_ERR_CANCELLED, "cancel");
    seen = (struct seen){0};
    OK(qcow2_check_image(image, NULL, 0, &result, sizeof(result)));
    CHECK(memcmp(&before, &result, sizeof(result)) == 0);
    OK(qcow2_pwrite(image, data, sizeof(data), 2 * 65536, 0));
    OK(qcow2_flush(image));
    uint64_t count = peek("disk", 0x20000 + 2 * 5, 2);
    poke("disk", 0x20000 + 2 * 5, 2, 3); /* two references too many, for the one of guest cluster 0 */
    OK(qcow2_check_image(image, opts, 0, &result, sizeof(result)));
    CHECK(count == 1 && result.leaks == 1 && result.corruptions == 1 && seen.leaks == 1);
    for (unsigned fix = 1; fix < 4; fix++)
        FAILS(qcow2_check_image(image, NULL, fix, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "close it");
    FAILS(qcow2_check_image(NULL, NULL, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "image");
    FAILS(qcow2_check_image(image, NULL, 4, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "0x4");
    FAILS(qcow2_check_image(image, NULL, 0, NULL, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "out");
    FAILS(qcow2_check_image(image, NULL, 0, &result, 8), EINVAL, QCOW2_ERR_ARGUMENT, "out_size");
    CHECK(peek("disk", 0x20000 + 2 * 5, 2) == 3);
    poke("disk", 0x20000 + 2 * 5, 2, count);
    /* The handle of a snapshot cannot know what the other one is changing; a reader checks as it is. */
    qcow2_image *snapshot;
    OK(qcow2_snapshot_create(image, "one", NULL, 0));
    OK(qcow2_pwrite(image, data, sizeof(data), 0, 0));
    OK(qcow2_snapshot_open(image, "one", 0, &snapshot));
    FAILS(qcow2_check_image(snapshot, NULL, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "snapshot");
    OK(qcow2_close(snapshot));
    OK(qcow2_check_image(image, NULL, 0, &result, sizeof(result)));
    CHECK(result.corruptions == 0 && result.leaks == 0);
    OK(qcow2_close(image));
    OK(qcow2_open("disk", reading, &image));
    before = result;
    OK(qcow2_check_image(image, NULL, 0, &result, sizeof(result)));
    CHECK(memcmp(&before, &result, sizeof(result)) == 0);
    OK(qcow2_close(image));
    OK(qcow2_open("disk", NULL, &image));

    /* What is refused. */
    FAILS(qcow2_check("disk", NULL, QCOW2_CHECK_FIX_ALL, &result, sizeof(result)), EBUSY, QCOW2_ERR_LOCKED, "disk");
    OK(qcow2_close(image));
    FAILS(qcow2_check(NULL, NULL, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "path");
    FAILS(qcow2_check("disk", NULL, 4, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "0x4");
    FAILS(qcow2_check("disk", NULL, 0, NULL, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "out");
    FAILS(qcow2_check("disk", NULL, 0, &result, 8), EINVAL, QCOW2_ERR_ARGUMENT, "out_size");
    FAILS(qcow2_check("disk", reading, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_OPTION, "read_only");
    FAILS(qcow2_check_fd(-1, NULL, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "fd");
    FAILS(qcow2_check_storage(NULL, NULL, 0, &result, sizeof(result)), EINVAL, QCOW2_ERR_ARGUMENT, "storage");
    FAILS(qcow2_check("missing", NULL, 0, &result, sizeof(result)), ENOENT, QCOW2_ERR_IO, "missing");
    FAILS(qcow2_opts_set_str(opts, "check_memory", "much"), EINVAL, QCOW2_ERR_OPTION, "check_memory");
    FAILS(qcow2_open("disk", opts, &image), EINVAL, QCOW2_ERR_OPTION, "");
    qcow2_opts_free(reading);
    CHECK(seen.destroyed == 0);
    qcow2_opts_free(opts);
    CHECK(seen.destroyed == 1);
    return 0;
}
