/* Equal shares of blocks; the remainder is spread by rounding, not piled on one rank. */
#include "partition.h"

struct dsc_range dsc_partition_range(size_t n_elems, int rank, int size) {
    size_t n_blocks = n_elems / DSC_BLOCK;
    size_t share = n_blocks / (size_t)size, rest = n_blocks % (size_t)size;
    size_t r = (size_t)rank;
    /* floor(n_blocks * r / size) without the product, which could overflow on its own */
    size_t first = share * r + rest * r / (size_t)size;
    size_t last = share * (r + 1) + rest * (r + 1) / (size_t)size;
    return (struct dsc_range){first * DSC_BLOCK, last * DSC_BLOCK};
}
