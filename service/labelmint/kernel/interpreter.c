/* The Style Interpreter for CPUs: computes labels and JS uncertainty from a generator's feature maps, tile by tile.

Rules of this file:
- The mathematics is that of `labelmint.models.interpreter`; only the order of the computation differs.
- Vectors run along pixels. Every sum over channels, heads or classes runs in one order, one addition at a time. So a
  pixel's result does not depend on the vector width, the tile, the batch or the number of threads.
- `interpreter_new` allocates all memory that a call needs. An interpreter serves one call at a time.
- A feature or sum that is NaN makes the JS divergence and the mean entropy of its pixels NaN, as in torch, so that every
  gate rejects the sample. Comparisons are written so that NaN passes through; the label of such a pixel means nothing.
- Subnormal numbers count as zero: processors take some 70 times as long for them, and no label depends on them.
- The code uses the vector extensions of GCC and Clang and no intrinsics, so one source serves AVX2, AVX-512, NEON and
  later instruction sets.

Names: R is the output resolution; r a level, from 4 to R; N the number of heads; h1, h2 their hidden widths; K the
number of classes. A sliver is SLIVER adjacent pixels with all their channels: [channel][SLIVER]. A panel is ROWS output
channels of a weight matrix: [input channel][ROWS].

How a sample is labelled:
1. Each level r < R is projected to the N * h1 hidden units at its own resolution.
2. The sum of the levels below `base` is a piecewise bilinear function whose knots are the edges between the pixels of
   level `base`. Only its values at these edges are stored.
3. For each output row, the levels from `base` on are interpolated vertically and added one after the other. The sum of
   the levels up to r is linear between the edges of the pixels of level 2r. So one step from the edges of a level to
   those of the next adds a level exactly, with two additions per value.
4. Level R is projected onto that sum, in registers. ReLU, the two small layers, softmax and the sums over the heads
   follow while the sliver is in the L1 cache.
Of the large levels, only a window of rows is stored. The threads take the tasks in a fixed order, in phases; see
`Interpreter`. */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
/* Four vectors per channel if the processor has 32 vector registers, else two. */
#ifndef VECTORS
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#endif
#ifndef ROWS
#define ROWS 4
#endif
#define SLIVER (LANES * VECTORS)
#define DEPTH 256 /* channels whose sliver and panels stay in the L1 cache */
#define WHOLE 64  /* levels up to this resolution are stored completely */
#define BASE 32
#ifndef TILE
#define TILE 128
#endif
#ifndef GROUP
#define GROUP 8
#endif
#define BLOCK 256 /* pixels of a lower level that one task projects */
#define STRIP 8   /* output rows between two moves of the windows */
#define MAX_LEVELS 12

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, vec value) { *(loose *)to = value; }
INLINE vec all(float value) { return value - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
INLINE vec at_least(vec x, float bound) { return choose(x <= bound, all(bound), x); } /* NaN stays NaN */
INLINE vec at_most(vec x, float bound) { return choose(x >= bound, all(bound), x); }

/* ---- elementary functions ------------------------------------------------------------------------------------- */

/* exp(x) for x <= 0, relative error below 2e-7. Returns exp(-87) for x below -87, and NaN for NaN. */
INLINE vec exponential(vec x) {
    x = at_least(x, -87.0f);
    const vec shift = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = (x * 1.44269504f + shift) - shift;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = __builtin_convertvector(n, ivec) << 23;
    return (vec)((ivec)p + power);
}

/* log(x) for normal x > 0, absolute error below 1e-7 near 1. */
INLINE vec logarithm(vec x) {
    ivec bits = (ivec)x;
    ivec exponent = (bits >> 23) - 126;
    vec m = (vec)((bits & 0x007fffff) | 0x3f000000); /* in [0.5, 1) */
    ivec low = m < 0.70710678f;
    exponent += low; /* -1 where m is doubled */
    m = m + (vec)(low & (ivec)m) - 1.0f;
    vec e = __builtin_convertvector(exponent, vec);
    vec square = m * m;
    vec p = all(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square;
    p = p + e * -2.12194440e-4f;
    p = p - 0.5f * square;
    return m + p + e * 0.693359375f;
}

/* ---- matrix products -------------------------------------------------------------------------------------------- */

enum { FROM_ZERO, ONTO, ONTO_RELU };

/* Multiply a panel by a sliver. Write to, or add to, `out` [ROWS][SLIVER], with `stride` between its rows. */
INLINE void multiply(const float *panel, const float *sliver, int depth, float *out, ptrdiff_t stride, int how) {
    vec sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int j = 0; j < VECTORS; j++) {
            sum[i][j] = how == FROM_ZERO ? all(0.0f) : load(out + i * stride + j * LANES);
        }
    }
    _Pragma("GCC unroll 4") for (int k = 0; k < depth; k++) {
        vec x[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) x[j] = load(sliver + k * SLIVER + j * LANES);
        UNROLL for (int i = 0; i < ROWS; i++) {
            UNROLL for (int j = 0; j < VECTORS; j++) sum[i][j] += panel[k * ROWS + i] * x[j];
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int j = 0; j < VECTORS; j++) {
            vec value = sum[i][j];
            if (how == ONTO_RELU) value = at_least(value, 0.0f);
            store(out + i * stride + j * LANES, value);
        }
    }
}

