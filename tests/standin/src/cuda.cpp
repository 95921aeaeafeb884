// A host stand-in for the part of the CUDA driver that the engines cuda_ipc and collective use. "Device" memory is a memfd of this
// process; an IPC handle names the process and the descriptor, and opening it maps the same pages, so a mapping outlives
// the process that exported it, as the driver's does. Copies run on a thread of their own for each stream.
//
// Faults, from the environment: RFORK_STANDIN_CUDA_MBPS (rate of copies), RFORK_STANDIN_CUDA_STALL=1 (copies of device
// memory never end, but those of at most a page), RFORK_STANDIN_CUDA_NO_EXPORT=1 (no handle for memory of more than a
// page, as for expandable segments), RFORK_STANDIN_CUDA_NO_OPEN=1 (no handle can be opened: a GPU that is hidden),
// RFORK_STANDIN_CUDA_NO_BATCH=1 (no copies in batches: memory that the driver takes one by one only).
// RFORK_STANDIN_CUDA_APART=1: the devices of two processes differ, whatever their numbers.

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidContext = 201,
              kMapFailed = 205, kPeerUnsupported = 217, kInvalidHandle = 400, kNotReady = 600, kNotSupported = 801;
constexpr uint64_t kPage = 4096, kMagic = 0x7266'6f72'6b69'7063;

struct Handle {
    unsigned char reserved[64];
};

struct Named {
    uint64_t magic;
    int32_t pid;
    int32_t fd;
    uint64_t nbytes;
    uint64_t inode;
};

struct Memory {
    uint64_t nbytes;
    int fd;
    int opened;  // times opened, of another process's memory; 0 for own memory
    Named named;
};

std::mutex g_mutex;
std::map<uint64_t, Memory> g_memory;

bool flag(const char* name) {
    const char* value = getenv(name);
    return value != nullptr && strcmp(value, "0") != 0 && *value != '\0';
}

uint64_t rounded(uint64_t nbytes) { return (nbytes + kPage - 1) / kPage * kPage; }

uint64_t mapped(int fd, uint64_t nbytes) {
    void* at = mmap(nullptr, rounded(nbytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? 0 : reinterpret_cast<uint64_t>(at);
}

struct Stream {
    struct Copy {
        uint64_t to, from, nbytes;
        void (*function)(void*) = nullptr;  // called instead of a copy
        void* argument = nullptr;
    };
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Copy> copies;
    bool busy = false, ending = false;
    std::thread thread;

    Stream() : thread([this] { run(); }) {}

    void run() {
        const char* rate = getenv("RFORK_STANDIN_CUDA_MBPS");
        const double bytes_per_us = rate ? atof(rate) : 0.0;
        const bool stalls = flag("RFORK_STANDIN_CUDA_STALL");
        std::unique_lock<std::mutex> lock(mutex);
        while (true) {
            changed.wait(lock, [this] { return ending || !copies.empty(); });
            if (ending) return;
            Copy copy = copies.front();
            copies.pop_front();
            busy = true;
            if (stalls && copy.nbytes > kPage) {
                changed.wait(lock, [this] { return ending; });
                return;
            }
            lock.unlock();
            if (copy.function != nullptr) copy.function(copy.argument);
            for (uint64_t done = 0; done < copy.nbytes; done += 1 << 20) {
                const uint64_t part = std::min<uint64_t>(1 << 20, copy.nbytes - done);
                memcpy(reinterpret_cast<void*>(copy.to + done), reinterpret_cast<void*>(copy.from + done), part);
                if (bytes_per_us > 0) usleep(static_cast<useconds_t>(part / bytes_per_us));
            }
            lock.lock();
            busy = false;
        }
    }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int cuInit(unsigned) { return kSuccess; }

int cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal > 1) return kInvalidDevice;
    *device = ordinal;
    return kSuccess;
}

int cuDeviceGetUuid(void* uuid, int device) {
    memset(uuid, 0x40 + device, 16);
    const pid_t pid = getpid();
    if (flag("RFORK_STANDIN_CUDA_APART")) memcpy(uuid, &pid, sizeof pid);
    return kSuccess;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = reinterpret_cast<void*>(static_cast<uintptr_t>(device + 1));
    return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }

thread_local int t_depth = 0;

int cuCtxPushCurrent_v2(void* context) {
    if (context == nullptr) return kInvalidContext;
    ++t_depth;
    return kSuccess;
}

int cuCtxPopCurrent_v2(void** context) {
    if (t_depth == 0) return kInvalidContext;
    --t_depth;
    *context = nullptr;
    return kSuccess;
}

int cuMemAlloc_v2(uint64_t* address, size_t nbytes) {
    if (t_depth == 0) return kInvalidContext;
    const int fd = memfd_create("rfork-standin-cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(rounded(nbytes))) != 0) return kOutOfMemory;
    struct stat status;
    fstat(fd, &status);
    *address = mapped(fd, nbytes);
    if (*address == 0) return kOutOfMemory;
    std::lock_guard<std::mutex> lock(g_mutex);
    g_memory[*address] = {nbytes, fd, 0, {kMagic, getpid(), fd, nbytes, status.st_ino}};
    return kSuccess;
}

int cuMemFree_v2(uint64_t address) {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto found = g_memory.find(address);
    if (found == g_memory.end() || found->second.opened) return kInvalidValue;
    munmap(reinterpret_cast<void*>(address), rounded(found->second.nbytes));
    close(found->second.fd);
    g_memory.erase(found);
    return kSuccess;
}

int cuMemAllocHost_v2(void** address, size_t nbytes) {
    if (t_depth == 0) return kInvalidContext;
    *address = malloc(nbytes);
    return *address == nullptr ? kOutOfMemory : kSuccess;
}

int cuMemFreeHost(void* address) {
    free(address);
    return kSuccess;
}

int cuMemGetAddressRange_v2(uint64_t* base, size_t* nbytes, uint64_t address) {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto after = g_memory.upper_bound(address);
    if (after == g_memory.begin()) return kInvalidValue;
    auto found = std::prev(after);
    if (address >= found->first + found->second.nbytes) return kInvalidValue;
    *base = found->first;
    *nbytes = found->second.nbytes;
    return kSuccess;
}

int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t nbytes) {
    if (t_depth == 0) return kInvalidContext;
    memcpy(reinterpret_cast<void*>(to), from, nbytes);
    return kSuccess;
}

int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t nbytes) {
    if (t_depth == 0) return kInvalidContext;
    memcpy(to, reinterpret_cast<void*>(from), nbytes);
    return kSuccess;
}

