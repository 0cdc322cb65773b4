/* A scanner of the grammar, and one walk over a tree's numbers and texts. Invariant: as in the
 * header. */
#include "json.h"

#include <string.h>

enum { NESTING_LIMIT = 64 };

struct scan {
    const char *at;
    const char *expected; /* set by whoever stops */
};

static bool scan_value(struct scan *scan, int depth);

static bool stop(struct scan *scan, const char *expected) {
    scan->expected = expected;
    return false;
}

static void skip_space(struct scan *scan) {
    scan->at += strspn(scan->at, " \t\r\n");
}

static bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

static bool scan_digits(struct scan *scan) {
    if (!is_digit(*scan->at))
        return stop(scan, "a digit");
    scan->at += strspn(scan->at, "0123456789");
    return true;
}

static bool scan_number(struct scan *scan) {
    scan->at += *scan->at == '-';
    if (*scan->at == '0')
        scan->at++;
    else if (!scan_digits(scan))
        return false;
    if (*scan->at == '.') {
        scan->at++;
        if (!scan_digits(scan))
            return false;
    }
    if (*scan->at != 'e' && *scan->at != 'E')
        return true;
    scan->at++;
    scan->at += *scan->at == '+' || *scan->at == '-';
    return scan_digits(scan);
}

/* After "\u": four digits; *code is their value. */
static bool scan_hex(struct scan *scan, unsigned *code) {
    *code = 0;
    for (int i = 0; i < 4; i++) {
        static const char digits[] = "0123456789abcdefABCDEF";
        const char *digit = *scan->at ? strchr(digits, *scan->at) : NULL;
        if (!digit)
            return stop(scan, "four hexadecimal digits");
        unsigned value = (unsigned)(digit - digits);
        *code = *code * 16 + (value < 16 ? value : value - 6);
        scan->at++;
    }
    return true;
}

/* After a backslash. Halves of a surrogate pair must stand together, and \u0000 would end a C
 * string. */
static bool scan_escape(struct scan *scan) {
    unsigned code, low;
    if (*scan->at != 'u') {
        if (!*scan->at || !strchr("\"\\/bfnrt", *scan->at))
            return stop(scan, "an escape that JSON has");
        scan->at++;
        return true;
    }
    scan->at++;
    if (!scan_hex(scan, &code))
        return false;
    if (code == 0 || (code >= 0xDC00 && code <= 0xDFFF))
        return stop(scan, "a character before this");
    if (code < 0xD800 || code > 0xDBFF)
        return true;
    if (strncmp(scan->at, "\\u", 2) != 0)
        return stop(scan, "the second half of a surrogate pair");
    scan->at += 2;
    if (!scan_hex(scan, &low))
        return false;
    return (low >= 0xDC00 && low <= 0xDFFF) || stop(scan, "a surrogate pair before this");
}

static bool scan_string(struct scan *scan) {
    scan->at++;
    while (*scan->at != '"') {
        if ((unsigned char)*scan->at < 0x20)
            return stop(scan, *scan->at ? "no control character inside a string"
                                        : "a double quote that ends the string");
        if (*scan->at++ == '\\' && !scan_escape(scan))
            return false;
    }
    scan->at++;
    return true;
}

static bool scan_object(struct scan *scan, int depth) {
    scan->at++;
    skip_space(scan);
    if (*scan->at == '}') {
        scan->at++;
        return true;
    }
    for (;;) {
        skip_space(scan);
        if (*scan->at != '"')
            return stop(scan, "a key in double quotes");
        if (!scan_string(scan))
            return false;
        skip_space(scan);
        if (*scan->at != ':')
            return stop(scan, "':'");
        scan->at++;
        if (!scan_value(scan, depth))
            return false;
        skip_space(scan);
        if (*scan->at != ',' && *scan->at != '}')
            return stop(scan, "',' or '}'");
        if (*scan->at++ == '}')
            return true;
    }
}

static bool scan_array(struct scan *scan, int depth) {
    scan->at++;
    skip_space(scan);
    if (*scan->at == ']') {
        scan->at++;
        return true;
    }
    for (;;) {
        if (!scan_value(scan, depth))
            return false;
        skip_space(scan);
        if (*scan->at != ',' && *scan->at != ']')
            return stop(scan, "',' or ']'");
        if (*scan->at++ == ']')
            return true;
    }
}

static bool scan_word(struct scan *scan) {
    static const char *const words[] = {"true", "false", "null"};
    for (size_t i = 0; i < 3; i++)
        if (strncmp(scan->at, words[i], strlen(words[i])) == 0) {
            scan->at += strlen(words[i]);
            return true;
        }
    return stop(scan, "a value");
}

static bool scan_value(struct scan *scan, int depth) {
    skip_space(scan);
    if (depth == NESTING_LIMIT)
        return stop(scan, "less nesting");
    if (*scan->at == '{')
        return scan_object(scan, depth + 1);
    if (*scan->at == '[')
        return scan_array(scan, depth + 1);
    if (*scan->at == '"')
        return scan_string(scan);
    return *scan->at == '-' || is_digit(*scan->at) ? scan_number(scan) : scan_word(scan);
}

const char *dsc_json_syntax(const char *text, const char **expected) {
    struct scan scan = {text + (strncmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0), NULL};
    if (scan_value(&scan, 0)) {
        skip_space(&scan);
        if (!*scan.at)
            return NULL;
        scan.expected = "nothing more";
    }
    *expected = scan.expected;
    return scan.at;
}

enum dsc_status dsc_json_parse(const char *text, size_t n_bytes, const char *what, cJSON **out) {
    const char *expected = "'{'", *stop = text;
    if (*text == '{')
        stop = dsc_json_syntax(text, &expected);
    if (!stop && strlen(text) != n_bytes) {
        stop = text + strlen(text);
        expected = "no byte 0";
    }
    if (stop)
        return DSC_FAIL(DSC_EDAMAGED, "%s: byte %zu of the JSON text: expected %s", what,
                        (size_t)(stop - text), expected);
    cJSON *tree = cJSON_Parse(text);
    if (!tree)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: JSON that could not be taken in (a number of more than "
                        "60 digits, or no memory)",
                        what);
    *out = tree;
    return DSC_OK;
}

bool dsc_json_count(const cJSON *item, uint64_t *out) {
    const double limit = 9007199254740992.0; /* 2^53: each whole number up to here is a double */
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) || item->valuedouble > limit ||
        (double)(uint64_t)item->valuedouble != item->valuedouble)
        return false;
    *out = (uint64_t)item->valuedouble;
    return true;
}

size_t dsc_json_quote(char *out, const char *text) {
    static const char digits[] = "0123456789abcdef";
    size_t n = 0;
    char ignored[6];
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        char *to = out ? out + n : ignored;
        if (*c < 0x20) {
            memcpy(to, "\\u00", 4);
            to[4] = digits[*c >> 4];
            to[5] = digits[*c & 15];
            n += 6;
        } else {
            if (*c == '"' || *c == '\\') {
                *to++ = '\\';
                n++;
            }
            *to = (char)*c;
            n++;
        }
    }
    return n;
}
