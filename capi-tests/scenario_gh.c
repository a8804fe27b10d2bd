/* Scenarios G and H: zeroes that may give clusters up, into allocated and compressed ones; with and without backing. */
#include "scenario_table.h"

int main(void)
{
    run_table("GH.tsv", true, 2083 * 1024, 19);
    run_table("GH.tsv", false, 2083 * 1024, 19);
    return 0;
}
