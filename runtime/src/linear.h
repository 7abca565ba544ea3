/* linear.h: slice linears over a batch whose tokens differ in depth, and rows of the embedding. */
#ifndef MQ_LINEAR_H
#define MQ_LINEAR_H

#include "kernels.h"
#include "keys.h"
#include "threads.h"

/* One linear and its output. Tokens are listed by depth: those of depth d are order[first[d] .. first[d + 1] − 1]. */
typedef struct mq_linear_job {
    const mq_matrix *matrix;
    float *y; /* [tokens][y_stride] */
    size_t y_stride;
    const uint32_t *order;
    uint32_t first[MQ_SLICE_COUNT + 2];
} mq_linear_job;

/* Sort tokens 0..n-1 by depths[t·depth_stride] into `order` [n] and job->first, keeping their order within a depth. */
void mq_linear_sort(mq_linear_job *job, const uint8_t *depths, size_t depth_stride, uint32_t n, uint32_t *order);

/* Run up to MQ_MAX_JOBS linears that read the same activations, as one job of the pool. */
enum { MQ_MAX_JOBS = 3 };
void mq_linear_run(const mq_kernels *kernels, mq_pool *pool, const mq_activations *x, const mq_linear_job *jobs, size_t count);

/* Row `row` of an embedding at `depth`: x [columns] = s_D·(Q_D + ½) − o. */
void mq_embedding_row(const mq_matrix *matrix, uint32_t depth, uint32_t row, float *x);

#endif
