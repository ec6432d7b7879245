// What a call of the kernels needs, from sizes alone: path, grids, workspace. Host code; launches nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels.hpp"

namespace emoe::cuda {

// Parts of a workspace: bytes from its start.
struct Parts {
    std::size_t id, row, weight;                // picks, [T*K] int, int, float
    std::size_t token, out_row, sorted_weight;  // sorted by expert, likewise
    std::size_t tiles, tile_count;              // Tile [tiles_bound], int
    std::size_t activations;                    // [T*K,I], of type `rows`
    std::size_t hidden;                         // [T,H] likewise, where narrow
    std::size_t bytes;
};

struct Plan {
    Path path = Path::kRows;
    bool vector = false;           // 16-byte loads on the rows path
    DType rows = DType::kFloat32;  // of activations, and of hidden states where narrow
    bool narrow = false;           // hidden states are converted or realigned first
    std::int64_t candidates = 0;   // C
    std::int64_t pairs = 0;        // T*K
    std::int64_t tile_rows = 0;
    std::int64_t tiles_bound = 0;  // as many tiles as there can be
    Parts parts{};
};

// ConfigError where the op contradicts itself or the layout is refused.
Plan plan(const Mlp& op);

}  // namespace emoe::cuda
