#include "tile.cuh"

// Statistics of pairs of tokens.

// Rows of two matrices that belong together: pair i joins row (a + i) % rows with (b + i) % rows.
struct Pairing {
    int pairs, rows, a, b;
    __device__ __forceinline__ u32 first(int i) const { return a + i - (i < rows - a ? 0 : rows); }
    __device__ __forceinline__ u32 second(int i) const { return b + i - (i < rows - b ? 0 : rows); }
};

struct Gaps {
    float slope, total, peak;

    // Take |difference| of the outputs of a pair, given 1 / distance of its inputs, and count it.
    template <bool FAST>
    __device__ __forceinline__ void add(
        float dy, float slant, const Place& at, int bins, u32* own) {
        slope = fmaf(dy, slant, slope);
        total += dy;
        peak = fmaxf(peak, dy);
        const float x = FAST ? refined(dy, dy * at.inverse, at) : dy / at.unit;
        count(own, magnitude_bin(fabsf(x), bins), 1);  // an infinite dy gives NaN
    }
};

// Two columns of the outputs at both tokens of the pairs.
struct Outputs {
    const NUMBER *one, *two;
    u32 pitch;  // between rows, in bytes
    int gap;    // between the columns

    template <bool PAIRED>
    __device__ __forceinline__ Two<NUMBER> row(const NUMBER* from, u32 which) const {
        return two_at<PAIRED>((const NUMBER*)((const char*)from + (size_t)which * pitch), gap);
    }
};

// Add the pairs of a warp, which are `step` apart from `begin` on; all of its lanes take part.
// FAST: numbers are neighbours, and units usual.
template <bool FAST>
__device__ __forceinline__ void add_gaps(
    const Outputs& from, const float* distance, const Pairing& of, int begin, int step,
    const Place* at, int bins, Gaps* sums, u32* own) {
    const int lane = threadIdx.x & 31;
    for (; begin < of.pairs; begin += 32 * step) {
        // Every lane looks one pair up, and tells the others.
        const int mine = min(begin + lane * step, of.pairs - 1);
        const u32 first = of.first(mine), second = of.second(mine);
        const float apart = distance[mine], slant = 1.0f / apart;
        const u32 counts = __ballot_sync(ALL, begin + lane * step < of.pairs && apart > 0.0f);
        for (int next = 0; next < 32 && counts >> next; next += PAIRS_AHEAD) {
            Two<NUMBER> one[PAIRS_AHEAD], two[PAIRS_AHEAD];
            float weight[PAIRS_AHEAD];
            #pragma unroll
            for (int i = 0; i < PAIRS_AHEAD; ++i) {
                one[i] = from.row<FAST>(from.one, __shfl_sync(ALL, first, next + i));
                two[i] = from.row<FAST>(from.two, __shfl_sync(ALL, second, next + i));
                weight[i] = __shfl_sync(ALL, slant, next + i);
            }
            auto take = [&](int i) {
                const float left = one[i].left() - two[i].left();
                const float right = one[i].right() - two[i].right();
                sums[0].add<FAST>(fabsf(left), weight[i], at[0], bins, own);
                sums[1].add<FAST>(fabsf(right), weight[i], at[1], bins, own + 32);
            };
            const u32 some = counts >> next & ((1u << PAIRS_AHEAD) - 1);
            if (some + 1 == 1u << PAIRS_AHEAD) {
                #pragma unroll
                for (int i = 0; i < PAIRS_AHEAD; ++i) take(i);
            } else {
                #pragma unroll
                for (int i = 0; i < PAIRS_AHEAD; ++i)
                    if (some >> i & 1) take(i);
            }
        }
    }
}