__attribute__((noinline)) static void multiply_from_zero(const float *p, const float *x, int depth, float *out, ptrdiff_t s) {
    multiply(p, x, depth, out, s, FROM_ZERO);
}
__attribute__((noinline)) static void multiply_onto(const float *p, const float *x, int depth, float *out, ptrdiff_t s) {
    multiply(p, x, depth, out, s, ONTO);
}
__attribute__((noinline)) static void multiply_relu(const float *p, const float *x, int depth, float *out, ptrdiff_t s) {
    multiply(p, x, depth, out, s, ONTO_RELU);
}

static int padded(int rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

/* Pack a row-major [rows][depth] matrix into panels; the last one is padded with zeros. */
static void pack_weights(const float *weights, int rows, int depth, float *panels) {
    for (int first = 0; first < rows; first += ROWS) {
        for (int k = 0; k < depth; k++) {
            for (int i = 0; i < ROWS; i++) *panels++ = first + i < rows ? weights[(ptrdiff_t)(first + i) * depth + k] : 0.0f;
        }
    }
}

/* Pack `count` pixels of planes [depth][plane] into slivers; the last one is padded with zeros. */
static void pack_pixels(const float *planes, ptrdiff_t plane, int depth, int count, float *slivers) {
    int whole = count / SLIVER, rest = count % SLIVER;
    for (int k = 0; k < depth; k++, planes += plane) {
        float *to = slivers + (ptrdiff_t)k * SLIVER;
        for (int s = 0; s < whole; s++, to += (ptrdiff_t)depth * SLIVER) {
            UNROLL for (int j = 0; j < VECTORS; j++) store(to + j * LANES, load(planes + s * SLIVER + j * LANES));
        }
        for (int i = 0; rest && i < SLIVER; i++) to[i] = i < rest ? planes[whole * SLIVER + i] : 0.0f;
    }
}

/* ---- the interpreter -------------------------------------------------------------------------------------------- */

typedef struct {
    int size, channels;
    int kept;         /* rows of the window; `size` if all rows are stored */
    float *weights;   /* panels, [N][h1 padded][channels] */
    float *projected; /* [kept][N][h1 padded][size]; unused for level R */
} Level;

typedef struct {
    enum { PROJECT, EDGES, LABEL } kind;
    int phase;
    int which;        /* level of PROJECT, head of EDGES, row of LABEL */
    int first, count; /* pixels */
} Task;

/* The pixel of a tile with the highest heat. */
typedef struct {
    float heat; /* times N */
    int pixel;
} Peak;

/* The working memory of one thread. */
typedef struct {
    float *pixels;     /* packed features */
    float *hidden;     /* slivers [h1 padded][SLIVER] of one head */
    float *hidden2;    /* [h2 padded][SLIVER] */
    float *logits;     /* [K padded][SLIVER] */
    float *statistics; /* [2K+1][SLIVER] of each sliver */
    float *lines[3];   /* rows of edges and of a level during interpolation */
} Scratch;

typedef struct {
    int keypoints; /* 1 for the task keypoints, 0 for segmentation */
    int heads, hidden1, hidden2, classes, padded1, padded2, padded3;
    int num_levels, resolution, tile, base, threads;
    Level levels[MAX_LEVELS];
    float *bias1, *weights2, *bias2, *weights3, *bias3;
    float *edges;     /* [base+1][N][h1 padded][edge_stride] */
    int edge_stride;
    Peak *peaks; /* [tiles, row by row][K], for keypoints only */
    Scratch *scratch;

    /* Phases run in order. A phase may overlap the previous one, but starts only after all earlier ones. */
    Task *tasks;
    int num_tasks, num_phases;
    int *phase_tasks; /* number of tasks of each phase */
    int *left;        /* of these, the number not yet done */

    /* The current call. */
    const float *const *features;
    uint8_t *label;
    float *js, *entropy;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    int next, complete;

    void **blocks;
    size_t *sizes;
    int num_blocks;
    size_t bytes;
} Interpreter;

static void project(Interpreter *m, const Task *task, Scratch *scratch) {
    const Level *level = &m->levels[task->which];
    int r = level->size, depth = level->channels, rows = m->padded1;
    int slivers = (task->count + SLIVER - 1) / SLIVER;
    pack_pixels(m->features[task->which] + task->first, (ptrdiff_t)r * r, depth, task->count, scratch->pixels);
    ptrdiff_t row_stride = (ptrdiff_t)m->heads * rows * r;
    /* A sliver of a small level covers several rows, so it is computed in `hidden` and then copied row by row. */
    int aside = r < SLIVER;
    int step = aside || depth < DEPTH ? depth : DEPTH;
    for (int head = 0; head < m->heads; head++) {
        const float *weights = level->weights + (ptrdiff_t)head * rows * depth;
        for (int k = 0; k < depth; k += step) {
            int part = depth - k < step ? depth - k : step;
            for (int s = 0; s < slivers; s++) {
                const float *x = scratch->pixels + ((ptrdiff_t)s * depth + k) * SLIVER;
                int pixel = task->first + s * SLIVER;
                float *out = aside ? scratch->hidden
                                   : level->projected + (pixel / r % level->kept) * row_stride +
                                         (ptrdiff_t)head * rows * r + pixel % r;
                ptrdiff_t stride = aside ? SLIVER : r;
                for (int i = 0; i < rows; i += ROWS) {
                    const float *panel = weights + (ptrdiff_t)i * depth + (ptrdiff_t)k * ROWS;
                    if (k == 0) {
                        multiply_from_zero(panel, x, part, out + i * stride, stride);
                    } else {
                        multiply_onto(panel, x, part, out + i * stride, stride);
                    }
                }
                for (int i = 0; aside && i < SLIVER && s * SLIVER + i < task->count; i++) {
                    int y = (pixel + i) / r, x0 = (pixel + i) % r;
                    for (int c = 0; c < rows; c++) {
                        level->projected[y * row_stride + ((ptrdiff_t)head * rows + c) * r + x0] = out[c * SLIVER + i];
                    }
                }
            }
        }
    }
}

/* a + t * (b - a) for `count` values; writes whole vectors. */
INLINE void blend(const float *a, const float *b, float t, int count, float *out) {
    for (int i = 0; i < count; i += LANES) {
        vec x = load(a + i), y = load(b + i);
        store(out + i, x + t * (y - x));
    }
}

/* Prefetch `count` values into the caches. */
INLINE void fetch(const float *from, int count) {
    for (int i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

/* The shuffle of two vectors by constant positions. Clang has only the form with the positions as arguments, and GCC has
had that form only since version 12. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE void interleave(vec even, vec odd, vec *first, vec *second) {
#if LANES == 4
    *first = SHUFFLE(even, odd, 0, 4, 1, 5);
    *second = SHUFFLE(even, odd, 2, 6, 3, 7);
#elif LANES == 8
    *first = SHUFFLE(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    *second = SHUFFLE(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    *first = SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *second = SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

/* Compute the 2n+1 edges of the next level from the edges e[0..n] of n pixels and the pixel values q[-1..n]. */
INLINE void widen(const float *e, const float *q, int n, float *out) {
    for (int i = 0; i < n; i += LANES) {
        vec edge = load(e + i), pixel = load(q + i);
        vec even = edge + 0.5f * (load(q + i - 1) + pixel);
        vec odd = 0.5f * (edge + load(e + i + 1)) + pixel;
        vec first, second;
        interleave(even, odd, &first, &second);
        store(out + 2 * i, first);
        store(out + 2 * i + LANES, second);
    }
    out[2 * n] = e[n] + 0.5f * (q[n - 1] + q[n]); /* halving is exact, so this rounds as the vectors do */
}

/* Like `widen`, but for the centres of the 2n pixels of the next level; writes slivers that are `stride` apart. */
INLINE void finish(const float *e, const float *q, int n, float *out, ptrdiff_t stride) {
    for (int i = 0; i < n; i += LANES) {
        vec edge = load(e + i), next = load(e + i + 1), pixel = load(q + i);
        vec left = 0.75f * (edge + pixel) + 0.25f * (next + load(q + i - 1));
        vec right = 0.75f * (next + pixel) + 0.25f * (edge + load(q + i + 1));
        vec first, second;
        interleave(left, right, &first, &second);
        float *to = out + 2 * i / SLIVER * stride + 2 * i % SLIVER;
        store(to, first);
        store(to + LANES, second);
    }
}

/* Compute, for one head, the sum of the bias and the levels below `base` at the edges of the pixels of level `base`. */
static void make_edges(Interpreter *m, const Task *task, Scratch *scratch) {
    int base = m->base, rows = m->padded1;
    ptrdiff_t edge_row = (ptrdiff_t)m->heads * rows * m->edge_stride;
    float *e = scratch->lines[0] + LANES, *q = scratch->lines[1] + LANES;
    for (int c = 0; c < rows; c++) {
        ptrdiff_t channel = (ptrdiff_t)task->which * rows + c;
        /* The grids of all levels share the memory of the last one, so rows are computed from the last to the first. */
        float *grid = m->edges + channel * m->edge_stride;
        for (int y = 0; y <= 4; y++) {
            for (int x = 0; x <= 4; x++) grid[y * edge_row + x] = m->bias1[channel];
        }
        for (int l = 0; m->levels[l].size < base; l++) {
            int r = m->levels[l].size;
            const float *p = m->levels[l].projected + channel * r;
            ptrdiff_t p_row = (ptrdiff_t)m->heads * rows * r;
            for (int y = 2 * r; y >= 0; y--) {
                int i = y / 2, even = y % 2 == 0;
                int above = even ? (i > 0 ? i - 1 : 0) : i, here = i < r ? i : r - 1;
                int e_next = even ? i : i + 1;
                for (int x = 0; x <= r; x++) e[x] = 0.5f * (grid[i * edge_row + x] + grid[e_next * edge_row + x]);
                for (int x = 0; x < r; x++) q[x] = 0.5f * (p[above * p_row + x] + p[here * p_row + x]);
                q[-1] = q[0];
                q[r] = q[r - 1];
                widen(e, q, r, scratch->lines[2]);
                memcpy(grid + y * edge_row, scratch->lines[2], (2 * r + 1) * sizeof(float));
            }
        }
    }
}

/* The input of an output row at one level: two rows and the weight of the second. */
typedef struct {
    const float *a, *b;
    float t;
    ptrdiff_t channel; /* stride between channels */
} Pair;

/* Sum all lower levels and the bias at `m->tile` pixels of an output row, for one head: slivers [h1 padded][SLIVER].

Each step runs for GROUP channels before the next step begins. Otherwise a load that spans two stores of the previous
step would wait for them. */
static void interpolate(const Interpreter *m, const Pair *pairs, int first_level, int head, int x0, Scratch *scratch) {
    int rows = m->padded1, last = m->num_levels - 1;
    ptrdiff_t stride = (ptrdiff_t)rows * SLIVER, line = m->tile / 2 + 4 * LANES;
    int base_n = m->tile * m->base / m->resolution, base_lo = x0 * m->base / m->resolution;
    for (int c0 = 0; c0 < rows; c0 += GROUP) {
        int group = rows - c0 < GROUP ? rows - c0 : GROUP;
        ptrdiff_t channel = (ptrdiff_t)head * rows + c0;
        float *e = scratch->lines[0] + LANES, *q = scratch->lines[1] + LANES, *f = scratch->lines[2] + LANES;
        for (int g = 0; g < group; g++) {
            ptrdiff_t at = (channel + g) * pairs[0].channel + base_lo;
            blend(pairs[0].a + at, pairs[0].b + at, pairs[0].t, base_n + 1, e + g * line);
            fetch(pairs[0].a + at + GROUP * pairs[0].channel, base_n + 1);
            fetch(pairs[0].b + at + GROUP * pairs[0].channel, base_n + 1);
        }
        int n = base_n, lo = base_lo;
        for (int l = first_level; l < last; l++, n *= 2, lo *= 2) {
            const Pair *pair = &pairs[1 + l - first_level];
            for (int g = 0; g < group; g++) {
                ptrdiff_t at = (channel + g) * pair->channel + lo - 1;
                float *to = q + g * line;
                blend(pair->a + at, pair->b + at, pair->t, n + 2, to - 1);
                fetch(pair->a + at + GROUP * pair->channel, n + 2);
                fetch(pair->b + at + GROUP * pair->channel, n + 2);
                if (lo == 0) to[-1] = to[0];
                if (lo + n == m->levels[l].size) to[n] = to[n - 1];
            }
            for (int g = 0; g < group; g++) {
                if (l < last - 1) {
                    widen(e + g * line, q + g * line, n, f + g * line);
                } else {
                    finish(e + g * line, q + g * line, n, scratch->hidden + (c0 + g) * SLIVER, stride);
                }
            }
            float *swap = e;
            e = f;
            f = swap;
        }
    }
}

/* Add a head's outputs [K padded][SLIVER] for a sliver to the sliver's statistics [2K+1][SLIVER]: K mean probabilities,
K votes (mean heats for keypoints), and the mean entropy. All of them are sums over the heads, that is, N times the
mean. */
INLINE void add_votes(float *outputs, int classes, float *statistics) {
    UNROLL for (int j = 0; j < VECTORS; j++) {
        float *logits = outputs + j * LANES, *mean = statistics + j * LANES, *votes = mean + classes * SLIVER;
        float *entropy = votes + classes * SLIVER;
        vec top = load(logits);
        ivec best = {0};
        for (int k = 1; k < classes; k++) {
            vec x = load(logits + k * SLIVER);
            ivec above = x > top; /* strict, so that the smallest id wins a tie */
            top = choose(above, x, top);
            best = (above & k) | (~above & best);
        }
        vec total = all(0.0f), dot = all(0.0f);
        for (int k = 0; k < classes; k++) {
            vec shifted = load(logits + k * SLIVER) - top, x = exponential(shifted);
            total += x;
            dot += x * shifted;
            store(logits + k * SLIVER, x);
        }
        vec inverse = 1.0f / total;
        for (int k = 0; k < classes; k++) {
            store(mean + k * SLIVER, load(mean + k * SLIVER) + load(logits + k * SLIVER) * inverse);
            store(votes + k * SLIVER, load(votes + k * SLIVER) + (vec)((best == k) & (ivec)all(1.0f)));
        }
        store(entropy, load(entropy) + (logarithm(total) - dot * inverse));
    }
}

/* -p log p; 0 at 0. */
INLINE vec surprise(vec p) { return -p * logarithm(at_least(p, 1e-30f)); }

INLINE void add_heats(const float *outputs, int classes, float *statistics) {
    UNROLL for (int j = 0; j < VECTORS; j++) {
        float *mean = statistics + j * LANES, *heats = mean + classes * SLIVER, *entropy = heats + classes * SLIVER;
        vec sum = all(0.0f);
        for (int k = 0; k < classes; k++) {
            vec heat = load(outputs + j * LANES + k * SLIVER);
            vec p = at_most(at_least(heat, 0.0f), 1.0f);
            sum += surprise(p) + surprise(1.0f - p);
            store(mean + k * SLIVER, load(mean + k * SLIVER) + p);
            store(heats + k * SLIVER, load(heats + k * SLIVER) + heat);
        }
        store(entropy, load(entropy) + sum);
    }
}

/* The JS divergence and the mean entropy of a sliver, from its statistics. */
INLINE void divergence(const Interpreter *m, const float *statistics, float *js, float *mean_entropy) {
    const float share = 1.0f / (float)m->heads;
    for (int j = 0; j < VECTORS; j++) {
        const float *mean = statistics + j * LANES;
        vec mixture = all(0.0f);
        for (int k = 0; k < m->classes; k++) {
            vec p = load(mean + k * SLIVER) * share;
            mixture += surprise(p);
            if (m->keypoints) mixture += surprise(1.0f - p);
        }
        vec entropy = load(mean + 2 * m->classes * SLIVER);
        vec finite = entropy - entropy; /* NaN where a logit overflowed, so that js is not 0 there; else 0 */
        /* Rounding can make the difference slightly negative. */
        store(js + j * LANES, at_least(mixture - entropy * share + finite, 0.0f));
        /* Not `entropy * share`: if two results shared that product, it would be rounded for the one above, too. */
        store(mean_entropy + j * LANES, entropy / (float)m->heads + finite);
    }
}

/* The class with the most votes; the smallest id wins a tie. */
INLINE void elect(const float *votes, int classes, int count, uint8_t *label) {
    for (int i = 0; i < count; i++) {
        int best = 0;
        for (int k = 1; k < classes; k++) {
            if (votes[k * SLIVER + i] > votes[best * SLIVER + i]) best = k;
        }
        label[i] = (uint8_t)best;
    }
}

/* Whether a heat replaces the maximum so far. NaN counts as the maximum, as in torch; the first one wins a tie. */
INLINE int hotter(float heat, float hottest) { return heat > hottest || (heat != heat && hottest == hottest); }

/* For each keypoint, update `peaks` with the hottest of `count` pixels, of which `pixel` is the first. */
INLINE void seek(const float *heats, int classes, int count, int pixel, Peak *peaks) {
    for (int k = 0; k < classes; k++) {
        for (int i = 0; i < count; i++) {
            if (hotter(heats[k * SLIVER + i], peaks[k].heat)) peaks[k] = (Peak){heats[k * SLIVER + i], pixel + i};
        }
    }
}

/* Fill `pairs` for an output row: the edges first, then the levels from `first_level` to below R. */
static void find_pairs(const Interpreter *m, int y, int first_level, Pair *pairs) {
    ptrdiff_t units = (ptrdiff_t)m->heads * m->padded1;
    double position = (y + 0.5) * m->base / m->resolution;
    int i = (int)position;
    ptrdiff_t row = units * m->edge_stride;
    *pairs++ = (Pair){m->edges + i * row, m->edges + (i + 1) * row, (float)(position - i), m->edge_stride};
    for (int l = first_level; l < m->num_levels - 1; l++) {
        const Level *level = &m->levels[l];
        position = (y + 0.5) * level->size / m->resolution - 0.5;
        if (position < 0.0) position = 0.0;
        i = (int)position;
        int next = i + 1 < level->size ? i + 1 : i;
        row = units * level->size;
        *pairs++ = (Pair){level->projected + (i % level->kept) * row, level->projected + (next % level->kept) * row,
                          (float)(position - i), level->size};
    }
}

/* Fill [rows][SLIVER] with the bias of each row. */
INLINE void fill(const float *bias, int rows, float *out) {
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < VECTORS; j++) store(out + i * SLIVER + j * LANES, all(bias[i]));
    }
}

/* Add level R, `pixels` [channel][SLIVER], to a head's sums `hidden`, run the head's layers, and add to `statistics`. */
static void run_head(const Interpreter *m, int head, const float *pixels, float *hidden, float *statistics, Scratch *scratch) {
    const Level *top = &m->levels[m->num_levels - 1];
    int rows = m->padded1, depth = top->channels, step = depth < DEPTH ? depth : DEPTH;
    const float *weights = top->weights + (ptrdiff_t)head * rows * depth;
    const float *weights2 = m->weights2 + (ptrdiff_t)head * m->padded2 * m->hidden1;
    const float *weights3 = m->weights3 + (ptrdiff_t)head * m->padded3 * m->hidden2;
    for (int k = 0; k < depth; k += step) {
        int part = depth - k < step ? depth - k : step;
        for (int i = 0; i < rows; i += ROWS) {
            const float *panel = weights + (ptrdiff_t)i * depth + (ptrdiff_t)k * ROWS;
            const float *sliver = pixels + (ptrdiff_t)k * SLIVER;
            if (k + part < depth) {
                multiply_onto(panel, sliver, part, hidden + i * SLIVER, SLIVER);
            } else {
                multiply_relu(panel, sliver, part, hidden + i * SLIVER, SLIVER);
            }
        }
    }
    fill(m->bias2 + head * m->padded2, m->padded2, scratch->hidden2);
    for (int i = 0; i < m->padded2; i += ROWS) {
        multiply_relu(weights2 + (ptrdiff_t)i * m->hidden1, hidden, m->hidden1, scratch->hidden2 + i * SLIVER, SLIVER);
    }
    fill(m->bias3 + head * m->padded3, m->padded3, scratch->logits);
    for (int i = 0; i < m->padded3; i += ROWS) {
        multiply_onto(weights3 + (ptrdiff_t)i * m->hidden2, scratch->hidden2, m->hidden2, scratch->logits + i * SLIVER, SLIVER);
    }
    if (m->keypoints) {
        add_heats(scratch->logits, m->classes, statistics);
    } else {
        add_votes(scratch->logits, m->classes, statistics);
    }
}

static void label_tile(Interpreter *m, const Task *task, Scratch *scratch) {
    int y = task->which, x0 = task->first, last = m->num_levels - 1, first_level = 0, first = y * m->resolution + x0;
    int slivers = (task->count + SLIVER - 1) / SLIVER, depth = m->levels[last].channels;
    ptrdiff_t plane = (ptrdiff_t)m->resolution * m->resolution, size = (2 * (ptrdiff_t)m->classes + 1) * SLIVER;
    while (m->levels[first_level].size < m->base) first_level++;
    Pair pairs[MAX_LEVELS];
    find_pairs(m, y, first_level, pairs);
    pack_pixels(m->features[last] + first, plane, depth, task->count, scratch->pixels);
    memset(scratch->statistics, 0, slivers * size * sizeof(float));
    for (int head = 0; head < m->heads; head++) {
        interpolate(m, pairs, first_level, head, x0, scratch);
        for (int s = 0; s < slivers; s++) {
            run_head(m, head, scratch->pixels + (ptrdiff_t)s * depth * SLIVER,
                     scratch->hidden + (ptrdiff_t)s * m->padded1 * SLIVER, scratch->statistics + s * size, scratch);
        }
    }
    Peak *peaks = m->keypoints ? m->peaks + (ptrdiff_t)first / m->tile * m->classes : NULL;
    for (int k = 0; m->keypoints && k < m->classes; k++) peaks[k] = (Peak){-INFINITY, first};
    for (int s = 0; s < slivers; s++) {
        const float *statistics = scratch->statistics + s * size, *votes = statistics + m->classes * SLIVER;
        int count = task->count - s * SLIVER < SLIVER ? task->count - s * SLIVER : SLIVER, at = first + s * SLIVER;
        float js[SLIVER], entropy[SLIVER];
        divergence(m, statistics, js, entropy);
        memcpy(m->js + at, js, count * sizeof(float));
        memcpy(m->entropy + at, entropy, count * sizeof(float));
        if (m->keypoints) {
            seek(votes, m->classes, count, at, peaks);
        } else {
            elect(votes, m->classes, count, m->label + at);
        }
    }
}

/* ---- threads ---------------------------------------------------------------------------------------------------- */

/* Make this thread treat subnormal numbers as zero. Returns the state for `restore_subnormals`. */
static uint64_t flush_subnormals(void) {
    uint64_t before = 0;
#if defined(__SSE__)
    before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((unsigned)before | 0x8040); /* of results (FTZ) and of operands (DAZ) */
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1u << 24));
#endif
    return before;
}

