/* What is asked of thousands of objects at once; the callers are native.py, scan.py and collect.py. The numbers of the
   fields of a description, TYPE to NUMBERS, stand in native.py. */

#include <stdint.h>
#include <string.h>

typedef struct {
    intptr_t (*size)(void *list); /* of Python */
    void *(*item)(void *list, intptr_t i);
    int (*set_item)(void *list, intptr_t i, void *object);
    void (*keep)(void *object), (*let_go)(void *object);
    void *(*look_up)(void *dict, void *key);
    int (*next)(void *dict, intptr_t *position, void **key, void **value);
    int (*pause)(void), (*resume)(void); /* the garbage collector, which runs code of anybody */
    void *list, *dict, *plain, *parameter; /* classes */
    /* of torch; 0 if all is well */
    int32_t (*data_ptr)(void *tensor, void **), (*storage_size)(void *tensor, int64_t *);
    int32_t (*storage_offset)(void *tensor, int64_t *), (*sizes)(void *tensor, int64_t **);
    int32_t (*strides)(void *tensor, int64_t **), (*dim)(void *tensor, int64_t *);
    int32_t (*dtype)(void *tensor, int32_t *), (*device_index)(void *tensor, int32_t *);
    void **(*grad)(const void *tensor), *(*wrap)(void **tensor); /* 0 where torch has no such functions */
    const void *undefined;                                       /* what the gradient is where there is none */
    /* where a Python object points to its tensor, and where that points back, has its keys and points to its version, in
       words; and where in that its number is, in bytes */
    int64_t body, object, keys, version, number;
} torch_t;

typedef int32_t (*parallel_t)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);
enum { AHEAD = 12 }; /* how many objects early something is asked for */
enum { PART = 64 };  /* how many tensors of each list a thread takes at once */

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

/* A list of tensors, which description each has, -1 for none, and the descriptions; and where it is noted where tensors
   are, and where their versions. */
typedef struct {
    void *list;
    int64_t n, width;
    const int32_t *kind_of;
    const int64_t *kinds;
    int64_t *addresses, *versions;
    /* What the list is filled with, unless it is there already: what these dicts have under a key, or these tensors
       themselves, or their gradients. */
    void *from, *key;
    int64_t gradient;
    void **raw; /* n gradients, or what is under the key */
    /* a class of tensors, the word that has the tensor that is meant, and where versions of such are noted */
    void *outer;
    int64_t slot, *outers;
} column_t;

/* What is meant by a tensor: if it is distributed, the part that is here. */
static void **part_of(const column_t *c, void **object) {
    return object && object[1] == c->outer ? object[c->slot] : object;
}

/* What torch's functions take: the place of a pointer to the tensor. */
static void **tensor_of(const torch_t *t, void **object) { return object + t->body; }

/* Python's object for a tensor, if there is one; the last bit says who owns it. */
static void **object_of(const torch_t *t, void *tensor) {
    return (void **)(((const uintptr_t *)tensor)[t->object] & ~(uintptr_t)1);
}

/* The object in a column that is not one of gradients. */
static void **object_at(const torch_t *t, const column_t *c, int64_t i) {
    return part_of(c, t->item(c->from && !c->key ? c->from : c->list, i));
}

/* Whether a tensor is like its description. It must lie within its storage, which may have been freed or cut. */
static int is_like(const torch_t *t, const column_t *c, int64_t i, const void *type, void **tensor) {
    const int64_t *kind = c->kinds + c->kind_of[i] * c->width;
    if ((int64_t)(intptr_t)type != kind[TYPE] || !*tensor) return 0;
    if (((const int64_t *)*tensor)[t->keys] != kind[KEYS]) return 0;
    void *address;
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
    c->versions[i] = ((const int64_t *)*tensor)[t->version];
    return 1;
}

static void ask_for(const char *tensor) {
    for (int line = 0; line < 3; line++) __builtin_prefetch(tensor + 64 * line);
}

static void ask_for_part(const column_t *c, void **object) {
    __builtin_prefetch(object);
    if (c->outer) __builtin_prefetch(object + c->slot);
}

