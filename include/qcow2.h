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

/* Version =========================================================================================
 *
 * Which library this program runs with, and what that build can do.
 */

/**
 * The version of the library as text, "0.1.0" for example.
 *
 * Returns a static string; never NULL, not to be freed.
 * Thread-safe. Since 0.1.
 */
const char *qcow2_version_string(void);

/**
 * The version of the library as a number to compare: major << 16 | minor << 8 | patch.
 *
 * Thread-safe. Since 0.1.
 */
uint32_t qcow2_version_number(void);

/**
 * Whether this build of the library has a feature.
 *
 * name: "zlib" and "zstd" (compressed clusters of that kind can be read), "extended_l2" (subclusters),
 *       "write_zeroes" and "discard" (those calls), "write_compressed" (QCOW2_COMPRESSED, with the methods that can be
 *       read).
 *
 * Returns 1 if it has, 0 if it has not or nobody knows a feature of that name (NULL included).
 * Thread-safe. Since 0.1.
 */
int qcow2_has_feature(const char *name);

/* Errors ==========================================================================================
 *
 * Calls return 0 or a negative errno. Why a call failed is kept for the calling thread until its next failing call:
 * a stable code to decide by, and a text for a person.
 */

/** No call of this thread failed yet. */
#define QCOW2_ERR_NONE 0
/** The storage (file, device, callback) reported an error; the returned errno is the storage's. */
#define QCOW2_ERR_IO 1
/** The image is corrupt, and the text names the place; or it is marked corrupt and takes no writes. */
#define QCOW2_ERR_CORRUPT 2
/** A field of the header or of a header extension is malformed. */
#define QCOW2_ERR_BAD_HEADER 3
/** The file is not a qcow2 image. */
#define QCOW2_ERR_NOT_QCOW2 4
/** The image needs a feature that this library (or this build of it) does not have; the text names it. */
#define QCOW2_ERR_UNSUPPORTED 5

/**
 * The image refers to another file (a backing file, an external data file), and option "backing", a resolver or a storage
 * did not allow that.
 */
#define QCOW2_ERR_BACKING_DENIED 6
/** A backing file has no declared format, or one that is neither qcow2 nor raw. */
#define QCOW2_ERR_BACKING_FORMAT 7
/** The backing chain has a loop, or is deeper than option "backing_depth_max", or an external data file is a file of it. */
#define QCOW2_ERR_CHAIN 8
/** The image has the dirty bit: it can be read, and needs a repair before it is written. */
#define QCOW2_ERR_NEEDS_REPAIR 9
/** A write to an image that was opened with "read_only", or any data call with "inspect". */
#define QCOW2_ERR_READ_ONLY 10
/** An earlier failure left the state of the file unknown: this handle writes nothing more, and acknowledges no change. */
#define QCOW2_ERR_POISONED 11
/** The request reaches past the end of the image. */
#define QCOW2_ERR_OUT_OF_RANGE 12
/** An argument of the call is wrong: a NULL pointer, unknown flags, a struct size, a path. */
#define QCOW2_ERR_ARGUMENT 13
/** No option of that name, or it cannot have that value, or not in this call. */
#define QCOW2_ERR_OPTION 14
/** The image would grow past what the format or the library can address. */
#define QCOW2_ERR_TOO_LARGE 15
/** The file exists, and QCOW2_OVERWRITE was not given. */
#define QCOW2_ERR_EXISTS 16
/** A bug in the library; the handle is poisoned, close it. Please report the text. */
#define QCOW2_ERR_PANIC 17
/** Somebody else uses the image, or a file under it, in a way that excludes this. */
#define QCOW2_ERR_LOCKED 18
/** A secret is missing or wrong. */
#define QCOW2_ERR_BAD_SECRET 19
/** The progress callback ended the call. */
#define QCOW2_ERR_CANCELLED 20
/** There is no such bitmap, or one too many, or it cannot be relied on. */
#define QCOW2_ERR_BITMAP 24
/** There is no such snapshot (-ENOENT), or it is open as a handle of its own (-EBUSY). */
#define QCOW2_ERR_SNAPSHOT 23
/** A queue is full, or has no such request to cancel. */
#define QCOW2_ERR_QUEUE 30

/**
 * Why the last failing call of this thread failed, in words: it names the offending value and what to do about it.
 *
 * Returns a string of the library, valid until the next failing call of the same thread; "" if none failed yet.
 * Never NULL, not to be freed. A call that succeeds leaves it as it is.
 * Thread-safe: each thread has its own. Since 0.1.
 */
const char *qcow2_last_error(void);

/**
 * Why the last failing call of this thread failed, as a QCOW2_ERR_ number. Numbers are never reused; a program must
 * expect ones that it does not know.
 *
 * Thread-safe: each thread has its own. Since 0.1.
 */
int qcow2_last_error_code(void);

/* Images ==========================================================================================
 *
 * Open an image, make it durable, close it. The simple calls: a program that reads and writes an image needs these
 * and the data calls below.
 */

/**
 * Opens the image in a file.
 *
 * path:   the file, a qcow2 image (nothing is guessed: a file in another format is refused)
 * opts:   how to open it, or NULL for the defaults: for reading and writing, and no other file is opened for it.
 *         An image with a backing file therefore needs option "backing" (or a resolver, or storages)
 * image:  where the handle goes; set to NULL on an error
 *
 * The caller closes the handle with qcow2_close(). The options stay the caller's and may be freed or used again.
 * Returns 0 or a negative errno: that of open(2); -EINVAL not a qcow2 image, malformed, or a wrong option; -ENOTSUP
 * needs a feature that is not supported; -EACCES backing files not allowed; -EBUSY somebody else uses the image, or a
 * file under it, in a way that does not go together with this one (see option "locking"). An image that is refused is
 * never written to.
 * Thread-safe. Since 0.1.
 */
int qcow2_open(const char *path,
               const qcow2_opts *opts,
               qcow2_image **image);

/**
 * Opens the image in a file that the caller has opened already, so that the library needs no access to paths.
 *
 * fd:     the file or block device, open for reading, and for writing unless option "read_only" or "inspect" is set.
 *         The library duplicates it: the caller's descriptor stays the caller's, and may be closed at once. The file
 *         position is not used
 * opts:   as in qcow2_open(). Option "backing" cannot be "relative" (there is no folder to start from)
 * image:  where the handle goes; set to NULL on an error
 *
 * Returns 0 or a negative errno, as qcow2_open(). Thread-safe. Since 0.1.
 */
int qcow2_open_fd(int fd,
                  const qcow2_opts *opts,
                  qcow2_image **image);

/**
 * Opens the image in a storage of the caller (see "Storages").
 *
 * storage: where the bytes are. The image keeps a reference: the caller may free the storage at any time
 * opts:    as in qcow2_open_fd()
 * image:   where the handle goes; set to NULL on an error
 *
 * Returns 0 or a negative errno, as qcow2_open(), or what a callback of the storage returned. Thread-safe. Since 0.1.
 */
int qcow2_open_storage(qcow2_storage *storage,
                       const qcow2_opts *opts,
                       qcow2_image **image);

/**
 * Closes an image and frees its handle, whatever it returns and whatever happened to the handle before.
 *
 * image:  the handle, not to be used any more; NULL is a no-op that returns 0
 *
 * Everything written is made durable first. Returns 0, or the negative errno of that last flush: then data that was
 * not flushed before may be lost. A handle that took no writes after an earlier error returns that error again.
 * Exclusive: no other call on the handle may be running or follow. Since 0.1.
 */
int qcow2_close(qcow2_image *image);

/**
 * Makes everything durable whose write had returned before this call: data and metadata survive a power cut.
 *
 * image:  the handle
 *
 * Returns 0 or a negative errno. After a failed flush it is not known what is on disk: from then on every write, zeroing,
 * discard, flush and change of the image fails (QCOW2_ERR_POISONED), whether it would have had to write or not, and
 * reads go on.
 * Thread-safe: any number of threads may use the handle at once. Since 0.1.
 */
int qcow2_flush(qcow2_image *image);

/**
 * The size of the guest disk in bytes.
 *
 * image:  the handle
 *
 * Returns the size, at most INT64_MAX, or a negative errno. Thread-safe. Since 0.1.
 */
int64_t qcow2_size(const qcow2_image *image);

/* Data ============================================================================================
 *
 * Reading and writing guest data, writing zeroes, and giving space back. A request is all or nothing: it never returns
 * a number of bytes. Offsets and lengths need no alignment. Any number of threads may use one handle at once; two
 * requests that overlap and of which one writes give each byte one of the two values. What has been written is visible
 * at once, and durable after qcow2_flush().
 */

/**
 * Flag of the write calls: the write is durable when the call returns, as if qcow2_flush() covered it alone
 * (the "force unit access" of SCSI, NVMe and virtio-blk).
 */
#define QCOW2_FUA (1 << 0)

/**
 * Flag of qcow2_write_zeroes(): host clusters that hold nothing else any more are given up, as by qcow2_discard().
 * Without it they stay allocated, so that writing there later needs no new space.
 */
#define QCOW2_MAY_UNMAP (1 << 1)
/** Flag of qcow2_write_zeroes(): fail with -ENOTSUP rather than write zeroes as data, which is slow. */
#define QCOW2_NO_FALLBACK (1 << 2)

