// Of head.hpp, for each level.
struct HeadKernels {
  // The epilogue of 8 rows of sums: vocabulary entries from `v` on, their lanes rows of h from `t` on.
  template <bool kBf16, bool kSoftcap, bool kWantSz, int64_t kLd, class T>
  R1FAST_NATIVE static void tile_epilogue(const Forward<T>& f, float (*tile)[kLd], int64_t num_vectors, int64_t v, int64_t t,
                                   int64_t block) {
    float slope[kVocabPadding][kLd];
    float bias[kVocabPadding] = {};
    if (f.map.bias != nullptr) {
      for (int i = 0; i < kVocabPadding && v + i < f.e.vocab_size; ++i) bias[i] = f.map.bias[v + i];
    }
    if (kSoftcap) {
      const float inv_softcap = 1 / f.map.softcap;
      for (int i = 0; i < kVocabPadding; ++i) {
        for (int64_t l = 0; l < kLanes * num_vectors; ++l) {
          const Tanh tanh = tanh_and_slope((tile[i][l] + bias[i]) * inv_softcap);
          tile[i][l] = f.map.softcap * tanh.value;
          slope[i][l] = tanh.slope;
        }
        bias[i] = 0;
      }
    }
    const Lanes inv_temperature = all(f.map.inv_temperature);
    for (int64_t j = 0; j < num_vectors; ++j, t += kLanes) {
      const Truth valid = column_truth(t, f.e.num_rows);
      const Words target = load_words(f.target_ids + t);
      const Lanes anchor = load_lanes(f.anchor + t);
      float* const s_at = f.s_blocks + block * f.padded_rows + t;
      float* const sz_at = kWantSz ? f.sz_blocks + block * f.padded_rows + t : nullptr;
      Lanes s = load_lanes(s_at);
      Lanes sz = kWantSz ? load_lanes(sz_at) : s;
      Word* const to = f.e.words == nullptr ? nullptr : f.e.words + v / (kBf16 ? 2 : 1) * f.e.ld + t;
      Lanes e[kVocabPadding];  // stored past the caches: E is larger than they are
  #pragma GCC unroll 8
      for (int i = 0; i < kVocabPadding; ++i) {
        const Lanes u = plus(load_lanes(&tile[i][kLanes * j]), all(bias[i]));
        const Lanes x = times_minus(u, inv_temperature, anchor);
        const Truth counted =
            v + i < f.e.vocab_size ? and_differs(valid, target, static_cast<int32_t>(v + i)) : none();
        e[i] = where(counted, exp_lanes(x));
        s = plus(s, e[i]);
        // where e is 0, x may be minus infinity
        if (kWantSz) sz = times_plus_where(counted, e[i], larger(all(kMinExp), x), sz);
        if (kSoftcap) e[i] = where(counted, times(e[i], load_lanes(&slope[i][kLanes * j])));
        if (!kBf16 && to != nullptr) stream_lanes(to + i * f.e.ld, e[i]);
      }
      if (kBf16 && to != nullptr) {
        for (int i = 0; i < kVocabPadding; i += 2) {
          stream_words(to + i / 2 * f.e.ld, interleave_bf16(e[i], e[i + 1]));
        }
      }
      store_lanes(s_at, s);
      if (kWantSz) store_lanes(sz_at, sz);
    }
  }

  // Rows of words (v, v + 1) by t become rows of words (t, t + 1), one for each v.
  R1FAST_NATIVE static void pair_rows(const Word* pairs, int64_t ld, int64_t num_pairs, int64_t num_words, Word* rows,
                                      int64_t ld_rows) {
    for (int64_t p = 0; p < num_pairs; ++p) {
      for (int64_t k = 0; k < num_words; k += 8) {  // E has whole lines of 16 words
        Word* const to = rows + 2 * p * ld_rows + k;
        split_pairs(pairs + p * ld + 2 * k, to, to + ld_rows);
      }
    }
  }

  template <bool kBf16>
  R1FAST_NATIVE static void dbias_rows(const HeadView& e, const float* x, float* dbias, bool accumulate, int64_t v) {
    const Word* const row = e.words + v / (kBf16 ? 2 : 1) * e.ld;
    Lanes low = zeros(), high = low;
    for (int64_t t = 0; t < e.num_rows; t += kLanes) {
      const Mask mask = column_mask(t, e.num_rows);
      const Lanes scale = load_lanes(x + t, mask), words = load_lanes(row + t, mask);
      if (kBf16) {
        Lanes bottom, top;
        halves(as_words(words), bottom, top);
        low = times_plus(bottom, scale, low);
        high = times_plus(top, scale, high);
      } else {
        low = times_plus(words, scale, low);
      }
    }
    float lanes[2][kLanes];
    store_lanes(lanes[0], low);
    store_lanes(lanes[1], high);
    for (int i = 0; i < (kBf16 ? 2 : 1) && v + i < e.vocab_size; ++i) {
      float sum = 0;
      for (float lane : lanes[i]) sum += lane;
      dbias[v + i] = (accumulate ? dbias[v + i] : 0.0f) + sum;
    }
  }

  template <bool kBf16>
  R1FAST_NATIVE static void affine_words(Word* __restrict words, const float* __restrict a, const float* __restrict b,
                                  int64_t num_rows) {
    for (int64_t t = 0; t < num_rows; ++t) {
      if (kBf16) {
        const uint32_t bits = bits_of(words[t]);
        const uint32_t low = bf16_bits(affine_in_log(float_of(bits << 16), a[t], b[t]));
        const uint32_t high = bf16_bits(affine_in_log(float_of(bits & 0xffff0000u), a[t], b[t]));
        words[t] = float_of(low | high << 16);
      } else {
        words[t] = affine_in_log(words[t], a[t], b[t]);
      }
    }
  }
};