/* Looks at gradients; where none counts, there must be none. */
static int scan_gradients(const torch_t *t, const column_t *c, int64_t start, int64_t stop) {
    if (!t->grad || !t->wrap) return 0;
    for (int64_t i = start; i < stop; i++) {
        void **object = t->item(c->from, i), *tensor;
        if (object[1] != t->plain && object[1] != t->parameter && object[1] != c->outer) return 0;
        tensor = *tensor_of(t, object);
        if (!tensor) return 0;
        ask_for(c->raw[i] = *t->grad(tensor));
    }
    for (int64_t i = start; i < stop; i++) {
        if (c->kind_of[i] < 0 && c->raw[i] != t->undefined) return 0;
        if (c->kind_of[i] >= 0 && c->outer) ask_for_part(c, object_of(t, c->raw[i]));
    }
    for (int64_t i = start; i < stop && c->outer; i++)
        if (c->kind_of[i] >= 0) __builtin_prefetch(part_of(c, object_of(t, c->raw[i])));
    for (int64_t i = start; i < stop && c->outer; i++) {
        void **object = c->kind_of[i] < 0 ? 0 : object_of(t, c->raw[i]), **part = part_of(c, object);
        if (part && part != object) ask_for(*tensor_of(t, part));
    }
    for (int64_t i = start; i < stop; i++) {
        if (c->kind_of[i] < 0) continue;
        void **object = object_of(t, c->raw[i]), **part = part_of(c, object);
        if (object && !part) return 0;
        if (!is_like(t, c, i, part ? part[1] : t->plain, part == object ? c->raw + i : tensor_of(t, part))) return 0;
    }
    return 1;
}

/* Whether some objects are like their descriptions. Most of the time would be waiting for what is known of each, so it
   is asked for early, and of all at once. */
static int scan_part(const torch_t *t, const column_t *c, int64_t start, int64_t stop) {
    if (c->gradient) return scan_gradients(t, c, start, stop);
    for (int64_t i = start; i < stop; i++) ask_for_part(c, t->item(c->from && !c->key ? c->from : c->list, i));
    for (int64_t i = start; i < stop && c->outer; i++)
        if (c->kind_of[i] >= 0) __builtin_prefetch(object_at(t, c, i));
    for (int64_t i = start; i < stop; i++) {
        void **object = c->kind_of[i] < 0 ? 0 : object_at(t, c, i);
        if (object && (int64_t)(intptr_t)object[1] == c->kinds[c->kind_of[i] * c->width + TYPE])
            ask_for(*tensor_of(t, object));
    }
    for (int64_t i = start; i < stop; i++) {
        if (c->kind_of[i] < 0) continue;
        void **object = object_at(t, c, i);
        if (!object || !is_like(t, c, i, object[1], tensor_of(t, object))) return 0;
        if (c->outers) {
            void **outer = t->item(c->from, i);
            c->outers[i] = outer[1] == c->outer ? ((const int64_t *)*tensor_of(t, outer))[t->version] : 0;
        }
    }
    return 1;
}

/* Some lists, which threads take parts of until none is left or something differs. */
typedef struct {
    const torch_t *t;
    const column_t *columns;
    int64_t n_columns, n, n_parts, next, looked_up, differs;
    const char *caller; /* the thread that has the interpreter's lock */
} search_t;

static __thread char here; /* of each thread at a place of its own */

/* Fills lists of what dicts have under keys; returns whether all have it. */
static int look_up(search_t *s) {
    const torch_t *t = s->t;
    for (int64_t start = 0; start < s->n && !__atomic_load_n(&s->differs, __ATOMIC_RELAXED); start += PART) {
        const int64_t stop = start + PART < s->n ? start + PART : s->n;
        for (const column_t *c = s->columns; c < s->columns + s->n_columns; c++)
            for (int64_t i = start; i < stop && i < c->n && c->key; i++) {
                if (c->kind_of[i] < 0) continue;
                void **dict = t->item(c->from, i);
                if (dict[1] != t->dict) return 0;
                c->raw[i] = t->look_up(dict, c->key);
                if (!c->raw[i]) return 0;
                ask_for_part(c, c->raw[i]);
            }
        for (const column_t *c = s->columns; c < s->columns + s->n_columns; c++)
            for (int64_t i = start; i < stop && i < c->n && c->key && c->outer; i++)
                if (c->kind_of[i] >= 0) __builtin_prefetch(c->raw[i] = part_of(c, c->raw[i]), 1);
        for (const column_t *c = s->columns; c < s->columns + s->n_columns; c++)
            for (int64_t i = start; i < stop && i < c->n && c->key; i++) {
                if (c->kind_of[i] < 0) continue;
                if (!c->raw[i]) return 0;
                t->keep(c->raw[i]);
                t->set_item(c->list, i, c->raw[i]);
            }
        __atomic_store_n(&s->looked_up, stop, __ATOMIC_RELEASE);
    }
    return 1;
}

