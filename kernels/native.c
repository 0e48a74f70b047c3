/* The recurrence on a CPU, for GCC and Clang, with their own vectors and no intrinsics.

    forward     h_t  = act(z_t + W h_{t-1})               z = W_ih x + b in, the output out
    backward    dz_t = act'(h_t) (g_t + W^T dz_{t+1})     g the output's gradient, h the output

Both are one loop: a step's rows begin with what is known before (z_t or g_t), a product with the rows of the
step before is added, and a function of each element ends it. A product of few rows, as of a single step or of its
gradients, is a function of its own, which packs a weight only where it is used often enough.

    columns     PANEL at a time. W lies in panels [k][PANEL], packed once a call, so that a step reads it in order.
    k           in blocks of 64, each a sum of its own: the block of a panel stays in the first cache while up to
                32 rows use it, and a long sum rounds less in short ones.
    rows        up to 6 at a time, whose sums of PANEL columns fill the registers.

A sum's order depends on the sizes, as they decide what is packed; not on threads, nor on the tile that a row fell
into. So the bits don't either.

Compiled for float, or with -DDOUBLE for double; elman/native.py compiles it and packs the arguments. -ffast-math
must not be given: NaN and infinity count, and linking with it makes the whole process flush denormals.
*/
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef DOUBLE
typedef double real;
typedef int64_t word; /* of a real's size */
#else
typedef float real;
typedef int32_t word;
#endif

#if defined __AVX512F__
enum { BYTES = 64, VECTORS = 4 }; /* of 32 registers 24 hold sums, 4 a row of the panel */
#elif defined __AVX__
enum { BYTES = 32, VECTORS = 2 }; /* of 16 registers 12 and 2 */
#else
enum { BYTES = 16, VECTORS = 4 };
#endif
enum {
    LANES = BYTES / sizeof(real),
    PANEL = VECTORS * LANES,
    TILE = 6,   /* rows of a tile */
    ROWS = 32,  /* rows of a work item, at most */
    BLOCK = 64, /* summands of one sum */
    LINE = 128, /* bytes that no two threads may write into: a cache line and its neighbour */
};
typedef real vec __attribute__((vector_size(BYTES)));
typedef word mask __attribute__((vector_size(BYTES)));

#define UNROLL _Pragma("GCC unroll 8") /* without it GCC keeps the sums on the stack */
#define INLINE static inline __attribute__((always_inline))
#if defined __aarch64__ && !defined __clang__ /* GCC would load all rows' scalars at once, and keep sums on the stack */
#define IN_ORDER __attribute__((optimize("no-schedule-insns")))
#else
#define IN_ORDER
#endif

INLINE vec get(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void put(real *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec get_some(const real *p, int64_t n) { /* n >= 1; zeros behind them */
    if (n >= LANES) return get(p);
    real e[LANES] = {0};
    for (int i = 0; i < n; i++) e[i] = p[i];
    return get(e);
}
INLINE void put_some(real *p, vec v, int64_t n) {
    if (n >= LANES) {
        put(p, v);
        return;
    }
    real e[LANES];
    put(e, v);
    for (int i = 0; i < n; i++) p[i] = e[i];
}
INLINE vec pick(mask where, vec a, vec b) { return (vec)((where & (mask)a) | (~where & (mask)b)); }
INLINE vec all(real x) { return x - (vec){0}; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* tanh x = m / (m + 2) with m = e^2x - 1, of |x|, as 2^n (e^r - 1) + (2^n - 1): right to 2 ulp everywhere. */
#ifdef DOUBLE
#define LAST 19.5 /* from here on tanh is 1 */
#define MAGIC 0x1.8p52 /* added and taken away again, it rounds to an integer */
#define MANTISSA 52
#define LN2_HIGH 0x1.62e42feep-1
#define LN2_LOW 1.9082149292705877e-10
/* (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, at Chebyshev's points: right to 4e-17 of e^r - 1 */
static const real SERIES[] = {2.51005692758136826e-8,  2.76203274282682382e-7,  2.75572680728900983e-6,
                              2.48015207925726928e-5,  1.98412698633032233e-4,  1.38888889175382958e-3,
                              8.33333333333001176e-3,  4.16666666666234768e-2,  0.166666666666666675,
                              0.5};
#else
#define LAST 9.1f
#define MAGIC 0x1.8p23f
#define MANTISSA 23
#define LN2_HIGH 0x1.62ep-1f
#define LN2_LOW 3.1946184945309415e-05f
static const real SERIES[] = {1.39263256181334621e-3f, 8.36329275303060231e-3f, 4.16665537625676384e-2f,
                              0.166665763055606383f, 0.5f}; /* 2.5e-8 */
#endif

INLINE vec tanh_of(vec x) {
    mask sign = (mask)x & (mask)all((real)-0.0);
    vec a = (vec)((mask)x ^ sign);
    a = pick(a > LAST, all(LAST), a); /* NaN stays: the comparison is false */
    vec y = a + a, shifted = y * (real)(1 / 0.69314718055994530942) + MAGIC, n = shifted - MAGIC;
    vec r = y - n * LN2_HIGH;
    r -= n * LN2_LOW;
    vec p = all(SERIES[0]);
    UNROLL for (int i = 1; i < (int)(sizeof SERIES / sizeof *SERIES); i++) p = p * r + SERIES[i];
    vec q = p * (r * r) + r; /* e^r - 1 */
    vec power = (vec)(((mask)shifted << MANTISSA) + (mask)all(1)); /* 2^n: n is in the lowest bits */
    vec m = power * q + (power - 1);
    return (vec)((mask)(m / (m + 2)) | sign);
}

enum { TANH, RELU, NONE };
INLINE vec act_of(int64_t act, vec v) { return act == NONE ? v : act == RELU ? pick(v < 0, all(0), v) : tanh_of(v); }
/* The gradient of v, from g, that of h = act(v). */
INLINE vec before_act(int64_t act, vec g, vec h) { return act == RELU ? pick(h <= 0, all(0), g) : g * (1 - h * h); }

/* A float rounded to the nearest of bfloat16 or float16, ties to even. */
enum { KEEP, BFLOAT16, FLOAT16 };
INLINE vec round_to(vec x, int64_t rounding) {
#ifndef DOUBLE
    typedef uint32_t bits __attribute__((vector_size(BYTES))); /* unsigned: a NaN's may wrap around */
    bits given = (bits)x;
    if (rounding == BFLOAT16) {
        bits up = given + (0x7fff + ((given >> 16) & 1));
        return pick(x == x, (vec)(up & ~0xffffu), x);
    }
    if (rounding == FLOAT16) {
        bits sign = given & (bits)all(-0.0f), size = given ^ sign;
        vec a = (vec)size;
        vec small = (a + 0.75f) - 0.75f; /* below 2^-14 they are 2^-24 apart, as floats are at 0.75 */
        bits up = (size + (0xfff + ((size >> 13) & 1))) & ~0x1fffu;
        vec large = pick((vec)up > 65504.0f, all(__builtin_inff()), (vec)up);
        vec rounded = pick(a < 0x1p-14f, small, large);
        return pick(x == x, (vec)((bits)rounded | sign), x);
    }
#endif
    (void)rounding;
    return x;
}

/* Numbers of bfloat16 or float16 as reals, and reals rounded to such. */
static void widen(const uint16_t *from, int64_t n, int64_t rounding, real *to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t sign = (from[i] & 0x8000u) << 16, size = from[i] & 0x7fffu, bits = size << 16;
        if (rounding == FLOAT16) {
            float small = (float)(int)size * 0x1p-24f; /* below 2^-14 */
            memcpy(&bits, &small, sizeof bits);
            bits = size >= 0x7c00 ? 0x7f800000 | size << 13 : size >= 0x400 ? (size << 13) + (112 << 23) : bits;
        }
        float wide;
        bits |= sign;
        memcpy(&wide, &bits, sizeof wide);
        to[i] = wide;
    }
}
static void narrow(real *from, int64_t n, int64_t rounding, uint16_t *to) {
    for (int64_t i = 0; i < n; i += LANES) put_some(from + i, round_to(get_some(from + i, n - i), rounding), n - i);
    for (int64_t i = 0; i < n; i++) {
        float wide = (float)from[i];
        uint32_t bits;
        memcpy(&bits, &wide, sizeof bits);
        uint32_t sign = bits & 0x80000000, size = bits ^ sign, half = size >> 16, none = size > 0x7f800000;
        if (rounding == FLOAT16) {
            int small = size < 0x38800000; /* below 2^-14 */
            half = size == 0x7f800000 ? 0x7c00 : (size - (112 << 23)) >> 13;
            if (small) half = (uint32_t)(int)((sign ? -wide : wide) * 0x1p24f);
        }
        to[i] = (uint16_t)(sign >> 16 | (none ? 0x7fc0 | half : half)); /* a NaN stays one in either */
    }
}

/* ---- The product: totals (rows, PANEL) += h (rows, n) w (n, PANEL), n at most BLOCK ---- */

#define DEFINE_TILE(R)                                                                                        \
    static void tile_##R(const real *const *h, int64_t k, const real *w, int n, real *totals) {               \
        vec sum[R][VECTORS] = {{{0}}};                                                                        \
        const real *rows[R];                                                                                  \
        UNROLL for (int r = 0; r < R; r++) rows[r] = h[r] + k;                                                \
        for (int i = 0; i < n; i++, w += PANEL) {                                                             \
            vec b[VECTORS];                                                                                   \
            UNROLL for (int j = 0; j < VECTORS; j++) b[j] = get(w + j * LANES);                               \
            UNROLL for (int r = 0; r < R; r++)                                                                \
                UNROLL for (int j = 0; j < VECTORS; j++) sum[r][j] += rows[r][i] * b[j];                      \
        }                                                                                                     \
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < VECTORS; j++) {                         \
            real *total = totals + r * PANEL + j * LANES;                                                     \
            put(total, get(total) + sum[r][j]);                                                               \
        }                                                                                                     \
    }
