// Exact statistics of rows that fit into shared memory (see stats/wasserstein.py and
// stats/mapping_difficulty.py): one row a thread block of 1024.

typedef unsigned int u32;
typedef unsigned char u8;

#define THREADS 1024
#define BUCKETS 32768        // both signs, four octaves of 4096 each
#define HALF (BUCKETS / 2)
#define SHIFT 11             // keeps the 12 leading bits of the fraction: 4096 buckets an octave
#define CROWD 256            // values that one thread may have to sort
#define FINE 1536            // bins of a histogram, 64 an octave
#define FINE_SHIFT 17
#define FOLD_SHIFT 3         // of which eight are one in the histograms of the groups
#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ double block_sum(double value, double* shared) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < THREADS / 32; ++i) total += shared[i];
    return total;
}

__device__ __forceinline__ double block_max(double value, double* shared) {
    for (int step = 16; step; step >>= 1)
        value = fmax(value, __shfl_xor_sync(0xffffffffu, value, step));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    double most = shared[0];
    for (int i = 1; i < THREADS / 32; ++i) most = fmax(most, shared[i]);
    return most;
}

// The bits that any thread has, in `seen`, which is zero or has been returned before. A barrier that
// counts (__syncthreads_or and its like) fails where the threads of a warp have diverged.
__device__ __forceinline__ u32 block_or(u32 bits, u32* seen) {
    if (bits) atomicOr(seen, bits);
    __syncthreads();
    return *seen;
}

// Inclusive sum over the threads; `sums` holds 32 numbers.
__device__ __forceinline__ u32 block_scan(u32 value, u32* sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 1; step < 32; step <<= 1) {
        u32 other = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += other;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = value;
    __syncthreads();
    u32 before = 0;
    for (int i = 0; i < warp; ++i) before += sums[i];
    return before + value;
}

// value / unit, to the last bit but for units near the ends of float32, given 1 / unit.
__device__ __forceinline__ float divided(float value, float unit, float inverse) {
    const float x = value * inverse;
    return fabsf(x) < INFINITE ? fmaf(fmaf(-x, unit, value), inverse, x) : value / unit;
}

// The bins of `entangle.stats.bins.signed_index`, of any number of leading bits of the fraction.
__device__ __forceinline__ int bin_of(float x, int shift, int half) {
    const int bin = min((__float_as_int(fabsf(x) + 1.0f) >> shift) - (0x3F800000 >> shift), half - 1);
    return half + (bin ^ __float_as_int(x + 0.0f) >> 31);  // not for -0.0
}

// A bucket that rises with the value.
__device__ __forceinline__ int bucket_of(float x) { return bin_of(x * 0.75f, SHIFT, HALF); }

__device__ __forceinline__ u32 get16(const u32* words, int i) {
    return words[i >> 1] >> (16 * (i & 1)) & 0xffffu;
}

// Count one more in a histogram of two bins a word.
__device__ __forceinline__ void count_in(u32* words, int bin) {
    atomicAdd(words + (bin >> 1), bin & 1 ? 65536u : 1u);
}

// Where one row's values are counted, and their distances from the centre summed.
struct Counters {
    u32 *buckets, *fine, *coarse;  // the last two may be null
    float centre, unit, inverse, low, high;
    double sums[4];
    u32 odd;  // 1: a NaN was seen, 2: an infinity

    __device__ __forceinline__ void take(float value) {
        float x = divided(value - centre, unit, inverse);
        if (!(fabsf(value) < INFINITE)) {
            odd |= value != value ? 1 : 2;
            x = 0.0f;
        }
        const double gap = (double)value - (double)centre, square = gap * gap;
        sums[0] += gap;
        sums[1] += square;
        sums[2] += square * gap;
        sums[3] += square * square;
        count_in(buckets, bucket_of(x));
        if (!fine) return;
        low = fminf(low, x);
        high = fmaxf(high, x);
        const int bin = bin_of(x, FINE_SHIFT, FINE / 2);
        count_in(fine, bin);
        count_in(coarse, bin >> FOLD_SHIFT);
    }
};

// Copy counts, two in a word, to numbers of their own.
__device__ __forceinline__ void write_counts(const u32* words, int2* out, int n) {
    for (int i = threadIdx.x; i < n; i += THREADS)
        out[i] = make_int2(words[i] & 0xffffu, words[i] >> 16);
}

