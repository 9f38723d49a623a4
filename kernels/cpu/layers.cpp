// The layers of a convolutional VAE for which PyTorch's own CPU kernels are far from the machine's peak.
//
// Tensors are float32 in channels_last: [N, H, W, C] in memory, without gaps; BatchNorm's images can be bfloat16.
// Every sum has a fixed order for a number of threads, so equal inputs give equal bits. Channels are padded to whole
// vectors where that helps, so any number of them is allowed. kernels/cpu/convolution.py and batch_norm.py hold the
// formulas and call these.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, PIXELS = 8;  // 32 registers
#else
constexpr int LANES = 8, PIXELS = 4;  // 16 registers
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

inline float sum_of_lanes(Vector v) {
  typedef float Four __attribute__((vector_size(16)));
  float lanes[LANES];
  store(lanes, v);
  Four sum = {};
  for (int l = 0; l < LANES; l += 4) {
    Four four;
    __builtin_memcpy(&four, lanes + l, sizeof four);
    sum += four;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Call f(part, first, last) for `parts` equal ranges of 0 to count. Which thread runs a part changes nothing.
template <typename F>
void in_parts(int parts, int64_t count, F f) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; part++) f(part, count * part / parts, count * (part + 1) / parts);
}

// How many rows of `floats` numbers are worked on at once: they stay in the L2 cache.
inline int64_t rows_of_band(int64_t height, int64_t floats) {
  return std::clamp<int64_t>((128 << 10) / (4 * floats), 1, height);
}

// Some neighbouring rows of an image, with zeros around it: a pixel before each row, `extra` - 1 after it, and
// channels up to `padded`.
class Band {
 public:
  Band(int64_t height, int64_t width, int64_t channels, int64_t padded, int64_t extra)
      : height_(height), width_(width), channels_(channels), padded_(padded), row_((width + extra) * padded) {}

  int64_t row() const { return row_; }  // floats

  // Copy `rows` rows from row `first`, which may be -1.
  const float* copy(const float* image, int64_t first, int64_t rows) {
    if (int64_t(buffer_.size()) < rows * row_) buffer_.resize(rows * row_);
    for (int64_t i = 0; i < rows; i++) {
      float* to = buffer_.data() + i * row_;
      const int64_t h = first + i;
      if (h < 0 || h >= height_) {
        std::memset(to, 0, row_ * sizeof(float));
        continue;
      }
      const float* from = image + h * width_ * channels_;
      std::memset(to, 0, padded_ * sizeof(float));
      float* inner = to + padded_;
      if (padded_ == channels_) {
        std::memcpy(inner, from, width_ * channels_ * sizeof(float));
      } else {
        for (int64_t w = 0; w < width_; w++) {
          std::memcpy(inner + w * padded_, from + w * channels_, channels_ * sizeof(float));
          std::memset(inner + w * padded_ + channels_, 0, (padded_ - channels_) * sizeof(float));
        }
      }
      float* after = inner + width_ * padded_;
      std::memset(after, 0, (to + row_ - after) * sizeof(float));
    }
    return buffer_.data();
  }

 private:
  int64_t height_, width_, channels_, padded_, row_;
  std::vector<float> buffer_;
};

// --- A 3 x 3 convolution to few channels ---------------------------------------------------------------------
template <int OUT>
void convolve(const float* x, const float* weight, const float* bias, float* y, int64_t images, int64_t height,
              int64_t width, int64_t channels, int threads) {
  const int64_t vectors = divide_up(channels, LANES), padded = vectors * LANES;
  std::vector<float> packed(9 * padded * OUT, 0.0f);  // [9, vectors, OUT, LANES]
  for (int o = 0; o < OUT; o++)
    for (int64_t tap = 0; tap < 9; tap++)
      for (int64_t c = 0; c < channels; c++)
        packed[((tap * vectors + c / LANES) * OUT + o) * LANES + c % LANES] =
            weight[(o * 9 + tap) * channels + c];
  const int64_t extra = 2 + divide_up(width, PIXELS) * PIXELS - width;
  const int64_t band = rows_of_band(height, (width + extra) * padded), bands = divide_up(height, band);
  in_parts(threads, images * bands, [&](int, int64_t first, int64_t last) {
    Band rows(height, width, channels, padded, extra);
    for (int64_t item = first; item < last; item++) {
      const int64_t n = item / bands, top = item % bands * band, count = std::min(band, height - top);
      const float* input = rows.copy(x + n * height * width * channels, top - 1, count + 2);
      for (int64_t h = 0; h < count; h++) {
        for (int64_t w = 0; w < width; w += PIXELS) {
          Vector sums[PIXELS][OUT] = {};
          for (int tap = 0; tap < 9; tap++) {
            const float* pixel = input + (h + tap / 3) * rows.row() + (w + tap % 3) * padded;
            const float* factors = packed.data() + tap * padded * OUT;
            for (int64_t v = 0; v < vectors; v++) {
              for (int o = 0; o < OUT; o++) {
                const Vector factor = load(factors + (v * OUT + o) * LANES);
                for (int p = 0; p < PIXELS; p++) sums[p][o] += load(pixel + p * padded + v * LANES) * factor;
              }
            }
          }
          float* out = y + ((n * height + top + h) * width + w) * OUT;
          for (int p = 0; p < std::min<int64_t>(PIXELS, width - w); p++) {
            for (int o = 0; o < OUT; o++) out[p * OUT + o] = sum_of_lanes(sums[p][o]) + bias[o];
          }
        }
      }
    }
  });
}