DEFINE_TILE(1) DEFINE_TILE(2) DEFINE_TILE(3) DEFINE_TILE(4) DEFINE_TILE(5) IN_ORDER DEFINE_TILE(6)

typedef void tile(const real *const *, int64_t, const real *, int, real *);
static tile *const TILES[] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

/* A single row: nn.RNN has a dot product here, whose sums are short. Four sums, each of every fourth summand. */
static void single(const real *h, const real *w, int n, real *totals) {
    vec sum[4][VECTORS] = {{{0}}};
    int i = 0;
    for (; i + 4 <= n; i += 4, w += 4 * PANEL)
        UNROLL for (int c = 0; c < 4; c++) UNROLL for (int j = 0; j < VECTORS; j++)
            sum[c][j] += h[i + c] * get(w + c * PANEL + j * LANES);
    for (; i < n; i++, w += PANEL)
        UNROLL for (int j = 0; j < VECTORS; j++) sum[0][j] += h[i] * get(w + j * LANES);
    UNROLL for (int j = 0; j < VECTORS; j++)
        put(totals + j * LANES, get(totals + j * LANES) + ((sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j])));
}

static void product(const real *const *h, int rows, int alone, const real *panel, int64_t K, real *totals) {
    int tiles = (rows + TILE - 1) / TILE;
    for (int64_t k = 0; k < K; k += BLOCK, panel += BLOCK * PANEL) {
        int n = K - k < BLOCK ? (int)(K - k) : BLOCK;
        if (alone) {
            single(h[0] + k, panel, n, totals);
            continue;
        }
        for (int i = 0, r = 0; i < tiles; i++) {
            int size = (rows - r + tiles - i - 1) / (tiles - i); /* as even as can be */
            TILES[size](h + r, k, panel, n, totals + r * PANEL);
            r += size;
        }
    }
}

typedef real four __attribute__((vector_size(4 * sizeof(real))));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef word four_words __attribute__((vector_size(4 * sizeof(real))));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_words){__VA_ARGS__})
#endif

/* to (4, PANEL) = from (4, 4)^T, whose rows lie `pitch` apart. */
INLINE void transpose_4(const real *from, int64_t pitch, real *to) {
    four r[4];
    UNROLL for (int i = 0; i < 4; i++) memcpy(r + i, from + i * pitch, sizeof *r);
    four a = SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = SHUFFLE(r[2], r[3], 0, 4, 1, 5);
    four c = SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    four turned[] = {SHUFFLE(a, b, 0, 1, 4, 5), SHUFFLE(a, b, 2, 3, 6, 7), SHUFFLE(c, d, 0, 1, 4, 5),
                     SHUFFLE(c, d, 2, 3, 6, 7)};
    UNROLL for (int i = 0; i < 4; i++) memcpy(to + i * PANEL, turned + i, sizeof *r);
}

/* panels [k][PANEL] of m (K, N), whose elements lie `by_k` and `by_n` apart; zeros past N. */
static void pack(const real *m, int64_t by_k, int64_t by_n, int64_t K, int64_t N, real *panels) {
    for (int64_t n0 = 0; n0 < N; n0 += PANEL, panels += K * PANEL) {
        int width = N - n0 < PANEL ? (int)(N - n0) : PANEL;
        const real *from = m + n0 * by_n;
        if (width < PANEL) memset(panels, 0, K * PANEL * sizeof(real));
        if (by_n == 1 && width == PANEL) /* a copy of a constant size is no call */
            for (int64_t k = 0; k < K; k++) memcpy(panels + k * PANEL, from + k * by_k, PANEL * sizeof(real));
        else if (by_n == 1)
            for (int64_t k = 0; k < K; k++) memcpy(panels + k * PANEL, from + k * by_k, width * sizeof(real));
        else
            for (int64_t k0 = 0; k0 < K; k0 += 16) {
                int64_t end = at_most(k0 + 16, K), whole = by_k == 1 && end == k0 + 16 ? width / 4 * 4 : 0;
                for (int j = 0; j < whole; j += 4)
                    for (int64_t k = k0; k < end; k += 4)
                        transpose_4(from + j * by_n + k, by_n, panels + k * PANEL + j);
                for (int64_t j = whole; j < width; j++)
                    for (int64_t k = k0; k < end; k++) panels[k * PANEL + j] = from[j * by_n + k * by_k];
            }
    }
}

/* ---- Products of few rows: out = act(a_1 w_1^T + a_2 w_2^T + b_1 + b_2), and those for gradients ---- */