/**
 * Flag of qcow2_pwrite() and qcow2_pwritev(): the range is stored compressed, with the method of the image (option
 * "compression_type"), as far as that makes it smaller.
 *
 * The range must consist of whole clusters: offset at the start of one, length a multiple of the cluster size unless
 * the range reaches the end of the image. Anything else is -EINVAL, as is an image whose data is in an external data
 * file. Each cluster is compressed by itself and packed behind the one before, across the boundaries of sectors and
 * host clusters. A cluster that does not become smaller is written as without the flag; one that is all zeroes becomes
 * zero by its entry alone, as by qcow2_write_zeroes() with QCOW2_MAY_UNMAP (in an image of version 2, which has no zero
 * flag, it is compressed like any other).
 *
 * What the range held before does not matter: data, compressed clusters, clusters shared with a snapshot; it is
 * released. A later write to a part of a compressed cluster stores all of it uncompressed again. A processor compresses
 * at about a hundredth of the speed of a plain write: the flag is for disks that are written once.
 *
 * Threads: where a blocking call has several clusters to compress, or to decompress, it is helped by threads of its own,
 * which have ended when it returns: no more in all calls of the process than there are processors, and none where one
 * thread is about as fast. For queues, see there.
 */
#define QCOW2_COMPRESSED (1 << 3)

/**
 * Reads guest data into a buffer.
 *
 * image:  the handle
 * buf:    where it goes: length bytes (NULL is allowed where length is 0)
 * length: bytes
 * offset: guest offset in bytes; offset + length must not be past the end of the image
 * flags:  0
 *
 * Returns 0 (all of it was read) or a negative errno: -EINVAL past the end, NULL or unknown flags; -EIO the image is
 * corrupt there, or the storage failed. After an error the contents of the buffer are undefined.
 * Thread-safe. Since 0.1.
 */
int qcow2_pread(qcow2_image *image,
                void *buf,
                size_t length,
                uint64_t offset,
                uint32_t flags);

/**
 * Writes guest data from a buffer.
 *
 * image:  the handle, opened for writing
 * buf:    what to write: length bytes, not changed (NULL is allowed where length is 0)
 * length: bytes
 * offset: guest offset in bytes; offset + length must not be past the end of the image
 * flags:  0, or any of QCOW2_FUA and QCOW2_COMPRESSED
 *
 * Returns 0 (all of it was written) or a negative errno: -EINVAL past the end, NULL, unknown flags, or a range
 * that cannot be compressed (see QCOW2_COMPRESSED); -EROFS opened read-only; -ENOTSUP compression with a method that
 * this build lacks; -ENOSPC and others from the storage; -EIO the image is corrupt. After an error each byte of the
 * range may be old or new.
 * Thread-safe. Since 0.1.
 */
int qcow2_pwrite(qcow2_image *image,
                 const void *buf,
                 size_t length,
                 uint64_t offset,
                 uint32_t flags);

/**
 * Reads guest data into several buffers, filled one after the other.
 *
 * image:  the handle
 * iov:    the buffers (NULL is allowed where iovcnt is 0); a buffer of length 0 is allowed
 * iovcnt: how many; any number, not limited by IOV_MAX
 * offset: guest offset in bytes
 * flags:  0
 *
 * Returns 0 or a negative errno, as qcow2_pread(). Thread-safe. Since 0.1.
 */
int qcow2_preadv(qcow2_image *image,
                 const struct iovec *iov,
                 int iovcnt,
                 uint64_t offset,
                 uint32_t flags);

/**
 * Writes guest data from several buffers, taken one after the other.
 *
 * image:  the handle, opened for writing
 * iov:    the buffers, not changed (NULL is allowed where iovcnt is 0); a buffer of length 0 is allowed
 * iovcnt: how many; any number, not limited by IOV_MAX
 * offset: guest offset in bytes
 * flags:  0, or any of QCOW2_FUA and QCOW2_COMPRESSED
 *
 * Returns 0 or a negative errno, as qcow2_pwrite(). Thread-safe. Since 0.1.
 */
int qcow2_pwritev(qcow2_image *image,
                  const struct iovec *iov,
                  int iovcnt,
                  uint64_t offset,
                  uint32_t flags);

/**
 * Makes a range read as zeroes, with as little writing as possible.
 *
 * image:  the handle, opened for writing
 * offset: guest offset in bytes, of any alignment
 * length: bytes, of any alignment and any number; offset + length must not be past the end of the image
 * flags:  0, or any of QCOW2_FUA, QCOW2_MAY_UNMAP and QCOW2_NO_FALLBACK
 *
 * Whole subclusters (whole clusters in an image without extended_l2) become zero by a change of their entry alone.
 * What is less than that at either end of the range is written as data, unless the rest of its subcluster is known to
 * read as zeroes too. At the end of the image, what lies past it counts as part of the range: a subcluster that the
 * image ends in is whole if all of it that the image has is. Zeroes are also written as data into parts of compressed
 * clusters, and wherever an image of version 2, which has no zero flag, leaves no other way.
 *
 * Returns 0 or a negative errno, as qcow2_pwrite(); and -ENOTSUP if QCOW2_NO_FALLBACK is given and data would have to
 * be written: a caller may then repeat the request without it, or write the ends itself. After an error each byte of
 * the range may be old or zero.
 * Thread-safe. Since 0.1.
 */
int qcow2_write_zeroes(qcow2_image *image,
                       uint64_t offset,
                       uint64_t length,
                       uint32_t flags);

/**
 * Says that nobody needs what a range holds (the "unmap", "trim" or "deallocate" of a guest), so that its space can be
 * given back.
 *
 * image:  the handle, opened for writing
 * offset: guest offset in bytes, of any alignment
 * length: bytes, of any alignment and any number; offset + length must not be past the end of the image
 * flags:  0
 *
 * A discard is advice: it does what is cheap, and no data is written for it. Of the range, whole subclusters (whole
 * clusters without extended_l2) are given up; the end of the image counts as the end of its subcluster. What is given
 * up reads as zeroes, never as what a backing file has there; the rest of the range keeps its contents: parts of
 * subclusters, parts of compressed clusters, and in an image of version 2 parts of clusters and whatever covers a
 * backing file. Who needs zeroes calls qcow2_write_zeroes() with QCOW2_MAY_UNMAP.
 *
 * A host cluster of which nothing is left is free for other data once that is durable, and the file gets a hole there
 * (see punch_hole in "Storages") in the course of a later flush or of closing. With option "discard" set to "ignore"
 * the arguments are checked and nothing else happens.
 *
 * Returns 0, also where nothing could be given up, or a negative errno: -EINVAL past the end or unknown flags; -EROFS
 * opened read-only; others from the storage; -EIO the image is corrupt. After an error each byte of the range may be
 * old or zero.
 * Thread-safe. Since 0.1.
 */
int qcow2_discard(qcow2_image *image,
                  uint64_t offset,
                  uint64_t length,
                  uint32_t flags);

/* Creating images =================================================================================
 *
 * A new image reads as zeroes, or as its backing file. These calls write the image and leave it closed.
 */

/** Flag of qcow2_create(): replace the file if it exists. */
#define QCOW2_OVERWRITE (1 << 0)

/**
 * Creates an image in a file.
 *
 * path:   the file
 * size:   size of the guest disk in bytes; rounded up to a multiple of 512
 * opts:   the format (cluster_size, extended_l2, backing_file, ...), or NULL for the defaults: version 3, clusters of
 *         64 KiB, no backing file
 * flags:  0 or QCOW2_OVERWRITE
 *
 * With option "backing_file", "backing_fmt" must be set too; the backing file is not opened, so its size is not used.
 * With option "data_file" that file is made too, as long as the disk (a relative name starts from the folder of the
 * image); if it exists, it is refused or, with QCOW2_OVERWRITE, emptied.
 * With option "preallocation" the call may take long: see qcow2_opts_set_progress().
 * Returns 0 or a negative errno: -EEXIST the file exists; -EBUSY somebody uses it; -EINVAL a wrong option, or options
 * that exclude each other; -EFBIG larger than the format can have with that cluster size; -ECANCELED the progress
 * function ended it; those of open(2) and write(2). A file that was made here and not completed is removed.
 * Thread-safe. Since 0.1.
 */
int qcow2_create(const char *path,
                 uint64_t size,
                 const qcow2_opts *opts,
                 uint32_t flags);

/**
 * Creates an image in a storage of the caller (see "Storages"), whatever that held before.
 *
 * storage: where the bytes go; it must be able to write, flush and truncate. It stays the caller's
 * size:    size of the guest disk in bytes; rounded up to a multiple of 512
 * opts:    as in qcow2_create(); with qcow2_opts_set_storage() and QCOW2_ROLE_DATA_FILE, guest data goes to that
 *          storage, of which nothing remains, and option "data_file" is the name that the image stores for it, if any
 * flags:   0
 *
 * Returns 0 or a negative errno, as qcow2_create(), or what a callback of the storage returned.
 * Thread-safe. Since 0.1.
 */
int qcow2_create_storage(qcow2_storage *storage,
                         uint64_t size,
                         const qcow2_opts *opts,
                         uint32_t flags);

/* Resizing ========================================================================================
 *
 * Another size for the guest disk of an open image.
 */

