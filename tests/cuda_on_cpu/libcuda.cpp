// A libcuda.so.1 with one device that is not there, so that the real pycuda can be run without a GPU:
//
//   g++ ... -shared -fPIC -DSTPM_FIBERS -Iedge/kernels tests/cuda_on_cpu/libcuda.cpp -o DIR/libcuda.so.1
//   LD_LIBRARY_PATH=DIR python ...
//
// Memory is host memory, kernels are those of edge/kernels on the CPU, streams are done at once, and a capture keeps
// what would have run. Only what edge/engine reaches through pycuda is here.
#include "library.cpp"

#include <ctime>
#include <set>
#include <string>

namespace {

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, CAPTURING = 900 };
using Work = std::function<void()>;

std::vector<Work>* capture = nullptr;
std::set<void*> memory;
int contexts = 0;  // retained, and not yet released
int handles = 0;   // streams and events
std::vector<void*> current;

int enqueue(Work work) {
    if (capture)
        capture->push_back(std::move(work));
    else
        work();
    return OK;
}

int allocate(void** pointer, size_t size) {
    if (capture) return CAPTURING;
    if (current.empty()) return 201;  // invalid context
    if (size > (1ull << 40)) return OUT_OF_MEMORY;
    *pointer = std::aligned_alloc(256, (size + 255) / 256 * 256);
    std::memset(*pointer, 0xA5, size);
    memory.insert(*pointer);
    return OK;
}

int release(void* pointer) {
    if (!memory.erase(pointer)) return INVALID;
    std::free(pointer);
    return OK;
}

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int* version) { return *version = 12060, OK; }
int cuGetErrorString(int status, const char** text) {
    *text = status == OUT_OF_MEMORY ? "out of memory" : status == CAPTURING ? "capturing" : "invalid";
    return OK;
}
int cuGetErrorName(int status, const char** text) { return cuGetErrorString(status, text); }

int cuDeviceGetCount(int* count) { return *count = 1, OK; }
int cuDeviceGet(int* device, int) { return *device = 0, OK; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "libcuda of the tests"), OK; }
int cuDeviceComputeCapability(int* major, int* minor, int) { return *major = 8, *minor = 7, OK; }
int cuDeviceGetAttribute(int* value, int, int) { return *value = std::getenv("STPM_INTEGRATED") != nullptr, OK; }
int cuDevicePrimaryCtxRetain(void** context, int) { return ++contexts, *context = &contexts, OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return --contexts, OK; }
int cuDevicePrimaryCtxRelease(int) { return --contexts, OK; }
int cuCtxPushCurrent_v2(void* context) { return current.push_back(context), OK; }
int cuCtxPopCurrent_v2(void** context) {
    if (current.empty()) return 201;
    *context = current.back();
    current.pop_back();
    return OK;
}

int cuMemAlloc_v2(void** pointer, size_t size) { return allocate(pointer, size); }
int cuMemHostAlloc(void** pointer, size_t size, unsigned) { return allocate(pointer, size); }
int cuMemAllocHost_v2(void** pointer, size_t size) { return allocate(pointer, size); }
int cuMemFree_v2(void* pointer) { return release(pointer); }
int cuMemFreeHost(void* pointer) { return release(pointer); }
int cuMemHostGetDevicePointer_v2(void** device, void* host, unsigned) { return *device = host, OK; }
int cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = 3 << 20, *total = 8 << 20, OK; }
int cuMemcpyHtoD_v2(void* to, const void* from, size_t size) {
    if (capture) return CAPTURING;
    return std::memcpy(to, from, size), OK;
}
int cuMemcpyDtoH_v2(void* to, const void* from, size_t size) { return cuMemcpyHtoD_v2(to, from, size); }
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t size, void*) {
    return enqueue([=] { std::memcpy(to, from, size); });
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t size, void*) {
    return enqueue([=] { std::memcpy(to, from, size); });
}
int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t size, void*) {
    return enqueue([=] { std::memcpy(to, from, size); });
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
    // what nvcc writes is an ELF file
    if (std::memcmp(image, "\177ELF", 4)) return INVALID;
    return *module = &memory, OK;
}
int cuModuleUnload(void*) { return OK; }
int cuModuleGetFunction(void** function, void*, const char* name) { return *function = strdup(name), OK; }
int cuFuncSetBlockShape(void*, int, int, int) { return OK; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                   void*, void**, void** extra) {
    const char* bytes = nullptr;
    size_t size = 0;
    for (; extra && *extra; extra += 2) {
        if (*extra == reinterpret_cast<void*>(1)) bytes = static_cast<const char*>(extra[1]);
        if (*extra == reinterpret_cast<void*>(2)) size = *static_cast<size_t*>(extra[1]);
    }
    if (!bytes) return INVALID;
    const std::string parameters(bytes, size), name = static_cast<const char*>(function);
    return enqueue([=] {
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        if (launch(name.c_str(), grid, block, parameters.data(), parameters.size())) cpu::fail("a wrong launch");
    });
}

int cuStreamCreate(void** stream, unsigned) { return ++handles, *stream = new int(7), OK; }
int cuStreamDestroy_v2(void* stream) { return --handles, delete static_cast<int*>(stream), OK; }
int cuStreamSynchronize(void*) { return capture ? CAPTURING : OK; }
int cuStreamQuery(void*) { return capture ? CAPTURING : OK; }
int cuEventCreate(void** event, unsigned) { return ++handles, *event = new double(0), OK; }
int cuEventDestroy_v2(void* event) { return --handles, delete static_cast<double*>(event), OK; }
int cuEventRecord(void* event, void*) {
    return enqueue([=] { *static_cast<double*>(event) = now(); });
}
int cuEventQuery(void*) { return capture ? CAPTURING : OK; }
int cuEventSynchronize(void*) { return capture ? CAPTURING : OK; }
int cuEventElapsedTime(float* time, void* from, void* to) {
    return *time = static_cast<float>(*static_cast<double*>(to) - *static_cast<double*>(from)), OK;
}
int cuEventElapsedTime_v2(float* time, void* from, void* to) { return cuEventElapsedTime(time, from, to); }

int cuStreamBeginCapture_v2(void*, int mode) {
    if (capture || mode != 1) return INVALID;
    return capture = new std::vector<Work>, OK;
}
int cuStreamEndCapture(void*, void** graph) {
    if (!capture) return INVALID;
    *graph = capture;
    return capture = nullptr, OK;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = new std::vector<Work>(*static_cast<std::vector<Work>*>(graph)), OK;
}
int cuGraphLaunch(void* executable, void*) {
    for (const Work& work : *static_cast<std::vector<Work>*>(executable)) work();
    return OK;
}
int cuGraphDestroy(void* graph) { return delete static_cast<std::vector<Work>*>(graph), OK; }
int cuGraphExecDestroy(void* executable) { return cuGraphDestroy(executable); }

// For the tests: what was not given back.
int stpm_left() { return static_cast<int>(memory.size() + current.size()) + contexts + handles; }
}
