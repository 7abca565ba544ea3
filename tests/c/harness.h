/* harness.h: what the C programs of the tests share: files in memory of exactly their size, so that a read past the end is seen,
 * and a check that ends the program. */
#ifndef MQ_TEST_HARNESS_H
#define MQ_TEST_HARNESS_H

#include "model.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition)                                                                       \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            (void)fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            abort();                                                                             \
        }                                                                                        \
    } while (0)

/* The bytes of a file, to be freed; the program ends when it cannot be read. */
uint8_t *read_file(const char *path, size_t *size);

/* Open a copy of `data`, which the model owns. An error must have a message and the status that is returned. */
mq_status open_bytes(const uint8_t *data, size_t size, const mq_model_options *options, mq_model **model);

/* Three tokens through a session of its own, in two batches, routed, at one depth and static where the file can. */
void evaluate_briefly(const mq_model *model);

#endif