static void restore_subnormals(uint64_t before) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

static void work(Interpreter *m, Scratch *scratch) {
    uint64_t control = flush_subnormals(); /* restored below: the calling thread keeps its own mode */
    pthread_mutex_lock(&m->mutex);
    while (m->next < m->num_tasks) {
        const Task *task = &m->tasks[m->next++];
        while (m->complete + 1 < task->phase) pthread_cond_wait(&m->ended, &m->mutex);
        pthread_mutex_unlock(&m->mutex);
        if (task->kind == PROJECT) {
            project(m, task, scratch);
        } else if (task->kind == EDGES) {
            make_edges(m, task, scratch);
        } else {
            label_tile(m, task, scratch);
        }
        pthread_mutex_lock(&m->mutex);
        if (--m->left[task->phase] == 0) {
            while (m->complete < m->num_phases && m->left[m->complete] == 0) m->complete++;
            pthread_cond_broadcast(&m->ended);
        }
    }
    pthread_mutex_unlock(&m->mutex);
    restore_subnormals(control);
}

typedef struct {
    Interpreter *interpreter;
    Scratch *scratch;
} Worker;

static void *work_of(void *argument) {
    Worker *worker = argument;
    work(worker->interpreter, worker->scratch);
    return NULL;
}

/* Label one sample from the features [C_r][r][r] of each level. Writes the JS divergence js [R][R] and the mean of the
heads' entropies entropy [R][R], both in nats, and, by the task, label [R][R] or keypoints [K][2] as (x, y) with
confidence [K]. */
void interpreter_run(Interpreter *m, const float *const *features, uint8_t *label, float *keypoints, float *confidence,
                     float *js, float *entropy) {
    m->features = features;
    m->label = label;
    m->js = js;
    m->entropy = entropy;
    m->next = m->complete = 0;
    memcpy(m->left, m->phase_tasks, m->num_phases * sizeof(int));
    while (m->complete < m->num_phases && m->left[m->complete] == 0) m->complete++;
    pthread_t threads[m->threads];
    Worker workers[m->threads];
    int started = 1;
    for (; started < m->threads; started++) {
        workers[started] = (Worker){m, &m->scratch[started]};
        /* If a thread cannot be created, the others do its tasks. */
        if (pthread_create(&threads[started], NULL, work_of, &workers[started]) != 0) break;
    }
    work(m, &m->scratch[0]);
    for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
    for (int k = 0; m->keypoints && k < m->classes; k++) {
        Peak best = m->peaks[k];
        for (int i = 1; i < m->resolution * (m->resolution / m->tile); i++) { /* row by row: the first wins a tie */
            if (hotter(m->peaks[i * m->classes + k].heat, best.heat)) best = m->peaks[i * m->classes + k];
        }
        keypoints[2 * k] = (float)(best.pixel % m->resolution);
        keypoints[2 * k + 1] = (float)(best.pixel / m->resolution);
        confidence[k] = best.heat * (1.0f / (float)m->heads);
    }
}

