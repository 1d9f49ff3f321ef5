#include "tile.cuh"

// Statistics of all outputs.

struct Powers {
    float first, second, third, fourth;

    // Take a value that is near, and count it.
    __device__ __forceinline__ void add(float y, const Place& at, u32* own) {
        const float gap = y - at.centre, ratio = gap * at.inverse, x = refined(gap, ratio, at);
        const float square = x * x;
        first += x;
        second += square;
        third = fmaf(square, x, third);
        fourth = fmaf(square, square, fourth);
        const int k = (__float_as_int(fabsf(x) + 1.0f) >> PER_OCTAVE_SHIFT) - ONE;
        count(own, k, ratio < 0.0f ? 65536u : 1u);
    }
};

// A thread's share of the outputs.
struct Share {
    const NUMBER* from;
    size_t pitch;  // between its tokens, in numbers
    int tokens, gap;  // between its columns
    Place at[2];
    float reach;  // values nearer than this, in units, lie below the last bin
};

// Load some outputs, and find both neurons' least and greatest distance from the centre; false
// where one is NaN or beyond reach.
template <bool PAIRED>
__device__ __forceinline__ bool load_near(
    const Share& my, const NUMBER* from, int here, Two<NUMBER>* y, float (*ends)[2]) {
    #pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        y[i] = two_at<PAIRED>(i < here ? from + i * my.pitch : from, my.gap);
    Two<NUMBER> low = y[0], high = y[0];
    #pragma unroll
    for (int i = 1; i < AHEAD; ++i) widen(low, high, y[i]);
    ends[0][0] = low.left() - my.at[0].centre;
    ends[0][1] = high.left() - my.at[0].centre;
    ends[1][0] = low.right() - my.at[1].centre;
    ends[1][1] = high.right() - my.at[1].centre;
    const float inverse[2] = {my.at[0].inverse, my.at[1].inverse};
    return (fabsf(ends[0][0] * inverse[0]) < my.reach) & (fabsf(ends[0][1] * inverse[0]) < my.reach)
        & (fabsf(ends[1][0] * inverse[1]) < my.reach) & (fabsf(ends[1][1] * inverse[1]) < my.reach);
}

// Add some outputs, at most AHEAD; false if they are left, as one is not near.
template <bool PAIRED>
__device__ __forceinline__ bool add_some(
    const Share& my, const NUMBER* from, int here, u32* own, Powers* sums, float (*span)[2]) {
    Two<NUMBER> y[AHEAD];
    float ends[2][2];
    if (!load_near<PAIRED>(my, from, here, y, ends)) return false;
    #pragma unroll
    for (int side = 0; side < 2; ++side) {
        span[side][0] = fminf(span[side][0], ends[side][0]);
        span[side][1] = fmaxf(span[side][1], ends[side][1]);
    }
    #pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < here) {
            sums[0].add(y[i].left(), my.at[0], own);
            sums[1].add(y[i].right(), my.at[1], own + 32);
        }
    return true;
}

// Add the outputs; false if some are left.
template <bool PAIRED>
__device__ __forceinline__ bool add_near(
    const Share& my, u32* own, Powers* sums, float (*span)[2]) {
    const NUMBER* from = my.from;
    bool all = true;
    int left = my.tokens;
    #pragma unroll 1
    for (; left >= AHEAD; left -= AHEAD, from += AHEAD * my.pitch)
        all &= add_some<PAIRED>(my, from, AHEAD, own, sums, span);
    return left ? add_some<PAIRED>(my, from, left, own, sums, span) && all : all;
}

// What is found of one neuron, in shared memory: extremes of x as ordered integers.
struct Found { int low[NEURONS], high[NEURONS]; };

__device__ __forceinline__ void widen(Found& found, int slot, float low, float high) {
    atomicMin(&found.low[slot], ordered(low));
    atomicMax(&found.high[slot], ordered(high));
}

