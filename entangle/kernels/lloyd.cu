// Lloyd iterations of several restarts of k-means side by side (see routing/side_by_side.py).
// points (tokens, dims), centroids (restarts, k, dims); a restart rests while active[restart] != 1.

#define THREADS 256

// Assign part of the points, of one restart, and sum them by cluster. Grid (parts, restarts).
// Writes sums (parts, restarts, k, dims) and counts (parts, restarts, k). A block takes THREADS
// points at a time; `groups` teams of dims threads each add up points of their own.
// Dynamic shared memory, in floats: THREADS * (dims | 1) points, dims * wide centroids with wide = k
// rounded up to 16, groups * k * dims sums.
extern "C" __global__ void __launch_bounds__(THREADS) assign(
    const float* __restrict__ points, const float* __restrict__ centroids,
    const int* __restrict__ active, float* __restrict__ sums, int* __restrict__ counts, int tokens,
    int dims, int k, int groups) {
    extern __shared__ __align__(16) float space[];
    __shared__ int labels[THREADS];
    __shared__ float norms[256];
    __shared__ int members[256];
    const int thread = threadIdx.x, restart = blockIdx.y;
    if (active[restart] != 1) return;
    const int stride = dims | 1, wide = (k + 15) / 16 * 16;
    float* centres = space;  // first, for its alignment
    float* tile = centres + dims * wide;
    float* totals = tile + THREADS * stride;
    centroids += (size_t)restart * k * dims;
    for (int i = thread; i < dims * wide; i += THREADS) {
        const int cluster = i % wide;
        centres[i] = cluster < k ? centroids[cluster * dims + i / wide] : 0.0f;
    }
    for (int i = thread; i < groups * k * dims; i += THREADS) totals[i] = 0.0f;
    if (thread < k) {
        float norm = 0.0f;
        for (int d = 0; d < dims; ++d) {
            const float c = centroids[thread * dims + d];
            norm += c * c;
        }
        norms[thread] = norm;
        members[thread] = 0;
    }
    const int team = thread / dims, own = thread % dims;
    for (int first = blockIdx.x * THREADS; first < tokens; first += gridDim.x * THREADS) {
        const int n = min(THREADS, tokens - first);
        __syncthreads();
        for (int i = thread; i < n * dims; i += THREADS)
            tile[i / dims * stride + i % dims] = points[(size_t)first * dims + i];
        __syncthreads();
        if (thread < n) {
            const float* x = tile + thread * stride;
            float best = 0.0f;
            int label = -1;
            for (int base = 0; base < k; base += 16) {
                float product[16];
                #pragma unroll
                for (int c = 0; c < 16; ++c) product[c] = 0.0f;
                for (int d = 0; d < dims; ++d) {
                    const float value = x[d];
                    const float4* line = (const float4*)(centres + d * wide + base);
                    #pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        const float4 c = line[q];
                        product[4 * q] += value * c.x;
                        product[4 * q + 1] += value * c.y;
                        product[4 * q + 2] += value * c.z;
                        product[4 * q + 3] += value * c.w;
                    }
                }
                #pragma unroll
                for (int c = 0; c < 16; ++c) {
                    if (base + c >= k) break;
                    const float score = norms[base + c] - 2.0f * product[c];
                    if (label < 0 || score < best) {
                        best = score;
                        label = base + c;
                    }
                }
            }
            labels[thread] = label;
            atomicAdd(&members[label], 1);
        }
        __syncthreads();
        if (team < groups)
            for (int i = team; i < n; i += groups)
                totals[(team * k + labels[i]) * dims + own] += tile[i * stride + own];
    }
    __syncthreads();
    const size_t place = (size_t)blockIdx.x * gridDim.y + restart;
    for (int i = thread; i < k * dims; i += THREADS) {
        float total = 0.0f;
        for (int g = 0; g < groups; ++g) total += totals[g * k * dims + i];
        sums[place * k * dims + i] = total;
    }
    if (thread < k) counts[place * k + thread] = members[thread];
}

// Move the centroids of one restart to the means. Grid (restarts). Where a cluster is empty, active
// becomes 2 and nothing else changes; it becomes 0 when the squared move is at most limits[1], when
// the inertia falls by no more than limits[2] of itself, or after `most` iterations. limits[0] is the
// sum of the points' squared norms.
extern "C" __global__ void __launch_bounds__(THREADS) move(
    const float* __restrict__ sums, const int* __restrict__ counts,
    const double* __restrict__ limits, float* centroids, double* inertias, int* iterations,
    int* active, int parts, int restarts, int k, int dims, int most) {
    __shared__ double shared[2][THREADS];
    __shared__ int members[256], empty;  // no counting barrier: see exact.cu
    const int thread = threadIdx.x, restart = blockIdx.x;
    if (active[restart] != 1) return;
    if (thread == 0) empty = 0;
    __syncthreads();
    if (thread < k) {
        int total = 0;
        for (int p = 0; p < parts; ++p) total += counts[((size_t)p * restarts + restart) * k + thread];
        members[thread] = total;
        if (total == 0) atomicOr(&empty, 1);
    }
    __syncthreads();
    if (empty) {
        if (thread == 0) active[restart] = 2;
        return;
    }
    double explained = 0.0, moved = 0.0;
    centroids += (size_t)restart * k * dims;
    for (int i = thread; i < k * dims; i += THREADS) {
        double sum = 0.0;
        for (int p = 0; p < parts; ++p) sum += sums[((size_t)p * restarts + restart) * k * dims + i];
        const double mean = sum / members[i / dims];
        const float after = (float)mean;
        const double gap = after - centroids[i];
        explained += mean * sum;
        moved += gap * gap;
        centroids[i] = after;
    }
    shared[0][thread] = explained;
    shared[1][thread] = moved;
    __syncthreads();
    if (thread) return;
    explained = moved = 0.0;
    for (int i = 0; i < THREADS; ++i) {
        explained += shared[0][i];
        moved += shared[1][i];
    }
    const double before = inertias[restart], after = fmax(limits[0] - explained, 0.0);
    inertias[restart] = after;
    iterations[restart] += 1;
    if (!(moved > limits[1]) || before - after <= limits[2] * after || iterations[restart] == most)
        active[restart] = 0;
}

