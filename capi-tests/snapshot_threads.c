/* Snapshots while four threads write: each thread numbers the generations of its own area, sector by sector and always
 * upwards, so that a snapshot is sound if it has, in each area, a generation g up to some sector and g - 1 after it. */
#include "test.h"

#include <pthread.h>
#include <stdatomic.h>

#define THREADS 4
#define AREA (1 << 20)
#define PIECE 4096
#define SNAPSHOTS 8

static qcow2_image *image;
static atomic_bool stop;

static void *writer(void *argument)
{
    uint64_t first = (uint64_t)(size_t)argument * AREA;
    uint32_t piece[PIECE / 4];
    for (uint32_t generation = 1; !atomic_load(&stop); generation++)
        for (uint64_t at = 0; at < AREA && !atomic_load(&stop); at += PIECE) {
            for (size_t i = 0; i < PIECE / 4; i++)
                piece[i] = generation;
            OK(qcow2_pwrite(image, piece, PIECE, first + at, 0));
        }
    return NULL;
}

static void check_snapshot(qcow2_image *opened)
{
    static uint32_t area[AREA / 4];
    for (uint64_t thread = 0; thread < THREADS; thread++) {
        OK(qcow2_pread(opened, area, AREA, thread * AREA, 0));
        for (size_t i = 1; i < AREA / 4; i++)
            if (area[i] != area[i - 1] && (area[i] + 1 != area[i - 1] || area[0] != area[i - 1] || i % (PIECE / 4) != 0))
                FAIL("area %d: %u follows %u at word %zu", (int)thread, area[i], area[i - 1], i);
    }
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", "cluster_size=16k", NULL};
    pthread_t threads[THREADS];
    qcow2_image *opened[SNAPSHOTS];
    create_image("disk.qcow2", THREADS * AREA, settings);
    image = open_image("disk.qcow2");
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, writer, (void *)i) == 0);
    for (int n = 0; n < SNAPSHOTS; n++) {
        char name[16];
        snprintf(name, sizeof(name), "s%d", n);
        usleep(20000);
        OK(qcow2_snapshot_create(image, name, NULL, 0));
        OK(qcow2_snapshot_open(image, name, 0, &opened[n]));
        if (n >= 2) {
            OK(qcow2_close(opened[n - 2]));
            snprintf(name, sizeof(name), "s%d", n - 2);
            if (n % 2 == 0)
                OK(qcow2_snapshot_delete(image, name, 0, NULL, NULL));
        }
        check_snapshot(opened[n]);
    }
    atomic_store(&stop, true);
    for (size_t i = 0; i < THREADS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    check_snapshot(opened[SNAPSHOTS - 2]);
    check_snapshot(opened[SNAPSHOTS - 1]);
    OK(qcow2_close(opened[SNAPSHOTS - 2]));
    OK(qcow2_close(opened[SNAPSHOTS - 1]));
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
