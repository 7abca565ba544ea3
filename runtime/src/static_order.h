/* static_order.h: which depth of its own every linear has at a static budget (docs/format.md, Static budgets). */
#ifndef MQ_STATIC_ORDER_H
#define MQ_STATIC_ORDER_H

#include "gguf.h"
#include "model.h"

/* The file's optional order of raises: *order [3·7·block_count], linears as block·7 + place, to be freed; NULL when the file
 * has none. MQ_ERR_FORMAT unless every linear is in it once for each slice after the base. */
mq_status mq_static_order_read(const gguf_file *file, uint32_t block_count, uint32_t **order, mq_error *error);

/* Depths [block_count][7], none above the slices present: the base everywhere, then raises in the file's order as long as
 * the average bits per routed weight are at most `bits`. The model must have an order. */
void mq_static_depths(const mq_model *model, float bits, uint8_t *depths);

#endif
