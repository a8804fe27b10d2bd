/* The library loaded, used and closed again and again: nothing is left behind that would break the next round, and the
 * number of open files does not grow. */
#include <dirent.h>
#include <dlfcn.h>

#include "test.h"

static int open_files(void)
{
    int n = 0;
    DIR *folder = opendir("/proc/self/fd");
    CHECK(folder != NULL);
    while (readdir(folder) != NULL)
        n++;
    closedir(folder);
    return n;
}

#define FUNCTION(name) __typeof__(&name) my_##name = (__typeof__(&name))(uintptr_t)dlsym(library, #name)

int main(void)
{
    int files = open_files();
    for (int round = 0; round < 20; round++) {
        void *library = dlopen(getenv("LIBQCOW2_SO"), RTLD_NOW | RTLD_LOCAL);
        if (library == NULL)
            FAIL("%s", dlerror());
        FUNCTION(qcow2_create);
        FUNCTION(qcow2_open);
        FUNCTION(qcow2_pwrite);
        FUNCTION(qcow2_close);
        FUNCTION(qcow2_last_error);
        qcow2_image *image;
        CHECK(my_qcow2_create("disk.qcow2", 1 << 20, NULL, QCOW2_OVERWRITE) == 0);
        CHECK(my_qcow2_open("disk.qcow2", NULL, &image) == 0);
        CHECK(my_qcow2_pwrite(image, "x", 1, 0, 0) == 0);
        CHECK(my_qcow2_pwrite(image, "x", 1, UINT64_MAX, 0) == -EINVAL && my_qcow2_last_error()[0] != 0);
        CHECK(my_qcow2_close(image) == 0);
        CHECK(dlclose(library) == 0);
    }
    CHECK(open_files() == files);
    return 0;
}
