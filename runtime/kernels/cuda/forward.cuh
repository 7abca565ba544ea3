// forward.cuh: one batch of tokens through the model on the GPU, as src/forward.c does it on the CPU: which kernels, on which
// buffers, in which order. A pass of one token is recorded as a graph and replayed.
#ifndef MQ_CUDA_FORWARD_H
#define MQ_CUDA_FORWARD_H

#include "attention.cuh"
#include "ends.cuh"
#include "matvec.cuh"
#include "matmat.cuh"
#include "memory.cuh"
#include "prefill_attention.cuh"
#include "prepare.cuh"

#include <string.h>

// One batch on its way: the first error ends it.
struct pass {
    mq_cuda_session *s;
    uint32_t n, chunks, position; // tokens; chunks of positions that the kernels are started for; of more than one token, where
    cudaError_t error;
};

template <typename... Parameters, typename... Arguments>
static void start(pass *p, dim3 grid, uint32_t threads, size_t shared, void (*kernel)(Parameters...), Arguments... arguments)
{
    if (p->error == cudaSuccess) {
        const launch_config config = {grid, dim3(threads), shared, p->s->stream, p->s->model->pdl};
        p->error = launch(config, kernel, arguments...);
    }
}

static const uint32_t FIRST_LINEAR[MQ_ROUTERS] = {0, 3, 4, 6};

// Norm or gate, quantisation and routing of `n` rows at x. point: MQ_ROUTERS for the output head, which is not routed.
static void start_prepare(pass *p, uint32_t block, uint32_t point, const float *x, const float *up, uint32_t columns,
                          const float *norm, float *normed, uint32_t n)
{
    mq_cuda_session *s = p->s;
    const mq_model *host = s->model->host;
    prepare_job job = {};
    job.x = x;
    job.up = up;
    job.columns = columns;
    job.groups = groups_of(columns);
    job.gelu = host->hparams.activation == MQ_ACTIVATION_GELU_TANH;
    job.norm = norm;
    job.eps = host->hparams.rms_epsilon;
    job.normed = normed;
    job.q = s->on.activations;
    job.scale = s->on.scale;
    job.sum = s->on.sum;
    job.n_hidden = host->hparams.router_hidden;
    job.max_depth = host->info.max_depth;
    job.sums = s->on.sums;
    job.arrived = s->on.arrived_tokens;
    job.state = s->on.state;
    if (point < MQ_ROUTERS) {
        const size_t linear = static_cast<size_t>(block) * MQ_LINEARS + FIRST_LINEAR[point];
        job.router = s->model->blocks[block].router[point];
        job.thresholds = s->on.thresholds + linear * MQ_GATES;
        job.table = s->on.table + linear;
        job.depths = s->on.depths + linear;
        job.depth_stride = host->hparams.block_count * MQ_LINEARS;
    }
    const dim3 grid(prepare_blocks(job.groups), n);
    if (n == 1) {
        start(p, grid, ALONE_WARPS * WARP, prepare_shared(job.groups, job.n_hidden), prepare<ALONE_WARPS>, job);
    } else {
        start(p, grid, TOGETHER_WARPS * WARP, prepare_shared(job.groups, job.n_hidden), prepare<TOGETHER_WARPS>, job);
    }
}