/** Flag of qcow2_resize(): the new size may be smaller. What lies past it is given up for good. */
#define QCOW2_ALLOW_SHRINK (1 << 0)

/**
 * Gives the guest disk another size.
 *
 * image: the handle
 * size:  the new size in bytes; rounded up to a multiple of 512
 * opts:  NULL, or "preallocation" for what the disk grows by, and a progress function
 *        (qcow2_opts_set_progress()); no other option may be set
 * flags: 0 or QCOW2_ALLOW_SHRINK
 *
 * What the disk grows by reads as zeroes, whatever a backing file has there. What it shrinks by goes back to the file
 * system. An external data file gets the length of the disk. Persistent bitmaps follow: what the disk gains is dirty in
 * those that are enabled. Internal snapshots keep their own size. The new size is in force, and durable, when the call
 * returns; after a crash the disk has its old size or the new one, and so it has after an error (qcow2_size() tells).
 * A crash in the middle may leave the bitmaps marked in use.
 * Returns 0 or a negative errno: -EINVAL smaller without QCOW2_ALLOW_SHRINK, or a wrong option, or a bitmap that is
 * inconsistent (remove it first); -EFBIG larger than the format can have with that cluster size; -ENOTSUP the image is of
 * version 2 with snapshots or over a longer backing file, or a bitmap cannot be used, or not with that size; -ENOSPC;
 * -ECANCELED the progress function ended it: the disk has its old size; -EROFS.
 * Thread-safe; requests of other threads wait until it is done. Since 0.1.
 */
int qcow2_resize(qcow2_image *image,
                 uint64_t size,
                 const qcow2_opts *opts,
                 uint32_t flags);

/* Options =========================================================================================
 *
 * One object holds the options of open and create calls. Keys are named as in `qemu-img create -o` where such a key
 * exists; qcow2_option_describe() lists them all. A key or a value that is not known is refused at once, by name; a
 * key that the call does not use (cluster_size in an open, say) is refused by that call, by name.
 *
 * An option object is used by one thread at a time; calls that open or create copy what they need.
 */

/** Kind of an option: "on" or "off"; qcow2_opts_set_bool() or _set_str(). */
#define QCOW2_OPTION_BOOL 1
/** Kind of an option: a number; qcow2_opts_set_u64() or _set_str(). */
#define QCOW2_OPTION_NUMBER 2
/** Kind of an option: a number of bytes; qcow2_opts_set_u64() or _set_str(). */
#define QCOW2_OPTION_SIZE 3
/** Kind of an option: any text; qcow2_opts_set_str(). */
#define QCOW2_OPTION_TEXT 4
/** Kind of an option: one of the words in qcow2_option.values; qcow2_opts_set_str(). */
#define QCOW2_OPTION_CHOICE 5
/** The option is for the calls that open an image. */
#define QCOW2_OPTION_FOR_OPEN (1 << 0)
/** The option is for the calls that create an image. */
#define QCOW2_OPTION_FOR_CREATE (1 << 1)
/** The option is for qcow2_resize(). */
#define QCOW2_OPTION_FOR_RESIZE (1 << 2)
/** Role of a storage: a file of the backing chain. */
#define QCOW2_ROLE_BACKING 1
/** Role of a storage: the external data file of the image, or of a file of its backing chain. */
#define QCOW2_ROLE_DATA_FILE 2
/** Format of a backing file, as its image declares it: qcow2. */
#define QCOW2_FORMAT_QCOW2 1
/** Format of a backing file, as its image declares it, and of everything that is not known: raw. */
#define QCOW2_FORMAT_RAW 2
/** In place of a format: the reference is to an external data file, for reading only. */
#define QCOW2_FORMAT_DATA_FILE 3
/** In place of a format: the reference is to an external data file, for reading and writing. */
#define QCOW2_FORMAT_DATA_FILE_WRITABLE 4
/** Level of a log message: something is wrong, an image that turned out to be corrupt for example. */
#define QCOW2_LOG_ERROR 1
/** Level of a log message: something to look at. */
#define QCOW2_LOG_WARNING 2
/** Level of a log message: something that is good to know. */
#define QCOW2_LOG_INFO 3

/** An option that the library knows. The strings are static. Members may be appended in later versions. */
typedef struct qcow2_option {
    /** The key. */
    const char *name;
    /** What it does, in one line. */
    const char *help;
    /** The value it has when it is not set; "" for none. */
    const char *default_value;
    /** The words that it can be, with a comma and a space between them, where its kind is QCOW2_OPTION_CHOICE; else "". */
    const char *values;
    /** A QCOW2_OPTION_ kind. */
    uint32_t kind;
    /** QCOW2_OPTION_FOR_ bits. */
    uint32_t used_by;
} qcow2_option;

/**
 * Finds the file behind a reference.
 *
 * user:    the pointer given with the function
 * name:    the reference as stored in the image, untrusted
 * format:  QCOW2_FORMAT_QCOW2 or QCOW2_FORMAT_RAW, as declared in the image; or QCOW2_FORMAT_DATA_FILE or
 *          QCOW2_FORMAT_DATA_FILE_WRITABLE. Fail with -EACCES for what you do not expect
 * depth:   how deep in the chain the image is that has the reference: 0 for the image that is being opened
 * storage: where the function puts a storage; the library takes that reference over
 *
 * Returns 0, or a negative errno that makes the open fail with it.
 */
typedef int (*qcow2_resolve_fn)(void *user,
                                const char *name,
                                uint32_t format,
                                uint32_t depth,
                                qcow2_storage **storage);

/** Called once with the user pointer that came with it, when nothing can use that pointer any more. */
typedef void (*qcow2_destroy_fn)(void *user);

/**
 * Takes a message.
 *
 * user:  the pointer given with the function
 * level: a QCOW2_LOG_ number; more may come
 * text:  one line, valid during the call
 */
typedef void (*qcow2_log_fn)(void *user, uint32_t level, const char *text);

/**
 * Told how far a long call has come.
 *
 * user:  the pointer given with the function
 * done:  how much is done: bytes, or whatever the call counts in; never falls
 * total: how much there is in all; not 0
 *
 * Returns 0 to go on; anything else makes the call end with -ECANCELED, leaving a valid image.
 */
typedef int (*qcow2_progress_fn)(void *user, uint64_t done, uint64_t total);

/**
 * Makes an option object in which nothing is set.
 *
 * Returns the object, which the caller frees with qcow2_opts_free(). Thread-safe. Since 0.1.
 */
qcow2_opts *qcow2_opts_new(void);

/**
 * Frees an option object. Images that were opened with it stay as they are.
 *
 * opts: not to be used any more; NULL is a no-op
 *
 * One thread at a time. Since 0.1.
 */
void qcow2_opts_free(qcow2_opts *opts);

/**
 * Sets an option of any kind from text.
 *
 * opts:  the options
 * key:   the name of the option
 * value: a number in decimal digits, where it counts bytes with a suffix k, M, G or T if you like; "on" or "off"; a
 *        word; or a text. It is copied
 *
 * Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_str(qcow2_opts *opts,
                       const char *key,
                       const char *value);

/**
 * Sets an option that is a number.
 *
 * opts:  the options
 * key:   the name of the option
 * value: the number, in bytes where it is a size
 *
 * Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_u64(qcow2_opts *opts, const char *key, uint64_t value);

/**
 * Sets an option that is on or off.
 *
 * opts:  the options
 * key:   the name of the option
 * value: 0 for off, anything else for on
 *
 * Returns 0 or -EINVAL; then the options stay as they were. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_bool(qcow2_opts *opts, const char *key, int value);

/**
 * Describes one of the options that this version of the library knows; count index up from 0 until it fails.
 *
 * index:       which; an option's index may change from version to version, its name does not
 * option:      filled in
 * option_size: sizeof(struct qcow2_option)
 *
 * Returns 0, or -EINVAL past the last one. Thread-safe. Since 0.1.
 */
int qcow2_option_describe(size_t index,
                          struct qcow2_option *option,
                          size_t option_size);