/* ---- creation --------------------------------------------------------------------------------------------------- */

/* Allocate zeroed floats with 2 * SLIVER spare floats before and after them; NULL if there is no memory. */
static float *floats(Interpreter *m, size_t count) {
    size_t size = (count + 4 * SLIVER) * sizeof(float);
    size = (size + 4095) / 4096 * 4096;
    void *block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(block, size, MADV_HUGEPAGE);
#endif
    m->blocks[m->num_blocks] = block;
    m->sizes[m->num_blocks++] = size;
    m->bytes += size;
    return (float *)block + 2 * SLIVER;
}

void interpreter_free(Interpreter *m) {
    if (m == NULL) return;
    for (int i = 0; i < m->num_blocks; i++) munmap(m->blocks[i], m->sizes[i]);
    free(m->blocks);
    free(m->sizes);
    free(m->tasks);
    free(m->phase_tasks);
    free(m->left);
    free(m->scratch);
    free(m->peaks);
    pthread_mutex_destroy(&m->mutex);
    pthread_cond_destroy(&m->ended);
    free(m);
}

/* The number of rows of a level, from the top, that the output rows before `end` read. */
static int rows_until(const Interpreter *m, const Level *level, int end) {
    double position = (end - 0.5) * level->size / m->resolution - 0.5;
    int last = (position < 0.0 ? 0 : (int)position) + 1;
    return (last < level->size ? last : level->size - 1) + 1;
}