// The linears that `job` lists, of n tokens.
static void start_linears(pass *p, matvec_job job, uint32_t n)
{
    mq_cuda_session *s = p->s;
    job.n = n;
    job.q = s->on.activations;
    job.scale = s->on.scale;
    job.sum = s->on.sum;
    job.state = s->on.state;
    uint32_t blocks = 0; // of rows
    for (uint32_t i = 0; i < job.count; i++) {
        blocks += matvec_blocks(job.matrix[i]);
    }
    const uint32_t places = s->model->multiprocessors;
    const bool many = blocks <= places;
    const uint32_t each = n > 1 || many ? 1 : (blocks + 2 * places - 1) / (2 * places); // row blocks of a block of threads
    for (uint32_t i = 0; i < job.count; i++) {
        job.first_block[i + 1] = job.first_block[i] + (matvec_blocks(job.matrix[i]) + each - 1) / each;
    }
    const uint32_t grid = job.first_block[job.count];
    if (n > 1) {
        start(p, dim3(grid, (n + FEW_TOKENS - 1) / FEW_TOKENS), FEW_THREADS, 0, matvec_few, job);
    } else if (many) {
        start(p, dim3(grid), MANY_WARPS * WARP, sizeof(one_shared<MANY_WARPS>), matvec_one<MANY_WARPS>, job);
    } else {
        start(p, dim3(grid), SOME_WARPS * WARP, sizeof(one_shared<SOME_WARPS>), matvec_one<SOME_WARPS>, job);
    }
}

// More than FEW tokens: through 8-bit codes and the tensor cores.
static void start_many(pass *p, const matvec_job &job)
{
    mq_cuda_session *s = p->s;
    mq_cuda_job many[MATVEC_JOBS];
    for (uint32_t i = 0; i < job.count; i++) {
        const uint8_t *depths = job.depths + static_cast<size_t>(p->position) * job.depth_stride + i;
        many[i] = {job.matrix[i], depths, job.depth_stride, job.y[i], job.matrix[i].rows, job.add, job.bias};
    }
    const mq_activations x = {s->on.activations, s->on.scale, s->on.sum, job.matrix[0].groups};
    if (p->error == cudaSuccess) {
        p->error = mq_cuda_matmat(many, job.count, x, p->n, s->routed, s->on.codes, s->codes_bytes, s->stream);
    }
}

// What the linears of one point read and write; with `add`, which takes one linear, x += y.
struct point_io {
    const float *x, *up, *norm; // up: whose gate is x, NULL: none; norm: NULL where there is none
    bool add;
    float *y[MATVEC_JOBS];
};

static void start_point(pass *p, uint32_t block, uint32_t point, const point_io &io)
{
    mq_cuda_session *s = p->s;
    const mq_block *weights = &s->model->blocks[block];
    const mq_matrix *first = &weights->linear[FIRST_LINEAR[point]];
    matvec_job job = {};
    job.count = weights->router[point].linears;
    for (uint32_t i = 0; i < job.count; i++) {
        job.matrix[i] = first[i];
        job.y[i] = io.y[i];
    }
    job.depth_stride = s->model->host->hparams.block_count * MQ_LINEARS;
    job.depths = s->on.depths + static_cast<size_t>(block) * MQ_LINEARS + FIRST_LINEAR[point];
    job.add = io.add;
    job.bias = point == 1 ? weights->bias[3] : nullptr;
    start_prepare(p, block, point, io.x, io.up, first->columns, io.norm, nullptr, p->n);
    if (p->n > MATVEC_MOST) {
        start_many(p, job);
    } else {
        start_linears(p, job, p->n);
    }
}

template <uint32_t VALUE>
struct constant {
    static constexpr uint32_t value = VALUE;
};

// what(constant<staged>, constant<heads>)
template <typename What>
static void with_heads(bool staged, uint32_t heads, const What &what)
{
    const auto of = [&](auto several) {
        staged ? what(constant<1>(), several) : what(constant<0>(), several);
    };
    heads == 1 ? of(constant<1>()) : heads == 2 ? of(constant<2>()) : of(constant<4>());
}