enum { TILE_ROWS = 3, TILE_COLUMNS = 4, WIDE = 4, STRETCH = 32 * LANES }; /* STRETCH: summands whose sums are vectors */

INLINE real sum_of(vec v) {
    real e[LANES];
    put(e, v);
    UNROLL for (int half = LANES / 2; half; half /= 2) UNROLL for (int i = 0; i < half; i++) e[i] += e[i + half];
    return e[0];
}

/* The sums of four vectors' lanes. */
INLINE four sums_of(const vec *v) {
    if (LANES < 4) return (four){sum_of(v[0]), sum_of(v[1]), sum_of(v[2]), sum_of(v[3])};
    four s[4] = {{0}}, part;
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int l = 0; l < LANES; l += 4) {
        memcpy(&part, (const real *)(v + i) + l, sizeof part);
        s[i] += part;
    }
    four low = SHUFFLE(s[0], s[1], 0, 4, 1, 5) + SHUFFLE(s[0], s[1], 2, 6, 3, 7);
    four high = SHUFFLE(s[2], s[3], 0, 4, 1, 5) + SHUFFLE(s[2], s[3], 2, 6, 3, 7);
    return SHUFFLE(low, high, 0, 1, 4, 5) + SHUFFLE(low, high, 2, 3, 6, 7);
}

/* totals (R, C) += a (R, K) w (C, K)^T: each element a dot product along memory, whose lanes are added up later. */
#define DEFINE_DOTS(R, C, CHAINS)                                                                             \
    static void dots_##R##_##C(const real *a, int64_t a_r, const real *w, int64_t w_c, int64_t K, vec *totals) { \
        for (int64_t k0 = 0; k0 < K; k0 += CHAINS * STRETCH) {                                                \
            int64_t n = K - k0 < CHAINS * STRETCH ? K - k0 : CHAINS * STRETCH, k = k0;                        \
            vec sum[CHAINS][R][C] = {{{{0}}}};                                                                \
            for (; k + CHAINS * LANES <= k0 + n; k += CHAINS * LANES)                                         \
                UNROLL for (int i = 0; i < CHAINS; i++) {                                                     \
                    vec x[R];                                                                                 \
                    UNROLL for (int r = 0; r < R; r++) x[r] = get(a + r * a_r + k + i * LANES);               \
                    UNROLL for (int c = 0; c < C; c++) {                                                      \
                        vec y = get(w + c * w_c + k + i * LANES);                                             \
                        UNROLL for (int r = 0; r < R; r++) sum[i][r][c] += x[r] * y;                          \
                    }                                                                                         \
                }                                                                                             \
            for (; k < k0 + n; k += LANES) {                                                                  \
                int64_t some = k0 + n - k;                                                                    \
                UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++)                         \
                    sum[0][r][c] += get_some(a + r * a_r + k, some) * get_some(w + c * w_c + k, some);        \
            }                                                                                                 \
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {                           \
                UNROLL for (int i = 1; i < CHAINS; i++) sum[0][r][c] += sum[i][r][c];                         \
                totals[r * C + c] += sum[0][r][c];                                                            \
            }                                                                                                 \
        }                                                                                                     \
    }
DEFINE_DOTS(1, 1, 4) DEFINE_DOTS(2, 1, 2) DEFINE_DOTS(3, 1, 2)
DEFINE_DOTS(1, 4, 2) DEFINE_DOTS(2, 4, 1) DEFINE_DOTS(3, 4, 1)

typedef void dots(const real *, int64_t, const real *, int64_t, int64_t, vec *);
static dots *const DOTS[][2] = {{0}, {dots_1_1, dots_1_4}, {dots_2_1, dots_2_4}, {dots_3_1, dots_3_4}};

struct affine {
    int64_t act, rounding;        /* where it isn't KEEP, w and out are of 16 bits; in affine()'s argument all are */
    int64_t N, H;                 /* rows, columns of the result */
    int64_t K[2], a_r[2], w_c[2]; /* summands; how far apart rows of a and of w lie */
    int64_t out_r, bias_r;        /* bias[0] has rows so far apart, too; 0: one for all */
    const real *a[2], *w[2], *bias[2]; /* (N, K), (H, K), (H,) or NULL */
    real *out;
    int64_t threads;
    int64_t across; /* a product alone: w[0] is (K, H), rows w_c apart; no w[1], bias or act */
};

/* Columns of a slice, whole panels. */
INLINE int64_t width_of(const struct affine *s, int64_t slices) {
    return (s->H + slices * PANEL - 1) / (slices * PANEL) * PANEL;
}

/* Of s the columns from c on, at most `wide` of them. */
static struct affine columns_of(const struct affine *s, int64_t c, int64_t wide) {
    struct affine part = *s;
    int64_t size = s->rounding ? sizeof(uint16_t) : sizeof(real);
    part.H = at_most(s->H - c, wide);
    part.out = (real *)((char *)s->out + c * size);
    for (int i = 0; i < 2; i++) {
        if (s->K[i]) part.w[i] = (const real *)((const char *)s->w[i] + (s->across ? c : c * s->w_c[i]) * size);
        if (s->bias[i]) part.bias[i] += c;
    }
    return part;
}

INLINE real bias_of(const struct affine *s, int64_t row, int64_t column) {
    real b = s->bias[0] ? s->bias[0][row * s->bias_r + column] : 0;
    return s->bias[1] ? b + s->bias[1][column] : b;
}

enum {
    FEW_ROWS = 12, /* that don't repay packing the weights */
    FEW_ACROSS = 4 /* rows, or summands, that don't, where w's rows are what is added up */
};

INLINE int is_packed(const struct affine *s) {
    if (s->across) return s->N > FEW_ACROSS && s->K[0] > FEW_ACROSS;
    return s->N > FEW_ROWS;
}

/* For more rows than a few: each panel of the weights is packed and then used by all of them. */
static void by_panels(const struct affine *s, real *room) {
    real *totals = room + (s->K[0] + s->K[1]) * PANEL;
    for (int64_t n = 0; n < s->H; n += PANEL) {
        int64_t width = at_most(PANEL, s->H - n);
        pack(s->w[0] + n * s->w_c[0], 1, s->w_c[0], s->K[0], width, room);
        if (s->K[1]) pack(s->w[1] + n * s->w_c[1], 1, s->w_c[1], s->K[1], width, room + s->K[0] * PANEL);
        for (int64_t r0 = 0; r0 < s->N; r0 += ROWS) {
            int rows = (int)at_most(ROWS, s->N - r0);
            const real *from[2][ROWS];
            for (int r = 0; r < rows; r++) {
                for (int i = 0; i < 2 && s->K[i]; i++) from[i][r] = s->a[i] + (r0 + r) * s->a_r[i];
                for (int64_t e = 0; e < PANEL; e++) totals[r * PANEL + e] = e < width ? bias_of(s, r0 + r, n + e) : 0;
            }
            product(from[0], rows, 0, room, s->K[0], totals);
            if (s->K[1]) product(from[1], rows, 0, room + s->K[0] * PANEL, s->K[1], totals);
            for (int r = 0; r < rows; r++)
                for (int64_t e = 0; e < width; e += LANES) {
                    vec v = act_of(s->act, get(totals + r * PANEL + e));
                    put_some(s->out + (r0 + r) * s->out_r + n + e, v, width - e);
                }
        }
    }
}

