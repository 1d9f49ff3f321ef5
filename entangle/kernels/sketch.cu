// Statistics of the outputs of a layer, one pass over them (see stats/sketch.py, stats/bins.py).
// A thread block works on 64 neurons and on every gridDim.y-th part of the tokens: a warp reads one
// token's outputs at a time, and counts go to histograms in shared memory, two bins in a word.
// NUMBER, the type of the outputs, is defined before this file: float, half16 or bfloat16.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define NEURONS 64
#define WARPS 32
#define PER_OCTAVE_SHIFT 17  // 64 bins an octave: the six leading bits of the fraction
#define ONE (0x3F800000 >> PER_OCTAVE_SHIFT)
#define ALL 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)
#define AHEAD 4  // tokens whose loads are under way at the same time

__device__ __forceinline__ float as_float(float value) { return value; }

struct half16 { u16 bits; };
struct bfloat16 { u16 bits; };

__device__ __forceinline__ float as_float(half16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ __forceinline__ float as_float(bfloat16 value) {
    return __uint_as_float((u32)value.bits << 16);
}

// value / unit, to the last bit, given 1 / unit.
__device__ __forceinline__ float divided(float value, float unit, float inverse) {
    const float x = value * inverse;
    return fabsf(x) < INFINITE ? fmaf(fmaf(-x, unit, value), inverse, x) : value / unit;
}

// The bin of a value that is not negative; NaN goes to the last one.
__device__ __forceinline__ int magnitude_bin(float magnitude, int bins) {
    return min((__float_as_int(magnitude + 1.0f) >> PER_OCTAVE_SHIFT) - ONE, bins - 1);
}

// The bin of any finite value; it rises with the value.
__device__ __forceinline__ int signed_bin(float x, int half) {
    const int sign = __float_as_int(x + 0.0f) >> 31;  // -1 where negative, not for -0.0
    return half + (magnitude_bin(fabsf(x), half) ^ sign);
}

// Clear a thread block's counts, and the span of the bins that it counts in.
__device__ __forceinline__ void clear_counts(u32* counted, int words, int (*span)[NEURONS]) {
    uint4* quads = (uint4*)counted;
    for (int i = threadIdx.x; i < NEURONS / 4 * (words + 1); i += 32 * WARPS)
        quads[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < NEURONS) {
        span[0][threadIdx.x] = 2 * words - 1;
        span[1][threadIdx.x] = 0;
    }
    __syncthreads();
}

// Widen the span of one neuron's bins; all have to before the counts are flushed.
__device__ __forceinline__ void widen(int (*span)[NEURONS], int neuron, int low, int high) {
    atomicMin(&span[0][neuron], low);
    atomicMax(&span[1][neuron], high);
}

// Add what a thread block counted, (NEURONS, words + 1), to counts (neurons, 2 * words).
__device__ __forceinline__ void flush_counts(
    const u32* counted, int words, int (*span)[NEURONS], int* counts, int first, int neurons) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads();
    for (int i = warp; i < NEURONS && first + i < neurons; i += WARPS) {
        int* own = counts + (size_t)(first + i) * 2 * words;
        for (int word = (span[0][i] >> 1) + lane; word <= span[1][i] >> 1; word += 32) {
            const u32 two = counted[i * (words + 1) + word];
            if (two & 0xffffu) atomicAdd(own + 2 * word, (int)(two & 0xffffu));
            if (two >> 16) atomicAdd(own + 2 * word + 1, (int)(two >> 16));
        }
    }
}

// Tell the block that finishes last among those of one tile of neurons; all threads take part.
__device__ __forceinline__ bool is_last(u32* tickets, u32* slot) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *slot = atomicAdd(tickets + blockIdx.x, 1u) == gridDim.y - 1;
        if (*slot) tickets[blockIdx.x] = 0;
    }
    __syncthreads();
    __threadfence();
    return *slot;
}

struct Moments {
    float first, second, third, fourth, low, high;
    double rare[4];
    int flags;  // 1: a NaN was seen, 2: an infinity

