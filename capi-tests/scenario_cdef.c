/* Scenarios C, D, E and F: zeroes into unallocated, allocated and compressed clusters, and at the end of an image whose
 * size is no multiple of anything; with and without backing. */
#include "scenario_table.h"

int main(void)
{
    run_table("CDEF.tsv", true, 2083 * 1024, 24);
    run_table("CDEF.tsv", false, 2083 * 1024, 24);
    return 0;
}
