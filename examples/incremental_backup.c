/*
 * An incremental backup: copies what was changed since the last one to a raw file, and starts the next.
 *
 *     incremental_backup IMAGE BACKUP
 *
 * The first run finds no bitmap "backup" in IMAGE: it adds one, and copies everything. Later runs copy the extents that
 * the bitmap calls dirty. The bitmap is cleared only once the copy is durable, so that a run that fails is repeated.
 * Nobody else writes IMAGE meanwhile.
 */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include <qcow2.h>

#define NAME "backup"

static char buffer[1 << 20];

/* Copies one range; returns 0 or -1. */
static int copy(qcow2_image *image, int backup, uint64_t at, uint64_t length)
{
    for (uint64_t end = at + length, n; at < end; at += n) {
        n = end - at < sizeof(buffer) ? end - at : sizeof(buffer);
        if (qcow2_pread(image, buffer, n, at, 0) < 0 || pwrite(backup, buffer, n, (off_t)at) != (ssize_t)n)
            return -1;
    }
    return 0;
}

/* Copies what the bitmap calls dirty; returns the bytes copied, or -1. */
static int64_t copy_dirty(qcow2_image *image, int backup, uint64_t size)
{
    struct qcow2_extent extents[64];
    int64_t copied = 0;
    size_t n;
    for (uint64_t at = 0; at < size; at = extents[n - 1].start + extents[n - 1].length) {
        if (qcow2_bitmap_extents(image, NAME, at, size - at, 0, extents, 64, &n) < 0)
            return -1;
        for (size_t i = 0; i < n; i++) {
            if (!(extents[i].flags & QCOW2_EXTENT_DIRTY))
                continue;
            if (copy(image, backup, extents[i].start, extents[i].length) < 0)
                return -1;
            copied += (int64_t)extents[i].length;
        }
    }
    return copied;
}

int main(int argc, char **argv)
{
    qcow2_image *image;
    if (argc != 3 || qcow2_open(argv[1], NULL, &image) < 0) {
        fprintf(stderr, "usage: incremental_backup IMAGE BACKUP (%s)\n", qcow2_last_error());
        return 1;
    }
    uint64_t size = (uint64_t)qcow2_size(image);
    int backup = open(argv[2], O_RDWR | O_CREAT, 0644);
    int is_first = qcow2_bitmap_add(image, NAME, 0, 0) == 0;
    int64_t copied = is_first ? (copy(image, backup, 0, size) < 0 ? -1 : (int64_t)size) : copy_dirty(image, backup, size);
    int failed = copied < 0 || ftruncate(backup, (off_t)size) < 0 || fsync(backup) < 0;
    /* After a failed first run nothing was backed up: the bitmap goes again. */
    if (!failed)
        failed = qcow2_bitmap_clear(image, NAME) < 0;
    else if (is_first)
        qcow2_bitmap_remove(image, NAME);
    if (failed)
        fprintf(stderr, "backup failed: %s\n", qcow2_last_error());
    else
        printf("%s: %" PRId64 " of %" PRIu64 " bytes copied\n", is_first ? "full" : "incremental", copied, size);
    failed |= qcow2_close(image) < 0;
    return failed;
}
