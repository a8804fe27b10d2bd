/* Scenarios A: writes, zeroes, discards and compressed writes on one subclustered image, with and without backing. */
#include "scenario_table.h"

int main(void)
{
    run_table("A.tsv", true, 1 << 20, 18);
    run_table("A.tsv", false, 1 << 20, 18);
    return 0;
}
