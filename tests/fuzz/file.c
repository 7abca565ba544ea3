/* file.c: a fuzz target that opens files. An input is a list of edits to a good file, so that almost all of it stays well-formed
 * and the edits reach past the first check: keys and tensors are taken apart, changed, and written with what follows from them. */
#include "base.h"
#include "check.h"

#include <string.h>

enum { MAX_EDITS = 24, MAX_ENTRIES = 256, SPARE_BYTES = 4096, CHECK = 6, EVALUATE = 7 };

enum edit {
    EDIT_KEY_VALUE, EDIT_KEY_TYPE, EDIT_KEY_NAME, EDIT_KEY_SIZE, EDIT_KEY_DROP, EDIT_KEY_TWICE, EDIT_TENSOR_NAME, EDIT_TENSOR_RENAME,
    EDIT_TENSOR_DIMENSION, EDIT_TENSOR_DIMENSIONS, EDIT_TENSOR_TYPE, EDIT_TENSOR_OFFSET, EDIT_TENSOR_DROP, EDIT_TENSOR_TWICE,
    EDIT_TENSOR_DATA, EDIT_KEY_COUNT, EDIT_TENSOR_COUNT, EDIT_BYTES, EDIT_CUT, EDIT_TAIL, EDITS
};

typedef struct entry_key {
    uint8_t name[MQ_MAX_KEY_NAME + 8];
    uint64_t name_size;
    uint32_t type;
    const uint8_t *value; /* after the type */
    size_t size;          /* of it that is written; zeros past `own` */
    size_t own;
    uint8_t patch[8];     /* over the value from patch_at on */
    size_t patch_at, patch_size;
} entry_key;

typedef struct entry_tensor {
    uint8_t name[MQ_MAX_TENSOR_NAME + 8];
    uint64_t name_size;
    uint32_t dimensions, type;
    uint64_t length[MQ_MAX_DIMENSIONS + 1]; /* the fastest first */
    uint64_t shift;                         /* added to the offset that follows from the sizes */
    const uint8_t *data;
    size_t size;
    uint32_t fill; /* a f32 or two f16 written at fill_at when not 0 */
    size_t fill_at;
} entry_tensor;

typedef struct builder {
    entry_key keys[MAX_ENTRIES];
    entry_tensor tensors[MAX_ENTRIES];
    size_t key_count, tensor_count;
    uint64_t claimed_keys, claimed_tensors; /* added to the counts */
    size_t cut, tail;
    uint64_t bytes;
    size_t bytes_at, bytes_size;
} builder;

static builder good;
static uint8_t *built;
static size_t capacity;

static size_t padding(size_t size)
{
    return (MQ_ALIGNMENT - size % MQ_ALIGNMENT) % MQ_ALIGNMENT;
}

