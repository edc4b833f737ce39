/* θᵤ + α·(θᵤ − θ₀) and its moments in one pass, for the types most checkpoints have.
 *
 * The numbers are those of blocks.py, which says what they mean: every operation below is one
 * IEEE 754 operation of that module, in its order, so the weights have the same bits. The
 * moments are summed in a fixed number of lanes, so no processor changes them.
 *
 * A cell goes through in chunks that stay in the first-level cache: both inputs are widened to
 * the working type, the result is formed and rounded in registers, and narrowed into the output.
 * The last chunk is padded with zeros, which add nothing to any sum.
 *
 * Compile with -ffp-contract=off: a fused multiply-add rounds once where two roundings are due.
 * And with -fno-strict-aliasing: the same buffers are looked at as numbers and as their bits.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { CHUNK = 1024, GROUPS = 4, VECTOR_BYTES = 32, MOST_LANES = GROUPS * VECTOR_BYTES / 4 };
enum { UPDATE, UNLEARNED, ALONG, ERROR, CHANGED, DIFFERING, MOMENTS };
enum { BF16, F32 };

typedef double Sums[MOMENTS][MOST_LANES];

/* One copy of each loop per instruction set, chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif

typedef float Singles __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t SingleBits __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float HalfSingles __attribute__((vector_size(VECTOR_BYTES / 2)));

/* To nearest, ties to even, by carrying into the bits that stay. NaN may come out as anything:
 * it has shown in the moments by then, and the block is done again by blocks.py. */
#define CARRIED(bits) ((Singles)(((bits) + 0x7fff + (((bits) >> 16) & 1)) & 0xffff0000u))
#define TO_BF16(sum, at) CARRIED((SingleBits)(sum))
#define TO_F32(sum, at)                                                                            \
    __builtin_convertvector(__builtin_convertvector(sum, HalfSingles), Doubles)
/* Up as often as the bits that go are a part of their unit: noise is uniform in 0 … 2¹⁶ − 1. */
#define TO_BF16_BY_CHANCE(sum, at) ((Singles)(((SingleBits)(sum) + noise[at]) & 0xffff0000u))

/* The update is formed with its sign turned, and so is the step, so that +0 stands where v = 0:
 * θᵤ − (+0) is θᵤ for either zero, where θᵤ + 0 would turn −0 into +0. */
#define DEFINE_CHUNK(NAME, REAL, VECTOR, ROUNDED)                                                  \
    VECTORISED static void NAME(                                                                   \
        const VECTOR *restrict original, const VECTOR *restrict unlearned,                         \
        VECTOR *restrict result, const SingleBits *restrict noise, REAL size, int negative,        \
        Sums sums)                                                                                 \
    {                                                                                              \
        enum { WIDTH = VECTOR_BYTES / sizeof(REAL) };                                              \
        (void)noise;                                                                               \
        VECTOR update[GROUPS] = {0}, square[GROUPS] = {0}, along[GROUPS] = {0};                    \
        VECTOR error[GROUPS] = {0};                                                                \
        VECTOR changed[GROUPS] = {0}, differing[GROUPS] = {0};                                     \
        for (int i = 0; i < CHUNK / WIDTH; i += GROUPS) {                                          \
            _Pragma("GCC unroll 4") for (int g = 0; g < GROUPS; g++) {                             \
                VECTOR theta = unlearned[i + g];                                                   \
                VECTOR back = original[i + g] - theta;                                             \
                VECTOR step = negative ? 0 - back * size : back * size;                            \
                VECTOR rounded = ROUNDED(theta - step, i + g);                                     \
                VECTOR moved = rounded - theta;                                                    \
                VECTOR missed = moved + step;                                                      \
                result[i + g] = rounded;                                                           \
                update[g] += back * back;                                                          \
                square[g] += theta * theta;                                                        \
                along[g] -= moved * back;                                                          \
                error[g] += missed * missed;                                                       \
                changed[g] -= __builtin_convertvector(moved != 0, VECTOR);                         \
                differing[g] -= __builtin_convertvector(back != 0, VECTOR);                        \
            }                                                                                      \
        }                                                                                          \
        for (int lane = 0; lane < GROUPS * WIDTH; lane++) {                                        \
            const int g = lane / WIDTH, k = lane % WIDTH;                                          \
            sums[UPDATE][lane] += (double)update[g][k];                                            \
            sums[UNLEARNED][lane] += (double)square[g][k];                                         \
            sums[ALONG][lane] += (double)along[g][k];                                              \
            sums[ERROR][lane] += (double)error[g][k];                                              \
            sums[CHANGED][lane] += (double)changed[g][k];                                          \
            sums[DIFFERING][lane] += (double)differing[g][k];                                      \
        }                                                                                          \
    }