// Put a value into its bucket.
__device__ __forceinline__ void place(
    float value, const Counters& by, u32* ends, float* ordered) {
    const int bucket = bucket_of(divided(value - by.centre, by.unit, by.inverse));
    const int side = 16 * (bucket & 1);
    ordered[atomicAdd(ends + (bucket >> 1), 1u << side) >> side & 0xffffu] = value;
}

// values (rows, n), n < 65536. Tokens bounds[g] to bounds[g + 1] are group g of at most 32; without
// histograms there is one. Buckets and bins lie around `location` in units of `scale`. density
// (n + 1,) is that of N(0, 1) at its quantiles i / n, cells (n,) its falls. Writes
// found (6, rows): WD, KS, mean, std, skewness, excess kurtosis;
// what (rows,): 1 a NaN, 2 an infinity, 4 not varying, 8 not sorted (too many different values in a
// bucket): of `found` then only mean and std are written, for 4 and 8;
// and if `counts` is not null: counts (rows, FINE) over the bins of stats/bins.py, group_counts
// (groups, rows, FINE / 8), powers (groups, 2, rows): sums of x and its square, extremes (2, rows):
// the smallest and largest x = (value - location) / scale; a value that is not finite is counted as
// 0. Rows begin at 16 bytes.
// Dynamic shared memory: 2 * BUCKETS + 4 * (n rounded up to 4), with histograms
// 2 * FINE + groups * FINE / 4 more bytes.
extern "C" __global__ void __launch_bounds__(THREADS) row_statistics(
    const float* __restrict__ values, const float* __restrict__ location,
    const float* __restrict__ scale, const double* __restrict__ density,
    const double* __restrict__ cells, const int* __restrict__ bounds, double* found, u8* what,
    int2* counts, int2* group_counts, double* powers, float* extremes, int rows, int n, int groups) {
    extern __shared__ __align__(16) u32 ends[];  // of each bucket, two in a word
    __shared__ double shared[THREADS / 32], by_warp[4][THREADS / 32];
    __shared__ float lowest[THREADS / 32], highest[THREADS / 32];
    __shared__ u32 sums[THREADS / 32], seen;
    float* ordered = (float*)(ends + BUCKETS / 2);
    u32* fine = counts ? (u32*)(ordered + (n + 3) / 4 * 4) : 0;
    u32* coarse = fine + FINE / 2;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, me = blockIdx.x;
    const float* row = values + (size_t)me * n;
    for (int i = thread; i < BUCKETS / 2; i += THREADS) ends[i] = 0;
    if (fine)
        for (int i = thread; i < FINE / 2 + groups * (FINE >> FOLD_SHIFT) / 2; i += THREADS) fine[i] = 0;
    if (thread == 0) seen = 0;
    __syncthreads();

    // A warp counts values of one group.
    const int group = warp * groups / 32, before = (32 * group + groups - 1) / groups;
    const int team = (32 * (group + 1) + groups - 1) / groups - before;
    const int from = bounds[group], to = bounds[group + 1], mine = 32 * (warp - before) + lane;
    const float unit = scale[me];
    Counters own = {ends, fine, coarse + group * (FINE >> FOLD_SHIFT) / 2, location[me], unit,
                    1.0f / unit, INFINITE, -INFINITE, {0.0, 0.0, 0.0, 0.0}, 0};
    if (((n | from | to) & 3) == 0) {
        const float4* quads = (const float4*)row;
        const int step = 32 * team, last = to / 4;
        int i = from / 4 + mine;
        float4 next = i < last ? quads[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (; i < last; i += step) {
            const float4 four = next;
            if (i + step < last) next = quads[i + step];
            own.take(four.x);
            own.take(four.y);
            own.take(four.z);
            own.take(four.w);
        }
    } else {
        for (int i = from + mine; i < to; i += 32 * team) own.take(row[i]);
    }
    for (int step = 16; step; step >>= 1) {
        for (int p = 0; p < 4; ++p)
            own.sums[p] += __shfl_xor_sync(0xffffffffu, own.sums[p], step);
        own.low = fminf(own.low, __shfl_xor_sync(0xffffffffu, own.low, step));
        own.high = fmaxf(own.high, __shfl_xor_sync(0xffffffffu, own.high, step));
    }
    if (lane == 0) {
        for (int p = 0; p < 4; ++p) by_warp[p][warp] = own.sums[p];
        lowest[warp] = own.low;
        highest[warp] = own.high;
    }
    const u32 odd = block_or(own.odd, &seen);
    if (fine) {
        write_counts(fine, counts + (size_t)me * FINE / 2, FINE / 2);
        const int words = (FINE >> FOLD_SHIFT) / 2;
        for (int g = 0; g < groups; ++g)
            write_counts(coarse + g * words, group_counts + ((size_t)g * rows + me) * words, words);
        if (thread < 2 * groups) {
            const int g = thread >> 1, p = thread & 1;
            double total = 0.0;
            for (int w = (32 * g + groups - 1) / groups; w < (32 * (g + 1) + groups - 1) / groups; ++w)
                total += by_warp[p][w];
            powers[(size_t)thread * rows + me] = p ? total / unit / unit : total / unit;
        }
        if (thread == 0) {
            float low = lowest[0], high = highest[0];
            for (int w = 1; w < THREADS / 32; ++w) {
                low = fminf(low, lowest[w]);
                high = fmaxf(high, highest[w]);
            }
            extremes[me] = low;
            extremes[(size_t)rows + me] = high;
        }
    }
    if (odd) {
        if (thread == 0) what[me] = odd & 1 ? 1 : 2;
        return;
    }
    double m[4];  // moments about the centre
    for (int p = 0; p < 4; ++p) {
        m[p] = 0.0;
        for (int w = 0; w < THREADS / 32; ++w) m[p] += by_warp[p][w];
        m[p] /= n;
    }
    const double off = m[0], mean = own.centre + off, second = fmax(m[1] - off * off, 0.0);
    const double third = m[2] - 3.0 * off * m[1] + 2.0 * off * off * off;
    const double fourth = m[3] - 4.0 * off * m[2] + 6.0 * off * off * m[1] - 3.0 * off * off * off * off;

    // Counts become the buckets' starts, which filling turns into their ends.
    const int share = BUCKETS / 2 / THREADS, first = thread * share;
    u32 held = 0;
    for (int i = first; i < first + share; ++i) held += (ends[i] & 0xffffu) + (ends[i] >> 16);
    u32 start = block_scan(held, sums) - held;
    for (int i = first; i < first + share; ++i) {
        const u32 two = ends[i], low = two & 0xffffu;
        ends[i] = start | (start + low) << 16;
        start += low + (two >> 16);
    }
    __syncthreads();
    if ((n & 3) == 0) {
        const float4* quads = (const float4*)row;
        #pragma unroll 2
        for (int i = thread; i < n / 4; i += THREADS) {
            const float4 four = quads[i];
            place(four.x, own, ends, ordered);
            place(four.y, own, ends, ordered);
            place(four.z, own, ends, ordered);
            place(four.w, own, ends, ordered);
        }
    } else {
        for (int i = thread; i < n; i += THREADS) place(row[i], own, ends, ordered);
    }
    __syncthreads();
    bool crowded = false;
    for (int bucket = thread; bucket < BUCKETS; bucket += THREADS) {
        const int begin = bucket ? get16(ends, bucket - 1) : 0, end = get16(ends, bucket);
        if (end - begin > CROWD) {
            for (int i = begin + 1; i < end; ++i) crowded |= ordered[i] != ordered[begin];
            continue;
        }
        for (int i = begin + 1; i < end; ++i) {
            const float value = ordered[i];
            int at = i;
            for (; at > begin && ordered[at - 1] > value; --at) ordered[at] = ordered[at - 1];
            ordered[at] = value;
        }
    }
    const bool failed = block_or(crowded, &seen);
    const bool same = !failed && ordered[0] == ordered[n - 1];
    if (failed || same) {
        if (thread == 0) {
            what[me] = failed ? 8 : 4;
            found[2 * (size_t)rows + me] = mean;
            found[3 * (size_t)rows + me] = sqrt(second);
        }
        return;
    }
    const double std = sqrt(second), share_of_one = 1.0 / n, unit_of_z = 1.0 / std;
    double wd = 0.0, ks = 0.0;
    #pragma unroll 2
    for (int i = thread; i < n; i += THREADS) {
        const double z = (ordered[i] - mean) * unit_of_z;
        // In float32, but for the few values that lie near the border of a cell.
        double above = (double)(normcdff((float)z) * (float)n) - (i + 1);
        if (fabs(above) < 0.25 || fabs(above + 1.0) < 0.25) above = normcdf(z) * n - (i + 1);
        ks = fmax(ks, fmax(-above, above + 1.0));
        if (above > -1.0 && above < 0.0) {  // the cell that holds n Phi(z) is split there
            above = normcdf(z) * n - (i + 1);
            const double bump = exp(-0.5 * z * z) * 0.79788456080286535588;
            wd += z * (2.0 * above + 1.0) * share_of_one + bump - density[i] - density[i + 1];
        } else {
            wd += fabs(z * share_of_one - cells[i]);
        }
    }
    wd = block_sum(wd, shared);
    ks = block_max(ks, shared) / n;
    if (thread) return;
    what[me] = 0;
    found += me;
    found[0] = wd;
    found[(size_t)rows] = ks;
    found[2 * (size_t)rows] = mean;
    found[3 * (size_t)rows] = std;
    found[4 * (size_t)rows] = third / (second * std);
    found[5 * (size_t)rows] = fourth / (second * second) - 3.0;
}

// The rank-th smallest key (from 0) of n, and how many of the keys up to it equal it; all threads
// take part and get both.
__device__ __forceinline__ u32 smallest(
    const u32* keys, int n, int rank, u32* counts, u32* sums, u32* slot, u32& equals) {
    u32 threshold = 0, mask = 0, left = rank + 1;
    for (int shift = 21; shift >= 0; shift = shift > 10 ? shift - 11 : shift - 10) {
        const u32 digits = shift ? 2047u : 1023u;
        counts[2 * threadIdx.x] = counts[2 * threadIdx.x + 1] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS)
            if ((keys[i] & mask) == threshold) atomicAdd(&counts[keys[i] >> shift & digits], 1u);
        __syncthreads();
        const u32 low = counts[2 * threadIdx.x], here = low + counts[2 * threadIdx.x + 1];
        const u32 up_to = block_scan(here, sums), before = up_to - here;
        if (up_to >= left && before < left) {
            const bool second = before + low < left;
            slot[0] = 2 * threadIdx.x + second;
            slot[1] = second ? before + low : before;
        }
        __syncthreads();
        threshold |= slot[0] << shift;
        mask |= digits << shift;
        left -= slot[1];
        __syncthreads();
    }
    equals = left;
    return threshold;
}