/**
 * Gives an open the storages that the image refers to, so that nothing is opened by name, or qcow2_create_storage() the
 * storage that guest data goes to.
 *
 * opts:     the options
 * role:     QCOW2_ROLE_BACKING or QCOW2_ROLE_DATA_FILE
 * position: for QCOW2_ROLE_BACKING, 0 is the image's backing file, 1 the backing file of that, and so on; given in that
 *           order. For QCOW2_ROLE_DATA_FILE, 0 is the image's own external data file, 1 that of its backing file, and so
 *           on; in any order
 * storage:  a backing file, and what belongs to one, opened for reading at least, and never written to; the image's own
 *           external data file for writing too, unless the image is opened with "read_only". The options, and images
 *           opened with them, keep a reference of their own
 *
 * Names stored in the images are not looked at then; declared formats are.
 * Returns 0 or -EINVAL. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_storage(qcow2_opts *opts,
                           uint32_t role,
                           uint32_t position,
                           qcow2_storage *storage);

/**
 * Lets the caller decide which file a reference in an image means. It is asked for each backing file and external data
 * file instead of opening paths, whatever option "backing" says.
 *
 * opts:    the options
 * resolve: the function; NULL takes an earlier resolver away. Called during the open only, in its thread
 * user:    passed to it
 * destroy: called once with user when nothing uses the resolver any more (the options, and images opened with them);
 *          NULL if there is nothing to do. Called too when this call fails
 *
 * Returns 0 or -EINVAL. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_resolver(qcow2_opts *opts,
                            qcow2_resolve_fn resolve,
                            void *user,
                            qcow2_destroy_fn destroy);

/**
 * Where messages go that belong to no call's result; the library itself prints nothing.
 *
 * opts:    the options
 * log:     the function; NULL takes an earlier one away. Called from any thread that uses the image, from several at
 *          once; it must not call into that image
 * user:    passed to it
 * destroy: called once with user when nothing uses the function any more (the options, and images opened with them);
 *          NULL if there is nothing to do. Called too when this call fails
 *
 * Returns 0 or -EINVAL. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_log(qcow2_opts *opts,
                       qcow2_log_fn log,
                       void *user,
                       qcow2_destroy_fn destroy);

/**
 * Lets the caller watch a long call (a create or a resize with preallocation, a check), and end it.
 *
 * opts:     the options
 * progress: the function; NULL takes an earlier one away. Called during the call only, in its thread; it must not call
 *           into the image
 * user:     passed to it
 * destroy:  called once with user when the options are freed or get another function; NULL if there is nothing to do.
 *           Called too when this call fails
 *
 * Returns 0 or -EINVAL. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_progress(qcow2_opts *opts,
                            qcow2_progress_fn progress,
                            void *user,
                            qcow2_destroy_fn destroy);

/* Facts ===========================================================================================
 *
 * What an image is, without its data. To look at an image that must not be trusted or cannot be opened for use (its
 * backing file is not allowed, it needs a feature that the library lacks), open it with option "inspect".
 */

/** Bit of qcow2_info.flags: 32 subclusters in each cluster (extended L2 entries). */
#define QCOW2_INFO_EXTENDED_L2 (1 << 0)
/** Bit of qcow2_info.flags: refcounts may be written late. */
#define QCOW2_INFO_LAZY_REFCOUNTS (1 << 1)
/** Bit of qcow2_info.flags: refcounts may be wrong, the image needs a repair before it is written. */
#define QCOW2_INFO_DIRTY (1 << 2)
/** Bit of qcow2_info.flags: marked corrupt. */
#define QCOW2_INFO_CORRUPT (1 << 3)
/** Bit of qcow2_info.flags: guest data is encrypted. */
#define QCOW2_INFO_ENCRYPTED (1 << 4)
/** Bit of qcow2_info.flags: it has a backing file. */
#define QCOW2_INFO_BACKING_FILE (1 << 5)
/** Bit of qcow2_info.flags: guest data is in an external data file. */
#define QCOW2_INFO_DATA_FILE (1 << 6)
/** Bit of qcow2_info.flags: the external data file is a raw image by itself. */
#define QCOW2_INFO_DATA_FILE_RAW (1 << 7)
/** Bit of qcow2_info.flags: allocated_bytes is known. */
#define QCOW2_INFO_ALLOCATED_BYTES (1 << 8)
/** Compressed clusters are deflate streams. */
#define QCOW2_COMPRESSION_ZLIB 0
/** Compressed clusters are zstd frames. */
#define QCOW2_COMPRESSION_ZSTD 1
/** What qcow2_probe() found: anything that is not another format. */
#define QCOW2_PROBE_RAW 0
/** What qcow2_probe() found: a qcow2 image, version 2 or 3. */
#define QCOW2_PROBE_QCOW2 1

/** Facts about an image, as of the open. Members may be appended in later versions. */
typedef struct qcow2_info {
    /** Size of the guest disk in bytes. */
    uint64_t size_bytes;
    /** Bytes in a cluster. */
    uint64_t cluster_size_bytes;
    /** Bytes in a subcluster; those of a cluster where there are none. */
    uint64_t subcluster_size_bytes;
    /** Size of the image file in bytes. */
    uint64_t file_size_bytes;
    /** What the image file occupies on its disk, in bytes, with QCOW2_INFO_ALLOCATED_BYTES. */
    uint64_t allocated_bytes;
    /** Incompatible feature bits of the header. */
    uint64_t incompatible_features;
    /** Compatible feature bits of the header. */
    uint64_t compatible_features;
    /** Autoclear feature bits of the header. */
    uint64_t autoclear_features;
    /** QCOW2_INFO_ bits. */
    uint32_t flags;
    /** Version of the format: 2 or 3. */
    uint32_t version;
    /** Bits in a reference count. */
    uint32_t refcount_bits;
    /** A QCOW2_COMPRESSION_ number. */
    uint32_t compression_type;
    /** How many internal snapshots there are. */
    uint32_t snapshots;
    /** Zero. */
    uint32_t reserved;
    /** The backing file as the image names it, cut after 1023 bytes, which is the format's limit; "" for none. */
    char backing_file[1024];
    /** The declared format of the backing file, cut after 63 bytes; "" for none. */
    char backing_fmt[64];
} qcow2_info;

/** Counters of a handle, all from 0 at the open. Members may be appended in later versions. */
typedef struct qcow2_stats {
    /** Bytes that were read from old clusters or backing files to fill up what a write did not cover (copy-on-write). */
    uint64_t copied_bytes;
    /**
     * Bytes around a write that read as zeroes and are zeroes in the host cluster now: written as such, or because it
     * was never written to.
     */
    uint64_t zero_filled_bytes;
    /** Host clusters allocated for guest data. */
    uint64_t clusters_allocated;
    /** L2 tables allocated or copied. */
    uint64_t l2_tables_allocated;
    /** Writes that were not pure overwrites of allocated data. */
    uint64_t allocating_writes;
} qcow2_stats;

/**
 * Gets the facts about an image. Files that it refers to are not opened for that.
 *
 * image:     the handle; one opened with "inspect" will do
 * info:      filled in
 * info_size: sizeof(struct qcow2_info)
 *
 * Returns 0 or a negative errno. Thread-safe. Since 0.1.
 */
int qcow2_get_info(qcow2_image *image, struct qcow2_info *info, size_t info_size);

/**
 * Gets the facts about an image as JSON, with the keys of `qemu-img info --output=json`.
 *
 * image: the handle; one opened with "inspect" will do. Its "filename" is the path given to qcow2_open(), "" without
 * json:  where the text goes, in ASCII; set to NULL on an error. The caller frees it with qcow2_string_free()
 *
 * Returns 0 or a negative errno. Thread-safe. Since 0.1.
 */
int qcow2_info_json(qcow2_image *image,
                    char **json);

/**
 * Frees a string that the library gave to the caller.
 *
 * string: not to be used any more; NULL is a no-op
 *
 * Thread-safe. Since 0.1.
 */
void qcow2_string_free(char *string);

/**
 * Gets the counters of a handle.
 *
 * image:      the handle
 * stats:      filled in
 * stats_size: sizeof(struct qcow2_stats)
 *
 * Returns 0 or a negative errno. Thread-safe; what other threads do meanwhile may be counted or not. Since 0.1.
 */
int qcow2_get_stats(qcow2_image *image,
                    struct qcow2_stats *stats,
                    size_t stats_size);

/**
 * Guesses the format of an image from its first bytes. Nothing in the library calls this: a guest can make a raw disk
 * look like qcow2, so a guess must never decide how a disk that a guest could write is opened.
 *
 * buf:    the first bytes of the file
 * length: how many, 512 or more is enough
 *
 * Returns a QCOW2_PROBE_ number (more may come), or -EINVAL where buf is NULL. Thread-safe. Since 0.1.
 */
int qcow2_probe(const void *buf,
                size_t length);

/* Map =============================================================================================
 *
 * Where guest data is: which ranges are data, zero, compressed or not allocated, in which file of the backing chain,
 * and at which offset of that file. Backup, conversion and copying tools read the map to skip what holds nothing.
 */

/** The range reads from stored bytes ("data": true in `qemu-img map --output=json`). */
#define QCOW2_EXTENT_DATA (1 << 0)
/** The range reads as zeroes without any stored bytes ("zero": true). */
#define QCOW2_EXTENT_ZERO (1 << 1)
/** The range is stored compressed ("compressed": true). */
#define QCOW2_EXTENT_COMPRESSED (1 << 2)

/**
 * A file of the chain says something about the range; without this flag none does, and it reads as zeroes
 * ("present": true).
 */
#define QCOW2_EXTENT_PRESENT (1 << 3)
/** host_offset is meaningful ("offset" is there). */
#define QCOW2_EXTENT_OFFSET_VALID (1 << 4)
/** Of qcow2_bitmap_extents(): the range was changed since the bitmap was started. */
#define QCOW2_EXTENT_DIRTY (1 << 5)
/** host_offset is an offset into the external data file of the file that depth names, not into that file itself. */
#define QCOW2_EXTENT_DATA_FILE (1 << 6)

/**
 * A range of the guest disk in which everything is of one kind. The size of this struct never changes: room to grow
 * is in its reserved members.
 */
