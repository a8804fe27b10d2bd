// The header alone is C++11, and C++ links with it.
#include <qcow2.h>

int main()
{
    return qcow2_has_feature("zlib") == 1 && qcow2_has_feature("flux-capacitor") == 0 && qcow2_has_feature(nullptr) == 0 ? 0 : 1;
}
