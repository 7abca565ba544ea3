/* kernels_check.c: the promises of the kernels as a program of its own, for a CPU that is only emulated.
 *
 *     kernels_check FILE.gguf
 *
 * compares every table that this CPU supports with scalar, bit for bit, on operands that end at a page nobody may touch;
 * then evaluates a prompt with each table and prints `KERNEL BITS HASH`, where HASH is the FNV-1a of all logits.
 * Exit status 0 when everything agreed; otherwise every difference is a line on stderr.
 */
#include "kernels.h"
#include "keys.h"
#include "mobiquant.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { TOKENS = 11, PROMPT = 24 };

static int failures;

static void die(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(2);
}

static void expect_same(const char *kernel, const char *operation, size_t size, uint32_t depth, const void *a,
                        const void *b, size_t bytes)
{
    if (memcmp(a, b, bytes) != 0) {
        failures++;
        fprintf(stderr, "%s: %s of size %zu, depth %u: expected the bits of scalar\n", kernel, operation, size, depth);
    }
}

/* `bytes` zero bytes, the last of which is followed by an inaccessible page. Never freed: the program is short. */
static void *guarded(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    char *memory = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + room, page, PROT_NONE) != 0) {
        die("mmap or mprotect failed");
    }
    return memory + room - bytes;
}

