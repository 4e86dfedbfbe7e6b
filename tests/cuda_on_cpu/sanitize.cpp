// Every kernel over sizes that do not fit its blocks, in buffers that end with their last element, with one thread of
// the operating system for each CUDA thread. Built with ThreadSanitizer, and with Address- and UBSanitizer.
#include "cuda_on_cpu.h"
#include "kernels.cu"

namespace {

template <class T>
struct Buffer {
    explicit Buffer(size_t size, T value = T()) : data(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64))), size(size) {
        // the last element lies at the end of the allocation, as far as its alignment allows
        for (size_t i = 0; i < size; ++i) data[i] = value;
    }
    ~Buffer() { std::free(data); }
    T* data;
    size_t size;
};

unsigned blocks(int size, int block) { return (size + block - 1) / block; }

void preprocess(int frame, int target) {
    std::vector<unsigned char> pixels(3 * frame * frame, 77);
    std::vector<int> start(target), offset(target + 1);
    for (int i = 0; i <= target; ++i) offset[i] = i;
    for (int i = 0; i < target; ++i) start[i] = std::min(i, frame - 1);
    std::vector<float> weight(target, 1), tensor(2 * 3 * target * target);
    StpmCall call = {pixels.data(), 3 * frame, 0, 0, 0};
    StpmAxis axis = {start.data(), offset.data(), weight.data()};
    StpmPreprocess p = {&call, axis, axis, tensor.data(), {0, 0, 0}, {1, 1, 1}, target, target, 0, 0};
    cpu::launch(stpm_preprocess, {blocks(target, STPM_TILE_X), blocks(target, STPM_TILE_Y), 2},
                {STPM_TILE_X, STPM_TILE_Y, 1}, p);
    for (float value : tensor)
        if (value != 77 / 255.0f) cpu::fail("preprocess wrote another value");
}

template <class T>
void match(int channels, int height, int width, int type, int vector) {
    const int images = 2, pixels = height * width, stored = (channels + vector - 1) / vector * vector;
    Buffer<T> teacher(images * stored * pixels, T(1)), student(images * stored * pixels, T(2));
    std::vector<float> levels(images * pixels, 9), second(images * pixels, 9);
    std::vector<StpmFinding> findings(images);
    StpmMatch m = {};
    m.taps[0] = {{teacher.data, 1, type, vector, 0}, {student.data, 1, type, vector, 0}, levels.data(), channels, height, width, 0};
    m.taps[1] = m.taps[0];
    m.taps[1].levels = second.data();
    m.taps[1].first_block = blocks(pixels, STPM_PIXELS);
    m.findings = findings.data(), m.count = 2, m.eps = 1e-12f;
    cpu::launch(stpm_match, {2 * blocks(pixels, STPM_PIXELS), images, 1}, {STPM_PIXELS * STPM_SLICES, 1, 1}, m);
    for (int i = 0; i < images * pixels; ++i)
        if (!(levels[i] < 1e-6f && second[i] < 1e-6f)) cpu::fail("match wrote another value");
}

void combine(int level, int height, int width) {
    const int images = 2;
    std::vector<float> values(images * level * level, 0.5f), map(images * height * width);
    std::vector<unsigned char> mask(images * height * width);
    std::vector<StpmFinding> findings(images, {0, 0x7fffffff, 0x7fffffff, -1, -1, 0});
    StpmCall call = {nullptr, 0, 0, 0.1f, 0};
    StpmCombine c = {};
    for (int k = 0; k < 3; ++k) c.levels[k] = {values.data(), level, level};
    c.call = &call, c.map = map.data(), c.mask = mask.data(), c.findings = findings.data();
    c.count = 3, c.height = height, c.width = width;
    cpu::launch(stpm_combine, {blocks(width, STPM_TILE_X), blocks(height, STPM_TILE_Y * STPM_TILES), images},
                {STPM_TILE_X, STPM_TILE_Y, 1}, c);
    for (const StpmFinding& finding : findings)
        if (finding.area != height * width || finding.right != width - 1 || finding.bottom != height - 1)
            cpu::fail("combine found another box");
}

}  // namespace

int main() {
    preprocess(5, 7);
    preprocess(40, 33);
    match<float>(5, 3, 3, STPM_FP32, 1);
    match<__half>(64, 5, 7, STPM_FP16, 64);
    match<signed char>(40, 3, 11, STPM_INT8, 32);
    combine(3, 5, 3);
    combine(4, 33, 35);
    std::puts("all launches done");
}
