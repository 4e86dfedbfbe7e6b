// Level maps of all taps in one launch: one pass over both feature tensors gives t·t, s·s and t·s, and
// level = 1 − (t·s + ε) / (√(t·t + ε) √(s·s + ε)). The definition is edge/score.py.
//
// A block has STPM_PIXELS pixels of one tap and STPM_SLICES threads for each; a thread takes every STPM_SLICES-th
// group of 8 channels. Where channels lie side by side the slices of a pixel are neighbouring threads, where pixels
// do its pixels are, so that neighbours read from the same lines of memory.
#pragma once
#include "common.cuh"

#define STPM_GROUP 8
#define STPM_ROW (STPM_PIXELS + 4)  // spreads the slices over the banks of shared memory

struct StpmMatch {
    StpmTap taps[STPM_TAPS];
    StpmFinding* findings;
    int count;  // of taps
    float eps;
};

__device__ inline float stpm_feature(const StpmFeatures& f, long long index) {
    switch (f.type) {
        case STPM_FP16: return __half2float(static_cast<const __half*>(f.data)[index]);
        case STPM_INT8: return f.scale * static_cast<const signed char*>(f.data)[index];
        default: return static_cast<const float*>(f.data)[index];
    }
}

// Channels `first` to `first` + 7 of one pixel; 0 beyond the last channel.
__device__ inline void stpm_load(const StpmFeatures& f, int image, int first, int channels, int pixel, int pixels,
                                 float (&values)[STPM_GROUP]) {
    const long long vectors = (channels + f.vector - 1) / f.vector;
    const long long start = image * vectors * pixels * f.vector;
    const auto index = [&](int channel) {
        return start + (static_cast<long long>(channel / f.vector) * pixels + pixel) * f.vector + channel % f.vector;
    };
    if (f.vector % STPM_GROUP != 0 || first + STPM_GROUP > channels) {
        for (int k = 0; k < STPM_GROUP; ++k) {
            values[k] = first + k < channels ? stpm_feature(f, index(first + k)) : 0.0f;
        }
    } else if (f.type == STPM_FP16) {
        const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const __half*>(f.data) + index(first));
        __half half[STPM_GROUP];
        memcpy(half, &packed, sizeof(packed));
        for (int k = 0; k < STPM_GROUP; ++k) values[k] = __half2float(half[k]);
    } else if (f.type == STPM_INT8) {
        const uint2 packed = *reinterpret_cast<const uint2*>(static_cast<const signed char*>(f.data) + index(first));
        signed char byte[STPM_GROUP];
        memcpy(byte, &packed, sizeof(packed));
        for (int k = 0; k < STPM_GROUP; ++k) values[k] = f.scale * byte[k];
    } else {
        const float4* packed = reinterpret_cast<const float4*>(static_cast<const float*>(f.data) + index(first));
        const float4 low = packed[0], high = packed[1];
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    }
}

extern "C" __global__ void __launch_bounds__(STPM_PIXELS* STPM_SLICES) stpm_match(const StpmMatch m) {
    __shared__ float sums[3][STPM_SLICES][STPM_ROW];
    int number = 0;
    while (number + 1 < m.count && static_cast<int>(blockIdx.x) >= m.taps[number + 1].first_block) ++number;
    const StpmTap& tap = m.taps[number];
    const int image = blockIdx.y, thread = threadIdx.x, pixels = tap.height * tap.width;
    if (blockIdx.x == 0 && thread == 0) m.findings[image] = {0u, 0x7fffffff, 0x7fffffff, -1, -1, 0};

    const bool side_by_side = tap.teacher.vector > 1;
    const int slice = side_by_side ? thread % STPM_SLICES : thread / STPM_PIXELS;
    const int place = side_by_side ? thread / STPM_SLICES : thread % STPM_PIXELS;
    const int first_pixel = (blockIdx.x - tap.first_block) * STPM_PIXELS;
    float tt = 0, ss = 0, ts = 0;
    if (first_pixel + place < pixels) {
        for (int first = slice * STPM_GROUP; first < tap.channels; first += STPM_SLICES * STPM_GROUP) {
            float t[STPM_GROUP], s[STPM_GROUP];
            stpm_load(tap.teacher, image, first, tap.channels, first_pixel + place, pixels, t);
            stpm_load(tap.student, image, first, tap.channels, first_pixel + place, pixels, s);
            for (int k = 0; k < STPM_GROUP; ++k) {
                tt += t[k] * t[k];
                ss += s[k] * s[k];
                ts += t[k] * s[k];
            }
        }
    }
    sums[0][slice][place] = tt;
    sums[1][slice][place] = ss;
    sums[2][slice][place] = ts;
    __syncthreads();

    if (thread < STPM_PIXELS && first_pixel + thread < pixels) {
        float sum[3];
        for (int k = 0; k < 3; ++k) {
            sum[k] = m.eps;
            for (int other = 0; other < STPM_SLICES; ++other) sum[k] += sums[k][other][thread];
        }
        const float level = 1.0f - sum[2] / (sqrtf(sum[0]) * sqrtf(sum[1]));
        // rounding may give −1e-8; written this way round so that a NaN stays one
        tap.levels[static_cast<long long>(image) * pixels + first_pixel + thread] = level < 0.0f ? 0.0f : level;
    }
}
