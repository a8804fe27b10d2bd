/* Queues: an event loop over the descriptor, errors of calls and of completions, cancelling, and every order of ends. */
#include <poll.h>
#include <sys/uio.h>

#include "test.h"

#define DEPTH 16
#define PART 5000

static const uint32_t backends[] = {QCOW2_QUEUE_IO_URING, QCOW2_QUEUE_THREADS, QCOW2_QUEUE_AUTO};

static void event_loop(qcow2_image *image, uint32_t backend)
{
    static uint8_t memory[DEPTH][PART], back[DEPTH][PART];
    qcow2_queue *queue;
    OK(qcow2_queue_new(image, DEPTH, backend, &queue));
    CHECK(backend == QCOW2_QUEUE_AUTO || qcow2_queue_backend(queue) == (int)backend);
    struct pollfd poller = {.fd = qcow2_queue_fd(queue), .events = POLLIN};
    CHECK(poller.fd >= 0 && poll(&poller, 1, 0) == 0);
    unsigned ended = 0;
    for (unsigned i = 0; i < DEPTH; i++) {
        memset(memory[i], (int)(i + backend + 1), PART);
        struct iovec iov[2] = {{memory[i], 1000}, {memory[i] + 1000, PART - 1000}};
        OK(qcow2_queue_writev(queue, iov, 2, i * PART, i % 5 == 0 ? QCOW2_FUA : 0, i));
    }
    struct iovec none = {memory[0], 1};
    FAILS(qcow2_queue_readv(queue, &none, 1, 0, 0, 0), EAGAIN, QCOW2_ERR_QUEUE, "as it is deep");
    CHECK(qcow2_queue_submit(queue) >= 0);
    while (ended < DEPTH) {
        CHECK(poll(&poller, 1, 10000) == 1);
        qcow2_completion completions[3];
        int n = qcow2_queue_reap(queue, completions, 3, 0, 0);
        CHECK(n >= 0);
        for (int i = 0; i < n; i++)
            CHECK(completions[i].result == 0 && completions[i].error_code == 0 && completions[i].user_data < DEPTH);
        ended += (unsigned)n;
    }
    /* Read back in one batch, with zeroes in the middle. */
    OK(qcow2_queue_write_zeroes(queue, 2 * PART, PART, QCOW2_MAY_UNMAP, 1));
    OK(qcow2_queue_discard(queue, 0, 0, 0, 2));
    OK(qcow2_queue_flush(queue, 3));
    qcow2_completion completions[DEPTH];
    CHECK(qcow2_queue_reap(queue, completions, DEPTH, DEPTH, -1) == 3);
    for (unsigned i = 0; i < DEPTH; i++) {
        struct iovec iov = {back[i], PART};
        OK(qcow2_queue_readv(queue, &iov, 1, i * PART, 0, i));
    }
    CHECK(qcow2_queue_reap(queue, completions, DEPTH, DEPTH, 10000000000) == DEPTH);
    for (unsigned i = 0; i < DEPTH; i++)
        CHECK(back[i][0] == (i == 2 ? 0 : i + backend + 1) && back[i][PART - 1] == back[i][0]);
    qcow2_queue_free(queue);
}

static void errors(qcow2_image *image, uint32_t backend)
{
    qcow2_queue *queue = (qcow2_queue *)&queue;
    FAILS(qcow2_queue_new(image, 0, backend, &queue), EINVAL, QCOW2_ERR_ARGUMENT, "depth");
    CHECK(queue == NULL);
    FAILS(qcow2_queue_new(image, 4, 17, &queue), EINVAL, QCOW2_ERR_ARGUMENT, "17");
    FAILS(qcow2_queue_new(NULL, 4, backend, &queue), EINVAL, QCOW2_ERR_ARGUMENT, "image");
    FAILS(qcow2_queue_new(image, 4, backend, NULL), EINVAL, QCOW2_ERR_ARGUMENT, "queue");
    OK(qcow2_queue_new(image, 4, backend, &queue));
    uint8_t byte = 1;
    struct iovec iov = {&byte, 1}, hole = {NULL, 1};
    FAILS(qcow2_queue_writev(queue, &iov, 1, 0, 1u << 31, 0), EINVAL, QCOW2_ERR_ARGUMENT, "0x80000000");
    FAILS(qcow2_queue_readv(queue, &hole, 1, 0, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "iov[0]");
    FAILS(qcow2_queue_readv(NULL, &iov, 1, 0, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "queue");
    FAILS(qcow2_queue_submit(NULL), EINVAL, QCOW2_ERR_ARGUMENT, "queue");
    FAILS(qcow2_queue_reap(queue, NULL, 1, 0, 0), EINVAL, QCOW2_ERR_ARGUMENT, "completions");
    /* What is wrong with a request its completion says. */
    OK(qcow2_queue_writev(queue, &iov, 1, 1ull << 40, 0, 7));
    OK(qcow2_queue_writev(queue, &iov, 1, 0, 0, 8));
    OK(qcow2_queue_cancel(queue, 8));
    FAILS(qcow2_queue_cancel(queue, 9), ENOENT, QCOW2_ERR_QUEUE, "no request");
    FAILS(qcow2_queue_cancel(queue, 8), EALREADY, QCOW2_ERR_QUEUE, "already");
    qcow2_completion completions[2];
    CHECK(qcow2_queue_reap(queue, completions, 2, 2, -1) == 2);
    for (int i = 0; i < 2; i++) {
        bool is_7 = completions[i].user_data == 7;
        CHECK(completions[i].result == (is_7 ? -EINVAL : -ECANCELED));
        CHECK(completions[i].error_code == (is_7 ? QCOW2_ERR_OUT_OF_RANGE : QCOW2_ERR_CANCELLED));
    }
    CHECK(qcow2_queue_reap(queue, completions, 2, 2, -1) == 0);
    qcow2_queue_free(queue);
    qcow2_queue_free(NULL);
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", "cluster_size=64k", NULL};
    for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++) {
        create_image("disk.qcow2", 1 << 20, settings);
        qcow2_image *image = open_image("disk.qcow2");
        event_loop(image, backends[i]);
        errors(image, backends[i]);
        /* The image goes first: what was submitted has happened, what comes later fails. */
        qcow2_queue *queue;
        OK(qcow2_queue_new(image, 4, backends[i], &queue));
        uint8_t byte = 0x5a;
        struct iovec iov = {&byte, 1};
        OK(qcow2_queue_writev(queue, &iov, 1, 900000, 0, 1));
        CHECK(qcow2_queue_submit(queue) >= 0);
        OK(qcow2_close(image));
        OK(qcow2_queue_writev(queue, &iov, 1, 0, 0, 2));
        qcow2_completion completions[2];
        CHECK(qcow2_queue_reap(queue, completions, 2, 2, -1) == 2);
        CHECK(completions[0].user_data == 1 && completions[0].result == 0);
        CHECK(completions[1].user_data == 2 && completions[1].result == -EINVAL);
        qcow2_queue_free(queue);
        check_image("disk.qcow2");
        image = open_image("disk.qcow2");
        OK(qcow2_pread(image, &byte, 1, 900000, 0));
        CHECK(byte == 0x5a);
        OK(qcow2_close(image));
        CHECK(unlink("disk.qcow2") == 0);
    }
    return 0;
}
