// Three kernels of `cuda_form.py`. Compiled by NVRTC, so without headers.
//
// The arithmetic is that of torch.lerp on a CPU and on a GPU, rounding by rounding: the intrinsics keep the
// compiler from contracting a product and a sum where torch does not.

const int WINDOW_VALUES = 9;
const int BYTES_PER_THREAD = 8;

__device__ void warp_min(int value, int* target) {
    for (int lanes = 16; lanes; lanes /= 2) value = min(value, __shfl_down_sync(~0u, value, lanes));
    if (threadIdx.x % 32 == 0) atomicMin(target, value);
}

__device__ void warp_max(int value, int* target) {
    for (int lanes = 16; lanes; lanes /= 2) value = max(value, __shfl_down_sync(~0u, value, lanes));
    if (threadIdx.x % 32 == 0) atomicMax(target, value);
}

__device__ void warp_add(int value, int* target) {
    for (int lanes = 16; lanes; lanes /= 2) value += __shfl_down_sync(~0u, value, lanes);
    if (threadIdx.x % 32 == 0 && value) atomicAdd(target, value);
}

// For each mask: first and last row, first and last column with a positive logit (`rows`, -1, `columns` and -1
// if there is none), and whether all its logits are finite. One block a mask.
extern "C" __global__ void find_ranges(const float* logits, int rows, int columns, int* ranges) {
    __shared__ int found[5];
    if (threadIdx.x == 0) {
        found[0] = rows;
        found[1] = -1;
        found[2] = columns;
        found[3] = -1;
        found[4] = 1;
    }
    __syncthreads();
    const float* mask = logits + (long long)blockIdx.x * rows * columns;
    int first_row = rows, last_row = -1, first_column = columns, last_column = -1, is_finite = 1;
    for (int row = threadIdx.x / 32; row < rows; row += blockDim.x / 32) {
#pragma unroll 4
        for (int column = threadIdx.x % 32; column < columns; column += 32) {
            float logit = mask[row * columns + column];
            is_finite &= fabsf(logit) <= 3.402823466e38f;
            if (logit > 0.0f) {
                first_row = min(first_row, row);
                last_row = row;
                first_column = min(first_column, column);
                last_column = max(last_column, column);
            }
        }
    }
    warp_min(first_row, &found[0]);
    warp_max(last_row, &found[1]);
    warp_min(first_column, &found[2]);
    warp_max(last_column, &found[3]);
    warp_min(is_finite, &found[4]);
    __syncthreads();
    if (threadIdx.x < 5) ranges[blockIdx.x * 5 + threadIdx.x] = found[threadIdx.x];
}

// The cells before and after a px along one axis, and the weight of the second.
struct Position {
    int before, after;
    float weight;

    __device__ Position(int px, float cells_per_px, int cells) {
        float at = __fsub_rn(__fmul_rn(__fadd_rn((float)px, 0.5f), cells_per_px), 0.5f);
        at = fmaxf(at, 0.0f);
        before = min((int)at, cells - 1);  // The last byte of a row may have px outside the image.
        after = min(before + 1, cells - 1);
        weight = __fsub_rn(at, (float)before);
    }
};

__device__ float lerp(float start, float end, float weight) {
    return weight < 0.5f ? __fmaf_rn(weight, __fsub_rn(end, start), start)
                         : __fmaf_rn(__fsub_rn(weight, 1.0f), __fsub_rn(end, start), end);
}

// Draws windows of the masks, upsampled bilinearly (rows first) and thresholded at 0, as bits.
//
// logits:  (K, grid_rows, grid_columns)
// windows: WINDOW_VALUES for each window: its mask, first row, rows, first column (a multiple of 8), bytes of a
//          row, width of the image, first byte in `bits`, cells per px along the rows' and the columns' axis (as
//          the bits of a float).
// stats:   5 for each window, zeros at first: positive px; then of the rectangle around them the distances from
//          the end of the window to its top, from the start to its bottom, and the same of left and right.
// bits:    the rows of each window.
//
// Block (x, y) draws a part of window y.
extern "C" __global__ void draw(
    const float* logits, int grid_rows, int grid_columns, const int* windows, int* stats, unsigned char* bits
) {
    const int* window = windows + WINDOW_VALUES * blockIdx.y;
    const int rows = window[2], row_bytes = window[4], bytes = rows * row_bytes;
    const int first = blockIdx.x * blockDim.x * BYTES_PER_THREAD;
    if (first >= bytes) return;
    const float* mask = logits + (long long)window[0] * grid_rows * grid_columns;
    const int top = window[1], left = window[3], width = window[5];
    const float rows_scale = __int_as_float(window[7]), columns_scale = __int_as_float(window[8]);
    unsigned char* drawn = bits + window[6];
    int area = 0, above_end = 0, bottom = 0, before_end = 0, right = 0;
    for (int each = 0; each < BYTES_PER_THREAD; ++each) {
        const int index = first + each * blockDim.x + threadIdx.x;
        if (index >= bytes) break;
        const int row = index / row_bytes, column = 8 * (index - row * row_bytes);
        const Position y(top + row, rows_scale, grid_rows);
        const float* above = mask + y.before * grid_columns;
        const float* below = mask + y.after * grid_columns;
        unsigned int byte = 0;
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
            const int px = left + column + bit;
            const Position x(px, columns_scale, grid_columns);
            const float logit = lerp(
                lerp(above[x.before], below[x.before], y.weight),
                lerp(above[x.after], below[x.after], y.weight),
                x.weight
            );
            if (logit > 0.0f && px < width) byte |= 128u >> bit;
        }
        drawn[index] = byte;
        if (byte) {
            area += __popc(byte);
            above_end = max(above_end, rows - row);
            bottom = max(bottom, row + 1);
            before_end = max(before_end, 8 * row_bytes - column - (__clz(byte) - 24));
            right = max(right, column + 9 - __ffs(byte));
        }
    }
    int* found = stats + 5 * blockIdx.y;
    warp_add(area, found);
    warp_max(above_end, found + 1);
    warp_max(bottom, found + 2);
    warp_max(before_end, found + 3);
    warp_max(right, found + 4);
}

// Unites the windows of a chunk, which `draw` has drawn, in the masks of their images.
//
// windows: as for `draw`.
// places:  2 for each window: the first byte of its image's mask in `united`, and the bytes of a row there.
// bits:    as drawn.
// united:  zeros at first. Bytes of a word may belong to several windows, so they are joined atomically.
extern "C" __global__ void unite(
    const int* windows, const long long* places, const unsigned char* bits, unsigned int* united
) {
    const int* window = windows + WINDOW_VALUES * blockIdx.y;
    const int row_bytes = window[4], bytes = window[2] * row_bytes;
    const int first = blockIdx.x * blockDim.x * BYTES_PER_THREAD;
    const unsigned char* drawn = bits + window[6];
    const long long start = places[2 * blockIdx.y], row_step = places[2 * blockIdx.y + 1];
    for (int each = 0; each < BYTES_PER_THREAD; ++each) {
        const int index = first + each * blockDim.x + threadIdx.x;
        if (index >= bytes) return;
        if (!drawn[index]) continue;
        const int row = index / row_bytes;
        const long long byte = start + (window[1] + row) * row_step + window[3] / 8 + index - row * row_bytes;
        atomicOr(united + byte / 4, (unsigned int)drawn[index] << 8 * (byte % 4));
    }
}
