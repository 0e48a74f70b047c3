/* Scans and single steps of kernels/native.c in memory of exactly their size, for the compiler's sanitizers: tests/test_native.py
compiles and runs it. Each result is compared with a plain loop, and with the bits of the other plans. An argument:
how many of SHAPES. */
#include <pthread.h>
static int stalling; /* whether helpers are put aside in the middle of their work */
static void *stalled(void *);
#define pthread_create(thread, how, function, argument) \
    pthread_create(thread, how, stalling ? stalled : function, argument)
#include "../kernels/native.c"

#include <dirent.h>
#include <math.h>
#include <stdio.h>

struct shape {
    int64_t T, B, H, D;
};
static const struct shape SHAPES[] = {
    {1, 1, 1, 1}, {2, 1, 63, 2}, {3, 2, 17, 2}, {2, 33, 64, 1}, {2, 14, 130, 1}, {7, 5, 3, 2},
};
static const struct {
    int64_t threads, rows, groups;
} PLANS[] = {{1, 32, 1}, {1, 1, 1}, {2, 8, 1}, {3, 5, 2}, {4, 32, 3}, {2, 7, 40}, {1, 32, 0}, {3, 32, 0}};
#define COUNT(array) ((int)(sizeof array / sizeof *array))
enum { PACKED = 1, RESETS = 2, WITH_RELU = 4, BACKWARD = 8, EXPANDED = 16, NO_START = 32, VARIANTS = 64 };

static int failures;

static void *get_memory(int64_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) abort();
    return memory;
}

static real number(void) { /* from -1 to 1 */
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (real)(state >> 11) * (real)0x1p-52 - 1;
}

static real *numbers(int64_t count, double scale) {
    real *p = get_memory(count * sizeof(real));
    for (int64_t i = 0; i < count; i++) p[i] = number() * (real)scale;
    return p;
}

/* The element that step t's row b of direction d has in column n, from the states that the scan itself made. */
static double expected(const struct scan *s, const real *in, int64_t d, int64_t t, int64_t b, int64_t n) {
    int64_t source = t - ((d == 0) == !s->backward ? 1 : -1);
    double total = in ? in[place(s, t, b, s->in_t, s->in_b) + d * s->H + n] : 0;
    const real *from = 0;
    int reset = is_reset(s, t > source ? t : source, b);
    if (b < rows_at(s, source)) {
        if (!reset) from = s->out + place(s, source, b, s->out_t, s->out_b) + d * s->H;
    } else if (!s->backward) {
        if (!reset) from = s->start + d * s->start_d + b * s->start_b;
    } else if (s->start)
        total += s->start[d * s->start_d + b * s->start_b + n];
    const real *w = s->w[d] + n * (s->backward ? s->w_k : s->w_n);
    for (int64_t k = 0; from && k < s->H; k++) total += (double)w[k * (s->backward ? s->w_n : s->w_k)] * from[k];
    double h = s->backward ? s->h[place(s, t, b, s->h_t, s->h_b) + d * s->H + n] : 0;
    if (s->act == RELU) return s->backward ? (h > 0 ? total : 0) : (total > 0 ? total : 0);
    return s->backward ? total * (1 - h * h) : tanh(total);
}

