/* An image in memory: the smallest storage that is complete, with switches for making it misbehave. */
#ifndef MEMORY_STORAGE_H
#define MEMORY_STORAGE_H

#include <pthread.h>
#include <sys/uio.h>

#include "test.h"

struct memory {
    pthread_mutex_t lock;
    uint8_t *bytes;
    uint64_t size;
    size_t step;            /* transfers at most so many bytes a call; 0: all */
    int fail_read, fail_write, fail_flush; /* errno to fail with; 0: work */
    int writes, flushes, vectors, destroyed;
};

static inline void memory_resize(struct memory *m, uint64_t size)
{
    m->bytes = realloc(m->bytes, size + 1);
    CHECK(m->bytes != NULL);
    if (size > m->size)
        memset(m->bytes + m->size, 0, size - m->size);
    m->size = size;
}

static inline ssize_t memory_pread(void *user, void *buf, size_t length, uint64_t offset)
{
    struct memory *m = user;
    pthread_mutex_lock(&m->lock);
    ssize_t n = -m->fail_read;
    if (n == 0) {
        uint64_t left = offset < m->size ? m->size - offset : 0;
        length = length < left ? length : left;
        length = m->step != 0 && length > m->step ? m->step : length;
        memcpy(buf, m->bytes + (length ? offset : 0), length);
        n = (ssize_t)length;
    }
    pthread_mutex_unlock(&m->lock);
    return n;
}

static inline ssize_t memory_pwrite(void *user, const void *buf, size_t length, uint64_t offset)
{
    struct memory *m = user;
    pthread_mutex_lock(&m->lock);
    m->writes++;
    ssize_t n = -m->fail_write;
    if (n == 0) {
        length = m->step != 0 && length > m->step ? m->step : length;
        if (offset + length > m->size)
            memory_resize(m, offset + length);
        memcpy(m->bytes + offset, buf, length);
        n = (ssize_t)length;
    }
    pthread_mutex_unlock(&m->lock);
    return n;
}

static inline ssize_t memory_preadv(void *user, const struct iovec *iov, int count, uint64_t offset)
{
    ssize_t done = 0;
    ((struct memory *)user)->vectors++;
    for (int i = 0; i < count; i++) {
        ssize_t n = memory_pread(user, iov[i].iov_base, iov[i].iov_len, offset + (uint64_t)done);
        if (n < 0)
            return n;
        done += n;
        if ((size_t)n < iov[i].iov_len)
            break;
    }
    return done;
}

static inline ssize_t memory_pwritev(void *user, const struct iovec *iov, int count, uint64_t offset)
{
    ssize_t done = 0;
    ((struct memory *)user)->vectors++;
    for (int i = 0; i < count; i++) {
        ssize_t n = memory_pwrite(user, iov[i].iov_base, iov[i].iov_len, offset + (uint64_t)done);
        if (n < 0)
            return n;
        done += n;
        if ((size_t)n < iov[i].iov_len)
            break;
    }
    return done;
}

static inline int memory_flush(void *user)
{
    struct memory *m = user;
    m->flushes++;
    return -m->fail_flush;
}

static inline int memory_get_size(void *user, uint64_t *size)
{
    *size = ((struct memory *)user)->size;
    return 0;
}

static inline int memory_truncate(void *user, uint64_t size)
{
    struct memory *m = user;
    pthread_mutex_lock(&m->lock);
    memory_resize(m, size);
    pthread_mutex_unlock(&m->lock);
    return 0;
}

static inline void memory_destroy(void *user)
{
    ((struct memory *)user)->destroyed++;
}

static inline qcow2_storage *memory_storage(struct memory *m, bool vectors)
{
    struct qcow2_storage_ops ops;
    qcow2_storage *storage;
    memset(&ops, 0, sizeof(ops));
    ops.struct_size = sizeof(ops);
    ops.pread = memory_pread;
    ops.pwrite = memory_pwrite;
    ops.preadv = vectors ? memory_preadv : NULL;
    ops.pwritev = vectors ? memory_pwritev : NULL;
    ops.flush = memory_flush;
    ops.get_size = memory_get_size;
    ops.truncate = memory_truncate;
    ops.destroy = memory_destroy;
    memset(m, 0, sizeof(*m));
    pthread_mutex_init(&m->lock, NULL);
    OK(qcow2_storage_new(&ops, m, &storage));
    return storage;
}

#endif