static int first_row(const Interpreter *m, const Level *level, int start) {
    double position = (start + 0.5) * level->size / m->resolution - 0.5;
    return position < 0.0 ? 0 : (int)position;
}

static void add_task(Interpreter *m, int kind, int which, int first, int count) {
    if (m->phase_tasks != NULL) m->phase_tasks[m->num_phases]++;
    if (m->tasks != NULL) m->tasks[m->num_tasks] = (Task){kind, m->num_phases, which, first, count};
    m->num_tasks++;
}

static void project_rows(Interpreter *m, int l, int first, int end) {
    int r = m->levels[l].size;
    for (int pixel = first * r; pixel < end * r; pixel += BLOCK) {
        add_task(m, PROJECT, l, pixel, end * r - pixel < BLOCK ? end * r - pixel : BLOCK);
    }
}

/* List all tasks in the order in which the threads take them. The first call only counts them. */
static void plan(Interpreter *m) {
    int last = m->num_levels - 1, windows = 0;
    m->num_tasks = m->num_phases = 0;
    for (int l = 0; l < last; l++) windows |= m->levels[l].kept < m->levels[l].size;
    int strip = windows ? STRIP : m->resolution, strips = m->resolution / strip;
    for (int l = 0; m->levels[l].size < m->base; l++) project_rows(m, l, 0, m->levels[l].size);
    m->num_phases++;
    for (int l = 0; l < last; l++) {
        if (m->levels[l].size >= m->base && m->levels[l].kept == m->levels[l].size) project_rows(m, l, 0, m->levels[l].size);
    }
    m->num_phases++;
    for (int head = 0; head < m->heads; head++) add_task(m, EDGES, head, 0, 0);
    m->num_phases++;
    for (int s = 0; s <= strips; s++) {
        for (int l = 0; s < strips && l < last; l++) {
            const Level *level = &m->levels[l];
            if (level->kept == level->size) continue;
            project_rows(m, l, s ? rows_until(m, level, s * strip) : 0, rows_until(m, level, (s + 1) * strip));
        }
        m->num_phases++;
        for (int y = (s - 1) * strip; s > 0 && y < s * strip; y++) {
            for (int x = 0; x < m->resolution; x += m->tile) {
                add_task(m, LABEL, y, x, m->resolution - x < m->tile ? m->resolution - x : m->tile);
            }
        }
        m->num_phases++;
    }
}

