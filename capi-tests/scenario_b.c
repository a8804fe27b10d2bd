/* Scenarios B: overwriting several clusters in one request, some of which need no change of metadata. */
#include "scenario_table.h"

int main(void)
{
    need_qemu();
    CHECK(run_table("B.tsv", false) == 6);
    return 0;
}
