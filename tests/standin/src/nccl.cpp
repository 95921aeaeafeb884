// A host stand-in for the part of NCCL that the engine collective uses: communicators of two over TCP on the loopback
// interface, whose transfers run on a stream of the CUDA stand-in. As NCCL's: creating one does not block, a transfer
// whose peer is gone reports an error and leaves its stream busy until the communicator is aborted.
//
// Faults, from the environment: RFORK_STANDIN_NCCL_STUCK=1 (aborted transfers never leave their stream).

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

extern "C" int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument);

namespace {

constexpr int kSuccess = 0, kSystemError = 2, kInvalidArgument = 4, kInvalidUsage = 5, kRemoteError = 6,
              kInProgress = 7;
constexpr uint64_t kMagic = 0x7266'6f72'6b6e'6363;

struct UniqueId {
    unsigned char internal[128];
};

struct Named {
    uint64_t magic;
    uint16_t port;
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

std::mutex g_mutex;
std::map<uint16_t, int> g_listening;

struct Communicator {
    std::atomic<int> state{kInProgress};
    std::atomic<bool> aborted{false};
    std::atomic<int> transfers{0};
    int fd = -1;
    std::thread creating;
};

struct Transfer {
    bool sends;
    char* address;
    size_t nbytes;
    Communicator* communicator;
    void* stream;
};

thread_local int t_depth = 0;
thread_local std::vector<Transfer> t_group;

bool ready(Communicator* of, int fd, short events) {
    while (!of->aborted) {
        pollfd each{fd, events, 0};
        if (poll(&each, 1, 20) > 0) return true;
    }
    return false;
}

void create(Communicator* made, int listening, uint16_t port) {
    int fd = -1;
    if (listening >= 0) {
        if (ready(made, listening, POLLIN)) fd = accept(listening, nullptr, nullptr);
        close(listening);
    } else {
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in to{};
        to.sin_family = AF_INET;
        to.sin_port = htons(port);
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) {
            close(fd);
            fd = -1;
        }
    }
    made->fd = fd;
    made->state = fd >= 0 ? kSuccess : kSystemError;
}

void run(void* argument) {
    std::unique_ptr<std::vector<Transfer>> group(static_cast<std::vector<Transfer>*>(argument));
    Communicator* communicator = group->front().communicator;
    const bool stuck = getenv("RFORK_STANDIN_NCCL_STUCK") != nullptr;
    for (const Transfer& each : *group) {
        for (size_t done = 0; done < each.nbytes;) {
            ssize_t moved = -1;
            if (ready(communicator, communicator->fd, each.sends ? POLLOUT : POLLIN)) {
                const size_t part = each.nbytes - done;
                moved = each.sends ? send(communicator->fd, each.address + done, part, MSG_NOSIGNAL | MSG_DONTWAIT)
                                   : recv(communicator->fd, each.address + done, part, MSG_DONTWAIT);
            }
            if (moved > 0) {
                done += static_cast<size_t>(moved);
                continue;
            }
            if (!communicator->aborted) communicator->state = kRemoteError;
            while (!communicator->aborted || stuck) usleep(1000);
            communicator->transfers--;
            return;
        }
    }
    communicator->transfers--;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int ncclGetVersion(int* version) {
    *version = 22800;
    return kSuccess;
}

const char* ncclGetErrorString(int code) { return code == kRemoteError ? "remote process exited" : "stand-in error"; }

int ncclGetUniqueId(UniqueId* id) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof at;
    if (bind(fd, reinterpret_cast<sockaddr*>(&at), length) != 0 || listen(fd, 1) != 0 ||
        getsockname(fd, reinterpret_cast<sockaddr*>(&at), &length) != 0)
        return kSystemError;
    Named named{kMagic, ntohs(at.sin_port)};
    memset(id, 0, sizeof *id);
    memcpy(id, &named, sizeof named);
    std::lock_guard<std::mutex> lock(g_mutex);
    g_listening[named.port] = fd;
    return kSuccess;
}

int ncclCommInitRankConfig(void** communicator, int ranks, UniqueId id, int rank, Config* config) {
    Named named;
    memcpy(&named, &id, sizeof named);
    if (ranks != 2 || named.magic != kMagic || config->magic != 0xcafebeef || config->size != 48 ||
        config->version < 21800 || config->blocking != 0)
        return kInvalidArgument;
    int listening = -1;
    if (rank == 0) {
        std::lock_guard<std::mutex> lock(g_mutex);
        listening = g_listening[named.port];
        g_listening.erase(named.port);
    }
    auto* made = new Communicator;
    made->creating = std::thread(create, made, listening, named.port);
    *communicator = made;
    return kInProgress;
}

int ncclCommGetAsyncError(void* communicator, int* state) {
    *state = static_cast<Communicator*>(communicator)->state;
    return kSuccess;
}

int ncclCommAbort(void* communicator) {
    auto* ended = static_cast<Communicator*>(communicator);
    ended->aborted = true;
    ended->creating.join();
    if (getenv("RFORK_STANDIN_NCCL_STUCK") != nullptr) return kSuccess;
    while (ended->transfers > 0) usleep(1000);
    if (ended->fd >= 0) close(ended->fd);
    delete ended;
    return kSuccess;
}

int ncclGroupStart() {
    ++t_depth;
    return kSuccess;
}

int ncclGroupEnd() {
    if (t_depth == 0) return kInvalidUsage;
    if (--t_depth > 0 || t_group.empty()) return kSuccess;
    auto* group = new std::vector<Transfer>(std::move(t_group));
    t_group.clear();
    group->front().communicator->transfers++;
    cuLaunchHostFunc(group->front().stream, run, group);
    return kSuccess;
}

static int queue(bool sends, void* address, size_t nbytes, int type, void* communicator, void* stream) {
    if (t_depth == 0 || type != 1) return kInvalidUsage;
    t_group.push_back({sends, static_cast<char*>(address), nbytes, static_cast<Communicator*>(communicator), stream});
    return kSuccess;
}

int ncclSend(const void* address, size_t nbytes, int type, int peer, void* communicator, void* stream) {
    return peer == 0 ? queue(true, const_cast<void*>(address), nbytes, type, communicator, stream) : kInvalidArgument;
}

int ncclRecv(void* address, size_t nbytes, int type, int peer, void* communicator, void* stream) {
    return peer == 1 ? queue(false, address, nbytes, type, communicator, stream) : kInvalidArgument;
}

}  // extern "C"
#pragma GCC visibility pop
