// Matrix tiles (AMX), where there are any.
#pragma once

#include "vectors.hpp"

#if defined(__AMX_BF16__)
namespace {

constexpr int LINE = 64;  // bytes of a row of a tile
constexpr int TILE = 16 * LINE;

// Eight tiles of sixteen rows of 64 bytes, for the thread that has it.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

}  // namespace
#endif
