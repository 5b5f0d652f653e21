/* What is asked of thousands of objects at once; the callers are native.py, scan.py and collect.py. The numbers of the
   fields of a description, TYPE to NUMBERS, stand in native.py. */

#include <stdint.h>
#include <string.h>

typedef struct {
    void *(*item)(void *list, intptr_t i); /* of Python */
    int (*set_item)(void *list, intptr_t i, void *object);
    void (*keep)(void *object), (*let_go)(void *object);
    void *(*ask)(void *object, void *name), *(*look_up)(void *dict, void *key);
    int (*next)(void *dict, intptr_t *position, void **key, void **value);
    void *none, *dict;
    /* of torch; 0 if all is well */
    int32_t (*data_ptr)(void *tensor, void **), (*storage_size)(void *tensor, int64_t *);
    int32_t (*storage_offset)(void *tensor, int64_t *), (*sizes)(void *tensor, int64_t **);
    int32_t (*strides)(void *tensor, int64_t **), (*dim)(void *tensor, int64_t *);
    int32_t (*dtype)(void *tensor, int32_t *), (*device_index)(void *tensor, int32_t *);
    void **(*grad)(const void *tensor), *(*wrap)(void **tensor); /* 0 where torch has no such functions */
    /* where a Python object points to its tensor, and where that has its keys and points to its version, in words;
       and where in that its number is, in bytes */
    int64_t body, keys, version, number;
} torch_t;

typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
enum { AHEAD = 12 }; /* how many tensors early something is asked for */
enum { PART = 128 }; /* how many tensors a thread takes at once */

/* What a tensor is; how large its elements are, and how far they reach, is left to whoever knows. */
static int describe_one(const torch_t *t, void **object, int64_t width, int64_t *out) {
    void *tensor = object + t->body;
    int64_t *numbers;
    int32_t dtype, device;
    out[TYPE] = (int64_t)(intptr_t)object[1];
    out[KEYS] = ((const int64_t *)object[t->body])[t->keys];
    if (t->dtype(tensor, &dtype) || t->device_index(tensor, &device) || t->dim(tensor, out + DIM)) return 1;
    if (NUMBERS + 2 * out[DIM] > width) return 1;
    out[DTYPE] = dtype, out[DEVICE] = device, out[ITEMSIZE] = out[SPAN] = 0;
    if (t->sizes(tensor, &numbers)) return 1;
    memcpy(out + NUMBERS, numbers, 8 * out[DIM]);
    if (t->strides(tensor, &numbers)) return 1;
    memcpy(out + NUMBERS + out[DIM], numbers, 8 * out[DIM]);
    return 0;
}

/* Describes tensors of torch's own classes; returns how many it could, one after another. */
int64_t describe(const torch_t *t, void *list, int64_t n, int64_t width, int64_t *out) {
    for (int64_t i = 0; i < n; i++)
        if (describe_one(t, t->item(list, i), width, out + i * width)) return i;
    return n;
}

/* A list, which description each of its objects has, -1 for none, and the descriptions; and where it is noted where
   tensors are, and where their versions. */
typedef struct {
    void *list;
    int64_t n, width;
    const int32_t *kind_of;
    const int64_t *kinds;
    int64_t *addresses, *versions;
} column_t;

/* Whether some objects are like their descriptions. A tensor must lie within its storage, which may have been freed or
   cut. Most of the time would be waiting for what is known of each, so it is asked for early. */
static int scan_part(const torch_t *t, const column_t *c, int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) {
        if (i + 2 * AHEAD < stop) __builtin_prefetch(t->item(c->list, i + 2 * AHEAD));
        if (i + AHEAD < stop && c->kind_of[i + AHEAD] >= 0) {
            void **object = t->item(c->list, i + AHEAD);
            if ((int64_t)(intptr_t)object[1] == c->kinds[c->kind_of[i + AHEAD] * c->width + TYPE])
                for (int line = 0; line < 3; line++) __builtin_prefetch((char *)object[t->body] + 64 * line);
        }
        c->addresses[i] = c->versions[i] = 0;
        if (c->kind_of[i] < 0) continue;
        const int64_t *kind = c->kinds + c->kind_of[i] * c->width;
        void **object = t->item(c->list, i), *tensor = object + t->body, *address;
        if ((int64_t)(intptr_t)object[1] != kind[TYPE] || !object[t->body]) return 0;
        if (((const int64_t *)object[t->body])[t->keys] != kind[KEYS]) return 0;
        int32_t number;
        int64_t dim, *numbers, bytes, offset;
        if (t->dtype(tensor, &number) || number != kind[DTYPE]) return 0;
        if (t->device_index(tensor, &number) || number != kind[DEVICE]) return 0;
        if (t->dim(tensor, &dim) || dim != kind[DIM]) return 0;
        if (t->sizes(tensor, &numbers) || memcmp(numbers, kind + NUMBERS, 8 * dim)) return 0;
        if (t->strides(tensor, &numbers) || memcmp(numbers, kind + NUMBERS + dim, 8 * dim)) return 0;
        if (t->data_ptr(tensor, &address)) return 0;
        if (kind[SPAN] && (t->storage_size(tensor, &bytes) || t->storage_offset(tensor, &offset))) return 0;
        if (kind[SPAN] && offset * kind[ITEMSIZE] + kind[SPAN] > bytes) return 0;
        c->addresses[i] = (int64_t)(intptr_t)address;
        c->versions[i] = ((const int64_t *)object[t->body])[t->version];
    }
    return 1;
}

