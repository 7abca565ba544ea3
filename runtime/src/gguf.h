/* gguf.h: the GGUF container: a bounds-checked index of keys and tensors over the bytes of a file.
 * Of their meaning it knows the architecture and the alignment alone; the rest is hparams.c and model.c. */
#ifndef MQ_GGUF_H
#define MQ_GGUF_H

#include "file_limits.h"
#include "mobiquant.h"

/* Value types and tensor types, numbers from the GGUF specification. */
enum { GGUF_U32 = 4, GGUF_F32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };
enum { GGML_F32 = 0, GGML_F16 = 1, GGML_I8 = 24 };

typedef struct gguf_name {
    const char *text; /* in the file, not 0-terminated */
    size_t size;
} gguf_name;

typedef struct gguf_key {
    gguf_name name;   /* first, for sorting */
    uint32_t type;    /* of the value, or of an array's elements */
    int32_t is_array;
    uint64_t count;   /* 1, or the elements of the array; bytes of a string */
    const uint8_t *value; /* unaligned */
} gguf_key;

typedef struct gguf_tensor {
    gguf_name name;    /* first, for sorting */
    uint32_t type;
    uint32_t index;    /* place in the file: 0 for the first */
    uint64_t shape[MQ_MAX_DIMENSIONS]; /* numpy order, leading 1s */
    size_t offset, size; /* bytes, from the start of the file */
    int32_t present;   /* 0: the file ends before this tensor does */
} gguf_tensor;

typedef struct gguf_file {
    const char *path;      /* for messages; owned by the caller */
    const uint8_t *data;
    size_t size;           /* bytes present */
    size_t expected_size;  /* bytes of the complete file */
    size_t data_start;     /* where the first tensor lies: header and metadata before */
    gguf_key *keys;        /* sorted by name */
    size_t key_count;
    gguf_tensor *tensors;  /* sorted by name */
    size_t tensor_count;
} gguf_file;

/* Index `data`. Tensors may reach past the end only with allow_partial. */
mq_status gguf_open(const char *path, const uint8_t *data, size_t size, int32_t allow_partial, gguf_file *file,
                    mq_error *error);
void gguf_close(gguf_file *file);

const gguf_key *gguf_find_key(const gguf_file *file, const char *name);
const gguf_tensor *gguf_find_tensor(const gguf_file *file, const char *name);

/* Typed reads of a required scalar key; MQ_ERR_FORMAT when absent or of another type. */
mq_status gguf_u32(const gguf_file *file, const char *name, uint32_t *value, mq_error *error);
mq_status gguf_f32(const gguf_file *file, const char *name, float *value, mq_error *error);
/* A required string must equal `expected`, else `status`. */
mq_status gguf_expect_string(const gguf_file *file, const char *name, const char *expected, mq_status status,
                             mq_error *error);
/* A required string must be one of `choices`; *index is its place. MQ_ERR_UNSUPPORTED lists them. */
mq_status gguf_choice(const gguf_file *file, const char *name, const char *const *choices, size_t count, uint32_t *index,
                      mq_error *error);

#endif
