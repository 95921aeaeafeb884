// The one thing the two stand-in libraries share: a stream, reached through its virtual table.
//
// The engine hands the stream that libascendcl made to the P2P library. Neither library exports a symbol for
// that, so the P2P library calls through this interface: no link between the two, no extra name in `nm -D`.
#pragma once

#include <functional>

namespace standin {

class Stream {
 public:
    // Runs `work` after everything enqueued before it, on the stream's own thread. A non-zero result is the
    // stream's error from then on, until a synchronisation reports it.
    virtual void Enqueue(std::function<int()> work) = 0;

 protected:
    ~Stream() = default;
};

}  // namespace standin
