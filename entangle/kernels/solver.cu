// Steps of SparseGPT on one block of columns, for all rows of all experts (see pruning/fused.py).
// Arrays are contiguous: weight and pruned (experts, rows, cols), factor (experts, cols, cols),
// power and dead (experts, cols). A block is the columns [start, start + width), width <= 128.

typedef unsigned int u32;
typedef unsigned char u8;

static const u32 ZERO = 0x80000000u;  // the key of 0.0

// A number that orders as the saliency does.
__device__ __forceinline__ u32 key_of(float w, float power, bool dead) {
    float saliency = dead ? -(1.0f / fabsf(w)) : w * w / power;
    u32 bits = __float_as_uint(saliency);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Inclusive sum over the threads of a block of 256; `sums` holds 8 numbers.
__device__ __forceinline__ u32 scan_256(u32 value, u32* sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 1; step < 32; step <<= 1) {
        u32 other = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += other;
    }
    if (lane == 31) sums[warp] = value;
    __syncthreads();
    u32 before = 0;
    for (int i = 0; i < warp; ++i) before += sums[i];
    __syncthreads();
    return before + value;
}

// Prune the block's share of the left[row] least salient of all columns from start on.
// One row a thread block of 256; dynamic shared memory: 4 * (cols - start) bytes.
extern "C" __global__ void __launch_bounds__(256) choose_rows(
    const float* __restrict__ weight, const float* __restrict__ power, const u8* __restrict__ dead,
    long long* __restrict__ left, u8* __restrict__ pruned, int rows, int cols, int start, int width) {
    extern __shared__ u32 keys[];
    __shared__ u32 counts[256], sums[8], found[2];
    const int thread = threadIdx.x, n = cols - start;
    const size_t expert = blockIdx.y, line = expert * rows + blockIdx.x;
    weight += line * cols + start;
    pruned += line * cols + start;
    power += expert * cols + start;
    dead += expert * cols + start;
    const long long budget = left[line];
    if (budget == 0) {
        if (thread < width) pruned[thread] = 0;
        return;
    }
    for (int i = thread; i < n; i += 256) keys[i] = key_of(weight[i], power[i], dead[i]);
    u32 threshold = 0, mask = 0, rank = (u32)budget;  // the rank-th smallest of those that match
    for (int shift = 24; shift >= 0; shift -= 8) {
        counts[thread] = 0;
        __syncthreads();
        for (int i = thread; i < n; i += 256) {
            u32 key = keys[i];
            if ((key & mask) == threshold) atomicAdd(&counts[key >> shift & 255], 1u);
        }
        __syncthreads();
        const u32 here = counts[thread], up_to = scan_256(here, sums);
        if (up_to >= rank && up_to - here < rank) {
            found[0] = thread;
            found[1] = up_to - here;
        }
        __syncthreads();
        threshold |= found[0] << shift;
        mask |= 255u << shift;
        rank -= found[1];
        __syncthreads();
    }
    // Of the keys equal to the threshold, the first `rank` are pruned.
    const u32 key = thread < width ? keys[thread] : 0xffffffffu;
    const bool tied = thread < width && key == threshold;
    const u32 place = scan_256(tied, sums);
    const bool gone = thread < width && (key < threshold || (tied && place <= rank));
    if (thread < width) pruned[thread] = gone;
    const u32 total = scan_256(gone, sums);
    if (thread == 255) left[line] = budget - total;
}

