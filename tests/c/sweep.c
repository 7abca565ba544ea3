/* sweep.c: every length to which a file can be cut, and every byte of its metadata changed: refused, or loaded and evaluated.
 *
 *     sweep FILE CUT_STEP VALUES     cut at every CUT_STEP-th length; of the 255 other values of a byte take VALUES
 *
 * A case that takes longer than LIMIT_SECONDS ends the program, as a crash does. */
#include "harness.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

enum { LIMIT_SECONDS = 20, OTHER_VALUES = 255, STATUSES = MQ_ERR_DEVICE + 1 };

typedef struct counts {
    size_t tried, by_status[STATUSES];
} counts;

static void report(const char *what, const counts *c)
{
    (void)printf("%s: %zu tried, %zu loaded", what, c->tried, c->by_status[MQ_OK]);
    for (int status = MQ_OK + 1; status < STATUSES; status++) {
        if (c->by_status[status] > 0) {
            (void)printf(", %zu %s", c->by_status[status], mq_status_name((mq_status)status));
        }
    }
    (void)printf("\n");
}

/* NULL when it was refused. */
static mq_model *try_open(const uint8_t *data, size_t size, int32_t allow_partial, counts *c)
{
    const mq_model_options options = {.allow_partial = allow_partial};
    mq_model *model = NULL;
    (void)alarm(LIMIT_SECONDS);
    const mq_status status = open_bytes(data, size, &options, &model);
    REQUIRE((size_t)status < STATUSES);
    c->tried++;
    c->by_status[status]++;
    return model;
}

static void sweep_cuts(const uint8_t *data, size_t size, size_t step)
{
    counts whole = {0}, partial = {0};
    for (size_t cut = 0; cut < size; cut += step) {
        REQUIRE(try_open(data, cut, 0, &whole) == NULL); /* half a file is never taken for a whole one */
        mq_model *model = try_open(data, cut, 1, &partial);
        if (model != NULL) {
            evaluate_briefly(model);
            mq_model_close(model);
        }
    }
    report("cuts", &whole);
    report("cuts, opened as partial", &partial);
}

static void sweep_changes(uint8_t *data, size_t size, size_t metadata, size_t values)
{
    counts changes = {0};
    for (size_t i = 0; i < metadata; i++) {
        for (size_t k = 0; k < values; k++) {
            const uint8_t mask = (uint8_t)(1 + (i * 37 + k * OTHER_VALUES / values) % OTHER_VALUES);
            data[i] ^= mask;
            mq_model *model = try_open(data, size, 0, &changes);
            if (model != NULL) {
                mq_error error;
                const mq_status checked = mq_model_check(model, model->file.tensor_count, &error);
                REQUIRE(checked == MQ_ERR_CORRUPT || model->checksums == NULL); /* it was seen, or the key of the checksums was changed */
                evaluate_briefly(model);
                mq_model_close(model);
            }
            data[i] ^= mask;
        }
    }
    report("changed bytes of metadata", &changes);
}

int main(int count, char **arguments)
{
    if (count != 4) {
        (void)fprintf(stderr, "usage: sweep FILE CUT_STEP VALUES\n");
        return 2;
    }
    size_t size = 0;
    uint8_t *data = read_file(arguments[1], &size);
    const size_t step = strtoul(arguments[2], NULL, 10), values = strtoul(arguments[3], NULL, 10);
    REQUIRE(step >= 1 && values >= 1 && values <= OTHER_VALUES);
    counts good = {0};
    mq_model *model = try_open(data, size, 0, &good);
    REQUIRE(model != NULL);
    const size_t metadata = model->file.data_start;
    mq_model_close(model);
    sweep_cuts(data, size, step);
    sweep_changes(data, size, metadata, values);
    free(data);
    return 0;
}
