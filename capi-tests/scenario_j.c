/* Scenarios J: L2 entries that are wrong, met by a read and by a write. What the spec does not forbid goes through;
 * the rest fails, names the place, marks the image corrupt, and ends all writing. */
#include "test.h"

#define DISK (1 << 20)
#define CLUSTER 65536

struct scenario {
    const char *name;
    bool compressed;                 /* prepared by qemu-io: compressed data in c0 */
    uint64_t write_at, write_length; /* prepared by us otherwise */
    uint64_t patch_cluster;
    int patch_word;                  /* 0: the descriptor, 1: the bitmap */
    uint64_t patch_bits;
    uint64_t probe_length;
    bool fails;
    int reads_as;                    /* what the probed bytes read as, where the read works */
    uint64_t kind_after, bitmap_after; /* of c0 after a write that works */
};

static const struct scenario scenarios[] = {
    {"J1", false, 0, 2048, 0, 0, 1, 1024, false, 0x11, COPIED, 1},
    {"J2", false, 32768, 131072, 1, 1, UINT64_C(1) << 32, 196608, true, 0, 0, 0},
    {"J3", false, 262144, 1024, 0, 0, 1, 1024, false, 0, COPIED, 1},
    {"J4", false, 262144, 1024, 0, 1, 1, 1024, true, 0, 0, 0},
    {"J5", false, 262144, 1024, 1, 1, UINT64_C(0x100000001), 196608, true, 0, 0, 0},
    {"J6", true, 0, 0, 0, 1, UINT64_C(0x180000000), 65536, false, 0x11, COPIED, 0xffffffff},
};

static void prepare(const struct scenario *s)
{
    const char *settings[] = {"extended_l2=on", NULL};
    unlink("disk.qcow2");
    create_image("disk.qcow2", DISK, settings);
    if (s->compressed) {
        CHECK(shell("qemu-io -f qcow2 -c 'write -c -P 0x11 0 64k' disk.qcow2 >/dev/null"));
    } else {
        qcow2_image *image = open_image("disk.qcow2");
        write_pattern(image, 0x11, s->write_at, s->write_length);
        OK(qcow2_close(image));
    }
    uint64_t at = l2_entry_at("disk.qcow2", s->patch_cluster) + 8 * (uint64_t)s->patch_word;
    poke("disk.qcow2", at, 8, peek("disk.qcow2", at, 8) | s->patch_bits);
}

static bool marked_corrupt(void)
{
    return (peek("disk.qcow2", 72, 8) & 2) != 0;
}

static void fails(const struct scenario *s, bool write)
{
    static uint8_t bytes[DISK];
    char place[64];
    qcow2_image *image = open_image("disk.qcow2"), *again;
    snprintf(place, sizeof(place), "0x%" PRIx64, l2_entry_at("disk.qcow2", s->patch_cluster) & ~UINT64_C(15));
    if (write)
        FAILS(qcow2_pwrite(image, bytes, s->probe_length, 0, 0), EIO, QCOW2_ERR_CORRUPT, "corrupt");
    else
        FAILS(qcow2_pread(image, bytes, s->probe_length, 0, 0), EIO, QCOW2_ERR_CORRUPT, "corrupt");
    /* The text names the entry: the offset of one of its two words. */
    place[strlen(place) - 1] = 0;
    if (strstr(qcow2_last_error(), place) == NULL)
        FAIL("%s: '%s' does not name the entry at %s0", s->name, qcow2_last_error(), place);
    FAILS(qcow2_pwrite(image, bytes, 512, 512 * 1024, 0), EIO, QCOW2_ERR_CORRUPT, "corrupt");
    qcow2_close(image);
    CHECK(marked_corrupt());
    FAILS(qcow2_open("disk.qcow2", NULL, &again), EIO, QCOW2_ERR_CORRUPT, "marked corrupt");
    CHECK(again == NULL);
}

static void works(const struct scenario *s, bool write)
{
    uint64_t at = l2_entry_at("disk.qcow2", 0), before = peek("disk.qcow2", at, 8), bitmap = peek("disk.qcow2", at + 8, 8);
    qcow2_image *image = open_image("disk.qcow2");
    if (write)
        write_pattern(image, 0x77, 0, s->probe_length);
    expect_pattern(image, write ? 0x77 : s->reads_as, 0, s->probe_length);
    OK(qcow2_close(image));
    CHECK(!marked_corrupt());
    if (write)
        expect_entry(s->name, "disk.qcow2", 0, s->kind_after, s->bitmap_after);
    else
        CHECK(peek("disk.qcow2", at, 8) == before && peek("disk.qcow2", at + 8, 8) == bitmap);
}

int main(void)
{
    need_qemu();
    for (size_t i = 0; i < sizeof(scenarios) / sizeof(scenarios[0]); i++)
        for (int write = 0; write < 2; write++) {
            prepare(&scenarios[i]);
            (scenarios[i].fails ? fails : works)(&scenarios[i], write);
        }
    return 0;
}
