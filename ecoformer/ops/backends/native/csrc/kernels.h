// Forward and backward with vectors of W floats, compiled once for each instruction set: the file
// that includes this one opens a namespace, and defines W and MAX_GROUP, the most rows of a matrix
// whose products with a block of tokens its registers hold.
//
// A group is one head of one image. Its tokens are cut into chunks, which depend on nothing but
// their number, and sums go from chunk to chunk in order: threads change no bit of a result.
// Features and projections of a block of tokens lie tokens last, rows of q and v tokens first.

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(W)));
typedef float LooseF __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t LooseI __attribute__((vector_size(4 * W), aligned(4), may_alias));

// Vectors of tokens in a block, and tokens.
constexpr int NV = 2;
constexpr int TB = NV * W;
// About as many tokens has a chunk.
constexpr int64_t kChunkTokens = 512;

static inline F load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
static inline void store(float* p, F x) { *reinterpret_cast<LooseF*>(p) = x; }
static inline I load(const uint32_t* p) { return *reinterpret_cast<const LooseI*>(p); }
static inline void store(uint32_t* p, I x) { *reinterpret_cast<LooseI*>(p) = x; }
static inline F fill(float x) { return F{} + x; }
static inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

static inline F exp2(F x) {
  // Below lies 0, or what is no number and stays none.
  x = x < -126.0f ? fill(-126.0f) : x;
  // The sum has the whole part of x in its last bits.
  const F shifted = x + 12582912.0f;
  const F f = x - (shifted - 12582912.0f);
  F p = f * 1.5353362e-4f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  return (F)((I)p + ((I)shifted << 23));
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// Lanes whose number has bit S come from lane j - S of b; the mirror image has them from b.
template <int S, int... J>
static inline F mix_low(F a, F b, std::integer_sequence<int, J...>) {
  return SHUFFLE(a, b, (J & S ? W + J - S : J)...);
}
template <int S, int... J>
static inline F mix_high(F a, F b, std::integer_sequence<int, J...>) {
  return SHUFFLE(a, b, (J & S ? W + J : J + S)...);
}
using Lanes = std::make_integer_sequence<int, W>;

template <int S = W / 2>
static inline void transpose(F* r) {
  if constexpr (S > 0) {
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const F a = r[i], b = r[i + S];
      r[i] = mix_low<S>(a, b, Lanes());
      r[i + S] = mix_high<S>(a, b, Lanes());
    }
    transpose<S / 2>(r);
  }
}

// Sums of each of W vectors, as one.
template <int S = W / 2>
static inline F sum_each(F* r) {
  if constexpr (S == 0) {
    return r[0];
  } else {
    for (int i = 0; i < S; ++i)
      r[i] = mix_low<S>(r[i], r[i + S], Lanes()) + mix_high<S>(r[i], r[i + S], Lanes());
    return sum_each<S / 2>(r);
  }
}

static inline float sum(F x) {
  float total = 0;
  for (int j = 0; j < W; ++j) total += x[j];
  return total;
}

// [rows, inner], for products with a block of tokens: cut into groups of rows, columns first.
struct Matrix {
  int rows = 0, inner = 0, group = 4;
  std::vector<float> data;

  Matrix() = default;
  template <class Get>
  Matrix(int64_t rows, int64_t inner, Get get) : rows(rows), inner(inner) {
    for (int size = 4; size <= MAX_GROUP; ++size)
      if (round_up(rows, size) <= round_up(rows, group)) group = size;
    data.assign(round_up(rows, group) * inner, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < inner; ++i)
        data[(r / group * inner + i) * group + r % group] = get(r, i);
  }
};
// What stands behind the rows of a product, since groups are whole.
constexpr int64_t kSpareRows = MAX_GROUP;

template <int R>
struct Products {
  static constexpr int size = R;
  F rows[R];
};

template <int R, class Use>
static inline void multiply_groups(const Matrix& matrix, const float* x, Use&& use) {
  const float* a = matrix.data.data();
  const int rows = matrix.rows, inner = matrix.inner;
  for (int row = 0; row < rows; row += R) {
    Products<R> acc[NV] = {};
    for (int i = 0; i < inner; ++i, a += R) {
      F b[NV];
      for (int n = 0; n < NV; ++n) b[n] = load(x + i * TB + n * W);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < NV; ++n) acc[n].rows[r] += a[r] * b[n];
    }
    for (int n = 0; n < NV; ++n) use(row, n, acc[n]);
  }
}

// Hand the product with x [inner, TB] to ``use(row, n, products)``, some rows at once.
template <class Use>
static inline void multiply(const Matrix& matrix, const float* x, Use&& use) {
  switch (matrix.group) {
    case 4: return multiply_groups<4>(matrix, x, use);
    case 5: return multiply_groups<5>(matrix, x, use);
    case 6: return multiply_groups<6>(matrix, x, use);
#if MAX_GROUP > 6
    case 7: return multiply_groups<7>(matrix, x, use);
    case 8: return multiply_groups<8>(matrix, x, use);
#endif
  }
}

// The hash functions of one head, as products take them.
struct Head {
  Matrix anchors, weight;             // [M, D], [K, M]
  Matrix weight_transposed, away;     // [M, K]; [D + 2, M]: the anchors, 1, their squares
  std::vector<float> squares, means;  // of anchors, of features [M]
  std::vector<float> center, total;   // of anchors: what is subtracted, the sum [D]
  float square_sum;
  // 0, or no number where one of the functions is none.
  float poison;