typedef struct qcow2_extent {
    /** Guest offset of the first byte. */
    uint64_t start;
    /** Length in bytes, never 0. */
    uint64_t length;
    /**
     * Offset of the first byte in its file, with QCOW2_EXTENT_OFFSET_VALID; else 0. With QCOW2_EXTENT_DATA_FILE its
     * file is the external data file.
     */
    uint64_t host_offset;
    /** Which file of the backing chain says so: 0 is the image itself, 1 its backing file, and so on. */
    uint32_t depth;
    /** QCOW2_EXTENT_ bits; a program must ignore bits that it does not know. */
    uint32_t flags;
    /** Zero. */
    uint64_t reserved[4];
} qcow2_extent;

/**
 * Lists the extents of a guest range, in order and without gaps. Neighbours that are the same kind of thing and
 * follow each other in their file come as one, exactly as in `qemu-img map --output=json`.
 *
 * image:   the handle
 * offset:  guest offset in bytes
 * length:  bytes; offset + length must not be past the end of the image
 * flags:   0
 * extents: where they go: room for n_max
 * n_max:   how many there is room for, 1 or more
 * n:       how many were filled in; 0 only where length is 0, or on an error
 *
 * Where n comes back as n_max, the range may have more: call again from the end of the last extent. Only extents that
 * were filled in are written to. Nothing is read but metadata. Other threads may write meanwhile: each extent was
 * true at some moment of the call.
 * Returns 0 or a negative errno, as qcow2_pread(). Thread-safe. Since 0.1.
 */
int qcow2_map(qcow2_image *image,
              uint64_t offset,
              uint64_t length,
              uint32_t flags,
              struct qcow2_extent *extents,
              size_t n_max,
              size_t *n);

/* Snapshots =======================================================================================
 *
 * Internal snapshots: earlier states of the disk in the same file. Creating, applying and deleting one holds the image
 * alone: reads and writes of other threads that are under way end first, new ones wait until the call returns. That
 * takes as long as reading all L2 tables of the image (128 MiB for each TiB of disk in use, with the defaults) and
 * writing those that change. A crash at any moment leaves the image as it was before the call or as it is after it.
 * Snapshots go by their id or, if none has that id, by their name, of which the first in the list counts.
 */

/** A list of snapshots, as they were when it was made. */
typedef struct qcow2_snapshots qcow2_snapshots;

/** One snapshot of a list. Members may be appended in later versions. */
typedef struct qcow2_snapshot_info {
    /** Its id, unique in the image; valid as long as the list. */
    const char *id;
    /** Its name, not necessarily unique nor UTF-8; valid as long as the list. */
    const char *name;
    /** Size of the disk in the snapshot in bytes; UINT64_MAX where it is not recorded, and so the size now. */
    uint64_t size_bytes;
    /** Size of the VM state that is kept with it in bytes; 0 for none. */
    uint64_t vm_state_bytes;
    /** How long the guest had been running, in nanoseconds. */
    uint64_t vm_clock_nsec;
    /** Instruction count of record and replay; UINT64_MAX for none. */
    uint64_t icount;
    /** When it was taken, in seconds since the Epoch. */
    uint32_t date_sec;
    /** And nanoseconds. */
    uint32_t date_nsec;
} qcow2_snapshot_info;

/** What is recorded with a new snapshot. */
typedef struct qcow2_snapshot_facts {
    /** sizeof(struct qcow2_snapshot_facts). */
    size_t struct_size;
    /** How long the guest has been running, in nanoseconds. */
    uint64_t vm_clock_nsec;
    /** When it was taken, in seconds since the Epoch; 0 together with date_nsec 0 means now. */
    uint32_t date_sec;
    /** And nanoseconds, below 1000000000. */
    uint32_t date_nsec;
} qcow2_snapshot_facts;

/**
 * Lists the snapshots of an image, in the order in which they were taken.
 *
 * image: the handle; one opened with "inspect" will do
 * list:  where the list goes; set to NULL on an error. The caller frees it with qcow2_snapshots_free()
 *
 * Returns 0 or a negative errno; -EINVAL with QCOW2_ERR_BAD_HEADER means that the snapshot table is malformed, the text
 * says where. Thread-safe. Since 0.1.
 */
int qcow2_snapshot_list(qcow2_image *image,
                        struct qcow2_snapshots **list);

/**
 * How many snapshots are in a list.
 *
 * list: the list; NULL has none
 *
 * Thread-safe. Since 0.1.
 */
size_t qcow2_snapshots_count(const struct qcow2_snapshots *list);

/**
 * Gets one snapshot of a list.
 *
 * list:      the list
 * index:     which, from 0
 * info:      filled in; its texts belong to the list
 * info_size: sizeof(struct qcow2_snapshot_info)
 *
 * Returns 0 or -EINVAL. Thread-safe. Since 0.1.
 */
int qcow2_snapshots_get(const struct qcow2_snapshots *list,
                        size_t index,
                        struct qcow2_snapshot_info *info,
                        size_t info_size);

/**
 * Frees a list.
 *
 * list: not to be used any more, nor the texts in it; NULL is a no-op
 *
 * Thread-safe. Since 0.1.
 */
void qcow2_snapshots_free(struct qcow2_snapshots *list);

/**
 * Takes a snapshot of the disk as it is. Everything that was written before is durable then.
 *
 * image: the handle, open for writing
 * name:  its name, 1 to 255 bytes of UTF-8. Another snapshot may have the same one. The id is one more than the largest
 * facts: what to record with it; NULL: taken now
 * flags: 0
 *
 * The header of this section says what other threads wait for.
 * Returns 0 or a negative errno: -EFBIG (QCOW2_ERR_TOO_LARGE) a host cluster has as many references as its refcount can
 * hold (with refcount_bits=1 any cluster), or there are 65536 snapshots; -ENOTSUP the image has an external data file;
 * -EROFS, -EIO and what the storage returns. After an error there is no new snapshot.
 * Thread-safe. Since 0.1.
 */
int qcow2_snapshot_create(qcow2_image *image,
                          const char *name,
                          const struct qcow2_snapshot_facts *facts,
                          uint32_t flags);

/**
 * Makes the disk what it was when a snapshot was taken, its size included: both at once, and durably. What the disk
 * held before is gone, unless another snapshot has it; the snapshot stays.
 *
 * image:      the handle, open for writing
 * id_or_name: the snapshot
 * flags:      0
 *
 * The caller sees to it that nobody believes in what was read before. What reads differently becomes dirty in enabled
 * bitmaps. VM state that is kept with the snapshot stays
 * where it is, past the end of the disk.
 * Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EFBIG as for creating one;
 * -ENOTSUP the image has an external data file; -EINVAL
 * (QCOW2_ERR_BAD_HEADER) its entry in the snapshot table is malformed; -EROFS, -EIO and what the storage returns. After
 * an error the disk is what it was.
 * Thread-safe. Since 0.1.
 */
int qcow2_snapshot_apply(qcow2_image *image,
                         const char *id_or_name,
                         uint32_t flags);

/**
 * Deletes a snapshot, and frees what nothing else refers to.
 *
 * image:      the handle, open for writing
 * id_or_name: the snapshot
 * flags:      0
 * progress:   told how far it has come, in the calling thread; NULL for nobody. In the first part of the work the
 *             snapshot is only verified: as long as that lasts, a non-zero result ends the call with -ECANCELED, and
 *             nothing has been changed. Later results count for nothing. It must not call into the image
 * user:       passed to it
 *
 * Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EBUSY (QCOW2_ERR_SNAPSHOT) it
 * is open, see qcow2_snapshot_open(); -ECANCELED; -EINVAL (QCOW2_ERR_BAD_HEADER) or -EIO (QCOW2_ERR_CORRUPT) something
 * is wrong with the snapshot; -ENOTSUP, -EROFS and what the storage returns. After an error the snapshot is still there.
 * Thread-safe. Since 0.1.
 */
int qcow2_snapshot_delete(qcow2_image *image,
                          const char *id_or_name,
                          uint32_t flags,
                          qcow2_progress_fn progress,
                          void *user);

/**
 * Opens a snapshot of an open image as a handle of its own, which takes no writes: reads, qcow2_map() and the facts are
 * those of the disk as the snapshot has it. (Without an open image: option "snapshot" of qcow2_open().)
 *
 * image:      the handle; reads and writes on it go on
 * id_or_name: the snapshot
 * flags:      0
 * snapshot:   where the new handle goes; set to NULL on an error. The caller closes it with qcow2_close()
 *
 * Until it is closed the snapshot cannot be deleted, and the file stays locked as it was for the first handle, which
 * may be closed before. Its L2 cache is one more of the same size.
 * Returns 0 or a negative errno: -ENOENT (QCOW2_ERR_SNAPSHOT) there is no such snapshot; -EINVAL (QCOW2_ERR_BAD_HEADER)
 * its entry in the snapshot table is malformed; -EROFS an image opened with "inspect".
 * Thread-safe. Since 0.1.
 */
int qcow2_snapshot_open(qcow2_image *image,
                        const char *id_or_name,
                        uint32_t flags,
                        qcow2_image **snapshot);

/* Bitmaps =========================================================================================
 *
 * Persistent dirty bitmaps: which parts of the disk were changed since a moment, kept in the image. What an incremental
 * backup copies.
 *
 * A bitmap that is enabled records every change, from whatever thread and by whatever program that knows bitmaps. While
 * a handle writes, its bitmaps are marked in use in the file; qcow2_close() stores them. A program that ends otherwise
 * leaves them marked, and such a bitmap can only be removed: start a new one, and make a full backup.
 *
 * Functions that change bitmaps wait for the requests under way and hold up later ones, are done when they return, and
 * survive a crash as a whole or not at all.
 */

