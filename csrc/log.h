/* Where the core's few log lines go: a sink that the binding sets to Python's logging.
 *
 * Invariant: the core never prints (contract F4); with no sink, lines are dropped. */
#ifndef DSC_LOG_H
#define DSC_LOG_H

#include "dsc.h"

enum dsc_log_level { DSC_LOG_DEBUG = 10, DSC_LOG_INFO = 20, DSC_LOG_WARNING = 30 };

/* `text` is valid for the call. The sink may be called from any thread, never with a lock held. */
typedef void (*dsc_log_sink)(enum dsc_log_level level, const char *text);

/* From here on lines go to `sink`; NULL drops them. */
void dsc_log_set_sink(dsc_log_sink sink);
/* One line, without a newline; cut at 2,047 bytes. */
void dsc_log(enum dsc_log_level level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#endif