/* Take the good file apart with the reader itself; the bytes of a key's value end where the next key begins. */
int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerInitialize(int *count, char ***arguments)
{
    (void)count;
    (void)arguments;
    const size_t size = (size_t)(fuzz_base_end - fuzz_base);
    gguf_file file;
    mq_error error;
    REQUIRE(gguf_open("base", fuzz_base, size, 0, &file, &error) == MQ_OK);
    REQUIRE(file.key_count < MAX_ENTRIES / 2 && file.tensor_count < MAX_ENTRIES / 2);
    for (size_t i = 0; i < file.tensor_count; i++) {
        const gguf_tensor *tensor = &file.tensors[i];
        entry_tensor *entry = &good.tensors[tensor->index];
        memcpy(entry->name, tensor->name.text, tensor->name.size);
        entry->name_size = tensor->name.size;
        entry->type = tensor->type;
        entry->dimensions = MQ_MAX_DIMENSIONS;
        for (size_t d = 0; d < MQ_MAX_DIMENSIONS; d++) {
            entry->length[d] = tensor->shape[MQ_MAX_DIMENSIONS - 1 - d];
        }
        entry->data = fuzz_base + tensor->offset;
        entry->size = tensor->size;
    }
    for (size_t i = 0; i < file.key_count; i++) {
        const gguf_key *key = &file.keys[i];
        entry_key *entry = &good.keys[i];
        memcpy(entry->name, key->name.text, key->name.size);
        entry->name_size = key->name.size;
        entry->value = (const uint8_t *)key->name.text + key->name.size + sizeof(uint32_t);
        memcpy(&entry->type, entry->value - sizeof(uint32_t), sizeof entry->type);
        const uint8_t *end = fuzz_base + size;
        for (size_t j = 0; j < file.key_count; j++) { /* the nearest beginning after this key */
            const uint8_t *other = (const uint8_t *)file.keys[j].name.text - sizeof(uint64_t);
            end = other > entry->value && other < end ? other : end;
        }
        for (size_t j = 0; j < file.tensor_count; j++) {
            const uint8_t *other = (const uint8_t *)file.tensors[j].name.text - sizeof(uint64_t);
            end = other > entry->value && other < end ? other : end;
        }
        entry->size = entry->own = (size_t)(end - entry->value);
    }
    good.key_count = file.key_count;
    good.tensor_count = file.tensor_count;
    gguf_close(&file);
    good.cut = SIZE_MAX;
    capacity = 2 * size + SPARE_BYTES;
    built = malloc(capacity);
    REQUIRE(built != NULL);
    return 0;
}

static void drop(void *entries, size_t width, size_t *count, size_t at)
{
    if (*count > 1) {
        uint8_t *place = (uint8_t *)entries + at * width;
        (*count)--;
        memmove(place, place + width, (*count - at) * width);
    }
}

static void twice(void *entries, size_t width, size_t *count, size_t from)
{
    if (*count < MAX_ENTRIES) {
        memcpy((uint8_t *)entries + *count * width, (uint8_t *)entries + from * width, width);
        (*count)++;
    }
}

static void edit_key(builder *b, enum edit edit, fuzz_input *in)
{
    const size_t at = fuzz_take(in, 1) % b->key_count;
    entry_key *key = &b->keys[at];
    if (edit == EDIT_KEY_VALUE) {
        key->patch_at = fuzz_take(in, 2) % (key->size + 1);
        key->patch_size = 1 + fuzz_take(in, 1) % sizeof key->patch;
        const uint64_t value = fuzz_take(in, 1) % 2 != 0 ? fuzz_take_edge(in) : fuzz_take(in, sizeof value);
        memcpy(key->patch, &value, sizeof key->patch);
    } else if (edit == EDIT_KEY_TYPE) {
        key->type = fuzz_take(in, 1) % 2 != 0 ? (uint32_t)fuzz_take_edge(in) : (uint32_t)fuzz_take(in, 1);
    } else if (edit == EDIT_KEY_NAME) {
        key->name[fuzz_take(in, 1)] = (uint8_t)fuzz_take(in, 1);
        key->name_size = fuzz_take(in, 1) % 4 == 0 ? fuzz_take_edge(in) : key->name_size;
    } else if (edit == EDIT_KEY_SIZE) {
        key->size = fuzz_take(in, 2) % (key->own + 64);
    } else if (edit == EDIT_KEY_DROP) {
        drop(b->keys, sizeof *b->keys, &b->key_count, at);
    } else {
        twice(b->keys, sizeof *b->keys, &b->key_count, at);
    }
}