// One digit of the rank-th smallest saliency of a block, of all rows of an expert together.
// Grid (chunks of rows, experts), 256 threads. `histogram` (experts, 2048) and the third number of
// `state` (experts, 3) are zero before and after; the first two are threshold and rank so far.
extern "C" __global__ void __launch_bounds__(256) count_digits(
    const float* __restrict__ weight, const float* __restrict__ power, const u8* __restrict__ dead,
    u32* histogram, u32* state, int rows, int cols, int start, int width, int shift, int bits,
    int first_rank) {
    __shared__ u32 counts[2048], sums[8], last;
    const int thread = threadIdx.x, column = thread & 127;
    const size_t expert = blockIdx.y;
    state += 3 * expert;
    histogram += 2048 * expert;
    const bool begins = shift + bits == 32;
    const u32 mask = begins ? 0u : ~0u << (shift + bits), threshold = begins ? 0u : state[0];
    const u32 digits = (1u << bits) - 1;
    for (int i = thread; i < 2048; i += 256) counts[i] = 0;
    __syncthreads();
    if (column < width) {
        const float strength = power[expert * cols + start + column];
        const bool gone = dead[expert * cols + start + column];
        for (int row = 2 * blockIdx.x + (thread >> 7); row < rows; row += 2 * gridDim.x) {
            u32 key = key_of(weight[(expert * rows + row) * cols + start + column], strength, gone);
            if ((key & mask) == threshold) atomicAdd(&counts[key >> shift & digits], 1u);
        }
    }
    __syncthreads();
    for (int i = thread; i < 2048; i += 256)
        if (counts[i]) atomicAdd(&histogram[i], counts[i]);
    __threadfence();
    __syncthreads();
    if (thread == 0) last = atomicAdd(&state[2], 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    u32 own[8], total = 0;
    for (int i = 0; i < 8; ++i) {
        own[i] = __ldcg(&histogram[8 * thread + i]);
        histogram[8 * thread + i] = 0;
        total += own[i];
    }
    const u32 rank = begins ? (u32)first_rank : state[1];
    u32 up_to = scan_256(total, sums) - total;
    for (int i = 0; i < 8; ++i) {
        if (up_to < rank && up_to + own[i] >= rank) {
            state[0] = threshold | (u32)(8 * thread + i) << shift;
            state[1] = rank - up_to;
        }
        up_to += own[i];
    }
    if (thread == 0) state[2] = 0;
}

// Prune what does not exceed the threshold (at least 0). Grid (rows / 2, experts), 256 threads.
extern "C" __global__ void __launch_bounds__(256) mark_block(
    const float* __restrict__ weight, const float* __restrict__ power, const u8* __restrict__ dead,
    const u32* __restrict__ state, u8* __restrict__ pruned, int rows, int cols, int start,
    int width) {
    const int column = threadIdx.x & 127, row = 2 * blockIdx.x + (threadIdx.x >> 7);
    const size_t expert = blockIdx.y;
    if (column >= width || row >= rows) return;
    const size_t at = (expert * rows + row) * cols + start + column;
    const size_t input = expert * cols + start + column;
    pruned[at] = key_of(weight[at], power[input], dead[input]) <= max(state[3 * expert], ZERO);
}

// Settle the columns of a block from left to right, each making up for those before it.
// A warp works on ROWS rows; a lane holds the columns lane, lane + 32, lane + 64, lane + 96 of each.
// Writes the final weights in place and the errors (experts, rows, width).
#define ROWS 8
extern "C" __global__ void __launch_bounds__(128) eliminate(
    float* __restrict__ weight, const float* __restrict__ factor, const u8* __restrict__ pruned,
    float* __restrict__ errors, int rows, int cols, int start, int width) {
    const int lane = threadIdx.x & 31;
    const int first = (blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * ROWS;
    const size_t expert = blockIdx.y;
    if (first >= rows) return;
    weight += (expert * rows + first) * cols + start;
    pruned += (expert * rows + first) * cols + start;
    errors += (expert * rows + first) * width;
    factor += (expert * cols + start) * cols + start;
    float w[ROWS][4];
    u32 gone[ROWS];
    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        gone[r] = 0;
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int column = lane + 32 * k;
            const bool inside = first + r < rows && column < width;
            w[r][k] = inside ? weight[(size_t)r * cols + column] : 0.0f;
            gone[r] |= (inside && pruned[(size_t)r * cols + column] ? 1u : 0u) << k;
        }
    }
    #pragma unroll
    for (int k = 0; k < 4; ++k) {
        u32 cut[ROWS];  // a bit for every column of this quarter
        #pragma unroll
        for (int r = 0; r < ROWS; ++r) cut[r] = __ballot_sync(0xffffffffu, gone[r] >> k & 1u);
        for (int l = 0; l < 32 && 32 * k + l < width; ++l) {
            const float* line = factor + (size_t)(32 * k + l) * cols;
            float u[4];
            #pragma unroll
            for (int m = k; m < 4; ++m)
                u[m] = lane + 32 * m < width ? __ldg(line + lane + 32 * m) : 0.0f;
            const float diagonal = __shfl_sync(0xffffffffu, u[k], l);
            if (lane <= l) u[k] = 0.0f;
            #pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (!(cut[r] >> l & 1u)) continue;
                const float error = __shfl_sync(0xffffffffu, w[r][k], l) / diagonal;
                #pragma unroll
                for (int m = k; m < 4; ++m) w[r][m] -= error * u[m];
                if (lane == l) w[r][k] = error;  // where pruned, w holds the error from here on
            }
        }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r >= rows) break;
        #pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int column = lane + 32 * k;
            if (column >= width) continue;
            const bool zero = gone[r] >> k & 1u;
            weight[(size_t)r * cols + column] = zero ? 0.0f : w[r][k];
            errors[(size_t)r * width + column] = zero ? w[r][k] : 0.0f;
        }
    }
}