    __device__ __forceinline__ void clear() {
        first = second = third = fourth = 0.0f;
        rare[0] = rare[1] = rare[2] = rare[3] = 0.0;
        low = INFINITE;
        high = -low;
        flags = 0;
    }

    // Take one value, given its distance from the centre of the bins, their unit and its inverse;
    // return its bin.
    __device__ __forceinline__ int add(float gap, float unit, float inverse, int half) {
        float x = divided(gap, unit, inverse);
        if (!(fabsf(x) < INFINITE)) {
            flags |= x != x ? 1 : 2;
            x = 0.0f;
        }
        low = fminf(low, x);
        high = fmaxf(high, x);
        const float square = x * x;
        if (fabsf(x) < 65536.0f) {
            first += x;
            second += square;
            third += square * x;
            fourth += square * square;
        } else {  // the fourth power may overflow
            const double wide = x, twice = wide * wide;
            rare[0] += wide;
            rare[1] += twice;
            rare[2] += twice * wide;
            rare[3] += twice * twice;
        }
        return signed_bin(x, half);
    }
};

// Count one more in a bin.
__device__ __forceinline__ void count(u32* own, int bin) {
    atomicAdd(own + (bin >> 1), bin & 1 ? 65536u : 1u);
}

// Sum one number of every thread over the warps, in a fixed order: totals[n] of neuron n.
__device__ __forceinline__ void sum_over_warps(double (*shared)[NEURONS], double a, double b) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads();
    shared[warp][lane] = a;
    shared[warp][lane + 32] = b;
    __syncthreads();
    if (threadIdx.x < NEURONS) {
        double total = 0.0;
        for (int i = 0; i < WARPS; ++i) total += shared[i][threadIdx.x];
        shared[0][threadIdx.x] = total;
    }
}

// As sum_over_warps: the smallest.
__device__ __forceinline__ void least_over_warps(double (*shared)[NEURONS], double a, double b) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __syncthreads();
    shared[warp][lane] = a;
    shared[warp][lane + 32] = b;
    __syncthreads();
    if (threadIdx.x < NEURONS) {
        double least = shared[0][threadIdx.x];
        for (int i = 1; i < WARPS; ++i) least = fmin(least, shared[i][threadIdx.x]);
        shared[0][threadIdx.x] = least;
    }
}

