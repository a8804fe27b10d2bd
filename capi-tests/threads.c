/* Many threads on one handle: each owns every fourth sector of the disk, so that they meet in clusters, subclusters and
 * L2 tables all the time; plus readers and flushes. At the end everybody's last values are there. */
#include <pthread.h>

#include "test.h"

#define THREADS 4
#define SECTOR 512
#define SECTORS 4096
#define ROUNDS 4000

static qcow2_image *image;
static uint8_t last[SECTORS];

static uint32_t next(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 8;
}

static void *worker(void *argument)
{
    uint32_t me = (uint32_t)(size_t)argument, seed = me + 1;
    uint8_t bytes[SECTOR];
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t sector = next(&seed) % (SECTORS / THREADS) * THREADS + me;
        switch (next(&seed) % 8) {
        case 0:
            OK(qcow2_pread(image, bytes, SECTOR, (uint64_t)sector * SECTOR, 0));
            for (int i = 0; i < SECTOR; i++)
                CHECK(bytes[i] == last[sector]);
            break;
        case 1:
            if (round % 64 == 0)
                OK(qcow2_flush(image));
            break;
        default:
            last[sector] = (uint8_t)(1 + next(&seed) % 255);
            memset(bytes, last[sector], SECTOR);
            OK(qcow2_pwrite(image, bytes, SECTOR, (uint64_t)sector * SECTOR, 0));
        }
    }
    /* Each thread has its own last error. */
    FAILS(qcow2_pread(image, bytes, 1, UINT64_MAX - me, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "");
    char named[32];
    snprintf(named, sizeof(named), "offset %" PRIu64, UINT64_MAX - me);
    CHECK(strstr(qcow2_last_error(), named) != NULL);
    return NULL;
}

static void run(const char *const *settings, const char *path)
{
    pthread_t threads[THREADS];
    memset(last, 0xff, sizeof(last));
    create_image(path, SECTORS * SECTOR, settings);
    image = open_image(path);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, worker, (void *)i) == 0);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    OK(qcow2_close(image));
    image = open_image(path);
    for (uint64_t sector = 0; sector < SECTORS; sector++)
        expect_pattern(image, last[sector], sector * SECTOR, SECTOR);
    OK(qcow2_close(image));
    check_image(path);
}

int main(void)
{
    fill_file("base.raw", 0xff, SECTORS * SECTOR);
    run((const char *[]){"extended_l2=on", "backing_file=base.raw", "backing_fmt=raw", NULL}, "subclusters.qcow2");
    run((const char *[]){"cluster_size=512", "backing_file=base.raw", "backing_fmt=raw", NULL}, "small.qcow2");
    return 0;
}
