// one_token.cuh: slice linears of one token, bound by memory. A block of threads computes rows 32 at a time. Every warp has groups of
// its own: copies of the next ones to shared memory are always on their way, also over the end of the rows and while the kernels
// before still run. A group's exact sums and its scales become terms, and one
// warp, a row a lane, adds them up in ascending order while the others go on.
#ifndef MQ_CUDA_ONE_TOKEN_H
#define MQ_CUDA_ONE_TOKEN_H

#include "launch.cuh"
#include "matvec.cuh"
#include "tensor.cuh"

// Warps of a block: WIDE where a multiprocessor's shared memory holds its 64 KiB on the way.
enum { WIDE_WARPS = 16, NARROW_WARPS = 8, SLOTS = 4, SLOT_BYTES = 2 * MQ_TILE_BYTES, TURN_GROUPS = 2 };

template <uint32_t WARPS>
struct one_shared {
    uint8_t slot[WARPS][SLOTS][SLOT_BYTES];                 // slices of the groups that come: of two tiles
    uint32_t pair[WARPS][SLOTS][WARP];                      // their scales and offsets, as in the file
    float2 term[2][TURN_GROUPS * WARPS][BLOCK_ROWS];        // of a row and group: product; scale and offset as they are
    float y[BLOCK_ROWS];
    uint8_t depth[16]; // as routed here
};
// then the places of input.cuh

enum { STATIC_SHARED = 2048 }; // bytes that the kernel's own variables take at most, the system's with them

template <uint32_t WARPS>
static size_t one_bytes(const input_job &input)
{
    return sizeof(one_shared<WARPS>) + places_of(input).end;
}

// Groups of a warp that are on their way, of D slices each.
__host__ __device__ constexpr uint32_t items_of(int depth)
{
    return SLOTS / depth;
}

// A warp's groups: warp, warp + WARPS, ... of row blocks begin, begin + stride, ...; where they lie in a plane, and how much further the
// second tile of the block does.
template <uint32_t WARPS>
struct group_walk {
    uint32_t block, group, at, second;

    __device__ void move_to(const mq_matrix &w, uint32_t to)
    {
        block = to;
        group = threadIdx.x / WARP;
        at = (to * 2 * w.groups + group) * MQ_TILE_BYTES;
        second = to * 2 + 1 < w.tiles ? w.groups * MQ_TILE_BYTES : 0; // an odd last tile is read twice
    }

    __device__ void advance(const mq_matrix &w, uint32_t stride)
    {
        group += WARPS;
        at += WARPS * MQ_TILE_BYTES;
        if (group >= w.groups) {
            move_to(w, block + stride);
        }
    }
};

// Slices begin .. end − 1 of one group on their way, from slot `slot` on. Neighbouring lanes copy neighbouring pieces: copies that do not
// are many times slower.
template <uint32_t WARPS>
__device__ inline void copy_slices(const mq_matrix &w, const group_walk<WARPS> &from, uint8_t (*slot)[SLOT_BYTES], int begin, int end)
{
    const uint32_t piece = threadIdx.x % WARP * 16;
#pragma unroll
    for (int e = 0; e < MQ_SLICE_COUNT; e++) {
        if (e >= begin && e < end) {
            const uint8_t *plane = w.plane[e] + from.at + piece;
            copy_async<16>(slot[e] + piece, plane, true);
            copy_async<16>(slot[e] + MQ_TILE_BYTES + piece, plane + from.second, true);
        }
    }
}

// Its scales and offsets: 16 words of each of the two tiles, an eighth of the bytes of a slice.
template <uint32_t WARPS>
__device__ inline void copy_pairs(const mq_matrix &w, const group_walk<WARPS> &from, uint32_t *pair)
{
    const uint32_t lane = threadIdx.x % WARP, bytes = (from.at + lane / MQ_TILE_ROWS * from.second) / 8;
    copy_async<4>(pair + lane, reinterpret_cast<const uint32_t *>(w.scale_offset) + bytes / 4 + lane % MQ_TILE_ROWS, true);
}

// The first groups. started: slice 0 of the very first is on its way.
template <int D, uint32_t WARPS>
__device__ inline void fill_slots(const mq_matrix &w, uint32_t begin, uint32_t stride, bool started, one_shared<WARPS> &s)
{
    const uint32_t warp = threadIdx.x / WARP, blocks = matvec_blocks(w);
    group_walk<WARPS> next;
    next.move_to(w, begin);
#pragma unroll
    for (uint32_t i = 0; i < items_of(D); i++) {
        if (warp < w.groups && next.block < blocks) {
            copy_slices(w, next, s.slot[warp] + i * D, i == 0 && started, D);
            copy_pairs(w, next, s.pair[warp][i]);
        }
        copy_commit();
        next.advance(w, stride);
    }
}