// Outputs (tokens, neurons) with `stride` numbers between rows. counts (neurons, 2 * words), powers
// (4, neurons), group_powers (2, neurons), low, high, nan, inf (neurons,) are added to. `partial`
// (8, gridDim.y, neurons) is work space; `tickets` (gridDim.x,) is zero before and after.
// Dynamic shared memory: 4 * NEURONS * (words + 1) bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS) add_outputs(
    const NUMBER* __restrict__ outputs, const float* __restrict__ location,
    const float* __restrict__ scale, int* counts, double* powers, double* group_powers, float* low,
    float* high, u8* nan, u8* inf, double* partial, u32* tickets, int tokens, int neurons,
    int stride, int words) {
    extern __shared__ u32 counted[];
    __shared__ double shared[WARPS][NEURONS];
    __shared__ u32 slot;
    __shared__ int span[2][NEURONS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int first = blockIdx.x * NEURONS, a = first + lane, b = a + 32;
    clear_counts(counted, words, span);
    // Columns beyond the last neuron repeat it; what they count is left.
    const int column[2] = {min(a, neurons - 1), min(b, neurons - 1)};
    const float centre[2] = {location[column[0]], location[column[1]]};
    const float unit[2] = {scale[column[0]], scale[column[1]]};
    const float inverse[2] = {1.0f / unit[0], 1.0f / unit[1]};
    u32* own[2] = {counted + lane * (words + 1), counted + (lane + 32) * (words + 1)};
    Moments sums[2];
    sums[0].clear();
    sums[1].clear();
    const int step = WARPS * gridDim.y;
    int token = warp * gridDim.y + blockIdx.y;
    for (; token + (AHEAD - 1) * step < tokens; token += AHEAD * step) {
        NUMBER y[AHEAD][2];
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            #pragma unroll
            for (int side = 0; side < 2; ++side)
                y[i][side] = outputs[(size_t)(token + i * step) * stride + column[side]];
        #pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            #pragma unroll
            for (int side = 0; side < 2; ++side) {
                const float gap = as_float(y[i][side]) - centre[side];
                count(own[side], sums[side].add(gap, unit[side], inverse[side], words));
            }
    }
    for (; token < tokens; token += step)
        #pragma unroll
        for (int side = 0; side < 2; ++side) {
            const float y = as_float(outputs[(size_t)token * stride + column[side]]);
            count(own[side], sums[side].add(y - centre[side], unit[side], inverse[side], words));
        }
    for (int side = 0; side < 2; ++side)
        if (sums[side].low <= sums[side].high)
            widen(span, lane + 32 * side, signed_bin(sums[side].low, words),
                  signed_bin(sums[side].high, words));
    flush_counts(counted, words, span, counts, first, neurons);
    const int me = first + threadIdx.x, parts = gridDim.y;
    const bool mine = threadIdx.x < NEURONS && me < neurons;
    double* out = partial + (size_t)blockIdx.y * neurons + me;
    const size_t next = (size_t)parts * neurons;
    const Moments &l = sums[0], &r = sums[1];
    sum_over_warps(shared, l.first + l.rare[0], r.first + r.rare[0]);
    if (mine) out[0] = shared[0][threadIdx.x];
    sum_over_warps(shared, l.second + l.rare[1], r.second + r.rare[1]);
    if (mine) out[next] = shared[0][threadIdx.x];
    sum_over_warps(shared, l.third + l.rare[2], r.third + r.rare[2]);
    if (mine) out[2 * next] = shared[0][threadIdx.x];
    sum_over_warps(shared, l.fourth + l.rare[3], r.fourth + r.rare[3]);
    if (mine) out[3 * next] = shared[0][threadIdx.x];
    least_over_warps(shared, l.low, r.low);
    if (mine) out[4 * next] = shared[0][threadIdx.x];
    least_over_warps(shared, -l.high, -r.high);
    if (mine) out[5 * next] = shared[0][threadIdx.x];
    sum_over_warps(shared, l.flags & 1, r.flags & 1);
    if (mine) out[6 * next] = shared[0][threadIdx.x];
    sum_over_warps(shared, l.flags & 2, r.flags & 2);
    if (mine) out[7 * next] = shared[0][threadIdx.x];
    if (!is_last(tickets, &slot) || !mine) return;
    double total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int q = 0; q < 8; ++q) {
        const double* in = partial + q * next + me;
        total[q] = __ldcg(in);
        for (int part = 1; part < parts; ++part) {
            const double other = __ldcg(in + (size_t)part * neurons);
            total[q] = q == 4 || q == 5 ? fmin(total[q], other) : total[q] + other;
        }
    }
    for (int q = 0; q < 4; ++q) powers[(size_t)q * neurons + me] += total[q];
    for (int q = 0; q < 2; ++q) group_powers[(size_t)q * neurons + me] += total[q];
    low[me] = fminf(low[me], (float)total[4]);
    high[me] = fmaxf(high[me], (float)-total[5]);
    nan[me] |= total[6] > 0.0;
    inf[me] |= total[7] > 0.0;
}