static void test(struct shape z, int variant) {
    int64_t rows = z.T * z.B, width = z.D * z.H, gap = 3;
    int64_t *sizes = get_memory(z.T * sizeof *sizes), *offsets = get_memory(z.T * sizeof *offsets);
    if (variant & PACKED) {
        rows = 0;
        for (int64_t t = 0; t < z.T; t++) {
            sizes[t] = t ? (sizes[t - 1] + 2) / 3 : z.B;
            offsets[t] = rows;
            rows += sizes[t];
        }
    }
    uint8_t *resets = get_memory(rows);
    for (int64_t i = 0; i < rows; i++) resets[i] = number() > 0.3;
    int backward = !!(variant & BACKWARD), expanded = backward && variant & EXPANDED;
    int in_rows = !(variant & EXPANDED), by_b = width + gap;
    real *in = numbers(in_rows ? (rows - 1) * by_b + width : width, 1);
    real *h = numbers(rows * width, 1), *start = numbers(z.D * z.B * z.H, 1);
    real *w = numbers(z.D * z.H * z.H, 1 / sqrt(z.H)), *firsts[2] = {0}; /* of plans with W in panels, and without */
    for (int p = 0; p < COUNT(PLANS); p++) {
        int panels = PLANS[p].groups > 0;
        if (!panels && variant & (PACKED | RESETS | BACKWARD | NO_START)) continue;
        real *first = firsts[panels], *last = get_memory(z.D * z.B * z.H * sizeof(real));
        real *out = get_memory(rows * width * sizeof(real));
        memset(out, 0xff, rows * width * sizeof(real)); /* NaN */
        struct scan s = {
            .backward = backward, .act = variant & WITH_RELU ? RELU : TANH, .D = z.D, .T = z.T, .B = z.B, .H = z.H,
            .end = z.T,
            .threads = PLANS[p].threads, .rows = PLANS[p].rows, .groups = PLANS[p].groups,
            .sizes = variant & PACKED ? sizes : 0, .offsets = variant & PACKED ? offsets : 0,
            .resets = variant & RESETS ? resets : 0, .resets_t = z.B, .resets_b = 1,
            .in = in, .in_t = in_rows ? z.B * by_b : 0, .in_b = in_rows ? by_b : 0,
            .h = backward ? h : 0, .h_t = z.B * width, .h_b = width,
            .out = out, .out_t = z.B * width, .out_b = width,
            .start = start, .start_d = z.B * z.H, .start_b = z.H,
            .w = {w, w + (z.D - 1) * z.H * z.H}, .w_n = z.H, .w_k = 1,
            .last = variant & (PACKED | BACKWARD) ? 0 : last,
        };
        if (backward && variant & NO_START) s.start = 0, s.in = expanded ? 0 : s.in;
        if (!backward && variant & NO_START) s.w_n = 1, s.w_k = z.H; /* a transposed W instead */
        if (!backward && !(variant & EXPANDED)) { /* in place, as the layer does it */
            for (int64_t r = 0; r < rows; r++) memcpy(out + r * width, in + r * by_b, width * sizeof(real));
            s.in = out, s.in_t = s.out_t, s.in_b = s.out_b;
        }
        struct scan part = s;
        for (part.begin = 0; part.begin < z.T; part.begin = part.end) { /* in two calls */
            part.end = part.begin ? z.T : (z.T + 1) / 2;
            if (scan(&part)) abort();
        }
        for (int64_t i = 0; s.last && i < z.D * z.B * z.H; i++) {
            int64_t d = i / z.H / z.B, t = d ? 0 : z.T - 1;
            if (last[i] != out[place(&s, t, i / z.H % z.B, s.out_t, s.out_b) + d * z.H + i % z.H]) {
                printf("T=%d B=%d H=%d D=%d variant %d: plan %d has another last state\n", (int)z.T, (int)z.B, (int)z.H,
                       (int)z.D, variant, p);
                failures++;
            }
        }
        free(last);
        if (first && memcmp(first, out, rows * width * sizeof(real))) {
            printf("T=%d B=%d H=%d D=%d variant %d: plan %d has other bits\n", (int)z.T, (int)z.B, (int)z.H, (int)z.D,
                   variant, p);
            failures++;
        }
        if (first) {
            free(out);
            continue;
        }
        firsts[panels] = out;
        const real *known = s.in;
        if (known) known = in, s.in_t = in_rows ? z.B * by_b : 0, s.in_b = in_rows ? by_b : 0;
        double worst = 0;
        for (int64_t t = 0; t < z.T; t++)
            for (int64_t b = 0; b < rows_at(&s, t); b++)
                for (int64_t d = 0; d < z.D; d++)
                    for (int64_t n = 0; n < z.H; n++) {
                        double want = expected(&s, known, d, t, b, n);
                        double off = fabs(out[place(&s, t, b, s.out_t, s.out_b) + d * z.H + n] - want);
                        if (!(off <= worst)) worst = off; /* NaN too */
                    }
        if (!(worst < (sizeof(real) == 4 ? 1e-5 : 1e-14))) {
            printf("T=%d B=%d H=%d D=%d variant %d: off by %g\n", (int)z.T, (int)z.B, (int)z.H, (int)z.D, variant,
                   worst);
            failures++;
        }
    }
    free(firsts[0]), free(firsts[1]), free(in), free(h), free(start), free(w), free(resets), free(sizes), free(offsets);
}

