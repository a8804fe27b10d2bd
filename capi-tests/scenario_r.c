/* Scenarios R: three writes to different subclusters of one new cluster at the same moment. None of the updates of
 * the entry is lost, and the cluster is allocated once. Many rounds: each has its own cluster. */
#include <pthread.h>

#include "test.h"

#define CLUSTER 65536
#define ROUNDS 200

static qcow2_image *image;
static pthread_barrier_t together;
static const struct { int pattern; uint64_t at; } writes[3] = {{10, 30 * 1024}, {11, 20 * 1024}, {12, 40 * 1024}};

static void *writer(void *argument)
{
    size_t which = (size_t)argument;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&together);
        write_pattern(image, writes[which].pattern, round * CLUSTER + writes[which].at, 2048);
    }
    return NULL;
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", NULL};
    struct qcow2_stats stats;
    pthread_t threads[3];
    create_image("disk.qcow2", (uint64_t)ROUNDS * CLUSTER, settings);
    image = open_image("disk.qcow2");
    CHECK(pthread_barrier_init(&together, NULL, 3) == 0);
    for (size_t i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, writer, (void *)i) == 0);
    for (size_t i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&together);
    OK(qcow2_get_stats(image, &stats, sizeof(stats)));
    CHECK(stats.clusters_allocated == ROUNDS);
    OK(qcow2_close(image));

    image = open_image("disk.qcow2");
    for (uint64_t round = 0; round < ROUNDS; round++) {
        for (size_t i = 0; i < 3; i++)
            expect_pattern(image, writes[i].pattern, round * CLUSTER + writes[i].at, 2048);
        expect_entry("R", "disk.qcow2", round, COPIED, 1u << 15 | 1u << 10 | 1u << 20);
    }
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