static void search(int64_t begin, int64_t end_of_range, void *data) {
    search_t *s = data;
    if (s->caller == &here && !look_up(s)) __atomic_store_n(&s->differs, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&s->differs, __ATOMIC_RELAXED)) {
        int64_t part = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED), looks_up = part >= s->n_parts;
        if (part >= 2 * s->n_parts) return;
        part -= looks_up * s->n_parts;
        const int64_t start = part * PART, end = start + PART < s->n ? start + PART : s->n;
        while (looks_up && __atomic_load_n(&s->looked_up, __ATOMIC_ACQUIRE) < end)
            if (__atomic_load_n(&s->differs, __ATOMIC_RELAXED)) return;
        for (const column_t *c = s->columns; c < s->columns + s->n_columns; c++) {
            const int64_t stop = end < c->n ? end : c->n;
            if (!c->key == !looks_up && start < stop && !scan_part(s->t, c, start, stop))
                __atomic_store_n(&s->differs, 1, __ATOMIC_RELAXED);
        }
    }
}

/* Fills a list of tensors themselves, or of gradients, which Python may not have seen yet. */
static int fill(const torch_t *t, const column_t *c) {
    for (int64_t i = -2 * AHEAD; i < c->n; i++) {
        const int64_t far = i + 2 * AHEAD, near = i + AHEAD;
        if (far < c->n) ask_for_part(c, c->gradient ? object_of(t, c->raw[far]) : t->item(c->from, far));
        if (near >= 0 && near < c->n && c->outer)
            __builtin_prefetch(part_of(c, c->gradient ? object_of(t, c->raw[near]) : t->item(c->from, near)), 1);
        if (i < 0 || (c->gradient && c->kind_of[i] < 0)) continue;
        void **object = c->gradient ? t->wrap(c->raw + i) : t->item(c->from, i), **part = part_of(c, object);
        if (part && (!c->gradient || part != object)) t->keep(part);
        if (c->gradient && object && part != object) t->let_go(object);
        if (!part) return 0;
        t->set_item(c->list, i, part);
    }
    return 1;
}

/* Whether all tensors of some lists, which are filled, are like their descriptions. No thread but the one that calls
   does anything with Python but to look objects up in lists, which nobody changes meanwhile. */
int scan(const torch_t *t, const column_t *columns, int64_t n_columns, parallel_t parallel, int64_t n_threads) {
    search_t s = {t, columns, n_columns, 0, 0, 0, 0, 0, &here};
    for (int64_t k = 0; k < n_columns; k++)
        if (columns[k].n > s.n) s.n = columns[k].n;
    s.n_parts = (s.n + PART - 1) / PART;
    if (n_threads < 2 || parallel(0, n_threads, 1, search, &s)) search(0, 1, &s);
    const int running = t->pause(); /* until gradients, which new objects are made for, are held by these */
    for (int64_t k = 0; k < n_columns && !s.differs; k++)
        if (columns[k].from && !columns[k].key) s.differs = !fill(t, columns + k);
    if (running) t->resume();
    return !s.differs;
}

/* Counts up a version, which autograd and other threads may be looking at. Inference tensors have none. */
static void count_one_up(const torch_t *t, char *version) {
    if (version) __atomic_fetch_add((uint32_t *)(version + t->number), 1, __ATOMIC_RELAXED);
}

/* Counts up versions that are at some places. */
void count_up(const torch_t *t, const int64_t *versions, const int64_t *positions, int64_t n) {
    for (int64_t k = 0; k < n; k++) {
        if (k + AHEAD < n) __builtin_prefetch((const char *)(intptr_t)versions[positions[k + AHEAD]] + t->number, 1);
        count_one_up(t, (char *)(intptr_t)versions[positions[k]]);
    }
}

/* Copies numbers that are at some positions. */
void pick(const torch_t *t, const int64_t *numbers, const int64_t *positions, int64_t n, int64_t *out) {
    for (int64_t k = 0; k < n; k++) out[k] = numbers[positions[k]];
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

/* Whether lists, one after another, hold the objects of another list, which has as many. */
int are_parts(const torch_t *t, void *parts, int64_t n_parts, void *whole) {
    for (int64_t k = 0, i = 0; k < n_parts; k++) {
        void *part = t->item(parts, k);
        if (((void **)part)[1] != t->list) return 0;
        const intptr_t n = t->size(part);
        for (intptr_t j = 0; j < n; j++)
            if (t->item(part, j) != t->item(whole, i++)) return 0;
    }
    return 1;
}