// One warp's part of what is asked for ahead: a lane has a slice, or the scales, of a linear; the last lanes of the first block have
// what is small.
__device__ inline void ask_ahead(const coming_linears &coming)
{
    enum { PARTS = MQ_SLICE_COUNT + 1, PIECE = 16384, LINE = 128, SMALL = WARP - MOST_SMALL };
    const uint32_t lane = threadIdx.x % WARP, linear = lane / PARTS, part = lane % PARTS;
    static_assert(MATVEC_JOBS * PARTS <= SMALL, "a lane for each");
    if (lane >= SMALL && blockIdx.x == 0 && coming.small_bytes[lane - SMALL] > 0) {
        prefetch_block(coming.small[lane - SMALL], coming.small_bytes[lane - SMALL]);
    }
    if (linear >= coming.count) {
        return;
    }
    const mq_matrix &w = coming.matrix[linear];
    const uint32_t depth = coming.table == nullptr ? coming.depth : coming.table[linear];
    const bool scales = part == MQ_SLICE_COUNT;
    if (!scales && part >= depth) {
        return;
    }
    const uint8_t *from = scales ? reinterpret_cast<const uint8_t *>(w.scale_offset) : w.plane[part];
    const size_t all = static_cast<size_t>(w.tiles) * w.groups * MQ_TILE_BYTES, most = coming.most[linear] / depth;
    const size_t wanted = (all < most ? all : most / MQ_TILE_BYTES * MQ_TILE_BYTES) / (scales ? 8 : 1);
    const size_t each = (wanted / gridDim.x + LINE) / LINE * LINE, begin = blockIdx.x * each;
    const size_t end = begin + each < wanted ? begin + each : wanted;
    for (size_t at = begin; at < end; at += PIECE) {
        prefetch_block(from + at, static_cast<uint32_t>(end - at < PIECE ? end - at : PIECE));
    }
}

// One warp, after the 32 rows of a block of gate or up: makes ready the group of the next input when they were its last.
__device__ inline void end_gated(const matvec_job &job, uint32_t block)
{
    constexpr uint32_t EACH = MQ_GROUP_SIZE / BLOCK_ROWS;
    const gated_job &to = job.gated;
    const uint32_t lane = threadIdx.x % WARP, group = block / EACH, left = matvec_blocks(job.matrix[0]) - group * EACH;
    const uint32_t parts = 2 * (left < EACH ? left : EACH);
    uint32_t before = 0;
    if (lane == 0) {
        before = atomicInc(to.arrived + group, parts - 1);
    }
    if (__shfl_sync(ALL_LANES, before, 0) != parts - 1) {
        return;
    }
    __threadfence();
    const uint32_t columns = job.matrix[0].rows, first = group * MQ_GROUP_SIZE + lane * 4;
    float gate[4], up[4], v[4], scale;
    int total, squares;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const bool inside = first + i < columns;
        gate[i] = inside ? __ldcg(job.y[0] + first + i) : 0.0f;
        up[i] = inside ? __ldcg(job.y[1] + first + i) : 0.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        v[i] = first + i < columns ? activated(to.gelu, gate[i], up[i]) : 0.0f;
    }
    const uint32_t packed = quantize_warp(v, scale, total, squares);
    reinterpret_cast<uint32_t *>(to.q)[group * (MQ_GROUP_SIZE / 4) + lane] = packed;
    if (lane == 0) {
        to.scale[group] = scale;
        to.sum[group] = scale * static_cast<float>(total);
    }
    if (to.hidden != nullptr) {
        const size_t row = static_cast<size_t>(to.groups) * (MQ_GROUP_SIZE / 4);
        const uint32_t *hidden = reinterpret_cast<const uint32_t *>(to.hidden) + group * (MQ_GROUP_SIZE / 4) + lane;
        hidden_words of_lane;
        load_hidden(hidden, row, to.n_hidden, of_lane);
        group_sums(of_lane, to.n_hidden, packed, squares, to.sums + group * (to.n_hidden + 1));
    }
}