static uint64_t random_bits(void)
{
    static uint64_t state = 88172645463325252u; /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Uniform in [-1, 1). */
static float random_float(void)
{
    return (float)(random_bits() >> 40) * 0x1p-23f - 1.0f;
}

static float *random_floats(size_t n, float size)
{
    float *x = guarded(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = size * random_float();
    }
    return x;
}

/* Normal f16 numbers of magnitude 2^-7 to 2. */
static uint16_t *random_halves(size_t n, bool positive)
{
    uint16_t *x = guarded(n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = (uint16_t)(0x2000u + random_bits() % 0x2000u + (positive ? 0 : random_bits() % 2 * 0x8000u));
    }
    return x;
}

/* Random slices, or all codes 255. */
static mq_matrix matrix_of(uint32_t rows, uint32_t columns, bool extreme)
{
    mq_matrix w = {.rows = rows, .columns = columns, .tiles = (rows + MQ_TILE_ROWS - 1) / MQ_TILE_ROWS,
                   .groups = (columns + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE};
    const size_t bytes = (size_t)w.tiles * w.groups * MQ_TILE_BYTES;
    for (int e = 0; e < MQ_SLICE_COUNT; e++) {
        uint8_t *plane = guarded(bytes);
        for (size_t i = 0; i < bytes; i++) {
            plane[i] = extreme ? 0xff : (uint8_t)random_bits();
        }
        w.plane[e] = plane;
    }
    w.scale_offset = random_halves((size_t)w.tiles * w.groups * 2 * MQ_TILE_ROWS, true);
    return w;
}

static mq_activations activations_of(uint32_t groups, int extreme)
{
    const size_t n = (size_t)TOKENS * groups;
    mq_activations x = {guarded(n * MQ_GROUP_SIZE), random_floats(n, 1.0f), random_floats(n, 100.0f), groups};
    for (size_t i = 0; i < n * MQ_GROUP_SIZE; i++) {
        x.q[i] = extreme != 0 ? (int8_t)extreme : (int8_t)((int)(random_bits() % 255) - 127);
    }
    return x;
}

static void check_linear(const mq_kernels *ours, const mq_kernels *scalar, const mq_matrix *w, const mq_activations *x)
{
    const size_t bytes = w->rows * sizeof(float), stride = w->rows;
    uint32_t *token = guarded(TOKENS * sizeof *token);
    for (uint32_t i = 0; i < TOKENS; i++) {
        token[i] = i * 4 % TOKENS; /* in an order of their own */
    }
    for (uint32_t depth = 1; depth <= MQ_SLICE_COUNT; depth++) {
        float *y[2] = {guarded(bytes * TOKENS), guarded(bytes * TOKENS)};
        ours->matvec(w, depth, x->q, x->scale, x->sum, 0, w->tiles, y[0]);
        scalar->matvec(w, depth, x->q, x->scale, x->sum, 0, w->tiles, y[1]);
        expect_same(ours->name, "matvec", w->columns, depth, y[0], y[1], bytes);
        ours->matmat(w, depth, x, token, TOKENS, 0, w->tiles, y[0], stride);
        scalar->matmat(w, depth, x, token, TOKENS, 0, w->tiles, y[1], stride);
        expect_same(ours->name, "matmat", w->columns, depth, y[0], y[1], bytes * TOKENS);
    }
}

static void check_linears(const mq_kernels *ours, const mq_kernels *scalar)
{
    static const uint32_t rows[] = {1, 17, 40}, columns[] = {1, 300, 2200};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const mq_matrix w = matrix_of(rows[i], columns[i], false);
        const mq_activations x = activations_of(w.groups, 0);
        check_linear(ours, scalar, &w, &x);
    }
    const mq_matrix w = matrix_of(16, 256, true);
    for (int sign = -1; sign <= 1; sign += 2) {
        const mq_activations x = activations_of(w.groups, 127 * sign);
        check_linear(ours, scalar, &w, &x);
    }
}

static void check_quantize(const mq_kernels *ours, const mq_kernels *scalar, const float *x, size_t n)
{
    const size_t groups = (n + MQ_GROUP_SIZE - 1) / MQ_GROUP_SIZE;
    struct quantized {
        int8_t *q;
        float *scale, *sum, squares;
    } out[2];
    for (int i = 0; i < 2; i++) {
        out[i].q = guarded(groups * MQ_GROUP_SIZE);
        out[i].scale = guarded(groups * sizeof(float));
        out[i].sum = guarded(groups * sizeof(float));
        out[i].squares = (i == 0 ? ours : scalar)->quantize(x, n, out[i].q, out[i].scale, out[i].sum);
    }
    expect_same(ours->name, "quantize (codes)", n, 0, out[0].q, out[1].q, groups * MQ_GROUP_SIZE);
    expect_same(ours->name, "quantize (scale)", n, 0, out[0].scale, out[1].scale, groups * sizeof(float));
    expect_same(ours->name, "quantize (sum)", n, 0, out[0].sum, out[1].sum, groups * sizeof(float));
    expect_same(ours->name, "quantize (squares)", n, 0, &out[0].squares, &out[1].squares, sizeof(float));
    const int8_t *hidden = activations_of((uint32_t)groups, 0).q;
    float *h[2] = {guarded(TOKENS * sizeof(float)), guarded(TOKENS * sizeof(float))};
    ours->router_hidden(hidden, TOKENS, out[1].q, out[1].scale, groups, h[0]);
    scalar->router_hidden(hidden, TOKENS, out[1].q, out[1].scale, groups, h[1]);
    expect_same(ours->name, "router_hidden", n, 0, h[0], h[1], TOKENS * sizeof(float));
}

static void check_vectors(const mq_kernels *ours, const mq_kernels *scalar, float *x, size_t n)
{
    const size_t bytes = n * sizeof(float);
    const float *weight = random_floats(n, 3.0f);
    float *y[2] = {guarded(bytes), guarded(bytes)};
    uint16_t *half[2] = {guarded(n * sizeof **half), guarded(n * sizeof **half)};
    for (int i = 0; i < 2; i++) {
        (i == 0 ? ours : scalar)->to_f16(x, half[i], n);
    }
    expect_same(ours->name, "to_f16", n, 0, half[0], half[1], n * sizeof **half);
    for (int i = 0; i < 2; i++) {
        (i == 0 ? ours : scalar)->rmsnorm(x, weight, n, 1e-5f, y[i]);
    }
    expect_same(ours->name, "rmsnorm", n, 0, y[0], y[1], bytes);
    for (int i = 0; i < 2; i++) {
        memcpy(y[i], x, bytes);
        (i == 0 ? ours : scalar)->swiglu(y[i], weight, n);
    }
    expect_same(ours->name, "swiglu", n, 0, y[0], y[1], bytes);
    for (int i = 0; i < 2; i++) {
        (i == 0 ? ours : scalar)->add(y[i], weight, n);
    }
    expect_same(ours->name, "add", n, 0, y[0], y[1], bytes);
    if (n % 2 == 0) {
        for (int i = 0; i < 2; i++) {
            (i == 0 ? ours : scalar)->rope(y[i], weight, weight + n / 2, n);
        }
        expect_same(ours->name, "rope", n, 0, y[0], y[1], bytes);
    }
}

static int8_t *random_bytes(size_t n)
{
    int8_t *x = guarded(n);
    for (size_t i = 0; i < n; i++) {
        x[i] = (int8_t)random_bits();
    }
    return x;
}

/* Tokens that see up to `seen` positions of a chunk, and their parts joined to one another's. */
static void check_attention(const mq_kernels *ours, const mq_kernels *scalar, size_t seen, size_t tokens, size_t window,
                            bool int8)
{
    enum { HEADS = 3, DIM = 36, PADDED = 48, GROUPS = 2, PART = PADDED + MQ_PART_TAIL };
    const size_t first = seen > tokens ? seen - tokens + 1 : 1, positions = (first + tokens - 1 + 15) / 16 * 16;
    const mq_queries queries = {random_floats(tokens * HEADS * DIM, 4.0f), tokens, HEADS * DIM, HEADS, DIM, 0.3f,
                                window};
    const size_t count = first + tokens - 1;
    mq_stored stored = {.key = random_halves(positions * DIM, false), .value = random_halves(count * PADDED, false)};
    if (int8) {
        stored = (mq_stored){random_bytes(positions * DIM), random_bytes(count * PADDED), random_halves(positions * GROUPS, true),
                             random_halves(count * GROUPS, true)};
    }
    const size_t bytes = tokens * HEADS * PART * sizeof(float);
    float *part[2] = {guarded(bytes), guarded(bytes)};
    for (int i = 0; i < 2; i++) {
        (i == 0 ? ours : scalar)->attend(&queries, first, &stored, part[i]);
    }
    expect_same(ours->name, "attend", seen, 0, part[0], part[1], bytes);
    for (int i = 0; i < 2; i++) {
        (i == 0 ? ours : scalar)->join(part[i], part[i] + (tokens * HEADS - 1) * PART, DIM);
    }
    expect_same(ours->name, "join", seen, 0, part[0], part[1], PART * sizeof(float));
}

static void check_table(const mq_kernels *ours, const mq_kernels *scalar)
{
    static const float extremes[] = {0.0f, -0.0f, 200.0f, -200.0f, 1e-30f, 70000.0f, 6e-8f, -6e-6f};
    static const size_t sizes[] = {1, 15, 16, 100, 128, 129, 640};
    check_linears(ours, scalar);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (float size = 1e-32f; size < 1e10f; size *= 1e8f) {
            check_quantize(ours, scalar, random_floats(sizes[i], size), sizes[i]);
        }
        float *x = random_floats(sizes[i], 9.0f);
        memcpy(x, extremes, sizes[i] * sizeof *x < sizeof extremes ? sizes[i] * sizeof *x : sizeof extremes);
        check_vectors(ours, scalar, x, sizes[i]);
        for (int int8 = 0; int8 < 2; int8++) {
            check_attention(ours, scalar, sizes[i] < 256 ? sizes[i] : 256, sizes[i] % 9 + 1, 0, int8 != 0);
            check_attention(ours, scalar, sizes[i] < 256 ? sizes[i] : 256, sizes[i] % 9 + 1, sizes[i] % 23 + 1, int8 != 0);
        }
        x[sizes[i] / 2] = NAN;
        check_quantize(ours, scalar, x, sizes[i]);
        x[sizes[i] / 2] = -INFINITY;
        check_quantize(ours, scalar, x, sizes[i]);
    }
}

