/* rope.h: cosines and sines of every position. */
#ifndef MQ_ROPE_H
#define MQ_ROPE_H

#include "model.h"

/* Rotary table `table` of the model for positions 0 .. count − 1: [count][rope_dim / 2] each. */
void mq_rope_fill(const mq_model *model, size_t table, size_t count, float *cosine, float *sine);

#endif
