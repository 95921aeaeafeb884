// What the stand-in can be asked to do wrong, through environment variables; see docs/standin.md.
//
// Read anew for each connection, so that a test can change its mind between two reads.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace standin {

struct Faults {
    bool refuse = false;          // RFORK_STANDIN_REFUSE=1
    double stall_s = 0;           // RFORK_STANDIN_STALL_S
    int64_t stall_at_nbyte = 0;   // RFORK_STANDIN_STALL_AT_NBYTE
    int64_t cut_after_nbytes = -1;  // RFORK_STANDIN_CUT_AFTER_NBYTES
    int64_t flip_nbyte = -1;      // RFORK_STANDIN_FLIP_NBYTE
    double late_s = 0;            // RFORK_STANDIN_LATE_S

    static Faults FromEnvironment() {
        Faults faults;
        faults.refuse = Number("RFORK_STANDIN_REFUSE", 0) != 0;
        faults.stall_s = Number("RFORK_STANDIN_STALL_S", 0);
        faults.stall_at_nbyte = static_cast<int64_t>(Number("RFORK_STANDIN_STALL_AT_NBYTE", 0));
        faults.cut_after_nbytes = static_cast<int64_t>(Number("RFORK_STANDIN_CUT_AFTER_NBYTES", -1));
        faults.flip_nbyte = static_cast<int64_t>(Number("RFORK_STANDIN_FLIP_NBYTE", -1));
        faults.late_s = Number("RFORK_STANDIN_LATE_S", 0);
        return faults;
    }

 private:
    static double Number(const char* name, double otherwise) {
        const char* text = std::getenv(name);
        return text == nullptr || *text == '\0' ? otherwise : std::atof(text);
    }
};

}  // namespace standin