  Head(const Problem& p, int64_t head, bool is_moved, bool is_backward) {
    const int64_t D = p.q.dim, M = p.num_anchors, K = p.num_bits;
    const float* a = p.anchors + head * M * D;
    const float* w = p.weight + head * K * M;
    const float* mean = p.kernel_mean + head * M;
    center.assign(round_up(D, W), 0.0f);
    total.assign(round_up(D, W), 0.0f);
    if (is_moved)
      for (int64_t d = 0; d < D; ++d) {
        double difference = 0;
        for (int64_t m = 0; m < M; ++m) difference += a[m * D + d] - a[d];
        center[d] = a[d] + float(difference / M);
      }
    const auto get = [&](int64_t m, int64_t d) { return a[m * D + d] - center[d]; };
    anchors = Matrix(M, D, get);
    weight = Matrix(K, M, [&](int64_t k, int64_t m) { return w[k * M + m]; });
    squares.assign(M + kSpareRows, 0.0f);
    means.assign(M + kSpareRows, 0.0f);
    square_sum = poison = 0;
    for (int64_t m = 0; m < M; ++m) {
      float square = 0;
      for (int64_t d = 0; d < D; ++d) {
        square += get(m, d) * get(m, d);
        total[d] += get(m, d);
      }
      squares[m] = square;
      square_sum += square;
      means[m] = mean[m];
      poison += mean[m] * 0 + square * 0;
    }
    for (int64_t i = 0; i < K * M; ++i) poison += w[i] * 0;
    if (!is_backward) return;
    weight_transposed = Matrix(M, K, [&](int64_t m, int64_t k) { return w[k * M + m]; });
    away = Matrix(D + 2, M, [&](int64_t d, int64_t m) {
      return d < D ? get(m, d) : d == D ? 1.0f : squares[m];
    });
  }
};

// Sizes, padded ones among them, and how codes are cut.
struct Layout {
  int64_t D, Dv, K, M, DP, DvP;
  Digits digits;

  explicit Layout(const Problem& p)
      : D(p.q.dim),
        Dv(p.v.dim),
        K(p.num_bits),
        M(p.num_anchors),
        DP(round_up(D, W)),
        DvP(round_up(Dv, W)),
        digits(K, Dv) {}
};

static inline int64_t num_words(const Layout& s) { return (s.K + 31) / 32; }

// Rows of all digits: sums over a digit's bits, each added or subtracted.
struct Table {
  Array<float> rows;     // [digits.num_rows, DvP]
  Array<float> weights;  // [digits.num_rows]

  Table() = default;
  // Of sums [K, Dv] and [K]; what all tokens add goes to the first digit.
  Table(const Layout& s, const float* sums, int64_t stride, const float* weight_sums,
        int64_t weight_stride, const float* bias, float c)
      : rows(s.digits.num_rows * s.DvP, true), weights(s.digits.num_rows, true) {
    for (int p = 0; p < s.digits.count(); ++p) {
      float* first = rows + s.digits.offset[p] * s.DvP;
      float* weight = weights + s.digits.offset[p];
      const auto add_row = [&](float* target, const float* row, int64_t k, float sign) {
        for (int64_t d = 0; d < s.Dv; ++d) target[d] = row[d] + sign * sums[k * stride + d];
      };
      if (p == 0 && bias)
        for (int64_t d = 0; d < s.Dv; ++d) first[d] = c * bias[d];
      // Each bit doubles what there is.
      for (int bit = 0; bit < s.digits.width[p]; ++bit) {
        const int64_t k = s.digits.begin[p] + bit, half = int64_t(1) << bit;
        const float weight_sum = weight_sums ? weight_sums[k * weight_stride] : 0.0f;
        for (int64_t i = 0; i < half; ++i) {
          add_row(first + (half + i) * s.DvP, first + i * s.DvP, k, 1.0f);
          add_row(first + i * s.DvP, first + i * s.DvP, k, -1.0f);
          weight[half + i] = weight[i] + weight_sum;
          weight[i] -= weight_sum;
        }
      }
    }
  }
};

// One head of one image on its way through a pass.
struct Group {
  int64_t image, head, number;
  int64_t num_tokens;          // that count
  const int32_t* tokens;       // which ones, or null: all
  int64_t chunk_tokens;        // a multiple of TB
  float scale = 0;             // of base 2
  bool is_moved = false, is_skipped = false;
  const Head* functions = nullptr;
  Array<float> partial;        // of each chunk
  Array<uint8_t> digits;       // [digits, padded N]
  Table table, grad_table;
  // Of a backward.
  Array<float> features;       // [blocks, padded M, TB]
  Array<uint32_t> passes;      // [blocks, words, TB]
  Array<float> by_token;       // [4, padded N]: inverse norms, inverse denominators, e, radial
  Matrix grad_codes;           // [K, 2 Dv + 2]
  float share = 0;

  int64_t padded_tokens() const { return round_up(num_tokens, TB); }
  int64_t num_chunks() const {
    return num_tokens ? (num_tokens + chunk_tokens - 1) / chunk_tokens : 0;
  }
  int64_t begin(int64_t chunk) const { return chunk * chunk_tokens; }
  int64_t end(int64_t chunk) const { return std::min(num_tokens, (chunk + 1) * chunk_tokens); }
  int64_t token(int64_t i) const { return tokens ? tokens[i] : i; }
};

template <class T>
static inline void read_row(const Rows& rows, const T* from, float* to) {
  if (rows.strides[3] == 1)
    for (int64_t d = 0; d < rows.dim; ++d) to[d] = static_cast<float>(from[d]);
  else
    for (int64_t d = 0; d < rows.dim; ++d) to[d] = static_cast<float>(from[d * rows.strides[3]]);
}

template <class T>
static void read_rows(const Rows& rows, const Group& g, int64_t begin, int64_t count, float* to,
                      int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    read_row(rows, rows.at<T>(g.image, g.head, g.token(begin + i)), to + i * stride);
}

struct RowBlock {
  const float* data;
  int64_t stride;
};

// A block of rows as floats [TB, padded D]: in their place, or copied into ``scratch``, zeros
// behind the last dim and token.
static inline RowBlock read_block(const Rows& rows, const Group& g, int64_t begin, int64_t count,
                                  float* scratch) {
  if (rows.type == Type::kFloat && rows.strides[3] == 1 && rows.dim % W == 0 && !g.tokens &&
      count == TB)
    return {rows.at<const float>(g.image, g.head, begin), rows.strides[2]};
  const int64_t stride = round_up(rows.dim, W);
  if (count < TB || rows.dim < stride) std::memset(scratch, 0, TB * stride * sizeof(float));
  switch (rows.type) {
    case Type::kFloat: read_rows<const float>(rows, g, begin, count, scratch, stride); break;
    case Type::kBFloat16:
      read_rows<const c10::BFloat16>(rows, g, begin, count, scratch, stride);
      break;
    case Type::kHalf: read_rows<const c10::Half>(rows, g, begin, count, scratch, stride); break;
  }
  return {scratch, stride};
}

