/* An image in the caller's memory: created, written and read through callbacks, with and without vectors, with
 * transfers that are cut short; what is in memory is a good image. Destroyed once, when the last user is gone. */
#include "memory_storage.h"

static void round_trip(bool vectors, size_t step)
{
    struct memory m;
    qcow2_image *image;
    uint8_t head[3000], tail[3000];
    struct iovec iov[2] = {{head, sizeof(head)}, {tail, sizeof(tail)}};
    qcow2_storage *storage = memory_storage(&m, vectors);
    m.step = step;
    OK(qcow2_create_storage(storage, 1 << 20, NULL, 0));
    OK(qcow2_open_storage(storage, NULL, &image));
    qcow2_storage_free(storage);
    CHECK(m.destroyed == 0);
    memset(head, 0x71, sizeof(head));
    memset(tail, 0x72, sizeof(tail));
    OK(qcow2_pwritev(image, iov, 2, 64000, 0));
    int flushes = m.flushes;
    OK(qcow2_flush(image));
    CHECK(m.flushes > flushes);
    memset(head, 0, sizeof(head));
    memset(tail, 0, sizeof(tail));
    OK(qcow2_preadv(image, iov, 2, 64000, 0));
    for (size_t i = 0; i < sizeof(head); i++)
        CHECK(head[i] == 0x71 && tail[i] == 0x72);
    expect_pattern(image, 0, 0, 64000);
    CHECK((m.vectors > 0) == vectors);
    OK(qcow2_close(image));
    CHECK(m.destroyed == 1);
    write_file("disk.qcow2", m.bytes, m.size);
    check_image("disk.qcow2");
    free(m.bytes);
}

int main(void)
{
    round_trip(true, 0);
    round_trip(false, 0);
    round_trip(true, 700);
    round_trip(false, 700);
    return 0;
}