// Of D slices in shared memory: the lane's own sum, of row `lane` of the 32.
template <int D>
__device__ inline int slot_product(const uint8_t (*slot)[SLOT_BYTES], const int8_t *q)
{
    // Four rows of a tile by sixteen columns, and as many in the other half of the group.
    const uint32_t lane = threadIdx.x % WARP, quarter = lane / 4, from = quarter / 4 * MQ_TILE_BYTES + lane % 4 * 64 + quarter % 4 * 16;
    uint4 plane[D][2], x[2];
    int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
    load_activations(q, 0, x);
#pragma unroll
    for (int e = 0; e < D; e++) {
        plane[e][0] = *reinterpret_cast<const uint4 *>(slot[e] + from);
        plane[e][1] = *reinterpret_cast<const uint4 *>(slot[e] + MQ_TILE_BYTES / 2 + from);
    }
    group_product<D>(plane, x, low, high);
    const uint32_t own = lane % 4; // all four lanes of a quarter have its rows: each keeps one
    return own == 0 ? low[0] : own == 1 ? low[2] : own == 2 ? high[0] : high[2];
}

// Adds the terms of `count` groups to y, in ascending order.
template <int D>
__device__ inline float add_terms(float y, const float2 (*term)[BLOCK_ROWS], const float *scale, const float *sum, uint32_t count)
{
    const uint32_t lane = threadIdx.x % WARP;
#pragma unroll 8
    for (uint32_t i = 0; i < count; i++) {
        const float2 of_row = term[i][lane];
        const uint32_t pair = __float_as_uint(of_row.y);
        const float step = f16_to_f32(static_cast<uint16_t>(pair & 0xffffu)) * depth_factor(D);
        const float base = fmaf(step, 0.5f, -f16_to_f32(static_cast<uint16_t>(pair >> 16)));
        y = fmaf(step * scale[i], of_row.x, y);
        y = fmaf(base, sum[i], y);
    }
    return y;
}

// Row blocks begin, begin + stride, ... of a linear.
template <int D, uint32_t WARPS>
__device__ inline void one_product(const matvec_job &job, uint32_t linear, uint32_t begin, uint32_t stride, const int8_t *q,
                                   const float *scale, const float *sum, one_shared<WARPS> &s)
{
    constexpr uint32_t ITEMS = items_of(D), GROUPS = TURN_GROUPS * WARPS;
    const mq_matrix &w = job.matrix[linear];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, groups = w.groups, blocks = matvec_blocks(w);
    const uint32_t row = lane / MQ_TILE_ROWS * 2 * MQ_TILE_ROWS + lane % MQ_TILE_ROWS; // of the lane, in a pair's halfwords
    group_walk<WARPS> next;
    next.move_to(w, begin);
    for (uint32_t i = 0; i < ITEMS; i++) {
        next.advance(w, stride);
    }
    for (uint32_t block = begin, first = 0, turn = 0, item = 0; block < blocks; turn++) {
        if (warp == WARPS - 1 && first == 0 && block + stride >= blocks) {
            ask_ahead(job.coming);
        }
#pragma unroll
        for (uint32_t u = 0; u < TURN_GROUPS; u++) {
            const uint32_t g = first + u * WARPS + warp;
            if (g < groups) {
                copy_wait<ITEMS - 1>();
                __syncwarp(); // the scales were copied by other lanes
                const uint16_t *pair = reinterpret_cast<const uint16_t *>(s.pair[warp][item]) + row;
                const uint32_t both = pair[0] | static_cast<uint32_t>(pair[MQ_TILE_ROWS]) << 16;
                const int dot = slot_product<D>(s.slot[warp] + item * D, q + g * MQ_GROUP_SIZE);
                s.term[turn % 2][g - first][lane] = make_float2(static_cast<float>(dot), __uint_as_float(both));
                __syncwarp();
                if (next.block < blocks) {
                    copy_slices(w, next, s.slot[warp] + item * D, 0, D);
                    copy_pairs(w, next, s.pair[warp][item]);
                }
                copy_commit();
                next.advance(w, stride);
                item = item + 1 == ITEMS ? 0 : item + 1;
            }
        }
        __syncthreads();
        const bool rows_end = first + GROUPS >= groups;
        if (warp == turn % WARPS) { // the others go on: the terms of the turn after next wait for the next barrier
            const float y = add_terms<D>(first == 0 ? 0.0f : s.y[lane], s.term[turn % 2], scale + first, sum + first,
                                         rows_end ? groups - first : GROUPS);
            if (rows_end) {
                write_row(job, linear, 0, block * BLOCK_ROWS + lane, y);
            } else {
                s.y[lane] = y;
            }
        }
        block = rows_end ? block + stride : block;
        first = rows_end ? 0 : first + GROUPS;
    }
}