// sums[p][q] += grad(i, j, p) * x(i, j, q) over the pixels of a band; q counts vectors. A row is summed first, then
// the band: one long sum would round more.
template <int OUT, int Q>
void add_products(const float* grad, const float* x, int64_t row, int64_t pixel, int64_t height, int64_t width,
                  float* sums, int64_t sums_row) {
  Vector total[OUT][Q] = {};
  for (int64_t i = 0; i < height; i++) {
    const float* from = x + i * row;
    Vector part[OUT][Q] = {};
    for (int64_t j = 0; j < width; j++, grad += OUT, from += pixel) {
      Vector values[Q];
      for (int q = 0; q < Q; q++) values[q] = load(from + q * LANES);
      for (int p = 0; p < OUT; p++)
        for (int q = 0; q < Q; q++) part[p][q] += values[q] * grad[p];
    }
    for (int p = 0; p < OUT; p++)
      for (int q = 0; q < Q; q++) total[p][q] += part[p][q];
  }
  for (int p = 0; p < OUT; p++)
    for (int q = 0; q < Q; q++) {
      float* to = sums + p * sums_row + q * LANES;
      store(to, load(to) + total[p][q]);
    }
}

template <int OUT>
void weight_gradient(const float* grad, const float* x, float* grad_weight, int64_t images, int64_t height,
                     int64_t width, int64_t channels, int threads) {
  const int64_t vectors = divide_up(channels, LANES), padded = vectors * LANES, sums_row = 9 * padded;
  const int64_t band = rows_of_band(height, (width + 2) * padded), bands = divide_up(height, band);
  std::vector<float> sums(OUT * sums_row * threads);
  in_parts(threads, images * bands, [&](int part, int64_t first, int64_t last) {
    Band rows(height, width, channels, padded, 2);
    float* total = sums.data() + OUT * sums_row * part;
    for (int64_t item = first; item < last; item++) {
      const int64_t n = item / bands, top = item % bands * band, count = std::min(band, height - top);
      const float* input = rows.copy(x + n * height * width * channels, top - 1, count + 2);
      const float* g = grad + (n * height + top) * width * OUT;
      for (int tap = 0; tap < 9; tap++)
        for (int64_t v = 0; v < vectors; v += 4) {
          const auto add = vectors - v == 1   ? add_products<OUT, 1>
                           : vectors - v == 2 ? add_products<OUT, 2>
                           : vectors - v == 3 ? add_products<OUT, 3>
                                              : add_products<OUT, 4>;
          add(g, input + tap / 3 * rows.row() + tap % 3 * padded + v * LANES, rows.row(), padded, count, width,
              total + tap * padded + v * LANES, sums_row);
        }
    }
  });
  for (int64_t i = 0; i < OUT * 9; i++)
    for (int64_t c = 0; c < channels; c++) {
      float sum = 0;
      for (int part = 0; part < threads; part++) sum += sums[OUT * sums_row * part + i * padded + c];
      grad_weight[i * channels + c] = sum;
    }
}

// --- BatchNorm and LeakyReLU ---------------------------------------------------------------------------------
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void set(float& to, float value) { to = value; }

