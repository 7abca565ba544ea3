/* mobiquant.h: the C API of the MoBiQuant runtime. Tokens in, logits out.
 *
 * A model is an opened file: immutable, shareable between threads. A session is a KV cache with a position and a thread
 * pool: one thread at a time may use it. The library never prints, exits or aborts, and holds no global state.
 * Every function that can fail returns an mq_status and, when `error` is not NULL, fills in a message that names the file,
 * tensor or key, what was expected and what was found. The text between the cffi marks is also read by _build.py.
 */
#ifndef MOBIQUANT_H
#define MOBIQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */
typedef enum mq_status {
    MQ_OK = 0,
    MQ_ERR_IO,           /* the file cannot be opened or read */
    MQ_ERR_NOT_GGUF,     /* no GGUF magic, or another GGUF version */
    MQ_ERR_TRUNCATED,    /* the file ends before its header says */
    MQ_ERR_FORMAT,       /* a key or tensor is missing, has a wrong type or shape, or contradicts another */
    MQ_ERR_UNSUPPORTED,  /* a valid file of an architecture, version or size this library does not run */
    MQ_ERR_MEMORY,       /* an allocation failed */
    MQ_ERR_ARGUMENT,     /* a bad argument: token id, budget, option */
    MQ_ERR_CONTEXT_FULL, /* the tokens do not fit in the context that is left */
    MQ_ERR_THREAD,       /* a thread could not be started */
    MQ_ERR_BUSY,         /* the session is in use by another thread */
    MQ_ERR_FORGOTTEN,    /* a rewind to where a sliding window has left the cache */
    MQ_ERR_DEVICE        /* a GPU was asked for and cannot be used, or failed */
} mq_status;

typedef struct mq_error {
    mq_status status;
    char message[512];
} mq_error;

typedef struct mq_model mq_model;
typedef struct mq_session mq_session;

typedef struct mq_model_options {
    int32_t allow_partial; /* 1: accept a file cut after its last base slice, at the depths that are complete */
    int32_t no_mmap;       /* 1: read the file into memory instead of mapping it */
    const char *device;    /* NULL or "cpu"; "cuda": sessions run on the GPU; "auto": there if it can be used, else on the CPU */
} mq_model_options;

typedef struct mq_model_info {
    uint32_t vocab_size, context_length, embedding_length, block_count, feed_forward_length;
    uint32_t head_count, head_count_kv, head_dim;
    uint32_t max_depth;      /* slices present in the file, 1..4; 4 unless opened with allow_partial */
    uint32_t embedding_depth, output_depth; /* the file's default depths */
    uint32_t router_hidden;
    uint32_t tensor_count;
    uint64_t file_bytes;     /* bytes present */
    uint64_t expected_bytes; /* bytes of the complete file */
    uint64_t slice_bytes[4]; /* planes of slice e of the routed linears */
    uint64_t scale_bytes;    /* scales and offsets of the routed linears */
    uint64_t router_bytes;   /* read for a routed token: hidden layers and heads */
    uint64_t embedding_bytes, output_bytes; /* at all 4 depths; output_bytes is 0 when tied */
    uint64_t routed_weights; /* weights of the routed linears, padding not counted */
} mq_model_info;

/* How keys and values are kept. */
typedef enum mq_cache_type {
    MQ_CACHE_F16 = 0,
    MQ_CACHE_Q8_0 /* int8 with an f16 scale for every 32 dimensions of a head: 8.5 bits a number */
} mq_cache_type;

typedef struct mq_session_options {
    uint32_t n_ctx;     /* positions in the KV cache; 0: the model's context length */
    uint32_t n_threads; /* 0: 1 */
    uint32_t n_batch;   /* tokens computed together in prefill; 0: 512 */
    const char *kernel; /* "scalar", "avx2", ...; NULL: the best this CPU has */
    mq_cache_type cache_type_k, cache_type_v;
} mq_session_options;

/* Sums over the session's life; the caller takes differences. */
typedef struct mq_stats {
    uint64_t tokens;       /* tokens evaluated */
    uint64_t routed_bits;  /* sum over tokens and routed linears of 2·depth·weights */
    uint64_t routed_weights; /* sum over tokens and routed linears of weights */
    uint64_t bytes_read;   /* bytes of the file that a token-by-token evaluation reads: planes, scales, routers, norms,
                              embedding row; the output head for every token whose logits were asked for */
} mq_stats;

const char *mq_version(void);
const char *mq_status_name(mq_status status); /* "MQ_ERR_IO" ... */

/* Kernels compiled in, best first. supported: 1 if this CPU can run it. `index` past the end returns NULL. */
const char *mq_kernel_name(size_t index);
int32_t mq_kernel_supported(size_t index);

/* Whether a GPU can be used, and which, or why not. */
typedef struct mq_device_info {
    int32_t usable;
    char text[512];
} mq_device_info;
void mq_device_describe(mq_device_info *info);
/* Microseconds per mat-vec of one rows x columns linear at `depth` on the GPU, in each of `repeats` passes over random copies that
 * its caches cannot hold. *bytes: what one reads. */
mq_status mq_device_measure_matvec(uint32_t rows, uint32_t columns, uint32_t depth, uint32_t repeats, double *microseconds,
                                   size_t *bytes, mq_error *error);

