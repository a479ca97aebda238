// Positions of running sequences that fill no tile yet, held one by one: a cache of blocks then wastes at most one block in
// all, not a part of one for each sequence.
//
// A position on its own is a row, keys (K, Dh) and values (K, Dh), in blocks of the same pool that hold 16 of them, of any
// sequences. Rows lie dense: where one goes the last one moves. A sequence's rows become a tile, in a block of its own, when
// its 16th position comes; it goes through memory aside, so that rows and tile are never both in the cache.
#pragma once

#include <cstring>

#include "block_allocator.hpp"
#include "checks.hpp"
#include "paged_cache.hpp"

namespace r1fast {

class Tails {
 public:
  // Of a cache of blocks of one tile. Sequences are slots in [0, num_slots).
  Tails(BlockAllocator& allocator, int64_t num_slots, int64_t num_kv_heads, int64_t head_dim, int64_t element_bytes)
      : allocator_(allocator),
        num_kv_heads_(num_kv_heads),
        head_words_(checked(num_slots, num_kv_heads, head_dim, element_bytes) / kWordBytes),
        counts_(static_cast<size_t>(num_slots)),
        indices_(static_cast<size_t>(num_slots * kTile)),
        table_(static_cast<size_t>(num_slots * kTile), -1) {
    if (allocator.block_size() != kTile || allocator.num_blocks() > INT32_MAX / kTile) {
      throw std::invalid_argument("tails need blocks of " + std::to_string(kTile) + " positions, fewer than 2^31 in all");
    }
  }

  // A layer's tiled keys and values, which stay where they are.
  void add_layer(void* keys, void* values) {
    const int64_t num_words = check_product("keys", allocator_.num_blocks(), kTile * row_words());
    check_array("keys", reinterpret_cast<uintptr_t>(keys), num_words, kWordBytes);
    check_array("values", reinterpret_cast<uintptr_t>(values), num_words, kWordBytes);
    memory_.push_back(static_cast<Words>(keys));
    memory_.push_back(static_cast<Words>(values));
    aside_.resize(memory_.size() * static_cast<size_t>(kTile * row_words()));
  }

  int64_t num_slots() const { return static_cast<int64_t>(counts_.size()); }
  int64_t num_positions() const { return static_cast<int64_t>(owners_.size()); }
  const int32_t* table() const { return table_.data(); }  // (S, 16): the slots of a sequence's rows, see paged_cache.hpp

  // Arrays over slots, as rollout/rows.py has them.
  struct Running {
    const int64_t* slots;  // (n): which of them
    int64_t num_slots;
    const int64_t* length;  // tokens; the last one is not in the cache yet, and `grow` finds room for it
    int32_t* blocks;        // (S, max_blocks): full ones, then -1 while there are rows
    int64_t max_blocks;
    int64_t* num_blocks;  // full ones
  };

  // Whether there is room for position length - 1 of a slot.
  bool has_room(int64_t slot, int64_t length, int64_t num_blocks) const {
    return num_blocks * kTile + count(slot) >= length;
  }

  // Throws unless these are slots, among `num_rows` rows of the arrays, with a place for one block more.
  void check(const Running& running, int64_t num_rows) const {
    check_range("the rows of the arrays", num_rows, num_slots(), INT32_MAX);
    for (int64_t i = 0; i < running.num_slots; ++i) {
      check(running.slots[i]);
      check_range("num_blocks", running.num_blocks[running.slots[i]], 0, running.max_blocks - 1);
      check_range("length", running.length[running.slots[i]], 0, INT32_MAX);
    }
  }

  // Blocks that `grow` takes, less those that it gives back.
  int64_t missing(const Running& running) const {
    int64_t rows = num_positions(), tiles = 0;
    for (int64_t i = 0; i < running.num_slots; ++i) {
      const int64_t slot = running.slots[i];
      if (has_room(slot, running.length[slot], running.num_blocks[slot])) continue;
      const bool is_full = count(slot) == kTile - 1;
      tiles += is_full;
      rows += is_full ? 1 - kTile : 1;
    }
    return tiles + ceil_div(rows, kTile) - static_cast<int64_t>(blocks_.size());
  }

  // Room for one position more of each. False, and nothing is done, if there are not as many blocks.
  bool grow(const Running& running) {
    if (missing(running) > allocator_.num_available()) return false;
    for (const bool is_full : {true, false}) {  // tiles first: the rows that they leave are used again
      for (int64_t i = 0; i < running.num_slots; ++i) {
        const int64_t slot = running.slots[i];
        if (has_room(slot, running.length[slot], running.num_blocks[slot]) || (count(slot) == kTile - 1) != is_full) continue;
        int32_t& block = running.blocks[slot * running.max_blocks + running.num_blocks[slot]];
        if (is_full) {
          block = make_tile(slot);
          ++running.num_blocks[slot];
        } else {
          block = -1;
          add_row(slot);
        }
      }
    }
    return true;
  }

  // The first `num_positions` of a block, copied as the rows of a slot that has none. False if there are not enough blocks.
  bool adopt(int64_t slot, int64_t block, int64_t num_positions_of_it) {
    check(slot);
    if (num_positions_of_it < 0 || num_positions_of_it >= kTile || count(slot) != 0 || allocator_.holders(block) == 0) {
      throw std::invalid_argument("a slot without rows adopts fewer than 16 positions of a block that is held");
    }
    const int64_t more = ceil_div(num_positions() + num_positions_of_it, kTile) - ceil_div(num_positions(), kTile);
    if (more > allocator_.num_available()) return false;
    for (int64_t lane = 0; lane < num_positions_of_it; ++lane) {
      const int64_t row = add_row(slot);
      for (size_t m = 0; m < memory_.size(); ++m) {
        const bool is_keys = m % 2 == 0;
        const uint32_t* const tile = memory_[m] + block * kTile * row_words();
        for (int64_t head = 0; head < num_kv_heads_; ++head) {
          uint32_t* const to = memory_[m] + row * row_words() + head * head_words_;
          for (int64_t w = 0; w < head_words_; ++w) to[w] = tile[in_tile(is_keys, head, w, lane)];
        }
      }
    }
    return true;
  }