// Add the outputs that add_near left. nan and inf: flags of the first of the thread's neurons.
__device__ __forceinline__ void add_far(
    const Share& my, u32* own, int rows, double (*sums)[4], Found& found, u8* nan, u8* inf) {
    const NUMBER* from = my.from;
    #pragma unroll 1
    for (int left = my.tokens; left > 0; left -= AHEAD, from += AHEAD * my.pitch) {
        Two<NUMBER> y[AHEAD];
        float ends[2][2];
        const int here = min(left, AHEAD);
        if (load_near<false>(my, from, here, y, ends)) continue;
        #pragma unroll 1
        for (int i = 0; i < here; ++i)
            #pragma unroll
            for (int side = 0; side < 2; ++side) {
                const float value = as_float(from[i * my.pitch + side * my.gap]);
                float x = (value - my.at[side].centre) / my.at[side].unit;
                if (!(fabsf(x) < INFINITE)) {
                    (x != x ? nan : inf)[side * my.gap] = 1;
                    x = 0.0f;
                }
                const double wide = x, square = wide * wide;
                sums[side][0] += wide;
                sums[side][1] += square;
                sums[side][2] += square * wide;
                sums[side][3] += square * square;
                widen(found, (threadIdx.x & 31) + 32 * side, x, x);
                const int k = magnitude_bin(fabsf(x), rows);
                count(own + 32 * side, k, x < 0.0f ? 65536u : 1u);
            }
    }
}

// The least or greatest of two floats in memory; neither is NaN.
__device__ __forceinline__ void lower(float* place, float x) {
    if (__float_as_int(x) < 0) atomicMax((u32*)place, __float_as_uint(x));
    else atomicMin((int*)place, __float_as_int(x));
}

__device__ __forceinline__ void raise(float* place, float x) {
    if (__float_as_int(x) < 0) atomicMin((u32*)place, __float_as_uint(x));
    else atomicMax((int*)place, __float_as_int(x));
}

// Outputs (tokens, neurons) with `stride` numbers between rows. counts (neurons, 2 * rows), powers
// (4, neurons), group_powers (2, neurons), low, high, nan, inf (neurons,) are added to. `partial`
// (4, gridDim.y, neurons) is work space; `tickets` (gridDim.x,) is zero before and after.
// Dynamic shared memory: 4 * NEURONS * rows bytes, and at least 4 * 8 * NEURONS * WARPS.
// Several layers at once, where `bounds` (2, gridDim.z) is no null pointer: rows bounds[0, z] to
// bounds[1, z] of the outputs are those of layer z, whose neurons come after those of layer z - 1 in
// all that is added to; `partial` is (gridDim.z, 4, gridDim.y, neurons), `tickets` (gridDim.z,
// gridDim.x). Powers, and those of the group, of one neuron are `apart` numbers apart.
extern "C" __global__ void __launch_bounds__(32 * WARPS) add_outputs(
    const NUMBER* __restrict__ outputs, const float* __restrict__ location,
    const float* __restrict__ scale, int* counts, double* powers, double* group_powers, float* low,
    float* high, u8* nan, u8* inf, double* partial, u32* tickets, const int* __restrict__ bounds,
    int tokens, int neurons, int stride, int rows, int apart) {
    extern __shared__ __align__(16) u32 counted[];
    __shared__ Found found;
    if (bounds) {
        const int first = bounds[blockIdx.z];
        const size_t before = (size_t)blockIdx.z * neurons;
        tokens = bounds[gridDim.z + blockIdx.z] - first;
        if (tokens <= 0) return;
        outputs += (size_t)first * stride;
        location += before; scale += before;
        counts += before * 2 * rows;
        powers += before; group_powers += before;
        low += before; high += before;
        nan += before; inf += before;
        partial += before * 4 * gridDim.y;
        tickets += blockIdx.z * gridDim.x;
    }
    const int lane = threadIdx.x & 31, step = WARPS * gridDim.y;
    const int begin = (threadIdx.x >> 5) * gridDim.y + blockIdx.y;
    const Columns columns = my_columns((size_t)outputs, neurons, stride);
    clear(counted, rows);
    if (threadIdx.x < NEURONS) {
        found.low[threadIdx.x] = ordered(INFINITE);
        found.high[threadIdx.x] = ordered(-INFINITE);
    }
    __syncthreads();
    Share my;
    my.from = outputs + (size_t)begin * stride + columns.a;
    my.pitch = (size_t)step * stride;
    my.tokens = begin < tokens ? (tokens - 1 - begin) / step + 1 : 0;
    my.gap = columns.b - columns.a;
    my.at[0] = place_at(location[columns.a], scale[columns.a]);
    my.at[1] = place_at(location[columns.b], scale[columns.b]);
    my.reach = 0.9f * ((1 << rows / 64) - 1);
    Powers sums[2] = {};
    float span[2][2] = {{INFINITE, -INFINITE}, {INFINITE, -INFINITE}};
    const bool all = columns.paired ? add_near<true>(my, counted + lane, sums, span)
                                    : add_near<false>(my, counted + lane, sums, span);
    double own[2][4];
    #pragma unroll
    for (int side = 0; side < 2; ++side) {
        own[side][0] = sums[side].first;
        own[side][1] = sums[side].second;
        own[side][2] = sums[side].third;
        own[side][3] = sums[side].fourth;
        if (span[side][0] > span[side][1]) continue;
        const Place& at = my.at[side];
        widen(found, lane + 32 * side, refined(span[side][0], span[side][0] * at.inverse, at),
              refined(span[side][1], span[side][1] * at.inverse, at));
    }
    if (!all) add_far(my, counted + lane, rows, own, found, nan + columns.a, inf + columns.a);
    __syncthreads();
    int last = 0;  // row that has counts
    for (int slot = lane; slot < NEURONS; slot += 32) {
        const float low = unordered(found.low[slot]), high = unordered(found.high[slot]);
        last = max(last, magnitude_bin(fmaxf(fabsf(low), fabsf(high)), rows));
    }
    for (int apart = 16; apart; apart >>= 1) last = max(last, __shfl_xor_sync(ALL, last, apart));
    flush<true>(counted, (last / ROWS + 1) * ROWS, counts, 2 * rows, neurons);
    const int slot = threadIdx.x % NEURONS, q = threadIdx.x / NEURONS, neuron = neuron_of(slot);
    if (q == 0 && neuron < neurons) {
        lower(low + neuron, unordered(found.low[slot]));
        raise(high + neuron, unordered(found.high[slot]));
    }
    double sum;
    if (!summed<4>(own, (double*)counted, partial, tickets, neurons, sum)) return;
    powers[(size_t)q * apart + neuron] += sum;
    if (q < 2) group_powers[(size_t)q * apart + neuron] += sum;
}