// Ask for a block of rows that is read next but one: a core waits for memory where it only adds.
static inline void prefetch_block(const Rows& rows, const Group& g, int64_t begin, int64_t count) {
  if (rows.type != Type::kFloat) return;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows.at<const float>(g.image, g.head, g.token(begin + i));
    for (int64_t d = 0; d < rows.dim; d += 16) __builtin_prefetch(row + d);
  }
}

template <class T>
static inline void write_rows_as(const Rows& rows, const Group& g, int64_t begin, int64_t count,
                                 const float* from, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    T* to = rows.at<T>(g.image, g.head, g.token(begin + i));
    for (int64_t d = 0; d < rows.dim; ++d) to[d] = static_cast<T>(from[i * stride + d]);
  }
}

// The place where a block of rows [TB, padded D] is written, and its way into memory.
class OutBlock {
 public:
  OutBlock(const Rows& rows, const Group& g, int64_t begin, int64_t count, float* scratch)
      : rows_(rows), group_(g), begin_(begin), count_(count) {
    is_direct_ = rows.type == Type::kFloat && rows.dim % W == 0 && !g.tokens && count == TB;
    data = is_direct_ ? rows.at<float>(g.image, g.head, begin) : scratch;
    stride = is_direct_ ? rows.strides[2] : round_up(rows.dim, W);
  }
  void finish() const {
    if (is_direct_) return;
    switch (rows_.type) {
      case Type::kFloat: return write_rows_as<float>(rows_, group_, begin_, count_, data, stride);
      case Type::kBFloat16:
        return write_rows_as<c10::BFloat16>(rows_, group_, begin_, count_, data, stride);
      case Type::kHalf:
        return write_rows_as<c10::Half>(rows_, group_, begin_, count_, data, stride);
    }
  }
  float* data;
  int64_t stride;

 private:
  const Rows& rows_;
  const Group& group_;
  int64_t begin_, count_;
  bool is_direct_;
};

// [TB, D] to [D, TB], whole vectors.
static inline void transpose_in(RowBlock rows, int64_t dim, float* to) {
  for (int n = 0; n < NV; ++n)
    for (int64_t d = 0; d < dim; d += W) {
      F r[W];
      for (int i = 0; i < W; ++i) r[i] = load(rows.data + (n * W + i) * rows.stride + d);
      transpose(r);
      for (int i = 0; i < W; ++i) store(to + (d + i) * TB + n * W, r[i]);
    }
}

static inline void transpose_out(const float* from, int64_t dim, float* to, int64_t stride) {
  for (int n = 0; n < NV; ++n)
    for (int64_t d = 0; d < dim; d += W) {
      F r[W];
      for (int i = 0; i < W; ++i) r[i] = load(from + (d + i) * TB + n * W);
      transpose(r);
      for (int i = 0; i < W; ++i) store(to + (n * W + i) * stride + d, r[i]);
    }
}

// What a thread works in; all of it stays in the first two caches.
struct Workspace {
  Array<float> q_rows, v_rows, grad_rows, out_rows;  // [TB, padded D]
  Array<float> x;         // [padded D, TB], rows as distances take them
  Array<float> features;  // [M + spare, TB], the mean subtracted
  Array<float> inner;     // [2 padded Dv + 2, TB]: g, v, e, 1
  Array<float> grad_y;    // [K + spare, TB]
  Array<float> grad_exponents;  // [M + spare, TB]
  Array<float> away;      // [D + 2 + spare, TB]
  Array<float> buckets, bucket_weights;
  Array<int32_t> bucket_counts;
  float inverse_norms[TB], squares[TB];
  uint32_t words[2][TB], passes[2][TB];

  Workspace(const Layout& s, bool is_backward)
      : q_rows(TB * s.DP),
        v_rows(TB * s.DvP),
        out_rows(TB * std::max(s.DP, s.DvP)),
        x(TB * s.DP),
        features(TB * (s.M + kSpareRows)),
        buckets(s.digits.num_rows * s.DvP),
        bucket_weights(s.digits.num_rows),
        bucket_counts(s.digits.num_rows) {
    if (!is_backward) return;
    grad_rows = Array<float>(TB * s.DvP);
    inner = Array<float>(TB * (2 * s.DvP + 2));
    grad_y = Array<float>(TB * (s.K + kSpareRows));
    grad_exponents = Array<float>(TB * (s.M + kSpareRows));
    away = Array<float>(TB * (std::max(s.DP, s.D + 2) + kSpareRows));
  }
};

static inline float clamp_norm(float norm) { return norm < kMinNorm ? kMinNorm : norm; }

static inline float norm_of(const Problem& p, const Group& g, int64_t i) {
  return clamp_norm(p.norms[g.number * p.num_tokens + g.token(i)]);
}

// From the squared norms of a block, what divides its rows, and their norms after that.
static inline void divide_norms(Workspace& w) {
  for (int i = 0; i < TB; ++i) {
    const float norm = std::sqrt(w.squares[i]);
    w.inverse_norms[i] = 1 / clamp_norm(norm);
    w.squares[i] = norm * w.inverse_norms[i];
  }
}

// Sums of inverse_norm * row [DP] and of squared norms after that, over a chunk.
static void measure_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                          Workspace& w) {
  float* partial = g.partial + chunk * (s.DP + 1);
  std::memset(partial, 0, (s.DP + 1) * sizeof(float));
  F square_sum = {};
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin);
    const RowBlock rows = read_block(p.q, g, begin, count, w.q_rows);
    if (g.is_moved) {
      for (int64_t i = 0; i < count; ++i) {
        const F norm = fill(norm_of(p, g, begin + i));
        for (int64_t d = 0; d < s.DP; d += W) {
          const F x = load(rows.data + i * rows.stride + d) / norm - load(&g.functions->center[d]);
          store(partial + d, load(partial + d) + x);
          square_sum += x * x;
        }
      }
      continue;
    }
    for (int n = 0; n < NV; ++n) {
      F r[W];
      for (int i = 0; i < W; ++i) {
        const float* row = rows.data + (n * W + i) * rows.stride;
        r[i] = load(row) * load(row);
        for (int64_t d = W; d < s.DP; d += W) r[i] += load(row + d) * load(row + d);
      }
      store(w.squares + n * W, sum_each(r));
    }
    divide_norms(w);
    for (int n = 0; n < NV; ++n) {
      const F x = load(w.squares + n * W);
      // A row with an infinite norm is a zero row, as where each is divided by it.
      square_sum += x == x ? x * x : fill(0);
    }
    for (int64_t d = 0; d < s.DP; d += W) {
      F total[2] = {};
      for (int i = 0; i < TB; i += 2)
        for (int j = 0; j < 2; ++j)
          total[j] += w.inverse_norms[i + j] * load(rows.data + (i + j) * rows.stride + d);
      store(partial + d, load(partial + d) + (total[0] + total[1]));
    }
  }
  partial[s.DP] = sum(square_sum);
}

