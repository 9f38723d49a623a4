// The layers of a convolutional VAE for which PyTorch's own CPU kernels are far from the machine's peak.
//
// Tensors are float32 in channels_last: [N, H, W, C] in memory, without gaps. Every sum has a fixed order for a
// number of threads, so equal inputs give equal bits. Channels are padded to whole vectors where that helps, so
// any number of them is allowed. kernels/cpu/convolution.py and batch_norm.py hold the formulas and call these.

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
constexpr int64_t PIECE = 16;  // pixels whose sums are float32; the pieces are added in float64

inline float leaky(float v, float factor, float slope) { return v > 0 ? factor : factor * slope; }

// Two sums per channel over the pixels, by `add(pixel, a, b)`, which adds a pixel to float32 sums.
template <typename F>
std::vector<double> two_sums(int64_t pixels, int64_t channels, int threads, F add) {
  std::vector<double> sums(2 * channels * threads, 0.0);
  in_parts(threads, divide_up(pixels, PIECE), [&](int part, int64_t first, int64_t last) {
    double* total = sums.data() + 2 * channels * part;
    std::vector<float> piece(2 * channels);
    for (int64_t item = first; item < last; item++) {
      std::fill(piece.begin(), piece.end(), 0.0f);
      for (int64_t m = item * PIECE; m < std::min((item + 1) * PIECE, pixels); m++)
        add(m, piece.data(), piece.data() + channels);
      for (int64_t c = 0; c < 2 * channels; c++) total[c] += piece[c];
    }
  });
  for (int part = 1; part < threads; part++)
    for (int64_t c = 0; c < 2 * channels; c++) sums[c] += sums[2 * channels * part + c];
  sums.resize(2 * channels);
  return sums;
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

// y = leaky_relu((x - mean) * scale + shift) of x [pixels, C], by the statistics of its channels. Writes mean [C],
// the unbiased variance [C] and factors [4, C]: scale, shift, 1 / sqrt(variance + eps), and what rounding took from
// mean, which shift contains too.
void bvae_batch_norm(const float* x, const float* weight, const float* bias, float* y, float* factors, float* mean,
                     float* variance, int64_t pixels, int64_t channels, double eps, float slope, int threads) {
  // Differences from the first pixel: squares of the values themselves would cancel where a mean is large.
  const auto sums = two_sums(pixels, channels, threads, [&](int64_t m, float* a, float* b) {
    const float* row = x + m * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      const float d = row[c] - x[c];
      a[c] += d;
      b[c] += d * d;
    }
  });
  float *scale = factors, *shift = scale + channels, *inverse = shift + channels, *rest = inverse + channels;
  for (int64_t c = 0; c < channels; c++) {
    const double d = sums[c] / pixels, m = x[c] + d;
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
  in_parts(threads, pixels, [&](int, int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      const float* row = x + m * channels;
      float* to = y + m * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const float v = (row[c] - mean[c]) * scale[c] + shift[c];
        to[c] = leaky(v, v, slope);
      }
    }
  });
}

// The gradients of x [pixels, C], weight and bias from y's, with the factors and the mean of the forward pass.
void bvae_batch_norm_backward(const float* grad, const float* x, const float* factors, const float* mean,
                              float* grad_x, float* grad_weight, float* grad_bias, int64_t pixels,
                              int64_t channels, float slope, int threads) {
  const float *scale = factors, *shift = scale + channels, *inverse = shift + channels, *rest = inverse + channels;
  const auto sums = two_sums(pixels, channels, threads, [&](int64_t m, float* a, float* b) {
    const float *row = x + m * channels, *g = grad + m * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
      const float d = row[c] - mean[c], through = leaky(d * scale[c] + shift[c], g[c], slope);
      a[c] += through;
      b[c] += through * d;
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
  in_parts(threads, pixels, [&](int, int64_t first, int64_t last) {
    const float *p = constant.data(), *q = linear.data();
    for (int64_t m = first; m < last; m++) {
      const float *row = x + m * channels, *g = grad + m * channels;
      float* to = grad_x + m * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) {
        const float d = row[c] - mean[c], through = leaky(d * scale[c] + shift[c], g[c], slope);
        to[c] = scale[c] * (through - p[c] - d * q[c]);
      }
    }
  });
}

}  // extern "C"