__device__ __forceinline__ void keep_lower(float value, int place, float& lowest, int& label) {
    if (value < lowest) {
        lowest = value;
        label = place;
    }
}

// Turn scores (pairs, k), a row for every token and restart, into 1 at the lowest (the first of
// equals) and 0 elsewhere, and count in counts (restarts, k). Shared memory: 4 * restarts * k bytes.
extern "C" __global__ void __launch_bounds__(THREADS) mark_members(
    float* scores, int* counts, int pairs, int restarts, int k) {
    extern __shared__ __align__(16) int found[];
    for (int i = threadIdx.x; i < restarts * k; i += THREADS) found[i] = 0;
    __syncthreads();
    for (int pair = blockIdx.x * THREADS + threadIdx.x; pair < pairs; pair += gridDim.x * THREADS) {
        float* row = scores + (size_t)pair * k;
        float lowest = row[0];
        int label = 0;
        if (k % 4 == 0) {  // 16 bytes at a time
            float4* quads = (float4*)row;
            for (int i = 0; i < k / 4; ++i) {
                const float4 four = quads[i];
                keep_lower(four.x, 4 * i, lowest, label);
                keep_lower(four.y, 4 * i + 1, lowest, label);
                keep_lower(four.z, 4 * i + 2, lowest, label);
                keep_lower(four.w, 4 * i + 3, lowest, label);
            }
            for (int i = 0; i < k / 4; ++i) {
                const int at = label - 4 * i;
                quads[i] = make_float4(at == 0, at == 1, at == 2, at == 3);
            }
        } else {
            for (int i = 1; i < k; ++i) keep_lower(row[i], i, lowest, label);
            for (int i = 0; i < k; ++i) row[i] = i == label ? 1.0f : 0.0f;
        }
        atomicAdd(&found[pair % restarts * k + label], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < restarts * k; i += THREADS)
        if (found[i]) atomicAdd(&counts[i], found[i]);
}

// Mark the nearest of every k centroids. products (pairs, k) of the points and the centroids, a row
// for every token and restart; norms (restarts, k) of the centroids, squared. Writes marks (pairs, k)
// in bfloat16, 1 at the lowest norm - 2 * product (the first of equals) and 0 elsewhere, and counts
// them in counts (restarts, k). Shared memory: 8 * restarts * k bytes.
extern "C" __global__ void __launch_bounds__(THREADS) mark_nearest(
    const float* __restrict__ products, const float* __restrict__ norms,
    unsigned short* __restrict__ marks, int* counts, int pairs, int restarts, int k) {
    extern __shared__ __align__(16) float held[];
    int* found = (int*)(held + restarts * k);
    for (int i = threadIdx.x; i < restarts * k; i += THREADS) {
        held[i] = norms[i];
        found[i] = 0;
    }
    __syncthreads();
    for (int pair = blockIdx.x * THREADS + threadIdx.x; pair < pairs; pair += gridDim.x * THREADS) {
        const float* row = products + (size_t)pair * k;
        const float* norm = held + pair % restarts * k;
        unsigned short* out = marks + (size_t)pair * k;
        float lowest = norm[0] - 2.0f * row[0];
        int label = 0;
        if (k % 8 == 0) {  // 16 bytes at a time
            for (int i = 0; i < k / 4; ++i) {
                const float4 four = ((const float4*)row)[i], own = ((const float4*)norm)[i];
                keep_lower(own.x - 2.0f * four.x, 4 * i, lowest, label);
                keep_lower(own.y - 2.0f * four.y, 4 * i + 1, lowest, label);
                keep_lower(own.z - 2.0f * four.z, 4 * i + 2, lowest, label);
                keep_lower(own.w - 2.0f * four.w, 4 * i + 3, lowest, label);
            }
            for (int i = 0; i < k / 8; ++i) {
                const int at = label - 8 * i;
                const unsigned one = at & 1 ? 0x3f800000u : 0x3f80u;  // two marks a word
                ((uint4*)out)[i] = make_uint4(
                    at >> 1 == 0 ? one : 0u, at >> 1 == 1 ? one : 0u, at >> 1 == 2 ? one : 0u,
                    at >> 1 == 3 ? one : 0u);
            }
        } else {
            for (int i = 1; i < k; ++i) keep_lower(norm[i] - 2.0f * row[i], i, lowest, label);
            for (int i = 0; i < k; ++i) out[i] = i == label ? 0x3f80 : 0;
        }
        atomicAdd(&found[pair % restarts * k + label], 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < restarts * k; i += THREADS)
        if (found[i]) atomicAdd(&counts[i], found[i]);
}
