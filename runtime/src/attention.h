/* attention.h: from queries, keys and values of a batch to what the heads saw. */
#ifndef MQ_ATTENTION_H
#define MQ_ATTENTION_H

#include "session.h"

enum { MQ_ATTENTION_TOKENS = 8 }; /* of a prompt, that go through the cache together */

/* Rotate the queries and keys of the session's batch of n tokens, store keys and values of block `block` in the cache, and
 * attend: batch.q, k, v -> batch.attended. */
void mq_attention_run(mq_session *session, uint32_t block, uint32_t n);

#endif