/* Sums along w's rows, which are read once and in order: of a few rows a. */
static void few_rows(const struct affine *s) {
    enum { CHUNK = 32 * LANES, AT_ONCE = 4 };
    for (int64_t c0 = 0; c0 < s->H; c0 += CHUNK) {
        int64_t width = at_most(CHUNK, s->H - c0);
        vec totals[FEW_ACROSS][CHUNK / LANES] = {{{0}}};
        for (int64_t k0 = 0; k0 < s->K[0]; k0 += BLOCK) {
            int64_t k = k0, k1 = at_most(k0 + BLOCK, s->K[0]);
            vec sums[FEW_ACROSS][CHUNK / LANES] = {{{0}}};
            for (; k + AT_ONCE <= k1; k += AT_ONCE)
                for (int64_t c = 0; c < width; c += LANES) {
                    const real *from = s->w[0] + k * s->w_c[0] + c0 + c;
                    vec w[AT_ONCE];
                    UNROLL for (int i = 0; i < AT_ONCE; i++) w[i] = get_some(from + i * s->w_c[0], width - c);
                    for (int64_t r = 0; r < s->N; r++) {
                        const real *a = s->a[0] + r * s->a_r[0] + k;
                        sums[r][c / LANES] += (a[0] * w[0] + a[1] * w[1]) + (a[2] * w[2] + a[3] * w[3]);
                    }
                }
            for (; k < k1; k++)
                for (int64_t c = 0; c < width; c += LANES) {
                    vec w = get_some(s->w[0] + k * s->w_c[0] + c0 + c, width - c);
                    for (int64_t r = 0; r < s->N; r++) sums[r][c / LANES] += s->a[0][r * s->a_r[0] + k] * w;
                }
            for (int64_t r = 0; r < s->N; r++)
                for (int64_t c = 0; c < width; c += LANES) totals[r][c / LANES] += sums[r][c / LANES];
        }
        for (int64_t r = 0; r < s->N; r++)
            for (int64_t c = 0; c < width; c += LANES)
                put_some(s->out + r * s->out_r + c0 + c, totals[r][c / LANES], width - c);
    }
}

/* Of a few summands: the result is written once and in order. */
static void few_summands(const struct affine *s) {
    for (int64_t r = 0; r < s->N; r++) {
        const real *a = s->a[0] + r * s->a_r[0];
        real *out = s->out + r * s->out_r;
        int64_t c = 0;
        for (; c + WIDE * LANES <= s->H; c += WIDE * LANES) {
            vec total[WIDE] = {{0}};
            for (int64_t k = 0; k < s->K[0]; k++)
                UNROLL for (int e = 0; e < WIDE; e++) total[e] += a[k] * get(s->w[0] + k * s->w_c[0] + c + e * LANES);
            UNROLL for (int e = 0; e < WIDE; e++) put(out + c + e * LANES, total[e]);
        }
        for (; c < s->H; c += LANES) {
            vec total = {0};
            for (int64_t k = 0; k < s->K[0]; k++) total += a[k] * get_some(s->w[0] + k * s->w_c[0] + c, s->H - c);
            put_some(out + c, total, s->H - c);
        }
    }
}

enum { STRIPE_ROWS = 96 };

/* Of more: a block of w's rows at a time is read in order and copied into panels. */
static void by_stripes(const struct affine *s, real *room) {
    int64_t panels = (s->H + PANEL - 1) / PANEL;
    for (int64_t r0 = 0; r0 < s->N; r0 += STRIPE_ROWS) {
        int64_t rows = at_most(STRIPE_ROWS, s->N - r0);
        real *totals = room, *stripe = room + rows * panels * PANEL;
        memset(totals, 0, rows * panels * PANEL * sizeof(real));
        for (int64_t k0 = 0; k0 < s->K[0]; k0 += BLOCK) {
            int n = (int)at_most(BLOCK, s->K[0] - k0);
            for (int64_t k = 0; k < n; k++) {
                const real *from = s->w[0] + (k0 + k) * s->w_c[0];
                int64_t p = 0;
                for (; (p + 1) * PANEL <= s->H; p++)
                    memcpy(stripe + (p * BLOCK + k) * PANEL, from + p * PANEL, PANEL * sizeof(real));
                for (int64_t c = p * PANEL; c < p * PANEL + PANEL && p < panels; c++)
                    stripe[(p * BLOCK + k) * PANEL + c % PANEL] = c < s->H ? from[c] : 0;
            }
            const real *from[STRIPE_ROWS];
            for (int64_t r = 0; r < rows; r++) from[r] = s->a[0] + (r0 + r) * s->a_r[0] + k0;
            for (int64_t p = 0; p < panels; p++)
                product(from, (int)rows, 0, stripe + p * BLOCK * PANEL, n, totals + p * rows * PANEL);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t p = 0; p < panels; p++)
                for (int64_t c = p * PANEL; c < (p + 1) * PANEL && c < s->H; c += LANES) {
                    vec v = get(totals + (p * rows + r) * PANEL + c % PANEL);
                    put_some(s->out + (r0 + r) * s->out_r + c, v, s->H - c);
                }
    }
}

static void of_reals(const struct affine *s, real *room) {
    if (is_packed(s)) {
        (s->across ? by_stripes : by_panels)(s, room);
        return;
    }
    if (s->across) {
        (s->N <= FEW_ACROSS ? few_rows : few_summands)(s);
        return;
    }
    int64_t tiles = (s->N + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t c = 0, C; c < s->H; c += C) {
        C = c + TILE_COLUMNS <= s->H ? TILE_COLUMNS : 1;
        for (int64_t tile = 0, r = 0, R; tile < tiles; tile++, r += R) {
            R = (s->N - r + tiles - tile - 1) / (tiles - tile); /* as even as can be */
            vec totals[TILE_ROWS * TILE_COLUMNS] = {{0}};
            for (int i = 0; i < 2; i++)
                if (s->K[i])
                    DOTS[R][C > 1](s->a[i] + r * s->a_r[i], s->a_r[i], s->w[i] + c * s->w_c[i], s->w_c[i], s->K[i],
                                   totals);
            for (int i = 0; i < R; i++) {
                real *out = s->out + (r + i) * s->out_r + c;
                four sums = C == 4 ? sums_of(totals + i * 4) : (four){sum_of(totals[i])};
                for (int e = 0; e < C; e++) out[e] = sums[e] + bias_of(s, r + i, c + e);
            }
        }
    }
    for (int64_t r = 0; r < s->N && s->act != NONE; r++)
        for (int64_t c = 0; c < s->H; c += LANES) {
            real *p = s->out + r * s->out_r + c;
            put_some(p, act_of(s->act, get_some(p, s->H - c)), s->H - c);
        }
}

/* Columns whose weights are widened at once. */
INLINE int64_t widened(const struct affine *s) { return s->across ? 4 * PANEL : PANEL; }