/** For qcow2_bitmap_add(): the bitmap records nothing until it is enabled. */
#define QCOW2_BITMAP_DISABLED (1 << 0)
/** The bitmap records changes. */
#define QCOW2_BITMAP_ENABLED (1 << 0)
/** The bitmap is marked in use in the file: by this handle, or by one that has not closed it. */
#define QCOW2_BITMAP_IN_USE (1 << 1)
/** It was in use when a program ended without closing the image: it may lack changes, and can only be removed. */
#define QCOW2_BITMAP_INCONSISTENT (1 << 2)
/** This version of the library cannot use it: it is kept as it is, and can be removed. */
#define QCOW2_BITMAP_UNUSABLE (1 << 3)

/** Facts about a bitmap. Members may be appended in later versions. */
typedef struct qcow2_bitmap {
    /** Its name, with a NUL at its end. */
    char name[1024];
    /** Bytes of the disk that one bit stands for. */
    uint64_t granularity_bytes;
    /**
     * QCOW2_BITMAP_ENABLED, QCOW2_BITMAP_IN_USE, QCOW2_BITMAP_INCONSISTENT, QCOW2_BITMAP_UNUSABLE; a program must ignore
     * bits that it does not know.
     */
    uint32_t flags;
    /** Zero. */
    uint32_t reserved;
} qcow2_bitmap;

/**
 * Describes one of the image's bitmaps; count index up from 0 until it fails.
 *
 * image:       the handle; it may have been opened with "inspect"
 * index:       which, in the order of the file
 * bitmap:      filled in
 * bitmap_size: sizeof(struct qcow2_bitmap)
 *
 * Returns 0, -ENOENT past the last one, -EINVAL where the bitmaps of the image are malformed, or another negative errno,
 * as qcow2_pread(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_describe(qcow2_image *image,
                          size_t index,
                          struct qcow2_bitmap *bitmap,
                          size_t bitmap_size);

/**
 * Adds a bitmap in which nothing is dirty.
 *
 * image:             the handle, open for writing; version 3 of the format ("compat" 1.1)
 * name:              1 to 1023 bytes of UTF-8, without control characters, that no other bitmap of the image has
 * granularity_bytes: bytes of the disk that one bit stands for, a power of two from 512 to 2 GiB; 0 for the cluster
 *                    size, but at least 4 KiB and at most 64 KiB
 * flags:             0, or QCOW2_BITMAP_DISABLED
 *
 * Returns 0 or a negative errno: -EEXIST there is one of that name; -EINVAL wrong name, granularity or flags; -ENOTSUP
 * the image cannot have it (version 2, or it would take more than 512 MiB); or as qcow2_pwrite(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_add(qcow2_image *image,
                     const char *name,
                     uint64_t granularity_bytes,
                     uint32_t flags);

/**
 * Removes a bitmap, whatever state it is in.
 *
 * image: the handle, open for writing
 * name:  the bitmap
 *
 * Returns 0 or a negative errno: -ENOENT there is none of that name; or as qcow2_pwrite(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_remove(qcow2_image *image,
                        const char *name);

/**
 * Makes a bitmap start anew: nothing is dirty in it.
 *
 * image: the handle, open for writing
 * name:  the bitmap
 *
 * Returns 0 or a negative errno: -ENOENT there is none of that name; -EINVAL it is inconsistent; or as qcow2_pwrite().
 * Thread-safe. Since 0.1.
 */
int qcow2_bitmap_clear(qcow2_image *image,
                       const char *name);

/**
 * Lets a bitmap record changes from now on. It keeps what it says.
 *
 * image: the handle, open for writing
 * name:  the bitmap
 *
 * Returns 0 or a negative errno, as qcow2_bitmap_clear(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_enable(qcow2_image *image, const char *name);

/**
 * Lets a bitmap record no more changes. It keeps what it says.
 *
 * image: the handle, open for writing
 * name:  the bitmap
 *
 * Returns 0 or a negative errno, as qcow2_bitmap_clear(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_disable(qcow2_image *image, const char *name);

/**
 * Makes dirty in one bitmap what is dirty in another. Where their granularities differ, everything counts that a bit of
 * either stands for.
 *
 * image: the handle, open for writing
 * name:  the bitmap that is added to
 * from:  the handle of the image that has the other bitmap; NULL, or image itself, for the same image. Another one has to
 *        be of the same size, and may be open for reading
 * other: the other bitmap
 *
 * Returns 0 or a negative errno: -ENOENT there is none of that name; -EINVAL one is inconsistent, or the sizes differ;
 * or as qcow2_pwrite(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_merge(qcow2_image *image,
                       const char *name,
                       qcow2_image *from,
                       const char *other);

/**
 * Lists what a bitmap says about a guest range: extents, in order and without gaps, that are dirty (QCOW2_EXTENT_DIRTY) or
 * not; as long as they can be. What was written through this handle counts, although it is stored only when the
 * handle is closed.
 *
 * image:   the handle
 * name:    the bitmap
 * offset:  guest offset in bytes
 * length:  bytes; offset + length must not be past the end of the image
 * flags:   0
 * extents: where they go: room for n_max. Of each, start, length and flags are filled in, and the rest is zero
 * n_max:   how many there is room for, 1 or more
 * n:       how many were filled in; 0 only where length is 0, or on an error
 *
 * Where n comes back as n_max, the range may have more: call again from the end of the last extent. The first extent
 * begins at offset and the last one ends with the range, also inside of what one bit stands for.
 * Returns 0 or a negative errno: -ENOENT there is no bitmap of that name; -EINVAL it is inconsistent; or as
 * qcow2_pread(). Thread-safe. Since 0.1.
 */
int qcow2_bitmap_extents(qcow2_image *image,
                         const char *name,
                         uint64_t offset,
                         uint64_t length,
                         uint32_t flags,
                         qcow2_extent *extents,
                         size_t n_max,
                         size_t *n);

/* Check and repair ================================================================================
 *
 * Whether an image is consistent, and putting right what can be put right. The image is named by its path, descriptor
 * or storage: what needs a repair cannot be opened for writing. (A dirty image can: such an open repairs it first.) An
 * image that is open is checked by its handle, and not repaired. Of the options, "locking", "check_memory" and the log, progress and finding functions count.
 * Nothing that the image refers to is opened.
 */

/** Flag of the check calls: clusters that are counted and not used are given up. */
#define QCOW2_CHECK_FIX_LEAKS (1 << 0)
/** Flag of the check calls: everything is put right that can be without a guess, leaks included. */
#define QCOW2_CHECK_FIX_ALL (1 << 1)
/** Kind of a finding: clusters counted more often than they are referred to. Space is lost, nothing else. */
#define QCOW2_FINDING_LEAK 1
/** Kind of a finding: clusters referred to more often than they are counted; they could be handed out while in use. */
#define QCOW2_FINDING_COUNT_TOO_LOW 2
/** Kind of a finding: more references than a count of this width can tell. */
#define QCOW2_FINDING_COUNT_OVERFLOW 3
/** Kind of a finding: a COPIED flag that does not say whether the count is one. */
#define QCOW2_FINDING_COPIED_FLAG 4
/** Kind of a finding: a reference past the end of the file. */
#define QCOW2_FINDING_OUTSIDE_FILE 5
/** Kind of a finding: a reference that is not a multiple of the cluster size. */
#define QCOW2_FINDING_UNALIGNED 6
/** Kind of a finding: bits that are reserved are set. */
#define QCOW2_FINDING_RESERVED_BITS 7
/** Kind of a finding: flags or bitmap of an L2 entry contradict each other. */
#define QCOW2_FINDING_MALFORMED_ENTRY 8
/** Kind of a finding: a refcount block that cannot be used. */
#define QCOW2_FINDING_REFCOUNT_BLOCK 9
/** Kind of a finding: the refcount table cannot be used. */
#define QCOW2_FINDING_REFCOUNT_TABLE 10
/** Kind of a finding: a cluster that holds metadata and something else. */
#define QCOW2_FINDING_OVERLAP 11
/** Kind of a finding: an entry of the snapshot table. */
#define QCOW2_FINDING_SNAPSHOT_TABLE 12
/** Kind of a finding: a bitmap table. */
#define QCOW2_FINDING_BITMAPS 13
/** Kind of a finding: something that could not be read, and was not checked. */
#define QCOW2_FINDING_UNREADABLE 14
/** A guest offset that is none: the finding has to do with no guest offset. */
#define QCOW2_NO_OFFSET UINT64_MAX

/**
 * One thing that is wrong, as told to the function of qcow2_opts_set_finding(). The library makes this struct; it may
 * grow at its end.
 */
typedef struct qcow2_finding {
    /** Offset in the image file: of the entry that is wrong, or of the cluster whose count is. */
    uint64_t host_offset;
    /** Guest offset that goes with it, or QCOW2_NO_OFFSET. */
    uint64_t guest_offset;
    /** What is stored there: an entry, a count. */
    uint64_t value;
    /** Of counts: how many references there are; else 0. */
    uint64_t references;
    /** Of counts: for how many clusters in a row this is true; else how often the structure is referred to. */
    uint64_t clusters;
    /** A QCOW2_FINDING_ number; there may be more of them in later versions. */
    uint32_t kind;
    /** Zero. */
    uint32_t reserved;
    /** All of that in words; valid during the call. */
    const char *text;
} qcow2_finding;

