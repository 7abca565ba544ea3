/* rope.c: angles in float32 like the reference's, powers, cosines and sines in double. */
#include "rope.h"

#include <math.h>
#include <stdbool.h>

/* Dynamic scaling turns position p by the frequencies of a text of p + 1 tokens: those that a model gets which reads token by
 * token, and the same however the tokens are split into batches. 1 up to the original context. */
static double stretch(const mq_hparams *hp, size_t position)
{
    if (hp->rope_scaling != MQ_SCALING_DYNAMIC || position < hp->rope_original) {
        return 1.0;
    }
    const double factor = (double)hp->rope_factor, length = (double)(position + 1);
    return factor * length / (double)hp->rope_original - (factor - 1.0);
}

void mq_rope_fill(const mq_model *model, size_t table, size_t count, float *cosine, float *sine)
{
    const mq_hparams *hp = &model->hparams;
    const bool main = table == 0; /* the other one is never scaled */
    const size_t half = hp->rope_dim / 2;
    for (size_t p = 0; p < count; p++) {
        const double stretched = main ? stretch(hp, p) : 1.0;
        for (size_t i = 0; i < half; i++) {
            float frequency = model->inv_freq[table][i];
            if (stretched != 1.0) { /* a base · s^(d / (d − 2)) in place of the base */
                frequency = (float)((double)frequency * pow(stretched, -2.0 * (double)i / (double)(hp->rope_dim - 2)));
            }
            const float angle = (float)p * frequency, size = main ? hp->rope_attention : 1.0f;
            cosine[p * half + i] = (float)cos((double)angle) * size;
            sine[p * half + i] = (float)sin((double)angle) * size;
        }
    }
}
