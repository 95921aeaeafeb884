// The P2P library over host memory and loopback TCP: the data plane that TRANSFER_ENGINE_P2P_SO_PATH names.
//
// The receiver's root info carries a port and a token; the sender connects there and shows the token. From then on
// each send is a length, then pieces: bytes, or, where the receiver may look into the sender's memory, the addresses
// that it copies from (one copy instead of two, on one core instead of two). Sends and receives run on the stream
// they were given, in order. Faults (faults.hpp) are the sender's, except `late`, which is the receiver's.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "faults.hpp"
#include "stream.hpp"

namespace {

// HCCL's numbers.
constexpr int kOk = 0;
constexpr int kParameter = 1;
constexpr int kSyscall = 8;
constexpr int kTimeout = 9;
constexpr int kConnect = 11;
constexpr int kTransfer = 13;

constexpr int kReceiver = 0;
constexpr int kSender = 1;
constexpr auto kAcceptLimit = std::chrono::seconds(60);
constexpr int kSocketBufferNbytes = 4 << 20;
constexpr char kMagic[] = "RFORK-STANDIN-1";

struct RootInfo {  // the first bytes of the 4108 opaque ones
    char magic[sizeof(kMagic)];
    uint16_t port;
    uint64_t token[2];
};
constexpr size_t kRootInfoNbytes = 4108;
static_assert(sizeof(RootInfo) <= kRootInfoNbytes, "root info is 4108 bytes");

using Token = std::pair<uint64_t, uint64_t>;

struct Hello {  // what a sender says first
    Token token;
    int64_t pid;
    uint64_t token_at;  // the same token in its memory, for the receiver to try
};

struct Piece {
    uint64_t nbytes;
    uint64_t address;
};

// What a receiver answers to a hello, and at the end of each message.
constexpr char kByMemory = 'm';
constexpr char kByWire = 'w';
constexpr size_t kCopyNbytes = 16 << 20;  // between two looks at whether the copy is still wanted

std::mutex listeners_mutex;
std::map<Token, int> listeners;  // made by P2PGetRootInfo, taken by the receiver's P2PCommInitRootInfo

size_t ElementNbytes(int type) {
    // int8 int16 int32 fp16 fp32 int64 uint64 uint8 uint16 uint32 fp64 bfp16
    static constexpr size_t kNbytes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
    return type >= 0 && static_cast<size_t>(type) < std::size(kNbytes) ? kNbytes[type] : 0;
}

void SetOptions(int fd) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSocketBufferNbytes, sizeof(kSocketBufferNbytes));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &kSocketBufferNbytes, sizeof(kSocketBufferNbytes));
}

class Comm {
 public:
    Comm(int kind, int fd, Token token) : kind_(kind), token_(token), faults_(standin::Faults::FromEnvironment()) {
        if (kind == kReceiver) {
            listener_ = fd;
        } else {
            socket_ = fd;
        }
    }

    ~Comm() {
        for (const int fd : {listener_, socket_.load()}) {
            if (fd >= 0) {
                close(fd);
            }
        }
    }

    int kind() const { return kind_; }
    int error() const { return error_; }
    const standin::Faults& faults() const { return faults_; }

    // Ends what is under way: a blocked send or receive fails, queued ones fail at once.
    void Cancel() {
        cancelled_ = true;
        const int fd = socket_;
        if (fd >= 0) {
            shutdown(fd, SHUT_RDWR);
        }
    }

    int Greet() const {
        const Hello hello{token_, getpid(), reinterpret_cast<uint64_t>(&token_)};
        return Write(&hello, sizeof(hello));
    }

