/* qcow2_map against `qemu-img map --output=json`, extent by extent, on images with everything in them; and resumed
 * call by call with room for one extent only. */
#include "test.h"

#define DISK (4 << 20)

static struct qcow2_extent whole[4096], one;

/* Our extents in the text of qemu-img, one a line, without the file names. */
static void print_extents(const char *to, size_t n)
{
    static const char *const words[] = {"false", "true"};
    FILE *file = fopen(to, "w");
    CHECK(file != NULL);
    for (size_t i = 0; i < n; i++) {
        const struct qcow2_extent *e = &whole[i];
        fprintf(file, "%" PRIu64 " %" PRIu64 " %u %s %s %s %s", e->start, e->length, e->depth,
                words[!!(e->flags & QCOW2_EXTENT_PRESENT)], words[!!(e->flags & QCOW2_EXTENT_ZERO)],
                words[!!(e->flags & QCOW2_EXTENT_DATA)], words[!!(e->flags & QCOW2_EXTENT_COMPRESSED)]);
        if (e->flags & QCOW2_EXTENT_OFFSET_VALID)
            fprintf(file, " %" PRIu64, e->host_offset);
        fputc('\n', file);
    }
    fclose(file);
}

/* QEMU also looks for holes of the host file where it suspects preallocated metadata; so that there are none, the
 * file is written out in full first. */
static void compare(const char *path)
{
    size_t n, got;
    CHECK(shell("cp --sparse=never %s full && mv full %s", path, path));
    qcow2_image *image = open_image(path);
    uint64_t size = (uint64_t)qcow2_size(image), at = 0;
    OK(qcow2_map(image, 0, size, 0, whole, sizeof(whole) / sizeof(whole[0]), &n));
    CHECK(n > 0 && n < sizeof(whole) / sizeof(whole[0]));
    for (size_t i = 0; i < n; i++, at += one.length) {
        OK(qcow2_map(image, at, size - at, 0, &one, 1, &got));
        CHECK(got == 1 && memcmp(&one, &whole[i], sizeof(one)) == 0);
    }
    CHECK(at == size);
    OK(qcow2_map(image, whole[0].length / 2, 512, 0, &one, 1, &got));
    CHECK(got == 1 && one.start == whole[0].length / 2 && one.length == 512);
    OK(qcow2_close(image));
    print_extents("ours", n);
    CHECK(shell("qemu-img map -f qcow2 --output=json %s | sed -E '/start/!d; s/.*\"start\": ([0-9]+), \"length\": ([0-9]+), "
                "\"depth\": ([0-9]+), \"present\": ([a-z]+), \"zero\": ([a-z]+), \"data\": ([a-z]+), "
                "\"compressed\": ([a-z]+)(, \"offset\": ([0-9]+))?.*/\\1 \\2 \\3 \\4 \\5 \\6 \\7 \\9/; s/ $//' >theirs", path));
    if (!shell("test -s theirs && diff -u theirs ours >&2"))
        FAIL("%s: our map is not that of qemu-img", path);
}

static void populate(const char *path, bool subclusters)
{
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 1 0 192k' -c 'write -P 2 500k 70k' -c 'write -z 256k 128k' -c 'write -z -u 128k 64k' "
                "-c 'write -c -P 3 1M 128k' -c 'write -P 4 3M 1k' -c 'write -P 5 2050k 64k' -c 'discard 1536k 64k' %s >/dev/null", path));
    if (subclusters)
        CHECK(shell("qemu-io -f qcow2 -c 'write -P 6 2562k 2k' -c 'write -z 2564k 6k' -c 'write -P 7 2570k 100' -c 'write -z 2k 4k' "
                    "-c 'write -z 3074k 30k' %s >/dev/null", path));
}

int main(void)
{
    need_qemu();
    create_image("plain.qcow2", DISK, NULL);
    compare("plain.qcow2");
    populate("plain.qcow2", false);
    compare("plain.qcow2");
    create_image("sub.qcow2", DISK, (const char *[]){"extended_l2=on", NULL});
    populate("sub.qcow2", true);
    compare("sub.qcow2");
    create_image("small.qcow2", DISK - 512, (const char *[]){"cluster_size=4k", NULL});
    populate("small.qcow2", false);
    compare("small.qcow2");

    /* Chains: a shorter backing file, and subclusters over it. */
    create_image("short.qcow2", 2 << 20, (const char *[]){"extended_l2=on", NULL});
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 1 600k 300k' -c 'write -z 1000k 20k' -c 'write -P 1 1900k 100k' short.qcow2 >/dev/null"));
    compare("short.qcow2");
    create_image("top.qcow2", DISK, (const char *[]){"extended_l2=on", "backing_file=short.qcow2", "backing_fmt=qcow2", NULL});
    compare("top.qcow2");
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 9 700k 3k' -c 'write -z 1910k 300k' -c 'write -P 9 3M 10k' top.qcow2 >/dev/null"));
    compare("top.qcow2");
    create_image("third.qcow2", 3 << 20, (const char *[]){"backing_file=top.qcow2", "backing_fmt=qcow2", NULL});
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 8 640k 64k' third.qcow2 >/dev/null"));
    compare("third.qcow2");
    fill_file("base.raw", 0xff, 1 << 20);
    create_image("raw.qcow2", 2 << 20, (const char *[]){"backing_file=base.raw", "backing_fmt=raw", NULL});
    compare("raw.qcow2");
    CHECK(shell("qemu-io -f qcow2 -c 'write -P 8 64k 64k' -c 'write -z 256k 64k' raw.qcow2 >/dev/null"));
    compare("raw.qcow2");
    return 0;
}