/* The number of rows of a level that are stored: all, or a window that three strips in progress need. */
static int rows_kept(const Interpreter *m, const Level *level) {
    int most = 0;
    for (int s = 0; s < m->resolution / STRIP; s++) {
        int end = (s + 3) * STRIP < m->resolution ? (s + 3) * STRIP : m->resolution;
        int rows = rows_until(m, level, end) - first_row(m, level, s * STRIP);
        if (rows > most) most = rows;
    }
    return level->size > WHOLE && most < level->size ? most : level->size;
}

/* The functions below return 0 if there is no memory. */

static int make_levels(Interpreter *m, const int *channels, const float *const *projections) {
    size_t units = (size_t)m->heads * m->padded1;
    for (int l = 0; l < m->num_levels; l++) {
        Level *level = &m->levels[l];
        level->size = 4 << l;
        level->channels = channels[l];
        level->weights = floats(m, units * channels[l]);
        if (level->weights == NULL) return 0;
        for (int head = 0; head < m->heads; head++) {
            pack_weights(projections[l] + (ptrdiff_t)head * m->hidden1 * channels[l], m->hidden1, channels[l],
                         level->weights + (ptrdiff_t)head * m->padded1 * channels[l]);
        }
        if (l == m->num_levels - 1) break;
        level->kept = rows_kept(m, level);
        level->projected = floats(m, units * level->size * level->kept);
        if (level->projected == NULL) return 0;
    }
    return 1;
}