    int Send(const char* bytes, size_t nbytes) {
        int result = error_ != kOk ? error_.load() : kOk;
        if (result == kOk && lane_ == 0) {
            result = Read(&lane_, 1);
        }
        const uint64_t header = nbytes;
        if (result == kOk) {
            result = Write(&header, sizeof(header));
        }
        while (result == kOk && nbytes > 0) {
            const size_t take = std::min(nbytes, NextFault());
            result = take == 0 ? Misbehave(bytes, &nbytes) : Give(bytes, take);
            bytes += take;
            nbytes -= take;
            sent_ += static_cast<int64_t>(take);
        }
        char taken = 0;  // until then the memory is not the caller's again
        return Note(result == kOk ? Read(&taken, 1) : result);
    }

    int Receive(char* bytes, size_t nbytes) {
        uint64_t header = 0;
        int result = error_ != kOk ? error_.load() : Accept();
        if (result == kOk) {
            result = Read(&header, sizeof(header));
        }
        if (result == kOk && header != nbytes) {
            result = kTransfer;  // the two sides do not agree on what is being copied
        }
        if (result == kOk) {
            result = faults_.late_s > 0 ? TakeLate(bytes, nbytes) : Take(bytes, nbytes);
        }
        return Note(result);
    }

 private:
    // Bytes until the next fault is due; 0 when it is due now. `sent_` counts payload over the connection's life.
    size_t NextFault() const {
        int64_t until = INT64_MAX;
        if (faults_.cut_after_nbytes >= sent_) {
            until = std::min(until, faults_.cut_after_nbytes - sent_);
        }
        if (faults_.flip_nbyte >= sent_) {
            until = std::min(until, faults_.flip_nbyte - sent_);
        }
        if (faults_.stall_s > 0 && !stalled_ && faults_.stall_at_nbyte >= sent_) {
            until = std::min(until, faults_.stall_at_nbyte - sent_);
        }
        return static_cast<size_t>(until);
    }

    int Misbehave(const char*& bytes, size_t* nbytes) {
        if (faults_.stall_s > 0 && !stalled_ && faults_.stall_at_nbyte == sent_) {
            stalled_ = true;
            return Sleep(faults_.stall_s);
        }
        if (faults_.cut_after_nbytes == sent_) {
            shutdown(socket_, SHUT_RDWR);
            return kTransfer;
        }
        flipped_ = static_cast<char>(*bytes ^ 0x10);
        ++bytes, --*nbytes, ++sent_;
        return Give(&flipped_, 1);
    }

    int Give(const char* bytes, size_t nbytes) const {
        if (lane_ == kByWire) {
            return Write(bytes, nbytes);
        }
        const Piece piece{nbytes, reinterpret_cast<uint64_t>(bytes)};
        return Write(&piece, sizeof(piece));
    }

    // One message's bytes, and the word to the sender that they are taken.
    int Take(char* bytes, size_t nbytes) const {
        int result = lane_ == kByWire ? Read(bytes, nbytes) : kOk;
        while (lane_ == kByMemory && result == kOk && nbytes > 0) {
            Piece piece{};
            result = Read(&piece, sizeof(piece));
            if (result == kOk && piece.nbytes > nbytes) {
                result = kTransfer;
            }
            if (result == kOk) {
                result = Copy(bytes, piece);
                bytes += piece.nbytes;
                nbytes -= piece.nbytes;
            }
        }
        return result == kOk ? Write(&lane_, 1) : result;
    }

    int Copy(char* bytes, Piece piece) const {
        while (piece.nbytes > 0) {
            const size_t take = std::min<size_t>(piece.nbytes, kCopyNbytes);
            const iovec local{bytes, take};
            const iovec remote{reinterpret_cast<void*>(piece.address), take};
            const ssize_t done = process_vm_readv(sender_, &local, 1, &remote, 1, 0);
            if (done <= 0 || cancelled_) {
                return kTransfer;
            }
            bytes += done;
            piece.address += static_cast<uint64_t>(done);
            piece.nbytes -= static_cast<uint64_t>(done);
        }
        return kOk;
    }

