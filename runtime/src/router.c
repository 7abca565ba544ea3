/* router.c: scores and gates. The arithmetic here is the same code under every kernel, so decisions never differ. */
#include "router.h"

#include <math.h>

void mq_router_thresholds(const mq_router *router, const mq_hparams *hparams, float average_bits, float *thresholds)
{
    const uint32_t count = hparams->budget_count;
    const float *budgets = hparams->budgets;
    size_t next = 1;
    while (next + 1 < count && budgets[next] < average_bits) {
        next++;
    }
    const float share = (average_bits - budgets[next - 1]) / (budgets[next] - budgets[next - 1]);
    for (size_t i = 0; i < (size_t)router->linears * MQ_GATES; i++) {
        const float *table = router->threshold + i * count;
        if (average_bits <= budgets[0]) {
            thresholds[i] = INFINITY;
        } else if (average_bits >= budgets[count - 1]) {
            thresholds[i] = -INFINITY;
        } else {
            thresholds[i] = table[next - 1] + share * (table[next] - table[next - 1]);
        }
    }
}

size_t mq_router_bytes(const mq_router *router, const mq_hparams *hparams)
{
    const size_t n_hidden = hparams->router_hidden, gates = (size_t)router->linears * MQ_GATES;
    return n_hidden * router->groups * MQ_GROUP_SIZE + sizeof(float) * (2 * n_hidden + gates * (n_hidden + 2));
}

void mq_router_depths(const mq_router *router, const mq_hparams *hparams, const float *thresholds, const float *hidden,
                      float squares, uint32_t max_depth, uint8_t *depths)
{
    const uint32_t n_hidden = hparams->router_hidden;
    const float rms = sqrtf(squares / (float)router->columns + 1e-12f);
    float features[MQ_MAX_ROUTER_HIDDEN + 1];
    for (size_t h = 0; h < n_hidden; h++) {
        const float v = hidden[h] * router->hidden_scale[h] / rms + router->hidden_bias[h];
        features[h] = v > 0.0f ? v : 0.0f;
    }
    features[n_hidden] = (float)log2((double)rms); /* rounded once: float versions differ between C libraries */
    for (size_t l = 0; l < router->linears; l++) {
        uint32_t depth = 1;
        while (depth < max_depth) { /* slice e is read only when slice e − 1 is */
            const size_t gate = l * MQ_GATES + depth - 1;
            const float *head = router->head + gate * (n_hidden + 1);
            float score = 0.0f;
            for (size_t h = 0; h <= n_hidden; h++) {
                score += head[h] * features[h];
            }
            if (!(score + router->head_bias[gate] > thresholds[gate])) {
                break;
            }
            depth++;
        }
        depths[l] = (uint8_t)depth;
    }
}
