/* mapping.c: open, map or read, close. Mapped pages are touched only when a slice is read. */
#include "mapping.h"

#include "error.h"
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static mq_status read_all(const char *path, int file, size_t size, const uint8_t **data, mq_error *error)
{
    uint8_t *memory = mq_alloc(size, 1);
    if (memory == NULL) {
        return mq_fail(error, MQ_ERR_MEMORY, "%s: cannot allocate %zu bytes to read the file", path, size);
    }
    size_t done = 0;
    while (done < size) {
        const ssize_t got = read(file, memory + done, size - done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            const char *why = got < 0 ? strerror(errno) : "the file became shorter";
            free(memory);
            return mq_fail(error, MQ_ERR_IO, "%s: read stopped at byte %zu of %zu: %s", path, done, size, why);
        }
        done += (size_t)got;
    }
    *data = memory;
    return MQ_OK;
}

mq_status mq_mapping_open(const char *path, int32_t no_mmap, mq_mapping *mapping, mq_error *error)
{
    *mapping = (mq_mapping){0};
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) {
        return mq_fail(error, MQ_ERR_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    mq_status status = MQ_OK;
    struct stat facts;
    if (fstat(file, &facts) != 0) {
        status = mq_fail(error, MQ_ERR_IO, "%s: cannot read its size: %s", path, strerror(errno));
    } else if (!S_ISREG(facts.st_mode)) {
        status = mq_fail(error, MQ_ERR_IO, "%s: expected a regular file", path);
    } else if (facts.st_size <= 0) {
        status = mq_fail(error, MQ_ERR_NOT_GGUF, "%s: expected a GGUF file, found an empty one", path);
    } else if ((uintmax_t)facts.st_size > SIZE_MAX / 2) {
        status = mq_fail(error, MQ_ERR_UNSUPPORTED, "%s: file too large for this machine", path);
    } else {
        const size_t size = (size_t)facts.st_size;
        if (no_mmap) {
            status = read_all(path, file, size, &mapping->data, error);
        } else {
            void *memory = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
            if (memory == MAP_FAILED) {
                status = mq_fail(error, MQ_ERR_IO, "%s: cannot map %zu bytes: %s", path, size, strerror(errno));
            } else {
                mapping->data = memory;
                mapping->mapped = 1;
            }
        }
        mapping->size = status == MQ_OK ? size : 0;
    }
    (void)close(file);
    return status;
}

void mq_mapping_close(mq_mapping *mapping)
{
    if (mapping->data != NULL) {
        void *memory = (void *)(uintptr_t)mapping->data;
        if (mapping->mapped) {
            (void)munmap(memory, mapping->size);
        } else {
            free(memory);
        }
    }
    *mapping = (mq_mapping){0};
}