/* Room that all_columns needs, in reals. */
static int64_t room_for(const struct affine *s) {
    int64_t room = 0, columns = s->rounding ? at_most(s->H, widened(s)) : s->H;
    if (is_packed(s)) room = (s->K[0] + s->K[1] + ROWS) * PANEL;
    if (is_packed(s) && s->across) room = (at_most(s->N, STRIPE_ROWS) + BLOCK) * (columns + PANEL);
    return s->rounding ? room + widened(s) * (s->K[0] + s->K[1] + s->N) : room;
}

static void all_columns(const struct affine *s, real *room) {
    if (!s->rounding) {
        of_reals(s, room);
        return;
    }
    for (int64_t c = 0; c < s->H; c += widened(s)) {
        struct affine given = columns_of(s, c, widened(s)), part = given;
        real *next = room;
        part.rounding = KEEP;
        for (int i = 0; i < 2; i++) {
            int64_t rows = s->across ? s->K[i] : part.H, length = s->across ? part.H : s->K[i];
            part.w[i] = next, part.w_c[i] = length;
            for (int64_t r = 0; length && r < rows; r++, next += length)
                widen((const uint16_t *)given.w[i] + r * s->w_c[i], length, s->rounding, next);
        }
        part.out = next, part.out_r = part.H;
        of_reals(&part, next + s->N * part.H);
        for (int64_t r = 0; r < s->N; r++)
            narrow(part.out + r * part.H, part.H, s->rounding, (uint16_t *)given.out + r * s->out_r);
    }
}

/* out (columns, rows) = in (rows, columns)^T, and the sums of in's columns. */
static void transpose(const real *in, int64_t in_r, int64_t rows, int64_t columns, real *out, real *sums) {
    for (int64_t c0 = 0; c0 < columns; c0 += 16)
        for (int64_t r0 = 0; r0 < rows; r0 += 16)
            for (int64_t c = c0; c < c0 + 16 && c < columns; c++)
                for (int64_t r = r0; r < r0 + 16 && r < rows; r++) out[c * rows + r] = in[r * in_r + c];
    for (int64_t c = 0; c < columns; c++) {
        sums[c] = 0;
        for (int64_t r0 = 0; r0 < rows; r0 += STRETCH) { /* short sums, as of a product */
            vec total = {0};
            for (int64_t r = r0; r < r0 + STRETCH && r < rows; r += LANES)
                total += get_some(out + c * rows + r, rows - r);
            sums[c] += sum_of(total);
        }
    }
}

/* ---- A scan: what the caller says, in fields of 8 bytes ---- */

struct scan {
    int64_t backward, act, rounding;
    int64_t D, T, B, H;                /* directions, steps, rows, columns */
    int64_t resets_t, resets_b;        /* how far apart steps and rows lie */
    int64_t in_t, in_b, h_t, h_b, out_t, out_b;
    int64_t start_d, start_b, w_n, w_k;
    int64_t begin, end;     /* which steps to do, counted in the order of the scan */
    int64_t threads;        /* the most that may work, this one among them */
    int64_t rows, groups;   /* a work item: so many rows, and one of so many groups of panels; 0: see by_steps */
    const int64_t *sizes;   /* packed rows: how many rows step t has, never more than the one before; or NULL */
    const int64_t *offsets; /* then: how many rows lie before step t's */
    const uint8_t *resets;  /* where a row begins anew; or NULL */
    const real *in;         /* z or g, D * H columns; NULL: zeros */
    const real *h;          /* backward: the output */
    real *out;
    const real *start;      /* (D, B, H): h0; or the gradient of h_n or NULL */
    const real *w[2];       /* for each direction (H, H) */
    real *last;             /* (D, B, H): the states after T steps, of rows that have them; or NULL */
};

struct item { /* one direction's rows and columns, with the steps that are done */
    _Atomic int64_t state; /* 4 * steps + phase */
    char apart[LINE - 8];
};
enum { FREE, CLAIMED, WRITING };

struct job {
    struct scan s;
    struct affine parts[4]; /* where there are slices of their columns, the job is these and no scan */
    int64_t slices;
    int64_t items, groups, threads, steps;
    int64_t blocks, panels, wide;        /* of rows, of columns, of a group's columns */
    int hired;                           /* threads that were made for it, or a team's others */
    int missed;                          /* whether a thread seemed to have lost its core */
    int redone;                          /* whether two threads may do an item at once: who comes first writes */
    int64_t chunk;                       /* steps that a thread does of an item before it looks for another one */
    fenv_t environment;                  /* of a team's caller */
    int64_t since;                       /* in a team: when it was called, and when the caller had nothing left to do */
    int64_t patience;                    /* ns that a thread waits for another before it does that one's work */
    size_t scratch_size;
    real *room, *w, *zeros, *scratch;
    _Atomic int references, closed, named;
    struct item *item;
    struct item *done; /* for each direction and block of rows: items that are done, all steps added up */
    struct item *busy; /* for each thread: whether it is in an item */
};

INLINE int64_t place(const struct scan *s, int64_t t, int64_t b, int64_t by_t, int64_t by_b) {
    return s->sizes ? (s->offsets[t] + b) * by_b : t * by_t + b * by_b;
}
INLINE int64_t rows_at(const struct scan *s, int64_t t) {
    return t < 0 || t >= s->T ? 0 : s->sizes ? s->sizes[t] : s->B;
}
INLINE int is_reset(const struct scan *s, int64_t t, int64_t b) {
    if (!s->resets || b >= rows_at(s, t)) return 0;
    return s->resets[place(s, t, b, s->resets_t, s->resets_b)];
}

/* The rows of one work item at one step: where each of them lies. */
struct rows {
    int count, alone, product; /* alone: the step has no other row; product: some row comes from another step */
    int64_t first, last;       /* columns, of one direction */
    const real *from[ROWS], *in[ROWS], *more[ROWS], *h[ROWS];
    real *out[ROWS];
    const real *w;
};

static void locate(const struct job *j, int64_t i, int64_t step, struct rows *x) {
    const struct scan *s = &j->s;
    int64_t group = i / (s->D * j->blocks), d = i / j->blocks % s->D, b0 = i % j->blocks * s->rows;
    int towards = (d == 0) == !s->backward ? 1 : -1; /* in which direction of time the scan goes */
    int64_t t = towards > 0 ? step : s->T - 1 - step, source = t - towards, left = rows_at(s, t) - b0;
    x->count = left < 0 ? 0 : left < s->rows ? (int)left : (int)s->rows;
    x->alone = rows_at(s, t) == 1;
    x->product = 0;
    x->first = group * j->wide, x->last = x->first + j->wide < s->H ? x->first + j->wide : s->H;
    x->w = j->w + d * j->panels * PANEL * s->H;
    for (int r = 0; r < x->count; r++) {
        int64_t b = b0 + r, column = d * s->H;
        const real *start = s->start ? s->start + d * s->start_d + b * s->start_b : 0;
        int begins = b >= rows_at(s, source); /* no step before this one, in the order of the scan */
        x->out[r] = s->out + place(s, t, b, s->out_t, s->out_b) + column;
        x->in[r] = s->in ? s->in + place(s, t, b, s->in_t, s->in_b) + column : 0;
        x->h[r] = s->backward ? s->h + place(s, t, b, s->h_t, s->h_b) + column : 0;
        x->more[r] = s->backward && begins ? start : 0;
        if (is_reset(s, t > source ? t : source, b) || (s->backward && begins))
            x->from[r] = j->zeros;
        else
            x->from[r] = begins ? start : s->out + place(s, source, b, s->out_t, s->out_b) + column;
        x->product |= !s->backward || x->from[r] != j->zeros;
    }
}