static uint64_t fnv1a(const void *data, size_t bytes)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++) {
        hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    }
    return hash;
}

static void must(mq_status status, const mq_error *error)
{
    if (status != MQ_OK) {
        die(error->message);
    }
}

static void print_hashes(const mq_model *model, const char *kernel)
{
    static const float budgets[] = {2.0f, 3.5f, 4.0f, 5.2f, 6.0f, 8.0f};
    mq_model_info info;
    mq_model_get_info(model, &info);
    const size_t bytes = PROMPT * (size_t)info.vocab_size * sizeof(float);
    const mq_session_options options = {.kernel = kernel};
    mq_error error;
    mq_session *session;
    must(mq_session_open(model, &options, &session, &error), &error);
    int32_t tokens[PROMPT];
    for (int32_t i = 0; i < PROMPT; i++) {
        tokens[i] = i * 37 % (int32_t)info.vocab_size;
    }
    float *logits = guarded(bytes), *last = logits + (PROMPT - 1) * (size_t)info.vocab_size;
    for (size_t i = 0; i < sizeof budgets / sizeof *budgets; i++) {
        must(mq_session_rewind(session, 0, &error), &error);
        must(mq_session_set_average_bits(session, budgets[i], &error), &error);
        must(mq_session_eval(session, tokens, PROMPT - 1, logits, PROMPT - 1, &error), &error);
        must(mq_session_eval(session, tokens + PROMPT - 1, 1, last, 1, &error), &error);
        printf("%s %.1f %016llx\n", kernel, (double)budgets[i], (unsigned long long)fnv1a(logits, bytes));
    }
    mq_session_close(session);
}

int main(int count, char **arguments)
{
    mq_error error;
    mq_model *model;
    if (count != 2) {
        die("usage: kernels_check FILE.gguf");
    }
    must(mq_model_open(arguments[1], NULL, &model, &error), &error);
    const mq_kernels *scalar = mq_kernels_find("scalar");
    for (size_t i = 0; mq_kernels_at(i) != NULL; i++) {
        if (mq_kernel_supported(i)) {
            check_table(mq_kernels_at(i), scalar);
            print_hashes(model, mq_kernel_name(i));
        }
    }
    mq_model_close(model);
    return failures == 0 ? 0 : 1;
}