#ifndef DOUBLE
/* Every sort of float through both roundings: only whether a sanitizer objects counts here. */
static void test_roundings(void) {
    uint32_t special[] = {0, 1, 0x7fffff, 0x800000, 0x33000001, 0x387fffff, 0x477fefff, 0x477ff000, 0x7f7fffff,
                          0x7f800000, 0x7f800001, 0x7fc00000, 0x7fffffff, 0xff800000, 0xffffffff, 0x80000000};
    int64_t H = COUNT(special);
    for (int rounding = BFLOAT16; rounding <= FLOAT16; rounding++)
        for (int relu = 0; relu < 2; relu++) {
            real *out = get_memory(sizeof special), *start = numbers(H, 0), *w = numbers(H * H, 0);
            memcpy(out, special, sizeof special);
            struct scan s = {.act = relu ? RELU : TANH, .rounding = rounding, .D = 1, .T = 1, .B = 1, .H = H,
                             .end = 1, .threads = 1, .rows = 1, .groups = 1, .in = out, .in_t = H, .in_b = H,
                             .out = out, .out_t = H, .out_b = H, .start = start, .start_d = H, .start_b = H,
                             .w = {w, w}, .w_n = H, .w_k = 1};
            if (scan(&s)) abort();
            free(out), free(start), free(w);
        }
}
#endif

/* A helper that loses its core with a work item in its hands: meanwhile the caller has to do that one too. */
static _Atomic int stalls;
static void *stalled(void *argument) {
    struct job *j = argument;
    int self = atomic_fetch_add(&j->named, 1), claimed = 0;
    int64_t end = 4 * (j->s.end - j->s.begin), i = 0, state = 0;
    atomic_store(&j->busy[self].state, 1);
    for (; state < end && !claimed; i++) {
        state = atomic_load(&j->item[i %= j->items].state);
        if (state < end && state % 4 == FREE && is_ready(j, i, state / 4))
            claimed = atomic_compare_exchange_strong(&j->item[i].state, &state, state + CLAIMED);
    }
    if (claimed) {
        struct item *mine = &j->item[--i];
        for (int ms = 0; ms < 5000 && atomic_load(&mine->state) < end; ms++)
            nanosleep(&(struct timespec){0, 1000000}, 0);
        if (atomic_load(&mine->state) < end) {
            printf("the caller waits for a helper that has lost its core\n");
            failures++;
        }
        finish(j, i, state / 4, (real *)((char *)j->scratch + self * j->scratch_size)); /* too late, and no harm */
        stalls++;
    }
    atomic_store(&j->busy[self].state, 0);
    leave(j);
    return 0;
}

static void test_stalls(void) {
    enum { T = 40, B = 8, H = 300 };
    real *w = numbers(H * H, 1 / sqrt(H)), *start = numbers(B * H, 1), *in = numbers(T * B * H, 1), *out[2];
    for (stalling = 0; stalling < 2; stalling++) {
        out[stalling] = get_memory(T * B * H * sizeof(real));
        memcpy(out[stalling], in, T * B * H * sizeof(real));
        struct scan s = {.act = TANH, .D = 1, .T = T, .B = B, .H = H, .end = T, .threads = 3, .rows = B,
                         .groups = 3, .in = out[stalling], .in_t = B * H, .in_b = H, .out = out[stalling],
                         .out_t = B * H, .out_b = H, .start = start, .start_d = B * H, .start_b = H, .w = {w, w},
                         .w_n = H, .w_k = 1};
        if (scan(&s)) abort();
    }
    stalling = 0;
    if (memcmp(out[0], out[1], T * B * H * sizeof(real))) {
        printf("a helper that came too late has changed the result\n");
        failures++;
    }
    free(w), free(start), free(in), free(out[0]), free(out[1]);
}

