// Exact statistics of rows that fit into shared memory (see stats/wasserstein.py and
// stats/mapping_difficulty.py): one row a thread block of 1024.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define THREADS 1024
#define BUCKETS 32768        // both signs, four octaves of 4096 each
#define HALF (BUCKETS / 2)
#define SHIFT 11             // keeps the 12 leading bits of the fraction: 4096 buckets an octave
#define ONE (0x3F800000 >> SHIFT)
#define CROWD 256            // values that one thread may have to sort

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

// A bucket that rises with the value.
__device__ __forceinline__ int bucket_of(float value, float location, float inverse) {
    const float x = (value - location) * inverse;
    const int bucket = min((__float_as_int(fabsf(x) + 1.0f) >> SHIFT) - ONE, HALF - 1);
    return x < 0.0f ? HALF - 1 - bucket : HALF + bucket;
}

__device__ __forceinline__ u32 get16(const u32* words, int i) {
    return words[i >> 1] >> (16 * (i & 1)) & 0xffffu;
}

// values (rows, n), n < 65536, density (n + 1,) of N(0, 1) at its quantiles i / n. The buckets lie
// around `location`, in units of 1 / `inverse`. Writes found (6, rows): WD, KS, mean, std, skewness,
// excess kurtosis, and what (rows,): 1 a NaN, 2 an infinity, 4 not varying, 8 not sorted (too many
// different values in a bucket): `found` then means nothing.
// Dynamic shared memory: 2 * BUCKETS + 4 * n bytes.
extern "C" __global__ void __launch_bounds__(THREADS) row_statistics(
    const float* __restrict__ values, const float* __restrict__ location,
    const float* __restrict__ inverse, const double* __restrict__ density, double* found, u8* what,
    int rows, int n) {
    extern __shared__ u32 ends[];  // of each bucket, two in a word
    __shared__ double shared[THREADS / 32];
    __shared__ u32 sums[THREADS / 32], seen;
    float* ordered = (float*)(ends + BUCKETS / 2);
    const int thread = threadIdx.x;
    const float* row = values + (size_t)blockIdx.x * n;
    const float centre = location[blockIdx.x], unit = inverse[blockIdx.x];
    for (int i = thread; i < BUCKETS / 2; i += THREADS) ends[i] = 0;
    if (thread == 0) seen = 0;
    __syncthreads();
    double sum = 0.0;
    u32 odd = 0;
    for (int i = thread; i < n; i += THREADS) {
        const float value = row[i];
        if (!(fabsf(value) < __int_as_float(0x7f800000))) odd |= value != value ? 1 : 2;
        sum += value;
        const int bucket = bucket_of(value, centre, unit);
        atomicAdd(ends + (bucket >> 1), bucket & 1 ? 65536u : 1u);
    }
    odd = block_or(odd, &seen);
    if (odd) {
        if (thread == 0) what[blockIdx.x] = odd & 1 ? 1 : 2;
        return;
    }
    const double mean = block_sum(sum, shared) / n;
    double second = 0.0, third = 0.0, fourth = 0.0;
    for (int i = thread; i < n; i += THREADS) {
        const double gap = row[i] - mean, square = gap * gap;
        second += square;
        third += square * gap;
        fourth += square * square;
    }
    second = block_sum(second, shared) / n;
    third = block_sum(third, shared) / n;
    fourth = block_sum(fourth, shared) / n;
    // Counts become the buckets' starts, which filling turns into their ends.
    const int share = BUCKETS / 2 / THREADS, first = thread * share;
    u32 own = 0;
    for (int i = first; i < first + share; ++i) own += (ends[i] & 0xffffu) + (ends[i] >> 16);
    u32 start = block_scan(own, sums) - own;
    for (int i = first; i < first + share; ++i) {
        const u32 two = ends[i], low = two & 0xffffu;
        ends[i] = start | (start + low) << 16;
        start += low + (two >> 16);
    }
    __syncthreads();
    for (int i = thread; i < n; i += THREADS) {
        const float value = row[i];
        const int bucket = bucket_of(value, centre, unit), side = 16 * (bucket & 1);
        ordered[atomicAdd(ends + (bucket >> 1), 1u << side) >> side & 0xffffu] = value;
    }
    __syncthreads();
    bool crowded = false;
    for (int bucket = thread; bucket < BUCKETS; bucket += THREADS) {
        const int from = bucket ? get16(ends, bucket - 1) : 0, to = get16(ends, bucket);
        if (to - from > CROWD) {
            for (int i = from + 1; i < to; ++i) crowded |= ordered[i] != ordered[from];
            continue;
        }
        for (int i = from + 1; i < to; ++i) {
            const float value = ordered[i];
            int at = i;
            for (; at > from && ordered[at - 1] > value; --at) ordered[at] = ordered[at - 1];
            ordered[at] = value;
        }
    }
    const bool failed = block_or(crowded, &seen);
    const bool same = !failed && ordered[0] == ordered[n - 1];
    if (failed || same) {
        if (thread == 0) {
            what[blockIdx.x] = failed ? 8 : 4;
            found[2 * (size_t)rows + blockIdx.x] = mean;
            found[3 * (size_t)rows + blockIdx.x] = sqrt(second);
        }
        return;
    }
    const double std = sqrt(second), share_of_one = 1.0 / n, scale = 1.0 / std;
    double wd = 0.0, ks = 0.0;
    for (int i = thread; i < n; i += THREADS) {
        const double z = (ordered[i] - mean) * scale;
        // In float32, but for the few values that lie near the border of a cell.
        double above = (double)(normcdff((float)z) * (float)n) - (i + 1);
        if (fabs(above) < 0.25 || fabs(above + 1.0) < 0.25) above = normcdf(z) * n - (i + 1);
        ks = fmax(ks, fmax(-above, above + 1.0));
        const double left = density[i], right = density[i + 1];
        if (above > -1.0 && above < 0.0) {  // the cell that holds n Phi(z) is split there
            above = normcdf(z) * n - (i + 1);
            const double bump = exp(-0.5 * z * z) * 0.79788456080286535588;
            wd += z * (2.0 * above + 1.0) * share_of_one + bump - left - right;
        } else {
            wd += fabs(z * share_of_one - (left - right));
        }
    }
    wd = block_sum(wd, shared);
    ks = block_max(ks, shared) / n;
    if (thread) return;
    what[blockIdx.x] = 0;
    found += blockIdx.x;
    found[0] = wd;
    found[(size_t)rows] = ks;
    found[2 * (size_t)rows] = mean;
    found[3 * (size_t)rows] = std;
    found[4 * (size_t)rows] = third / (second * std);
    found[5 * (size_t)rows] = fourth / (second * second) - 3.0;
}