/* What a row of the product is added to. */
INLINE void lay(real *total, const real *in, const real *more, int64_t width) {
    UNROLL for (int e = 0; e < PANEL; e += LANES) {
        vec v = {0};
        if (in && e < width) v = get_some(in + e, width - e);
        if (more && e < width) v += get_some(more + e, width - e);
        put(total + e, v);
    }
}

INLINE void end_row(const struct scan *s, real *total, const real *h, int64_t width) {
    UNROLL for (int e = 0; e < PANEL; e += LANES) {
        if (e >= width) break;
        vec v = get(total + e);
        if (!s->backward)
            v = round_to(act_of(s->act, v), s->rounding);
        else
            v = before_act(s->act, v, get_some(h + e, width - e));
        put(total + e, v);
    }
}

/* A step of a work item into scratch [panel][rows][PANEL]: nothing that another thread might read is written. */
static void compute(const struct job *j, const struct rows *x, real *scratch) {
    const struct scan *s = &j->s;
    int64_t size = s->rows * PANEL; /* of a panel's totals; several small ones are ended together */
    int64_t together = PANEL * (size < 1024 ? 1024 / size : 1);
    for (int64_t n0 = x->first; n0 < x->last; n0 += together) {
        int64_t n1 = at_most(n0 + together, x->last);
        for (int64_t n = n0; n < n1; n += PANEL) {
            real *totals = scratch + (n - x->first) * s->rows;
            for (int r = 0; r < x->count; r++)
                lay(totals + r * PANEL, x->in[r] ? x->in[r] + n : 0, x->more[r] ? x->more[r] + n : 0, n1 - n);
            if (!x->product) continue;
            product(x->from, x->count, x->alone, x->w + n * s->H, s->H, totals);
            for (int r = 0; r < x->count && s->backward; r++) /* zeros times infinite weights are not zero */
                if (x->from[r] == j->zeros)
                    lay(totals + r * PANEL, x->in[r] ? x->in[r] + n : 0, x->more[r] ? x->more[r] + n : 0, n1 - n);
        }
        for (int64_t n = n0; n < n1; n += PANEL)
            for (int r = 0; r < x->count; r++)
                end_row(s, scratch + (n - x->first) * s->rows + r * PANEL, s->backward ? x->h[r] + n : 0, n1 - n);
    }
}

/* What compute() made, into its place. */
static void commit(const struct job *j, const struct rows *x, const real *scratch) {
    for (int64_t n = x->first; n < x->last; n += PANEL, scratch += j->s.rows * PANEL)
        for (int r = 0; r < x->count; r++)
            for (int64_t e = 0; e < PANEL && e < x->last - n; e += LANES)
                put_some(x->out[r] + n + e, get(scratch + r * PANEL + e), x->last - n - e);
}

/* ---- Threads: each claims items that are ready, its own ones first ---- */

/* Where a thread misses its core, others would mostly wait for it: none is made for a while, in ns, which doubles
 * each time that this happens again and is short once more after a job in which it didn't. */
