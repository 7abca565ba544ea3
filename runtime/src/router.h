/* router.h: from a quantised token to the depth of each linear that reads it (docs/format.md, Routers). */
#ifndef MQ_ROUTER_H
#define MQ_ROUTER_H

#include "model.h"

enum { MQ_GATES = MQ_SLICE_COUNT - 1 };

/* Thresholds at `average_bits`, linear between the file's budgets: thresholds [linears][3]. At 2 bits and less +inf, at 8
 * and more −inf, so that those budgets are exact. */
void mq_router_thresholds(const mq_router *router, const mq_hparams *hparams, float average_bits, float *thresholds);

/* Bytes of the file that routing one token reads: hidden layer and heads (thresholds are read when the budget is set). */
size_t mq_router_bytes(const mq_router *router, const mq_hparams *hparams);

/* Depths of one token: hidden [router_hidden] from the kernel of that name, squares from `quantize`. depths [linears],
 * at most max_depth. */
void mq_router_depths(const mq_router *router, const mq_hparams *hparams, const float *thresholds, const float *hidden,
                      float squares, uint32_t max_depth, uint8_t *depths);

#endif