DEFINE_CHUNK(chunk_in_float, float, Singles, TO_BF16)
DEFINE_CHUNK(chunk_by_chance, float, Singles, TO_BF16_BY_CHANCE)
DEFINE_CHUNK(chunk_in_double, double, Doubles, TO_F32)

#define DEFINE_CONVERSION(NAME, FROM, TO, VALUE)                                                   \
    VECTORISED static void NAME(const FROM *restrict from, TO *restrict to, size_t count)          \
    {                                                                                              \
        for (size_t i = 0; i < count; i++)                                                         \
            to[i] = (TO)(VALUE);                                                                   \
    }

DEFINE_CONVERSION(bf16_to_f32, uint16_t, uint32_t, (uint32_t)from[i] << 16)
DEFINE_CONVERSION(f32_to_bf16, uint32_t, uint16_t, from[i] >> 16)
DEFINE_CONVERSION(f32_to_f64, float, double, from[i])
DEFINE_CONVERSION(f64_to_f32, double, float, from[i])

/* Noise of a tensor's elements from ``first``, 16 bits each, as noise.py defines it: SplitMix64
 * (Steele, Lea, Flood 2014) of the tensor's key, a word for every four elements. */
VECTORISED static void draw(uint64_t key, uint64_t first, uint32_t *restrict noise)
{
    uint64_t words[CHUNK / 4 + 1];
    for (int i = 0; i < CHUNK / 4 + 1; i++) {
        uint64_t word = key + (first / 4 + (uint64_t)i + 1) * 0x9e3779b97f4a7c15u;
        word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
        word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
        words[i] = word ^ (word >> 31);
    }
    for (unsigned i = 0, at = first % 4; i < CHUNK; i++, at++)
        noise[i] = (uint32_t)(words[at / 4] >> (16 * (at % 4))) & 0xffff;
}

/* What of an element's result is kept, and by which chance where it is not the nearest. */
typedef struct {
    double alpha;
    int by_chance;
    uint64_t key, first;
} Rule;

static const char *position(const Py_buffer *buffer, int type, size_t at)
{
    return (const char *)buffer->buf + at * (type == BF16 ? 2 : 4);
}

/* The output is of 16 bits, the arithmetic in float32. */
static void cell_in_float(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    size_t start, size_t count, const Rule *rule, Sums sums)
{
    SingleBits noise[CHUNK * sizeof(uint32_t) / VECTOR_BYTES];
    Singles wide[3][CHUNK * sizeof(float) / VECTOR_BYTES];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        const Py_buffer *sides[] = {original, unlearned};
        const int types[] = {first, second};
        for (int side = 0; side < 2; side++) {
            const void *from = position(sides[side], types[side], at);
            if (types[side] == BF16)
                bf16_to_f32(from, (void *)wide[side], some);
            else
                memcpy(wide[side], from, some * sizeof(float));
        }
        const float size = (float)fabs(rule->alpha);
        if (rule->by_chance) {
            draw(rule->key, rule->first + at, (void *)noise);
            chunk_by_chance(wide[0], wide[1], wide[2], noise, size, rule->alpha < 0, sums);
        } else {
            chunk_in_float(wide[0], wide[1], wide[2], NULL, size, rule->alpha < 0, sums);
        }
        f32_to_bf16((void *)wide[2], (void *)position(out, BF16, at), some);
    }
}

