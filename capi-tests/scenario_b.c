/* Scenarios B: overwriting several clusters in one request, some of which need no change of metadata. */
#include "scenario_table.h"

int main(void)
{
    run_table("B.tsv", false, 1 << 20, 6);
    return 0;
}