    // Whether the sender's memory can be read from here: same user, same pid namespace, and nothing forbids it.
    char Lane(const Hello& hello) {
        const char* wanted = std::getenv("RFORK_STANDIN_LANE");
        if (wanted != nullptr && std::strcmp(wanted, "wire") == 0) {
            return kByWire;
        }
        sender_ = static_cast<pid_t>(hello.pid);
        Token seen{};
        const iovec local{&seen, sizeof(seen)};
        const iovec remote{reinterpret_cast<void*>(hello.token_at), sizeof(seen)};
        const ssize_t done = process_vm_readv(sender_, &local, 1, &remote, 1, 0);
        return done == static_cast<ssize_t>(sizeof(seen)) && seen == token_ ? kByMemory : kByWire;
    }

    int Sleep(double seconds) const {
        const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
        while (std::chrono::steady_clock::now() < until) {
            if (cancelled_) {
                return kTransfer;
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        return kOk;
    }

    // The bytes are taken now and reach their place later, whatever has become of the connection by then.
    int TakeLate(char* bytes, size_t nbytes) const {
        std::vector<char> kept(nbytes);
        const int result = Take(kept.data(), nbytes);
        if (result != kOk) {
            return result;
        }
        std::this_thread::sleep_for(std::chrono::duration<double>(faults_.late_s));
        std::memcpy(bytes, kept.data(), nbytes);
        return kOk;
    }

    int Accept() {
        if (socket_ >= 0) {
            return kOk;
        }
        const auto until = std::chrono::steady_clock::now() + kAcceptLimit;
        while (!cancelled_) {
            if (std::chrono::steady_clock::now() > until) {
                return kTimeout;
            }
            pollfd waiting{listener_, POLLIN, 0};
            if (poll(&waiting, 1, 20) <= 0) {
                continue;
            }
            const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
            if (fd < 0) {
                continue;
            }
            SetOptions(fd);
            Hello hello{};
            if (recv(fd, &hello, sizeof(hello), MSG_WAITALL) != static_cast<ssize_t>(sizeof(hello)) ||
                hello.token != token_) {
                close(fd);  // a stranger
                continue;
            }
            socket_ = fd;
            lane_ = Lane(hello);
            return Write(&lane_, 1);
        }
        return kTransfer;
    }

    int Write(const void* from, size_t nbytes) const {
        const char* bytes = static_cast<const char*>(from);
        while (nbytes > 0) {
            const ssize_t done = send(socket_, bytes, nbytes, MSG_NOSIGNAL);
            if (done < 0 && errno == EINTR) {
                continue;
            }
            if (done <= 0 || cancelled_) {
                return kTransfer;
            }
            bytes += done;
            nbytes -= static_cast<size_t>(done);
        }
        return kOk;
    }

    int Read(void* to, size_t nbytes) const {
        char* bytes = static_cast<char*>(to);
        while (nbytes > 0) {
            const ssize_t done = recv(socket_, bytes, nbytes, MSG_WAITALL);
            if (done < 0 && errno == EINTR) {
                continue;
            }
            if (done <= 0 || cancelled_) {
                return kTransfer;
            }
            bytes += done;
            nbytes -= static_cast<size_t>(done);
        }
        return kOk;
    }

    int Note(int result) {
        if (result != kOk) {
            error_ = result;
        }
        return result;
    }

    const int kind_;
    const Token token_;
    const standin::Faults faults_;
    int listener_ = -1;
    std::atomic<int> socket_{-1};
    std::atomic<int> error_{kOk};
    std::atomic<bool> cancelled_{false};
    char lane_ = 0;  // kByMemory, kByWire, or not settled yet
    pid_t sender_ = -1;
    char flipped_ = 0;
    int64_t sent_ = 0;
    bool stalled_ = false;
};

using SharedComm = std::shared_ptr<Comm>;  // queued work outlives P2PCommDestroy

int Connect(const RootInfo& root, void** comm) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return kSyscall;
    }
    SetOptions(fd);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(root.port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const Token token{root.token[0], root.token[1]};
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
        close(fd);
        return kConnect;
    }
    auto made = std::make_shared<Comm>(kSender, fd, token);
    if (made->Greet() != kOk) {
        return kConnect;
    }
    *comm = new SharedComm(std::move(made));
    return kOk;
}