/* A team that begins late, or whose member loses its core with an item in its hands that nobody else may do. */
enum { LATE = 1, ASIDE };
static int trouble;
static int caller(void) { return 0; }
static int whole(void) { return 2; }
static void *aside(void *argument) {
    struct job *j = argument;
    int64_t claimed = FREE;
    while (!atomic_compare_exchange_weak(&j->item[1].state, &claimed, CLAIMED)) claimed = FREE;
    nanosleep(&(struct timespec){0, 20000000}, 0);
    atomic_store(&j->item[1].state, FREE);
    return 0;
}
static void troubled_team(void (*member_work)(void *), void *j, unsigned threads, unsigned flags) {
    pthread_t other;
    (void)threads, (void)flags;
    if (trouble == LATE) nanosleep(&(struct timespec){0, 20000000}, 0);
    if (trouble == ASIDE && pthread_create(&other, 0, aside, j)) abort();
    while (trouble == ASIDE && !atomic_load(&((struct job *)j)->item[1].state)) sched_yield();
    member_work(j);
    if (trouble == ASIDE) pthread_join(other, 0);
}
static void test_trouble(void) {
    enum { T = 50, B = 2, H = 64 };
    real *w = numbers(H * H, 1 / sqrt(H)), *start = numbers(B * H, 1), *out = numbers(T * B * H, 1);
    team = troubled_team, member = caller, most = whole;
    for (trouble = LATE; trouble <= ASIDE; trouble++) {
        struct scan s = {.act = TANH, .D = 1, .T = T, .B = B, .H = H, .end = T, .threads = 2, .rows = 1,
                         .groups = 1, .in = out, .in_t = B * H, .in_b = H, .out = out, .out_t = B * H, .out_b = H,
                         .start = start, .start_d = B * H, .start_b = H, .w = {w, w}, .w_n = H, .w_k = 1};
        atomic_store(&busy_until, 0);
        if (scan(&s)) abort();
        if (!atomic_load(&busy_until)) {
            printf("a team's trouble %d was not noticed: the next call would wait again\n", trouble);
            failures++;
        }
    }
    team = 0;
    atomic_store(&busy_until, 0);
    free(w), free(start), free(out);
}

static int64_t stored_as; /* the rounding of test_affine's arrays */
static void expect(const char *what, struct shape z, const real *got, double want) {
    double most = stored_as == BFLOAT16 ? fabs(want) / 256 : stored_as == FLOAT16 ? fabs(want) / 2048 : 0;
    if (fabs(*got - want) <= most + (sizeof(real) == 4 ? 1e-4 : 1e-13)) return;
    printf("%s of N=%d I=%d H=%d variant %d: %g for %g\n", what, (int)z.B, (int)z.T, (int)z.H, (int)z.D, *got, want);
    failures++;
}

/* Memory for the numbers at p as they are stored; p gets what is left of them there. */
static real *stored(real *p, int64_t count) {
    uint16_t *halves = get_memory(count * (stored_as ? sizeof *halves : sizeof *p));
    memcpy(halves, p, stored_as ? 0 : count * sizeof *p);
    if (stored_as) narrow(p, count, stored_as, halves), widen(halves, count, stored_as, p);
    return (real *)halves;
}
/* What is stored there, into p. */
static void fetch(real *p, int64_t count, const real *from) {
    if (stored_as)
        widen((const uint16_t *)from, count, stored_as, p);
    else
        memcpy(p, from, count * sizeof *p);
}