/**
 * Told of each finding of a check.
 *
 * user:    the pointer given with the function
 * finding: what is wrong; valid during the call. A later version of the library may append members
 */
typedef void (*qcow2_finding_fn)(void *user, const struct qcow2_finding *finding);

/** What a check found. After a repair: what is left, and how much was put right. */
typedef struct qcow2_check_result {
    /** Things that are wrong and can lose data. */
    uint64_t corruptions;
    /** Clusters that are counted more often than they are used: space is lost. */
    uint64_t leaks;
    /** Structures that could not be checked. With any of them, a repair changes nothing. */
    uint64_t check_errors;
    /** Corruptions that were put right. */
    uint64_t corruptions_fixed;
    /** Leaks that were put right. */
    uint64_t leaks_fixed;
    /** Clusters of the guest disk. */
    uint64_t total_clusters;
    /** Those that are allocated. */
    uint64_t allocated_clusters;
    /** Allocated ones that do not follow the one before in the file; all compressed ones. */
    uint64_t fragmented_clusters;
    /** Compressed ones. */
    uint64_t compressed_clusters;
    /** End of the last cluster that is used or counted, in bytes. */
    uint64_t image_end_offset;
} qcow2_check_result;

/**
 * Lets the caller see what a check finds, one thing at a time and in no particular order. A repair tells what its first
 * look has found; what it leaves is in the result.
 *
 * opts:    the options
 * finding: the function; NULL takes an earlier one away. Called during the check only, in its thread; it must not call
 *          into the image
 * user:    passed to it
 * destroy: called once with user when the options are freed or get another function; NULL if there is nothing to do.
 *          Called too when this call fails
 *
 * Returns 0 or -EINVAL. One thread at a time. Since 0.1.
 */
int qcow2_opts_set_finding(qcow2_opts *opts,
                           qcow2_finding_fn finding,
                           void *user,
                           qcow2_destroy_fn destroy);

/**
 * Checks the image in a file, and repairs it if that is asked for.
 *
 * path:     the file
 * opts:     as told at the head of this section, or NULL for the defaults
 * flags:    0 to look only; QCOW2_CHECK_FIX_LEAKS, QCOW2_CHECK_FIX_ALL
 * out:      what was found, and what was put right
 * out_size: sizeof(struct qcow2_check_result)
 *
 * An image is sound if corruptions and check_errors are 0; what the call returns only tells whether it could be
 * checked. Memory is bounded by option "check_memory", whatever the file says: where it is short, the tables are read
 * several times. With flags, the image is written to, in an order in which neither a power cut nor the progress
 * function can make it worse; a repair that was ended is finished by the next one. What can only be guessed stays as
 * it is and is still counted. When nothing is wrong any more, the dirty and the corrupt bit are cleared.
 * Returns 0 or a negative errno: that of open(2) and of the reads and writes; -EINVAL not a qcow2 image, or a header
 * that leads nowhere; -ENOTSUP incompatible features that nobody knows; -EBUSY somebody else uses the image;
 * -ECANCELED the progress function ended the call; -EFBIG new refcount structures would not fit.
 * Thread-safe. Since 0.1.
 */
int qcow2_check(const char *path,
                const qcow2_opts *opts,
                uint32_t flags,
                struct qcow2_check_result *out,
                size_t out_size);

/**
 * As qcow2_check(), for a file that the caller has opened: for reading, and for writing if it is to be repaired.
 *
 * fd:       the descriptor; it stays the caller's
 * opts, flags, out, out_size: as in qcow2_check()
 *
 * Returns 0 or a negative errno, as qcow2_check(). Thread-safe. Since 0.1.
 */
int qcow2_check_fd(int fd,
                   const qcow2_opts *opts,
                   uint32_t flags,
                   struct qcow2_check_result *out,
                   size_t out_size);

/**
 * As qcow2_check(), for a storage of the caller, which must be able to write and flush if the image is to be repaired.
 *
 * storage:  where the image is; it stays the caller's
 * opts, flags, out, out_size: as in qcow2_check()
 *
 * Returns 0 or a negative errno, as qcow2_check(), or what a callback of the storage returned. Thread-safe. Since 0.1.
 */
int qcow2_check_storage(qcow2_storage *storage,
                        const qcow2_opts *opts,
                        uint32_t flags,
                        struct qcow2_check_result *out,
                        size_t out_size);

/**
 * As qcow2_check(), for an image that is open, by whatever way. Nothing is repaired: for that, the image is closed first.
 *
 * image: the handle; not that of a snapshot from qcow2_snapshot_open()
 * flags: 0
 * opts, out, out_size: as in qcow2_check(); option "locking" does not count
 *
 * What has been written through the handle is made durable first, as by qcow2_flush(). Requests of other threads and of
 * queues wait until the check is done; the finding and progress functions must not call into the image.
 * Returns 0 or a negative errno, as qcow2_check(); -EINVAL flags, or the handle of a snapshot; -EIO the handle writes
 * no more, because corruption was found or a flush has failed: close it, and check the file.
 * Thread-safe. Since 0.1.
 */
int qcow2_check_image(qcow2_image *image,
                      const qcow2_opts *opts,
                      uint32_t flags,
                      struct qcow2_check_result *out,
                      size_t out_size);

/* Queues ==========================================================================================
 *
 * Many requests of one thread under way at once: what an event loop of a hypervisor or a server wants. A request is
 * prepared, submitted together with others, and reaped once it has ended. Nothing happens behind the caller's back: no
 * callback is called, and no thread works for a queue that runs on io_uring but those that compress and decompress: all
 * queues of the process share these, one for each processor, from the first such work until the last queue is freed. An
 * owner who waits in qcow2_queue_reap() without a time limit takes a share of that work. Requests go on while their
 * owner is in qcow2_queue_submit() or qcow2_queue_reap(), and where any thread waits for them, in a blocking call or for
 * another queue, on the same image or on a snapshot of it that was opened beside it.
 *
 * Requests of a queue have no order among each other: who wants one after the other reaps the first before submitting
 * the second. Two requests under way that overlap, and of which one writes, give each byte one of the two values.
 */

/**
 * What performs the transfers of a queue: io_uring where it is to be had (Linux 5.11, and no sandbox that forbids it),
 * threads otherwise. qcow2_queue_backend() says which it became.
 */
#define QCOW2_QUEUE_AUTO 0
/** io_uring, or no queue at all. */
#define QCOW2_QUEUE_IO_URING 1
/** A few threads that make blocking calls. */
#define QCOW2_QUEUE_THREADS 2

/** A queue of requests on an image. It belongs to one thread at a time. */
typedef struct qcow2_queue qcow2_queue;

/** A request that has ended. The size of this struct never changes: room to grow is in its reserved members. */
typedef struct qcow2_completion {
    /** The number that the request was prepared with. */
    uint64_t user_data;
    /** 0, or the negative errno that the blocking call would have returned. */
    int32_t result;
    /** 0, or a QCOW2_ERR_ number that says why. */
    int32_t error_code;
    /** Zero. */
    uint64_t reserved[2];
} qcow2_completion;

/**
 * Makes a queue on an image.
 *
 * image:   the handle. It may be closed before the queue is freed: requests under way then end first, and later ones
 *          fail
 * depth:   how many requests may be between being prepared and being reaped: 1 to 4096
 * backend: QCOW2_QUEUE_AUTO, or which one it must be
 * queue:   where the queue goes; set to NULL on an error
 *
 * Any number of queues, and blocking calls, may use one image at once. The caller frees the queue with
 * qcow2_queue_free().
 * Returns 0 or a negative errno: -EINVAL a depth or a backend out of range; what io_uring_setup(2) returned.
 * Thread-safe. Since 0.1.
 */
int qcow2_queue_new(qcow2_image *image,
                    uint32_t depth,
                    uint32_t backend,
                    struct qcow2_queue **queue);

/**
 * Frees a queue. Waits until every request that was submitted has ended, so that the buffers are the caller's again;
 * requests that were only prepared never happen, and completions that were not reaped are lost.
 *
 * queue:  the queue, not to be used any more; NULL is a no-op
 *
 * Since 0.1.
 */
void qcow2_queue_free(struct qcow2_queue *queue);

/**
 * What performs the transfers of a queue: QCOW2_QUEUE_IO_URING or QCOW2_QUEUE_THREADS, or a negative errno.
 *
 * queue:  the queue
 *
 * Since 0.1.
 */
int qcow2_queue_backend(const struct qcow2_queue *queue);

/**
 * Prepares a read. As for all that follows: nothing happens before qcow2_queue_submit() or qcow2_queue_reap().
 *
 * queue:     the queue
 * iov:       the buffers, filled one after the other; the array may be reused at once, the buffers must stay valid and
 *            be left alone until the request has been reaped
 * iovcnt:    how many; any number
 * offset:    guest offset in bytes
 * flags:     0
 * user_data: comes back with the completion; the library does nothing with it
 *
 * Returns 0 or a negative errno: -EAGAIN as many requests as the queue is deep are prepared or not reaped; -EINVAL
 * NULL pointers or unknown flags. All other errors are the completion's. Since 0.1.
 */
