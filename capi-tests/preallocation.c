/* Creating with preallocation: what it occupies, what it says, and a progress function that watches and ends it. */
#include "test.h"

#include <sys/stat.h>

#define DISK (40 << 20)

struct watch {
    uint64_t last, total, stop_at;
    int calls, destroyed;
};

static int progress(void *user, uint64_t done, uint64_t total)
{
    struct watch *watch = user;
    CHECK(done >= watch->last && done <= total && total > 0 && (watch->calls == 0 || total == watch->total));
    watch->last = done;
    watch->total = total;
    watch->calls++;
    return done >= watch->stop_at && watch->stop_at != 0 ? -77 : 0;
}

static void destroy(void *user)
{
    ((struct watch *)user)->destroyed++;
}

static qcow2_opts *options(const char *mode, struct watch *watch)
{
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_str(opts, "preallocation", mode));
    OK(qcow2_opts_set_progress(opts, progress, watch, destroy));
    return opts;
}

static void one(const char *mode)
{
    struct watch watch = {0};
    struct stat info;
    struct qcow2_stats before, after;
    qcow2_opts *opts = options(mode, &watch);
    unlink("disk.qcow2");
    OK(qcow2_create("disk.qcow2", DISK, opts, 0));
    CHECK(watch.calls > 1 && watch.last == watch.total && watch.destroyed == 0);
    qcow2_opts_free(opts);
    CHECK(watch.destroyed == 1);
    CHECK(stat("disk.qcow2", &info) == 0 && info.st_size > DISK);
    CHECK((info.st_blocks * 512 > DISK) == (strcmp(mode, "metadata") != 0));
    qcow2_image *image = open_image("disk.qcow2");
    expect_pattern(image, 0, 0, DISK);
    OK(qcow2_get_stats(image, &before, sizeof(before)));
    write_pattern(image, 5, 123, DISK / 2);
    OK(qcow2_get_stats(image, &after, sizeof(after)));
    CHECK(after.clusters_allocated == before.clusters_allocated && after.allocating_writes == before.allocating_writes);
    expect_pattern(image, 5, 123, DISK / 2);
    expect_pattern(image, 0, 123 + DISK / 2, DISK / 4);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
}

static void cancelled(const char *mode, uint64_t stop_at)
{
    struct watch watch = {.stop_at = stop_at};
    qcow2_opts *opts = options(mode, &watch);
    unlink("disk.qcow2");
    FAILS(qcow2_create("disk.qcow2", DISK, opts, 0), ECANCELED, QCOW2_ERR_CANCELLED, "cancelled");
    CHECK(access("disk.qcow2", F_OK) != 0 && watch.last >= stop_at && watch.last < watch.total);
    qcow2_opts_free(opts);
}

int main(void)
{
    qcow2_image *image;
    one("metadata");
    one("falloc");
    one("full");
    cancelled("full", 1);
    cancelled("full", DISK / 2);
    cancelled("falloc", 1);

    /* An open has nothing to tell. */
    one("metadata");
    struct watch watch = {0};
    qcow2_opts *opts = qcow2_opts_new();
    OK(qcow2_opts_set_progress(opts, progress, &watch, destroy));
    FAILS(qcow2_open("disk.qcow2", opts, &image), EINVAL, QCOW2_ERR_OPTION, "progress");
    OK(qcow2_opts_set_progress(opts, NULL, NULL, NULL));
    CHECK(watch.destroyed == 1);
    OK(qcow2_open("disk.qcow2", opts, &image));
    OK(qcow2_close(image));
    qcow2_opts_free(opts);
    FAILS(qcow2_opts_set_progress(NULL, progress, &watch, destroy), EINVAL, QCOW2_ERR_ARGUMENT, "opts");
    CHECK(watch.destroyed == 2);
    return 0;
}