/* One step without a scan and its gradients; T is I, D a variant. */
static void test_affine(struct shape z, int64_t threads) {
    int64_t N = z.B, K[2] = {z.T, z.D & 1 ? z.H : 0}, H = z.H, gap = 2;
    int64_t act = z.D & 2 ? RELU : z.D & 4 ? NONE : TANH;
    real *a[2], *w[2], *bias[2], *da[2], *dw[2], *db[2];
    for (int i = 0; i < 2; i++) {
        int64_t k = K[i] ? K[i] : 1;
        a[i] = numbers((N - 1) * (k + gap) + k, 1), w[i] = numbers((H - 1) * (k + gap) + k, 1 / sqrt(k));
        bias[i] = numbers(H, 1), db[i] = numbers(H, 1), da[i] = numbers(N * k, 1), dw[i] = numbers(H * k, 1);
    }
    int64_t size = (N - 1) * (H + gap) + H;
    real *out = numbers(size, 1), *g = numbers(size, 1), *dz = numbers((2 * N + 1) * H, 1);
    real *as[2], *ws[2], *biases[2], *das[2], *dws[2], *dbs[2];
    real *outs = stored(out, size), *gs = stored(g, size);
    for (int i = 0; i < 2; i++) {
        int64_t k = K[i] ? K[i] : 1;
        as[i] = stored(a[i], (N - 1) * (k + gap) + k), ws[i] = stored(w[i], (H - 1) * (k + gap) + k);
        biases[i] = stored(bias[i], H), dbs[i] = stored(db[i], H);
        das[i] = stored(da[i], N * k), dws[i] = stored(dw[i], H * k);
    }
    struct affine s = {.act = act, .rounding = stored_as, .threads = threads, .N = N, .H = H, .K = {K[0], K[1]},
                       .a_r = {K[0] + gap, K[1] + gap}, .w_c = {K[0] + gap, K[1] + gap}, .out_r = H + gap,
                       .a = {as[0], as[1]}, .w = {ws[0], ws[1]},
                       .bias = {z.D & 8 ? biases[0] : 0, biases[1]}, .out = outs};
    if (affine(&s)) abort();
    fetch(out, size, outs);
    for (int64_t r = 0; r < N; r++)
        for (int64_t c = 0; c < H; c++) {
            double total = bias[1][c] + (z.D & 8 ? bias[0][c] : 0);
            for (int i = 0; i < 2; i++)
                for (int64_t k = 0; k < K[i]; k++) total += (double)a[i][r * s.a_r[i] + k] * w[i][c * s.w_c[i] + k];
            total = act == NONE ? total : act == RELU ? (total > 0 ? total : 0) : tanh(total);
            expect("affine", z, out + r * s.out_r + c, total);
        }
    int every = !(z.D & 8); /* of the gradients, or one of each pair */
    struct affine_backward b = {.act = act, .rounding = stored_as, .threads = threads, .N = N, .H = H,
                                .rows = N, .K = {K[0], K[1]}, .a_r = {s.a_r[0], s.a_r[1]},
                                .w_c = {s.w_c[0], s.w_c[1]}, .g_r = H + gap, .out_r = H + gap, .a = {as[0], as[1]},
                                .w = {ws[0], ws[1]}, .g = gs, .out = outs, .da = {das[0], K[1] && every ? das[1] : 0},
                                .dw = {every ? dws[0] : 0, K[1] ? dws[1] : 0}, .db = {dbs[0], every ? dbs[1] : 0},
                                .room = dz};
    if (affine_backward(&b)) abort();
    for (int i = 0; i < 2; i++) {
        int64_t k = K[i] ? K[i] : 1;
        fetch(da[i], N * k, das[i]), fetch(dw[i], H * k, dws[i]), fetch(db[i], H, dbs[i]);
    }
    for (int i = 0; i < 2; i++) {
        for (int64_t r = 0; b.da[i] && r < N; r++)
            for (int64_t k = 0; k < K[i]; k++) {
                double want = 0;
                for (int64_t c = 0; c < H; c++) want += (double)dz[r * H + c] * w[i][c * s.w_c[i] + k];
                expect("da", z, da[i] + r * K[i] + k, want);
            }
        for (int64_t c = 0; c < H; c++) {
            double of_bias = 0;
            for (int64_t r = 0; r < N; r++) {
                double h = out[r * s.out_r + c], x = g[r * b.g_r + c];
                expect("dz", z, dz + r * H + c, act == RELU ? (h > 0 ? x : 0) : x * (1 - h * h));
                of_bias += dz[r * H + c];
            }
            if (b.db[i]) expect("db", z, db[i] + c, of_bias);
            for (int64_t k = 0; b.dw[i] && k < K[i]; k++) {
                double want = 0;
                for (int64_t r = 0; r < N; r++) want += (double)dz[r * H + c] * a[i][r * s.a_r[i] + k];
                expect("dw", z, dw[i] + c * K[i] + k, want);
            }
        }
    }
    for (int i = 0; i < 2; i++) free(as[i]), free(ws[i]), free(biases[i]), free(das[i]), free(dws[i]), free(dbs[i]);
    free(outs), free(gs);
    for (int i = 0; i < 2; i++) free(a[i]), free(w[i]), free(bias[i]), free(da[i]), free(dw[i]), free(db[i]);
    free(out), free(g), free(dz);
}