// Round to the nearest, to the even one of two; NaN stays NaN.
inline void set(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// Tensors are worked on in rows of whole pixels, of at least ROW numbers if a pixel has fewer: loops over a few
// channels would cost more than what they do.
constexpr int64_t ROW = 256;
constexpr int64_t PIECE = 16;  // rows whose sums are float32; the pieces are added in float64

inline int64_t row_width(int64_t channels) { return channels * divide_up(ROW, channels); }

// One number per channel, repeated for each pixel of a row.
std::vector<float> repeated(const float* values, int64_t channels, int64_t width) {
  std::vector<float> row(width);
  for (int64_t i = 0; i < width; i++) row[i] = values[i % channels];
  return row;
}

inline float leaky(float v, float factor, float slope) { return v > 0 ? factor : factor * slope; }

// Call f(first, count) for each row of the part's `numbers`, of which the last one can be shorter.
template <typename F>
void in_rows(int64_t numbers, int64_t width, int threads, F f) {
  in_parts(threads, divide_up(numbers, width), [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) f(row * width, std::min(width, numbers - row * width));
  });
}

// Two sums per channel over the pixels, by `add(first, count, a, b)`, which adds a row to float32 sums.
template <typename F>
std::vector<double> two_sums(int64_t numbers, int64_t width, int64_t channels, int threads, F add) {
  std::vector<double> sums(2 * width * threads, 0.0);
  in_parts(threads, divide_up(numbers, width * PIECE), [&](int part, int64_t first, int64_t last) {
    double* total = sums.data() + 2 * width * part;
    std::vector<float> piece(2 * width);
    for (int64_t item = first; item < last; item++) {
      std::fill(piece.begin(), piece.end(), 0.0f);
      const int64_t end = std::min((item + 1) * PIECE * width, numbers);
      for (int64_t i = item * PIECE * width; i < end; i += width)
        add(i, std::min(width, end - i), piece.data(), piece.data() + width);
      for (int64_t i = 0; i < 2 * width; i++) total[i] += piece[i];
    }
  });
  std::vector<double> by_channel(2 * channels, 0.0);
  for (int64_t i = 0; i < 2 * width * threads; i++)
    by_channel[i / width % 2 * channels + i % width % channels] += sums[i];
  return by_channel;
}

// y = leaky_relu((x - mean) * scale + shift) of x [pixels, C], by the statistics of its channels. Writes mean [C],
// the unbiased variance [C] and factors [4, C]: scale, shift, 1 / sqrt(variance + eps), and what rounding took from
// mean, which shift contains too.
template <typename T>
void batch_norm(const T* x, const float* weight, const float* bias, T* y, float* factors, float* mean,
                float* variance, int64_t pixels, int64_t channels, double eps, float slope, int threads) {
  const int64_t numbers = pixels * channels, width = row_width(channels);
  // Differences from the first pixel: squares of the values themselves would cancel where a mean is large.
  std::vector<float> pixel(channels);
  for (int64_t c = 0; c < channels; c++) pixel[c] = to_float(x[c]);
  const auto origin = repeated(pixel.data(), channels, width);
  const auto sums = two_sums(numbers, width, channels, threads, [&](int64_t first, int64_t count, float* a, float* b) {
    const T* from = x + first;
    const float* o = origin.data();
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float d = to_float(from[i]) - o[i];
      a[i] += d;
      b[i] += d * d;
    }
  });
  float *scale = factors, *shift = scale + channels, *inverse = shift + channels, *rest = inverse + channels;
  for (int64_t c = 0; c < channels; c++) {
    const double d = sums[c] / pixels, m = pixel[c] + d;
    double var = sums[channels + c] / pixels - d * d;
    if (var < 0) var = 0;  // NaN stays
    const double inv = 1 / std::sqrt(var + eps);
    mean[c] = m;
    rest[c] = m - mean[c];
    scale[c] = weight[c] * inv;
    shift[c] = bias[c] - rest[c] * weight[c] * inv;
    inverse[c] = inv;
    variance[c] = var * pixels / (pixels - 1);
  }
  const auto means = repeated(mean, channels, width), scales = repeated(scale, channels, width),
             shifts = repeated(shift, channels, width);
  in_rows(numbers, width, threads, [&](int64_t first, int64_t count) {
    const T* from = x + first;
    T* to = y + first;
    const float *m = means.data(), *p = scales.data(), *q = shifts.data();
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float v = (to_float(from[i]) - m[i]) * p[i] + q[i];
      set(to[i], leaky(v, v, slope));
    }
  });
}

