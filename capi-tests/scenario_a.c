/* Scenarios A: writes, zeroes, discards and compressed writes on one subclustered image, with and without backing. */
#include "scenario_table.h"

int main(void)
{
    need_qemu();
    CHECK(run_table("A.tsv", true) == 18);
    CHECK(run_table("A.tsv", false) == 18);
    return 0;
}