// |y_a - y_b| over pairs of columns of values (rows, n): pairs (2, count), slant (count,) is one
// over the distance of the inputs. Writes found (4, rows): mean of |y_a - y_b| * slant, median, mean
// and maximum of |y_a - y_b|. Dynamic shared memory: 4 * count bytes, and 4 * n more if the row is to
// be `held` there, where gathering is cheap.
extern "C" __global__ void __launch_bounds__(THREADS) pair_statistics(
    const float* __restrict__ values, const int* __restrict__ pairs,
    const double* __restrict__ slant, double* __restrict__ found, int rows, int n, int count,
    int held) {
    extern __shared__ __align__(16) u32 ends[];
    __shared__ double shared[THREADS / 32];
    __shared__ u32 counts[2048], sums[THREADS / 32], slot[2], seen;
    const float* row = values + (size_t)blockIdx.x * n;
    if (threadIdx.x == 0) seen = 0;
    if (held) {
        float* copy = (float*)(ends + count);
        #pragma unroll 4
        for (int i = threadIdx.x; i < n; i += THREADS) copy[i] = row[i];
        row = copy;
        __syncthreads();
    }
    double slope = 0.0, total = 0.0;
    float most = 0.0f;
    bool nan = false;
    #pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float dy = fabsf(row[pairs[i]] - row[pairs[count + i]]);
        slope += dy * slant[i];
        total += dy;
        most = fmaxf(most, dy);
        nan |= dy != dy;
        ends[i] = __float_as_uint(dy);  // orders as dy does
    }
    slope = block_sum(slope, shared) / count;
    total = block_sum(total, shared) / count;
    double peak = block_max(most, shared);
    const bool bad = block_or(nan, &seen);
    u32 equals;
    const u32 upper = smallest(ends, count, count / 2, counts, sums, slot, equals);
    u32 lower = upper;
    if (count % 2 == 0 && equals == 1) {  // the largest key below it
        if (threadIdx.x == 0) slot[0] = 0;
        __syncthreads();
        u32 own = 0;
        for (int i = threadIdx.x; i < count; i += THREADS)
            if (ends[i] < upper) own = max(own, ends[i]);
        atomicMax(&slot[0], own);
        __syncthreads();
        lower = slot[0];
    }
    if (threadIdx.x) return;
    double median = 0.5 * ((double)__uint_as_float(lower) + (double)__uint_as_float(upper));
    if (bad) median = peak = total;
    found += blockIdx.x;
    found[0] = slope;
    found[(size_t)rows] = median;
    found[2 * (size_t)rows] = total;
    found[3 * (size_t)rows] = peak;
}
