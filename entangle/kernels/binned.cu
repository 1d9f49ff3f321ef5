// Distances of binned distributions from N(0, 1) (see stats/histogram.py, stats/sketch.py).

#define THREADS 128
#define ROOT_HALF 0.70710678118654752440
#define ROOT_TAU 2.50662827463100050242

__device__ __forceinline__ double normal_at(double z) { return 0.5 * erfc(-z * ROOT_HALF); }

__device__ __forceinline__ double density_at(double z) { return exp(-0.5 * z * z) / ROOT_TAU; }

// The integral of the normal distribution function from minus infinity to z.
__device__ __forceinline__ double tail_at(double z) { return z * normal_at(z) + density_at(z); }

// One row and one set of groups a block: grid (rows, sets). counts (groups, rows, bins), weights
// (sets, groups), shift and spread (sets, rows), low and high (rows,), edges (bins + 1,). Writes
// found (3, sets, rows): WD, its bound, KS. Dynamic shared memory: 4 * bins bytes.
extern "C" __global__ void __launch_bounds__(THREADS) binned_distances(
    const int* __restrict__ counts, const int* __restrict__ weights,
    const double* __restrict__ shift, const double* __restrict__ spread,
    const float* __restrict__ low, const float* __restrict__ high,
    const double* __restrict__ edges, double* __restrict__ found, int groups, int bins) {
    extern __shared__ int mass[];
    __shared__ double shared[3][THREADS];
    __shared__ int before[THREADS];
    const int thread = threadIdx.x, row = blockIdx.x, rows = gridDim.x, set = blockIdx.y;
    for (int bin = thread; bin < bins; bin += THREADS) {
        int total = 0;
        for (int g = 0; g < groups; ++g) {
            const int weight = weights[set * groups + g];
            if (weight) total += weight * counts[((size_t)g * rows + row) * bins + bin];
        }
        mass[bin] = total;
    }
    __syncthreads();
    const int share = (bins + THREADS - 1) / THREADS;
    const int first = min(thread * share, bins), last = min(first + share, bins);
    int own = 0;
    for (int bin = first; bin < last; ++bin) own += mass[bin];
    before[thread] = own;
    __syncthreads();
    int count = 0, all = 0;
    for (int i = 0; i < THREADS; ++i) {
        if (i < thread) count += before[i];
        all += before[i];
    }
    const double n = all, lowest = low[row], highest = high[row];
    const double mean = shift[(size_t)set * rows + row], std = spread[(size_t)set * rows + row];
    const double begin = (lowest - mean) / std, end = (highest - mean) / std;
    double inside = 0.0, bound = 0.0, ks = 0.0, z = 0.0, normal = 0.0, density = 0.0, raw = 0.0;
    for (int edge = first; edge <= last && first < last; ++edge) {
        double next = fmin(fmax(edges[edge], lowest), highest);
        if (edge == 0) next = lowest;
        if (edge == bins) next = highest;
        if (edge > first && next == raw) {  // beyond the extremes: no width
            count += mass[edge - 1];
            if (mass[edge - 1]) ks = fmax(ks, fabs(count / n - normal));
            continue;
        }
        raw = next;
        next = (next - mean) / std;
        const double next_normal = normal_at(next), next_density = density_at(next);
        if (edge > first) {
            const double part = mass[edge - 1] / n, base = count / n, width = next - z;
            count += mass[edge - 1];
            const double left = base - normal, right = count / n - next_normal;
            const double rise = next * next_normal + next_density - (z * normal + density);
            const double area = fabs(width * (base + 0.5 * part) - rise);
            const double change = fmax(fabs(right - left), 1e-300);
            const double crossing = width * (left * left + right * right) / (2.0 * change);
            inside += left * right < 0.0 ? fmax(crossing, area) : area;
            const double steep = width * width * width * (0.24197072451914337 / 12.0);
            bound += part * width * 0.5 + 2.0 * fmin(steep, width * (next_normal - normal) * 0.5);
            ks = fmax(ks, fmax(fabs(left), fabs(right)));
        }
        z = next;
        normal = next_normal;
        density = next_density;
    }
    shared[0][thread] = inside;
    shared[1][thread] = bound;
    shared[2][thread] = ks;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (thread >= half) continue;
        shared[0][thread] += shared[0][thread + half];
        shared[1][thread] += shared[1][thread + half];
        shared[2][thread] = fmax(shared[2][thread], shared[2][thread + half]);
    }
    if (thread) return;
    const size_t place = (size_t)set * rows + row, next = (size_t)gridDim.y * rows;
    found[place] = shared[0][0] + tail_at(begin) + tail_at(-end);
    found[next + place] = shared[1][0];
    found[2 * next + place] = shared[2][0];
}
