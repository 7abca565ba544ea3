/* error.c: status names and messages. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { LONGEST = 8192 }; /* a path of 4,096 bytes and everything else */

/* Text from a file may hold control characters, which a terminal would obey: C0, delete, and C1 in UTF-8. */
static void make_printable(char *text)
{
    unsigned char before = 0;
    for (; *text != '\0'; text++) {
        const unsigned char byte = (unsigned char)*text;
        if (byte < ' ' || byte == 0x7f || (before == 0xc2 && byte >= 0x80 && byte < 0xa0)) {
            *text = '?';
        }
        before = byte;
    }
}

/* Of a message that is too long the end is kept: a long path comes first, what matters last. */
static void keep_end(mq_error *error, const char *text)
{
    static const char dots[] = "...";
    const size_t size = strlen(text), most = sizeof error->message - 1;
    if (size > most) {
        memcpy(error->message, dots, sizeof dots - 1);
        text += size - (most - (sizeof dots - 1));
        memcpy(error->message + sizeof dots - 1, text, most - (sizeof dots - 1) + 1);
    } else {
        memcpy(error->message, text, size + 1);
    }
}

void mq_set_error(mq_error *error, mq_status status, const char *format, ...)
{
    if (error != NULL) {
        char text[LONGEST];
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        (void)vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        make_printable(text);
        keep_end(error, text);
    }
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
    case MQ_ERR_CORRUPT: return "MQ_ERR_CORRUPT";
    }
    return "unknown status";
}