static void edit_tensor(builder *b, enum edit edit, fuzz_input *in)
{
    const size_t at = fuzz_take(in, 1) % b->tensor_count;
    entry_tensor *tensor = &b->tensors[at];
    if (edit == EDIT_TENSOR_NAME) {
        tensor->name[fuzz_take(in, 1) % MQ_MAX_TENSOR_NAME] = (uint8_t)fuzz_take(in, 1);
        tensor->name_size = fuzz_take(in, 1) % 4 == 0 ? fuzz_take_edge(in) : tensor->name_size;
    } else if (edit == EDIT_TENSOR_RENAME) {
        const entry_tensor *other = &b->tensors[fuzz_take(in, 1) % b->tensor_count];
        memmove(tensor->name, other->name, sizeof tensor->name);
        tensor->name_size = other->name_size;
    } else if (edit == EDIT_TENSOR_DIMENSION) {
        uint64_t *length = &tensor->length[fuzz_take(in, 1) % MQ_MAX_DIMENSIONS];
        const uint64_t how = fuzz_take(in, 1) % 3;
        *length = how == 0 ? fuzz_take_edge(in) : how == 1 ? *length * fuzz_take(in, 1) : *length / (1 + fuzz_take(in, 1));
    } else if (edit == EDIT_TENSOR_DIMENSIONS) {
        tensor->dimensions = (uint32_t)(fuzz_take(in, 1) % 8 != 0 ? fuzz_take(in, 1) % 6 : fuzz_take_edge(in));
    } else if (edit == EDIT_TENSOR_TYPE) {
        static const uint32_t types[] = {GGML_F32, GGML_F16, GGML_I8};
        tensor->type = fuzz_take(in, 1) % 2 != 0 ? types[fuzz_take(in, 1) % 3] : (uint32_t)fuzz_take_edge(in);
    } else if (edit == EDIT_TENSOR_OFFSET) {
        tensor->shift = fuzz_take_edge(in);
    } else if (edit == EDIT_TENSOR_DROP) {
        drop(b->tensors, sizeof *b->tensors, &b->tensor_count, at);
    } else if (edit == EDIT_TENSOR_TWICE) {
        twice(b->tensors, sizeof *b->tensors, &b->tensor_count, at);
    } else {
        static const uint32_t fills[] = {0x7fc00000u, 0x7f800000u, 0xff7fffffu, 0x7e007c00u, 0xfbff7bffu, 0x00000001u, 0x80008000u};
        tensor->fill = fills[fuzz_take(in, 1) % (sizeof fills / sizeof fills[0])];
        tensor->fill_at = fuzz_take(in, 2);
    }
}

static void edit_whole(builder *b, enum edit edit, fuzz_input *in)
{
    if (edit == EDIT_KEY_COUNT) {
        b->claimed_keys = fuzz_take_edge(in);
    } else if (edit == EDIT_TENSOR_COUNT) {
        b->claimed_tensors = fuzz_take_edge(in);
    } else if (edit == EDIT_BYTES) {
        b->bytes_at = fuzz_take(in, 2);
        b->bytes_size = 1 + fuzz_take(in, 1) % sizeof b->bytes;
        b->bytes = fuzz_take(in, sizeof b->bytes);
    } else if (edit == EDIT_CUT) {
        b->cut = fuzz_take(in, 3);
    } else {
        b->tail = fuzz_take(in, 1);
    }
}

static void put(size_t *at, const void *data, size_t size)
{
    if (*at + size <= capacity) {
        memcpy(built + *at, data, size);
        *at += size;
    }
}

static void put_u32(size_t *at, uint32_t value)
{
    put(at, &value, sizeof value);
}

static void put_u64(size_t *at, uint64_t value)
{
    put(at, &value, sizeof value);
}

