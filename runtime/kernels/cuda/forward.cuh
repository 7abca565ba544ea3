// forward.cuh: one batch of tokens through the model on the GPU, as src/forward.c does it on the CPU: which kernels, on which
// buffers, in which order. A pass of one token is recorded as a graph and replayed.
#ifndef MQ_CUDA_FORWARD_H
#define MQ_CUDA_FORWARD_H

#include "attention.cuh"
#include "ends.cuh"
#include "one_token.cuh"
#include "matmat.cuh"
#include "memory.cuh"
#include "prefill_attention.cuh"
#include "prepare.cuh"

#include <string.h>

// One batch on its way: the first error ends it.
struct pass {
    mq_cuda_session *s;
    uint32_t n, chunks, position; // tokens; chunks of positions that the kernels are started for; of more than one token, where
    uint32_t output_depth;        // of one token: of the head that follows, 0 for none
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
enum { GATED_POINT = 3 }; // the point whose input is gate and up

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

// The linears that `job` lists, of n tokens whose input another kernel has quantised, unless job.input says otherwise.
static void start_linears(pass *p, matvec_job job, uint32_t n)
{
    mq_cuda_session *s = p->s;
    job.n = n;
    if (job.input.x == nullptr && job.input.q == nullptr) {
        job.input.q = s->on.activations;
        job.input.scale = s->on.scale;
        job.input.sum = s->on.sum;
    }
    job.input.groups = job.matrix[0].groups;
    job.state = s->on.state;
    uint32_t blocks = 0; // of rows
    for (uint32_t i = 0; i < job.count; i++) {
        blocks += matvec_blocks(job.matrix[i]);
    }
    // Of one token: two blocks of threads find room in a multiprocessor; more row blocks than that are dealt out to one in each.
    const uint32_t places = s->model->multiprocessors, each = n > 1 || blocks <= 2 * places ? 1 : (blocks + places - 1) / places;
    for (uint32_t i = 0; i < job.count; i++) {
        job.first_block[i + 1] = job.first_block[i] + (matvec_blocks(job.matrix[i]) + each - 1) / each;
    }
    const uint32_t grid = job.first_block[job.count];
    if (n > 1) {
        start(p, dim3(grid, (n + FEW_TOKENS - 1) / FEW_TOKENS), FEW_THREADS, 0, matvec_few, job);
    } else if (s->model->wide) {
        start(p, dim3(grid), WIDE_WARPS * WARP, one_bytes<WIDE_WARPS>(job.input), matvec_one<WIDE_WARPS>, job);
    } else {
        start(p, dim3(grid), NARROW_WARPS * WARP, one_bytes<NARROW_WARPS>(job.input), matvec_one<NARROW_WARPS>, job);
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

#ifndef MQ_AHEAD
#define MQ_AHEAD (16 << 20)
#endif
enum { AHEAD_BYTES = MQ_AHEAD }; // of linears in a row: what memory brings while no kernel reads

// The first rows of `count` linears that follow together.
static void ask_for(coming_linears *coming, const mq_matrix *matrix, uint32_t count)
{
    uint64_t rows = 0;
    for (uint32_t i = 0; i < count; i++) {
        rows += matrix[i].rows;
    }
    for (uint32_t i = 0; i < count; i++) {
        coming->matrix[coming->count] = matrix[i];
        coming->most[coming->count] = static_cast<uint32_t>(static_cast<uint64_t>(AHEAD_BYTES) * matrix[i].rows / rows);
        coming->count++;
    }
}

// Of a pass of one token, what `point` of a block multiplies with; past the last block the output head.
static coming_linears what_comes(const pass *p, uint32_t block, uint32_t point)
{
    const mq_cuda_session *s = p->s;
    const mq_cuda_model *model = s->model;
    coming_linears coming = {};
    if (block == model->host->hparams.block_count) {
        coming.depth = p->output_depth;
        ask_for(&coming, &model->output, p->output_depth > 0 ? 1 : 0);
        return coming;
    }
    const size_t linear = static_cast<size_t>(block) * MQ_LINEARS + FIRST_LINEAR[point];
    const mq_block *weights = &model->blocks[block];
    const mq_router &router = weights->router[point];
    // What a router will ask for is not known, but for the first slice.
    coming.depth = 1;
    coming.table = s->routed ? nullptr : s->on.table + linear;
    ask_for(&coming, &weights->linear[FIRST_LINEAR[point]], router.linears);
    if (point == 1) { // and what comes after it: attention leaves memory idle for longer
        ask_for(&coming, &weights->linear[FIRST_LINEAR[2]], weights->router[2].linears);
    }
    const uint32_t hidden = model->host->hparams.router_hidden, gates = router.linears * MQ_GATES;
    const struct { const void *at; size_t bytes; } small[MOST_SMALL] = {
        {point == 0 ? weights->attn_norm : point == 2 ? weights->ffn_norm : nullptr, router.columns * sizeof(float)},
        {point == GATED_POINT ? nullptr : router.hidden, static_cast<size_t>(hidden) * router.groups * MQ_GROUP_SIZE},
        {router.hidden_scale, hidden * sizeof(float)},
        {router.hidden_bias, hidden * sizeof(float)},
        {router.head, gates * (hidden + 1) * sizeof(float)},
        {router.head_bias, gates * sizeof(float)},
        {s->on.thresholds + linear * MQ_GATES, gates * sizeof(float)},
    };
    for (uint32_t i = 0; i < MOST_SMALL; i++) {
        const uint64_t address = reinterpret_cast<uint64_t>(small[i].at), begin = address / 16 * 16;
        if (small[i].at != nullptr && (i == 0 || s->routed)) {
            coming.small[i] = reinterpret_cast<const void *>(begin);
            coming.small_bytes[i] = static_cast<uint32_t>((address + small[i].bytes - begin) / 16 * 16);
        }
    }
    return coming;
}

// Of one token: what the linears of a point read, all but x and its norm.
static input_job input_of(const mq_cuda_session *s, uint32_t block, uint32_t point)
{
    const mq_hparams &hp = s->model->host->hparams;
    const mq_block *weights = &s->model->blocks[block];
    const size_t linear = static_cast<size_t>(block) * MQ_LINEARS + FIRST_LINEAR[point];
    input_job input = {};
    input.columns = weights->router[point].columns;
    input.groups = weights->router[point].groups;
    input.eps = hp.rms_epsilon;
    if (point == GATED_POINT) {
        input.q = s->on.gated;
        input.scale = s->on.gated_scale;
        input.sum = s->on.gated_sum;
        input.sums = s->on.sums;
    }
    if (s->routed) {
        input.router = weights->router[point];
        input.thresholds = s->on.thresholds + linear * MQ_GATES;
    }
    input.n_hidden = hp.router_hidden;
    input.max_depth = s->model->host->info.max_depth;
    input.depths = s->on.depths + linear;
    input.depth_stride = hp.block_count * MQ_LINEARS;
    input.state = s->on.state;
    return input;
}

// Where gate and up of one token leave the input of the linear after them.
static gated_job gated_of(const mq_cuda_session *s, uint32_t block)
{
    const mq_router &router = s->model->blocks[block].router[GATED_POINT];
    return {s->on.gated, s->on.gated_scale, s->on.gated_sum, s->on.arrived_groups, s->routed ? router.hidden : nullptr,
            s->model->host->hparams.router_hidden, router.groups, s->on.sums,
            s->model->host->hparams.activation == MQ_ACTIVATION_GELU_TANH};
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
    const bool many = p->n > MATVEC_MOST, alone = p->n == 1 && s->model->ready_here[point];
    matvec_job job = {};
    job.count = weights->router[point].linears;
    for (uint32_t i = 0; i < job.count; i++) {
        job.matrix[i] = first[i];
        job.y[i] = io.y[i];
    }
    const size_t linear = static_cast<size_t>(block) * MQ_LINEARS + FIRST_LINEAR[point];
    job.depth_stride = s->model->host->hparams.block_count * MQ_LINEARS;
    job.depths = s->on.depths + linear;
    job.add = io.add;
    job.bias = point == 1 ? weights->bias[3] : nullptr;
    if (alone) {
        job.input = input_of(s, block, point);
        job.input.x = point == GATED_POINT ? nullptr : io.x;
        job.input.norm = io.norm;
        job.table = s->routed ? nullptr : s->on.table + linear;
    } else {
        start_prepare(p, block, point, io.x, io.up, first->columns, io.norm, nullptr, p->n);
    }
    if (p->n == 1 && point + 1 == GATED_POINT && s->model->ready_here[GATED_POINT]) {
        job.gated = gated_of(s, block);
    }
    if (!many) {
        if (p->n == 1 && s->model->pdl) {
            job.coming = what_comes(p, point + 1 == MQ_ROUTERS ? block + 1 : block, (point + 1) % MQ_ROUTERS);
        }
        start_linears(p, job, p->n);
        return;
    }
    start_many(p, job);
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
    cudaGraphExec_t &graph = s->graph[s->routed][kind][size];
    if (graph != nullptr && (kind == GRAPH_PLAIN || s->graph_depth[s->routed][kind][size] == depth)) {
        *out = graph;
        return cudaSuccess;
    }
    if (graph != nullptr) {
        (void)cudaGraphExecDestroy(graph);
        graph = nullptr;
    }
    pass p = {s, 1, 1u << size < s->chunks ? 1u << size : s->chunks, 0, kind == GRAPH_PLAIN ? 0 : depth, cudaSuccess};
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
    s->graph_depth[s->routed][kind][size] = depth;
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
    for (uint32_t i = 0; i < n && !s->routed; i++) {
        memcpy(depths + i * row, s->table, row);
    }
    if (p->error == cudaSuccess && s->routed) {
        p->error = cudaMemcpyAsync(depths, s->on.depths + position * row, n * row, cudaMemcpyDeviceToHost, s->stream);
    }
    if (p->error == cudaSuccess) {
        p->error = cudaStreamSynchronize(s->stream);
    }
}

static int32_t forward(mq_cuda_session *s, const int32_t *tokens, uint32_t n, uint32_t position, const mq_cuda_output *output,
                       mq_cuda_message *message)
{
    pass p = {s, n, s->chunks, position, 0, cudaSuccess};
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
    pass p = {s, 1, s->chunks, position, 0, cudaSuccess};
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