// -1 / (2 mean squared distance), from the sums of all chunks.
static float find_scale(const Layout& s, const Group& g) {
  double square_sum = 0, cross = 0;
  for (int64_t chunk = 0; chunk < g.num_chunks(); ++chunk)
    square_sum += g.partial[chunk * (s.DP + 1) + s.DP];
  for (int64_t d = 0; d < s.D; ++d) {
    double x_sum = 0;
    for (int64_t chunk = 0; chunk < g.num_chunks(); ++chunk)
      x_sum += g.partial[chunk * (s.DP + 1) + d];
    cross += x_sum * g.functions->total[d];
  }
  const double N = std::max<int64_t>(1, g.num_tokens), M = s.M;
  const double bandwidth = square_sum / N + g.functions->square_sum / M - 2 * cross / (N * M);
  // sqrt of the smallest normal float; what is no number stays none.
  const double least = 1.0842021724855044e-19;
  return float(-0.5 / (bandwidth < least ? least : bandwidth));
}

// Replace transposed rows by unit rows minus the center. Divided, not multiplied: a row that became
// an anchor is at no distance.
static void move_block(const Problem& p, const Layout& s, const Group& g, int64_t begin,
                       int64_t count, Workspace& w) {
  float norms[TB];
  for (int i = 0; i < TB; ++i) {
    norms[i] = i < count ? norm_of(p, g, begin + i) : 1.0f;
    w.inverse_norms[i] = 1 / norms[i];
  }
  for (int64_t d = 0; d < s.D; ++d)
    for (int n = 0; n < NV; ++n) {
      float* x = w.x + d * TB + n * W;
      store(x, load(x) / load(norms + n * W) - g.functions->center[d]);
    }
}

// A row with an infinite norm counts as 0; products with its values would overflow.
static inline void zero_rows(const Layout& s, Workspace& w) {
  bool is_any = false;
  for (int i = 0; i < TB; ++i) is_any |= w.inverse_norms[i] == 0;
  if (!is_any) return;
  for (int64_t d = 0; d < s.D; ++d)
    for (int n = 0; n < NV; ++n) {
      float* x = w.x + d * TB + n * W;
      store(x, load(w.inverse_norms + n * W) == 0 ? load(x) * 0 : load(x));
    }
}

// Make unit rows in w.x [D, TB], features in w.features, and the bits of codes in w.words; of a
// backward also features as they are, and which bits a gradient passes.
static void encode_block(const Problem& p, const Layout& s, const Group& g, int64_t begin,
                         int64_t count, Workspace& w, float* raw_features = nullptr) {
  const Head& f = *g.functions;
  transpose_in(read_block(p.q, g, begin, count, w.q_rows), s.DP, w.x);
  if (g.is_moved) move_block(p, s, g, begin, count, w);
  F square[NV] = {};
  for (int64_t d = 0; d < s.D; ++d)
    for (int n = 0; n < NV; ++n) {
      const F x = load(w.x + d * TB + n * W);
      square[n] += x * x;
    }
  for (int n = 0; n < NV; ++n) store(w.squares + n * W, square[n]);
  if (!g.is_moved) {
    divide_norms(w);
    for (int n = 0; n < NV; ++n) {
      const F x = load(w.squares + n * W);
      store(w.squares + n * W, x == x ? x * x : fill(0));
    }
    zero_rows(s, w);
  }
  F factor[NV], addend[NV];
  for (int n = 0; n < NV; ++n) {
    factor[n] = (g.is_moved ? fill(1) : load(w.inverse_norms + n * W)) * (-2 * g.scale);
    addend[n] = load(w.squares + n * W) * g.scale;
  }
  const float *squares = f.squares.data(), *means = f.means.data();
  const float scale = g.scale;
  float* const features = w.features;
  multiply(f.anchors, w.x, [=](int m, int n, const auto& products) {
    for (int r = 0; r < products.size; ++r, ++m) {
      const F exponent = products.rows[r] * factor[n] + (squares[m] * scale + addend[n]);
      const F feature = exp2(exponent);
      if (raw_features) store(raw_features + m * TB + n * W, feature);
      store(features + m * TB + n * W, feature - means[m]);
    }
  });
  for (int word = 0; word < num_words(s); ++word)
    for (int n = 0; n < NV; ++n) {
      store(w.words[word] + n * W, I{});
      if (raw_features) store(w.passes[word] + n * W, I{});
    }
  multiply(f.weight, features, [&](int k, int n, const auto& products) {
    // The rows of a group may lie in two words; those behind the last bit are in none.
    const int end = std::min<int>(s.K, k + products.size);
    for (int word = k / 32; word * 32 < end; ++word) {
      I bits = {}, passes = {};
      for (int r = 0; r < products.size; ++r) {
        const int place = k + r - word * 32;
        const int32_t bit = place >= 0 && place < 32 && k + r < end ? int32_t(1u << place) : 0;
        const F y = products.rows[r];
        bits |= (y > 0.0f) & bit;
        if (raw_features) passes |= (y < 1.0f) & (y > -1.0f) & bit;
      }
      store(w.words[word] + n * W, load(w.words[word] + n * W) | bits);
      if (raw_features) store(w.passes[word] + n * W, load(w.passes[word] + n * W) | passes);
    }
  });
  for (int i = 0; i < s.digits.count(); ++i) {
    const int shift = s.digits.begin[i] & 31, mask = (1 << s.digits.width[i]) - 1;
    uint8_t* to = g.digits + i * g.padded_tokens() + begin;
    for (int n = 0; n < NV; ++n) {
      const I word = load(w.words[s.digits.begin[i] >> 5] + n * W);
      const Bytes bytes = __builtin_convertvector((word >> shift) & mask, Bytes);
      std::memcpy(to + n * W, &bytes, W);
    }
  }
}

