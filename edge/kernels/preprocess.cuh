// uint8 BGR → region → area resize → RGB, /255, (x − mean) / std → a tensor of images × 3 × height × width.
//
// The definition is edge/preprocess.py. The resize is a sum over rows and columns with weights; launches.py makes
// their tables after the rules of OpenCV, so this file knows neither scale nor region.
#pragma once
#include "common.cuh"

// output[i] = Σ weight[k] · input[start[i] + k − offset[i]], k from offset[i] to offset[i + 1]
struct StpmAxis {
    const int* start;
    const int* offset;
    const float* weight;
};

struct StpmPreprocess {
    const StpmCall* call;
    StpmAxis rows;
    StpmAxis columns;
    void* tensor;
    float mean[3];  // of R, G and B
    float std[3];
    int height;
    int width;
    int half;     // 1: the tensor is FP16
    int half_up;  // 1: a mean of x.5 becomes x + 1, as OpenCV does in its 2×2 case; 0: it becomes the even neighbour
};

extern "C" __global__ void __launch_bounds__(STPM_TILE_X* STPM_TILE_Y) stpm_preprocess(const StpmPreprocess p) {
    const int x = blockIdx.x * STPM_TILE_X + threadIdx.x;
    const int y = blockIdx.y * STPM_TILE_Y + threadIdx.y;
    if (x >= p.width || y >= p.height) return;

    const unsigned char* frame = p.call->frame + blockIdx.z * p.call->stride;
    const int first_column = p.columns.offset[x], last_column = p.columns.offset[x + 1];
    float total[3] = {0, 0, 0};  // B, G, R
    for (int row = p.rows.offset[y]; row < p.rows.offset[y + 1]; ++row) {
        const long long line = p.rows.start[y] + (row - p.rows.offset[y]);
        const unsigned char* pixel = frame + line * p.call->pitch + 3ll * p.columns.start[x];
        float sum[3] = {0, 0, 0};
        for (int column = first_column; column < last_column; ++column, pixel += 3) {
            const float weight = p.columns.weight[column];
            for (int c = 0; c < 3; ++c) sum[c] += weight * pixel[c];
        }
        for (int c = 0; c < 3; ++c) total[c] += p.rows.weight[row] * sum[c];
    }
    for (int c = 0; c < 3; ++c) {
        const float mean = total[2 - c];
        const float grey = fminf(p.half_up ? floorf(mean + 0.5f) : rintf(mean), 255.0f);
        const float value = (grey / 255.0f - p.mean[c]) / p.std[c];
        const long long index = ((blockIdx.z * 3ll + c) * p.height + y) * p.width + x;
        if (p.half) {
            static_cast<__half*>(p.tensor)[index] = __float2half(value);
        } else {
            static_cast<float*>(p.tensor)[index] = value;
        }
    }
}