mq_status mq_model_open(const char *path, const mq_model_options *options, mq_model **model, mq_error *error);
void mq_model_close(mq_model *model); /* NULL is allowed; every session of it must be closed before */
const char *mq_model_device(const mq_model *model); /* "cpu" or "cuda" */
/* The GPU's name; on the CPU: what stood in the way of the GPU under "auto", or "". */
const char *mq_model_device_note(const mq_model *model);
void mq_model_get_info(const mq_model *model, mq_model_info *info);
/* The value of a string key as bytes in the file (not 0-terminated), valid until close. *data is NULL when absent. */
mq_status mq_model_string(const mq_model *model, const char *key, const char **data, size_t *size, mq_error *error);
/* The value of a u32 or bool key, or the first `capacity` values of a u32 array; *count is the number in the file, 0 when absent. */
mq_status mq_model_u32(const mq_model *model, const char *key, uint32_t *values, size_t capacity, size_t *count, mq_error *error);

mq_status mq_session_open(const mq_model *model, const mq_session_options *options, mq_session **session, mq_error *error);
void mq_session_close(mq_session *session);
const char *mq_session_kernel(const mq_session *session);

/* Bytes in the memory of the GPU: the file's tensors, shared by the model's sessions; this session's cache and buffers. 0 on the CPU. */
void mq_session_device_bytes(const mq_session *session, uint64_t *weights, uint64_t *cache, uint64_t *workspace);

/* One depth for every token and routed linear. depth: 1..max_depth. */
mq_status mq_session_set_depth(mq_session *session, uint32_t depth, mq_error *error);
/* Routed: average bits per routed weight, 2..2·max_depth. */
mq_status mq_session_set_average_bits(mq_session *session, float bits, mq_error *error);
/* Static: every linear at a fixed depth of its own, the best that calibration found for at most `bits` per routed weight on
 * average, 2..2·max_depth. Nothing is routed. MQ_ERR_ARGUMENT when the file has no static order. */
mq_status mq_session_set_static_bits(mq_session *session, float bits, mq_error *error);
/* Depth of the output head, 1..max_depth; 0: the file's default. */
mq_status mq_session_set_output_depth(mq_session *session, uint32_t depth, mq_error *error);

/* Evaluate n tokens after the current position. logits: [n_logits][vocab_size] float32 of the last n_logits tokens, may be
 * NULL when n_logits is 0. On an error the position is unchanged. */
mq_status mq_session_eval(mq_session *session, const int32_t *tokens, size_t n, float *logits, size_t n_logits, mq_error *error);
/* Evaluate `token`, then the most likely token after it (of equal ones the lowest), and so on, n evaluations in all: chosen [n], the
 * token after each of them. On a GPU no token comes back before the last. milliseconds: the time on the GPU, 0 on the CPU; may
 * be NULL. On an error the position is unchanged. */
mq_status mq_session_greedy(mq_session *session, int32_t token, size_t n, int32_t *chosen, float *milliseconds, mq_error *error);
uint32_t mq_session_position(const mq_session *session);
uint32_t mq_session_context(const mq_session *session); /* n_ctx */
size_t mq_session_cache_bytes(const mq_session *session); /* of keys and values */
/* Forget every position from `position` on. A model with a sliding window keeps the window and a batch of past positions in
 * the blocks that have it: MQ_ERR_FORGOTTEN for a position above 0 and below mq_session_rewind_floor. */
mq_status mq_session_rewind(mq_session *session, uint32_t position, mq_error *error);
/* The least position above 0 that mq_session_rewind accepts; 0: every position. At least n_batch tokens can be taken back, after
 * mq_session_state_set one. */
uint32_t mq_session_rewind_floor(const mq_session *session);
void mq_session_get_stats(const mq_session *session, mq_stats *stats);
/* Depths that tokens at positions first..first+n-1 read: uint8 [n][block_count][7], linears in the order q, k, v, output,
 * gate, up, down. */
mq_status mq_session_depths(const mq_session *session, uint32_t first, uint32_t n, uint8_t *depths, mq_error *error);
/* As mq_session_eval, with the hidden states after the final norm, float32 [n_hidden][embedding_length], in place of logits. */
mq_status mq_session_eval_hidden(mq_session *session, const int32_t *tokens, size_t n, float *hidden, size_t n_hidden,
                                 mq_error *error);

/* The cache up to the position as bytes: a header, the bits asked for, the depths read, keys and values. They fit every session of the same model
 * file, whatever its threads, batch and kernels, on machines of one byte order. A GPU's fit the CPU and
 * the other way round. */
size_t mq_session_state_size(const mq_session *session);
/* Writes exactly mq_session_state_size bytes; `size` is what `data` can hold. */
mq_status mq_session_state_get(mq_session *session, uint8_t *data, size_t size, mq_error *error);
/* Checks everything before it changes anything: MQ_ERR_FORMAT for bytes that are no state or were altered, MQ_ERR_ARGUMENT for a
 * state of another model file or of other cache types, MQ_ERR_CONTEXT_FULL when n_ctx is too small for it. */
mq_status mq_session_state_set(mq_session *session, const uint8_t *data, size_t size, mq_error *error);
/* cffi: end */

#ifdef __cplusplus
}
#endif
#endif
