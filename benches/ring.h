/*
 * io_uring by hand, for the raw twin of the queue: no library between it and the kernel, and nothing that it does not
 * need. One thread, registered files, no polling.
 */
#ifndef RING_H
#define RING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct ring {
    int fd;
    unsigned depth, to_submit;
    unsigned *sq_tail, *sq_array, sq_mask;
    _Atomic unsigned *cq_head, *cq_tail;
    unsigned cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

static int ring_open(struct ring *ring, unsigned depth, const int *files, unsigned count)
{
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    ring->fd = (int)syscall(SYS_io_uring_setup, depth, &p);
    if (ring->fd < 0)
        return -errno;
    size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    char *sq = mmap(NULL, sq_size, prot, flags, ring->fd, IORING_OFF_SQ_RING);
    char *cq = mmap(NULL, cq_size, prot, flags, ring->fd, IORING_OFF_CQ_RING);
    ring->sqes = mmap(NULL, p.sq_entries * sizeof *ring->sqes, prot, flags, ring->fd, IORING_OFF_SQES);
    if (sq == MAP_FAILED || cq == MAP_FAILED || (void *)ring->sqes == MAP_FAILED)
        return -errno;
    ring->sq_tail = (unsigned *)(sq + p.sq_off.tail);
    ring->sq_array = (unsigned *)(sq + p.sq_off.array);
    ring->sq_mask = *(unsigned *)(sq + p.sq_off.ring_mask);
    ring->cq_head = (_Atomic unsigned *)(cq + p.cq_off.head);
    ring->cq_tail = (_Atomic unsigned *)(cq + p.cq_off.tail);
    ring->cq_mask = *(unsigned *)(cq + p.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
    ring->depth = depth;
    ring->to_submit = 0;
    return syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_FILES, files, count) < 0 ? -errno : 0;
}

/* Prepares a transfer with one of the files. The caller keeps at most `depth` in flight: there is room. */
static void ring_push(struct ring *ring, uint8_t opcode, int file, void *buffer, uint32_t length, uint64_t offset,
                      uint64_t user)
{
    unsigned tail = *ring->sq_tail, index = tail & ring->sq_mask;
    struct io_uring_sqe *sqe = &ring->sqes[index];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = opcode;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->fd = file;
    sqe->addr = (uint64_t)(uintptr_t)buffer;
    sqe->len = length;
    sqe->off = offset;
    sqe->user_data = user;
    ring->sq_array[index] = index;
    atomic_store_explicit((_Atomic unsigned *)ring->sq_tail, tail + 1, memory_order_release);
    ring->to_submit++;
}

/* Submits what was pushed, and waits until something has ended. */
static int ring_wait(struct ring *ring)
{
    for (;;) {
        long n = syscall(SYS_io_uring_enter, ring->fd, ring->to_submit, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (n >= 0) {
            ring->to_submit -= (unsigned)n;
            return 0;
        }
        if (errno != EINTR)
            return -errno;
    }
}

/* The next that has ended. */
static int ring_reap(struct ring *ring, uint64_t *user, int *result)
{
    unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    if (head == atomic_load_explicit(ring->cq_tail, memory_order_acquire))
        return 0;
    *user = ring->cqes[head & ring->cq_mask].user_data;
    *result = ring->cqes[head & ring->cq_mask].res;
    atomic_store_explicit(ring->cq_head, head + 1, memory_order_release);
    return 1;
}

#endif
