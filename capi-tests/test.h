/* What every test here uses: checks that say where they failed, and the tools of QEMU as the other opinion.
 * A test runs in an empty folder of its own and exits 0 (passed), 77 (cannot run here, says why) or otherwise. */
#ifndef TEST_H
#define TEST_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <qcow2.h>

#define FAIL(...)                                                          \
    do {                                                                   \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                    \
        fprintf(stderr, __VA_ARGS__);                                      \
        fputc('\n', stderr);                                               \
        exit(1);                                                           \
    } while (0)

#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition))                                                  \
            FAIL("not true: %s", #condition);                              \
    } while (0)

/* A call of the library that has to succeed. */
#define OK(call)                                                           \
    do {                                                                   \
        int result_ = (call);                                              \
        if (result_ != 0)                                                  \
            FAIL("%s returned %d: %s", #call, result_, qcow2_last_error());\
    } while (0)

/* A call that has to fail with this errno and code, and with a text that has this part in it. */
#define FAILS(call, errno_, code_, part)                                   \
    do {                                                                   \
        int result_ = (call);                                              \
        if (result_ != -(errno_))                                          \
            FAIL("%s returned %d instead of %d (last error: %s)", #call, result_, -(errno_), qcow2_last_error()); \
        if (qcow2_last_error_code() != (code_))                            \
            FAIL("%s: code %d instead of %d (%s)", #call, qcow2_last_error_code(), (code_), qcow2_last_error()); \
        if (strstr(qcow2_last_error(), (part)) == NULL)                    \
            FAIL("%s: '%s' does not say '%s'", #call, qcow2_last_error(), (part)); \
    } while (0)

static inline void skip(const char *why)
{
    fprintf(stderr, "SKIPPED: %s\n", why);
    exit(77);
}

/* Runs a shell command; false if it fails. */
__attribute__((format(printf, 1, 2))) static inline bool shell(const char *format, ...)
{
    char command[2048];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(command, sizeof(command), format, arguments);
    va_end(arguments);
    CHECK(n > 0 && (size_t)n < sizeof(command));
    fflush(NULL);
    return system(command) == 0;
}

/* For tests that make no sense without the tools of QEMU. */
static inline void need_qemu(void)
{
    if (!shell("qemu-img --version >/dev/null 2>&1 && qemu-io --version >/dev/null 2>&1"))
        skip("qemu-img and qemu-io are not installed");
}

static inline bool have_qemu(void)
{
    bool have = shell("qemu-img --version >/dev/null 2>&1");
    if (!have)
        fprintf(stderr, "note: without qemu-img, nobody else looks at the images of this test\n");
    return have;
}

/* qemu-img finds neither errors nor leaks. */
static inline void check_image(const char *path)
{
    if (have_qemu() && !shell("qemu-img check -q -f qcow2 '%s' >check.log 2>&1 || { cat check.log >&2; false; }", path))
        FAIL("qemu-img check has something to say about %s", path);
}

/* Creates an image from "key=value" strings, ended by NULL. */
static inline void create_image(const char *path, uint64_t size, const char *const *settings)
{
    qcow2_opts *opts = qcow2_opts_new();
    for (; settings != NULL && *settings != NULL; settings++) {
        char key[64];
        const char *value = strchr(*settings, '=') + 1;
        snprintf(key, sizeof(key), "%.*s", (int)(value - *settings - 1), *settings);
        OK(qcow2_opts_set_str(opts, key, value));
    }
    OK(qcow2_create(path, size, opts, 0));
    qcow2_opts_free(opts);
}

/* Opens an image, with its backing files. */
static inline qcow2_image *open_image(const char *path)
{
    qcow2_opts *opts = qcow2_opts_new();
    qcow2_image *image;
    OK(qcow2_opts_set_str(opts, "backing", "any"));
    OK(qcow2_open(path, opts, &image));
    qcow2_opts_free(opts);
    return image;
}

static inline void write_pattern(qcow2_image *image, int pattern, uint64_t offset, size_t length)
{
    uint8_t *bytes = malloc(length);
    memset(bytes, pattern, length);
    OK(qcow2_pwrite(image, bytes, length, offset, 0));
    free(bytes);
}

/* The range reads as this one byte. */
static inline void expect_pattern(qcow2_image *image, int pattern, uint64_t offset, size_t length)
{
    uint8_t *bytes = malloc(length);
    memset(bytes, ~pattern, length);
    OK(qcow2_pread(image, bytes, length, offset, 0));
    for (size_t at = 0; at < length; at++)
        if (bytes[at] != (uint8_t)pattern)
            FAIL("guest byte %" PRIu64 " is 0x%02x instead of 0x%02x", offset + at, bytes[at], (uint8_t)pattern);
    free(bytes);
}

static inline void write_file(const char *path, const void *bytes, size_t length)
{
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL && fwrite(bytes, 1, length, file) == length && fclose(file) == 0);
}

static inline void fill_file(const char *path, int pattern, size_t length)
{
    uint8_t *bytes = malloc(length);
    memset(bytes, pattern, length);
    write_file(path, bytes, length);
    free(bytes);
}

/* A big-endian number of a file. */
static inline uint64_t peek(const char *path, uint64_t offset, int bytes)
{
    uint8_t raw[8];
    uint64_t value = 0;
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, raw, (size_t)bytes, (off_t)offset) == bytes);
    close(fd);
    for (int i = 0; i < bytes; i++)
        value = value << 8 | raw[i];
    return value;
}

static inline void poke(const char *path, uint64_t offset, int bytes, uint64_t value)
{
    uint8_t raw[8];
    int fd = open(path, O_WRONLY);
    for (int i = bytes - 1; i >= 0; i--, value >>= 8)
        raw[i] = (uint8_t)value;
    CHECK(fd >= 0 && pwrite(fd, raw, (size_t)bytes, (off_t)offset) == bytes);
    close(fd);
}

/* Where the extended L2 entry of a guest cluster is: looked up through the header and L1, without the library. */
static inline uint64_t l2_entry_at(const char *path, uint64_t cluster)
{
    uint64_t entries = (UINT64_C(1) << peek(path, 20, 4)) / 16;
    uint64_t l2 = peek(path, peek(path, 40, 8) + cluster / entries * 8, 8) & UINT64_C(0x00fffffffffffe00);
    CHECK(l2 != 0);
    return l2 + cluster % entries * 16;
}

#define COPIED (UINT64_C(1) << 63)
#define COMPRESSED (UINT64_C(1) << 62)

/* Host offsets are each allocator's own business; of a descriptor only the kind is compared. */
static inline uint64_t kind(uint64_t descriptor)
{
    return descriptor & (COPIED | COMPRESSED);
}

/* `kind_` 0: there is no host cluster. */
static inline void expect_entry(const char *step, const char *path, uint64_t cluster, uint64_t kind_, uint64_t bitmap)
{
    uint64_t at = l2_entry_at(path, cluster);
    uint64_t descriptor = peek(path, at, 8), found = peek(path, at + 8, 8);
    if (kind(descriptor) != kind_ || found != bitmap || (kind_ == 0 && descriptor != 0))
        FAIL("%s: L2 entry #%" PRIu64 " is %016" PRIx64 " %016" PRIx64 ", expected kind %" PRIx64 " and bitmap %016" PRIx64,
             step, cluster, descriptor, found, kind_ >> 60, bitmap);
}

#endif