  void release(int64_t slot) {
    check(slot);
    remove_rows(slot);
  }

 private:
  using Words = uint32_t*;
  static constexpr int64_t kWordBytes = sizeof(uint32_t);

  int64_t row_words() const { return num_kv_heads_ * head_words_; }
  int64_t count(int64_t slot) const { return counts_[static_cast<size_t>(slot)]; }
  int64_t row_of(int64_t index) const { return blocks_[static_cast<size_t>(index / kTile)] * kTile + index % kTile; }

  void check(int64_t slot) const {
    if (slot < 0 || slot >= num_slots()) throw std::invalid_argument("slot " + std::to_string(slot) + " is not one");
  }

  // The bytes of a head, of sizes that can be.
  static int64_t checked(int64_t num_slots, int64_t num_kv_heads, int64_t head_dim, int64_t element_bytes) {
    check_range("num_slots", num_slots, 0, INT32_MAX / kTile);
    check_range("num_kv_heads", num_kv_heads, 1, 1 << 20);
    check_range("head_dim", head_dim, 1, 1 << 20);
    check_range("element_bytes", element_bytes, 1, 16);
    if (head_dim * element_bytes % kWordBytes != 0) throw std::invalid_argument("tails need heads of whole words");
    return head_dim * element_bytes;
  }

  // Where a tile has a word of a head's key or value.
  int64_t in_tile(bool is_keys, int64_t head, int64_t word, int64_t lane) const {
    return is_keys ? (head * head_words_ + word) * kTile + lane : (head * kTile + lane) * head_words_ + word;
  }

  // A row more, with a block if need be. Returns it.
  int64_t add_row(int64_t slot) {
    const int64_t index = num_positions();
    if (index % kTile == 0) {
      blocks_.emplace_back();
      allocator_.allocate(1, &blocks_.back());
    }
    owners_.push_back(static_cast<int32_t>(slot * kTile + counts_[static_cast<size_t>(slot)]++));
    place(owners_.back(), index);
    return row_of(index);
  }

  void place(int32_t owner, int64_t index) {
    owners_[static_cast<size_t>(index)] = owner;
    indices_[static_cast<size_t>(owner)] = static_cast<int32_t>(index);
    table_[static_cast<size_t>(owner)] = static_cast<int32_t>(~row_of(index));
  }

  // The rows that lie last go first: none of them moves for nothing.
  void remove_rows(int64_t slot) {
    int32_t gone[kTile];
    const int64_t n = count(slot);
    std::copy_n(indices_.begin() + slot * kTile, n, gone);
    std::sort(gone, gone + n, [](int32_t a, int32_t b) { return a > b; });
    counts_[static_cast<size_t>(slot)] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t last = num_positions() - 1;
      if (gone[i] != last) {
        const int64_t from = row_of(last) * row_words(), to = row_of(gone[i]) * row_words();
        for (const Words memory : memory_) std::memcpy(memory + to, memory + from, kWordBytes * row_words());
        place(owners_.back(), gone[i]);
      }
      owners_.pop_back();
      if (last % kTile == 0) {
        allocator_.free(&blocks_.back(), 1);
        blocks_.pop_back();
      }
    }
  }

  // The block that the slot's rows become.
  int32_t make_tile(int64_t slot) {
    const int64_t tile_words = kTile * row_words(), n = count(slot);
    for (size_t m = 0; m < memory_.size(); ++m) {
      uint32_t* const tile = aside_.data() + static_cast<int64_t>(m) * tile_words;
      for (int64_t lane = 0; lane < n; ++lane) {
        const uint32_t* const row = memory_[m] + ~static_cast<int64_t>(table_[static_cast<size_t>(slot * kTile + lane)]) * row_words();
        for (int64_t head = 0; head < num_kv_heads_; ++head) {
          const uint32_t* const from = row + head * head_words_;
          if (m % 2 == 0) {
            for (int64_t w = 0; w < head_words_; ++w) tile[in_tile(true, head, w, lane)] = from[w];
          } else {
            std::memcpy(tile + in_tile(false, head, 0, lane), from, kWordBytes * head_words_);
          }
        }
      }
    }
    remove_rows(slot);
    int32_t block = -1;
    allocator_.allocate(1, &block);
    for (size_t m = 0; m < memory_.size(); ++m) {
      std::memcpy(memory_[m] + block * tile_words, aside_.data() + static_cast<int64_t>(m) * tile_words,
                  kWordBytes * tile_words);
    }
    return block;
  }

  BlockAllocator& allocator_;
  int64_t num_kv_heads_, head_words_;
  std::vector<Words> memory_;     // keys, then values, of every layer
  std::vector<uint32_t> aside_;   // a tile of all of them
  std::vector<int32_t> blocks_;   // that hold rows
  std::vector<int32_t> owners_;   // of each row: slot * 16 + its place in the tile
  std::vector<uint8_t> counts_;   // (S) rows
  std::vector<int32_t> indices_;  // (S, 16): which row
  std::vector<int32_t> table_;    // (S, 16): and its slot
};

}  // namespace r1fast