// Outputs at both tokens of some pairs, each (pairs, neurons); pairs at distance 0 are left out.
// counts (neurons, 2 * words), sums (2, neurons): slope and |difference|, highest (neurons,).
extern "C" __global__ void __launch_bounds__(32 * WARPS) add_pairs(
    const NUMBER* __restrict__ one, const NUMBER* __restrict__ two, const float* __restrict__ distance,
    const float* __restrict__ scale, int* counts, double* sums, float* highest, double* partial,
    u32* tickets, int pairs, int neurons, int stride, int words) {
    extern __shared__ u32 counted[];
    __shared__ double shared[WARPS][NEURONS];
    __shared__ u32 slot;
    __shared__ int span[2][NEURONS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int first = blockIdx.x * NEURONS, a = first + lane, b = a + 32;
    clear_counts(counted, words, span);
    const int column[2] = {min(a, neurons - 1), min(b, neurons - 1)};
    const float unit[2] = {scale[column[0]], scale[column[1]]};
    const float inverse[2] = {1.0f / unit[0], 1.0f / unit[1]};
    u32* own[2] = {counted + lane * (words + 1), counted + (lane + 32) * (words + 1)};
    float slope[2] = {0.0f, 0.0f}, total[2] = {0.0f, 0.0f}, peak[2] = {0.0f, 0.0f};
    int most[2] = {0, 0};
    const int step = WARPS * gridDim.y;
    #pragma unroll 4
    for (int pair = warp * gridDim.y + blockIdx.y; pair < pairs; pair += step) {
        const float apart = distance[pair];
        if (!(apart > 0.0f)) continue;
        const float weight = 1.0f / apart;
        const size_t row = (size_t)pair * stride;
        #pragma unroll
        for (int side = 0; side < 2; ++side) {
            const float dy = fabsf(
                as_float(one[row + column[side]]) - as_float(two[row + column[side]]));
            slope[side] += dy * weight;
            total[side] += dy;
            peak[side] = fmaxf(peak[side], dy);
            const int bin = magnitude_bin(divided(dy, unit[side], inverse[side]), 2 * words);
            most[side] = max(most[side], bin);
            count(own[side], bin);
        }
    }
    for (int side = 0; side < 2; ++side) widen(span, lane + 32 * side, 0, most[side]);
    flush_counts(counted, words, span, counts, first, neurons);
    const int me = first + threadIdx.x, parts = gridDim.y;
    const bool mine = threadIdx.x < NEURONS && me < neurons;
    double* out = partial + (size_t)blockIdx.y * neurons + me;
    const size_t next = (size_t)parts * neurons;
    sum_over_warps(shared, slope[0], slope[1]);
    if (mine) out[0] = shared[0][threadIdx.x];
    sum_over_warps(shared, total[0], total[1]);
    if (mine) out[next] = shared[0][threadIdx.x];
    least_over_warps(shared, -peak[0], -peak[1]);
    if (mine) out[2 * next] = shared[0][threadIdx.x];
    if (!is_last(tickets, &slot) || !mine) return;
    double whole[3] = {0, 0, 0};
    for (int part = 0; part < parts; ++part)
        for (int q = 0; q < 3; ++q) {
            const double value = __ldcg(partial + q * next + (size_t)part * neurons + me);
            whole[q] = q == 2 ? fmin(whole[q], value) : whole[q] + value;
        }
    sums[me] += whole[0];
    const double sum = sums[neurons + me] += whole[1];
    highest[me] = sum != sum ? (float)sum : fmaxf(highest[me], (float)-whole[2]);
}

// Distances of rows of two matrices (pairs, features), one warp a pair.
extern "C" __global__ void __launch_bounds__(256) distances(
    const NUMBER* __restrict__ one, const NUMBER* __restrict__ two, float* out, int pairs,
    int features, int stride) {
    const int lane = threadIdx.x & 31, each = 16 / sizeof(NUMBER);  // numbers in 16 bytes
    const int pair = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (pair >= pairs) return;
    one += (size_t)pair * stride;
    two += (size_t)pair * stride;
    float total = 0.0f;
    int done = 0;
    if ((((size_t)one | (size_t)two) & 15) == 0) {
        for (int i = lane; i < features / each; i += 32) {
            const uint4 first = ((const uint4*)one)[i], second = ((const uint4*)two)[i];
            const NUMBER *a = (const NUMBER*)&first, *b = (const NUMBER*)&second;
            #pragma unroll
            for (int j = 0; j < each; ++j) {
                const float gap = as_float(a[j]) - as_float(b[j]);
                total += gap * gap;
            }
        }
        done = features / each * each;
    }
    for (int i = done + lane; i < features; i += 32) {
        const float gap = as_float(one[i]) - as_float(two[i]);
        total += gap * gap;
    }
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(ALL, total, step);
    if (lane == 0) out[pair] = sqrtf(total);
}
