/* What a fuzzing harness has and what the driver of this folder asks it. */
#ifndef DSC_FUZZ_H
#define DSC_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* One input, as libFuzzer has it; returns 0, and aborts where something is wrong. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Input number i to start from, and its size; 0: there are no more. */
size_t fuzz_seed(size_t i, uint8_t *to, size_t room);
/* Makes lengths and checksums of an input right that mutations have made wrong, so that it is not
 * refused for these alone; gives its new size, at most room. */
size_t fuzz_repair(uint8_t *data, size_t size, size_t room);
/* Words of the input's language; NULL behind the last. */
extern const char *const fuzz_words[];

#endif
