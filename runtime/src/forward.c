/* forward.c: one batch of tokens through the model: norm, quantise and route, linears, feed-forward, logits.
 *
 * Decode (one token) runs the small steps on the caller's thread and meets the pool once per group of linears and once for
 * attention; prefill spreads the small steps over tokens as well. Each token's arithmetic is the same in both.
 */
#include "attention.h"
#include "session.h"

#include <stdbool.h>
#include <string.h>

typedef struct pass {
    mq_session *session;
    const mq_model *model;
    const mq_block *block;
    uint32_t block_index, n;
    const float *source; /* [n][stride] input of the next linears, before its norm if any */
    size_t stride, columns;
    const float *norm;   /* NULL: no norm */
    const mq_router *router; /* NULL: nothing to route (output head) */
    size_t first_linear; /* of the router's, 0..6 */
    const float *branch_bias, *branch_norm; /* of what is added to the residual stream; NULL: none */
    float *logits;       /* [n][vocab_size], of run_output */
} pass;

static uint8_t *depths_at(const pass *p, size_t token)
{
    const mq_session *s = p->session;
    const size_t blocks = p->model->hparams.block_count;
    return s->depths + ((s->position + token) * blocks + p->block_index) * MQ_LINEARS + p->first_linear;
}

/* Norm, quantise and route one token. */
static void prepare_token(void *argument, size_t token, uint32_t thread)
{
    (void)thread;
    const pass *p = argument;
    mq_session *s = p->session;
    const mq_hparams *hp = &p->model->hparams;
    const mq_activations *act = &s->batch.activations;
    const float *x = p->source + token * p->stride;
    if (p->norm != NULL) {
        float *normed = s->batch.normed + token * hp->embedding_length;
        s->kernels->rmsnorm(x, p->norm, p->columns, hp->rms_epsilon, normed);
        x = normed;
    }
    int8_t *q = act->q + token * act->groups * MQ_GROUP_SIZE;
    float *scale = act->scale + token * act->groups;
    const float squares = s->kernels->quantize(x, p->columns, q, scale, act->sum + token * act->groups);
    if (p->router == NULL) {
        return;
    }
    uint8_t *depths = depths_at(p, token);
    if (s->asked_bits == 0.0f) {
        memcpy(depths, s->table + (size_t)p->block_index * MQ_LINEARS + p->first_linear, p->router->linears);
        return;
    }
    float hidden[MQ_MAX_ROUTER_HIDDEN];
    s->kernels->router_hidden(p->router->hidden, hp->router_hidden, q, scale, act->groups, hidden);
    const float *thresholds = s->thresholds + ((size_t)p->block_index * MQ_LINEARS + p->first_linear) * MQ_GATES;
    mq_router_depths(p->router, hp, thresholds, hidden, squares, p->model->info.max_depth, depths);
}

static void prepare(pass *p, const float *source, size_t stride, size_t columns, const float *norm)
{
    p->source = source;
    p->stride = stride;
    p->columns = columns;
    p->norm = norm;
    p->session->batch.activations.groups = (uint32_t)((columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE);
    mq_pool_run(p->session->pool, prepare_token, p, p->n);
}

static void count_linear(mq_session *s, const mq_matrix *matrix, const mq_linear_job *job)
{
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        const uint64_t tokens = job->first[depth + 1] - job->first[depth];
        const uint64_t weights = (uint64_t)matrix->rows * matrix->columns;
        s->stats.routed_bits += tokens * MQ_SLICE_BITS * depth * weights;
        s->stats.routed_weights += tokens * weights;
        s->stats.bytes_read += tokens * mq_matrix_bytes(matrix, depth);
    }
}

/* The linears that router `point` serves, after prepare(): outputs[i] gets rows of the i-th. */
static void run_point(pass *p, size_t point, const float *source, size_t stride, const float *norm, float *const outputs[])
{
    mq_session *s = p->session;
    const mq_hparams *hp = &p->model->hparams;
    p->router = &p->block->router[point];
    static const size_t FIRST[MQ_ROUTERS] = {0, 3, 4, 6};
    p->first_linear = FIRST[point];
    prepare(p, source, stride, p->router->columns, norm);
    mq_linear_job jobs[MQ_MAX_JOBS];
    for (size_t i = 0; i < p->router->linears; i++) {
        const mq_matrix *matrix = &p->block->linear[p->first_linear + i];
        jobs[i] = (mq_linear_job){.matrix = matrix, .y = outputs[i], .y_stride = matrix->rows};
        mq_linear_sort(&jobs[i], depths_at(p, 0) + i, (size_t)hp->block_count * MQ_LINEARS, p->n, s->batch.order[i]);
        count_linear(s, matrix, &jobs[i]);
    }
    if (s->asked_bits != 0.0f) {
        s->stats.bytes_read += (uint64_t)p->n * mq_router_bytes(p->router, hp);
    }
    mq_linear_run(s->kernels, s->pool, &s->batch.activations, jobs, p->router->linears);
}

static void activate_token(void *argument, size_t token, uint32_t thread)
{
    (void)thread;
    const pass *p = argument;
    const mq_kernels *kernels = p->session->kernels;
    mq_batch *batch = &p->session->batch;
    const size_t ff = p->model->hparams.feed_forward_length;
    const bool gelu = p->model->hparams.activation == MQ_ACTIVATION_GELU_TANH;
    (gelu ? kernels->geglu : kernels->swiglu)(batch->gate + token * ff, batch->up + token * ff, ff);
}