int Listen(const RootInfo& root, void** comm) {
    const Token token{root.token[0], root.token[1]};
    std::lock_guard<std::mutex> lock(listeners_mutex);
    const auto found = listeners.find(token);
    if (found == listeners.end()) {
        return kParameter;
    }
    *comm = new SharedComm(std::make_shared<Comm>(kReceiver, found->second, token));
    listeners.erase(found);
    return kOk;
}

}  // namespace

#define STANDIN_API extern "C" __attribute__((visibility("default")))

STANDIN_API int P2PGetRootInfo(void* root_info) {
    if (root_info == nullptr) {
        return kParameter;
    }
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return kSyscall;
    }
    SetOptions(fd);  // before listen: accepted sockets inherit the buffer sizes, and the window with them
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    if (bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 || listen(fd, 8) != 0 ||
        getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
        close(fd);
        return kSyscall;
    }
    std::random_device random;
    RootInfo root{};
    std::memcpy(root.magic, kMagic, sizeof(kMagic));
    root.port = ntohs(address.sin_port);
    for (uint64_t& word : root.token) {
        word = (static_cast<uint64_t>(random()) << 32) | random();
    }
    std::memset(root_info, 0, kRootInfoNbytes);
    std::memcpy(root_info, &root, sizeof(root));
    std::lock_guard<std::mutex> lock(listeners_mutex);
    listeners[{root.token[0], root.token[1]}] = fd;
    return kOk;
}

STANDIN_API int P2PCommInitRootInfo(const void* root_info, int kind, int /*link*/, void** comm) {
    if (root_info == nullptr || comm == nullptr) {
        return kParameter;
    }
    RootInfo root{};
    std::memcpy(&root, root_info, sizeof(root));
    if (std::memcmp(root.magic, kMagic, sizeof(kMagic)) != 0) {
        return kParameter;
    }
    if (kind == kSender) {
        return standin::Faults::FromEnvironment().refuse ? kConnect : Connect(root, comm);
    }
    return kind == kReceiver ? Listen(root, comm) : kParameter;
}

STANDIN_API int P2PCommDestroy(void* comm) {
    if (comm == nullptr) {
        return kParameter;
    }
    auto* const shared = static_cast<SharedComm*>(comm);
    (*shared)->Cancel();
    delete shared;
    return kOk;
}

STANDIN_API int P2PSend(void* buffer, uint64_t count, int type, void* comm, void* stream) {
    const size_t nbytes = count * ElementNbytes(type);
    if (buffer == nullptr || nbytes == 0 || comm == nullptr || stream == nullptr) {
        return kParameter;
    }
    const SharedComm shared = *static_cast<SharedComm*>(comm);
    if (shared->kind() != kSender) {
        return kParameter;
    }
    static_cast<standin::Stream*>(stream)->Enqueue(
        [shared, buffer, nbytes] { return shared->Send(static_cast<const char*>(buffer), nbytes); });
    return kOk;
}

STANDIN_API int P2PRecv(void* buffer, uint64_t count, int type, void* comm, void* stream) {
    const size_t nbytes = count * ElementNbytes(type);
    if (buffer == nullptr || nbytes == 0 || comm == nullptr || stream == nullptr) {
        return kParameter;
    }
    const SharedComm shared = *static_cast<SharedComm*>(comm);
    if (shared->kind() != kReceiver) {
        return kParameter;
    }
    static_cast<standin::Stream*>(stream)->Enqueue(
        [shared, buffer, nbytes] { return shared->Receive(static_cast<char*>(buffer), nbytes); });
    return kOk;
}

STANDIN_API int P2PGetCommAsyncError(void* comm, int* error) {
    if (comm == nullptr || error == nullptr) {
        return kParameter;
    }
    *error = (*static_cast<SharedComm*>(comm))->error();
    return kOk;
}
