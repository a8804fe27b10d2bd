/* Not a test: the library is made to read memory that has been freed, which the sanitizer must find. Under
 * SANITIZE=address, capi-tests/run sees to it that this program is caught; otherwise all others would prove nothing. */
#include <stdlib.h>
#include <qcow2.h>

int main(void)
{
    struct iovec piece = {.iov_base = malloc(65536), .iov_len = 65536};
    qcow2_image *image;
    if (qcow2_create("disk", 1 << 20, NULL, 0) != 0 || qcow2_open("disk", NULL, &image) != 0)
        return 2;
    free(piece.iov_base);
    return qcow2_pwritev(image, &piece, 1, 0, QCOW2_COMPRESSED) < 0 ? 3 : 4;
}