/* Gradients of a sequence, one direction of z.D, whose dz is known; z.T steps of z.B rows. */
static void test_sequence(struct shape z, int64_t threads) {
    int64_t N = z.T * z.B, H = z.H, I = 7, width = z.D * H, apart[2] = {I + 2, H + 1};
    real *x = numbers((N - 1) * apart[0] + I, 1), *h0 = numbers((z.B - 1) * apart[1] + H, 1);
    real *dz = numbers(N * width, 1), *out = numbers(N * width, 1), *room = get_memory((2 * N + 1) * H * sizeof *room);
    real *w[2] = {numbers(H * I, 1), numbers(H * H, 1)}, *da[2] = {numbers(N * I, 1), numbers(z.B * H, 1)};
    real *dw[2] = {numbers(H * I, 1), numbers(H * H, 1)}, *db = numbers(H, 1);
    for (int64_t d = 0; d < z.D; d++) {
        struct affine_backward b = {.N = N, .H = H, .K = {I, H}, .a_r = {apart[0], apart[1]}, .w_c = {I, H}, .g_r = width,
                                    .out_r = width, .rows = z.B, .reversed = d, .a = {x, h0}, .w = {w[0], w[1]},
                                    .g = dz + d * H, .out = out + d * H, .da = {da[0], da[1]}, .dw = {dw[0], dw[1]},
                                    .db = {db, 0}, .room = room, .threads = threads};
        if (affine_backward(&b)) abort();
        struct shape told = {I, N, H, 100 + d};
        for (int64_t c = 0; c < H; c++) {
            double of_bias = 0;
            for (int64_t r = 0; r < N; r++) of_bias += b.g[r * width + c];
            expect("db", told, db + c, of_bias);
            for (int i = 0; i < 2; i++)
                for (int64_t k = 0; k < b.K[i]; k++) {
                    double want = 0;
                    for (int64_t r = 0; r < N; r++) {
                        int64_t before = d ? r + z.B : r - z.B, begins = d ? r - (N - z.B) : r;
                        const real *h = before >= 0 && before < N ? b.out + before * width : h0 + begins * apart[1];
                        want += (double)b.g[r * width + c] * (i ? h[k] : x[r * apart[0] + k]);
                    }
                    expect("dw", told, dw[i] + c * b.K[i] + k, want);
                }
        }
        for (int i = 0; i < 2; i++)
            for (int64_t r = 0; r < (i ? z.B : N); r++)
                for (int64_t k = 0; k < b.K[i]; k++) {
                    double want = 0;
                    const real *row = b.g + (i && d ? N - z.B + r : r) * width;
                    for (int64_t c = 0; c < H; c++) want += (double)row[c] * w[i][c * b.K[i] + k];
                    expect("da", told, da[i] + r * b.K[i] + k, want);
                }
    }
    for (int i = 0; i < 2; i++) free(w[i]), free(da[i]), free(dw[i]);
    free(x), free(h0), free(dz), free(out), free(room), free(db);
}

int main(int argc, char **argv) {
    int scans = 0, shapes = argc > 1 ? atoi(argv[1]) : COUNT(SHAPES);
    for (int i = 0; i < shapes; i++)
        for (int variant = 0; variant < VARIANTS; variant++, scans++) test(SHAPES[i], variant);
    for (int i = 0; i < shapes; i++)
        if (SHAPES[i].T > 1) test_sequence(SHAPES[i], 1 + i % 3);
    static const struct shape steps[] = {{1, 1, 1, 0}, {3, 5, 4, 0},   {40, 1, 17, 0},  {17, 3, 70, 0},
                                         {1100, 4, 6, 0}, {2, 600, 9, 0}, {9, 11, 140, 0}, {13, 70, 37, 0}};
    for (int i = 0; i < COUNT(steps); i++)
        for (struct shape z = steps[i]; z.D < 16; z.D++, scans++) {
            for (stored_as = KEEP; stored_as <= (sizeof(real) == 4 ? FLOAT16 : KEEP); stored_as++)
                test_affine(z, 1 + z.D % 3);
            stored_as = KEEP;
        }
    for (int tries = 0; tries < 1000 && stalls < 4 && !failures; tries++) test_stalls();
    if (stalls < 4) failures++;
    test_trouble();
#ifndef DOUBLE
    test_roundings();
#endif
    for (int tries = 0, threads = 2; threads > 1 && tries < 5000; tries++) { /* helpers that are yet to leave */
        DIR *tasks = opendir("/proc/self/task");
        if (!tasks) break;
        for (threads = -2; readdir(tasks);) threads++;
        closedir(tasks);
        nanosleep(&(struct timespec){0, 1000000}, 0);
    }
    printf("%d scans, %d wrong\n", scans, failures);
    return failures != 0;
}
