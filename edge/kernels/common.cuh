// What the three kernels share: the structs they are launched with, and how a feature is read.
//
// edge/kernels/launches.py mirrors the structs as numpy dtypes and passes the launch geometry as macros
// (STPM_...), so it is written once. The tests compile the same source for the CPU, where a shim stands in for
// what nvcc knows by itself.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#define STPM_TAPS 4  // layer1 to layer4 at most

enum StpmType { STPM_FP32 = 0, STPM_FP16 = 1, STPM_INT8 = 2 };

// What changes from frame to frame. It lies in device memory, because a captured graph freezes the parameters of
// its kernels but not what they point to.
struct StpmCall {
    const unsigned char* frame;  // uint8 BGR, rows `pitch` bytes apart, frames of a batch `stride` bytes apart
    long long pitch;
    long long stride;
    float threshold;
    int padding;
};

// Features of one network at one tap: images × ⌈channels / vector⌉ × pixels × vector. TensorRT's formats are
// vector = 1 (LINEAR), 32 (CHW32) or the channels rounded up to 8 (HWC8).
struct StpmFeatures {
    const void* data;
    float scale;  // a stored int8 times this is the feature; 1 for the other types
    int type;     // StpmType
    int vector;
    int padding;
};

struct StpmTap {
    StpmFeatures teacher;
    StpmFeatures student;
    float* levels;  // images × height × width
    int channels;
    int height;
    int width;
    int first_block;  // of this tap, in x
};

// The score as the bits of a float, and the bounding box of the pixels above the threshold, both ends included.
// A batch has one of these for each image. `stpm_match` clears them, `stpm_combine` fills them.
struct StpmFinding {
    unsigned int score;
    int left;
    int top;
    int right;
    int bottom;
    int area;  // pixels above the threshold; 0: the box means nothing
};