/* Some lists, which threads take parts of until none is left or something differs. */
typedef struct {
    const torch_t *t;
    const column_t *columns;
    int64_t n_columns, next, differs;
} search_t;

static void search(void *data) {
    search_t *s = data;
    while (!__atomic_load_n(&s->differs, __ATOMIC_RELAXED)) {
        int64_t part = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED), c = 0;
        for (; c < s->n_columns && part * PART >= s->columns[c].n; c++) part -= (s->columns[c].n + PART - 1) / PART;
        if (c == s->n_columns) return;
        const int64_t start = part * PART, stop = start + PART < s->columns[c].n ? start + PART : s->columns[c].n;
        if (!scan_part(s->t, s->columns + c, start, stop)) __atomic_store_n(&s->differs, 1, __ATOMIC_RELAXED);
    }
}

/* Whether all objects of some lists are like their descriptions. No thread but the one that calls does anything with
   Python but to look objects up in lists, which nobody changes meanwhile. */
int scan(const torch_t *t, const column_t *columns, int64_t n_columns, parallel_t parallel, int64_t n_threads) {
    search_t s = {t, columns, n_columns, 0, 0};
    if (n_threads > 1) parallel(search, &s, (unsigned)n_threads, 0);
    else search(&s);
    return !s.differs;
}

/* Counts up a version, which autograd and other threads may be looking at. Inference tensors have none. */
static void count_one_up(const torch_t *t, char *version) {
    if (version) __atomic_fetch_add((uint32_t *)(version + t->number), 1, __ATOMIC_RELAXED);
}

/* Counts up the versions of tensors of a class; returns how many, one after another. */
int64_t count_up_all(const torch_t *t, void *list, int64_t n, void *type) {
    for (int64_t i = 0; i < n; i++) {
        void **object = t->item(list, i);
        if (object[1] != type || !object[t->body]) return i;
        count_one_up(t, ((char **)object[t->body])[t->version]);
    }
    return n;
}

/* Counts up versions that are at some places. */
void count_up(const torch_t *t, const int64_t *versions, const int64_t *positions, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        if (k + AHEAD < n) __builtin_prefetch((const char *)(intptr_t)versions[positions[k + AHEAD]] + t->number, 1);
        count_one_up(t, (char *)(intptr_t)versions[positions[k]]);
    }
}

/* Puts the gradients of tensors of a class into a list; returns how many, one after another. */
int64_t gradients(const torch_t *t, void *list, int64_t n, void *type, void *name, void *out) {
    if (!t->grad || !t->wrap) return 0;
    for (int64_t i = 0; i < n; i++) {
        void **object = t->item(list, i);
        if (object[1] != type || !object[t->body]) return i;
        void *grad = t->wrap(t->grad(object[t->body]));
        if (grad == t->none) t->let_go(grad), grad = t->ask(object, name); /* which may have something to say */
        if (!grad) return i;
        t->set_item(out, i, grad);
    }
    return n;
}

/* Puts what objects of a class have in a slot into a list; returns how many have something there, one after another. */
int64_t slots(const torch_t *t, void *list, int64_t n, void *type, int64_t word, void *out) {
    for (int64_t i = 0; i < n; i++) {
        if (i + 2 * AHEAD < n) __builtin_prefetch(t->item(list, i + 2 * AHEAD));
        if (i + AHEAD < n) {
            void **later = t->item(list, i + AHEAD);
            if (later[1] == type) __builtin_prefetch(later[word], 1);
        }
        void **object = t->item(list, i);
        if (object[1] != type || !object[word]) return i;
        t->keep(object[word]);
        t->set_item(out, i, object[word]);
    }
    return n;
}

/* Puts what dicts have under some keys into a list for each key; returns how many dicts have all, one after another. */
int64_t items(const torch_t *t, void *dicts, int64_t n, void *keys, int64_t n_keys, void *out) {
    for (int64_t i = 0; i < n; i++) {
        if (i + 2 * AHEAD < n) __builtin_prefetch(t->item(dicts, i + 2 * AHEAD));
        if (i + AHEAD < n) {
            void **later = t->item(dicts, i + AHEAD);
            for (int k = 2; k < 6 && later[1] == t->dict; k++) __builtin_prefetch(later[k]); /* whatever that is */
        }
        void **dict = t->item(dicts, i);
        if (dict[1] != t->dict) return i;
        for (int64_t k = 0; k < n_keys; k++) {
            void *value = t->look_up(dict, t->item(keys, k));
            if (!value) return i;
            t->keep(value);
            t->set_item(t->item(out, k), i, value);
        }
    }
    return n;
}

/* Whether dicts have, one after another, the keys and values of two lists, and nothing else. */
int hold(const torch_t *t, void *dicts, int64_t n_dicts, void *keys, void *values, int64_t n) {
    void *key, *value;
    int64_t i = 0;
    for (int64_t d = 0; d < n_dicts; d++)
        for (intptr_t position = 0; t->next(t->item(dicts, d), &position, &key, &value); i++)
            if (i == n || key != t->item(keys, i) || value != t->item(values, i)) return 0;
    return i == n;
}

/* Whether two lists hold the same objects. */
int same(const torch_t *t, void *a, void *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (t->item(a, i) != t->item(b, i)) return 0;
    return 1;
}