/* The branch, with its bias and norm if any, joins the residual stream. */
static void add_token(void *argument, size_t token, uint32_t thread)
{
    (void)thread;
    const pass *p = argument;
    const mq_kernels *kernels = p->session->kernels;
    const size_t width = p->model->hparams.embedding_length;
    float *branch = p->session->batch.branch + token * width;
    if (p->branch_bias != NULL) {
        kernels->add(branch, p->branch_bias, width);
    }
    if (p->branch_norm != NULL) {
        kernels->rmsnorm(branch, p->branch_norm, width, p->model->hparams.rms_epsilon, branch);
    }
    kernels->add(p->session->batch.x + token * width, branch, width);
}

static void add_branch(pass *p, const float *bias, const float *norm)
{
    p->branch_bias = bias;
    p->branch_norm = norm;
    mq_pool_run(p->session->pool, add_token, p, p->n);
}

static void run_block(pass *p)
{
    mq_session *s = p->session;
    mq_batch *batch = &s->batch;
    const mq_hparams *hp = &p->model->hparams;
    const size_t width = hp->embedding_length, ff = hp->feed_forward_length, q_width = (size_t)hp->head_count * hp->head_dim;
    run_point(p, 0, batch->x, width, p->block->attn_norm, (float *const[]){batch->q, batch->k, batch->v});
    mq_attention_run(s, p->block_index, p->n);
    run_point(p, 1, batch->attended, q_width, NULL, (float *const[]){batch->branch});
    add_branch(p, p->block->bias[3], p->block->attn_post_norm);
    run_point(p, 2, batch->x, width, p->block->ffn_norm, (float *const[]){batch->gate, batch->up});
    mq_pool_run(s->pool, activate_token, p, p->n);
    run_point(p, 3, batch->gate, ff, NULL, (float *const[]){batch->branch});
    add_branch(p, NULL, p->block->ffn_post_norm);
    s->stats.bytes_read += (uint64_t)p->n * p->block->vector_bytes;
}

static void cap_token(void *argument, size_t token, uint32_t thread)
{
    (void)thread;
    const pass *p = argument;
    const mq_hparams *hp = &p->model->hparams;
    p->session->kernels->softcap(p->logits + token * hp->vocab_size, hp->vocab_size, hp->output_softcap);
}

/* Logits of the last n_logits tokens; the head has one depth for all of them. */
static void run_output(pass *p, float *logits, uint32_t n_logits)
{
    mq_session *s = p->session;
    const mq_hparams *hp = &p->model->hparams;
    const float *last = s->batch.x + (size_t)(p->n - n_logits) * hp->embedding_length;
    p->n = n_logits;
    p->router = NULL;
    prepare(p, last, hp->embedding_length, hp->embedding_length, p->model->output_norm);
    mq_linear_job job = {.matrix = &p->model->output, .y = logits, .y_stride = hp->vocab_size};
    const uint8_t depth = (uint8_t)s->output_depth;
    mq_linear_sort(&job, &depth, 0, n_logits, s->batch.order[0]);
    mq_linear_run(s->kernels, s->pool, &s->batch.activations, &job, 1);
    if (hp->output_softcap != 0.0f) {
        p->logits = logits;
        mq_pool_run(s->pool, cap_token, p, n_logits);
    }
    s->stats.bytes_read += n_logits * ((uint64_t)mq_matrix_bytes(&p->model->output, depth) + hp->embedding_length * sizeof(float));
}

void mq_forward(mq_session *session, const int32_t *tokens, uint32_t n, float *logits, uint32_t n_logits)
{
    const mq_model *model = session->model;
    const mq_hparams *hp = &model->hparams;
    pass p = {.session = session, .model = model, .n = n};
    for (uint32_t t = 0; t < n; t++) {
        float *x = session->batch.x + (size_t)t * hp->embedding_length;
        mq_embedding_row(&model->embedding, hp->embedding_depth, (uint32_t)tokens[t], x);
        for (uint32_t i = 0; hp->embedding_scale != 1.0f && i < hp->embedding_length; i++) {
            x[i] *= hp->embedding_scale;
        }
    }
    session->stats.tokens += n;
    session->stats.bytes_read += n * ((uint64_t)mq_matrix_bytes(&model->embedding, hp->embedding_depth) / hp->vocab_size);
    for (uint32_t i = 0; i < hp->block_count; i++) {
        p.block = &model->blocks[i];
        p.block_index = i;
        run_block(&p);
    }
    if (n_logits > 0) {
        run_output(&p, logits, n_logits);
    }
}

void mq_forward_hidden(const mq_session *session, uint32_t n, float *hidden, uint32_t n_hidden)
{
    const mq_hparams *hp = &session->model->hparams;
    const size_t width = hp->embedding_length;
    const float *x = session->batch.x + (size_t)(n - n_hidden) * width; /* the residual stream of the batch */
    for (size_t t = 0; t < n_hidden; t++) {
        session->kernels->rmsnorm(x + t * width, session->model->output_norm, width, hp->rms_epsilon, hidden + t * width);
    }
}
