/* Vectors: many small buffers, empty ones among them, across clusters, more than IOV_MAX; read back both ways. */
#include <sys/uio.h>

#include "test.h"

#define COUNT 3000

int main(void)
{
    static struct iovec iov[COUNT];
    static uint8_t memory[COUNT * 200], back[COUNT * 200];
    const char *settings[] = {"extended_l2=on", "cluster_size=16k", NULL};
    size_t total = 0;
    for (size_t i = 0; i < COUNT; i++) {
        iov[i].iov_base = memory + total;
        iov[i].iov_len = i % 7 == 3 ? 0 : 1 + i * 37 % 199;
        total += iov[i].iov_len;
    }
    for (size_t i = 0; i < total; i++)
        memory[i] = (uint8_t)(i * 31 >> 3);

    create_image("disk.qcow2", 1 << 20, settings);
    qcow2_image *image = open_image("disk.qcow2");
    OK(qcow2_pwritev(image, iov, COUNT, 777, QCOW2_FUA));
    OK(qcow2_pread(image, back, total, 777, 0));
    CHECK(memcmp(memory, back, total) == 0);
    expect_pattern(image, 0, 0, 777);
    expect_pattern(image, 0, 777 + total, 3000);
    /* In place now, and the other way round. */
    memset(memory, 0, sizeof(memory));
    OK(qcow2_preadv(image, iov, COUNT, 777, 0));
    CHECK(memcmp(memory, back, total) == 0);
    OK(qcow2_pwritev(image, iov, COUNT, 777, 0));
    OK(qcow2_preadv(image, iov + 5, 1, 777 + 12345, 0));
    CHECK(memcmp(iov[5].iov_base, back + 12345, iov[5].iov_len) == 0);
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    return 0;
}
