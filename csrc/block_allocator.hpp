// Who holds which block of the KV cache. A block has a count of holders; a full block may also be registered with its
// tokens, so that a later prompt that begins with the same tokens takes it instead of computing it.
//
// Registered blocks form chains: a block is found by the hash of all tokens up to its end, and taken only if its own
// tokens are equal and the block before it in the chain is the one that was just matched. So a collision of hashes costs a
// miss, never a wrong prefix. A registered block that nobody holds stays until its place is needed: the one unused for longest
// goes first, and of one chain the end before the beginning. Every operation is O(1) a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace r1fast {

class BlockAllocator {
 public:
  // max_cached: registered blocks kept without a holder; -1: as many as were ever held at once.
  // hash_bits below 64 make collisions, for tests.
  BlockAllocator(int64_t num_blocks, int64_t block_size, int64_t max_cached, int64_t hash_bits)
      : num_blocks_(num_blocks), block_size_(block_size), max_cached_(max_cached) {
    if (num_blocks < 1 || num_blocks > INT32_MAX) {
      throw std::invalid_argument("num_blocks must be in [1, 2^31), got " + std::to_string(num_blocks));
    }
    if (block_size < 1 || block_size > kMaxBlockSize) {
      throw std::invalid_argument("block_size must be at least 1 and at most 65536, got " + std::to_string(block_size));
    }
    if (max_cached < -1) throw std::invalid_argument("max_cached must be at least -1, got " + std::to_string(max_cached));
    if (hash_bits < 0 || hash_bits > 64) throw std::invalid_argument("hash_bits must be in [0, 64]");
    hash_mask_ = hash_bits == 64 ? ~uint64_t{0} : (uint64_t{1} << hash_bits) - 1;
  }

  int64_t num_blocks() const { return num_blocks_; }
  int64_t block_size() const { return block_size_; }
  int64_t num_used() const { return num_used_; }
  int64_t num_cached() const { return num_cached_; }
  int64_t num_available() const { return num_blocks_ - num_used_; }  // free, or cached without a holder
  int64_t peak_used() const { return peak_used_; }

  // `count` blocks with one holder each, written to out. Throws if there are not as many; then nothing is taken.
  void allocate(int64_t count, int32_t* out) {
    if (count < 0 || count > num_available()) {
      throw std::invalid_argument("cannot allocate " + std::to_string(count) + " blocks, " +
                                  std::to_string(num_available()) + " of " + std::to_string(num_blocks_) +
                                  " are available");
    }
    for (int64_t i = 0; i < count; ++i) {
      out[i] = take();
      blocks_[out[i]].holders = 1;
    }
    count_used(count);
  }

  // One more holder for each of these blocks, which must have one.
  void share(const int32_t* blocks, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ++held(blocks[i]).holders;
  }

  // One holder less for each of these blocks of a sequence, from its last to its first.
  void free(const int32_t* blocks, int64_t count) {
    for (int64_t i = count - 1; i >= 0; --i) {
      Block& block = held(blocks[i]);
      if (--block.holders > 0) continue;
      --num_used_;
      if (block.serial != 0) {
        append(blocks[i]);
        if (num_cached_ > cache_limit()) release_oldest();
      } else {
        free_.push_back(blocks[i]);
      }
    }
  }

  // The registered blocks that these tokens begin with, each with one more holder. Returns how many.
  int64_t lookup(const int32_t* tokens, int64_t count, int32_t* out) {
    uint64_t hash = 0, serial = 0;
    int64_t num_found = 0;
    for (; (num_found + 1) * block_size_ <= count; ++num_found) {
      const int32_t* const part = tokens + num_found * block_size_;
      hash = chain_hash(hash, part);
      const auto entry = by_hash_.find(hash);
      if (entry == by_hash_.end() || !holds(entry->second, serial, part)) break;
      Block& block = blocks_[entry->second];
      if (block.holders++ == 0) {
        unlink(entry->second);
        count_used(1);
      }
      serial = block.serial;
      out[num_found] = entry->second;
    }
    return num_found;
  }

