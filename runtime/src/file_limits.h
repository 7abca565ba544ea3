/* file_limits.h: the most that a file may claim, all in one place. The limits are far above real models; a hostile number fails
 * here, before anything is allocated or looped over (export/limits.py is the Python copy, tests/test_keys.py compares them). */
#ifndef MQ_FILE_LIMITS_H
#define MQ_FILE_LIMITS_H

/* The container. Every count and length is also compared with the bytes that remain. */
#define MQ_MAX_KEYS 4096
#define MQ_MAX_TENSORS 65536
#define MQ_MAX_KEY_NAME 256      /* bytes */
#define MQ_MAX_TENSOR_NAME 63    /* bytes; other readers keep a name in 64 with a closing 0 */
#define MQ_MAX_DIMENSIONS 4
#define MQ_MAX_STRING 268435456  /* bytes of a string value: tokenizers of large vocabularies have 35 MB */
#define MQ_MAX_ARRAY 16777216    /* elements of an array value */

/* Hyper-parameters. */
#define MQ_MAX_VOCAB_SIZE 1048576
#define MQ_MAX_CONTEXT_LENGTH 1048576
#define MQ_MAX_EMBEDDING_LENGTH 65536
#define MQ_MAX_BLOCK_COUNT 1024
#define MQ_MAX_FEED_FORWARD_LENGTH 262144
#define MQ_MAX_HEAD_COUNT 1024
#define MQ_MAX_HEAD_DIM 1024
#define MQ_MAX_ROUTER_HIDDEN 16
#define MQ_MAX_BUDGETS 256

#endif
