// DCNv3 on the CPU, forward and backward in one pass each. Plain C interface: nothing of PyTorch is included, so this
// compiles in seconds, needs no Python headers and does not depend on the version of torch.
//
// One task is one group of one image. It copies the channels of its group into a frame: float rows of one pixel each,
// with two rows and columns of zeros on every side. A sample then needs no case distinction: whatever lies outside
// reads zeros, and its gradient is added to a border that nobody reads. The 4 * points rows that a pixel gathers lie
// close together, however many channels there are. Tasks write to channels of their own, so there is nothing to
// synchronise and results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int kBorder = 2;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

enum Type : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };

// ---------------------------------------------------------------------------------------------- types of the tensors

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float from_bfloat16(uint16_t v) { return bits_to_float(uint32_t(v) << 16); }

uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(0x7fc0);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t v) {
  const uint32_t sign = uint32_t(v & 0x8000u) << 16, rest = v & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Half as integer, read as float with the exponents' difference multiplied away: exact, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

uint16_t to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: adding one half lets the float unit round to multiples of 2^-24
    const uint32_t rounded = float_to_bits(bits_to_float(rest) + 0.5f);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13));
}

template <typename T>
constexpr int kOwn = sizeof(T) == 4 ? kFloat : kDouble;

template <typename T>
__attribute__((noinline)) void read_other(T* out, const void* from, int type, int64_t at, int count) {
  if (type == kFloat) {
    for (int i = 0; i < count; ++i) out[i] = T(static_cast<const float*>(from)[at + i]);
  } else if (type == kBFloat16) {
    for (int i = 0; i < count; ++i) out[i] = T(from_bfloat16(static_cast<const uint16_t*>(from)[at + i]));
  } else {
    for (int i = 0; i < count; ++i) out[i] = T(from_half(static_cast<const uint16_t*>(from)[at + i]));
  }
}

template <typename T>
__attribute__((noinline)) void write_other(void* to, int type, int64_t at, const T* from, int count) {
  if (type == kFloat) {
    for (int i = 0; i < count; ++i) static_cast<float*>(to)[at + i] = float(from[i]);
  } else if (type == kBFloat16) {
    for (int i = 0; i < count; ++i) static_cast<uint16_t*>(to)[at + i] = to_bfloat16(float(from[i]));
  } else {
    for (int i = 0; i < count; ++i) static_cast<uint16_t*>(to)[at + i] = to_half(float(from[i]));
  }
}

// `count` values of a tensor; WIDTH of them is the usual case.
template <int WIDTH, typename T>
inline void read(T* out, const void* from, int type, int64_t at, int count) {
  if (type != kOwn<T>)
    read_other(out, from, type, at, count);
  else if (count == WIDTH)
    std::memcpy(out, static_cast<const T*>(from) + at, WIDTH * sizeof(T));
  else
    std::memcpy(out, static_cast<const T*>(from) + at, size_t(count) * sizeof(T));
}

template <int WIDTH, typename T>
inline void write(void* to, int type, int64_t at, const T* from, int count) {
  if (type != kOwn<T>)
    write_other(to, type, at, from, count);
  else if (count == WIDTH)
    std::memcpy(static_cast<T*>(to) + at, from, WIDTH * sizeof(T));
  else
    std::memcpy(static_cast<T*>(to) + at, from, size_t(count) * sizeof(T));
}

// ------------------------------------------------------------------------------------------------- vectors of channels

template <typename T, int LANES>
struct Vector {
  typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(LANES * sizeof(T)), may_alias));
};

// WIDTH channels as vectors of the machine's size.
template <typename T, int WIDTH>
struct Row {
  static constexpr int kFit = kVectorBytes / int(sizeof(T));
  static constexpr int kLanes = WIDTH < kFit ? WIDTH : kFit;
  static constexpr int kParts = WIDTH / kLanes;
  typedef typename Vector<T, kLanes>::type V;
  V part[kParts];

