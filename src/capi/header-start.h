/*
 * libqcow2: read and write qcow2 images.
 *
 * Generated from src/capi/ of the library, do not edit. What is not in this file is not part of the interface.
 *
 *     #include <qcow2.h>
 *     #include <stdio.h>
 *
 *     int main(void)
 *     {
 *         qcow2_image *image;
 *         char sector[512];
 *
 *         if (qcow2_create("disk.qcow2", 1 << 30, NULL, 0) < 0 ||
 *             qcow2_open("disk.qcow2", NULL, &image) < 0) {
 *             fprintf(stderr, "%s\n", qcow2_last_error());
 *             return 1;
 *         }
 *         if (qcow2_pwrite(image, "hello", 5, 4096, 0) < 0 ||
 *             qcow2_pread(image, sector, sizeof(sector), 4096, 0) < 0)
 *             fprintf(stderr, "%s\n", qcow2_last_error());
 *         return qcow2_close(image) < 0;
 *     }
 *
 *     cc app.c $(pkg-config --cflags --libs qcow2)
 *
 * How to read it: the sections Version to Creating images are all that a simple program needs. Options, Facts and Map
 * come next; Storages is for programs that bring their own place for the bytes.
 *
 * Rules for every call:
 *  - int results are 0 or a negative errno; qcow2_last_error() and qcow2_last_error_code() tell why.
 *  - Offsets, lengths and sizes are in bytes, 64-bit where they are about disks.
 *  - A flags parameter takes bits that the call knows; any other bit is -EINVAL, so that one can ask for a flag and see.
 *  - Structs that the library fills come with their sizeof: a program compiled with an older or newer header is served,
 *    what it does not know is left out, what the library does not know is zero. Structs that it reads begin with
 *    struct_size, and members that it does not know must be zero.
 *  - Strings are in UTF-8 and end with a NUL; paths are bytes. The library copies what it keeps.
 *  - A pointer must not be NULL unless its description allows it; NULL is refused with -EINVAL, not dereferenced.
 *  - An image may be used by any number of threads at once, but closed by one after all others are done. An option
 *    object belongs to one thread at a time. Signals, locales and the current folder are left alone.
 *  - No call prints, exits or aborts. A bug in the library makes the call fail with QCOW2_ERR_PANIC, and the handle
 *    refuses every further write; only then is there a message on standard error too.
 *
 * A file opened for writing must not be used by anybody else meanwhile, nor a file opened for reading be written. Locks
 * see to that, the same that QEMU takes: one writer or any number of readers, in this process or others. Option
 * "locking" shares an image with others ("shared") or does without locks ("off"). Storages of the caller's callbacks are
 * not locked.
 */

#ifndef QCOW2_H
#define QCOW2_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

/** An open image. Any number of threads may use it at once. */
typedef struct qcow2_image qcow2_image;

/** Options for opening and creating images. */
typedef struct qcow2_opts qcow2_opts;

/** A place for the bytes of an image: a file, or the caller's callbacks. */
typedef struct qcow2_storage qcow2_storage;

