// The anomaly map in one launch: every level map upsampled bilinearly (half-pixel centres) and multiplied, its
// maximum, the mask of what lies above the threshold, and the bounding box of the mask. The definition is
// edge/score.py.
//
// A block has a tile of the map; it finds its own maximum and box first, so that few atomics reach memory. They
// commute, so the finding does not depend on the order of the blocks.
#pragma once
#include "common.cuh"

#define STPM_WARP 32
#define STPM_WARPS (STPM_TILE_X * STPM_TILE_Y / STPM_WARP)

struct StpmLevel {
    const float* values;  // images × height × width
    int height;
    int width;
};

struct StpmCombine {
    StpmLevel levels[STPM_TAPS];
    const StpmCall* call;
    float* map;           // images × height × width
    unsigned char* mask;  // images × height × width, 1 above the threshold
    StpmFinding* findings;
    int count;  // of levels
    int height;
    int width;
    int padding;
};

__device__ inline float stpm_sample(const StpmLevel& level, const float* values, int x, int y, int width, int height) {
    const float v = fmaxf((y + 0.5f) * level.height / height - 0.5f, 0.0f);
    const float u = fmaxf((x + 0.5f) * level.width / width - 0.5f, 0.0f);
    const int top = min(static_cast<int>(v), level.height - 1), bottom = min(top + 1, level.height - 1);
    const int left = min(static_cast<int>(u), level.width - 1), right = min(left + 1, level.width - 1);
    const float down = fminf(v - top, 1.0f), across = fminf(u - left, 1.0f);
    const float* upper = values + top * level.width;
    const float* lower = values + bottom * level.width;
    return (1.0f - down) * ((1.0f - across) * upper[left] + across * upper[right]) +
           down * ((1.0f - across) * lower[left] + across * lower[right]);
}

__device__ inline void stpm_join(StpmFinding& a, const StpmFinding& b) {
    a.score = max(a.score, b.score);
    a.left = min(a.left, b.left);
    a.top = min(a.top, b.top);
    a.right = max(a.right, b.right);
    a.bottom = max(a.bottom, b.bottom);
    a.area += b.area;
}

__device__ inline StpmFinding stpm_join_warp(StpmFinding own) {
    for (int distance = STPM_WARP / 2; distance > 0; distance /= 2) {
        StpmFinding other;
        other.score = __shfl_down_sync(0xffffffffu, own.score, distance);
        other.left = __shfl_down_sync(0xffffffffu, own.left, distance);
        other.top = __shfl_down_sync(0xffffffffu, own.top, distance);
        other.right = __shfl_down_sync(0xffffffffu, own.right, distance);
        other.bottom = __shfl_down_sync(0xffffffffu, own.bottom, distance);
        other.area = __shfl_down_sync(0xffffffffu, own.area, distance);
        stpm_join(own, other);
    }
    return own;
}

extern "C" __global__ void __launch_bounds__(STPM_TILE_X* STPM_TILE_Y) stpm_combine(const StpmCombine c) {
    __shared__ StpmFinding warps[STPM_WARPS];
    const int image = blockIdx.z, thread = threadIdx.y * STPM_TILE_X + threadIdx.x;
    const int x = blockIdx.x * STPM_TILE_X + threadIdx.x;
    const float threshold = c.call->threshold;
    StpmFinding own = {0u, 0x7fffffff, 0x7fffffff, -1, -1, 0};
    for (int step = 0; step < STPM_TILES; ++step) {
        const int y = (blockIdx.y * STPM_TILES + step) * STPM_TILE_Y + threadIdx.y;
        if (x >= c.width || y >= c.height) continue;
        float product = 1.0f;
#pragma unroll
        for (int k = 0; k < STPM_TAPS; ++k) {
            if (k >= c.count) break;
            const StpmLevel& level = c.levels[k];
            const float* values = level.values + static_cast<long long>(image) * level.height * level.width;
            product *= stpm_sample(level, values, x, y, c.width, c.height);
        }
        const long long index = (static_cast<long long>(image) * c.height + y) * c.width + x;
        const bool above = product > threshold;
        c.map[index] = product;
        c.mask[index] = above;
        // no value is below zero, so their bits are in the order of the values, and a NaN is above them all
        const StpmFinding here = {__float_as_uint(product), x, y, x, y, 1};
        if (above) stpm_join(own, here);
        own.score = max(own.score, here.score);
    }

    own = stpm_join_warp(own);
    if (thread % STPM_WARP == 0) warps[thread / STPM_WARP] = own;
    __syncthreads();
    if (thread != 0) return;
    for (int other = 1; other < STPM_WARPS; ++other) stpm_join(own, warps[other]);
    StpmFinding* found = c.findings + image;
    atomicMax(&found->score, own.score);
    if (own.area == 0) return;
    atomicMin(&found->left, own.left);
    atomicMin(&found->top, own.top);
    atomicMax(&found->right, own.right);
    atomicMax(&found->bottom, own.bottom);
    atomicAdd(&found->area, own.area);
}