  static const V* at(const T* p) { return reinterpret_cast<const V*>(p); }
  static V* at(T* p) { return reinterpret_cast<V*>(p); }
};

template <typename T, int LANES>
inline T sum(typename Vector<T, LANES>::type v) {
  if constexpr (LANES == 1) {
    return v[0];
  } else if constexpr (LANES == 2) {
    return v[0] + v[1];
  } else {
    typedef typename Vector<T, LANES / 2>::type Half;
    Half low, high;
    std::memcpy(&low, &v, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return sum<T, LANES / 2>(low + high);
  }
}

template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * size_t(count), std::align_val_t(64)))) {}
  ~Aligned() { ::operator delete(data_, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// ------------------------------------------------------------------------------------------------------ one call

struct Call {
  int64_t images, height, width, out_height, out_width, groups, channels;  // channels of one group
  int64_t stride_y, stride_x, start_y, start_x;                            // start: centre - padding
  int points, softmax;
  double scale;
  const int32_t* grid;  // (points, 2): y, x around the centre
  int x_type, offset_type, mask_type, threads;
  const void *x, *offset, *mask;
  void* y;
  const void* grad_y;
  void *grad_x, *grad_offset, *grad_mask;

  int64_t frame_width() const { return width + 2 * kBorder; }
  int64_t frame_pixels() const { return (height + 2 * kBorder) * frame_width(); }
  bool of_samples() const { return grad_offset != nullptr || grad_mask != nullptr; }

  // Where a pixel of a group begins: its channels in x, its channels in y, its points in the mask.
  int64_t input(int64_t n, int64_t h, int64_t w, int64_t g) const {
    return (((n * height + h) * width + w) * groups + g) * channels;
  }
  int64_t output(int64_t n, int64_t h, int64_t w, int64_t g) const { return place(n, h, w, g) * channels; }
  int64_t point(int64_t n, int64_t h, int64_t w, int64_t g) const { return place(n, h, w, g) * points; }

 private:
  int64_t place(int64_t n, int64_t h, int64_t w, int64_t g) const {
    return ((n * out_height + h) * out_width + w) * groups + g;
  }
};

// exp(x) = 2^k exp(r), |r| <= ln(2) / 2, with a polynomial that is good to float's precision; x <= 0. Written without
// calls so that the compiler does all points at once. What is no normal number becomes zero, and NaN stays.
inline float exp_not_positive(float given) {
  const float x = given < -87.0f ? -87.0f : given;
  const float k = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return given < -87.0f ? 0.0f : p * bits_to_float(uint32_t(int32_t(k) + 127) << 23);
}
inline double exp_not_positive(double x) { return std::exp(x); }

constexpr int kChunk = 16;
constexpr int kAhead = 4;  // pixels between what is computed and what is fetched

// What up to 16 points of one output pixel have in common for all channels of the group. Arrays of a fixed size in one
// place, so that the compiler computes all points at once.
template <typename T>
struct alignas(64) Chunk {
  T grid_y[kChunk], grid_x[kChunk];  // around the centre, before the scale
  T offset[2 * kChunk];              // x, y
  T weight[kChunk];
  T part_y[kChunk], part_x[kChunk];  // from the corner to the sample, in [0, 1)
  T corner_weight[4][kChunk];        // times the weight of the point: above left, above right, below left, below right
  int32_t corner[kChunk];            // pixel of the frame: above left
  int points;
};

template <typename T>
class Samples {
 public:
  explicit Samples(const Call& call) : call_(call), chunks_(size_t((call.points + kChunk - 1) / kChunk)) {
    for (int t = 0; t < call.points; ++t) {
      Chunk<T>& chunk = chunks_[size_t(t / kChunk)];
      chunk.points = t % kChunk + 1;
      chunk.grid_y[t % kChunk] = T(call.grid[2 * t]);
      chunk.grid_x[t % kChunk] = T(call.grid[2 * t + 1]);
    }
  }

  // Reads the offsets and the mask of output (n, h, w) in group g; finds positions and, with softmax, weights.
  void locate(int64_t n, int64_t h, int64_t w, int64_t g) {
    int64_t at = call_.point(n, h, w, g);
    const T origin_y = T(h * call_.stride_y + call_.start_y), origin_x = T(w * call_.stride_x + call_.start_x);
    fetch_later(call_.offset, call_.offset_type, 2 * at, 2 * call_.points);
    fetch_later(call_.mask, call_.mask_type, at, call_.points);
    for (Chunk<T>& chunk : chunks_) {
      read<18>(chunk.offset, call_.offset, call_.offset_type, 2 * at, 2 * chunk.points);
      read<9>(chunk.weight, call_.mask, call_.mask_type, at, chunk.points);
      at += chunk.points;
      place(chunk, origin_y, origin_x);
    }
    if (call_.softmax) normalise();
  }

  // Weights of the four corners, for the output and the gradient of x.
  void weigh() {
    for (Chunk<T>& c : chunks_) {
      for (int u = 0; u < kChunk; ++u) {
        const T below = c.weight[u] * c.part_y[u], above = c.weight[u] - below;
        c.corner_weight[1][u] = above * c.part_x[u];
        c.corner_weight[0][u] = above - above * c.part_x[u];
        c.corner_weight[3][u] = below * c.part_x[u];
        c.corner_weight[2][u] = below - below * c.part_x[u];
      }
    }
  }

  // From the sums over the channels of d/d weight, d/d y and d/d x to the gradients of the offsets and the mask.
  void store_gradients(const T* sums, int64_t n, int64_t h, int64_t w, int64_t g) const {
    T mean = 0;
    if (call_.softmax) {
      const T* sum = sums;
      for (const Chunk<T>& chunk : chunks_)
        for (int u = 0; u < chunk.points; ++u, sum += 3) mean += chunk.weight[u] * sum[0];
    }
    int64_t at = call_.point(n, h, w, g);
    T of_offset[2 * kChunk], of_mask[kChunk];
    for (const Chunk<T>& chunk : chunks_) {
      for (int u = 0; u < chunk.points; ++u, sums += 3) {
        of_mask[u] = call_.softmax ? chunk.weight[u] * (sums[0] - mean) : sums[0];
        of_offset[2 * u] = T(call_.scale) * chunk.weight[u] * sums[2];
        of_offset[2 * u + 1] = T(call_.scale) * chunk.weight[u] * sums[1];
      }
      if (call_.grad_offset) write<18>(call_.grad_offset, call_.offset_type, 2 * at, of_offset, 2 * chunk.points);
      if (call_.grad_mask) write<9>(call_.grad_mask, call_.mask_type, at, of_mask, chunk.points);
      at += chunk.points;
    }
  }

  const std::vector<Chunk<T>>& chunks() const { return chunks_; }

 private:
  // The values of one group are far apart, too far for the machine to guess which are next.
  void fetch_later(const void* from, int type, int64_t at, int64_t count) const {
    const int64_t size = type == kDouble ? 8 : type == kFloat ? 4 : 2;
    const char* next = static_cast<const char*>(from) + (at + kAhead * call_.groups * count) * size;
    for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(next + byte);
    __builtin_prefetch(next + count * size - 1);
  }

  void place(Chunk<T>& c, T origin_y, T origin_x) const {
    const T scale = T(call_.scale), low = T(-kBorder), high_y = T(call_.height), high_x = T(call_.width);
    const int32_t frame_width = int32_t(call_.frame_width());
    for (int u = 0; u < kChunk; ++u) {
      T y = origin_y + scale * (c.grid_y[u] + c.offset[2 * u + 1]);
      T x = origin_x + scale * (c.grid_x[u] + c.offset[2 * u]);
      // Everything outside moves into the border. These comparisons are false for NaN.
      y = y >= T(-1) ? y : low;
      x = x >= T(-1) ? x : low;
      y = y < high_y ? y : high_y;
      x = x < high_x ? x : high_x;
      const T floor_y = std::floor(y), floor_x = std::floor(x);
      c.part_y[u] = y - floor_y;
      c.part_x[u] = x - floor_x;
      c.corner[u] = (int32_t(floor_y) + kBorder) * frame_width + int32_t(floor_x) + kBorder;
    }
  }

  void normalise() {
    T highest = chunks_[0].weight[0];
    for (const Chunk<T>& c : chunks_)
      for (int u = 0; u < c.points; ++u) highest = c.weight[u] > highest ? c.weight[u] : highest;
    T total = 0;
    for (Chunk<T>& c : chunks_) {
      std::fill(c.weight + c.points, c.weight + kChunk, highest);
      for (int u = 0; u < kChunk; ++u) c.weight[u] = exp_not_positive(c.weight[u] - highest);
      for (int u = 0; u < c.points; ++u) total += c.weight[u];
    }
    const T factor = T(1) / total;
    for (Chunk<T>& c : chunks_)
      for (int u = 0; u < kChunk; ++u) c.weight[u] *= factor;
  }

  const Call& call_;
  std::vector<Chunk<T>> chunks_;
};

// The frame of channels [first, first + WIDTH) of a group, zero where there is no pixel or no channel.
template <typename T, int WIDTH>
void fill_frame(T* frame, const Call& call, int64_t n, int64_t g, int64_t first) {
  const int count = int(std::min<int64_t>(WIDTH, call.channels - first));
  const int64_t row = call.frame_width() * WIDTH;
  std::fill(frame, frame + kBorder * row, T(0));
  std::fill(frame + (call.height + kBorder) * row, frame + call.frame_pixels() * WIDTH, T(0));
  for (int64_t h = 0; h < call.height; ++h) {
    T* out = frame + (h + kBorder) * row;
    std::fill(out, out + kBorder * WIDTH, T(0));
    std::fill(out + (call.width + kBorder) * WIDTH, out + row, T(0));
    out += kBorder * WIDTH;
    for (int64_t w = 0; w < call.width; ++w, out += WIDTH) {
      read<WIDTH>(out, call.x, call.x_type, call.input(n, h, w, g) + first, count);
      std::fill(out + count, out + WIDTH, T(0));
    }
  }
}

// What one thread works with; allocated before the threads start, so that nothing can fail among them.
template <typename T>
struct Workspace {
  Workspace(const Call& call, int width, bool of_samples, bool of_x)
      : samples(call),
        frame(of_samples ? call.frame_pixels() * width : 0),
        grad_frame(of_x ? call.frame_pixels() * width : 0),
        sums(call.points * 3 * (call.channels > width ? call.out_height * call.out_width : 1)) {}
  Samples<T> samples;
  Aligned<T> frame, grad_frame, sums;
};

// A part of the work: one group of one image, and some rows of its output.
struct Task {
  int64_t n, g, from, to;
};

template <typename T, int WIDTH>
void forward(const Call& call, const Task& task, Workspace<T>& space) {
  typedef Row<T, WIDTH> R;
  Samples<T>& samples = space.samples;
  T* const frame = space.frame.get();
  const int64_t row = call.frame_width() * WIDTH;
  for (int64_t first = 0; first < call.channels; first += WIDTH) {
    const int count = int(std::min<int64_t>(WIDTH, call.channels - first));
    fill_frame<T, WIDTH>(frame, call, task.n, task.g, first);
    for (int64_t h = task.from; h < task.to; ++h) {
      for (int64_t w = 0; w < call.out_width; ++w) {
        samples.locate(task.n, h, w, task.g);
        samples.weigh();
        // A sum of its own for every corner, because the additions of one sum wait for each other.
        R total[4] = {};
        for (const Chunk<T>& chunk : samples.chunks()) {
          for (int t = 0; t < chunk.points; ++t) {
            const T* const above = frame + int64_t(chunk.corner[t]) * WIDTH;
            const T* const below = above + row;
            for (int k = 0; k < R::kParts; ++k) {
              total[0].part[k] += chunk.corner_weight[0][t] * R::at(above)[k];
              total[1].part[k] += chunk.corner_weight[1][t] * R::at(above + WIDTH)[k];
              total[2].part[k] += chunk.corner_weight[2][t] * R::at(below)[k];
              total[3].part[k] += chunk.corner_weight[3][t] * R::at(below + WIDTH)[k];
            }
          }
        }
        alignas(64) T result[WIDTH];
        for (int k = 0; k < R::kParts; ++k)
          R::at(result)[k] = (total[0].part[k] + total[1].part[k]) + (total[2].part[k] + total[3].part[k]);
        write<WIDTH>(call.y, call.x_type, call.output(task.n, h, w, task.g) + first, result, count);
      }
    }
  }
}

template <typename T, int WIDTH>
void backward(const Call& call, const Task& task, Workspace<T>& space) {
  typedef Row<T, WIDTH> R;
  Samples<T>& samples = space.samples;
  T* const frame = space.frame.get();
  T* const grad_frame = space.grad_frame.get();
  const int64_t row = call.frame_width() * WIDTH;
  const bool of_samples = call.of_samples();
  for (int64_t first = 0; first < call.channels; first += WIDTH) {
    const int count = int(std::min<int64_t>(WIDTH, call.channels - first));
    if (of_samples) fill_frame<T, WIDTH>(frame, call, task.n, task.g, first);
    if (call.grad_x) std::fill(grad_frame, grad_frame + call.frame_pixels() * WIDTH, T(0));
    for (int64_t h = task.from; h < task.to; ++h) {
      for (int64_t w = 0; w < call.out_width; ++w) {
        samples.locate(task.n, h, w, task.g);
        alignas(64) T given[WIDTH] = {};
        read<WIDTH>(given, call.grad_y, call.x_type, call.output(task.n, h, w, task.g) + first, count);
        R grad;
        for (int k = 0; k < R::kParts; ++k) grad.part[k] = R::at(given)[k];

        if (of_samples) {
          // Sums over the channels: d/d weight, d/d y and d/d x of every point. Kept for all pixels where the channels
          // come in several blocks.
          const bool kept = call.channels > WIDTH;
          T* const sums = space.sums.get() + (kept ? (h * call.out_width + w) * call.points * 3 : 0);
          T* sum_of = sums;
          for (const Chunk<T>& chunk : samples.chunks()) {
            for (int t = 0; t < chunk.points; ++t, sum_of += 3) {
              const T* const above = frame + int64_t(chunk.corner[t]) * WIDTH;
              const T* const below = above + row;
              const T part_y = chunk.part_y[t], part_x = chunk.part_x[t];
              typename R::V by_weight{}, by_y{}, by_x{};
              for (int k = 0; k < R::kParts; ++k) {
                const auto step_above = R::at(above + WIDTH)[k] - R::at(above)[k];
                const auto step_below = R::at(below + WIDTH)[k] - R::at(below)[k];
                const auto value_above = R::at(above)[k] + part_x * step_above;
                const auto step_down = R::at(below)[k] + part_x * step_below - value_above;
                by_weight += grad.part[k] * (value_above + part_y * step_down);
                by_y += grad.part[k] * step_down;
                by_x += grad.part[k] * (step_above + part_y * (step_below - step_above));
              }
              const T found[3] = {sum<T, R::kLanes>(by_weight), sum<T, R::kLanes>(by_y), sum<T, R::kLanes>(by_x)};
              for (int i = 0; i < 3; ++i) sum_of[i] = first ? sum_of[i] + found[i] : found[i];
            }
          }
          if (first + WIDTH >= call.channels) samples.store_gradients(sums, task.n, h, w, task.g);
        }

        if (call.grad_x) {
          samples.weigh();
          for (const Chunk<T>& chunk : samples.chunks()) {
            for (int t = 0; t < chunk.points; ++t) {
              T* const above = grad_frame + int64_t(chunk.corner[t]) * WIDTH;
              T* const below = above + row;
              for (int k = 0; k < R::kParts; ++k) {
                R::at(above)[k] += chunk.corner_weight[0][t] * grad.part[k];
                R::at(above + WIDTH)[k] += chunk.corner_weight[1][t] * grad.part[k];
                R::at(below)[k] += chunk.corner_weight[2][t] * grad.part[k];
                R::at(below + WIDTH)[k] += chunk.corner_weight[3][t] * grad.part[k];
              }
            }
          }
        }
      }
    }
    if (call.grad_x) {
      for (int64_t h = 0; h < call.height; ++h)
        for (int64_t w = 0; w < call.width; ++w)
          write<WIDTH>(call.grad_x, call.x_type, call.input(task.n, h, w, task.g) + first,
                       grad_frame + (h + kBorder) * row + (w + kBorder) * WIDTH, count);
    }
  }
}

template <typename T, int WIDTH>
void run_all(const Call& call) {
  const bool is_backward = call.grad_y != nullptr;
  // Too few groups for the threads: their outputs are divided, too, where nothing is added up over the image.
  const int64_t maps = call.images * call.groups;
  const int64_t wanted = maps >= call.threads || call.grad_x ? 1 : (call.threads + maps - 1) / maps;
  const int64_t bands = std::min(wanted, call.out_height);
  const int64_t tasks = maps * bands;
  const int threads = int(std::min<int64_t>(call.threads, tasks));
  if (call.frame_pixels() > std::numeric_limits<int32_t>::max()) throw std::bad_alloc();

  std::vector<std::unique_ptr<Workspace<T>>> spaces;
  for (int i = 0; i < threads; ++i)
    spaces.emplace_back(
        new Workspace<T>(call, WIDTH, !is_backward || call.of_samples(), is_backward && call.grad_x != nullptr));

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) {
#ifdef _OPENMP
    Workspace<T>& space = *spaces[size_t(omp_get_thread_num())];
#else
    Workspace<T>& space = *spaces[0];
#endif
    const int64_t map = i / bands, band = i % bands;
    const Task task{map / call.groups, map % call.groups, call.out_height * band / bands,
                    call.out_height * (band + 1) / bands};
    if (is_backward)
      backward<T, WIDTH>(call, task, space);
    else
      forward<T, WIDTH>(call, task, space);
  }
}

template <typename T>
void run_type(const Call& call) {
  if (call.channels <= 8)
    run_all<T, 8>(call);
  else if (call.channels % 32 == 0)
    run_all<T, 32>(call);
  else
    run_all<T, 16>(call);
}

}  // namespace

// The output where grad_y is null, otherwise the gradients whose pointers are not null. `sizes` holds the numbers of a
// Call in the order below. Returns 0, or 1 where memory does not suffice.
extern "C" int torchgraft_dcnv3(const int64_t* sizes, const int32_t* grid, double scale, const void* x,
                                const void* offset, const void* mask, void* y, const void* grad_y, void* grad_x,
                                void* grad_offset, void* grad_mask) {
  Call call{};
  for (int64_t* field : {&call.images, &call.height, &call.width, &call.out_height, &call.out_width, &call.groups,
                         &call.channels, &call.stride_y, &call.stride_x, &call.start_y, &call.start_x})
    *field = *sizes++;
  for (int* option : {&call.points, &call.softmax, &call.x_type, &call.offset_type, &call.mask_type, &call.threads})
    *option = int(*sizes++);
  call.grid = grid;
  call.scale = scale;
  call.x = x;
  call.offset = offset;
  call.mask = mask;
  call.y = y;
  call.grad_y = grad_y;
  call.grad_x = grad_x;
  call.grad_offset = grad_offset;
  call.grad_mask = grad_mask;
  try {
    if (call.x_type == kDouble)
      run_type<double>(call);
    else
      run_type<float>(call);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
