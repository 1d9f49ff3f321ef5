// Moments of sorted rows and their exact distances from N(0, 1) (see stats/wasserstein.py).

#define THREADS 512

// Sum over the block, in a fixed order; every thread gets it.
__device__ __forceinline__ double block_sum(double value, double* shared) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = value;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < THREADS / 32; ++i) total += shared[i];
    return total;
}

// As block_sum: the largest.
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

// One row a block. ordered (rows, n) ascending, density (n + 1,) of N(0, 1) at its quantiles i / n.
// Writes found (6, rows): WD, KS, mean, std, skewness, excess kurtosis.
extern "C" __global__ void __launch_bounds__(THREADS) sorted_statistics(
    const float* __restrict__ ordered, const double* __restrict__ density,
    double* __restrict__ found, int rows, int n) {
    __shared__ double shared[THREADS / 32];
    const float* row = ordered + (size_t)blockIdx.x * n;
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += row[i];
    const double mean = block_sum(sum, shared) / n;
    double second = 0.0, third = 0.0, fourth = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const double gap = row[i] - mean, square = gap * gap;
        second += square;
        third += square * gap;
        fourth += square * square;
    }
    second = block_sum(second, shared) / n;
    third = block_sum(third, shared) / n;
    fourth = block_sum(fourth, shared) / n;
    const double std = sqrt(second), share = 1.0 / n;
    double wd = 0.0, ks = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const double z = (row[i] - mean) / std;
        const double above = (erf(z * 0.70710678118654752440) + 1.0) * (0.5 * n) - (i + 1);
        ks = fmax(ks, fmax(-above, above + 1.0));
        const double left = density[i], right = density[i + 1];
        if (above > -1.0 && above < 0.0) {  // the cell that holds n Phi(z) is split there
            const double bump = exp(-0.5 * z * z) * 0.79788456080286535588;
            wd += z * (2.0 * above + 1.0) * share + bump - left - right;
        } else {
            wd += fabs(z * share - (left - right));
        }
    }
    wd = block_sum(wd, shared);
    ks = block_max(ks, shared) / n;
    if (threadIdx.x) return;
    found += blockIdx.x;
    found[0] = wd;
    found[(size_t)rows] = ks;
    found[2 * (size_t)rows] = mean;
    found[3 * (size_t)rows] = std;
    found[4 * (size_t)rows] = third / (second * std);
    found[5 * (size_t)rows] = fourth / (second * second) - 3.0;
}
