/* JSON as the core takes it: strict grammar (RFC 8259) first, then cJSON's tree.
 *
 * Decides: nothing about content. Invariant: what passes here, cJSON and Python's json read alike;
 * cJSON by itself takes numbers like 01, ends a text at a byte 0 and reports errors a few bytes
 * off. */
#ifndef DSC_JSON_H
#define DSC_JSON_H

#include "dsc.h"

#include <cJSON.h>

/* NULL for JSON text; else where it stops being that, and in *expected what should stand there. At
 * most 64 objects and arrays stand inside each other. */
const char *dsc_json_syntax(const char *text, const char **expected);
/* A file's text, which is one object; text[n_bytes] is 0. The tree goes with cJSON_Delete. what:
 * for texts. DSC_EDAMAGED names the byte. */
enum dsc_status dsc_json_parse(const char *text, size_t n_bytes, const char *what, cJSON **out);
/* A whole number from 0 to 2^53; false for anything else, NULL included. */
bool dsc_json_count(const cJSON *item, uint64_t *out);
/* Writes a text as it stands between the quotes of a JSON string, without a terminator, and gives
 * the bytes of it: at most six for each of the text. out NULL: only counts. */
size_t dsc_json_quote(char *out, const char *text);

#endif
