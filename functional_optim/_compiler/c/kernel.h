/*
 * Start of every emitted kernel. `REAL` is the type that it computes in, defined before this text; a reader of this
 * file alone gets float.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

typedef void (*range_t)(int64_t begin, int64_t end, void *data);

typedef struct {
  int64_t n_leaves, n_rows;
  int64_t n_partials, first_partial;   /* chunks of all groups, and those before this group's */
  const int64_t *chunk_leaf, *chunk_start, *chunk_stop;
  const int64_t *leaf_chunk;           /* a leaf's first chunk; n_leaves + 1 numbers */
  const int64_t *leaf_size, *leaf_row;
  void *const *const *addresses;       /* an array of n_leaves addresses per input and output */
  const double *scalars;               /* n_rows rows */
  double *const *partials;             /* n_partials numbers per reduction */
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, range_t work, void *data); /* 0: done */
  int64_t n_threads;
  const int64_t *runs;                 /* first chunks of what a thread takes at once; n_runs + 1 numbers */
  int64_t n_runs, next_run;
  double *of_row, *of_leaf;            /* uniform values */
} launch_t;

static inline float from_bf16(uint16_t x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
static inline uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return f != f ? 0x7fc0 : (uint16_t)rounded;
}
#if defined(__FLT16_MANT_DIG__) && !defined(SOFT_F16)
static inline float from_f16(uint16_t x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
static inline uint16_t to_f16(float f) { _Float16 h = (_Float16)f; uint16_t x; memcpy(&x, &h, 2); return x; }
#else
static inline float from_f16(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = (uint32_t)(x & 0x7fff) << 13, u;
  float f;
  if (rest >= 0x0f800000) { u = sign | (rest + 0x70000000); memcpy(&f, &u, 4); return f; }  /* inf, nan */
  memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4); u |= sign; memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t to_f16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  /* rounds to infinity */
  if (u < 0x38800000) {  /* subnormal: let the addition round */
    float g; memcpy(&g, &u, 4); g += 0.5f; memcpy(&u, &g, 4);
    return (uint16_t)(sign | (u - 0x3f000000));
  }
  return (uint16_t)(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13));
}
#endif

static inline void prefetch(const void *start, const void *stop) {
  for (const char *line = start; line < (const char *)stop; line += 64) __builtin_prefetch(line);
}

/* Two factors of a number, both in the range of float; the second is 1 where the number is in it. Two products in float
   are faster than one in double and its conversions. */
static inline float near_factor(double x) {
  return (float)(fabs(x) < 0x1p-120 ? 0x1p-120 : x > 0x1p120 ? 0x1p120 : x < -0x1p120 ? -0x1p120 : x);
}
static inline float far_factor(double x) {
  return fabs(x) < 0x1p-120 || fabs(x) > 0x1p120 ? (float)(x / (double)near_factor(x)) : 1.0f;
}

static inline void fold_sum(double *lanes, const double *x, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += x[i + j];
  for (; i < n; ++i) lanes[i & 7] += x[i];
}
static inline double done_sum(const double *x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
static inline double larger(double a, double b) { return (b > a || b != b) ? b : a; }
static inline void fold_amax(double *lanes, const double *x, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] = larger(lanes[j], x[i + j]);
  for (; i < n; ++i) lanes[i & 7] = larger(lanes[i & 7], x[i]);
}
static inline double done_amax(const double *x) {
  double y = x[0];
  for (int j = 1; j < 8; ++j) y = larger(y, x[j]);
  return y;
}
static inline double total_sum(const double *x, int64_t n) {
  double y = 0;
  for (int64_t i = 0; i < n; ++i) y += x[i];
  return y;
}
static inline double total_amax(const double *x, int64_t n) {
  double y = -INFINITY;
  for (int64_t i = 0; i < n; ++i) y = larger(y, x[i]);
  return y;
}
