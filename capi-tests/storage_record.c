/* A recorded storage: the log is what a stranger expects, and replaying all of it gives the file. */
#include "test.h"

static uint64_t field(const uint8_t *bytes, unsigned index)
{
    uint64_t value = 0;
    for (unsigned i = 8; i-- > 0;)
        value = value << 8 | bytes[index * 8 + i];
    return value;
}

static uint8_t *load(const char *path, size_t *length)
{
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && fseek(file, 0, SEEK_END) == 0);
    *length = (size_t)ftell(file);
    rewind(file);
    uint8_t *bytes = calloc(1, *length + (8 << 20));
    CHECK(bytes != NULL && fread(bytes, 1, *length, file) == *length && fclose(file) == 0);
    return bytes;
}

int main(void)
{
    const char *settings[] = {"extended_l2=on", "cluster_size=64k", NULL};
    create_image("disk.qcow2", 1 << 20, settings);
    size_t length, log_length, end_length;
    uint8_t *replayed = load("disk.qcow2", &length);

    qcow2_storage *file, *recorded;
    OK(qcow2_storage_open("disk.qcow2", 0, &file));
    FAILS(qcow2_storage_record(file, "no/such/folder/log", 0, &recorded), ENOENT, QCOW2_ERR_IO, "no/such/folder/log");
    CHECK(recorded == NULL);
    FAILS(qcow2_storage_record(NULL, "log", 0, &recorded), EINVAL, QCOW2_ERR_ARGUMENT, "inner");
    FAILS(qcow2_storage_record(file, "log", 1, &recorded), EINVAL, QCOW2_ERR_ARGUMENT, "flags");
    OK(qcow2_storage_record(file, "log", 0, &recorded));
    qcow2_storage_free(file);
    qcow2_image *image;
    OK(qcow2_open_storage(recorded, NULL, &image));
    qcow2_storage_free(recorded);
    uint8_t bytes[5000];
    memset(bytes, 0xab, sizeof(bytes));
    OK(qcow2_pwrite(image, bytes, sizeof(bytes), 3000, 0));
    OK(qcow2_flush(image));
    OK(qcow2_pwrite(image, bytes, 7, 300001, 0));
    OK(qcow2_write_zeroes(image, 0, 65536, QCOW2_MAY_UNMAP));
    OK(qcow2_close(image));

    uint8_t *log = load("log", &log_length), *end = load("disk.qcow2", &end_length);
    CHECK(field(log, 0) == 0x6a736677736872 && field(log, 1) == 1 && field(log, 3) == 512);
    size_t at = 512;
    unsigned flushes = 0;
    for (uint64_t i = 0; i < field(log, 2); i++) {
        uint64_t sector = field(log + at, 0), sectors = field(log + at, 1), flags = field(log + at, 2);
        at += 512;
        CHECK((sector + sectors) * 512 <= length + (8 << 20));
        if (flags == 0) {
            memcpy(replayed + sector * 512, log + at, sectors * 512);
            at += sectors * 512;
        } else if (flags == 4) {
            memset(replayed + sector * 512, 0, sectors * 512);
        } else {
            CHECK(flags == 1 && sectors == 0);
            flushes++;
        }
    }
    CHECK(at == log_length && flushes >= 4);
    CHECK(memcmp(replayed, end, end_length) == 0);
    free(replayed), free(log), free(end);
    check_image("disk.qcow2");
    return 0;
}