static void start_attention(pass *p, uint32_t block)
{
    mq_cuda_session *s = p->s;
    const mq_hparams &hp = s->model->host->hparams;
    const mq_block *weights = &s->model->blocks[block];
    const size_t rows = static_cast<size_t>(block) * hp.head_count_kv * s->positions;
    attention_job job = {};
    job.q = s->on.q;
    job.k = s->on.k;
    job.v = s->on.v;
    job.keys = s->on.keys + rows * hp.head_dim;
    job.values = s->on.values + rows * padded_dim(hp.head_dim);
    job.positions = s->positions;
    job.cosine = s->on.cosine;
    job.sine = s->on.sine;
    job.pairs = weights->rope == MQ_ROPE_NONE ? 0 : hp.rope_dim / 2;
    for (uint32_t i = 0; i < 3; i++) {
        job.bias[i] = weights->bias[i];
    }
    job.norm[0] = weights->q_norm;
    job.norm[1] = weights->k_norm;
    job.eps = hp.rms_epsilon;
    job.heads = hp.head_count;
    job.heads_kv = hp.head_count_kv;
    job.dim = hp.head_dim;
    job.scale = s->attention_scale;
    job.parts = s->on.parts;
    job.arrived = s->on.arrived_heads;
    job.chunks = s->chunks;
    job.out = s->on.attended;
    job.state = s->on.state;
    if (p->n == 1) {
        const uint32_t shared = hp.head_count / hp.head_count_kv, places = s->model->multiprocessors;
        uint32_t heads = 1; // of a block of threads
        while (heads < MOST_HEADS && heads < shared && p->chunks * hp.head_count_kv * ((shared + heads - 1) / heads) > places) {
            heads *= 2;
        }
        const dim3 grid(p->chunks, hp.head_count_kv, (shared + heads - 1) / heads);
        const auto attend = [&](auto staged, auto several) {
            constexpr bool STAGED = decltype(staged)::value != 0;
            constexpr uint32_t HEADS = decltype(several)::value;
            start(p, grid, ATTEND_THREADS, attend_bytes(HEADS, hp.head_dim, STAGED), attend_one<STAGED, HEADS>, job);
        };
        with_heads(s->model->staged, heads, attend);
        return;
    }
    start(p, dim3(hp.head_count + hp.head_count_kv, (p->n + STORE_TOKENS - 1) / STORE_TOKENS), STORE_THREADS, 0, rotate_and_store, job, p->n);
    if (p->error == cudaSuccess) {
        const mq_cuda_attention several = {job.q, job.keys, job.values, job.positions, job.heads, job.heads_kv, job.dim,
                                           p->position, p->n, job.scale, job.out};
        p->error = mq_cuda_prefill_attention(&several, s->stream);
    }
}

// Tokens are in the control; x ends as the residual stream of the batch.
static void start_blocks(pass *p)
{
    mq_cuda_session *s = p->s;
    const mq_hparams &hp = s->model->host->hparams;
    const session_buffers &on = s->on;
    start(p, dim3(p->n), END_THREADS, 0, embed, s->model->embedding, hp.embedding_depth, hp.embedding_scale, on.x,
          static_cast<const control *>(on.state));
    for (uint32_t i = 0; i < hp.block_count; i++) {
        const mq_block *block = &s->model->blocks[i];
        start_point(p, i, 0, {on.x, nullptr, block->attn_norm, false, {on.q, on.k, on.v}});
        start_attention(p, i);
        start_point(p, i, 1, {on.attended, nullptr, nullptr, true, {on.x}});
        start_point(p, i, 2, {on.x, nullptr, block->ffn_norm, false, {on.gate, on.up}});
        start_point(p, i, 3, {on.gate, on.up, nullptr, true, {on.x}});
    }
}

// Logits of tokens first .. first + rows − 1 of the batch.
static void start_output(pass *p, uint32_t first, uint32_t rows, uint32_t depth)
{
    mq_cuda_session *s = p->s;
    const uint32_t width = s->model->host->hparams.embedding_length;
    start_prepare(p, 0, MQ_ROUTERS, s->on.x + static_cast<size_t>(first) * width, nullptr, width, s->model->output_norm, nullptr,
                  rows);
    matvec_job job = {};
    job.count = 1;
    job.matrix[0] = s->model->output;
    job.y[0] = s->on.logits;
    job.fixed_depth = depth;
    start_linears(p, job, rows);
}