// The gradients of x [pixels, C], weight and bias from y's, with the factors and the mean of the forward pass.
template <typename T>
void batch_norm_backward(const T* grad, const T* x, const float* factors, const float* mean, T* grad_x,
                         float* grad_weight, float* grad_bias, int64_t pixels, int64_t channels, float slope,
                         int threads) {
  const int64_t numbers = pixels * channels, width = row_width(channels);
  const float *inverse = factors + 2 * channels, *rest = inverse + channels;
  const auto means = repeated(mean, channels, width), scales = repeated(factors, channels, width),
             shifts = repeated(factors + channels, channels, width);
  const float *m = means.data(), *scale = scales.data(), *shift = shifts.data();
  const auto sums = two_sums(numbers, width, channels, threads, [&](int64_t first, int64_t count, float* a, float* b) {
    const T *from = x + first, *g = grad + first;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float d = to_float(from[i]) - m[i];
      const float through = leaky(d * scale[i] + shift[i], to_float(g[i]), slope);
      a[i] += through;
      b[i] += through * d;
    }
  });
  std::vector<float> constant(channels), linear(channels);
  for (int64_t c = 0; c < channels; c++) {
    const double inv = inverse[c], product = sums[channels + c] - sums[c] * rest[c];
    grad_bias[c] = sums[c];
    grad_weight[c] = product * inv;
    linear[c] = product * inv * inv / pixels;
    constant[c] = sums[c] / pixels - rest[c] * linear[c];
  }
  const auto constants = repeated(constant.data(), channels, width), linears = repeated(linear.data(), channels, width);
  in_rows(numbers, width, threads, [&](int64_t first, int64_t count) {
    const T *from = x + first, *g = grad + first;
    T* to = grad_x + first;
    const float *p = constants.data(), *q = linears.data();
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const float d = to_float(from[i]) - m[i];
      const float through = leaky(d * scale[i] + shift[i], to_float(g[i]), slope);
      set(to[i], scale[i] * (through - p[i] - d * q[i]));
    }
  });
}

}  // namespace

extern "C" {

// y [N, H, W, out] = the convolution of x [N, H, W, C] with weight [out, 3, 3, C], padding 1, plus bias [out].
// out is 1 or 3.
void bvae_convolution(const float* x, const float* weight, const float* bias, float* y, int64_t images,
                      int64_t height, int64_t width, int64_t channels, int64_t out, int threads) {
  (out == 1 ? convolve<1> : convolve<3>)(x, weight, bias, y, images, height, width, channels, threads);
}

// The gradient of that weight, [out, 3, 3, C], from y's, [N, H, W, out].
void bvae_weight_gradient(const float* grad, const float* x, float* grad_weight, int64_t images, int64_t height,
                          int64_t width, int64_t channels, int64_t out, int threads) {
  (out == 1 ? weight_gradient<1> : weight_gradient<3>)(grad, x, grad_weight, images, height, width, channels,
                                                       threads);
}

// See batch_norm above. x and y are bfloat16 or float32.
void bvae_batch_norm(const void* x, const float* weight, const float* bias, void* y, float* factors, float* mean,
                     float* variance, int64_t pixels, int64_t channels, double eps, float slope, int bfloat16,
                     int threads) {
  const auto run = [&](const auto* from, auto* to) {
    batch_norm(from, weight, bias, to, factors, mean, variance, pixels, channels, eps, slope, threads);
  };
  bfloat16 ? run((const BFloat16*)x, (BFloat16*)y) : run((const float*)x, (float*)y);
}

// See batch_norm_backward above. grad, x and grad_x are bfloat16 or float32.
void bvae_batch_norm_backward(const void* grad, const void* x, const float* factors, const float* mean,
                              void* grad_x, float* grad_weight, float* grad_bias, int64_t pixels,
                              int64_t channels, float slope, int bfloat16, int threads) {
  const auto run = [&](const auto* g, const auto* from, auto* to) {
    batch_norm_backward(g, from, factors, mean, to, grad_weight, grad_bias, pixels, channels, slope, threads);
  };
  bfloat16 ? run((const BFloat16*)grad, (const BFloat16*)x, (BFloat16*)grad_x)
           : run((const float*)grad, (const float*)x, (float*)grad_x);
}

}  // extern "C"
