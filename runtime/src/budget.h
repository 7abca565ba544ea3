/* budget.h: which thresholds a session's next tokens are routed with (docs/format.md, Running correction). */
#ifndef MQ_BUDGET_H
#define MQ_BUDGET_H

#include "session.h"

/* Set the thresholds for the tokens from the position on; returns how many of the next `n` they hold for, at least 1. */
uint32_t mq_budget_begin(mq_session *session, uint32_t n);

#endif
