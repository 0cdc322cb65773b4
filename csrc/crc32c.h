/* CRC32C (Castagnoli), the checksum of everything in a checkpoint.
 *
 * Decides: nothing but the name; the kernel table has the loop of each tier. Invariant: the usual
 * convention (iSCSI's, RFC 3720): all ones at the start, complemented at the end, so that the
 * checksum of "123456789" is 0xE3069283 and that of nothing is 0. */
#ifndef DSC_CRC32C_H
#define DSC_CRC32C_H

#include "dsc.h"

/* Goes on from the checksum of what came before, 0 at the start: crc32c(crc32c(0, a), b) is that of
 * a and b one behind the other. */
uint32_t dsc_crc32c(uint32_t before, const void *data, size_t n_bytes);
/* Of a and b one behind the other, from those of each. */
uint32_t dsc_crc32c_join(uint32_t a, uint32_t b, size_t n_bytes_of_b);
/* Copies, and gives the checksum of what was copied: memory is read once, and `dst`, for which
 * stores go around the caches, not at all. */
uint32_t dsc_crc32c_copy(void *dst, const void *src, size_t n_bytes);

#endif