// Call with the number of vectors in a padded row as a constant, 0 where it is none of these.
template <class Call>
static inline void with_vectors(int64_t padded_dim, Call&& call) {
  switch (padded_dim / W) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
    case 4: return call(std::integral_constant<int, 4>());
    case 8: return call(std::integral_constant<int, 8>());
    default: return call(std::integral_constant<int, 0>());
  }
}

// Add each row to the bucket of each of its digits.
template <int kVectors>
static inline void fill_buckets(const Layout& s, const Group& g, int64_t begin, int64_t count,
                                RowBlock rows, float* buckets) {
  const int64_t dim = kVectors ? kVectors * W : s.DvP, stride = g.padded_tokens();
  const int num_digits = s.digits.count();
  const int* offset = s.digits.offset.data();
  const uint8_t* digit = g.digits + begin;
  for (int64_t i = 0; i < count; ++i, ++digit) {
    const float* row = rows.data + i * rows.stride;
    for (int p = 0; p < num_digits; ++p) {
      float* bucket = buckets + (offset[p] + digit[p * stride]) * dim;
      for (int64_t d = 0; d < dim; d += W) store(bucket + d, load(bucket + d) + load(row + d));
    }
  }
}

// Sums of h^T [row, weight] and of rows, from buckets, which it uses up: [K, DvP] and [K], then
// [DvP].
template <class T>
static void sum_buckets(const Layout& s, float* buckets, T* weights, float* sums,
                        float* weight_sums, float* row_sum) {
  for (int p = 0; p < s.digits.count(); ++p) {
    float* first = buckets + s.digits.offset[p] * s.DvP;
    T* weight = weights + s.digits.offset[p];
    // The highest bit is set in the second half; then the halves count as one.
    for (int bit = s.digits.width[p] - 1; bit >= 0; --bit) {
      const int64_t k = s.digits.begin[p] + bit, half = int64_t(1) << bit;
      for (int64_t d = 0; d < s.DvP; d += W) {
        F total = {};
        for (int64_t i = 0; i < half; ++i) {
          const F low = load(first + i * s.DvP + d), high = load(first + (half + i) * s.DvP + d);
          total += high - low;
          store(first + i * s.DvP + d, low + high);
        }
        store(sums + k * s.DvP + d, total);
      }
      T total = 0;
      for (int64_t i = 0; i < half; ++i) {
        total += weight[half + i] - weight[i];
        weight[i] += weight[half + i];
      }
      weight_sums[k] = float(total);
    }
    if (p == 0) std::memcpy(row_sum, first, s.DvP * sizeof(float));
  }
}

static int64_t partial_size(const Layout& s) { return (s.K + 1) * s.DvP + s.K; }

static void sum_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                      Workspace& w) {
  std::memset(w.buckets, 0, s.digits.num_rows * s.DvP * sizeof(float));
  std::memset(w.bucket_counts, 0, s.digits.num_rows * sizeof(int32_t));
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin);
    prefetch_block(p.v, g, begin, count);
    encode_block(p, s, g, begin, count, w);
    const RowBlock v = read_block(p.v, g, begin, count, w.v_rows);
    with_vectors(s.DvP, [&](auto vectors) {
      fill_buckets<vectors.value>(s, g, begin, count, v, w.buckets);
    });
    for (int digit = 0; digit < s.digits.count(); ++digit) {
      const uint8_t* value = g.digits + digit * g.padded_tokens() + begin;
      int32_t* counts = w.bucket_counts + s.digits.offset[digit];
      for (int64_t i = 0; i < count; ++i) ++counts[value[i]];
    }
  }
  float* partial = g.partial + chunk * partial_size(s);
  sum_buckets<int32_t>(s, w.buckets, w.bucket_counts, partial, partial + (s.K + 1) * s.DvP,
                       partial + s.K * s.DvP);
}

// The first chunk's sums become those of all.
static void gather_chunks(const Layout& s, const Group& g) {
  for (int64_t chunk = 1; chunk < g.num_chunks(); ++chunk)
    for (int64_t i = 0; i < partial_size(s); ++i)
      g.partial[i] += g.partial[chunk * partial_size(s) + i];
}

static void write_sums(const Problem& p, const Layout& s, const Group& g) {
  float* sums = p.sums + g.number * (s.K + 1) * (s.Dv + 1);
  const float* weight_sums = g.partial + (s.K + 1) * s.DvP;
  for (int64_t k = 0; k <= s.K; ++k) {
    if (k == s.K && !p.is_normalized) break;
    for (int64_t d = 0; d < s.Dv; ++d) sums[k * (s.Dv + 1) + d] = g.partial[k * s.DvP + d];
    if (k < s.K) sums[k * (s.Dv + 1) + s.Dv] = weight_sums[k];
  }
}

static void make_table(const Problem& p, const Layout& s, Group& g) {
  const float* sums = p.sums + g.number * (s.K + 1) * (s.Dv + 1);
  const float* bias = p.is_normalized ? sums + s.K * (s.Dv + 1) : nullptr;
  g.table = Table(s, sums, s.Dv + 1, sums + s.Dv, s.Dv + 1, bias, float(s.K + 1));
}

static inline void find_inverse_denominators(const Layout& s, const Group& g, int64_t begin,
                                             float* inverse) {
  const float bias = float(s.K + 1) * float(g.num_tokens) + g.functions->poison + 0 * g.scale;
  for (int i = 0; i < TB; ++i) inverse[i] = bias;
  for (int p = 0; p < s.digits.count(); ++p) {
    const uint8_t* digit = g.digits + p * g.padded_tokens() + begin;
    const float* weights = g.table.weights + s.digits.offset[p];
    for (int i = 0; i < TB; ++i) inverse[i] += weights[digit[i]];
  }
  for (int n = 0; n < NV; ++n) store(inverse + n * W, 1.0f / load(inverse + n * W));
}

