// Of decoder_rows.hpp, for each level: the rows of rows.hpp.
struct RowKernels {
  template <class T>
  R1FAST_NATIVE static void norm_rows(const T* x, int64_t ld_x, const T* weight, float eps, int64_t dim, T* y, int64_t ld_y,
                               int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) norm_row(x + i * ld_x, weight, eps, dim, y + i * ld_y);
  }

  template <class T>
  R1FAST_NATIVE static void make_heads(const HeadsCall<T>& call, int64_t num_kv_heads, int64_t dim, int64_t begin, int64_t end,
                                T* k_row) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const rotation = call.rotations + call.positions[i] * 2 * dim;
      for (int64_t h = 0; h < call.num_heads + num_kv_heads; ++h) {
        const bool is_key = h >= call.num_heads;
        const T* from = call.qkv + i * call.ld + h * dim;
        T* const to = is_key ? k_row + ((i - begin) * num_kv_heads + h - call.num_heads) * dim
                             : call.q + (i * call.num_heads + h) * dim;
        T normed[1024];
        if (call.q_norm != nullptr) {
          norm_row(from, is_key ? call.k_norm : call.q_norm, call.eps, dim, normed);
          from = normed;
        }
        rotate_head(from, rotation, dim, to);
      }
    }
  }
};