static int make_layers(Interpreter *m, const float *bias1, const float *weight2, const float *bias2, const float *weight3,
                       const float *bias3) {
    size_t units = (size_t)m->heads * m->padded1;
    m->edges = floats(m, (m->base + 1) * units * m->edge_stride);
    m->bias1 = floats(m, units);
    m->weights2 = floats(m, (size_t)m->heads * m->padded2 * m->hidden1);
    m->bias2 = floats(m, (size_t)m->heads * m->padded2);
    m->weights3 = floats(m, (size_t)m->heads * m->padded3 * m->hidden2);
    m->bias3 = floats(m, (size_t)m->heads * m->padded3);
    if (!m->edges || !m->bias1 || !m->weights2 || !m->bias2 || !m->weights3 || !m->bias3) return 0;
    for (int head = 0; head < m->heads; head++) {
        memcpy(m->bias1 + head * m->padded1, bias1 + head * m->hidden1, m->hidden1 * sizeof(float));
        memcpy(m->bias2 + head * m->padded2, bias2 + head * m->hidden2, m->hidden2 * sizeof(float));
        memcpy(m->bias3 + head * m->padded3, bias3 + head * m->classes, m->classes * sizeof(float));
        pack_weights(weight2 + (ptrdiff_t)head * m->hidden2 * m->hidden1, m->hidden2, m->hidden1,
                     m->weights2 + (ptrdiff_t)head * m->padded2 * m->hidden1);
        pack_weights(weight3 + (ptrdiff_t)head * m->classes * m->hidden2, m->classes, m->hidden2,
                     m->weights3 + (ptrdiff_t)head * m->padded3 * m->hidden2);
    }
    return 1;
}

