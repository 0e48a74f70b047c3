/* What a loop over the steps of a layer on a CPU is made of, each part by itself. bench/loops.py times them.

    PROBE_READ            a buffer of so many bytes, over and over: as a step reads W_hh
    PROBE_MULTIPLY_ADD    in registers alone
    PROBE_TANH            the scans' own, on numbers in the first cache
    core_to_core          a number written by one thread until another one has read it

The scans' source is included: vectors, their width and tanh are theirs.
*/
#include "../kernels/native.c"

enum { PROBE_READ, PROBE_MULTIPLY_ADD, PROBE_TANH };
enum { PROBE_SUMS = 12, PROBE_AT_ONCE = PROBE_SUMS * LANES }; /* enough sums that none waits for its own last addition */
#define UNROLL_PROBE _Pragma("GCC unroll 12")

static volatile real probe_result; /* every result goes here, so that the compiler leaves no work out */

/* Forwards and backwards in turn. The end that was read last is in a nearer cache, and whoever reads W_hh may
   make use of that. */
static void probe_read(const real *data, int64_t count, int64_t passes) {
    vec sum[PROBE_SUMS] = {{0}};
    int64_t blocks = count / PROBE_AT_ONCE;
    for (int64_t pass = 0; pass < passes; pass++) {
        const real *block = pass % 2 ? data + (blocks - 1) * PROBE_AT_ONCE : data;
        int64_t next = pass % 2 ? -PROBE_AT_ONCE : PROBE_AT_ONCE;
        for (int64_t i = 0; i < blocks; i++, block += next)
            UNROLL_PROBE for (int s = 0; s < PROBE_SUMS; s++) sum[s] += get(block + s * LANES);
    }
    for (int s = 1; s < PROBE_SUMS; s++) sum[0] += sum[s];
    probe_result = sum[0][0];
}

static void probe_multiply_add(int64_t count) {
    vec sum[PROBE_SUMS], factor = all((real)0.5), summand = all(probe_result + 1);
    for (int s = 0; s < PROBE_SUMS; s++) sum[s] = all((real)s);
    for (int64_t i = 0; i < count; i += PROBE_AT_ONCE)
        UNROLL_PROBE for (int s = 0; s < PROBE_SUMS; s++) sum[s] = sum[s] * factor + summand;
    for (int s = 1; s < PROBE_SUMS; s++) sum[0] += sum[s];
    probe_result = sum[0][0];
}

static void probe_tanh(const real *data, real *out, int64_t count, int64_t passes) {
    for (int64_t pass = 0; pass < passes; pass++) {
        for (int64_t i = 0; i < count; i += LANES) put(out + i, tanh_of(get(data + i)));
        __asm__ volatile("" : : "r"(out) : "memory"); /* each pass is needed */
    }
    probe_result = out[0];
}

static double probe_seconds(void) { return (double)now() * 1e-9; }

/* Numbers that a call works on at once: `count` is a multiple. */
int64_t at_once(void) { return PROBE_AT_ONCE; }

/* `passes` times `count` numbers. It starts when all `threads` threads have arrived, or after 0.1 s without them.
   span: when it started and when it ended. */
void probe(int64_t kind, const real *data, real *out, int64_t count, int64_t passes, _Atomic int64_t *arrived,
           int64_t threads, double *span) {
    double limit = probe_seconds() + 0.1;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < threads && probe_seconds() < limit) rest();
    span[0] = probe_seconds();
    if (kind == PROBE_READ)
        probe_read(data, count, passes);
    else if (kind == PROBE_MULTIPLY_ADD)
        probe_multiply_add(count * passes);
    else
        probe_tanh(data, out, count, passes);
    span[1] = probe_seconds();
}

/* Threads 0 and 1 add to *turn in turns, `rounds` times each, 3 or more. Returns the seconds from one addition to
   the next, or infinity where the other thread did not come, or lost its core, for 0.1 s. */
double core_to_core(_Atomic int64_t *turn, int64_t self, int64_t rounds) {
    double start = 0;
    for (int64_t round = 0; round < rounds; round++) {
        double limit = 0;
        for (int64_t spins = 1; atomic_load_explicit(turn, memory_order_acquire) != 2 * round + self; spins++) {
            if (spins % 1024) continue;
            if (!limit) limit = probe_seconds() + 0.1;
            if (probe_seconds() > limit) return (double)__builtin_inff();
        }
        if (round == 1) start = probe_seconds(); /* both are here */
        atomic_store_explicit(turn, 2 * round + self + 1, memory_order_release);
    }
    return (probe_seconds() - start) / (double)(2 * (rounds - 2));
}