// Sums of squares of the rows of several layers, bounds (2, gridDim.y) as above, of every one of
// (rows, features) with `stride` numbers between rows: found (gridDim.y, features) is added to.
extern "C" __global__ void __launch_bounds__(256) add_squares(
    const NUMBER* __restrict__ inputs, const int* __restrict__ bounds, double* found, int features,
    int stride) {
    __shared__ float sums[8][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int feature = blockIdx.x * 32 + lane;
    const int last = bounds[gridDim.y + blockIdx.y];
    float sum = 0.0f;
    if (feature < features) {
        #pragma unroll 8
        for (int row = bounds[blockIdx.y] + warp; row < last; row += 8) {
            const float x = as_float(inputs[(size_t)row * stride + feature]);
            sum = fmaf(x, x, sum);
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp || feature >= features) return;
    double total = 0.0;
    #pragma unroll
    for (int i = 0; i < 8; ++i) total += sums[i][lane];
    found[(size_t)blockIdx.y * features + feature] += total;
}

// Credit counts (neurons, fold * joined), every `fold` bins joined, to a group, less what is
// closed: group and closed (neurons, joined). One warp a neuron; low and high are its extremes.
extern "C" __global__ void __launch_bounds__(256) close_group(
    const int* __restrict__ counts, int* closed, int* group, const float* __restrict__ low,
    const float* __restrict__ high, int neurons, int joined, int fold) {
    const int neuron = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (neuron >= neurons) return;
    const int half = joined * fold / 2;
    const int first = signed_bin(low[neuron], half) / fold;
    const int last = signed_bin(high[neuron], half) / fold;
    for (int bin = first + (threadIdx.x & 31); bin <= last; bin += 32) {
        const size_t place = (size_t)neuron * joined + bin;
        int sum = 0;
        for (int i = 0; i < fold; ++i) sum += counts[place * fold + i];
        group[place] += sum - closed[place];
        closed[place] = sum;
    }
}