int cuIpcGetMemHandle(Handle* handle, uint64_t address) {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto found = g_memory.find(address);
    if (found == g_memory.end() || found->second.opened) return kInvalidValue;
    if (found->second.nbytes > kPage && flag("RFORK_STANDIN_CUDA_NO_EXPORT")) return kInvalidValue;
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &found->second.named, sizeof(Named));
    return kSuccess;
}

int cuIpcOpenMemHandle_v2(uint64_t* address, Handle handle, unsigned) {
    if (t_depth == 0) return kInvalidContext;
    if (flag("RFORK_STANDIN_CUDA_NO_OPEN")) return kPeerUnsupported;
    Named named;
    memcpy(&named, &handle, sizeof named);
    if (named.magic != kMagic) return kInvalidValue;
    if (named.pid == getpid()) return kInvalidContext;  // as the driver: a process cannot open its own handle
    std::lock_guard<std::mutex> lock(g_mutex);
    for (auto& [at, memory] : g_memory) {
        if (memory.opened && memory.named.pid == named.pid && memory.named.inode == named.inode) {
            ++memory.opened;
            *address = at;
            return kSuccess;
        }
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", named.pid, named.fd);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return kInvalidHandle;
    struct stat status;
    if (fstat(fd, &status) != 0 || status.st_ino != named.inode ||
        static_cast<uint64_t>(status.st_size) != rounded(named.nbytes)) {
        close(fd);
        return kInvalidHandle;
    }
    *address = mapped(fd, named.nbytes);
    close(fd);
    if (*address == 0) return kMapFailed;
    g_memory[*address] = {named.nbytes, -1, 1, named};
    return kSuccess;
}

int cuIpcCloseMemHandle(uint64_t address) {
    std::lock_guard<std::mutex> lock(g_mutex);
    auto found = g_memory.find(address);
    if (found == g_memory.end() || !found->second.opened) return kInvalidValue;
    if (--found->second.opened == 0) {
        munmap(reinterpret_cast<void*>(address), rounded(found->second.nbytes));
        g_memory.erase(found);
    }
    return kSuccess;
}

int cuStreamCreate(void** stream, unsigned) {
    *stream = new Stream;
    return kSuccess;
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (t_depth == 0) return kInvalidContext;
    *least = 0;
    *greatest = -5;
    return kSuccess;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
    thread_local int t_mode = 0;
    if (*mode < 0 || *mode > 2) return kInvalidValue;
    std::swap(t_mode, *mode);
    return kSuccess;
}

int cuLaunchHostFunc(void* handle, void (*function)(void*), void* argument) {
    auto* stream = static_cast<Stream*>(handle);
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->copies.push_back({0, 0, 0, function, argument});
    }
    stream->changed.notify_all();
    return kSuccess;
}

int cuStreamDestroy_v2(void* handle) {
    auto* stream = static_cast<Stream*>(handle);
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->ending = true;
    }
    stream->changed.notify_all();
    stream->thread.join();
    delete stream;
    return kSuccess;
}

int cuStreamQuery(void* handle) {
    auto* stream = static_cast<Stream*>(handle);
    std::lock_guard<std::mutex> lock(stream->mutex);
    return stream->busy || !stream->copies.empty() ? kNotReady : kSuccess;
}

int cuMemcpyAsync(uint64_t to, uint64_t from, size_t nbytes, void* handle) {
    if (t_depth == 0) return kInvalidContext;
    auto* stream = static_cast<Stream*>(handle);
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->copies.push_back({to, from, nbytes, nullptr, nullptr});
    }
    stream->changed.notify_all();
    return kSuccess;
}

struct CopyAttributes {
    int source_order, hints[4];
    unsigned flags;
};

int cuMemcpyBatchAsync(uint64_t* to, uint64_t* from, size_t* nbytes, size_t count, CopyAttributes* attributes,
                       size_t* first, size_t attribute_count, size_t* failed, void* handle) {
    *failed = SIZE_MAX;
    if (flag("RFORK_STANDIN_CUDA_NO_BATCH")) return kNotSupported;
    if (count == 0 || attribute_count != 1 || first[0] != 0 || attributes->source_order != 1) return kInvalidValue;
    for (size_t number = 0; number < count; ++number) {
        if (const int code = cuMemcpyAsync(to[number], from[number], nbytes[number], handle)) return code;
    }
    return kSuccess;
}

int cuGetErrorName(int code, const char** text) {
    switch (code) {
        case kInvalidValue: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case kOutOfMemory: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case kInvalidDevice: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
        case kInvalidContext: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case kMapFailed: *text = "CUDA_ERROR_MAP_FAILED"; break;
        case kPeerUnsupported: *text = "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"; break;
        case kNotSupported: *text = "CUDA_ERROR_NOT_SUPPORTED"; break;
        case kInvalidHandle: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        default: return kInvalidValue;
    }
    return kSuccess;
}

}  // extern "C"
#pragma GCC visibility pop