// The rank-th smallest key (from 0) of n; all threads take part and get it.
__device__ __forceinline__ u32 smallest(
    const u32* keys, int n, int rank, u32* counts, u32* sums, u32* slot) {
    u32 threshold = 0, mask = 0, left = rank + 1;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) counts[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += THREADS)
            if ((keys[i] & mask) == threshold) atomicAdd(&counts[keys[i] >> shift & 255], 1u);
        __syncthreads();
        const u32 here = threadIdx.x < 256 ? counts[threadIdx.x] : 0u;
        const u32 up_to = block_scan(here, sums);
        if (up_to >= left && up_to - here < left) {
            slot[0] = threadIdx.x;
            slot[1] = up_to - here;
        }
        __syncthreads();
        threshold |= slot[0] << shift;
        mask |= 255u << shift;
        left -= slot[1];
        __syncthreads();
    }
    return threshold;
}

// |y_a - y_b| over pairs of columns of values (rows, n): pairs (2, count), slant (count,) is one
// over the distance of the inputs. Writes found (4, rows): mean of |y_a - y_b| * slant, median, mean
// and maximum of |y_a - y_b|. Dynamic shared memory: 4 * count bytes.
extern "C" __global__ void __launch_bounds__(THREADS) pair_statistics(
    const float* __restrict__ values, const int* __restrict__ pairs,
    const double* __restrict__ slant, double* __restrict__ found, int rows, int n, int count) {
    extern __shared__ u32 ends[];
    __shared__ double shared[THREADS / 32];
    __shared__ u32 counts[256], sums[THREADS / 32], slot[2], seen;
    const float* row = values + (size_t)blockIdx.x * n;
    double slope = 0.0, total = 0.0;
    float most = 0.0f;
    bool nan = false;
    if (threadIdx.x == 0) seen = 0;
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
    const u32 upper = smallest(ends, count, count / 2, counts, sums, slot);
    const u32 lower = count & 1 ? upper : smallest(ends, count, count / 2 - 1, counts, sums, slot);
    if (threadIdx.x) return;
    double median = 0.5 * ((double)__uint_as_float(lower) + (double)__uint_as_float(upper));
    if (bad) median = peak = total;
    found += blockIdx.x;
    found[0] = slope;
    found[(size_t)rows] = median;
    found[2 * (size_t)rows] = total;
    found[3 * (size_t)rows] = peak;
}
