// Distances of binned distributions from N(0, 1) (see stats/histogram.py, stats/sketch.py).

#define THREADS 256
#define ALL 0xffffffffu
#define ROOT_HALF 0.70710678118654752440
#define ROOT_TAU 2.50662827463100050242

__device__ __forceinline__ double normal_at(double z) { return 0.5 * erfc(-z * ROOT_HALF); }

__device__ __forceinline__ double density_at(double z) { return exp(-0.5 * z * z) / ROOT_TAU; }

// The integral of the normal distribution function from minus infinity to z.
__device__ __forceinline__ double tail_at(double z) { return z * normal_at(z) + density_at(z); }

// One row and one set of groups a warp: counts (groups, rows, bins), weights (sets, groups), shift and
// spread (sets, rows), low and high (rows,), edges (bins + 1,). Writes found (3, sets, rows): WD, its
// bound, KS. Dynamic shared memory: THREADS / 8 * bins bytes.
extern "C" __global__ void __launch_bounds__(THREADS) binned_distances(
    const int* __restrict__ counts, const int* __restrict__ weights,
    const double* __restrict__ shift, const double* __restrict__ spread,
    const float* __restrict__ low, const float* __restrict__ high,
    const double* __restrict__ edges, double* __restrict__ found, int rows, int sets, int groups,
    int bins) {
    extern __shared__ int masses[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const long long pair = (long long)blockIdx.x * (THREADS / 32) + warp;
    if (pair >= (long long)rows * sets) return;
    const int row = (int)(pair / sets), set = (int)(pair % sets);
    const double lowest = low[row], highest = high[row];
    const double mean = shift[(size_t)set * rows + row], std = spread[(size_t)set * rows + row];
    int* mass = masses + warp * bins;
    int all = 0, first = bins, last = -1;  // bins that hold a value or lie between the extremes
    for (int bin = lane; bin < bins; bin += 32) {
        int total = 0;
        for (int g = 0; g < groups; ++g) {
            const int weight = weights[set * groups + g];
            if (weight) total += weight * counts[((size_t)g * rows + row) * bins + bin];
        }
        mass[bin] = total;
        all += total;
        if (total || (edges[bin + 1] > lowest && edges[bin] < highest)) {
            first = min(first, bin);
            last = bin;
        }
    }
    for (int step = 16; step; step >>= 1) {
        all += __shfl_xor_sync(ALL, all, step);
        first = min(first, __shfl_xor_sync(ALL, first, step));
        last = max(last, __shfl_xor_sync(ALL, last, step));
    }
    __syncwarp();
    const double n = all;
    double inside = 0.0, bound = 0.0, ks = 0.0;
    int counted = 0;
    // A lane works on the bin right of its edge; the last lane only knows the edge.
    for (int base = first; base <= last; base += 31) {
        const int edge = min(base + lane, bins);
        double z = fmin(fmax(edges[edge], lowest), highest);
        if (edge == 0) z = lowest;
        if (edge == bins) z = highest;
        z = (z - mean) / std;
        const double normal = normal_at(z), density = density_at(z);
        const double next = __shfl_down_sync(ALL, z, 1);
        const double next_normal = __shfl_down_sync(ALL, normal, 1);
        const double next_density = __shfl_down_sync(ALL, density, 1);
        const bool mine = lane < 31 && base + lane <= last;
        const int own = mine ? mass[edge] : 0;
        int up_to = own;
        for (int step = 1; step < 32; step <<= 1) {
            const int other = __shfl_up_sync(ALL, up_to, step);
            if (lane >= step) up_to += other;
        }
        if (mine) {
            const double part = own / n, begin = (counted + up_to - own) / n, width = next - z;
            const double left = begin - normal, right = (counted + up_to) / n - next_normal;
            const double rise = next * next_normal + next_density - (z * normal + density);
            const double area = fabs(width * (begin + 0.5 * part) - rise);
            const double change = fmax(fabs(right - left), 1e-300);
            const double crossing = width * (left * left + right * right) / (2.0 * change);
            const bool crosses = left * right < 0.0 && fmin(fabs(left), fabs(right)) > 1e-12;
            inside += crosses ? fmax(crossing, area) : area;
            const double steep = width * width * width * (0.24197072451914337 / 12.0);
            bound += part * width * 0.5 + 2.0 * fmin(steep, width * (next_normal - normal) * 0.5);
            ks = fmax(ks, fmax(fabs(left), fabs(right)));
        }
        counted += __shfl_sync(ALL, up_to, 31);
    }
    for (int step = 16; step; step >>= 1) {
        inside += __shfl_xor_sync(ALL, inside, step);
        bound += __shfl_xor_sync(ALL, bound, step);
        ks = fmax(ks, __shfl_xor_sync(ALL, ks, step));
    }
    if (lane) return;
    const size_t place = (size_t)set * rows + row, step = (size_t)sets * rows;
    found[place] = inside + tail_at((lowest - mean) / std) + tail_at(-(highest - mean) / std);
    found[step + place] = bound;
    found[2 * step + place] = ks;
}