  // Registers the full blocks of a sequence, which hold these tokens and have holders.
  void insert(const int32_t* tokens, int64_t num_tokens, const int32_t* blocks, int64_t count) {
    if (count * block_size_ > num_tokens) {
      throw std::invalid_argument(std::to_string(count) + " blocks of " + std::to_string(block_size_) + " need " +
                                  std::to_string(count * block_size_) + " tokens, got " + std::to_string(num_tokens));
    }
    uint64_t hash = 0, serial = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* const part = tokens + i * block_size_;
      Block& block = held(blocks[i]);
      const uint64_t parent = serial;
      hash = chain_hash(hash, part);
      const auto entry = by_hash_.find(hash);
      if (entry != by_hash_.end() && holds(entry->second, parent, part)) {
        serial = blocks_[entry->second].serial;  // this content is known, perhaps in this very block
        continue;
      }
      if (block.serial != 0) return;  // registered under a chain whose beginning has gone: what follows has too
      if (entry != by_hash_.end()) forget(entry->second);
      block.serial = serial = ++last_serial_;
      block.parent = parent;
      block.hash = hash;
      std::copy_n(part, block_size_, tokens_.begin() + blocks[i] * block_size_);
      by_hash_[hash] = blocks[i];
    }
  }

  // Nothing that is registered now will be found again; holders keep their blocks.
  void reset() {
    while (num_cached_ > 0) release_oldest();
    for (const auto& entry : by_hash_) blocks_[entry.second].serial = 0;
    by_hash_.clear();
  }

  int64_t holders(int64_t block) const {
    return block >= 0 && block < static_cast<int64_t>(blocks_.size()) ? blocks_[block].holders : 0;
  }

 private:
  static constexpr int64_t kMaxBlockSize = 1 << 16;  // positions: each takes memory for its token

  struct Block {
    int32_t holders = 0;
    int32_t before = -1, after = -1;  // neighbours among the cached blocks without a holder
    uint64_t serial = 0;              // names the registered content; 0: not registered
    uint64_t parent = 0;              // serial of the block before it in its chain; 0: it is the first
    uint64_t hash = 0;
  };

  Block& held(int64_t index) {
    if (index < 0 || index >= num_blocks_) {
      throw std::invalid_argument("block " + std::to_string(index) + " is outside [0, " + std::to_string(num_blocks_) +
                                  ")");
    }
    if (holders(index) == 0) {
      throw std::invalid_argument("block " + std::to_string(index) + " has no holder: it was freed before");
    }
    return blocks_[index];
  }

  int64_t cache_limit() const { return max_cached_ < 0 ? peak_used_ : max_cached_; }

  void count_used(int64_t count) {
    num_used_ += count;
    peak_used_ = std::max(peak_used_, num_used_);
  }

  // A block that nobody holds: freed last, then never used, then cached and unused for longest.
  int32_t take() {
    if (free_.empty() && static_cast<int64_t>(blocks_.size()) < num_blocks_) {
      blocks_.emplace_back();  // grown with use: most of a large cache is never touched
      tokens_.resize(blocks_.size() * block_size_);
      return static_cast<int32_t>(blocks_.size() - 1);
    }
    if (free_.empty()) release_oldest();
    const int32_t index = free_.back();
    free_.pop_back();
    return index;
  }

  bool holds(int32_t index, uint64_t parent, const int32_t* tokens) const {
    const Block& block = blocks_[index];
    return block.parent == parent && std::equal(tokens, tokens + block_size_, tokens_.begin() + index * block_size_);
  }

  uint64_t chain_hash(uint64_t hash, const int32_t* tokens) const {
    for (int64_t i = 0; i < block_size_; ++i) {
      hash = (hash ^ static_cast<uint32_t>(tokens[i])) * 0x9e3779b97f4a7c15u + 1;
      hash ^= hash >> 29;
    }
    return hash & hash_mask_;
  }

  void append(int32_t index) {
    Block& block = blocks_[index];
    block.before = newest_;
    block.after = -1;
    (newest_ < 0 ? oldest_ : blocks_[newest_].after) = index;
    newest_ = index;
    ++num_cached_;
  }

  void unlink(int32_t index) {
    const Block& block = blocks_[index];
    (block.before < 0 ? oldest_ : blocks_[block.before].after) = block.after;
    (block.after < 0 ? newest_ : blocks_[block.after].before) = block.before;
    --num_cached_;
  }

  void forget(int32_t index) {
    Block& block = blocks_[index];
    by_hash_.erase(block.hash);
    block.serial = 0;
    if (block.holders > 0) return;
    unlink(index);
    free_.push_back(index);
  }

  void release_oldest() { forget(oldest_); }

  int64_t num_blocks_, block_size_, max_cached_;
  int64_t num_used_ = 0, num_cached_ = 0, peak_used_ = 0;
  int32_t oldest_ = -1, newest_ = -1;
  uint64_t last_serial_ = 0, hash_mask_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tokens_;  // of registered blocks
  std::vector<int32_t> free_;
  std::unordered_map<uint64_t, int32_t> by_hash_;
};

}  // namespace r1fast
