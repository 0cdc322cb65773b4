/* The whole C test framework: a program holds named cases; with no argument it lists them, with one
 * it runs that case. tests/test_c.py runs each case in a process of its own with a time limit. */
#ifndef DSC_TEST_CASE_H
#define DSC_TEST_CASE_H

#include "dsc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct test_case {
    const char *name;
    void (*run)(void);
};

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: CHECK(%s) failed; last error: %s (%s)\n", __FILE__, __LINE__,  \
                    #cond, dsc_last_error(), dsc_last_error_place());                              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_OK(expr) CHECK((expr) == DSC_OK)
#define CHECK_EQ_INT(a, b)                                                                         \
    do {                                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                                        \
        if (a_ != b_) {                                                                            \
            fprintf(stderr, "%s:%d: %s is %lld, %s is %lld\n", __FILE__, __LINE__, #a, a_, #b,     \
                    b_);                                                                           \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define CASE(f)                                                                                    \
    { #f, f }
#define RUN_CASES(cases)                                                                           \
    int main(int argc, char **argv) {                                                              \
        for (size_t i = 0; i < sizeof(cases) / sizeof *(cases); i++) {                             \
            if (argc < 2)                                                                          \
                puts((cases)[i].name);                                                             \
            else if (strcmp(argv[1], (cases)[i].name) == 0) {                                      \
                (cases)[i].run();                                                                  \
                return 0;                                                                          \
            }                                                                                      \
        }                                                                                          \
        return argc < 2 ? 0 : 2;                                                                   \
    }

#endif