static void start_greedy(pass *p, uint32_t depth)
{
    mq_cuda_session *s = p->s;
    const uint32_t vocab = s->model->host->hparams.vocab_size;
    start_output(p, 0, 1, depth);
    start(p, dim3(BEST_BLOCKS), END_THREADS, 0, find_best, static_cast<const float *>(s->on.logits), vocab, s->on.state);
    start(p, dim3(1), 1, 0, advance, s->on.state, s->on.chosen);
}

enum graph_kind { GRAPH_PLAIN, GRAPH_LOGITS, GRAPH_GREEDY };

// The recorded pass of one token that sees up to `seen` positions.
static cudaError_t find_graph(mq_cuda_session *s, graph_kind kind, uint32_t seen, uint32_t depth, cudaGraphExec_t *out)
{
    const uint32_t needed = (seen + MQ_ATTENTION_CHUNK - 1) / MQ_ATTENTION_CHUNK;
    uint32_t size = 0;
    while ((1u << size) < needed) {
        size++;
    }
    cudaGraphExec_t &graph = s->graph[kind][size];
    if (graph != nullptr && (kind == GRAPH_PLAIN || s->graph_depth[kind][size] == depth)) {
        *out = graph;
        return cudaSuccess;
    }
    if (graph != nullptr) {
        (void)cudaGraphExecDestroy(graph);
        graph = nullptr;
    }
    pass p = {s, 1, 1u << size < s->chunks ? 1u << size : s->chunks, 0, cudaSuccess};
    p.error = cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal);
    if (p.error != cudaSuccess) {
        return p.error;
    }
    start_blocks(&p);
    if (kind == GRAPH_LOGITS) {
        start_output(&p, 0, 1, depth);
    } else if (kind == GRAPH_GREEDY) {
        start_greedy(&p, depth);
    }
    cudaGraph_t recorded = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(s->stream, &recorded);
    p.error = p.error == cudaSuccess ? ended : p.error;
    if (p.error == cudaSuccess) {
        p.error = cudaGraphInstantiate(&graph, recorded, 0);
    }
    if (recorded != nullptr) {
        (void)cudaGraphDestroy(recorded);
    }
    s->graph_depth[kind][size] = depth;
    *out = graph;
    return p.error;
}

static cudaError_t put_control(mq_cuda_session *s, const int32_t *tokens, uint32_t n, uint32_t position)
{
    control *state = reinterpret_cast<control *>(s->pinned);
    memset(state, 0, sizeof *state);
    state->position = position;
    state->routed = s->routed;
    memcpy(state->tokens, tokens, n * sizeof *tokens);
    return cudaMemcpyAsync(s->on.state, state, control_bytes(n), cudaMemcpyHostToDevice, s->stream);
}

// Rows of logits, LOGIT_ROWS at a time, through pinned memory.
static void give_logits(pass *p, const mq_cuda_output *output)
{
    mq_cuda_session *s = p->s;
    const size_t vocab = s->model->host->hparams.vocab_size;
    float *pinned = reinterpret_cast<float *>(s->pinned + s->pinned_control);
    const uint32_t most = LOGIT_ROWS;
    for (uint32_t done = 0; done < output->n_logits && p->error == cudaSuccess; done += LOGIT_ROWS) {
        const uint32_t left = output->n_logits - done, rows = left < most ? left : most;
        if (p->n > 1) {
            start_output(p, p->n - left, rows, output->output_depth);
        } // else the recorded pass has computed them
        if (p->error == cudaSuccess) {
            p->error = cudaMemcpyAsync(pinned, s->on.logits, rows * vocab * sizeof(float), cudaMemcpyDeviceToHost, s->stream);
        }
        if (p->error == cudaSuccess) {
            p->error = cudaStreamSynchronize(s->stream);
        }
        if (p->error == cudaSuccess) {
            memcpy(output->logits + done * vocab, pinned, rows * vocab * sizeof(float));
        }
    }
}

