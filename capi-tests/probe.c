/* Probing a buffer: qcow2 of both versions, anything else is raw, and few bytes are no crash. */
#include "test.h"

int main(void)
{
    uint8_t head[512];
    qcow2_image *image;
    OK(qcow2_create("disk.qcow2", 1 << 20, NULL, 0));
    FILE *file = fopen("disk.qcow2", "rb");
    CHECK(file != NULL && fread(head, 1, sizeof(head), file) == sizeof(head));
    fclose(file);
    CHECK(qcow2_probe(head, sizeof(head)) == QCOW2_PROBE_QCOW2);
    head[7] = 2;
    CHECK(qcow2_probe(head, 8) == QCOW2_PROBE_QCOW2);
    for (size_t length = 0; length < 8; length++)
        CHECK(qcow2_probe(head, length) == QCOW2_PROBE_RAW);
    head[7] = 1;
    CHECK(qcow2_probe(head, sizeof(head)) == QCOW2_PROBE_RAW);
    head[0] = 'X';
    CHECK(qcow2_probe(head, sizeof(head)) == QCOW2_PROBE_RAW);
    /* Opening never probes: a raw file is an error, not a raw disk. */
    fill_file("raw", 0, 1 << 20);
    FAILS(qcow2_open("raw", NULL, &image), EINVAL, QCOW2_ERR_NOT_QCOW2, "not a qcow2 image");
    return 0;
}