static void put_zeros(size_t *at, size_t size)
{
    if (*at + size <= capacity) {
        memset(built + *at, 0, size);
        *at += size;
    }
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t build(const builder *b)
{
    size_t at = 0;
    put(&at, "GGUF", 4);
    put_u32(&at, 3);
    put_u64(&at, b->tensor_count + b->claimed_tensors);
    put_u64(&at, b->key_count + b->claimed_keys);
    for (size_t i = 0; i < b->key_count; i++) {
        const entry_key *key = &b->keys[i];
        put_u64(&at, key->name_size);
        put(&at, key->name, least(key->name_size, sizeof key->name));
        put_u32(&at, key->type);
        const size_t start = at, own = least(key->size, key->own);
        put(&at, key->value, own);
        put_zeros(&at, key->size - own);
        if (key->patch_at < at - start) {
            memcpy(built + start + key->patch_at, key->patch, least(key->patch_size, at - start - key->patch_at));
        }
    }
    uint64_t place = 0;
    for (size_t i = 0; i < b->tensor_count; i++) {
        const entry_tensor *tensor = &b->tensors[i];
        put_u64(&at, tensor->name_size);
        put(&at, tensor->name, least(tensor->name_size, sizeof tensor->name));
        put_u32(&at, tensor->dimensions);
        put(&at, tensor->length, sizeof tensor->length[0] * least(tensor->dimensions, MQ_MAX_DIMENSIONS + 1));
        put_u32(&at, tensor->type);
        put_u64(&at, place + tensor->shift);
        place += tensor->size + padding(tensor->size);
    }
    put_zeros(&at, padding(at));
    for (size_t i = 0; i < b->tensor_count; i++) {
        const entry_tensor *tensor = &b->tensors[i];
        const size_t start = at;
        put(&at, tensor->data, tensor->size);
        put_zeros(&at, padding(at));
        if (tensor->fill != 0 && at - start >= sizeof tensor->fill) {
            memcpy(built + start + tensor->fill_at % (at - start - sizeof tensor->fill + 1) / sizeof tensor->fill * sizeof tensor->fill,
                   &tensor->fill, sizeof tensor->fill);
        }
    }
    put_zeros(&at, b->tail);
    for (size_t i = 0; i < b->bytes_size && b->bytes_at + i < at; i++) {
        built[b->bytes_at + i] ^= (uint8_t)(b->bytes >> (8 * i));
    }
    return least(at, b->cut);
}

/* The whole file is read, and tokens evaluated, for an eighth of the inputs each: they take a hundred times as long as opening. */
static void use(const mq_model *model, uint64_t flags)
{
    mq_error error = {MQ_OK, ""};
    if (flags % 8 == CHECK) {
        const mq_status checked = mq_check_all(model, &error);
        REQUIRE(checked == MQ_OK || (checked == MQ_ERR_CORRUPT && error.message[0] != '\0'));
    }
    static const char *const names[] = {"general.name", "tokenizer.huggingface.json", "tokenizer.chat_template",
                                        "tokenizer.ggml.bos_token_id", "mobiquant.static.order", "mobiquant.router.budgets"};
    volatile uint8_t seen = 0; /* every byte that is handed out is there */
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *text = NULL;
        size_t size = 0, count = 0;
        uint32_t values[4] = {0};
        (void)mq_model_string(model, names[i], &text, &size, &error);
        for (size_t j = 0; j < size; j += 61) {
            seen = (uint8_t)(seen ^ (uint8_t)text[j]);
        }
        (void)mq_model_u32(model, names[i], values, sizeof values / sizeof values[0], &count, &error);
    }
    if (flags % 8 == EVALUATE) {
        evaluate_briefly(model);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static builder b;
    memcpy(&b, &good, sizeof b);
    fuzz_input in = {data, size};
    const uint64_t flags = fuzz_take(&in, 1);
    for (size_t i = 0; i < MAX_EDITS && in.size > 0; i++) {
        const enum edit edit = (enum edit)(fuzz_take(&in, 1) % EDITS);
        if (edit < EDIT_TENSOR_NAME) {
            edit_key(&b, edit, &in);
        } else if (edit < EDIT_KEY_COUNT) {
            edit_tensor(&b, edit, &in);
        } else {
            edit_whole(&b, edit, &in);
        }
    }
    const mq_model_options options = {.allow_partial = (flags >> 3) & 1};
    mq_model *model = NULL;
    if (open_bytes(built, build(&b), &options, &model) == MQ_OK) {
        use(model, flags);
        mq_model_close(model);
    }
    return 0;
}
