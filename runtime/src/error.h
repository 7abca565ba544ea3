/* error.h: filling in an mq_error. */
#ifndef MQ_ERROR_H
#define MQ_ERROR_H

#include "mobiquant.h"

#if defined(__GNUC__)
#define MQ_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define MQ_PRINTF(text, first)
#endif

/* Write the message when error is not NULL: its end, when it is too long; control characters as ?. */
void mq_set_error(mq_error *error, mq_status status, const char *format, ...) MQ_PRINTF(3, 4);

/* The same with the value `status`, so that a caller can write `return mq_fail(...)`. A macro, so that compilers and analysers
 * see in every file that a failure is never MQ_OK. */
#define mq_fail(error, status, ...) (mq_set_error((error), (status), __VA_ARGS__), (status))

#endif