// Outputs at both tokens of the pairs, each (rows, neurons); pairs at distance 0 are left out.
// counts (neurons, bins), sums (2, neurons): slope and |difference|, highest (neurons,): the
// largest, or NaN. Work space as for add_outputs: partial (2, gridDim.y, neurons), shared memory of
// 4 * NEURONS * bins bytes, and at least 2 * 8 * NEURONS * WARPS.
extern "C" __global__ void __launch_bounds__(32 * WARPS) add_pairs(
    const NUMBER* __restrict__ one, const NUMBER* __restrict__ two,
    const float* __restrict__ distance, const float* __restrict__ scale, int* counts, double* sums,
    float* highest, double* partial, u32* tickets, int pairs, int rows, int a, int b, int neurons,
    int stride, int bins) {
    extern __shared__ __align__(16) u32 counted[];
    __shared__ int peak[NEURONS];
    const int lane = threadIdx.x & 31, step = WARPS * gridDim.y;
    const int begin = (threadIdx.x >> 5) * gridDim.y + blockIdx.y;
    const Columns columns = my_columns((size_t)one | (size_t)two, neurons, stride);
    clear(counted, bins);
    if (threadIdx.x < NEURONS) peak[threadIdx.x] = 0;
    __syncthreads();
    const Place at[2] = {place_at(0.0f, scale[columns.a]), place_at(0.0f, scale[columns.b])};
    const float inverses = at[0].inverse + at[1].inverse;  // NaN if one is
    const bool fast = columns.paired && inverses == inverses;
    const Outputs from = {
        one + columns.a, two + columns.a, stride * (u32)sizeof(NUMBER), columns.b - columns.a};
    const Pairing of = {pairs, rows, a, b};
    Gaps gaps[2] = {};
    if (__ballot_sync(ALL, !fast) == 0)
        add_gaps<true>(from, distance, of, begin, step, at, bins, gaps, counted + lane);
    else
        add_gaps<false>(from, distance, of, begin, step, at, bins, gaps, counted + lane);
    double totals[2][2];
    for (int side = 0; side < 2; ++side) {
        totals[side][0] = gaps[side].slope;
        totals[side][1] = gaps[side].total;
        const bool whole = gaps[side].total == gaps[side].total;
        atomicMax(&peak[lane + 32 * side], whole ? __float_as_int(gaps[side].peak) : NAN_BITS);
    }
    __syncthreads();
    flush<false>(counted, bins, counts, bins, neurons);
    const int slot = threadIdx.x % NEURONS, q = threadIdx.x / NEURONS, neuron = neuron_of(slot);
    if (q == 0 && neuron < neurons) atomicMax((int*)highest + neuron, peak[slot]);
    double sum;
    if (summed<2>(totals, (double*)counted, partial, tickets, neurons, sum))
        sums[(size_t)q * neurons + neuron] += sum;
}

// Distances of pairs of rows of two matrices (rows, features), one warp a pair.
extern "C" __global__ void __launch_bounds__(256) distances(
    const NUMBER* __restrict__ one, const NUMBER* __restrict__ two, float* out, int pairs, int rows,
    int a, int b, int features, int stride) {
    const int lane = threadIdx.x & 31, each = 16 / sizeof(NUMBER);  // numbers in 16 bytes
    const int pair = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (pair >= pairs) return;
    const Pairing of = {pairs, rows, a, b};
    one += (size_t)of.first(pair) * stride;
    two += (size_t)of.second(pair) * stride;
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

// The lower edge of a bin of magnitudes.
__device__ __forceinline__ double edge_of(int bin) {
    return (1 << bin / 64) * (1.0 + bin % 64 / 64.0) - 1.0;
}

// Pair statistics from what add_pairs adds to: found (4, neurons): mean slope, median, mean and
// largest |difference|. One warp a neuron.
extern "C" __global__ void __launch_bounds__(256) pair_statistics(
    const int* __restrict__ counts, const double* __restrict__ sums,
    const float* __restrict__ highest, const float* __restrict__ scale, double* found, int pairs,
    int neurons, int bins) {
    const int lane = threadIdx.x & 31, neuron = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (neuron >= neurons) return;
    const double half = 0.5 * pairs, slope = sums[neuron];
    double median = __int_as_float(NAN_BITS);
    int before = 0;
    for (int start = 0; start < bins; start += 32) {
        const int own = start + lane < bins ? counts[(size_t)neuron * bins + start + lane] : 0;
        int upto = own;
        for (int apart = 1; apart < 32; apart <<= 1) {
            const int other = __shfl_up_sync(ALL, upto, apart);
            if (lane >= apart) upto += other;
        }
        const u32 reached = __ballot_sync(ALL, before + upto >= half);
        if (reached) {  // in the open last bin and the first, equal outputs, nothing is resolved
            const int which = __ffs(reached) - 1, bin = start + which;
            const int inside = __shfl_sync(ALL, own, which);
            const int below = before + __shfl_sync(ALL, upto, which) - inside;
            const double part = (half - below) / inside, width = edge_of(bin + 1) - edge_of(bin);
            if (bin > 0 && bin < bins - 1 && slope == slope) median = edge_of(bin) + part * width;
            break;
        }
        before += __shfl_sync(ALL, upto, 31);
    }
    if (lane) return;
    found[neuron] = slope / pairs;
    found[(size_t)neurons + neuron] = median * scale[neuron];
    found[(size_t)2 * neurons + neuron] = sums[(size_t)neurons + neuron] / pairs;
    found[(size_t)3 * neurons + neuron] = highest[neuron];
}
