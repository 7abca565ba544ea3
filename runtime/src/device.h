/* device.h: a model or a session on a GPU, by way of the CUDA library where there is one. Without it everything runs on the CPU. */
#ifndef MQ_DEVICE_H
#define MQ_DEVICE_H

#include "cuda.h"
#include "session.h"

/* Tokens computed together there at most. */
enum { MQ_DEVICE_BATCH = 8192 };

/* What a model keeps of its device. NULL: the CPU. */
typedef struct mq_device {
    const mq_cuda_api *api;
    mq_cuda_model *model;
    mq_cuda_device facts;
} mq_device;

/* asked: NULL or "cpu", "cuda", or "auto". Under "auto" what stands in the way of the GPU is put down in model->device_note. */
mq_status mq_device_open(mq_model *model, const char *asked, mq_error *error);
void mq_device_close(mq_model *model);

mq_status mq_device_session_open(mq_session *session, mq_error *error);
void mq_device_session_close(mq_session *session);

/* As mq_forward and mq_forward_hidden together, for a session on a GPU. */
mq_status mq_device_forward(mq_session *session, const int32_t *tokens, uint32_t n, float *logits, uint32_t n_logits,
                            float *hidden, uint32_t n_hidden, mq_error *error);
mq_status mq_device_greedy(mq_session *session, int32_t token, uint32_t n, int32_t *chosen, float *milliseconds, mq_error *error);
/* As copy_cache in state.c. */
mq_status mq_device_copy_cache(mq_session *session, uint32_t position, uint8_t *out, const uint8_t *in, mq_error *error);

#endif