static int make_scratch(Interpreter *m) {
    m->peaks = calloc((size_t)m->resolution * (m->resolution / m->tile) * m->classes, sizeof *m->peaks);
    if (m->peaks == NULL) return 0;
    size_t packed = 0, slivers = (m->tile + SLIVER - 1) / SLIVER;
    for (int l = 0; l < m->num_levels; l++) {
        size_t pixels = l == m->num_levels - 1 ? (size_t)m->tile : BLOCK;
        pixels = (pixels + SLIVER - 1) / SLIVER * SLIVER * m->levels[l].channels;
        if (pixels > packed) packed = pixels;
    }
    for (int i = 0; i < m->threads; i++) {
        Scratch *s = &m->scratch[i];
        s->pixels = floats(m, packed);
        s->hidden = floats(m, slivers * m->padded1 * SLIVER);
        s->hidden2 = floats(m, (size_t)m->padded2 * SLIVER);
        s->logits = floats(m, (size_t)m->padded3 * SLIVER);
        s->statistics = floats(m, slivers * (2 * m->classes + 1) * SLIVER);
        for (int j = 0; j < 3; j++) s->lines[j] = floats(m, GROUP * (m->tile / 2 + 4 * LANES));
        if (!s->pixels || !s->hidden || !s->hidden2 || !s->logits || !s->statistics) return 0;
        if (!s->lines[0] || !s->lines[1] || !s->lines[2]) return 0;
    }
    return 1;
}

static int make_tasks(Interpreter *m) {
    plan(m);
    m->tasks = calloc(m->num_tasks, sizeof *m->tasks);
    m->phase_tasks = calloc(m->num_phases, sizeof *m->phase_tasks);
    m->left = calloc(m->num_phases, sizeof *m->left);
    if (m->tasks == NULL || m->phase_tasks == NULL || m->left == NULL) return 0;
    plan(m);
    return 1;
}

/* Create an interpreter with the levels 4, 8, ..., R, of `channels[i]` channels each. The weights are row-major:
projections [N*h1][C_r], weight2 [N][h2][h1], weight3 [N][K][h2]. They are copied. NULL if there is no memory. */
Interpreter *interpreter_new(int keypoints, int num_levels, const int *channels, int heads, int hidden1, int hidden2, int classes,
                             const float *const *projections, const float *bias1, const float *weight2, const float *bias2,
                             const float *weight3, const float *bias3, int threads) {
    Interpreter *m = calloc(1, sizeof *m);
    if (m == NULL) return NULL;
    pthread_mutex_init(&m->mutex, NULL);
    pthread_cond_init(&m->ended, NULL);
    m->keypoints = keypoints, m->heads = heads, m->hidden1 = hidden1, m->hidden2 = hidden2, m->classes = classes, m->threads = threads;
    m->padded1 = padded(hidden1), m->padded2 = padded(hidden2), m->padded3 = padded(classes);
    m->num_levels = num_levels, m->resolution = 4 << (num_levels - 1);
    m->tile = TILE < m->resolution ? TILE : m->resolution;
    m->base = m->resolution / 2 < BASE ? m->resolution / 2 : BASE;
    m->edge_stride = m->base + 8;
    m->blocks = calloc(3 * MAX_LEVELS + 16 + 8 * threads, sizeof *m->blocks);
    m->sizes = calloc(3 * MAX_LEVELS + 16 + 8 * threads, sizeof *m->sizes);
    m->scratch = calloc(threads, sizeof *m->scratch);
    int made = m->blocks != NULL && m->sizes != NULL && m->scratch != NULL && make_levels(m, channels, projections) &&
               make_layers(m, bias1, weight2, bias2, weight3, bias3) && make_scratch(m) && make_tasks(m);
    if (made) return m;
    interpreter_free(m);
    return NULL;
}

/* The number of bytes allocated for weights, windows and the working memory of the threads. */
size_t interpreter_bytes(const Interpreter *m) { return m->bytes; }
