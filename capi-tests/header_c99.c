/* The header alone is C99, pedantically, and its version calls agree with each other. */
#include <qcow2.h>

int main(void)
{
    uint32_t number = qcow2_version_number();
    int major = 0, minor = 0, patch = 0, field = 0;
    const char *at = qcow2_version_string();
    for (; *at != 0; at++) {
        int *part = field == 0 ? &major : field == 1 ? &minor : &patch;
        if (*at == '.')
            field++;
        else
            *part = *part * 10 + (*at - '0');
    }
    return number == ((uint32_t)major << 16 | (uint32_t)minor << 8 | (uint32_t)patch) && field == 2 ? 0 : 1;
}
