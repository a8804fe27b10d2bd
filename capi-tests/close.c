/* Close: NULL, at once, after writes (durable for another reader), after an error, and many handles after another. */
#include "test.h"

int main(void)
{
    qcow2_image *image;
    uint8_t byte = 0;
    OK(qcow2_close(NULL));
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    OK(qcow2_open("disk.qcow2", NULL, &image));
    OK(qcow2_close(image));

    OK(qcow2_open("disk.qcow2", NULL, &image));
    write_pattern(image, 0x5a, 70000, 1000);
    FAILS(qcow2_pread(image, &byte, 1, 1 << 20, 0), EINVAL, QCOW2_ERR_OUT_OF_RANGE, "past the end");
    OK(qcow2_close(image));
    check_image("disk.qcow2");
    if (have_qemu())
        CHECK(shell("qemu-io -f qcow2 -r -c 'read -P 0x5a 70000 1000' disk.qcow2 >/dev/null"));

    for (int round = 0; round < 50; round++) {
        OK(qcow2_open("disk.qcow2", NULL, &image));
        expect_pattern(image, 0x5a, 70000, 1000);
        OK(qcow2_close(image));
    }
    return 0;
}
