/* error.c: status names and messages. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

mq_status mq_fail(mq_error *error, mq_status status, const char *format, ...)
{
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        (void)vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

const char *mq_status_name(mq_status status)
{
    switch (status) {
    case MQ_OK: return "MQ_OK";
    case MQ_ERR_IO: return "MQ_ERR_IO";
    case MQ_ERR_NOT_GGUF: return "MQ_ERR_NOT_GGUF";
    case MQ_ERR_TRUNCATED: return "MQ_ERR_TRUNCATED";
    case MQ_ERR_FORMAT: return "MQ_ERR_FORMAT";
    case MQ_ERR_UNSUPPORTED: return "MQ_ERR_UNSUPPORTED";
    case MQ_ERR_MEMORY: return "MQ_ERR_MEMORY";
    case MQ_ERR_ARGUMENT: return "MQ_ERR_ARGUMENT";
    case MQ_ERR_CONTEXT_FULL: return "MQ_ERR_CONTEXT_FULL";
    case MQ_ERR_THREAD: return "MQ_ERR_THREAD";
    case MQ_ERR_BUSY: return "MQ_ERR_BUSY";
    case MQ_ERR_DEVICE: return "MQ_ERR_DEVICE";
    case MQ_ERR_FORGOTTEN: return "MQ_ERR_FORGOTTEN";
    }
    return "unknown status";
}