static void give_hidden(pass *p, const mq_cuda_output *output)
{
    mq_cuda_session *s = p->s;
    const uint32_t width = s->model->host->hparams.embedding_length;
    start_prepare(p, 0, MQ_ROUTERS, s->on.x + static_cast<size_t>(p->n - output->n_hidden) * width, nullptr, width,
                  s->model->output_norm, s->on.hidden, output->n_hidden);
    if (p->error == cudaSuccess) {
        p->error = cudaMemcpyAsync(output->hidden, s->on.hidden, static_cast<size_t>(output->n_hidden) * width * sizeof(float),
                                   cudaMemcpyDeviceToHost, s->stream);
    }
}

static void give_depths(pass *p, uint32_t position, uint32_t n, uint8_t *depths)
{
    mq_cuda_session *s = p->s;
    const size_t row = static_cast<size_t>(s->model->host->hparams.block_count) * MQ_LINEARS;
    if (p->error == cudaSuccess) {
        p->error = cudaMemcpyAsync(depths, s->on.depths + position * row, n * row, cudaMemcpyDeviceToHost, s->stream);
    }
    if (p->error == cudaSuccess) {
        p->error = cudaStreamSynchronize(s->stream);
    }
}

static int32_t forward(mq_cuda_session *s, const int32_t *tokens, uint32_t n, uint32_t position, const mq_cuda_output *output,
                       mq_cuda_message *message)
{
    pass p = {s, n, s->chunks, position, cudaSuccess};
    p.error = put_control(s, tokens, n, position);
    if (n == 1 && p.error == cudaSuccess) {
        cudaGraphExec_t graph = nullptr;
        p.error = find_graph(s, output->n_logits > 0 ? GRAPH_LOGITS : GRAPH_PLAIN, position + 1, output->output_depth, &graph);
        p.error = p.error == cudaSuccess ? cudaGraphLaunch(graph, s->stream) : p.error;
    } else {
        start_blocks(&p);
    }
    give_logits(&p, output);
    if (output->n_hidden > 0) {
        give_hidden(&p, output);
    }
    give_depths(&p, position, n, output->depths);
    return p.error == cudaSuccess ? 0 : fail(message, "a pass on the GPU", p.error);
}

static int32_t greedy(mq_cuda_session *s, int32_t token, uint32_t n, uint32_t position, uint32_t output_depth, int32_t *chosen,
                      uint8_t *depths, float *milliseconds, mq_cuda_message *message)
{
    pass p = {s, 1, s->chunks, position, cudaSuccess};
    cudaGraphExec_t graph = nullptr;
    p.error = find_graph(s, GRAPH_GREEDY, position + n, output_depth, &graph);
    p.error = p.error == cudaSuccess ? put_control(s, &token, 1, position) : p.error;
    p.error = p.error == cudaSuccess ? cudaEventRecord(s->begin, s->stream) : p.error;
    for (uint32_t i = 0; i < n && p.error == cudaSuccess; i++) {
        p.error = cudaGraphLaunch(graph, s->stream);
    }
    p.error = p.error == cudaSuccess ? cudaEventRecord(s->end, s->stream) : p.error;
    if (p.error == cudaSuccess) {
        p.error = cudaMemcpyAsync(chosen, s->on.chosen, n * sizeof *chosen, cudaMemcpyDeviceToHost, s->stream);
    }
    give_depths(&p, position, n, depths);
    if (p.error == cudaSuccess && milliseconds != nullptr) {
        p.error = cudaEventElapsedTime(milliseconds, s->begin, s->end);
    }
    return p.error == cudaSuccess ? 0 : fail(message, "greedy decoding on the GPU", p.error);
}

#endif