int qcow2_queue_readv(struct qcow2_queue *queue,
                      const struct iovec *iov,
                      int iovcnt,
                      uint64_t offset,
                      uint32_t flags,
                      uint64_t user_data);

/**
 * Prepares a write.
 *
 * queue:     the queue
 * iov:       the buffers; the array may be reused at once, the buffers must stay valid and unchanged until the request
 *            has been reaped
 * iovcnt:    how many; any number
 * offset:    guest offset in bytes
 * flags:     as for qcow2_pwrite()
 * user_data: comes back with the completion
 *
 * Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
 */
int qcow2_queue_writev(struct qcow2_queue *queue,
                       const struct iovec *iov,
                       int iovcnt,
                       uint64_t offset,
                       uint32_t flags,
                       uint64_t user_data);

/**
 * Prepares a flush: it makes everything durable whose completion had been, or could have been, reaped when the flush
 * was submitted.
 *
 * queue:     the queue
 * user_data: comes back with the completion
 *
 * Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
 */
int qcow2_queue_flush(struct qcow2_queue *queue,
                      uint64_t user_data);

/**
 * Prepares the writing of zeroes.
 *
 * queue:     the queue
 * offset:    guest offset in bytes
 * length:    bytes
 * flags:     as for qcow2_write_zeroes()
 * user_data: comes back with the completion
 *
 * Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
 */
int qcow2_queue_write_zeroes(struct qcow2_queue *queue,
                             uint64_t offset,
                             uint64_t length,
                             uint32_t flags,
                             uint64_t user_data);

/**
 * Prepares a discard.
 *
 * queue:     the queue
 * offset:    guest offset in bytes
 * length:    bytes
 * flags:     as for qcow2_discard()
 * user_data: comes back with the completion
 *
 * Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
 */
int qcow2_queue_discard(struct qcow2_queue *queue,
                        uint64_t offset,
                        uint64_t length,
                        uint32_t flags,
                        uint64_t user_data);

/**
 * Begins everything that was prepared, with as few system calls as possible. What needs no waiting (what the page
 * cache has, zeroes, an error) ends at once.
 *
 * queue:  the queue
 *
 * Returns how many requests have ended and can be reaped now, or a negative errno. Since 0.1.
 */
int qcow2_queue_submit(struct qcow2_queue *queue);

/**
 * Takes requests that have ended, those that ended first before the others. What was prepared is submitted first.
 *
 * queue:       the queue
 * completions: where they go: room for max
 * max:         how many there is room for
 * min:         waits until there are so many, or as many as are under way, or the time is over; 0 does not wait
 * timeout_ns:  how long to wait at most, in nanoseconds; negative: as long as it takes
 *
 * Returns how many were filled in, or a negative errno (then none was taken). What went wrong with the last request
 * that failed among them, qcow2_last_error() tells in words. Since 0.1.
 */
int qcow2_queue_reap(struct qcow2_queue *queue,
                     struct qcow2_completion *completions,
                     uint32_t max,
                     uint32_t min,
                     int64_t timeout_ns);

/**
 * A descriptor for poll(2) or epoll(7): readable when requests have ended, or when some can go on: then
 * qcow2_queue_reap() is to be called (which makes it unreadable again; nobody needs to read from it).
 *
 * queue:  the queue, to which the descriptor belongs; it is made at the first call
 *
 * Returns the descriptor or a negative errno. Since 0.1.
 */
int qcow2_queue_fd(struct qcow2_queue *queue);

/**
 * Takes back a request that has been prepared and not submitted. It completes with -ECANCELED. A request that is under
 * way is not interrupted.
 *
 * queue:     the queue
 * user_data: of the request; if several have it, the one that was prepared first
 *
 * Returns 0 or a negative errno: -EALREADY it has been submitted; -ENOENT there is none. Since 0.1.
 */
int qcow2_queue_cancel(struct qcow2_queue *queue,
                       uint64_t user_data);

/* Storages ========================================================================================
 *
 * Advanced: where the bytes of an image are. A path or a file descriptor is enough for most programs; a storage is
 * for those that keep images in Ceph, in S3, in memory, or behind a privileged process.
 *
 * A storage is counted: images, options and resolvers keep their own reference, so that qcow2_storage_free() only
 * gives up the caller's.
 */

/** Flag of qcow2_storage_open(): open the file for reading only. */
#define QCOW2_STORAGE_READ_ONLY (1 << 0)
/** Most buffers that preadv and pwritev of a storage are called with. */
#define QCOW2_STORAGE_IOV_MAX 1024

/**
 * What a storage does. Members that are NULL are not supported: a call that needs one fails with -ENOTSUP. Members
 * may be appended in later versions.
 * No member reserves space: where preallocation=falloc asks for that, zeroes are written, as with preallocation=full.
 *
 * Every callback gets the user pointer given to qcow2_storage_new(), is called from any thread and from several at
 * once, returns a negative errno on failure, and must not call into an image that uses the storage, nor unwind
 * (throw). A read may be under way in the sector in which a write begins: what it finds of that does not matter.
 */
typedef struct qcow2_storage_ops {
    /** sizeof(struct qcow2_storage_ops). */
    size_t struct_size;
    /** Required. Reads up to length bytes at offset: returns how many, 0 only at or past the end of the storage. */
    ssize_t (*pread)(void *user, void *buf, size_t length, uint64_t offset);
    /**
     * Writes up to length bytes at offset, growing the storage if need be: returns how many, 1 or more. NULL makes
     * a storage that can only be read.
     */
    ssize_t (*pwrite)(void *user, const void *buf, size_t length, uint64_t offset);
    /** As pread, into up to QCOW2_STORAGE_IOV_MAX buffers. NULL: the library calls pread for each. */
    ssize_t (*preadv)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset);
    /** As pwrite, from up to QCOW2_STORAGE_IOV_MAX buffers. NULL: the library calls pwrite for each. */
    ssize_t (*pwritev)(void *user, const struct iovec *iov, int iovcnt, uint64_t offset);
    /**
     * Makes everything durable whose write returned before the call. Returns 0. A storage that has nothing to make
     * durable gives a function that returns 0, not NULL.
     */
    int (*flush)(void *user);
    /** Required. Stores the size of the storage in bytes. Returns 0. */
    int (*get_size)(void *user, uint64_t *size);
    /** Sets the size of the storage in bytes; new bytes read as zeroes. Returns 0. */
    int (*truncate)(void *user, uint64_t size);
    /** Called once, when the last image, option object or handle that used the storage is gone. May be NULL. */
    qcow2_destroy_fn destroy;
    /**
     * Gives up the space of length bytes at offset: they read as zeroes from then on, and the size stays. Returns 0.
     * NULL, or a function that fails: freed clusters keep their space until they are used again; after the first
     * failure an image does not call it again.
     */
    int (*punch_hole)(void *user, uint64_t offset, uint64_t length);
} qcow2_storage_ops;

/**
 * Makes a storage of callbacks.
 *
 * ops:     the functions; copied, may be freed after the call
 * user:    passed to each of them; must stay valid until ops->destroy is called with it
 * storage: where the storage goes; set to NULL on an error
 *
 * On an error ops->destroy is not called: user stays the caller's. The caller gives its reference up with
 * qcow2_storage_free().
 * Returns 0 or -EINVAL: NULL, a wrong struct_size, or a required callback is missing. Thread-safe. Since 0.1.
 */
int qcow2_storage_new(const struct qcow2_storage_ops *ops,
                      void *user,
                      qcow2_storage **storage);

/**
 * Makes a storage of a file or block device: what a resolver returns for a name that it allows.
 *
 * path:    the file, which must exist
 * flags:   0 (for reading and writing) or QCOW2_STORAGE_READ_ONLY
 * storage: where the storage goes; set to NULL on an error
 *
 * Returns 0 or a negative errno, that of open(2). Thread-safe. Since 0.1.
 */
int qcow2_storage_open(const char *path, uint32_t flags, qcow2_storage **storage);

/**
 * Makes a storage that passes everything on to another one and writes down, in the format of the kernel's
 * dm-log-writes target, what is written, flushed and discarded: whoever wants to know what a power cut would leave can
 * replay the log onto a copy of the file as it was before, up to any entry.
 *
 * inner:    where the bytes are. The new storage keeps a reference
 * log_path: the log, a file that is made or emptied
 * flags:    0
 * storage:  where the storage goes; set to NULL on an error
 *
 * Calls are passed on one at a time: this is for tests. A call whose entry cannot be logged fails. The number of
 * entries in the log is right after each flush, and once the last user of the storage is gone.
 * Returns 0 or a negative errno: that of open(2) for the log. Thread-safe. Since 0.1.
 */
int qcow2_storage_record(qcow2_storage *inner,
                         const char *log_path,
                         uint32_t flags,
                         qcow2_storage **storage);

/**
 * Gives up the caller's reference to a storage. What still uses the storage (an open image, options) keeps it alive.
 *
 * storage: not to be used any more; NULL is a no-op
 *
 * Thread-safe. Since 0.1.
 */
void qcow2_storage_free(qcow2_storage *storage);

#ifdef __cplusplus
}
#endif

#endif /* QCOW2_H */