// factors * (c * rows + what the table has for their digits); no rows count as 0.
template <int kVectors>
static inline void look_up(const Layout& s, const Group& g, int64_t begin, int64_t count,
                           const Table& table, const RowBlock* rows, float c, const float* factors,
                           float* out, int64_t out_stride) {
  const int64_t dim = kVectors ? kVectors * W : s.DvP, stride = g.padded_tokens();
  const int num_digits = s.digits.count();
  const int* offset = s.digits.offset.data();
  const float* const table_rows = table.rows;
  const uint8_t* digit = g.digits + begin;
  for (int64_t i = 0; i < count; ++i, ++digit) {
    constexpr int kStep = kVectors ? std::min(kVectors, 4) : 1;
    for (int64_t d = 0; d < dim; d += kStep * W) {
      F acc[kStep] = {};
      if (rows)
        for (int j = 0; j < kStep; ++j)
          acc[j] = c * load(rows->data + i * rows->stride + d + j * W);
      for (int p = 0; p < num_digits; ++p) {
        const float* row = table_rows + (offset[p] + digit[p * stride]) * dim + d;
        for (int j = 0; j < kStep; ++j) acc[j] += load(row + j * W);
      }
      for (int j = 0; j < kStep; ++j)
        store(out + i * out_stride + d + j * W, factors ? acc[j] * factors[i] : acc[j]);
    }
  }
}

static void write_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                        Workspace& w) {
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin);
    float inverse[TB];
    find_inverse_denominators(s, g, begin, inverse);
    RowBlock v;
    if (!p.is_normalized) v = read_block(p.v, g, begin, count, w.v_rows);
    const OutBlock out(p.out, g, begin, count, w.out_rows);
    with_vectors(s.DvP, [&](auto vectors) {
      look_up<vectors.value>(s, g, begin, count, g.table, p.is_normalized ? nullptr : &v,
                             float(s.K + 1), inverse, out.data, out.stride);
    });
    out.finish();
  }
}

static inline float* token_values(const Group& g, int which) {
  return g.by_token + which * g.padded_tokens();
}
enum { kInverseNorm, kInverseDenominator, kE, kRadial };

// g and e are the gradients of numerators and denominators. Encode again, find e, and sum both.
static void sum_grads_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                            Workspace& w) {
  std::memset(w.buckets, 0, s.digits.num_rows * s.DvP * sizeof(float));
  std::memset(w.bucket_weights, 0, s.digits.num_rows * sizeof(float));
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin), block = begin / TB;
    encode_block(p, s, g, begin, count, w, g.features + block * (s.M + kSpareRows) * TB);
    std::memcpy(g.passes + block * num_words(s) * TB, w.passes, num_words(s) * sizeof w.passes[0]);
    std::memcpy(token_values(g, kInverseNorm) + begin, w.inverse_norms, sizeof w.inverse_norms);
    float* inverse = token_values(g, kInverseDenominator) + begin;
    float* e = token_values(g, kE) + begin;
    find_inverse_denominators(s, g, begin, inverse);
    const RowBlock v = read_block(p.v, g, begin, count, w.v_rows);
    const RowBlock grad = read_block(p.grad, g, begin, count, w.grad_rows);
    with_vectors(s.DvP, [&](auto vectors) {
      look_up<vectors.value>(s, g, begin, count, g.table, p.is_normalized ? nullptr : &v,
                             float(s.K + 1), inverse, w.out_rows, s.DvP);
    });
    // The rows g take the place of the outputs.
    for (int n = 0; n < NV; ++n) {
      F r[W];
      for (int i = 0; i < W; ++i) {
        const int64_t token = n * W + i;
        r[i] = F{};
        if (token >= count) continue;
        float* out = w.out_rows + token * s.DvP;
        const float* row = grad.data + token * grad.stride;
        for (int64_t d = 0; d < s.DvP; d += W) {
          const F scaled = load(row + d) * inverse[token];
          r[i] -= load(out + d) * scaled;
          store(out + d, scaled);
        }
      }
      store(e + n * W, sum_each(r));
    }
    with_vectors(s.DvP, [&](auto vectors) {
      fill_buckets<vectors.value>(s, g, begin, count, {w.out_rows, s.DvP}, w.buckets);
    });
    for (int digit = 0; digit < s.digits.count(); ++digit) {
      const uint8_t* value = g.digits + digit * g.padded_tokens() + begin;
      float* weights = w.bucket_weights + s.digits.offset[digit];
      for (int64_t i = 0; i < count; ++i) weights[value[i]] += e[i];
    }
  }
  float* partial = g.partial + chunk * partial_size(s);
  sum_buckets<float>(s, w.buckets, w.bucket_weights, partial, partial + (s.K + 1) * s.DvP,
                     partial + s.K * s.DvP);
}

// What gradients of codes are products with: a code is in its own numerator and denominator, and
// in the sums that all share.
static void make_grad_functions(const Problem& p, const Layout& s, Group& g) {
  const float* sums = p.sums + g.number * (s.K + 1) * (s.Dv + 1);
  const float* grad_sums = g.partial;
  const float* e_sums = g.partial + (s.K + 1) * s.DvP;
  g.grad_codes = Matrix(s.K, 2 * s.Dv + 2, [&](int64_t k, int64_t i) {
    if (i < s.Dv) return sums[k * (s.Dv + 1) + i];
    if (i < 2 * s.Dv) return grad_sums[k * s.DvP + i - s.Dv];
    return i == 2 * s.Dv ? sums[k * (s.Dv + 1) + s.Dv] : e_sums[k];
  });
  const float* bias = p.is_normalized ? grad_sums + s.K * s.DvP : nullptr;
  g.grad_table = Table(s, grad_sums, s.DvP, nullptr, 0, bias, float(s.K + 1));
}