enum { SHORTEST = 1000000, LONGEST = 100000000 };
static _Atomic int64_t busy_until, respite = SHORTEST;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
INLINE void rest(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

INLINE int is_ready(struct job *j, int64_t i, int64_t steps) {
    if (j->groups == 1) return 1;
    int64_t done = atomic_load_explicit(&j->done[i % (j->items / j->groups)].state, memory_order_acquire);
    return done >= steps * j->groups;
}

/* A slice of some part's columns; none is left for an item where the columns are few. */
static struct affine slice_of(const struct job *j, int64_t i) {
    const struct affine *s = j->parts + i / j->slices;
    int64_t wide = width_of(s, j->slices);
    return columns_of(s, at_most(i % j->slices * wide, s->H), wide);
}

/* Step `steps` of item i, which is in phase CLAIMED; whoever comes first writes it, all others' work is lost. */
static void finish(struct job *j, int64_t i, int64_t steps, real *scratch) {
    struct rows x;
    struct affine part, own;
    int64_t size = sizeof(real); /* of a number in `out` */
    if (j->slices) {
        own = part = slice_of(j, i);
        own.out = scratch, own.out_r = part.H;
        if (part.rounding) size = sizeof(uint16_t);
        all_columns(&own, scratch + part.N * part.H);
    } else {
        locate(j, i, j->s.begin + steps, &x);
        compute(j, &x, scratch);
    }
    int64_t expected = 4 * steps + CLAIMED;
    if (!atomic_compare_exchange_strong(&j->item[i].state, &expected, 4 * steps + WRITING)) return;
    if (j->slices)
        for (int64_t r = 0; r < part.N; r++)
            memcpy((char *)part.out + r * part.out_r * size, (char *)scratch + r * part.H * size, part.H * size);
    else
        commit(j, &x, scratch);
    atomic_store_explicit(&j->item[i].state, 4 * (steps + 1), memory_order_release);
    atomic_fetch_add_explicit(&j->done[i % (j->items / j->groups)].state, 1, memory_order_release);
}

static int claim(struct job *j, int64_t i, real *scratch) {
    int64_t state = atomic_load_explicit(&j->item[i].state, memory_order_acquire), steps = state / 4;
    if (steps >= j->steps || state % 4 != FREE || !is_ready(j, i, steps)) return 0;
    if (!atomic_compare_exchange_strong(&j->item[i].state, &state, state + CLAIMED)) return 0;
    if (j->redone) {
        finish(j, i, steps, scratch);
        return 1;
    }
    int64_t end = at_most(steps + j->chunk, j->steps);
    if (j->slices) {
        struct affine part = slice_of(j, i);
        all_columns(&part, scratch);
        steps = end;
    }
    for (; steps < end; steps++) {
        struct rows x;
        locate(j, i, j->s.begin + steps, &x);
        compute(j, &x, scratch);
        commit(j, &x, scratch);
    }
    atomic_store_explicit(&j->item[i].state, 4 * end, memory_order_release);
    return 1;
}

static int work(struct job *, int);

static void leave(struct job *j) {
    if (atomic_fetch_sub(&j->references, 1) == 1) free(j);
}

static void *helper(void *argument) {
    struct job *j = argument;
    work(j, atomic_fetch_add(&j->named, 1));
    leave(j);
    return 0;
}

/* Of the OpenMP library that torch uses, if there is one: its threads are there already, and spin on the other cores
 * for a while after each of torch's products, where a new thread would have to share a core with them. */
static void (*team)(void (*)(void *), void *, unsigned, unsigned);
static int (*member)(void), (*most)(void);

void use_team(void *parallel, void *thread_num, void *max_threads) {
    *(void **)&team = parallel, *(void **)&member = thread_num, *(void **)&most = max_threads;
}

static void work_in_team(void *argument) {
    struct job *j = argument;
    int self = member();
    if (!self && now() - j->since > j->patience) j->missed = 1; /* it waited for a thread to leave what was before */
    fenv_t own;
    fegetenv(&own);
    fesetenv(&j->environment); /* the caller may flush denormals: what it computes must not depend on who does */
    if (self < j->threads) work(j, self);
    fesetenv(&own);
    if (!self) j->since = now();
}

/* Has threads made that work at the job too, if there is to be more than one and the machine isn't busy. */
static void hire(struct job *j) {
    int helpers = (int)at_most(j->threads, j->items) - 1;
    if (helpers < 1 || j->hired || now() < atomic_load(&busy_until)) return;
    j->hired = helpers;
    atomic_fetch_add(&j->references, helpers);
    sigset_t every, before;
    pthread_attr_t detached;
    pthread_t thread;
    sigfillset(&every); /* a signal is for the threads that were there before */
    pthread_sigmask(SIG_SETMASK, &every, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (int n = 0; n < helpers; n++)
        if (pthread_create(&thread, &detached, helper, j)) leave(j); /* what it would have done others do */
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static int may_team(struct job *j) {
    return team && !j->hired && j->threads > 1 && now() >= atomic_load(&busy_until);
}

/* Works until no step is left; a thread that isn't the caller's leaves when the job is closed. 0: the caller's, which
 * began alone on a busy machine, may have others now. */
static int work(struct job *j, int self) {
    int64_t since = 0, per_thread = (j->items + j->threads - 1) / j->threads;
    real *scratch = (real *)((char *)j->scratch + self * j->scratch_size);
    for (unsigned turn = 0;; turn++) {
        int worked = 0, left = 0;
        for (int64_t n = 0; n < j->items; n++) {
            /* Its own columns first, of all rows: their part of W is in its cache. */
            int64_t i = (n + self * per_thread) % j->items;
            if (atomic_load_explicit(&j->item[i].state, memory_order_acquire) >= 4 * j->steps) continue;
            left = 1;
            if (self) {
                atomic_store(&j->busy[self].state, 1);
                if (atomic_load(&j->closed)) {
                    atomic_store(&j->busy[self].state, 0);
                    return 1;
                }
            }
            worked |= claim(j, i, scratch);
            if (self) atomic_store_explicit(&j->busy[self].state, 0, memory_order_release);
        }
        if (!left) return 1;
        if (worked) {
            since = 0;
            if (!self && turn % 8 == 7) { /* the machine may have been busy when the job began */
                if (may_team(j)) return 0;
                if (!team) hire(j);
            }
            continue;
        }
        if (j->closed) return 1;
        rest();
        if (turn % 16) continue;
        int64_t time = now();
        if (!since) since = time;
        if (time - since < j->patience) continue;
        /* The other thread has lost its core, it seems. Who may not return before all is done does its work. */
        if (!self) j->missed = 1;
        if (self || !j->redone) {
            sched_yield();
            continue;
        }
        for (int64_t i = 0; i < j->items; i++) {
            int64_t state = atomic_load_explicit(&j->item[i].state, memory_order_acquire);
            if (state % 4 == CLAIMED) finish(j, i, state / 4, scratch), since = 0;
        }
        if (since) sched_yield(); /* it is in the middle of writing: that is short, once it has a core */
    }
}

static size_t rounded(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

/* A job of so many items, with `room` bytes of memory and a scratch for each thread; NULL where there is none. */
static struct job *new_job(int64_t items, int64_t groups, int64_t threads, size_t room, size_t scratch) {
    size_t head = rounded(sizeof(struct job)), lines = (items + items / groups + threads) * sizeof(struct item);
    room = rounded(room), scratch = rounded(scratch);
    char *memory = aligned_alloc(LINE, head + lines + room + threads * scratch);
    if (!memory) return 0;
    memset(memory, 0, head + lines);
    struct job *j = (struct job *)memory;
    memory += head;
    j->items = items, j->groups = groups, j->threads = threads;
    j->item = (struct item *)memory, j->done = j->item + items, j->busy = j->done + items / groups;
    j->room = (real *)(memory + lines);
    j->scratch = (real *)(memory + lines + room), j->scratch_size = scratch;
    return j;
}

/* All of a job, whose items take some multiply-adds each, by a team or by threads that are made for it. */
static void run(struct job *j, int64_t work_of_item, int redone) {
    j->redone = redone;
    j->chunk = j->redone ? 1 : at_most(1 + 3000000 / (1 + work_of_item), j->steps); /* some 0.1 ms */
    j->patience = 20000 + j->chunk * work_of_item / 8; /* several times what a thread does of an item at once */
    atomic_init(&j->references, 1);
    atomic_init(&j->named, 1);
    j->threads = at_most(j->threads, j->items);
    do {
        if (may_team(j)) {
            j->hired = (int)j->threads - 1;
            fegetenv(&j->environment);
            j->since = now();
            /* As many as torch takes, though some have nothing to do: libgomp ends those that a smaller team lacks. */
            int64_t members = at_least(j->threads, most());
            j->patience += 2000 * members; /* they wake one after another */
            team(work_in_team, j, (unsigned)members, 0);
            break;
        }
        if (!team) hire(j);
    } while (!work(j, 0));
    int64_t since = j->since ? j->since : now();
    atomic_store(&j->closed, 1);
    if (j->hired) {
        for (int n = 1; n <= j->hired; n++)
            while (atomic_load(&j->busy[n].state)) sched_yield();
        int64_t last = atomic_load(&respite), next = SHORTEST;
        if (j->missed || now() - since > j->patience) {
            atomic_store(&busy_until, now() + last);
            next = at_most(2 * last, LONGEST);
        }
        if (next != last) atomic_store(&respite, next);
    }
    leave(j);
}

static int all_of(const struct affine *, int, int64_t);

/* Few steps of few rows, forward and neither packed nor reset: W is read where it lies, w_k being 1. */
static int by_steps(const struct scan *s) {
    for (int64_t step = s->begin; step < s->end; step++) {
        struct affine parts[2];
        for (int64_t d = 0; d < s->D; d++) {
            int64_t t = d ? s->T - 1 - step : step, column = d * s->H;
            const real *start = s->start + d * s->start_d, *before = s->out + (d ? t + 1 : t - 1) * s->out_t + column;
            parts[d] = (struct affine){
                .act = s->act, .N = s->B, .H = s->H, .K = {s->H},
                .a = {step ? before : start}, .a_r = {step ? s->out_b : s->start_b},
                .w = {s->w[d]}, .w_c = {s->w_n},
                .bias = {s->in + t * s->in_t + column}, .bias_r = s->in_b,
                .out = s->out + t * s->out_t + column, .out_r = s->out_b,
            };
        }
        if (all_of(parts, (int)s->D, s->threads)) return 1;
    }
    return 0;
}

static int by_items(const struct scan *s) {
    int64_t panels = (s->H + PANEL - 1) / PANEL, wide = (panels + s->groups - 1) / s->groups * PANEL;
    int64_t blocks = (s->B + s->rows - 1) / s->rows, packed = panels * PANEL * s->H;
    struct job *j = new_job(s->D * blocks * s->groups, s->groups, s->threads, (s->D * packed + s->H) * sizeof(real),
                            s->rows * wide * sizeof(real));
    if (!j) return 1;
    j->s = *s, j->steps = s->end - s->begin;
    j->blocks = blocks, j->panels = panels, j->wide = wide;
    j->w = j->room, j->zeros = j->w + s->D * packed;
    memset(j->zeros, 0, s->H * sizeof(real));
    for (int64_t d = 0; d < s->D; d++) {
        int64_t by_k = s->backward ? s->w_n : s->w_k, by_n = s->backward ? s->w_k : s->w_n;
        pack(s->w[d], by_k, by_n, s->H, s->H, j->w + d * packed);
    }
    run(j, s->rows * wide * s->H, s->groups > 1);
    return 0;
}

/* Steps begin to end of a scan; 0, or 1 where there is no memory for it. */
int scan(const struct scan *s) {
    if (s->groups ? by_items(s) : by_steps(s)) return 1;
    for (int64_t d = 0; s->last && s->end == s->T && d < s->D; d++)
        for (int64_t b = 0; b < s->B; b++)
            memcpy(s->last + (d * s->B + b) * s->H, s->out + place(s, d ? 0 : s->T - 1, b, s->out_t, s->out_b) + d * s->H,
                   s->H * sizeof(real));
    return 0;
}

/* Some affine maps, whose columns are shared out over threads; 0, or 1 where there is no memory for it. */
static int all_of(const struct affine *parts, int count, int64_t threads) {
    int64_t room = 0, work = 0, slices = threads > 1 ? 2 * threads : 1;
    for (int i = 0; i < count; i++) {
        const struct affine *s = parts + i;
        /* To read a number of w, or to write one of a gradient, takes as long as 16 multiply-adds. */
        int64_t K = s->K[0] + s->K[1], once = s->across ? s->N + K : K;
        room = at_least(room, room_for(s));
        work = at_least(work, width_of(s, slices) * (s->N * K + 16 * once));
    }
    if (threads <= 1) {
        real *packed = room ? aligned_alloc(LINE, rounded(room * sizeof(real))) : 0;
        if (room && !packed) return 1;
        for (int i = 0; i < count; i++) all_columns(parts + i, packed);
        free(packed);
        return 0;
    }
    int64_t size = parts->N * width_of(parts, slices); /* of a slice's result: kept apart if it may be redone */
    struct job *j = new_job(count * slices, 1, threads, 0, (room + (parts->across ? 0 : size)) * sizeof(real));
    if (!j) return 1;
    memcpy(j->parts, parts, count * sizeof *parts);
    j->slices = slices, j->steps = 1;
    run(j, work, !parts->across);
    return 0;
}

/* One product or two; 0, or 1 where there is no memory for it. */
int affine(const struct affine *s) {
    if (!s->rounding) return all_of(s, 1, s->threads);
    struct affine wide = *s;
    real *memory = malloc((s->N * (s->K[0] + s->K[1]) + 2 * s->H) * sizeof(real)), *next = memory;
    if (!memory) return 1;
    for (int i = 0; i < 2; i++) {
        wide.a[i] = next, wide.a_r[i] = s->K[i];
        for (int64_t r = 0; r < s->N; r++, next += s->K[i])
            widen((const uint16_t *)s->a[i] + r * s->a_r[i], s->K[i], s->rounding, next);
        if (!s->bias[i]) continue;
        wide.bias[i] = next;
        widen((const uint16_t *)s->bias[i], s->H, s->rounding, next);
        next += s->H;
    }
    int failed = all_of(&wide, 1, s->threads);
    free(memory);
    return failed;
}

struct affine_backward { /* of one direction, out = act(...): gradients, each where there is a place for it */
    int64_t act, rounding, N, H; /* rows of all steps */
    int64_t K[2], a_r[2], w_c[2], g_r, out_r;
    int64_t rows;           /* of one step; where there are several, g is already before act */
    int64_t reversed;       /* then: whether the last step is the one that begins */
    const real *a[2], *w[2], *g, *out; /* a: x of all rows, and h of those of the step that begins */
    real *da[2], *dw[2], *db[2]; /* a, w, g, out and these are of 16 bits where rounding isn't KEEP */
    real *room;                  /* (2 N + 1, H), of use to nobody else, never of 16 bits */
    int64_t threads;
};

/* room (N, H) = the states before each step. */
static void states_before(const struct affine_backward *s, real *room) {
    int64_t later = s->N - s->rows, begins = s->reversed ? later : 0;
    for (int64_t r = 0; r < s->rows; r++)
        memcpy(room + (begins + r) * s->H, s->a[1] + r * s->a_r[1], s->H * sizeof(real));
    for (int64_t r = 0; r < later; r++) {
        const real *out = s->out + (s->reversed ? r + s->rows : r) * s->out_r;
        memcpy(room + (s->reversed ? r : r + s->rows) * s->H, out, s->H * sizeof(real));
    }
}

/* room (N, H) = g before act, for one step. */
static void before_step(const struct affine_backward *s, real *room, real *row) {
    for (int64_t r = 0; r < s->N; r++) {
        const real *g = s->g + r * s->g_r, *h = s->out + r * s->out_r;
        if (s->rounding) {
            widen((const uint16_t *)s->g + r * s->g_r, s->H, s->rounding, room + r * s->H), g = room + r * s->H;
            widen((const uint16_t *)s->out + r * s->out_r, s->H, s->rounding, row), h = row;
        }
        for (int64_t c = 0; c < s->H; c += LANES) {
            vec v = before_act(s->act, get_some(g + c, s->H - c), get_some(h + c, s->H - c));
            put_some(room + r * s->H + c, v, s->H - c);
        }
    }
}

int affine_backward(const struct affine_backward *s) {
    real *by_row = s->room, *by_column = by_row + s->N * s->H, *sums = by_column + s->N * s->H;
    const real *dz = by_row, *a[2] = {s->a[0], s->a[1]};
    int64_t dz_r = s->H, a_r[2] = {s->a_r[0], s->a_r[1]};
    if (s->rows == s->N)
        before_step(s, by_row, sums);
    else {
        dz = s->g, dz_r = s->g_r;
        states_before(s, by_row);
        a[1] = by_row, a_r[1] = s->H;
    }
    if (s->dw[0] || s->dw[1] || s->db[0] || s->db[1]) transpose(dz, dz_r, s->N, s->H, by_column, sums);
    struct affine parts[4];
    int count = 0;
    for (int i = 0; i < 2; i++) {
        struct affine part = {.rounding = s->rounding, .across = 1, .H = s->K[i], .out_r = s->K[i]};
        if (s->da[i]) {
            part.N = i ? s->rows : s->N, part.K[0] = s->H, part.a_r[0] = dz_r, part.w_c[0] = s->w_c[i];
            part.a[0] = i && s->reversed ? dz + (s->N - s->rows) * dz_r : dz, part.w[0] = s->w[i], part.out = s->da[i];
            parts[count++] = part;
        }
        if (s->dw[i]) {
            part.N = s->H, part.K[0] = part.a_r[0] = s->N, part.w_c[0] = a_r[i];
            part.a[0] = by_column, part.w[0] = a[i], part.out = s->dw[i];
            parts[count++] = part;
        }
        if (s->db[i] && s->rounding) narrow(sums, s->H, s->rounding, (uint16_t *)s->db[i]);
        if (s->db[i] && !s->rounding) memcpy(s->db[i], sums, s->H * sizeof(real));
    }
    return count ? all_of(parts, count, s->threads) : 0;
}
