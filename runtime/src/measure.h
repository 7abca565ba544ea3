/* measure.h: what the benchmarks need from C: the machine's read bandwidth and one linear at a time, on the same pool. */
#ifndef MQ_MEASURE_H
#define MQ_MEASURE_H

#include "mobiquant.h"

/* cffi: begin */
/* Seconds of each of `repeats` passes in which n_threads read `bytes` of memory once. bytes is best many times the caches. */
mq_status mq_measure_read(uint32_t n_threads, size_t bytes, uint32_t repeats, double *seconds, mq_error *error);

/* Seconds per mat-vec (a whole linear, split over the pool as in decode) in each of `repeats` passes over enough copies of
 * a rows × columns matrix that every byte comes from memory. *bytes: planes, scales and offsets read by one mat-vec. */
mq_status mq_measure_matvec(const char *kernel, uint32_t rows, uint32_t columns, uint32_t depth, uint32_t n_threads,
                            uint32_t repeats, double *seconds, size_t *bytes, mq_error *error);
/* cffi: end */

#endif