static void write_grads_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                              Workspace& w) {
  const Head& f = *g.functions;
  // Of base e, as the gradient of the scale.
  const float scale = p.scale[g.number];
  F scale_grad = {};
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin), block = begin / TB;
    const float* inverse = token_values(g, kInverseDenominator) + begin;
    const RowBlock v = read_block(p.v, g, begin, count, w.v_rows);
    const RowBlock grad = read_block(p.grad, g, begin, count, w.grad_rows);

    float c_inverse[TB];
    for (int i = 0; i < TB; ++i) c_inverse[i] = float(s.K + 1) * inverse[i];
    const OutBlock grad_v(p.grad_v, g, begin, count, w.out_rows);
    with_vectors(s.DvP, [&](auto vectors) {
      look_up<vectors.value>(s, g, begin, count, g.grad_table, nullptr, 0, nullptr, grad_v.data,
                             grad_v.stride);
    });
    if (!p.is_normalized)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < s.DvP; d += W) {
          float* to = grad_v.data + i * grad_v.stride + d;
          store(to, load(to) + c_inverse[i] * load(grad.data + i * grad.stride + d));
        }
    grad_v.finish();

    // [g, v, e, 1], without the dims that are padding.
    transpose_in(grad, s.DvP, w.inner);
    for (int64_t d = 0; d < s.Dv; ++d)
      for (int n = 0; n < NV; ++n) {
        float* to = w.inner + d * TB + n * W;
        store(to, load(to) * load(inverse + n * W));
      }
    transpose_in(v, s.DvP, w.inner + s.Dv * TB);
    std::memcpy(w.inner + 2 * s.Dv * TB, token_values(g, kE) + begin, TB * sizeof(float));
    for (int i = 0; i < TB; ++i) w.inner[(2 * s.Dv + 1) * TB + i] = i < count ? 1.0f : 0.0f;

    const uint32_t* passes = g.passes + block * num_words(s) * TB;
    float *const grad_y = w.grad_y, *const grad_exponents = w.grad_exponents, *const aways = w.away;
    const int K = s.K;
    multiply(g.grad_codes, w.inner, [=](int k, int n, const auto& products) {
      for (int r = 0; r < products.size && k < K; ++r, ++k) {
        const I bit = load(passes + (k >> 5) * TB + n * W) & int32_t(1u << (k & 31));
        store(grad_y + k * TB + n * W, bit != 0 ? products.rows[r] : fill(0));
      }
    });
    const float* features = g.features + block * (s.M + kSpareRows) * TB;
    multiply(f.weight_transposed, grad_y, [=](int m, int n, const auto& products) {
      for (int r = 0; r < products.size; ++r, ++m)
        store(grad_exponents + m * TB + n * W,
              products.rows[r] * load(features + m * TB + n * W));
    });
    multiply(f.away, grad_exponents, [=](int d, int n, const auto& products) {
      for (int r = 0; r < products.size; ++r, ++d) store(aways + d * TB + n * W, products.rows[r]);
    });

    // Rows once more, as distances take them; their unit rows are x + center.
    transpose_in(read_block(p.q, g, begin, count, w.q_rows), s.DP, w.x);
    if (g.is_moved) move_block(p, s, g, begin, count, w);
    for (int n = 0; n < NV; ++n) {
      const F inverse_norm = load(token_values(g, kInverseNorm) + begin + n * W);
      const F along = load(w.away + s.D * TB + n * W);
      const F squares = load(w.away + (s.D + 1) * TB + n * W);
      F x_squared = {}, cross = {}, radial = {}, share_radial = {};
      const F x_factor = g.is_moved ? fill(1) : inverse_norm;
      for (int64_t d = 0; d < s.D; ++d) {
        const F x = load(w.x + d * TB + n * W) * x_factor, x_unit = x + f.center[d];
        const F away = load(w.away + d * TB + n * W);
        x_squared += x * x;
        cross += x * away;
        radial += x_unit * (along * x - away);
        share_radial += x_unit * (float(s.M) * x - f.total[d]);
      }
      // Rows that are too short for their norm are not unit ones.
      const I is_unit = inverse_norm * kMinNorm < 1.0f;
      radial = is_unit ? radial : fill(0);
      store(token_values(g, kRadial) + begin + n * W, is_unit ? share_radial : fill(0));
      scale_grad += along * x_squared + squares - 2.0f * cross;
      const F factor = 2 * scale * inverse_norm;
      for (int64_t d = 0; d < s.D; ++d) {
        const F x = load(w.x + d * TB + n * W) * x_factor, x_unit = x + f.center[d];
        const F away = load(w.away + d * TB + n * W);
        store(w.away + d * TB + n * W, factor * (along * x - away - x_unit * radial));
      }
    }
    const OutBlock grad_q(p.unfinished, g, begin, count, w.q_rows);
    transpose_out(w.away, s.DP, grad_q.data, grad_q.stride);
    grad_q.finish();
  }
  // What follows the last token is 0 in every sum.
  g.partial[chunk] = sum(scale_grad);
}

// Every distance has the same share in the scale, -1 / (2 s).
static void find_share(const Problem& p, const Layout& s, Group& g) {
  double scale_grad = 0;
  for (int64_t chunk = 0; chunk < g.num_chunks(); ++chunk) scale_grad += g.partial[chunk];
  const double scale = p.scale[g.number];
  g.share = float(2 * scale * scale * scale_grad / (double(std::max<int64_t>(1, g.num_tokens)) * s.M));
}

static void add_share_chunk(const Problem& p, const Layout& s, const Group& g, int64_t chunk,
                            Workspace& w) {
  const Head& f = *g.functions;
  for (int64_t begin = g.begin(chunk); begin < g.end(chunk); begin += TB) {
    const int64_t count = std::min<int64_t>(TB, g.end(chunk) - begin);
    const RowBlock q = read_block(p.q, g, begin, count, w.q_rows);
    const RowBlock unfinished = read_block(p.unfinished, g, begin, count, w.out_rows);
    const OutBlock grad_q(p.grad_q, g, begin, count, w.out_rows);
    const float* inverse_norms = token_values(g, kInverseNorm) + begin;
    const float* radials = token_values(g, kRadial) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float factor = 2 * g.share * inverse_norms[i];
      const F norm = fill(g.is_moved ? norm_of(p, g, begin + i) : 1.0f);
      for (int64_t d = 0; d < s.DP; d += W) {
        const F row = load(q.data + i * q.stride + d), center = load(&f.center[d]);
        const F x = g.is_moved ? row / norm - center : row * inverse_norms[i];
        const F x_unit = x + center;
        const F from_share = float(s.M) * x - load(&f.total[d]) - x_unit * radials[i];
        store(grad_q.data + i * grad_q.stride + d,
              load(unfinished.data + i * unfinished.stride + d) + factor * from_share);
      }
    }
    grad_q.finish();
  }
}