/* The output is float32, the arithmetic in float64. */
static void cell_in_double(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    size_t start, size_t count, const Rule *rule, Sums sums)
{
    Doubles wide[3][CHUNK * sizeof(double) / VECTOR_BYTES];
    float narrow[CHUNK];
    for (size_t at = start; at < start + count; at += CHUNK) {
        size_t some = start + count - at < CHUNK ? start + count - at : CHUNK;
        if (some < CHUNK)
            memset(wide, 0, sizeof wide);
        const Py_buffer *sides[] = {original, unlearned};
        const int types[] = {first, second};
        for (int side = 0; side < 2; side++) {
            const void *from = position(sides[side], types[side], at);
            if (types[side] == BF16) {
                bf16_to_f32(from, (void *)narrow, some);
                from = narrow;
            }
            f32_to_f64(from, (void *)wide[side], some);
        }
        chunk_in_double(
            wide[0], wide[1], wide[2], NULL, fabs(rule->alpha), rule->alpha < 0, sums);
        f64_to_f32((void *)wide[2], (void *)position(out, F32, at), some);
    }
}

/* Add up the lanes, pair by pair, and return the moments of one cell as a tuple. */
static PyObject *moments(Sums sums)
{
    for (int half = MOST_LANES / 2; half; half /= 2)
        for (int moment = 0; moment < MOMENTS; moment++)
            for (int lane = 0; lane < half; lane++)
                sums[moment][lane] += sums[moment][lane + half];
    return Py_BuildValue(
        "(dddddd)", sums[UPDATE][0], sums[UNLEARNED][0], sums[ALONG][0], sums[ERROR][0],
        sums[CHANGED][0], sums[DIFFERING][0]);
}

static PyObject *run(
    const Py_buffer *original, int first, const Py_buffer *unlearned, int second, Py_buffer *out,
    int third, const Rule *rule, Py_ssize_t cell)
{
    size_t elements = (size_t)out->len / (third == BF16 ? 2 : 4);
    size_t cells = (elements + (size_t)cell - 1) / (size_t)cell;
    Sums *sums = PyMem_Calloc(cells ? cells : 1, sizeof(Sums));
    if (sums == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (size_t number = 0; number < cells; number++) {
        size_t start = number * (size_t)cell;
        size_t count = elements - start < (size_t)cell ? elements - start : (size_t)cell;
        if (third == BF16)
            cell_in_float(
                original, first, unlearned, second, out, start, count, rule, sums[number]);
        else
            cell_in_double(
                original, first, unlearned, second, out, start, count, rule, sums[number]);
    }
    Py_END_ALLOW_THREADS
    PyObject *found = PyList_New((Py_ssize_t)cells);
    for (size_t number = 0; found != NULL && number < cells; number++) {
        PyObject *row = moments(sums[number]);
        if (row == NULL)
            Py_CLEAR(found);
        else
            PyList_SetItem(found, (Py_ssize_t)number, row); /* takes the reference */
    }
    PyMem_Free(sums);
    return found;
}

static int type_of(char name)
{
    return name == 'B' ? BF16 : name == 'F' ? F32 : -1;
}

static PyObject *extrapolate(PyObject *module, PyObject *arguments)
{
    (void)module;
    Py_buffer original, unlearned, out;
    char one, two, three;
    Rule rule;
    unsigned long long key, position_of_first;
    Py_ssize_t cell;
    if (!PyArg_ParseTuple(
            arguments, "y*cy*cw*cdnpKK:extrapolate", &original, &one, &unlearned, &two, &out,
            &three, &rule.alpha, &cell, &rule.by_chance, &key, &position_of_first))
        return NULL;
    rule.key = key, rule.first = position_of_first;
    PyObject *found = NULL;
    const int first = type_of(one), second = type_of(two), third = type_of(three);
    if (first < 0 || second < 0 || third < 0 || cell < 1)
        PyErr_SetString(PyExc_ValueError, "a type is 'B' or 'F', and a cell has an element");
    else if (original.len / (first == BF16 ? 2 : 4) != out.len / (third == BF16 ? 2 : 4)
             || unlearned.len / (second == BF16 ? 2 : 4) != out.len / (third == BF16 ? 2 : 4))
        PyErr_SetString(PyExc_ValueError, "the three buffers hold different numbers of elements");
    else
        found = run(&original, first, &unlearned, second, &out, third, &rule, cell);
    PyBuffer_Release(&original);
    PyBuffer_Release(&unlearned);
    PyBuffer_Release(&out);
    return found;
}

static PyMethodDef methods[] = {
    {"extrapolate", extrapolate, METH_VARARGS,
     "Fill a buffer with the extrapolation of two others; return the moments of every cell."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fused",
    .m_doc = "The extrapolation of bfloat16 and float32 blocks in one pass.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit_fused(void)
{
    return PyModuleDef_Init(&definition);
}