// job.first_block counts blocks of threads, among which the row blocks of a linear are dealt out.
template <uint32_t WARPS>
static __global__ void __launch_bounds__(WARPS * WARP, 2) matvec_one(const __grid_constant__ matvec_job job)
{
    one_shared<WARPS> &s = *dynamic_shared<one_shared<WARPS>>();
    const uint32_t linear = linear_of_block(job, blockIdx.x), begin = blockIdx.x - job.first_block[linear];
    const uint32_t stride = job.first_block[linear + 1] - job.first_block[linear], warp = threadIdx.x / WARP;
    const mq_matrix &w = job.matrix[linear];
    const input_job &input = job.input;
    const input_places at = places_of(input);
    uint8_t *memory = reinterpret_cast<uint8_t *>(&s + 1);
    const bool routed = input.router.linears > 0, known = !routed && (job.table != nullptr || job.depths == nullptr);
    uint32_t depth = known ? depth_of_token(job, linear, 0) : 0;
    pdl_launch();
    bring_router(input, at, memory);
    switch (depth) {
    case 0: // not known yet, but that slice 0 will be read
        if (warp < w.groups) {
            group_walk<WARPS> next;
            next.move_to(w, begin);
            copy_slices(w, next, s.slot[warp], 0, 1);
        }
        copy_commit();
        break;
    case 1: fill_slots<1>(w, begin, stride, false, s); break;
    case 2: fill_slots<2>(w, begin, stride, false, s); break;
    case 3: fill_slots<3>(w, begin, stride, false, s); break;
    default: fill_slots<4>(w, begin, stride, false, s); break;
    }
    held_input held;
    hold_input<WARPS>(input, held);
    if (job.gated.hidden != nullptr && threadIdx.x == 0) { // the rows that end_gated() will want, a part by each block
        const uint32_t all = job.gated.n_hidden * job.gated.groups * MQ_GROUP_SIZE, each = (all / gridDim.x / 16 + 1) * 16;
        if (blockIdx.x * each < all) {
            const uint32_t from = blockIdx.x * each;
            prefetch_block(job.gated.hidden + from, all - from < each ? all - from : each);
        }
    }
    pdl_wait();
    ready_input<WARPS, sizeof s.term / sizeof(float)>(input, held, at, memory, reinterpret_cast<float *>(s.term));
    if (routed) {
        copy_wait<1>(); // all but the slice above
    }
    __syncthreads();
    if (routed) {
        route_input(input, at, memory, s.depth);
    }
    if (!known) {
        depth = routed ? s.depth[linear] : depth_of_token(job, linear, 0);
        switch (depth) {
        case 1: fill_slots<1>(w, begin, stride, true, s); break;
        case 2: fill_slots<2>(w, begin, stride, true, s); break;
        case 3: fill_slots<3>(w, begin, stride, true, s); break;
        default: fill_slots<4>(w, begin, stride, true, s); break;
        }
    }
    const int8_t *q = reinterpret_cast<const int8_t *>(memory + at.q);
    const float *scale = reinterpret_cast<const float *>(memory + at.scale), *sum = reinterpret_cast<const float *>(memory + at.sum);
    switch (depth) {
    case 1: one_product<1>(job, linear, begin, stride, q, scale, sum, s); break;
    case 2: one_product<2>(job, linear, begin, stride, q, scale, sum, s); break;
    case 3: one_product<3>(job, linear, begin, stride, q, scale, sum, s); break;
    default: one_product<4>(job, linear, begin, stride, q, scale, sum, s); break;
    }
    if (job.gated.q != nullptr) {
        const uint32_t blocks = matvec_blocks(w), step = WARPS * stride;
        __threadfence();
        __syncthreads(); // the rows of every block are written
        for (uint32_t block = begin + warp * stride; block < blocks; block += step) {
            end_gated(job, block);
        }
    }
}


static cudaError_t allow_one(bool wide, size_t wide_bytes, size_t narrow_bytes)
{
    return wide ? allow_shared(matvec_one<WIDE_WARPS>, wide_bytes) : allow_shared(matvec_one<NARROW_WARPS>, narrow_bytes);
}

#endif