struct Step {
  bool is_by_chunk;
  void (*run)(const Problem&, const Layout&, Group&, int64_t chunk, Workspace&);
};

static const Step kForward[] = {
    {false,
     [](const Problem& p, const Layout& s, Group& g, int64_t, Workspace&) {
       g.digits = Array<uint8_t>(s.digits.count() * g.padded_tokens());
       const int64_t size = std::max(s.DP + 1, partial_size(s));
       g.partial = Array<float>(std::max<int64_t>(1, g.num_chunks()) * size, true);
     }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { measure_chunk(p, s, g, chunk, w); }},
    {false,
     [](const Problem& p, const Layout& s, Group& g, int64_t, Workspace&) {
       const float scale = p.scale[g.number] = find_scale(s, g);
       g.scale = scale * 1.4426950408889634f;
       g.is_skipped = scale < kNarrowScale && !p.norms;
       std::memset(g.partial, 0, partial_size(s) * sizeof(float));
     }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { sum_chunk(p, s, g, chunk, w); }},
    {false,
     [](const Problem& p, const Layout& s, Group& g, int64_t, Workspace&) {
       gather_chunks(s, g);
       write_sums(p, s, g);
       make_table(p, s, g);
     }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { write_chunk(p, s, g, chunk, w); }},
};

static const Step kBackward[] = {
    {false,
     [](const Problem& p, const Layout& s, Group& g, int64_t, Workspace&) {
       g.scale = p.scale[g.number] * 1.4426950408889634f;
       const int64_t num_blocks = g.padded_tokens() / TB;
       g.digits = Array<uint8_t>(s.digits.count() * g.padded_tokens());
       g.partial = Array<float>(std::max<int64_t>(1, g.num_chunks()) * partial_size(s), true);
       g.features = Array<float>(num_blocks * (s.M + kSpareRows) * TB);
       g.passes = Array<uint32_t>(num_blocks * num_words(s) * TB);
       g.by_token = Array<float>(4 * g.padded_tokens());
       make_table(p, s, g);
     }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { sum_grads_chunk(p, s, g, chunk, w); }},
    {false,
     [](const Problem& p, const Layout& s, Group& g, int64_t, Workspace&) {
       gather_chunks(s, g);
       make_grad_functions(p, s, g);
     }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { write_grads_chunk(p, s, g, chunk, w); }},
    {false, [](const Problem& p, const Layout& s, Group& g, int64_t,
               Workspace&) { find_share(p, s, g); }},
    {true, [](const Problem& p, const Layout& s, Group& g, int64_t chunk,
              Workspace& w) { add_share_chunk(p, s, g, chunk, w); }},
};

// Run all steps of some groups. Where there are enough, a thread takes each through all steps, while
// its rows are in the cache; few are shared, step by step.
template <int kSteps>
static void run_steps(const Problem& p, const Layout& s, const Step (&steps)[kSteps],
                      std::vector<Group>& groups, bool is_backward) {
  const int64_t threads = num_threads(), size = groups.size();
  // Of each thread, made where it is first needed.
  std::vector<std::unique_ptr<Workspace>> spaces(threads);
  const auto space = [&](int64_t worker) -> Workspace& {
    if (!spaces[worker]) spaces[worker] = std::make_unique<Workspace>(s, is_backward);
    return *spaces[worker];
  };
  if (threads == 1 || size % threads == 0 || size >= 4 * threads) {
    run_tasks(size, [&](int64_t worker, int64_t i) {
      Workspace& w = space(worker);
      Group g = std::move(groups[i]);
      for (const Step& step : steps)
        for (int64_t chunk = 0; chunk < (step.is_by_chunk ? g.num_chunks() : 1); ++chunk)
          if (!g.is_skipped) step.run(p, s, g, chunk, w);
    });
    return;
  }
  std::vector<std::pair<Group*, int64_t>> chunks;
  for (Group& g : groups)
    for (int64_t chunk = 0; chunk < g.num_chunks(); ++chunk) chunks.emplace_back(&g, chunk);
  for (const Step& step : steps)
    run_tasks(step.is_by_chunk ? chunks.size() : size, [&](int64_t worker, int64_t i) {
      Group& g = step.is_by_chunk ? *chunks[i].first : groups[i];
      if (g.is_skipped) return;
      step.run(p, s, g, step.is_by_chunk ? chunks[i].second : 0, space(worker));
    });
}

void run(const Problem& p, bool is_backward, bool is_moved, const std::vector<int64_t>& numbers) {
  const Layout s(p);
  std::vector<Head> heads;
  for (int64_t head = 0; head < p.num_heads; ++head) heads.emplace_back(p, head, is_moved, is_backward);
  std::vector<std::vector<int32_t>> tokens(p.key_mask ? p.num_images : 0);
  for (size_t image = 0; image < tokens.size(); ++image)
    for (int64_t i = 0; i < p.num_tokens; ++i)
      if (p.key_mask[image * p.num_tokens + i]) tokens[image].push_back(i);
  std::vector<Group> groups;
  for (const int64_t number : numbers) {
    Group g;
    g.number = number;
    g.image = number / p.num_heads;
    g.head = number % p.num_heads;
    g.tokens = p.key_mask ? tokens[g.image].data() : nullptr;
    g.num_tokens = p.key_mask ? tokens[g.image].size() : p.num_tokens;
    const int64_t num_chunks = std::max<int64_t>(1, g.num_tokens / kChunkTokens);
    g.chunk_tokens = round_up((g.num_tokens + num_chunks - 1) / num_chunks, TB);
    g.is_moved = is_moved;
    g.functions = &heads[g.head];
    groups.push_back(std::move(g));
  }
  if (is_backward)
    run_steps(p, s, kBackward, groups, true);
  else
    run_steps(p, s, kForward, groups, false);
}
